"""Plan files: every key and value is checked, and what is left out is filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.stage_build import parts_of
from common.stage_plan import KINDS, read_plan
from mpjax.errors import ConfigError
from mpjax.train.stages import check_stages

ROOT = Path(__file__).resolve().parents[2]
PLAN = """
seed = 1
[model]
family = "decoder"
size = "tiny"
layers = 2
width = 16
heads = 2
[[stage]]
name = "lm"
kind = "language"
data = "{text}"
tokenizer = "bytes"
steps = 4
seq = 16
batch = 4
[[stage]]
name = "more"
kind = "language"
data = "{text}"
take = "weights+moments"
steps = 6
seq = 16
batch = 4
[[stage]]
name = "answer"
kind = "instruct"
data = "{pairs}"
steps = 4
lengths = [40]
batch = 4
[[stage]]
name = "student"
kind = "distil"
teacher = "answer"
take = "nothing"
model = {{ layers = 1, width = 32 }}
precision = "late:fp8:bf16:0.5"
steps = 4
batch = 4
[[stage]]
name = "sparse"
kind = "prune"
sparsity = 0.5
[[stage]]
name = "int8"
kind = "quantise"
"""


@pytest.fixture
def plan(tmp_path):
    """Writes the plan with changes of its text, and reads it."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(90)))
    rows = "".join(f"what is {i}\tnumber {i % 7}\n" for i in range(90))
    (tmp_path / "pairs.tsv").write_text(f"source\ttarget\n{rows}")

    def read(*changes: str):
        text = PLAN.format(text=tmp_path / "text.txt", pairs=tmp_path / "pairs.tsv")
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "plan.toml").write_text(text)
        return read_plan(tmp_path / "plan.toml")

    return read


@pytest.mark.parametrize("name", ["bert", "decoder"])
def test_the_plans_of_the_repository_are_plans(name):
    plan = read_plan(ROOT / "experiments" / "plans" / f"{name}.toml")
    assert len(plan.stages) > 3 and plan.stages[0].take == "nothing"


def test_every_kind_is_in_a_plan_of_the_repository():
    plans = [read_plan(path) for path in (ROOT / "experiments" / "plans").glob("*.toml")]
    assert {stage.kind for plan in plans for stage in plan.stages} == set(KINDS)


def test_a_plan_is_filled_in_and_its_stages_fit(plan):
    found = plan()
    assert [stage.source for stage in found.stages] == ["", "lm", "more", "answer", "student",
                                                        "sparse"]  # fmt: skip
    assert [getattr(s, "take", "") for s in found.stages] == [
        "nothing", "weights+moments", "weights", "nothing", "", ""
    ]  # fmt: skip
    assert [getattr(s, "warmup", None) for s in found.stages] == [2, 0, 2, 2, None, None]
    parts = parts_of(found)
    assert [part.steps_before for part in parts] == [0, 4, 0, 0, 0, 0]
    assert parts[3].teacher.model("fp32").config.width == 16
    assert [part.model("fp32").config.layers for part in parts] == [2, 2, 2, 1, 1, 1]
    assert {part.work.tokenizer.name for part in parts} == {"bytes"}
    stages = [part.as_stage() for part in parts]
    assert [stage.reads for stage in stages] == [
        (), (), (), ("answer",), ("student",), ("sparse",)
    ]  # fmt: skip
    outlines = check_stages(stages)
    assert outlines["more"].taken.moments and outlines["student"].taken is None
    assert [outline.steps for outline in outlines.values()] == [4, 6, 4, 4, 0, 0]
    pages = {stage.name: stage.page() for stage in stages}
    assert pages["student"]["model"]["width"] == 32 and pages["lm"]["plan"]["seed"] == 1


def test_pairs_are_packed_if_that_is_asked_for(plan):
    pages, batches = [], []
    for changes in ((), ("lengths = [40]", "lengths = [120]\npack = true")):
        part = parts_of(plan(*changes))[2]
        pages.append(part.as_stage().settings)
        batches.append(next(part.work.data(4, 0)))
    assert "pack" not in pages[0] and pages[1]["pack"] is True
    assert "segments" not in batches[0] and batches[1]["segments"].max() == 3
    assert batches[1]["weights"].sum() > 2 * batches[0]["weights"].sum()


def test_other_data_has_another_hash(plan, tmp_path):
    before = parts_of(plan())[0].as_stage().settings["data_hash"]
    assert parts_of(plan())[0].as_stage().settings["data_hash"] == before
    read = plan()
    (tmp_path / "text.txt").write_text("another text\n" * 90)
    assert parts_of(read)[0].as_stage().settings["data_hash"] != before


INT8 = 'name = "int8"\nkind = "quantise"'
SPARSE = "sparsity = 0.5"
MISTAKES = {
    "unknown kind": ('kind = "quantise"', 'kind = "quantize"', "did you mean quantise"),
    "no kind": ('kind = "quantise"', "", "unknown kind None; known: masked classify language"),
    "unknown key": (SPARSE, "sparsty = 0.5", "unknown key 'sparsty'; did you mean sparsity"),
    "a key of another kind": (INT8, f"{INT8}\nsteps = 4", "unknown key 'steps'; keys of quantise"),
    "a key of the file": ("seed = 1", "sead = 1", "unknown key 'sead'; did you mean seed"),
    "no name": ('name = "int8"\n', "", "stage 6: no name; give one"),
    "a name twice": ('name = "int8"', 'name = "lm"', "stage 'lm': stands twice"),
    "no data": ('data = "', 'prompt = "{{}}"\n#', "unknown key 'prompt'"),
    "no teacher": ('teacher = "answer"\n', "", "stage 'student': no teacher; give one"),
    "an unknown teacher": ('teacher = "answer"', 'teacher = "anwser"', "did you mean answer"),
    "a later one": ('teacher = "answer"', 'teacher = "sparse"', "before it: lm more answer"),
    "unknown take": (
        'take = "weights+moments"',
        'take = "moments"',
        "did you mean weights+moments",
    ),
    "nothing before": ("steps = 4\nseq", 'take = "weights"\nsteps = 4\nseq', "needs an earlier"),
    "no tokenizer": ('tokenizer = "bytes"\n', "", "stage 'lm': no tokenizer; give wordpiece:1000"),
    "a second tokenizer": ("steps = 6", 'steps = 6\ntokenizer = "bytes"', "whose weights know its"),
    "no steps": ("steps = 6\n", "", "stage 'more': no steps; give one"),
    "zero steps": ("steps = 6", "steps = 0", "stage 'more': steps: 0 is out of range"),
    "text for a number": ("steps = 6", 'steps = "6"', "steps is '6'; write a whole number"),
    "true for a number": ("steps = 6", "steps = true", "steps is True; write a whole number"),
    "a number for a list": ("lengths = [40]", "lengths = 40", "lengths is 40; write a list"),
    "a number for true": (
        "lengths = [40]",
        "lengths = [40]\npack = 1",
        "pack is 1; write true or f",
    ),
    "an empty list": ("lengths = [40]", "lengths = []", "lengths: empty"),
    "a rate of none": ("steps = 6", "steps = 6\nlr = nan", "lr: nan is out of range"),
    "pruned at once": (SPARSE, f"{SPARSE}\nlr = 0.1", "at once does not read lr; leave it out, or"),
    "no placeholder": ("lengths = [40]", 'lengths = [40]\nprompt = "Q"', "write {} once"),
    "unknown family": ('"decoder"', '"decodr"', "unknown family 'decodr'; did you mean decoder"),
    "no size": ('size = "tiny"\n', "", "model: no size; give one"),
    "a head": ("heads = 2", 'heads = 2\nhead = "class"', "model: head is what its stages' data"),
    "no model": ("[model]", "[modle]", "has no model; did you mean modle?"),
    "one stage alone": ("[[stage]]", "[stage]", "is no TOML"),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_file_is_one_line(plan, old, new, message):
    with pytest.raises(ConfigError) as error:
        plan(old, new)
    assert message in str(error.value) and str(error.value).startswith("plan")


UNFIT = {
    "another family": ('"decoder"', '"encoder"', "'lm': language trains a model of the family dec"),
    "no such data": ('data = "', 'data = "/none', "stage 'lm': data '/none"),
    "an unknown size": ('size = "tiny"', 'size = "tyni"', "stage 'lm': model: unknown size 'tyni'"),
    "a short context": ("heads = 2", "heads = 2\ncontext = 8", "'lm': context = 8 and a seq"),
    "an unknown field": ("heads = 2", "heads = 2\nhaeds = 2", "'haeds'"),
    "an unknown precision": ("steps = 6", 'steps = 6\nprecision = "bf61"', "'more': precision: u"),
    "moments that do not fit": ("steps = 6", 'steps = 6\noptimizer = "lion"', "do not fit, 'lm'"),
    "another width": ("steps = 6", "steps = 6\nmodel = { width = 32 }", "stage 'more': decoder/"),
    "a temperature of 0": ('teacher = "answer"', 'teacher = "answer"\ntemperature = 0',
                           "stage 'student': divergence: temperature=0.0"),
    "an unknown storage": (INT8, f'{INT8}\nstorage = "int5"', "stage 'int8': weights: 'int5'"),
    "a sparsity of all": (SPARSE, "sparsity = 1.5", "stage 'sparse': prune: sparsity=1.5"),
    "layers that are not": (INT8, 'name = "int8"\nkind = "layers"\nlayers = [2]',
                            "stage 'int8': layers = [2]: there are 1, 0 to 0"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), UNFIT.values(), ids=UNFIT)
def test_stages_that_do_not_fit_are_one_line(plan, old, new, message):
    found = plan(old, new)
    with pytest.raises(ConfigError) as error:
        check_stages([part.as_stage() for part in parts_of(found)])
    assert message in str(error.value) and "\n" not in str(error.value)
