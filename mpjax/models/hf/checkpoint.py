"""A checkpoint: a folder, a file, or a name on the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path

from mpjax.errors import ConfigError, need, printable
from mpjax.json_text import LARGEST, read_json
from mpjax.models.core.metadata import GENERATION, Metadata
from mpjax.models.hf.gguf_file import open_gguf, read_gguf
from mpjax.models.hf.gguf_reader import GgufFile
from mpjax.models.hf.gguf_tokenizer import gguf_settings, gguf_tokenizer
from mpjax.models.hf.tensor_files import Tensors, read_safetensors, read_sharded
from mpjax.models.hf.torch_file import read_torch
from mpjax.typing import Settings

logger = logging.getLogger("mpjax.models")

CONFIG = "config.json"
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Files beside config and weights that an export copies: those of the tokenizer, chat templates,
# settings of generation, and the pooling modules of sentence-transformers.
_BESIDE = (
    GENERATION, TOKENIZER, TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "[0-9]_*/*",
)  # fmt: skip
# Defaults of transformers for special tokens that a config.json leaves out.
_SPECIAL: dict[str, dict[str, int]] = {
    "bert": {"pad_token_id": 0},
    "gpt2": {"bos_token_id": 50256, "eos_token_id": 50256},
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"bos_token_id": 1, "eos_token_id": 2},
}
# Fields of config.json that an export computes itself, or that name files it does not write.
_OWN_FIELDS = frozenset(
    """
    architectures attribute_map auto_map _attn_implementation _name_or_path name_or_path _num_labels
    num_labels id2label label2id dtype torch_dtype transformers_version quantization_config n_ctx
    """.split()
)
# File or index -> reader of a file, in order of preference.
_FILES: dict[str, Callable[[Path], Tensors]] = {
    "model.safetensors.index.json": read_safetensors,
    "model.safetensors": read_safetensors,
    "pytorch_model.bin.index.json": read_torch,
    "pytorch_model.bin": read_torch,
}
_SUFFIXES = {".safetensors": read_safetensors, ".bin": read_torch, ".pt": read_torch,
             ".pth": read_torch}  # fmt: skip
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Settings and tensors of a checkpoint; no tensor has been read yet.

    Args:
      where: the file that the tensors lie in, or its index.
      config: fields of config.json, or of a GGUF file as config.json would have them; empty where
        a lone file has none.
      tensors: by the names that the checkpoint gives them.
      gguf: settings and tensors of a GGUF file as it has them, else None.
    """

    where: Path
    config: Settings
    tensors: Tensors
    gguf: GgufFile | None = None

    @property
    def config_file(self) -> str:
        """Where the settings stand, for errors."""
        return str(self.where if self.gguf else self.where.parent / CONFIG)

    def tokenizer_json(self) -> str | None:
        """Returns the tokenizer.json that belongs to it, or None where there is none.

        That of the folder, or one made of what a GGUF file holds; `mpjax.data.Tokenizer.from_text`
        reads it.

        Raises:
          ConfigError: a file that is no text, a GGUF file with a tokenizer of another kind.
        """
        if self.gguf:
            return gguf_tokenizer(self.where, self.gguf.fields)
        path = self.where.parent / TOKENIZER
        try:
            return path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); download it again") from None

    def metadata(self, fields: Collection[str] = ()) -> Metadata:
        """Returns what it says beside shape and weights.

        Args:
          fields: of config.json that have no effect on logits; those that an export writes itself
            are left out.

        Raises:
          ConfigError: a file that cannot be read.
        """
        names = set(fields) - _OWN_FIELDS
        config = {name: value for name, value in self.config.items() if name in names}
        files = self._gguf_files(self.gguf) if self.gguf else self._files()
        return Metadata(_SPECIAL.get(config.get("model_type", ""), {}) | config, files)

    def _files(self) -> dict[str, bytes]:
        folder = self.where.parent
        found = sorted({path for one in _BESIDE for path in folder.glob(one) if path.is_file()})
        try:
            for path in found:  # kept in memory, because an export writes them
                if (size := path.stat().st_size) > LARGEST:
                    raise ConfigError(
                        f"{path}: {size} bytes; expected at most {LARGEST} of a file beside the"
                        " weights; take it out of the folder"
                    )
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be read ({error}); download it again") from None
        if GENERATION in files:
            read_json(folder / GENERATION)  # raises now if it is malformed
        return files

    def _gguf_files(self, file: GgufFile) -> dict[str, bytes]:
        """The files that say what a GGUF file says of its tokenizer, if it has one."""
        if "tokenizer.ggml.model" not in file.fields:
            return {}
        try:
            files = {TOKENIZER: gguf_tokenizer(self.where, file.fields).encode()}
            settings = gguf_settings(self.where, file.fields)
        except ConfigError as error:
            logger.warning("%s; an export will have no tokenizer", error)
            return {}
        return files | {TOKENIZER_SETTINGS: json.dumps(settings, indent=2).encode()}


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Returns a checkpoint with its tensors unread.

    Args:
      source: a folder with a config.json and safetensors (whole or sharded) or a
        pytorch_model.bin; one such file; a GGUF file or a folder with one; or `org/name` on the
        Hugging Face Hub, which needs the extra `hub` and a network, or its cache.
      revision: branch, tag or commit on the Hub.

    Raises:
      ConfigError: nothing there, no known file in the folder, or a file that cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists() and _HUB_NAME.fullmatch(str(source)):
        path = _from_hub(str(source), revision)
    elif revision is not None:
        raise ConfigError(f"{source}: revision={revision!r} is for names on the Hub; leave it out")
    if path.is_dir():
        path = _weights(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or folder; name a checkpoint, or org/name")
    if path.suffix == ".gguf":
        file = open_gguf(path)
        return Checkpoint(path, *read_gguf(path, file), file)
    beside = path.parent / CONFIG
    config = read_json(beside) if beside.is_file() else {}
    if path.name.endswith(".index.json") and path.name in _FILES:
        return Checkpoint(path, config, read_sharded(path, _FILES[path.name]))
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"{path}: unknown kind of file; expected {' '.join(_SUFFIXES)} .gguf or a folder"
        )
    return Checkpoint(path, config, _SUFFIXES[path.suffix](path))


def _weights(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = " ".join(path.name for path in found)
        raise ConfigError(f"{folder}: several GGUF files ({names}); name one of them")
    if not found:
        raise ConfigError(
            f"{folder}: no checkpoint in it; expected {' or '.join(_FILES)} or a .gguf file"
        )
    return found[0]


def _from_hub(name: str, revision: str | None) -> Path:
    hub = need("huggingface_hub", "hub", f"{name}: no such folder, so a name on the Hub")
    texts = [CONFIG, "*.index.json", *_BESIDE]
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = hub.snapshot_download(
                name, revision=revision, allow_patterns=[*texts, weights]
            )
            if any(Path(folder).glob(weights)):
                break
    # huggingface_hub's errors have no common base class.
    except Exception as error:
        reason = printable(str(error), 200)
        raise ConfigError(
            f"{name}: no such folder, and not to be had from the Hugging Face Hub ({reason}); check"
            " the name and the network, or name a folder"
        ) from error
    return Path(folder)
