"""Templates that would run for ever, or fill the memory: one line, and the next one is rendered."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from mpjax.data.chat import chat_template
from mpjax.data.chat.chat_template import ChatTemplate
from mpjax.errors import ConfigError

pytest.importorskip("jinja2", reason="the extra chat is not installed")

TALK = [{"role": "user", "content": "hi"}]
SAID = "{{ messages[0].content }}"
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


def _refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ChatTemplate(template).render(TALK)
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and len(text) < 500
    assert ChatTemplate(SAID).render(TALK) == "hi"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 2**33 }}",
        "{{ ('a' * 2**28) | length }}",
        "{% set n = namespace(l=[1]) %}{% for i in range(40) %}{% set n.l = n.l * 2 %}{% endfor %}",
        "{{ ('%' ~ 2**31 ~ 's') % 1 }}",
    ],
    ids=["a long text", "256 MB of text", "a list that doubles", "a format"],
)
def test_a_template_has_so_much_memory(template: str) -> None:
    assert ChatTemplate(SAID).render(TALK) == "hi"
    child = chat_template._CHILD._process
    _refused(template, "takes more than 3 s of a core or 160 MB; fetch it again")
    assert child is not None and child.returncode == -signal.SIGKILL  # its time was not up


@pytest.mark.parametrize(
    "template", [LOOP, "{{ 9**(9**9) }}"], ids=["loops in loops", "a power, while it is compiled"]
)
def test_a_template_has_so_much_time(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.1)
    assert ChatTemplate(SAID).render(TALK) == "hi"
    child = chat_template._CHILD._process
    _refused(template, "takes more than 0.1 s of a core")
    assert child is not None and child.returncode == -signal.SIGXCPU  # by the kernel, not by us


def test_where_a_system_has_no_limits_the_clock_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 3600.0)
    monkeypatch.setattr(chat_template, "_WALL", 0.5)
    with pytest.raises(ConfigError, match="takes more than 3600 s of a core"):
        ChatTemplate(LOOP).render(TALK)
    monkeypatch.setattr(chat_template, "_WALL", 60.0)
    assert ChatTemplate(SAID).render(TALK) == "hi"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than 4,00.,... ch"),
        ("{{ 1 / 0 }}", "fails on this conversation \\(ZeroDivisionError"),
        ("{{ 10.0 ** 400 }}", "fails on this conversation \\(OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "\\(RecursionError"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "the template is malformed"),
        ("{% include '/etc/passwd' %}", "fails on this conversation"),
        ("{{ raise_exception('\x1b[2J' ~ 'a' * 100000) }}", "refuses this conversation"),
    ],
)
def test_what_a_template_raises_is_one_line(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ChatTemplate(template).render(TALK)
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and len(text) <= 2000


@pytest.mark.parametrize("odd", [object(), {1, 2}, b"hi", 1j])
def test_a_conversation_is_plain_data(odd: Any) -> None:
    with pytest.raises(ConfigError, match="is no plain data .*give texts, numbers, lists, dicts"):
        ChatTemplate(SAID).render([{"role": "user", "content": odd}])
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(ConfigError, match="is no plain data"):
        ChatTemplate(SAID).render([{"role": "user", "content": itself}])
    with pytest.raises(ConfigError, match="the template is None; give its text"):
        ChatTemplate(None)  # type: ignore[arg-type]


def test_a_long_conversation_may_take_as_much_more() -> None:
    talk = [{"role": "user", "content": "é" * 3_000_000}] * 2
    every = ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert len(every.render(talk)) == 6_000_004


def test_threads_render_each_their_own() -> None:
    found: dict[int, str] = {}

    def render(i: int) -> None:
        found[i] = ChatTemplate(f"{i} {SAID}").render(TALK)

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i} hi" for i in range(8)}


def test_a_child_that_was_killed_is_made_anew() -> None:
    assert ChatTemplate(SAID).render(TALK) == "hi"
    chat_template._CHILD._process.kill()  # type: ignore[union-attr]
    chat_template._CHILD._process.wait()  # type: ignore[union-attr]
    assert ChatTemplate(SAID).render(TALK) == "hi"
