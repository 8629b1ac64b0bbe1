"""The chat of a model: the template that its conversations are trained and answered by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpjax.data.chat import Chat
from mpjax.errors import ConfigError
from mpjax.json_text import parse_json
from mpjax.models.hf import Metadata
from mpjax.typing import Settings

SETTINGS, APART = "tokenizer_config.json", "chat_template.jinja"
PROMPT = "{}\n"  # around a prompt, where neither the model nor the user says otherwise


def own_template(files: Mapping[str, bytes | str]) -> str | None:
    """Returns the chat template that the files of a checkpoint hold, if they do.

    Raises:
      ConfigError: a file that is no JSON object or no text.
    """
    if APART in files:  # where newer versions keep it
        text = files[APART]
        try:
            return text if isinstance(text, str) else text.decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"checkpoint: {APART} is not UTF-8; fetch it again") from None
    found = _settings(files).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def prompt_settings(tokenizer: Any, prompt: str) -> Settings:
    """Returns a template that puts the same around each turn but the assistant's, and its tokens.

    As fields of a ``tokenizer_config.json``: `chat_template`, `eos_token` behind each answer, and
    `bos_token` if the tokenizer puts one before each text.

    Args:
      tokenizer: of the model.
      prompt: what stands around a prompt; ``{}`` is the prompt.
    """
    before, after = (json.dumps(part, ensure_ascii=False) for part in prompt.split("{}"))
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
        "{% else %}{{ " + before + " }}{{ m.content }}{{ " + after + " }}{% endif %}{% endfor %}"
    )
    found: Settings = {"eos_token": tokenizer.decode([tokenizer.separator])}
    if tokenizer.prefix:
        found["bos_token"] = tokenizer.decode(tokenizer.prefix)
        template = "{{ bos_token }}" + template
    return found | {"chat_template": template}


def token_names(files: Mapping[str, bytes | str]) -> dict[str, str]:
    """Returns what the files of a checkpoint call its special tokens, such as ``eos_token``."""
    found = {}
    for name, token in _settings(files).items():
        if name.endswith("_token") and isinstance(token, str | dict):
            found[name] = str(token["content"] if isinstance(token, dict) else token)
    return found


def checkpoint_chat(tokenizer: str, metadata: Metadata, where: str) -> Chat:
    """Returns the chat of a checkpoint that has a template of its own.

    Args:
      tokenizer: text of its ``tokenizer.json``.
      metadata: of its model: the files beside it, and the tokens that end a text.
      where: the checkpoint, for errors.

    Raises:
      ConfigError: it has no template or names no end token, or as `Chat`.
    """
    template, names = own_template(metadata.files), token_names(metadata.files)
    if template is None:
        raise ConfigError(f"{where} has no chat_template; name a model that can chat")
    if "eos_token" not in names:
        raise ConfigError(f"{where} names no end token; name a model that can chat")
    # An instruct model may end a turn with a token and a text with another.
    return Chat(tokenizer, template, [names["eos_token"], *metadata.ends], names)


def run_chat(tokenizer: Any, metadata: Metadata, prompt: str) -> Chat:
    """Returns the chat that a run is tuned by, and answers by.

    Args:
      tokenizer: of the run.
      metadata: of its model.
      prompt: what stands around a prompt; without it the model's own template, or `PROMPT`.

    Raises:
      ConfigError: as `checkpoint_chat`.
    """
    text = tokenizer.to_text()
    if not prompt and own_template(metadata.files) is not None:
        return checkpoint_chat(text, metadata, "model")
    names = prompt_settings(tokenizer, prompt or PROMPT)
    template = names.pop("chat_template")
    return Chat(text, template, [names["eos_token"], *metadata.ends], names)


def _settings(files: Mapping[str, bytes | str]) -> Settings:
    if SETTINGS not in files:
        return {}
    found = parse_json(files[SETTINGS], f"checkpoint: {SETTINGS}")
    if not isinstance(found, dict):
        raise ConfigError(f"checkpoint: {SETTINGS} is no JSON object; fetch it again")
    return found
