"""JSON of somebody else: what is read is what `json` reads; what is bent or deep is one line."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpjax.errors import ConfigError
from mpjax.json_text import LARGEST, _outline, parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@settings(max_examples=50)
@given(VALUES)
def test_what_json_writes_is_read(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text, "a") == parse_json(text.encode("utf-8-sig"), "a") == value


def true_depth(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(true_depth, inner), default=0)


def true_pairs(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inner, list):
        return 0
    return len(inner) * isinstance(value, dict) + sum(map(true_pairs, inner))


@settings(max_examples=50)
@given(VALUES)
def test_depth_and_keys_are_those_of_the_value(value: Any) -> None:
    many = [value, {'"\\': [':"{', "\\"]}, *[[]] * 200]
    for text in (json.dumps(many), json.dumps(many, ensure_ascii=False)):
        assert _outline(text) == (true_depth(many), true_pairs(many))


def test_many_keys_collect_no_garbage() -> None:
    text = json.dumps({"model": {"vocab": {f"token {i}": i for i in range(50_000)}}})
    thresholds, collected = gc.get_threshold(), []
    gc.callbacks.append(lambda phase, info: collected.append(phase))
    gc.set_threshold(1000)
    try:
        assert len(parse_json(text, "a")["model"]["vocab"]) == 50_000
        count = len(collected)
        json.loads(text, object_pairs_hook=dict)  # what it is not to do
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.pop()
    assert count <= 2
    if sys.version_info < (3, 12):  # from then on Python collects between bytecodes alone
        assert len(collected) > 50


@pytest.mark.parametrize(
    "text", ['{"a:": 1, "b": {"\\\\": 1, "x": {}, "x": []}}', '[{}, {"x": ":", "x": "\\":"}]']
)
@pytest.mark.parametrize("others", [0, 2000])  # few keys are looked at, many are counted
def test_a_key_twice_is_found_at_any_depth(text: str, others: int) -> None:
    many = json.dumps({f":{i}": i for i in range(others)})
    assert parse_json(f"[{many}]", "a") == [json.loads(many)]
    with pytest.raises(ConfigError, match="the key 'x' twice in one object"):
        parse_json(f"[{many}, {text}]", "a")


@pytest.mark.parametrize("depth", [100, 101, 5000])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_a_hundred_levels_are_read_and_no_more(depth: int, begin: str, end: str) -> None:
    text = begin * depth + "1" + end * depth
    if depth == 100:
        assert true_depth(parse_json(text, "a")) == 100
        return
    with pytest.raises(ConfigError, match=f"a: not JSON .{depth} levels deep.; mend it"):
        parse_json(text, "a", "mend it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"x": 1, "x": 2}}', "the key 'x' twice in one object"),
        ('{"\\u001b[2J": 1, "\\u001b[2J": 2}', r"the key '\\x1b\[2J' twice"),
        (b"\xff", "can't decode byte 0xff"),
        (
            "9" * 5000,
            "Exceeds the limit .4300 digits. for integer string conversion",
        ),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json_is_one_line(text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_json(text, "a.json")
    assert str(error.value).startswith("a.json: not JSON (")
    assert str(error.value).endswith("; fetch it again")


def test_a_file_of_settings_has_a_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1]}', encoding="utf-8-sig")
    assert read_json(path) == {"a": [1]}
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, got a list"):
        read_json(path)
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ConfigError, match="67108865 bytes; expected settings"):
        read_json(path)
    with pytest.raises(ConfigError, match="cannot be read .Is a directory"):
        read_json(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "absent.json")
