"""Tokenizers, chat templates and conversations, whose ids and texts transformers says.

`benchmarks/checkpoints/hf_roundtrip.py` asks it and keeps the answers in
`tests/golden/hf_texts.json`.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

TEXTS = ("hi", "", "a b  c", "<s> hi")
_SPECIAL = ("<unk>", "<s>", "</s>")
_BOS, _EOS = ("<s>", 1), ("</s>", 2)
_TEMPLATE = processors.TemplateProcessing
_LEVEL = processors.ByteLevel(trim_offsets=False)
_begin = _TEMPLATE(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[_BOS])
_both = _TEMPLATE(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[_BOS, _EOS])

# name -> (post-processor, what tokenizer_config.json says of it)
AROUND: dict[str, tuple[Any, dict[str, bool]]] = {
    "nothing": (None, {}),
    "byte level, as GPT-2": (_LEVEL, {}),
    "BOS, as Llama 2": (_begin, {}),
    "BOS in a sequence, as Llama 3": (processors.Sequence([_LEVEL, _begin]), {}),
    "BOS and EOS": (_both, {}),
    "RoBERTa": (processors.RobertaProcessing(_EOS, _BOS), {}),
    "BERT": (processors.BertProcessing(_EOS, _BOS), {}),
    # transformers 5 goes by the tokenizer.json, whatever the flags say
    "nothing, whatever a flag says": (None, {"add_bos_token": True, "add_eos_token": False}),
    "BOS, though a flag asks for EOS too": (_begin, {"add_bos_token": True, "add_eos_token": True}),
    "BOS, though a flag says no": (_begin, {"add_bos_token": False, "add_eos_token": False}),
}


def tokenizer(post_processor: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE without merges and a Llama's special tokens."""
    letters = {c: i + 3 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(
        models.BPE(dict(zip(_SPECIAL, range(3), strict=True)) | letters, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    if post_processor is not None:
        backend.post_processor = post_processor
    return backend


def pieces() -> tokenizers.Tokenizer:
    """A SentencePiece-like BPE whose decoder drops the first space of a text."""
    marked = {"\u2581": 3, "a": 4, "b": 5, "\u2581a": 6, "\u2581b": 7}
    known = dict(zip(_SPECIAL, range(3), strict=True)) | marked
    backend = tokenizers.Tokenizer(models.BPE(known, [("\u2581", "a"), ("\u2581", "b")]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(_SPECIAL))
    backend.post_processor = _begin
    return backend


def settings(flags: dict[str, bool]) -> str:
    """A tokenizer_config.json."""
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    return json.dumps(own | {"eos_token": "</s>"} | flags)


# Each has one thing that published templates do; what it shows is in its name.
TEMPLATES: dict[str, str] = {
    "tojson escapes nothing": (
        "{% for m in messages %}{{ m | tojson }}{% endfor %}"
        "{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}"
    ),
    "tojson with keywords": (
        "{{ messages[0] | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    ),
    "break and continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "[{{ m.content }}]{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}<{{ m.content }}>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    ),
    "a date, if it can": (
        "{%- if strftime_now is defined -%}{%- set d = strftime_now('%Y') -%}{%- else -%}"
        "{%- set d = 'never' -%}{%- endif -%}{{ bos_token }}{{ d | length }}"
        "{{ messages[-1].content }}"
    ),
    "namespace and slices": (
        "{%- set ns = namespace(last=-1) -%}{%- for m in messages[::-1] -%}"
        "{%- if ns.last < 0 and m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}{{ ns.last }}{{ messages[0]['content'].split(' ')[-1].strip('>') }}"
    ),
    "macros": (
        "{%- macro turn(m) -%}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{%- endmacro -%}"
        "{%- for m in messages -%}{{ turn(m) }}{%- endfor -%}"
    ),
    "turns that must alternate": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
    ),
    "reasoning": (
        "{% for m in messages %}{% if m.reasoning_content is defined %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    ),
    "calls of tools": (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% elif m.content is string %}{{ m.content }}{% else %}-{% endif %}{% endfor %}"
    ),
    "whitespace of blocks": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n"
        "  {{ m.content }}\n    {% endif %}\n"
        "{% endfor %}\n"
    ),
    "an absent name": "{{ bos_token }}{{ pad_token }}{{ messages | length }}",
}


def _turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "<1> & 'é'"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [_turn("user", "a <b> & 'c'")],
    "system": [_turn("system", 'be "kind"'), _turn("user", "hi")],
    "three": [_turn("user", "hi"), _turn("assistant", "yes & no"), _turn("user", "more")],
    "thought": [_turn("user", "é"), _turn("assistant", "b", reasoning="hm"), _turn("user", "c")],
    "call": [_turn("user", "a"), _turn("assistant", None, tool_calls=[_CALL]), _turn("tool", "r")],
    "two users": [_turn("user", "a"), _turn("user", "b")],
}
_PROPERTIES = {"x": {"type": "string", "description": "a < b & 'é'"}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": _PROPERTIES}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [TOOL], "add_generation_prompt": True},
    "no thinking": {"enable_thinking": False},
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
