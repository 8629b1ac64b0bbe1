"""The formats that are fuzzed: good files, how they are damaged, hostile ones, and the reader."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz import hostile_pickles as pickles
from benchmarks.fuzz import hostile_series as series
from benchmarks.fuzz import hostile_settings as settings
from benchmarks.fuzz import hostile_tables as tables
from benchmarks.fuzz import hostile_texts as texts
from benchmarks.fuzz import mutants
from tests.models.hf import cases, torch_writer

Files = dict[str, bytes]
_GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "hf_logits.json"


@dataclasses.dataclass(frozen=True)
class Format:
    """A foreign format.

    Args:
      good: returns the files of a folder that is read without complaint.
      mutant: takes those and a numpy generator, returns the files that are other than good.
      hostile: takes those, returns title -> the files that are other than good. A case is to be
        refused, unless its title begins with `fine`: that one may also be read.
      read: takes a folder, does all that a user can have done with what is in it.
    """

    good: Callable[[], Files]
    mutant: Callable[[Files, Any], Files]
    hostile: Callable[[Files], dict[str, Files]]
    read: Callable[[Path], Any]


def damaged(mutate: Callable[[bytes, Any], bytes], *names: str) -> Callable[[Files, Any], Files]:
    """Returns a mutant of one of some files by one mutator."""

    def mutant(good: Files, rng: Any) -> Files:
        name = names[rng.integers(len(names))]
        return {name: mutate(good[name], rng)}

    return mutant


def both(*hostile: Callable[[Files], dict[str, Files]]) -> Callable[[Files], dict[str, Files]]:
    """Returns the hostile files of several makers."""
    return lambda good: {title: files for make in hostile for title, files in make(good).items()}


@functools.cache
def arrays(kind: str) -> dict[str, np.ndarray]:
    """The tensors of a tiny checkpoint."""
    shapes = json.loads(_GOLDEN.read_text())["cases"][kind]["tensors"]
    return {name: cases.weight(name, tuple(shape)) for name, shape in shapes.items()}


def _made(write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _config(kind: str) -> bytes:
    return json.dumps(cases.CONFIGS[kind]).encode()


@functools.cache
def _safetensors(kind: str) -> bytes:
    from safetensors.numpy import save

    return save(arrays(kind))


def _checkpoint(kind: str, name: str, write: Callable[[Path], Any]) -> Files:
    return {"config.json": _config(kind), name: _made(write)}


def _torch(save: Any) -> Files:
    return _checkpoint("gpt2", "pytorch_model.bin", lambda path: save(path, arrays("gpt2")))


def _shards() -> Files:
    from safetensors.numpy import save

    names, held = list(arrays("gpt2")), arrays("gpt2")
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    files = {file: save({n: held[n] for n in part}) for file, part in halves.items()}
    where = {n: file for file, part in halves.items() for n in part}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    return files | {
        "config.json": _config("gpt2"),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def _gguf() -> Files:
    from tests.models.hf.test_gguf import write

    tokens = ["<end>", *map(chr, range(33, 127)), "ab", "abc"]
    add: dict[str, Any] = dict(
        add_tokenizer_model=("gpt2",), add_tokenizer_pre=("smollm",), add_token_list=(tokens,),
        add_token_types=([3] + [1] * (len(tokens) - 1),), add_token_merges=(["a b", "ab c"],),
        add_bos_token_id=(0,), add_eos_token_id=(0,), add_add_bos_token=(True,),
    )  # fmt: skip
    return {"model.gguf": _made(lambda path: write(path, **add))}


def _config_mutant(good: Files, rng: Any) -> Files:
    kind = list(cases.CONFIGS)[rng.integers(len(cases.CONFIGS))]
    return {
        "config.json": mutants.json_mutant(_config(kind), rng),
        "model.safetensors": _safetensors(kind),
    }


def _beside() -> Files:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Pooling"}]
    bert = cases.CONFIGS["bert"] | {"architectures": ["BertModel"]}
    held = {n: x for n, x in arrays("bert").items() if not n.startswith("cls")}
    from safetensors.numpy import save

    return {
        "config.json": json.dumps(bert).encode(),
        "model.safetensors": save(held),
        "generation_config.json": b'{"eos_token_id": [1, 2], "bos_token_id": 0}',
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true, "word_embedding": 16}',
    }


def _weights() -> Files:
    import jax.numpy as jnp

    from mpjax.models import quantize_weights, save_weights

    tree = {"a": {"kernel": jnp.ones((64, 4))}, "b": jnp.ones(3, jnp.bfloat16)}
    return {
        "w.safetensors": _made(lambda path: save_weights(quantize_weights(tree, "int4@32"), path))
    }


def read_checkpoint(folder: Path) -> None:
    """Loads a checkpoint, reads each tensor alone, and what lies beside the weights."""
    from mpjax.models.hf import load_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(folder)
    for tensor in checkpoint.tensors.values():
        tensor.read()
    checkpoint.tokenizer_json()
    model, _ = load_checkpoint(checkpoint)
    assert isinstance(model.metadata.ends, tuple)


def _read_weights(folder: Path) -> None:
    import jax

    from mpjax.formats import is_quantized
    from mpjax.models import load_weights

    for leaf in jax.tree.leaves(load_weights(folder / "w.safetensors"), is_leaf=is_quantized):
        if is_quantized(leaf):
            leaf.dequantize()


def _rows(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        from mpjax.data.tables.rows import read_rows

        read_rows(folder / name, ("text", "label"), classes="label")

    return read


def _read_frame(folder: Path) -> None:
    from common.datasets.frame import read_frame

    read_frame(folder / "table.xz")


def _frame_mutant(good: Files, rng: Any) -> Files:
    data = good["table.xz"]
    if rng.integers(4) == 0:
        return {"table.xz": mutants.bytes_mutant(data, rng)}
    return {"table.xz": lzma.compress(mutants.bytes_mutant(lzma.decompress(data), rng))}


def _parquet() -> Files:
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": f"a text {i}", "label": "no" if i % 2 else "yes"} for i in range(20)]
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return {"t.parquet": out.getvalue()}


_BESIDE = ("generation_config.json", "1_Pooling/config.json", "modules.json")
_ROWS = [{"text": f"text {i} of \u00e4", "label": "no" if i % 2 else "yes"} for i in range(8)]
_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
_TABBED = "".join(f'{row["text"]}\t"{row["label"]}"\n' for row in _ROWS).encode()


def _line_mutant(good: Files, rng: Any) -> Files:
    lines = good["t.jsonl"].splitlines()
    at = int(rng.integers(len(lines)))
    lines[at] = mutants.json_mutant(lines[at], rng)
    return {"t.jsonl": b"\n".join(lines)}


FORMATS: dict[str, Format] = {
    "torch-zip": Format(
        lambda: _torch(torch_writer.save_zipped),
        damaged(lambda d, r: mutants.zip_mutant(d, r, "archive/data.pkl"), "pytorch_model.bin"),
        both(pickles.torch_zips, series.zip_fields), read_checkpoint,
    ),
    "torch-older": Format(
        lambda: _torch(torch_writer.save_older),
        damaged(mutants.bytes_mutant, "pytorch_model.bin"), pickles.torch_older, read_checkpoint,
    ),
    "safetensors": Format(
        lambda: {"config.json": _config("gpt2"), "model.safetensors": _safetensors("gpt2")},
        damaged(mutants.header_mutant, "model.safetensors"), settings.tensors, read_checkpoint,
    ),
    "index": Format(
        _shards, damaged(mutants.json_mutant, "model.safetensors.index.json"),
        both(settings.indices, lambda g: series.json_values(g, "model.safetensors.index.json")),
        read_checkpoint,
    ),
    "gguf": Format(
        _gguf, damaged(mutants.bytes_mutant, "model.gguf"), settings.ggufs, read_checkpoint
    ),
    "config": Format(
        lambda: {"config.json": _config("llama"), "model.safetensors": _safetensors("llama")},
        _config_mutant, settings.configs, read_checkpoint,
    ),
    "beside": Format(
        _beside, damaged(mutants.json_mutant, "generation_config.json", "1_Pooling/config.json"),
        both(settings.beside, lambda good: series.json_values(good, *_BESIDE)), read_checkpoint,
    ),
    "weights": Format(
        _weights, damaged(mutants.header_mutant, "w.safetensors"), settings.weights, _read_weights
    ),
    "frame": Format(pickles.good_frame, _frame_mutant, both(pickles.frames, series.frame_opcodes),
        _read_frame,
    ),
    "jsonl": Format(
        lambda: {"t.jsonl": _LINES}, _line_mutant,
        both(tables.lines("t.jsonl"), lambda good: series.rows("t.jsonl")), _rows("t.jsonl"),
    ),
    "json": Format(
        lambda: {"t.json": json.dumps(_ROWS).encode()}, damaged(mutants.json_mutant, "t.json"),
        both(tables.lines("t.json"), lambda good: series.rows("t.json")), _rows("t.json"),
    ),
    "parquet": Format(
        _parquet, damaged(mutants.bytes_mutant, "t.parquet"),
        both(tables.parquets, series.parquet_bytes), _rows("t.parquet"),
    ),
    "text-table": Format(
        lambda: {"t.tsv": _TABBED}, damaged(mutants.bytes_mutant, "t.tsv"),
        both(tables.text_tables, lambda good: series.cells()), _rows("t.tsv"),
    ),
    "tokenizer": Format(
        lambda: texts.tokenizer_files(texts.good_tokenizer()),
        damaged(mutants.json_mutant, "tokenizer.json"), texts.tokenizers, texts.read_tokenizer,
    ),
    "template": Format(
        lambda: {"template.jinja": texts.GOOD_TEMPLATE},
        damaged(mutants.bytes_mutant, "template.jinja"), texts.templates, texts.read_template,
    ),
    "log": Format(
        lambda: {"metrics.jsonl": texts.GOOD_LOG, "manifest.json": b'{"config": {"steps": 8}}'},
        texts.log_mutant, texts.logs, texts.read_log,
    ),
}  # fmt: skip
