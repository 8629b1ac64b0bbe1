"""Reads a config.json field by field; a field that is never read is an error that names it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

from mpjax.errors import ConfigError, brief, listed
from mpjax.typing import Json, Settings

# Fields of training, storage, calling and sampling, which do not change what a model computes in
# evaluation. Dropout of attention weights is among them: our models have none.
FREE = frozenset(
    """
    _attn_implementation _name_or_path _num_labels architectures attention_dropout
    attention_probs_dropout_prob attn_pdrop attribute_map auto_map bos_token_id cache_dir
    chunk_size_feed_forward classifier_dropout decoder_start_token_id directionality dtype
    embd_pdrop eos_token_id finetuning_task gradient_checkpointing id2label initializer_range
    is_llama_config keep_accents label2id model_type n_ctx name_or_path
    output_attentions output_hidden_states output_past pad_token_id pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type prefix
    pretraining_tp problem_type reorder_and_upcast_attn return_dict
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unk_token_id use_bfloat16 use_cache
    """.split()
)
_NO_DEFAULT = object()
_LARGEST = 3.4e38  # about float32's maximum, in which norms and frequencies are computed


class Fields:
    """The fields of a config.json.

    Args:
      values: name -> value.
      where: the file, for errors.
      ignore: names of unknown fields that the user says have no effect.
    """

    def __init__(self, values: Settings, where: str, ignore: Collection[str] = ()) -> None:
        self._values, self._where = values, where
        self._read = set(FREE) | set(ignore)

    def take(
        self, name: str, kind: type[Json], default: Json = _NO_DEFAULT, absent: Json = _NO_DEFAULT,
        least: int | None = None,
    ) -> Json:  # fmt: skip
        """Returns a field; null and an absent one are the default.

        Args:
          name: of the field.
          kind: its type.
          default: where it is null, and where it is absent.
          absent: where it is absent, if that is something else.
          least: the smallest whole number that it may be.

        Raises:
          ConfigError: absent without a default, of another type, no finite number, or a whole one
            beyond int32, which no size or id is.
        """
        self._read.add(name)
        if name not in self._values and absent is not _NO_DEFAULT:
            return absent
        value = self._values.get(name)
        if value is None:
            if default is _NO_DEFAULT:
                raise ConfigError(
                    f"{self._where}: no {name}, which this architecture needs; fetch it again"
                )
            return default
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            self._unexpected(name, value, kind.__name__)
        if kind is int and not (-(2**31) if least is None else least) <= value < 2**31:
            self._unexpected(name, value, f"a number from {least or 0} to {2**31 - 1}")
        # Python compares a float with an int of any size without conversion.
        if kind is float and not -_LARGEST <= value <= _LARGEST:
            self._unexpected(name, value, "a finite number that float32 has")
        return float(value) if kind is float else value

    def _unexpected(self, name: str, value: object, wanted: str) -> NoReturn:
        raise ConfigError(f"{self._where}: {name}={brief(value)}; expected {wanted}; mend it")

    def only(self, name: str, *allowed: Json) -> Json:
        """Returns a field of which our models support few values; the default is the first.

        Raises:
          ConfigError: another value.
        """
        self._read.add(name)
        value = self._values.get(name, allowed[0])
        if value is None and None not in allowed:
            return allowed[0]  # null means that the field is not set
        if value not in allowed:
            raise ConfigError(
                f"{self._where}: {name}={brief(value)} is not supported; expected"
                f" {' or '.join(map(repr, allowed))}"
            )
        return value

    def one_of(self, name: str, known: Mapping[str, str], default: str) -> str:
        """Returns what a field's value stands for.

        Raises:
          ConfigError: a value that is not known.
        """
        self._read.add(name)
        value = self._values.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise ConfigError(
                f"{self._where}: {name}={brief(value)} is not supported; known: {' '.join(known)}"
            )
        return known[value]

    def inner(self, name: str) -> Fields | None:
        """Returns the fields of an object in a field, or None where there is none."""
        values = self.take(name, dict, None)
        return None if values is None else Fields(values, f"{self._where}: {name}")

    def refuse(self, what: str) -> NoReturn:
        """Raises a ConfigError that says where."""
        raise ConfigError(f"{self._where}: {what}")

    def finish(self) -> None:
        """Refuses fields that have not been read.

        Raises:
          ConfigError: there are some.
        """
        if unknown := sorted(set(self._values) - self._read):
            raise ConfigError(
                f"{self._where}: unknown field {listed(unknown)}, which may change the result; if"
                f" it does not, pass ignore={brief(unknown)}"
            )
