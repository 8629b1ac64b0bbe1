"""What a checkpoint says beside its weights, and texts as ids, against transformers.

Run:       python -m benchmarks.checkpoints.hf_roundtrip [WHEEL or folder with *.jinja ...]
           in an environment that has torch and transformers too: pip install torch transformers;
           templates that are published: pip download --no-deps axolotl trl
Expected:  load -> save -> transformers loads: the same logits, fields of the config,
           generation_config, tokenizer, labels, and its `generate` stops where it did, for every
           architecture; our `generate` stops there too. Texts become the same ids, conversations
           the same text.

Writes `tests/golden/hf_texts.json` too: what transformers gave, for the tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from benchmarks.checkpoints import hf_logits
from benchmarks.common.page import ROOT, write
from mpjax.data import Tokenizer
from mpjax.data.chat.chat_template import ChatTemplate
from mpjax.errors import ConfigError
from mpjax.markdown import table
from mpjax.models import Decoder, Encoder, generate
from mpjax.models.hf import load_checkpoint, open_checkpoint, save_checkpoint
from tests.models.hf import cases, ours, text_cases

GOLDEN = ROOT / "tests" / "golden" / "hf_texts.json"
NEW = 8
SAYS = {True: "yes", False: "**no**"}
LABELS = {0: "neutral", 1: "positive", 2: "negative"}
# Fields of config.json that an export may change: they say who wrote it, or what the sizes say.
OWN = {"transformers_version", "_name_or_path", "dtype", "id2label", "label2id"}
BERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, classes": ("BertForSequenceClassification", dict(id2label=LABELS)),
    "bert, one number": ("BertForSequenceClassification", dict(num_labels=1)),
    "bert, tags": ("BertForTokenClassification", dict(id2label=LABELS)),
    "bert, no head": ("BertModel", {}),
}
INPUTS = dict(
    input_ids=torch.from_numpy(cases.ids("bert").astype(np.int64)),
    token_type_ids=torch.from_numpy(cases.token_types().astype(np.int64)),
    attention_mask=torch.from_numpy(cases.keep().astype(np.int64)),
)


def draw(model: Any) -> Any:
    """The model with its weights drawn by the rule of the cases."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(cases.weight(name, tuple(tensor.shape))))
    return model.eval()


def words(names: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A tokenizer of as many words as the cases' models have ids."""
    known = dict(zip(names, range(cases.VOCABULARY), strict=False))
    known |= {chr(ord("a") + i): i for i in range(len(known), cases.VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token=names[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(names))
    return backend


def llama_words() -> Any:
    """As Llama's: BOS in front, and a chat template."""
    backend = words(("<unk>", "<s>", "</s>"))
    backend.post_processor = text_cases._begin
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template=text_cases.TEMPLATES["generation"],
    )  # fmt: skip


def bert_words() -> Any:
    """As BERT's."""
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    backend = words(("[UNK]", "[PAD]", *names[2:]))
    sep, cls = (("[SEP]", 3), ("[CLS]", 2))
    backend.post_processor = tokenizers.processors.BertProcessing(sep, cls)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def same_text(folder: Path, tokenizer: Any) -> bool:
    """Whether the tokenizer of a folder is the same one for transformers, and for us."""
    theirs, again = map(
        transformers.AutoTokenizer.from_pretrained, (folder.parent / "theirs", folder)
    )
    texts = ["f g h", "", "f zzz"]
    special = again.special_tokens_map == theirs.special_tokens_map
    same = again.chat_template == theirs.chat_template and special
    same = same and theirs(texts)["input_ids"] == again(texts)["input_ids"]
    own = Tokenizer.from_text(open_checkpoint(folder).tokenizer_json() or "")
    found = [own.encode(text).tolist() for text in texts]
    return same and [tokenizer(text)["input_ids"] for text in texts] == found


def fields(config: Any) -> dict[str, Any]:
    """What a config says, as the next reader sees it."""
    return {k: v for k, v in config.to_dict().items() if k not in OWN}


def settings(folder: Path) -> dict[str, Any]:
    """What a folder says of generation."""
    found = transformers.GenerationConfig.from_pretrained(folder).to_diff_dict()
    return {k: v for k, v in found.items() if k != "transformers_version"}


def decoder(name: str, folder: Path) -> tuple[list[str], bool]:
    """A row of the table of decoders, and whether it holds."""
    model, tokenizer = hf_logits.build(name), llama_words()
    prompt = torch.from_numpy(cases.ids(name)[:, :4].astype(np.int64))
    # Else transformers takes the id that pads for padding.
    greedy = dict(max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(prompt))
    free = model.generate(prompt, eos_token_id=None, pad_token_id=0, **greedy)[0, 4:].tolist()
    ends = [next(t for t in range(cases.VOCABULARY) if t not in free), free[2]]
    for one in (model.config, model.generation_config):
        one.bos_token_id, one.eos_token_id, one.pad_token_id = 1, ends, 0
    model.save_pretrained(folder / "theirs")
    tokenizer.save_pretrained(folder / "theirs")
    want = model.generate(prompt, **greedy)[0, 4:].tolist()
    mine, params = load_checkpoint(folder / "theirs")
    assert isinstance(mine, Decoder)
    save_checkpoint(folder / "ours", mine, params)
    again = hf_logits.load(folder / "ours")
    got = again.generate(prompt, **greedy)[0, 4:].tolist()
    own = generate(
        mine, params, np.asarray(prompt, np.int32), new=NEW, temperature=0.0, end=mine.metadata.ends
    )
    stop = len(want)
    known = hf_logits.logits(name, model)
    checks = [
        ours.worst(name, hf_logits.logits(name, again), known) == 0,
        fields(again.config) == fields(model.config),
        settings(folder / "ours") == settings(folder / "theirs"),
        same_text(folder / "ours", tokenizer),
        got == want and len(want) < NEW,
        np.asarray(own)[0].tolist() == want + [want[-1]] * (NEW - stop),
    ]
    return [name, *(SAYS[holds] for holds in checks), f"{ends}: {want}"], all(checks)


def encoder(name: str, folder: Path, kept: dict[str, Any]) -> tuple[list[str], bool]:
    """A row of the table of encoders, and whether it holds."""
    title, more = BERTS[name]
    given = cases.CONFIGS["bert"] | {"architectures": [title]} | more
    given.pop("model_type")
    config = transformers.AutoConfig.for_model("bert", **given)
    config._attn_implementation = "eager"
    model, tokenizer = draw(getattr(transformers, title)(config)), bert_words()
    model.save_pretrained(folder / "theirs")
    tokenizer.save_pretrained(folder / "theirs")
    output = {"BertForTokenClassification": "token", "BertModel": "features"}.get(title, "class")
    with torch.no_grad():
        want = _first(model(**INPUTS))
    mine, params = load_checkpoint(folder / "theirs")
    assert isinstance(mine, Encoder)
    given = {"ids": cases.ids("bert"), "types": cases.token_types(), "keep": cases.keep()}
    found = np.asarray(mine.apply(params, given)[0][output])
    keep = cases.keep() if found.ndim == 3 else slice(None)
    error = float(np.abs(found - want)[keep].max() / np.abs(want).max())
    save_checkpoint(folder / "ours", mine, params)
    again = hf_logits.load(folder / "ours")
    with torch.no_grad():
        back = _first(again(**INPUTS))
    loss = None
    if name == "bert, one number":
        values = torch.tensor([[0.5], [-1.25]])
        loss = float(model(**INPUTS, labels=values).loss)
    shapes = hf_logits.shapes(model)
    kept[name] = {"tensors": shapes, "logits": hf_logits.short(want), "loss": loss}
    kept[name]["config"] = json.loads((folder / "theirs" / "config.json").read_text())
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    theirs = fields(model.config)
    if loss is not None:  # which transformers infers at the first loss
        theirs["problem_type"] = "regression"
    checks = [
        error <= ours.BAR,
        np.array_equal(back, want),
        fields(again.config) == theirs,
        same_text(folder / "ours", tokenizer),
        again.config.id2label == model.config.id2label
        and (output == "features" or mine.config.labels == labels),
    ]
    return [name, *(SAYS[holds] for holds in checks)], all(checks)


def _first(out: Any) -> np.ndarray:
    return out[0].numpy()


def ids(folder: Path, kept: dict[str, Any]) -> tuple[list[list[str]], bool]:
    """Rows of the table of tokenizers, and whether they hold."""
    rows, good = [], True
    for place, (name, (processor, flags)) in enumerate(text_cases.AROUND.items()):
        own = folder / str(place)
        own.mkdir()
        text_cases.tokenizer(processor).save(str(own / "tokenizer.json"))
        (own / "tokenizer_config.json").write_text(text_cases.settings(flags))
        (own / "config.json").write_text("{}")
        (own / "model.safetensors").write_bytes(_EMPTY)
        theirs = transformers.AutoTokenizer.from_pretrained(own)
        # As ours: what a text spells is text.
        want = [theirs(t, split_special_tokens=True)["input_ids"] for t in text_cases.TEXTS]
        mine = Tokenizer.from_text(open_checkpoint(own).tokenizer_json() or "")
        found = [mine.encode(text).tolist() for text in text_cases.TEXTS]
        kept[name] = want
        rows.append([name, str(want[0]), SAYS[found == want]])
        good = good and found == want
    return rows, good


_EMPTY = (2).to_bytes(8, "little") + b"{}"  # a safetensors file without a tensor


def rendered(theirs: Any, template: str, talk: Any, options: Any) -> Any:
    """The text that transformers makes of a conversation; None where the template refuses."""
    try:
        return theirs.apply_chat_template(talk, chat_template=template, tokenize=False, **options)
    except Exception:  # as many kinds as templates
        return None


def chats(templates: dict[str, str]) -> tuple[dict[str, Any], int, int, list[str]]:
    """What transformers renders; how many cases and refusals; and where ours differ."""
    backend = text_cases.tokenizer(None)
    names = text_cases.TOKENS
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    kept: dict[str, Any] = {}
    cases_, refused, wrong = 0, 0, []
    for name, template in templates.items():
        kept[name] = {}
        for talk, turns in text_cases.CONVERSATIONS.items():
            for how, options in text_cases.OPTIONS.items():
                want = rendered(theirs, template, turns, options)
                try:
                    found = ChatTemplate(template).render(turns, **(names | options))
                except ConfigError:
                    found = None
                kept[name][f"{talk}, {how}"] = want
                cases_, refused = cases_ + 1, refused + (want is None)
                if found != want:
                    wrong.append(f"{name}: {talk}, {how}")
    return kept, cases_, refused, wrong


def published(sources: list[str]) -> Iterator[tuple[str, str]]:
    """Templates in wheels and folders."""
    for source in map(Path, sources):
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                for name in wheel.namelist():
                    if name.endswith(".jinja"):
                        yield (
                            f"{source.stem.split('-')[0]}: {Path(name).stem}",
                            wheel.read(name).decode(),
                        )
        else:
            for path in sorted(source.rglob("*.jinja")):
                yield f"{source.name}: {path.stem}", path.read_text()


def main() -> None:
    """Compares, and writes the page and the texts that the tests use."""
    decoders = [name for name in cases.CONFIGS if name != "bert"]
    golden: dict[str, Any] = {"encoders": {}, "ids": {}, "defaults": {}}
    good = True
    rows: dict[str, list[list[str]]] = {"decoders": [], "encoders": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in decoders:
            row, holds = decoder(name, folder / name)
            rows["decoders"].append(row)
            good = good and holds
        for place, name in enumerate(BERTS):
            row, holds = encoder(name, folder / f"bert{place}", golden["encoders"])
            rows["encoders"].append(row)
            good = good and holds
        rows["ids"], holds = ids(folder, golden["ids"])
        good = good and holds
    for name in cases.CONFIGS:  # what a field is that a config.json leaves out
        config = transformers.AutoConfig.for_model(name).to_dict()
        golden["defaults"][name] = {k: v for k, v in config.items() if k != "transformers_version"}
    golden["chats"], count, refused, wrong = chats(text_cases.TEMPLATES)
    found = dict(published(sys.argv[1:]))
    _, more, more_refused, differ = chats(found)
    good = good and not wrong and not differ
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")
    }
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    golden = {"versions": versions} | golden
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False) + "\n")
    write(
        "hf_roundtrip",
        "Checkpoints that are loaded and saved again, and texts as ids, against transformers",
        f"""Against {used}. Tiny random models in float32, each with a tokenizer, a \
generation_config.json with two end tokens, and labels. Ours loads what theirs saved and saves it \
again; transformers loads that.

{
            table(
                [
                    "decoder",
                    "logits bit for bit",
                    "config",
                    "generation_config",
                    "tokenizer",
                    "their generate stops there too",
                    "ours too",
                    "ends: tokens",
                ],
                rows["decoders"],
            )
        }

{
            table(
                [
                    "encoder",
                    "our logits (2e-5)",
                    "theirs after the export, bit for bit",
                    "config",
                    "tokenizer",
                    "labels",
                ],
                rows["encoders"],
            )
        }

What stands around a text (`tokenizer.json`, and flags of `tokenizer_config.json`):

{table(["post-processor", "ids of 'hi'", "the same"], rows["ids"])}

Chat templates: {
            len(text_cases.TEMPLATES)
        } of our own, each with one thing that published ones do, \
x {len(text_cases.CONVERSATIONS)} conversations x {len(text_cases.OPTIONS)} settings: {
            count
        } texts, \
of which the template refuses {refused}; {len(wrong)} differ.
{len(found)} published ones ({more} texts, {more_refused} refused): {len(differ)} differ.
{", ".join(found) or "None was given."}

All as expected: {SAYS[good]}.""",
        "python -m benchmarks.checkpoints.hf_roundtrip axolotl-*.whl trl-*.whl",
    )
    for line in wrong + differ:
        print(line)
    sys.exit(not good)


if __name__ == "__main__":
    main()
