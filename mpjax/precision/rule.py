"""Rules: a path pattern and the policy of the paths that it matches."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Sequence

import jmp

from mpjax.errors import ConfigError, brief
from mpjax.precision.policy import policy_text
from mpjax.precision.recipe import Recipe

# wildcard -> regular expression; `**/` at the start of a component is any number of them, also none
_WILDCARDS = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_WILDCARD = re.compile(r"((?:^|(?<=/))\*\*/|\*\*|[*?])")


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    parts = _WILDCARD.split(pattern)
    return re.compile("".join(_WILDCARDS.get(part) or re.escape(part) for part in parts))


def spellings(path: str) -> tuple[str, ...]:
    """Returns a path and the same path without its layer indices.

    Example:
      >>> spellings("decoder/layers/3/mlp/up")
      ('decoder/layers/3/mlp/up', 'decoder/layers/mlp/up')
    """
    bare = "/".join(part for part in path.split("/") if not part.isdigit())
    return (path,) if bare == path else (path, bare)


def matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches a path or one of its ancestors.

    `*` does not cross `/`, `**` does, `?` is one character. A layer index in the path may be
    left out of the pattern.

    Args:
      pattern: such as `**/norm*`.
      path: such as `decoder/layers/3/norm_mlp/scale`.

    Raises:
      ConfigError: one of them is no text.

    Example:
      >>> matches("decoder/layers/mlp", "decoder/layers/0/mlp/up"), matches("*/mlp", "a/b/mlp")
      (True, False)
    """
    if not isinstance(pattern, str) or not isinstance(path, str):
        raise ConfigError(
            f"matches: pattern={brief(pattern)}, path={brief(path)}; both are texts, such as"
            " '**/norm*' and 'decoder/norm'"
        )
    compiled = _compile(pattern)
    for spelling in spellings(path):
        parts = spelling.split("/")
        if any(compiled.fullmatch("/".join(parts[:n])) for n in range(len(parts), 0, -1)):
            return True
    return False


_SIMILAR = 0.55  # similarity of two components from which one may be a misspelling of the other
_ANY = "**"


def near_misses(pattern: str, paths: Iterable[str], count: int = 4) -> list[str]:
    """Returns patterns that match a path and look most like one that matches none.

    First the pattern with misspelt components corrected, as `**/mlp` for `**/mpl`: it is compared
    with each path and its ancestors, component by component; `**` takes any number of them. Then
    paths, and their last components as `**/` patterns, that are similar to it as a whole.

    Args:
      pattern: matches none of the paths.
      paths: what it could have matched.
      count: how many at most.

    Example:
      >>> near_misses("**/mpl", ["net/layers/0/mlp/up"])[0]
      '**/mlp'
    """
    paths = list(paths)
    bare = sorted({spellings(path)[-1] for path in paths})
    corrected: dict[str, float] = {}
    anywhere = [] if pattern.startswith(_ANY) else [f"{_ANY}/{pattern}"]
    for path in dict.fromkeys([*bare, *paths]):
        for text in (pattern, *anywhere):
            if aligned := _align(tuple(text.split("/")), tuple(path.split("/"))):
                right = "/".join(aligned[1])
                corrected[right] = max(corrected.get(right, 0.0), aligned[0])
    best = sorted(corrected, key=lambda text: (-corrected[text], len(text), text))
    best = [text for text in best if not (text.startswith("**/") and text[3:] in corrected)]
    best = [text for text in best if any(matches(text, path) for path in paths)]
    endings = {f"**/{path.split('/')[-1]}" for path in bare}
    found = difflib.get_close_matches(pattern, [*endings, *bare], n=count, cutoff=0.5)
    core = pattern.replace("*", "").strip("/").split("/")[-1]
    near = difflib.get_close_matches(core, [path.split("/")[-1] for path in bare], n=2, cutoff=0.6)
    others = [*(f"**/{end}" for end in near), *found]
    return list(dict.fromkeys([*best, *others]))[:count] or bare[:count]


def _align(pattern: tuple[str, ...], path: tuple[str, ...]) -> tuple[float, tuple[str, ...]] | None:
    """The similarity of a pattern to the beginning of a path, 0 to 1, and the corrected pattern.

    None if a component of the pattern has no counterpart in the path.
    """
    if not pattern:
        return 1.0, ()
    head, rest = pattern[0], pattern[1:]
    if head == _ANY:
        starts = range(len(path) + 1) if rest else (0,)
        options = [_align(rest, path[start:]) for start in starts]
        found = [option for option in options if option]
        best = max(found, key=lambda option: option[0], default=None)
        return (best[0], (head, *best[1])) if best else None
    if not path:
        return None
    similarity, right = _correct(head, path[0])
    if similarity < _SIMILAR:
        return None
    following = _align(rest, path[1:])
    return (similarity * following[0], (right, *following[1])) if following else None


@functools.lru_cache(maxsize=65536)
def _correct(wanted: str, name: str) -> tuple[float, str]:
    """The similarity of a component of a pattern to one of a path, 0 to 1, and its correction."""
    if _compile(wanted).fullmatch(name):
        return 1.0, wanted
    if wanted.isdigit() and name.isdigit():
        return 0.9, name
    core = wanted.strip("*")
    if not core or "*" in core or "?" in core or wanted.isdigit():
        return 0.0, name
    if core == wanted:
        return difflib.SequenceMatcher(None, core, name).ratio(), name
    # `nrom*` stands for the beginning of a name, `*_nrom` for its end, `*nrom*` for any part
    parts = [name[start : start + len(core)] for start in range(max(len(name) - len(core), 0) + 1)]
    if not wanted.startswith("*"):
        parts = parts[:1]
    elif not wanted.endswith("*"):
        parts = parts[-1:]
    similarity, part = max((difflib.SequenceMatcher(None, core, x).ratio(), x) for x in parts)
    return similarity, wanted.replace(core, part)


_NUMBER = re.compile(r"(\d+)")


def _too_large(pattern: str, paths: Sequence[str]) -> str:
    """The numbers that exist, for a pattern such as `layers/9` with one too large; else empty."""
    parts = pattern.split("/")
    for index, part in enumerate(parts):
        any_number = "".join(
            r"(\d+)" if text.isdigit() else re.escape(text) for text in _NUMBER.split(part) if text
        )
        if not _NUMBER.search(part) or "*" in part:
            continue
        # The numbers with which the pattern would match.
        numbers: set[int] = set()
        for path in paths:
            for name in path.split("/"):
                if re.fullmatch(any_number, name) and matches(
                    "/".join([*parts[:index], name, *parts[index + 1 :]]), path
                ):
                    numbers |= {int(number) for number in _NUMBER.findall(name)[-1:]}
        if numbers:
            before = parts[index - 1] if part.isdigit() and index else part
            noun = before.rstrip("0123456789_").strip("*") or "of them"
            if len(numbers) == 1:
                return f"there is 1 of {noun}, number {min(numbers)}"
            return f"there are {len(numbers)} {noun}, {min(numbers)} to {max(numbers)}"
    return ""


def nearest(pattern: str, paths: Iterable[str]) -> str:
    """Returns what an error should say after `matches no path`: near misses, or the layers' count.

    Args:
      pattern: matches none of the paths.
      paths: what it could have matched.

    Example:
      >>> nearest("**/layers/9", ["net/layers/0/mlp", "net/layers/1/mlp"])
      'there are 2 layers, 0 to 1'
    """
    paths = list(paths)
    numbers = _too_large(pattern, paths) or _too_large(f"{_ANY}/{pattern}", paths)
    return numbers or f"near misses: {' '.join(near_misses(pattern, paths))}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern, its policy and the recipe of its products.

    Args:
      pattern: of paths.
      policy: of the paths that it matches.
      user: a user's rule must match something, a preset's need not.
      recipe: how their matrix products are quantised, or None.
    """

    pattern: str
    policy: jmp.Policy
    user: bool = True
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not isinstance(self.policy, jmp.Policy):
            raise ConfigError(
                f"rule: pattern={brief(self.pattern)}, policy={brief(self.policy)}; give a text and"
                " a jmp.Policy, or write parse_rule('**/norm*=fp32')"
            )
        if self.pattern.split() != [self.pattern] or "=" in self.pattern:
            raise ConfigError(
                f"rule: the pattern {self.pattern!r} is empty or holds blanks or '=';"
                " write PATTERN=VALUE, such as **/norm*=fp32"
            )

    @property
    def value(self) -> str:
        """Policy and recipe as one text, `p=f32,c=bf16,o=bf16,r=fp8`."""
        recipe = "" if self.recipe is None else f",r={self.recipe.name}"
        return policy_text(self.policy) + recipe

    def __str__(self) -> str:
        return f"{self.pattern}={self.value}"
