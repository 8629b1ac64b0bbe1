"""Conversations as ids: nothing of a long one is cut or filled up."""

import datetime
import json
from pathlib import Path

import pytest
import tokenizers

from mpjax.data.chat.chat import Chat
from mpjax.data.chat.chat_template import ChatTemplate
from mpjax.errors import ConfigError
from tests.models.hf import text_cases

pytest.importorskip("jinja2", reason="the extra chat is not installed")


def test_a_tokenizers_own_limits_do_not_cut_a_conversation():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"h": 0, "i": 1}, []))
    backend.add_special_tokens(["<e>"])
    template = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
    talk = [{"role": "user", "content": "hi" * 9}]
    whole = Chat(backend.to_str(), template, "<e>").ids(talk)
    backend.enable_truncation(5)
    assert len(backend.encode("hi" * 9).ids) == 5
    assert Chat(backend.to_str(), template, "<e>").ids(talk) == whole == [0, 1] * 9 + [2]
    backend.no_truncation()
    backend.enable_padding(length=40, pad_token="h")
    assert Chat(backend.to_str(), template, "<e>").ids(talk) == whole


GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "hf_texts.json").read_text())["chats"]


@pytest.mark.parametrize("name", text_cases.TEMPLATES)
def test_conversations_are_rendered_as_transformers_renders_them(name):
    template, refused = ChatTemplate(text_cases.TEMPLATES[name]), 0
    for talk, turns in text_cases.CONVERSATIONS.items():
        for how, options in text_cases.OPTIONS.items():
            want, settings = GOLDEN[name][f"{talk}, {how}"], text_cases.TOKENS | options
            if want is None:
                refused += 1
                with pytest.raises(ConfigError, match="the template (refuses|fails on) this conv"):
                    template.render(turns, **settings)
            else:
                assert template.render(turns, **settings) == want, (talk, how)
    assert refused < len(GOLDEN[name])


def test_a_date_is_todays():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    now = datetime.datetime.now
    before, text, after = now(), template.render([]), now()
    assert text in (before.strftime("%d %b %Y"), after.strftime("%d %b %Y"))


def test_what_went_wrong_is_said():
    one = [{"role": "user", "content": "hi"}]
    for template, message in (
        (
            "{{ raise_exception('only <one> system') }}",
            r"refuses this conversation \(only <one> sys",
        ),
        (
            "{{ nothing(1) }}",
            r"fails on this conversation \(UndefinedError: 'nothing' is undefined\)",
        ),
        ("{{ 1 + messages[0].content }}", r"fails on this conversation \(TypeError: "),
        ("{{ ''.__class__.__mro__ }}", r"fails on this conversation \(SecurityError"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            ChatTemplate(template).render(one)
        assert "\n" not in str(caught.value) and "turns" not in str(caught.value)
    with pytest.raises(ConfigError, match="the template is malformed"):
        ChatTemplate("{% for %}")
    for odd in ("hi", ["hi"], {"role": "user"}):
        with pytest.raises(ConfigError, match="give messages, such as"):
            ChatTemplate("").render(odd)


def test_several_tokens_may_end_an_answer():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"h": 0, "i": 1}, []))
    backend.add_special_tokens(["<e>", "<t>"])
    chat = Chat(backend.to_str(), "{{ eos_token }}", ["<t>", 2, 3])
    assert (chat.end, chat.ends, chat.ids([])) == (3, (3, 2), [3])
    for odd in ("<x>", ["<e>", 9], []):
        with pytest.raises(ConfigError, match=r"end token"):
            Chat(backend.to_str(), "", odd)
    # the template writes what stands around a conversation, so the tokenizer adds nothing
    begin = text_cases.tokenizer(text_cases.AROUND["BOS, as Llama 2"][0])
    talk = [{"role": "user", "content": "hi"}]
    template = "{{ bos_token }}{{ messages[0].content }}"
    assert Chat(begin.to_str(), template, "</s>", text_cases.TOKENS).ids(talk) == [1, 74, 75]
