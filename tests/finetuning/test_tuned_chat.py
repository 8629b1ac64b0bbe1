"""Conversations of one's own: trained, answered and exported by one template."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mpjax import predict
from mpjax.data.chat import Chat
from mpjax.data.tables.columns import column_names, read_columns
from mpjax.errors import ConfigError
from mpjax.finetuning import Finetuning, finetune, of_decoders
from mpjax.finetuning.of_decoders import Instructions
from mpjax.finetuning.sources import read_source
from mpjax.finetuning.tuned_chat import run_chat
from mpjax.models import decoder, generate
from mpjax.models.hf import save_checkpoint
from tests.models.hf import text_cases

pytest.importorskip("jinja2", reason="the extra chat is not installed")
pytest.importorskip("safetensors", reason="the extra hub is not installed")
pytestmark = pytest.mark.usefixtures("fast_compile")

SMALL: dict[str, Any] = dict(task="instruct", layers=1, width=16, heads=2, batch=8, steps=2)
OWN = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


TOOLS = [{"name": "clock", "parameters": {}}]


def talk(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{n}: say {n % 4}"},
            {"role": "assistant", "content": f"it is {n % 4}"}]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    model = decoder("tiny", layers=1, width=16, heads=2, vocabulary=259, context=64)
    save_checkpoint(folder, model, model.init(jax.random.key(0)))
    backend = text_cases.tokenizer(None)
    backend.save(str(folder / "tokenizer.json"))
    page = {"chat_template": OWN, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(page))
    return folder


def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The examples that runs are trained on, as they come."""
    found: list[Any] = []
    real = of_decoders.bucket_batches

    def spy(examples: Any, **settings: Any) -> Any:
        found.append(examples)
        return real(examples, **settings)

    monkeypatch.setattr(of_decoders, "bucket_batches", spy)
    return found


def test_a_checkpoint_is_tuned_and_asked_by_its_own_template(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    examples = taken(monkeypatch)
    talks = [talk(n) for n in range(48)]
    rows = [{"prompt": t[0]["content"], "completion": t[1]["content"]} for t in talks]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = SMALL | dict(model=str(checkpoint), longest=64)
    run = finetune(path, out=tmp_path / "a", export=str(tmp_path / "model"), **options)
    backend = text_cases.tokenizer(None)
    read = [backend.decode(e["inputs"].tolist(), skip_special_tokens=False) for e in examples[0]]
    wanted = {f"<s>user: {a['content']}</s>\n<s>assistant: {b['content']}" for a, b in talks}
    assert 24 < len(read) == len(set(read)) < 48 and set(read) < wanted
    # what it is asked is what it was taught to answer
    ids = backend.encode("<s>user: 3: say 3</s>\n<s>assistant: ", add_special_tokens=False).ids
    assert run.chat.ids(talk(3)[:1]) == ids
    out = np.asarray(generate(run.model, run.params, np.array([ids], np.int32), new=5,
                              temperature=0.0, end=run.ends)[0])  # fmt: skip
    stop = [*np.flatnonzero(np.isin(out, run.ends)), len(out)][0]
    said = backend.decode(out[:stop].tolist(), skip_special_tokens=False)
    (answer,) = run.predict(["3: say 3"], tokens=5)
    assert answer == {"text": said} == run.predict([talk(3)[:1]], tokens=5)[0]
    longer = [*talk(1), *talk(3)[:1]]
    assert run._prompt(longer, None) == run.chat.ids(longer) != run.chat.ids(talk(3)[:1])
    with pytest.raises(ConfigError, match=r"texts\[0\] is 3; give a text or a conversation"):
        run.predict([3])
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": talk(3)}) + "\n")
    command = [str(tmp_path / "a"), "--data", str(tmp_path / "asked.jsonl"), "--tokens", "5"]
    assert predict.main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"input": talk(3)[:1], "text": said}
    # the control: another prompt, in training and in chat; and the same rows as messages
    for data, prompt in ((path, "Q {}\nA "), ([{"messages": t} for t in talks], "")):
        source = read_source(Finetuning.of(options | {"prompt": prompt}), data)
        assert isinstance(source, Instructions)
        replace(source, metadata=run.model.metadata).work(run.tokenizer, ())
        text = backend.decode(examples[-1][0]["inputs"].tolist(), skip_special_tokens=False)
        assert (text in wanted) == (not prompt) and text.startswith("Q " if prompt else "<s>user")
        assert (run_chat(run.tokenizer, run.model.metadata, prompt).ids(talk(3)[:1]) == ids) == (
            not prompt
        )
    page = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert page["chat_template"] == OWN
    with pytest.raises(ConfigError, match="tools: the chat template shows none; leave them out"):
        run.predict([talk(3)[:1]], tools=[TOOLS])


def test_tools_of_a_conversation_are_trained_on_and_asked_with(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    examples = taken(monkeypatch)
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    page = json.loads((model / "tokenizer_config.json").read_text())
    page["chat_template"] = "{% if tools %}[{{ tools[0].name }}]{% endif %}" + OWN
    (model / "tokenizer_config.json").write_text(json.dumps(page))
    kinds = [TOOLS, json.dumps(TOOLS), None, []]
    rows = [{"messages": talk(n), "tools": kinds[n % 4]} for n in range(48)]
    options = SMALL | dict(model=str(model), longest=64)
    lines: list[tuple[str, str]] = []
    run = finetune(rows, out=tmp_path / "a", show=lines.extend, **options)
    backend = text_cases.tokenizer(None)
    for e in examples[0]:
        text = backend.decode(e["inputs"].tolist(), skip_special_tokens=False)
        number = int(text.partition("user: ")[2].partition(":")[0])
        assert text.startswith("[clock]<s>user") == (number % 4 < 2), text
    shown = sum(e["inputs"].tolist()[:1] == backend.encode("[").ids[-1:] for e in examples[0])
    assert ("conversations with tools", f"{shown}") in lines and shown > 9
    asked = run.chat.ids(talk(3)[:1], tools=TOOLS)
    assert run._prompt("3: say 3", TOOLS) == run._prompt(talk(3)[:1], TOOLS) == asked
    told: list[Any] = []
    monkeypatch.setattr(type(run), "_continued", lambda run, ids, *_: told.extend(ids) or [{}] * 2)
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:3]))
    assert predict.main([str(tmp_path / "a"), "--data", str(path)]) == 0
    assert told == [run.chat.ids(talk(1)[:1], tools=TOOLS), run.chat.ids(talk(2)[:1])]
    # a template that does not show them says so
    finetune(rows, out=tmp_path / "b", show=lines.extend, **options | {"model": str(checkpoint)})
    assert (
        lines[-3:] != lines
        and "the chat template does not show them" in dict(lines)["conversations with tools"]
    )
    assert "tools: the chat template does not show them" in caplog.text


def test_a_new_model_answers_and_is_exported_by_what_stood_around_its_prompts(
    tmp_path: Path,
) -> None:
    rows = [{"messages": [{"role": "system", "content": 'be "kind"'}, *talk(n), *talk(n + 1)]}
            for n in range(48)]  # fmt: skip
    run = finetune(rows, out=tmp_path / "a", prompt='é "{}"\n', vocabulary=300, **SMALL)
    assert list(run.predict(["say 3"], tokens=3)[0]) == ["text"]
    run.export(tmp_path / "model")
    page = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    tokenizer = (tmp_path / "model" / "tokenizer.json").read_text()
    theirs = Chat(tokenizer, page["chat_template"], page["eos_token"])
    ids = run.chat.ids(rows[0]["messages"][:4])
    assert theirs.ids(rows[0]["messages"][:4]) == ids
    assert run.tokenizer.decode(ids) == (
        'é "be "kind""\né "0: say 0"\nit is 0<|endoftext|>é "1: say 1"\n'
    )
    assert (
        run.chat.ids([{"role": "user", "content": "say 3"}])
        == run.tokenizer.prompt('é "say 3"\n').tolist()
    )


def test_messages_are_read_of_files_and_rows(tmp_path: Path) -> None:
    rows = [{"id": 7, "messages": talk(n)} for n in range(2)]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (path, rows, {"messages": [talk(0), talk(1)], "id": [7, 7]}):
        found = read_columns(source, {"messages": "messages"}).values["messages"]
        assert [json.loads(one) for one in found] == [talk(0), talk(1)]
        assert sorted(column_names(source)) == ["id", "messages"]
    names = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in talk(n)] for n in (0, 1)]
    found = read_columns({"conversations": shared}, {"a": "messages"}, {"a": "conversations"})
    assert [json.loads(one) for one in found.values["a"]] == [talk(0), talk(1)]
    source = read_source(Finetuning.of(SMALL), [{"conversations": one} for one in shared * 9])
    assert isinstance(source, Instructions) and list(source.sides.train) == ["messages"]
    assert column_names(iter(rows)) == [] and column_names(tmp_path / "none.jsonl") == []
    (tmp_path / "a.csv").write_text("prompt, completion\na,b\n")
    assert column_names(tmp_path / "a.csv") == ["prompt", "completion"]


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"messages": "hi"}] * 9, {}, r"row 1: 'messages' is 'hi'; expected messages, such as"),
        ([{"messages": [{"content": "a"}]}] * 9, {}, "expected messages, such as"),
        ([{"messages": talk(0)[:1]}] * 9, {}, "has no message of the role 'assistant'"),
        ([{"messages": None}] * 9, {}, "no 'messages'; fill it in"),
        ([{"messages": talk(0)}] * 9, {"task": "classify"}, "give the task 'instruct', or"),
        ([{"conversations": [{"from": "human", "value": "a"}]}] * 9, {}, "no message of the role"),
        ([{"messages": talk(0), "tools": "clock"}] * 9, {},
         r"row 1: 'tools': not JSON .*; give a list of JSON schemas of functions"),
        ([{"messages": talk(0), "tools": ["clock"]}] * 9, {},
         r"row 1: 'tools' is \['clock'\]; give a list of JSON schemas of functions"),
        ([{"prompt": "a"}] * 9, {}, r"no column 'answer' \(there: prompt\)"),
        ([{"messages": talk(0)}], {"prompt": "Q:"}, "prompt='Q:': expected {} once"),
        ([{"messages": talk(0)}], {"task": "lm", "prompt": "{}"}, "prompt='{}': lm has none"),
        ([{"source": "a", "target": "b"}], {"task": "seq2seq", "export": "m"},
         "export: transformers has no such encoder-decoder"),
        ([{"messages": talk(0)}], {"export": 3}, "export=3: expected a folder"),
        ([{"messages": talk(0)}], {"export": "."}, ".: export needs a new or empty folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(
    rows: list[dict[str, Any]], more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        finetune(rows, out=tmp_path / "run", **(SMALL | more))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
