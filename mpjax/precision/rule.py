"""Rules: a path pattern and the policy of the paths that it matches."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable

import jmp

from mpjax.errors import ConfigError, brief
from mpjax.precision.policy import policy_text
from mpjax.precision.recipe import Recipe


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    out, rest = "", pattern
    while rest:
        whole = len(rest) == len(pattern) or pattern[-len(rest) - 1] == "/"
        if rest.startswith("**/") and whole:  # any number of components, also none
            out, rest = out + "(?:[^/]+/)*", rest[3:]
        elif rest.startswith("**"):
            out, rest = out + ".*", rest[2:]
        elif rest[0] in "*?":
            out, rest = out + ("[^/]*" if rest[0] == "*" else "[^/]"), rest[1:]
        else:
            out, rest = out + re.escape(rest[0]), rest[1:]
    return re.compile(out)


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


def near_misses(pattern: str, paths: Iterable[str], count: int = 4) -> list[str]:
    """Returns the paths, and their endings as `**/` patterns, that look most like a pattern."""
    bare = sorted({spellings(path)[-1] for path in paths})
    endings = {f"**/{path.split('/')[-1]}" for path in bare}
    found = difflib.get_close_matches(pattern, [*endings, *bare], n=count, cutoff=0.5)
    core = pattern.replace("*", "").strip("/").split("/")[-1]
    near = difflib.get_close_matches(core, [path.split("/")[-1] for path in bare], n=2, cutoff=0.6)
    return list(dict.fromkeys([*(f"**/{end}" for end in near), *found]))[:count] or bare[:count]


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
