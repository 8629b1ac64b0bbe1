"""From a model and its parameters to a folder that `transformers` loads."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np

from mpjax.errors import ConfigError, need
from mpjax.formats import weight_view
from mpjax.models.core.checks import check_params, named_leaves
from mpjax.models.core.metadata import Metadata
from mpjax.models.core.network import Network
from mpjax.models.hf.architecture import ARCHITECTURES, Architecture, architecture_name
from mpjax.models.hf.checkpoint import CONFIG
from mpjax.models.hf.encoder_fields import pooling_files
from mpjax.models.hf.leaf_tensors import joined
from mpjax.models.hf.tensor_names import Weight
from mpjax.precision import parse_dtype
from mpjax.typing import Array, DTypeLike, Params

_INDEX = "model.safetensors.index.json"


def save_checkpoint(
    folder: str | Path,
    model: Network,
    params: Params,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    metadata: Metadata | None = None,
) -> None:
    """Writes safetensors, a config.json and what the model's metadata holds, whole or not at all.

    Quantised storage is written dequantised. Of a model that `load_checkpoint` returned, special
    tokens, settings of generation, the tokenizer's files and the labels go out again.

    Args:
      folder: new, or empty.
      model: a model whose shape transformers has: GPT-2, Llama, Mistral, Qwen2, Qwen3 or BERT.
      params: its weights.
      dtype: of all tensors in the files, such as `bf16`; None keeps the dtype of each weight.
      shard_bytes: most bytes of a file; larger checkpoints become several and an index.
      metadata: special tokens and files, such as a tokenizer.json, of a model that was made here;
        by default what the model was loaded with. The names of a classifier's classes are in its
        config: `load_checkpoint(..., labels=...)`, `encoder(..., labels=...)`.

    Raises:
      ConfigError: a folder that holds something, a shape that transformers has not, parameters of
        another model, numbers beyond dtype, or a disk that cannot be written.

    Example:
      See `load_checkpoint`.
    """
    target = Path(folder).expanduser()
    package = need("safetensors.numpy", "hub", f"{target}: export")
    broken = need("safetensors", "hub", f"{target}: export").SafetensorError  # no OSError
    wanted = None if dtype is None else parse_dtype(dtype)
    metadata = model.metadata if metadata is None else metadata
    loaded = str(metadata.config.get("model_type", ""))
    kind = ARCHITECTURES[model_type := architecture_name(model.config, loaded)]
    _check_empty(target)
    assert kind.write is not None  # `architecture_name` returns only architectures that have it
    own = {"model_type": model_type, "architectures": [kind.title(model.config)]}
    config = kind.write(model.config)
    if [getattr(model.config, name, 0) for name in ("classes", "head")] == [1, "class"]:
        own["problem_type"] = "regression"
    config |= dict(metadata.config) | own
    files = _checked(target, metadata.files)
    files |= pooling_files(model.config, files)
    check_params(model, params, "export")
    leaves = named_leaves(weight_view(params))
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        dtypes = _write_tensors(partial, model, leaves, kind, package, wanted, shard_bytes)
        config["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, broken) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{target}: cannot be written ({why}); free some space or name another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_export(folder: str | Path, config: object = None) -> None:
    """Checks that a model could be exported, before it is trained.

    Args:
      folder: where to.
      config: of the model; None where it is not known yet.

    Raises:
      ConfigError: a folder that holds something, a package that is not installed, or a shape that
        transformers has not.

    Example:
      >>> from mpjax.models import decoder
      >>> check_export("a-new-folder", decoder("tiny").config)
    """
    target = Path(folder).expanduser()
    need("safetensors.numpy", "hub", f"{target}: export")
    if config is not None:
        architecture_name(config)
    _check_empty(target)


def _check_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: export needs a new or empty folder; name another one")


def _checked(target: Path, files: Mapping[str, bytes | str]) -> dict[str, bytes]:
    """Returns the metadata's files as bytes; checks that their names are free and inside."""
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or name == CONFIG or path.match("model*.safe*"):
            raise ConfigError(
                f"{target}: metadata names the file {name!r}; give names inside the folder, of"
                " other files than weights and config"
            )
        if not isinstance(content, bytes | str):
            raise ConfigError(
                f"{target}: metadata: {name} is {type(content).__name__}; give its text or bytes"
            )
    return {n: x.encode() if isinstance(x, str) else x for n, x in files.items()}


def _write_tensors(
    folder: Path, model: Network, leaves: dict[str, Array], kind: Architecture,
    package: ModuleType, wanted: DTypeLike | None, shard_bytes: int,
) -> set[str]:  # fmt: skip
    """Writes a shard as soon as it is full; returns the names of the dtypes."""
    shape: Any = model.config  # of a kind that has tied weights and layers
    tensors: dict[str, list[tuple[Array, Weight]]] = {}
    for name, weight in kind.table.items():  # the table's order: embedding first
        if name in leaves:
            tensors.setdefault(weight.name, []).append((leaves[name], weight))
    for copy, original in kind.copies.items():  # of an untied head
        if not shape.tied and original in tensors and copy not in tensors:
            ((leaf, weight),) = tensors[original]
            tensors[copy] = [(leaf, dataclasses.replace(weight, name=copy))]
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0
    dtypes = set()

    def flush() -> None:
        part = folder / f"{len(shards)}.part"
        part.touch()
        usual = part.stat().st_mode  # safetensors may restrict the file to its owner
        package.save_file(shard, part, metadata={"format": "pt"})
        part.chmod(usual)
        shards.append(list(shard))
        shard.clear()

    for found in tensors.values():
        parts, weights = zip(*found, strict=True)
        for layer, name in enumerate(weights[0].names(shape.layers)):
            x = joined(list(parts), list(weights), layer, wanted or parts[0].dtype)
            if shard and size + x.nbytes > shard_bytes:
                flush()
                size = 0
            shard[name], size, total = x, size + x.nbytes, total + x.nbytes
            dtypes.add(x.dtype.name)
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return dtypes
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return dtypes
