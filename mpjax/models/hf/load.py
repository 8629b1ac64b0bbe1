"""From a checkpoint to a model and its parameters, one tensor at a time."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding

from mpjax.errors import ConfigError, explains_calls, listed
from mpjax.formats import Quantized, is_quantized
from mpjax.models.core.checks import named_leaves
from mpjax.models.core.module import stored
from mpjax.models.hf.architecture import Architecture, Transformer, architecture_of
from mpjax.models.hf.checkpoint import Checkpoint, open_checkpoint
from mpjax.models.hf.encoder_fields import pools_mean
from mpjax.models.hf.fields import FREE, Fields
from mpjax.models.hf.leaf_tensors import filled, tensor_shape
from mpjax.models.hf.tensor_files import Tensors
from mpjax.precision import Precision
from mpjax.typing import Axes, Json, Key, Params, PyTree, Settings, Shape

_FEW = 100  # layers
Placement = Callable[[Axes, Shape], Sharding]


@explains_calls
def load_checkpoint(
    source: str | Path | Checkpoint,
    precision: str | Precision = "fp32",
    *,
    architecture: str | None = None,
    new: Sequence[str] = (),
    key: Key | None = None,
    unused: Sequence[str] = (),
    ignore: Collection[str] = (),
    place: Placement | None = None,
    revision: str | None = None,
    **changes: Json,
) -> tuple[Transformer, Params]:
    """Returns the model that a checkpoint holds and its parameters.

    Tensors are read one at a time, straight into the dtype that the Precision stores and onto the
    devices. Missing, unexpected and misshaped tensors are all listed before any is read.

    Args:
      source: folder, file, or name on the Hugging Face Hub, as of `open_checkpoint`, or what that
        returned.
      precision: anything that `get_precision` reads.
      architecture: where the config names none: `bert gpt2 llama mistral qwen2 qwen3
        pytorch-seq2seq`; the last has no config, so its sizes are given as changes.
      new: patterns of our paths, such as `encoder/class/*`, that the checkpoint lacks and that
        are drawn as by `init`.
      key: of these draws.
      unused: patterns of the checkpoint's names, such as `cls.*`, that are left out.
      ignore: unknown fields of config.json that have no effect on the result.
      place: (logical axes, shape) -> the Sharding of a weight; all on the default device by
        default.
      revision: branch, tag or commit on the Hub.
      changes: fields of the model's config, such as `dropout=0.1` or `remat="full"`; `labels=` of
        a classifier names its classes anew, in the order of its logits.

    Returns:
      The model and its parameters. `model.config.labels` are the classes of a checkpoint's head in
      their order, and `model.metadata` is what the checkpoint says of special tokens and
      generation, with the files of its tokenizer: `save_checkpoint` writes them again.

    Raises:
      ConfigError: nothing at source, a broken file, an architecture, field or value that is not
        known, tensors that do not fit, or a weight that its dtype cannot hold.

    Example:
      >>> import tempfile
      >>> from mpjax.models import decoder
      >>> from mpjax.models.hf import save_checkpoint
      >>> model = decoder("tiny", layers=1, width=16, heads=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_checkpoint(f"{folder}/new", model, model.init(jax.random.key(0)))
      ...     again, params = load_checkpoint(f"{folder}/new", "bf16")
      >>> again.config.width, again.precision.name
      (16, 'bf16')
    """
    checkpoint = source
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, revision=revision)
    kind = architecture_of(checkpoint, architecture)
    fields = Fields(checkpoint.config, checkpoint.config_file, ignore)
    settings = kind.read(fields)
    fields.finish()
    free = {"model_type", *FREE, *ignore}
    head = settings.get("head", "")
    if changes.get("head", head) != head or _is_new(f"encoder/{head}/head/kernel", new):
        # The checkpoint's labels and problem type belong to the replaced head.
        free -= {"problem_type"}
        changes = {"labels": ()} | changes if "labels" in settings else changes
    if changes.get("labels") and "classes" not in changes:
        changes = changes | {"classes": len(changes["labels"])}
    metadata = checkpoint.metadata(free)
    if head == "none" and pools_mean(metadata.files):
        if not any("pooler" in name for name in checkpoint.tensors):
            settings["pool"] = "mean"
    _check_depth(checkpoint, kind, settings | changes, new)
    model = kind.make(kind.config(**settings), precision, **changes)
    params = load_params(model, checkpoint, kind, new, key, unused, place)
    return dataclasses.replace(model, metadata=metadata), params


def _check_depth(
    checkpoint: Checkpoint, kind: Architecture, sizes: Settings, new: Sequence[str]
) -> None:
    """Refuses a config of far more layers than the checkpoint has, before the model is built.

    `_check` names the tensors of a few missing layers.
    """
    held = checkpoint.tensors
    for leaf, weight in kind.table.items():
        if not weight.stacked or not leaf.endswith("/kernel") or _is_new(leaf, new):
            continue
        own = sizes.get("encoder_layers") if leaf.startswith("encoder/") else 0
        layers = own or sizes.get("layers", 0)
        bare = weight.name.removeprefix(kind.prefix)
        few = range(min(layers, len(held)) if type(layers) is int else 0)
        there = sum(weight.name.format(i) in held or bare.format(i) in held for i in few)
        if few and layers > there + _FEW:
            raise ConfigError(
                f"{checkpoint.config_file}: {layers} layers, but {checkpoint.where} has"
                f" {weight.name} of {there}; take the checkpoint of this config"
            )


def _is_new(name: str, new: Sequence[str]) -> bool:
    return not isinstance(new, str) and any(fnmatch.fnmatchcase(name, one) for one in new)


def load_params(
    model: Transformer,
    checkpoint: Checkpoint,
    kind: Architecture,
    new: Sequence[str] = (),
    key: Key | None = None,
    unused: Sequence[str] = (),
    place: Placement | None = None,
) -> Params:
    """Returns a model's parameters from a checkpoint; arguments as of `load_checkpoint`."""
    draw = jax.random.key(0) if key is None else key
    tree = jax.eval_shape(model.init, draw)
    leaves = named_leaves(tree)
    placed: dict[str, Sharding] = {}
    if place is not None:
        axes = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
        placed = {n: place(a, x.shape) for (n, x), a in zip(leaves.items(), axes, strict=True)}
    drawn = _matching(leaves, new, "new", "paths of the model")
    if drawn and key is None:
        raise ConfigError(f"load: new={list(new)} is drawn at random; pass key=")
    tensors = _selected(checkpoint, kind, unused, tied=model.config.tied)
    _check(checkpoint, kind, {n: x for n, x in leaves.items() if n not in drawn}, tensors)
    fresh = {}
    if drawn:
        fresh = jax.jit(
            lambda key: {n: x for n, x in named_leaves(model.init(key)).items() if n in drawn}
        )(draw)
    out = []
    for name, leaf in leaves.items():
        sharding = placed.get(name)
        if name in drawn:
            x = fresh[name]
            out.append(x if sharding is None else jax.device_put(x, sharding))
        elif isinstance(leaf, Quantized):
            out.append(_quantised(name, leaf, kind, tensors, model.precision, sharding))
        else:
            out.append(filled(name, leaf.shape, leaf.dtype, kind.table[name], tensors, sharding))
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_quantized), out)


def _quantised(
    name: str,
    leaf: Quantized,
    kind: Architecture,
    tensors: Tensors,
    precision: Precision,
    sharding: Sharding | None,
) -> Quantized:
    """A weight stored in fp8: read in float32, then quantised as `init` quantises."""
    whole = filled(name, leaf.shape, np.dtype(np.float32), kind.table[name], tensors, sharding)
    nested: PyTree = whole
    for part in reversed(name.split("/")):
        nested = {part: nested}
    return jax.tree.leaves(stored(nested, precision), is_leaf=is_quantized)[0]


def _matching(
    names: Collection[str], patterns: Sequence[str], what: str, of: str
) -> frozenset[str]:
    if isinstance(patterns, str):
        raise ConfigError(f"load: {what}={patterns!r} is text; pass a list: {what}=[{patterns!r}]")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"load: {what}={pattern!r} matches none of the {of}; leave it out")
    return frozenset(name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns))


def _selected(
    checkpoint: Checkpoint, kind: Architecture, unused: Sequence[str], *, tied: bool
) -> Tensors:
    """The tensors under their full names, without buffers and what the user leaves out."""
    left_out = _matching(checkpoint.tensors, unused, "unused", "tensors of the checkpoint")
    tensors = {n: t for n, t in checkpoint.tensors.items()
               if n not in left_out and not n.endswith(kind.buffers)}  # fmt: skip
    for old, new in kind.renamed.items():
        tensors = {n.removesuffix(old) + new if n.endswith(old) else n: t
                   for n, t in tensors.items()}  # fmt: skip
    own = {weight.name for weight in kind.table.values()}
    if not tied:  # the head has its own weights, which the checkpoint holds under the copy's name
        for copy, original in kind.copies.items():
            if copy in tensors and copy not in own:
                tensors[original] = tensors.pop(copy)
    if any(name.startswith(kind.prefix) for name in tensors):
        return tensors
    outside = {n for n in own if not n.startswith(kind.prefix)} | set(kind.copies)
    return {n if n in outside else kind.prefix + n: tensor for n, tensor in tensors.items()}


def _check(
    checkpoint: Checkpoint,
    kind: Architecture,
    leaves: Mapping[str, jax.ShapeDtypeStruct | Quantized],
    tensors: Tensors,
) -> None:
    """Refuses tensors that are missing, unexpected or misshaped, all in one line."""
    missing: list[str] = []
    misshaped: list[str] = []
    wanted: set[str] = set()
    for name, leaf in leaves.items():
        weight = kind.table.get(name)
        if weight is None:
            raise ConfigError(f"{checkpoint.where}: its architecture has no {name}; pass new=")
        for one in weight.names(leaf.shape[0]):
            wanted.add(one)
            if one not in tensors:
                missing.append(one)
                continue
            tensor = tensors[one]
            if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype != "bfloat16":
                misshaped.append(f"{one} is {tensor.dtype}, not floating-point")
            if tensor.shape != (expected := tensor_shape(leaf.shape, weight)):
                misshaped.append(f"{one} is {tensor.shape}, {name} needs {expected}")
    copies = {n: o for n, o in kind.copies.items() if n in tensors and n not in wanted}
    for copy, original in copies.items():
        if original in tensors and not np.array_equal(
            tensors[copy].read(), tensors[original].read()
        ):
            raise ConfigError(
                f"{checkpoint.where}: {copy} differs from {original}, but the config ties them;"
                " set tie_word_embeddings to false in it"
            )
    unexpected = [name for name in tensors if name not in wanted and name not in copies]
    said = [f"{what} {listed(names)}" for what, names in
            (("missing", sorted(set(missing))), ("unexpected", unexpected),
             ("misshaped", misshaped)) if names]  # fmt: skip
    if said:
        raise ConfigError(
            f"{checkpoint.where}: tensors {'; '.join(said)}; take the checkpoint of this config, or"
            " pass new= for what is to be drawn and unused= for what is left out"
        )
