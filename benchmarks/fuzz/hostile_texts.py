"""Hostile tokenizers, chat templates and logs, made in a systematic way."""

from __future__ import annotations

import copy
import json
from typing import Any

from benchmarks.fuzz import mutants
from mpjax.train.report.manifest import read_manifest
from mpjax.train.report.metrics_writer import keep_until, read_metrics

Files = dict[str, bytes]

HUGE = 2**32 - 1
_PART = {"behavior": "Isolated", "invert": False, "type": "Split"}
# Regexes that go back over what they have read: nested, overlapping, empty, or no regexes.
REGEXES = (
    r"(\w+\s?)+$", r"(a+)+b", r"(a|a)*b", r"(.*)*\x01", r"(\w|\s)*\x01$", r"([^x]+)+y\z",
    r"\w[\s\S]*\b\B", r"(?:\w[\s\S]*){3}\x01", r"(", r"[", r"a{99999}", r"(?<=a+)b", r"\1(a)",
    "(?R",
    r"(\w+)\s+\1\s+\1\x01", r"(?:(?:\w+)*\s*)*\x01", r"(?=(\w+))\1\x01", "*", "+a", "(?i",
)  # fmt: skip
PATTERN_FIELDS = ("normalizer", "pre_tokenizer", "decoder")


def good_tokenizer() -> dict[str, Any]:
    """A byte-level BPE as it is published."""
    from tests.models.hf import text_cases

    return dict(json.loads(text_cases.tokenizer(None).to_str()))


def tokenizer_files(fields: Any) -> Files:
    """The files of a tokenizer's case."""
    return {"tokenizer.json": json.dumps(fields).encode("utf-8", "surrogatepass")}


def _paths(value: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the parts of a JSON value are, long objects and lists by their first two."""
    found = [so_far] if so_far else []
    items = list(value.items() if isinstance(value, dict) else enumerate(value)
                 if isinstance(value, list) else ())  # fmt: skip
    for key, inner in items[:2] if len(items) > 20 else items:
        found += _paths(inner, (*so_far, key))
    return found


def _with(fields: Any, path: tuple[Any, ...], value: Any) -> Any:
    new = copy.deepcopy(fields)
    holder = new
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return new


def tokenizers(good: Files) -> dict[str, Files]:
    """Ids, regexes, chains that grow, odd values at each place, and models of other kinds."""
    fields = good_tokenizer()
    found: dict[str, Any] = {}
    model = fields["model"]
    for number in (HUGE, 2**31, 10**6, -1, 0.5, True, None, "0", [0], 10**30):
        found[f"id {number!r:.20}"] = fields | {"model": model | {"vocab": {"a": number}}}
        token = dict(fields["added_tokens"][0])
        found[f"added id {number!r:.20}"] = fields | {"added_tokens": [token | {"id": number}]}
        around = {"type": "BertProcessing", "sep": ["[SEP]", number], "cls": ["[CLS]", 1]}
        if number not in (True,):
            found[f"id around {number!r:.20}"] = fields | {"post_processor": around}
    for regex in REGEXES:
        pattern = {"pattern": {"Regex": regex}}
        found[f"fine split {regex}"] = fields | {"pre_tokenizer": _PART | pattern}
        for field in ("normalizer", "decoder"):
            part = {"type": "Replace", "content": "x"} | pattern
            found[f"fine {field} {regex}"] = fields | {field: part}
    for grown in (2, 10, 100, 1000):
        for times in (4, 8, 16, 64):
            if grown**times < 10**6:
                continue
            chain = [
                {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * grown}
            ] * times
            for field, inside in (("normalizer", "normalizers"), ("decoder", "decoders")):
                found[f"{field} x{grown} {times} times"] = fields | {
                    field: {"type": "Sequence", inside: chain}
                }
    for kind, inside in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        for times in (20, 24, 2000):
            parts = [{"type": "ByteLevel", "add_prefix_space": True, "use_regex": False}] * times
            prepend = [{"type": "Prepend", "prepend": "\u00e9"}] if kind == "normalizer" else []
            chain_of = {"type": "Sequence", inside: [*prepend, *parts]}
            found[f"fine {times} {kind}s of bytes"] = fields | {kind: chain_of}
    found["no model"] = {k: v for k, v in fields.items() if k != "model"}
    found["no tokens"] = fields | {"model": model | {"vocab": {}}, "added_tokens": []}
    odds: tuple[Any, ...] = (None, HUGE, "", "\x1b[2J", [], {}, ["x"] * 300, -1)
    for path in _paths(fields):
        for i, odd in enumerate(odds):
            found[f"fine {'/'.join(map(str, path))} odd {i}"] = _with(fields, path, odd)
    return {title: tokenizer_files(one) for title, one in found.items()}


def read_tokenizer(folder: Any) -> None:
    """Opens it in the three ways and encodes an ordinary text."""
    from mpjax.data import make_tokenizer

    tokenizer = make_tokenizer(str(folder / "tokenizer.json"), [])
    ids = tokenizer.encode("The quick brown fox, 1234 times: \u00e9\u00df\n" * 50)
    tokenizer.decode(ids[:100])


GOOD_TEMPLATE = (
    b"{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    b"{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Expressions that take time or memory, reach for what a template must not have, or fail.
EXPRESSIONS = (
    "'a' * 2**33", "9**9**9", "'a'.ljust(10**10)", "range(10**9) | list", "'%999999999d' % 1",
    "('a' * 10**6) * 10**6", "[0] * 10**10", "range(10**12) | sum", "'a' | center(10**10)",
    "'{:>9999999999}'.format(1)", "1 / 0", "messages + 1", "'' + 1", "undefined_name.x.y",
    "messages.__class__.__mro__", "''.__class__.__base__.__subclasses__()",
    "self.__init__.__globals__", "cycler.__init__.__globals__.os", "lipsum.__globals__['os']",
    "raise_exception('\\x1b[2J' * 1000)", "messages[99].content", "messages | tojson(indent=10**9)",
    "namespace(x=1).__dict__", "'a' | attr('__class__')", "strftime_now('%Y' * 10**7)",
    "'x' | indent(10**10)", "'x' | truncate(-1, leeway=-10**9)", "dict(a=1) | xmlattr | int",
    "joiner.__call__.__globals__", "(1, 2, 3) | batch(10**10) | list", "'a' | wordwrap(0)",
)  # fmt: skip
FRAMES = (
    "{{{{ {} }}}}", "{{% set x = {} %}}{{{{ x }}}}", "{{% if {} %}}a{{% endif %}}",
    "{{% for i in {} %}}{{{{ i }}}}{{% endfor %}}", "{{{{ ({}) | string | length }}}}",
    "{{% for m in messages %}}{{{{ {} }}}}{{% endfor %}}",
    "{{% macro f() %}}{{{{ {} }}}}{{% endmacro %}}{{{{ f() }}}}",
)  # fmt: skip
LOOPS = (
    "{% for i in range(10**5) %}" * 3 + "x" + "{% endfor %}" * 3,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(10**8) %}xxxxxxxx{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    "{{ n.x }}", "{% include 'x' %}", "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{% for", "{{", "{% endfor %}", "{{ ((((((" * 500, "{% if 1 %}" * 2000,
)  # fmt: skip


def templates(good: Files) -> dict[str, Files]:
    """Each expression in each frame, and loops."""
    found = {
        f"fine {i} in {j}": frame.format(expression)
        for i, expression in enumerate(EXPRESSIONS)
        for j, frame in enumerate(FRAMES)
    }
    found |= {f"fine loop {i}": text for i, text in enumerate(LOOPS)}
    return {title: {"template.jinja": text.encode()} for title, text in found.items()}


def read_template(folder: Any) -> None:
    """Renders a conversation."""
    from mpjax.data.chat.chat_template import ChatTemplate

    text = (folder / "template.jinja").read_bytes().decode("utf-8", "replace")
    talk = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "hi"}]
    ChatTemplate(text).render(talk, add_generation_prompt=True, eos_token="</s>")


GOOD_LOG = b"".join(
    json.dumps({"step": n, "loss": 1 / n, "tokens_per_s": 10.0}).encode() + b"\n"
    for n in range(1, 9)
)
ODD_LINES = (
    b"\xff\xfe\0{", b"\0" * 4096, b"[1, 2]", b"7", b"null", b'{"loss": 1.0}', b'{"step": "7"}',
    b'{"step": 7.5}', b'{"step": true}', b"[" * 100_000, b'{"a":' * 100_000, b'{"step": 7, "lo',
    b'{"step": ' + b"9" * 10_000 + b"}", b'{"step": 3}{"step": 4}', b'{"step": -1}', b"\x1b[2J",
    b'{"step": 1e400}', b'{"step": 2, "step": 3}', b'"' + b"x" * 500_000, b"\xef\xbb\xbf{}",
)  # fmt: skip


def logs(good: Files) -> dict[str, Files]:
    """Each odd line at each place of a log, and at each of its ends."""
    lines = GOOD_LOG.splitlines(keepends=True)
    found = {
        f"fine line {i} at {at}": b"".join([*lines[:at], odd + b"\n", *lines[at:]])
        for i, odd in enumerate(ODD_LINES)
        for at in range(len(lines) + 1)
    }
    found |= {f"fine tail {i}": GOOD_LOG + odd for i, odd in enumerate(ODD_LINES)}
    return {title: {"metrics.jsonl": data} for title, data in found.items()}


def read_log(folder: Any) -> None:
    """Reads the log and manifest, and takes the log up to a step, as a resume does."""
    read_metrics(folder / "metrics.jsonl")
    keep_until(folder / "metrics.jsonl", 5)
    read_metrics(folder / "metrics.jsonl")
    read_manifest(folder)


def log_mutant(good: Files, rng: Any) -> Files:
    """A damaged log, line or manifest."""
    match int(rng.integers(3)):
        case 0:
            return {"metrics.jsonl": mutants.bytes_mutant(good["metrics.jsonl"], rng)}
        case 1:
            lines = good["metrics.jsonl"].splitlines()
            at = int(rng.integers(len(lines)))
            lines[at] = mutants.json_mutant(lines[at], rng)
            return {"metrics.jsonl": b"\n".join(lines) + b"\n"}
        case _:
            return {"manifest.json": mutants.json_mutant(good["manifest.json"], rng)}
