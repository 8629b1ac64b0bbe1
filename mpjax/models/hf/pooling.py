"""Mean pooling as sentence-transformers stores it, for which BERT's config.json has no field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpjax.json_text import parse_json
from mpjax.models.transformer.encoder_config import EncoderConfig

_MODULES, _POOLING = "modules.json", "1_Pooling/config.json"
_MEAN = "pooling_mode_mean_tokens"


def pools_mean(files: Mapping[str, bytes | str]) -> bool:
    """Returns whether the files of a checkpoint pool the mean of its tokens, and nothing else.

    Raises:
      ConfigError: the file that says what is pooled is no JSON.
    """
    if _MODULES not in files or _POOLING not in files:
        return False
    settings = parse_json(files[_POOLING], _POOLING)
    if not isinstance(settings, dict):
        return False
    modes = {name for name, on in settings.items() if name.startswith("pooling_mode_") and on}
    return modes == {_MEAN} or settings.get("pooling_mode") == "mean"


def pooling_files(config: Any, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns what an export of an encoder needs beside its files so that the mean is pooled."""
    if not isinstance(config, EncoderConfig) or config.head != "none" or config.pool != "mean":
        return {}
    if pools_mean(files):
        return {}
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": config.width, _MEAN: True}
    pooling["pooling_mode_cls_token"] = False
    return {
        name: json.dumps(value, indent=2).encode()
        for name, value in ((_MODULES, modules), (_POOLING, pooling))
    }
