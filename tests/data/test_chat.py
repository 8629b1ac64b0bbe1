"""Conversations as ids: nothing of a long one is cut or filled up."""

import pytest
import tokenizers

from mpjax.data.chat import Chat

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
