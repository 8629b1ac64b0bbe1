"""Synonyms: which words may stand for which, from a dict or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpjax.data.tables.cells import read_text_file
from mpjax.errors import ConfigError, brief

Synonyms = Mapping[str, Sequence[str]]  # word -> words that may stand for it

_LINES = "lines of `word: synonym, synonym` or word<TAB>synonym<TAB>synonym"


def read_synonyms(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Reads a word list for `SynonymReplacement` and `RandomInsertion`.

    Args:
        path: a UTF-8 file of lines ``word: synonym, synonym``, or of a word and its synonyms
            separated by tabs. A synonym may have several words. Blank lines are left out; the
            synonyms of a word that comes again are added to its others.

    Returns:
        Word in lower case -> its synonyms, without the word itself.

    Raises:
        ConfigError: a file that cannot be read, a line of another form, a word without synonyms.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "words.txt")
        ...     _ = path.write_text("good: fine, great\\nfilm\\tmovie\\n")
        ...     read_synonyms(path)
        {'good': ('fine', 'great'), 'film': ('movie',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read_text_file(Path(path), _LINES).split("\n"), 1):
        if not line.strip():
            continue
        mark = "\t" if "\t" in line else ":"
        word, _, rest = line.partition(mark)
        cells = rest.split("\t" if mark == "\t" else ",")
        synonyms = [" ".join(cell.split()) for cell in cells if cell.strip()]
        if len(word.split()) != 1 or not synonyms:
            raise ConfigError(
                f"data {str(path)!r}, line {number}: {line.strip()[:40]!r}; expected {_LINES}"
            )
        key = word.strip().casefold()
        found[key] = (*found.get(key, ()), *synonyms)
    return check_synonyms(f"data {str(path)!r}", found)


def check_synonyms(where: str, synonyms: object) -> dict[str, tuple[str, ...]]:
    """Returns synonyms with words in lower case, each word's own left out of its synonyms.

    Args:
        where: for errors.
        synonyms: word -> its synonyms.

    Raises:
        ConfigError: no words, a word without another one, or something else than texts.
    """
    if not isinstance(synonyms, Mapping) or not synonyms:
        raise ConfigError(
            f"{where}: synonyms {brief(synonyms)}; give word -> synonyms, at least one word, or"
            " what read_synonyms returns"
        )
    found: dict[str, tuple[str, ...]] = {}
    for word, others in synonyms.items():
        texts = (word, *others) if isinstance(others, list | tuple) else (None,)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(
                f"{where}: the synonyms of {brief(word)} are {brief(others)}; give a list of words"
            )
        key = word.casefold()
        own = (*found.get(key, ()), *(other for other in others if other.casefold() != key))
        if not own:
            raise ConfigError(f"{where}: {word!r} has no synonym; give it one or leave it out")
        found[key] = tuple(dict.fromkeys(own))
    return found
