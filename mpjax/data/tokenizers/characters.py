"""Characters as tokens, for short sequences such as names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mpjax.errors import ConfigError


class Characters:
    """Each character of some texts is a token; all others are id 0.

    Args:
        texts: the training texts, and only these: held-out text must not shape the vocabulary.

    Attributes:
        vocab_size: ids are 0 ... vocab_size - 1.

    Example:
        >>> tokens = Characters(["bad", "cab"])
        >>> [ids.tolist() for ids in tokens.encode_batch(["cad", "dub"])]
        [[3, 1, 4], [4, 0, 2]]
        >>> tokens.decode([3, 1, 4]), tokens.decode([4, 0, 2])
        ('cad', 'd\ufffdb')
    """

    def __init__(self, texts: Sequence[str]):
        # U+FFFD is what text shows for a character that is not known
        self._characters = ["\ufffd", *sorted({c for text in texts for c in text} - {"\ufffd"})]
        self._ids = {character: i for i, character in enumerate(self._characters)}
        self.vocab_size = len(self._characters)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        return [np.array([self._ids.get(c, 0) for c in text], np.int32) for text in texts]

    def decode(self, ids: Collection[int]) -> str:
        """The text of some ids.

        Raises:
            ConfigError: one that is no character's.
        """
        if odd := [int(i) for i in ids if not 0 <= i < self.vocab_size]:
            raise ConfigError(
                f"characters: cannot decode id {odd[0]}; expected 0 to {self.vocab_size - 1}"
            )
        return "".join(self._characters[int(i)] for i in ids)
