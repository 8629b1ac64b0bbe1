"""WordNet's synonyms, from the files of its database (`man wndb`)."""

from __future__ import annotations

from collections.abc import Collection

from common.datasets.assets import fetch

_PARTS = ("noun", "verb", "adj", "adv")


def read_wordnet(without: Collection[str] = ()) -> dict[str, list[str]]:
    """Reads the asset `wordnet`.

    Args:
      without: words that get no synonyms, such as function words, whose entries are of names of
        elements and letters.

    Returns:
      Word in lower case -> the words of all synsets that it is in, in the order of the files.

    Raises:
      ConfigError: the asset cannot be had.
    """
    folder = fetch("wordnet")
    found: dict[str, dict[str, None]] = {}
    for part in _PARTS:
        for line in (folder / f"data.{part}").read_text().splitlines():
            if line.startswith("  "):  # the licence
                continue
            cells = line.split(" ")
            # offset, file, kind, how many words (hexadecimal), then each word and its number
            words = [cells[4 + 2 * i] for i in range(int(cells[3], 16))]
            plain = [word.partition("(")[0].replace("_", " ") for word in words]  # galore(ip)
            plain = [word for word in plain if word.islower()]  # no proper names
            for word in plain:
                if " " not in word and word not in without:
                    found.setdefault(word, {}).update((w, None) for w in plain if w != word)
    return {word: list(others) for word, others in found.items() if others}
