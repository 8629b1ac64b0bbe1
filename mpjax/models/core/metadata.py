"""What a checkpoint holds beside its shape and weights, for an export to write again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mpjax.json_text import parse_json
from mpjax.typing import Json

GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Special tokens, settings of generation, and the files of the tokenizer.

    A model carries it and computes nothing from it.

    Args:
      config: fields of config.json that have no effect on logits, such as `eos_token_id`.
      files: path inside the folder of a checkpoint -> content.

    Example:
      >>> Metadata({"eos_token_id": [2, 5]}).ends
      (2, 5)
    """

    config: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes | str] = dataclasses.field(default_factory=dict)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, as `generate(end=)` takes them; empty where none is named.

        As in transformers, generation_config.json comes before config.json.
        """
        settings = self.config
        if GENERATION in self.files:
            settings = parse_json(self.files[GENERATION], GENERATION)
        found = settings.get("eos_token_id")
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list) else (found,)


NONE = Metadata()
