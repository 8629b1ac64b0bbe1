"""Damaged logs and manifests stop no run: the good part stays, the rest is set aside and said."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest

from mpjax.train.checkpoint import digest
from mpjax.train.report.manifest import read_manifest, write_manifest
from mpjax.train.report.metrics_writer import keep_until, read_metrics, to_line

LINES = [to_line({"step": n, "loss": 1 / n}).encode() + b"\n" for n in range(1, 11)]
GOOD = b"".join(LINES)
DEEP = b"[" * 100_000
DAMAGE = {
    "no UTF-8": b"\xff\xfe\x00{\n",
    "no UTF-8, no end": b'{"step": 11, "lo\xff',
    "nothing but NUL": b"\0" * 4096,
    "an array": b"[1, 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "no step": b'{"loss": 1.0}\n',
    "a step that is no number": b'{"step": "7", "loss": 1.0}\n',
    "a step that is a fraction": b'{"step": 7.5, "loss": 1.0}\n',
    "a step that is true": b'{"step": true, "loss": 1.0}\n',
    "deep": DEEP + b"\n",
    "deep, an object": b'{"a":' * 100_000 + b"\n",
    "deep, no end": DEEP,
    "cut in the middle": b'{"step": 7, "lo\n',
    "two on a line": b'{"step": 7, "loss": 1.0}{"step": 8, "loss": 1.0}\n',
    "many digits": b'{"step": ' + b"9" * 10_000 + b"}\n",
    "another program's": b"Traceback (most recent call last):\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("at", [0, 5, 10])
def test_the_good_part_stays_and_the_rest_is_set_aside(tmp_path, caplog, damage, at):
    if not damage.endswith(b"\n") and at < 10:
        damage += b"\n"
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES[:at]) + damage + b"".join(LINES[at:]))
    if damage != DAMAGE["no step"] and b'"step": 7.5' not in damage and b"true" not in damage:
        good = [json.loads(line) for line in LINES]
        assert [r for r in read_metrics(path) if r["step"] != "7"] == good
    with caplog.at_level(logging.WARNING, "mpjax.train"):
        keep_until(path, 8)
    assert path.read_bytes() == b"".join(LINES[:8]), "bit for bit"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{path}: 1 lines are no records, the first is line {at + 1}; moved to"
        " metrics.jsonl.damaged, the others are kept"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.damaged"]


def test_what_a_kill_leaves_is_dropped_without_a_word(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    for cut in range(1, len(LINES[-1]) - 1):
        path.write_bytes(b"".join(LINES[:9]) + LINES[-1][:cut])
        keep_until(path, 10)
        assert path.read_bytes() == b"".join(LINES[: 9 + (cut == len(LINES[-1]) - 1)])
    path.write_bytes(GOOD.rstrip(b"\n"))  # whole, but for the end of its line
    keep_until(path, 10)
    assert path.read_bytes() == GOOD
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and not caplog.records


def test_what_is_set_aside_is_added_to_what_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damage in (b"one\n", b"two\n"):
        path.write_bytes(GOOD + damage)
        keep_until(path, 10)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"one\ntwo\n"


def test_what_is_set_aside_goes_through_no_link(tmp_path):
    path, victim = tmp_path / "metrics.jsonl", tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "metrics.jsonl.damaged").symlink_to(victim)
    path.write_bytes(GOOD + b"one\n")
    with pytest.raises(OSError, match="symbolic links"):
        keep_until(path, 10)
    assert victim.read_text() == "mine" and path.read_bytes() == GOOD + b"one\n"


def test_200_random_damages_lose_nothing_of_the_good_part(tmp_path):
    draw, path = random.Random(0), tmp_path / "metrics.jsonl"
    for _ in range(200):
        data = bytearray(GOOD)
        at = draw.randrange(len(data))
        kind = draw.choice(["cut", "noise", "flip", "insert"])
        if kind == "cut":
            del data[at:]
        elif kind == "noise":
            data[at:] = draw.randbytes(draw.randrange(300))
        elif kind == "flip":
            data[at] ^= 1 << draw.randrange(8)
        else:
            data[at:at] = draw.randbytes(draw.randrange(1, 300))
        path.write_bytes(data)
        keep_until(path, 10)
        whole = [line + b"\n" for line in bytes(data).split(b"\n") if line + b"\n" in LINES]
        kept = path.read_bytes().splitlines(keepends=True)
        assert [line for line in kept if line in whole] == whole
        assert read_metrics(path) == [json.loads(line) for line in kept]


# Manifests.

HALVES = [b"", b'{"config": {"lr"', b'{"config": {}}'[:-1], b"\xff", b"[]", b'{"config": 1}', DEEP]


@pytest.mark.parametrize("content", HALVES)
def test_half_a_manifest_is_set_aside(tmp_path, caplog, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    assert read_manifest(tmp_path) is None
    with caplog.at_level(logging.WARNING, "mpjax.train"):
        write_manifest(tmp_path, {"config": {"lr": 1}})
    assert read_manifest(tmp_path) == {"config": {"lr": 1}}
    assert (tmp_path / "manifest.json.damaged").read_bytes() == content
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: is damaged; moved to manifest.json.damaged"
    ]


# Digests.


@pytest.fixture
def whole(tmp_path) -> Path:
    folder = tmp_path / "7"
    for name in ("meta/meta.json", "state/d/0"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("content")
    digest.write(folder)
    assert digest.damage(folder) is None and digest.damage(folder, "meta/meta.json") is None
    return folder


@pytest.mark.parametrize(
    ("content", "below", "says"),
    [
        ("{}", "", "lists no files"),
        ("{}", "meta/meta.json", "lists no meta/meta.json"),
        ('{"state/d/0": [7, 0]}', "meta/meta.json", "lists no meta/meta.json"),
        ("[]", "", "is not readable"),
        ("null", "", "is not readable"),
        ('{"a": 1}', "", "is not readable"),
        (DEEP.decode(), "", "is not readable"),
    ],
)
def test_a_digest_that_lists_nothing_is_no_proof(whole, content, below, says):
    (whole / digest.NAME).write_text(content)
    assert digest.damage(whole, below) == f"digest.json {says}"
