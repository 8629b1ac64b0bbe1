"""The rule grammar against a slow matcher that shares no code with it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpjax.errors import ConfigError
from mpjax.precision import Rule, matches, parse_policy, parse_rule, policy_text, preset_names
from mpjax.precision.rule import near_misses, nearest, spellings

F32 = parse_policy("f32")


def slow_fullmatch(pattern: str, text: str, i: int = 0, j: int = 0) -> bool:
    """Backtracking, one character at a time; pattern[i:] against text[j:]."""
    if i == len(pattern):
        return j == len(text)
    starts_component = i == 0 or pattern[i - 1] == "/"
    if pattern.startswith("**/", i) and starts_component:
        if slow_fullmatch(pattern, text, i + 3, j):
            return True
        cut = text.find("/", j)
        return cut > j and slow_fullmatch(pattern, text, i, cut + 1)
    if pattern.startswith("**", i):
        return any(slow_fullmatch(pattern, text, i + 2, k) for k in range(j, len(text) + 1))
    if pattern[i] == "*":
        end = text.find("/", j) if "/" in text[j:] else len(text)
        return any(slow_fullmatch(pattern, text, i + 1, k) for k in range(j, end + 1))
    if j == len(text):
        return False
    same = text[j] != "/" if pattern[i] == "?" else text[j] == pattern[i]
    return same and slow_fullmatch(pattern, text, i + 1, j + 1)


def slow_matches(pattern: str, path: str, *, ancestors: bool = True, indices: bool = True) -> bool:
    parts = path.split("/")
    for kept in (parts, [p for p in parts if not p.isdigit()]) if indices else (parts,):
        for n in range(1, len(kept) + 1) if ancestors else (len(kept),):
            if slow_fullmatch(pattern, "/".join(kept[:n])):
                return True
    return False


COMPONENT = st.sampled_from(["a", "b", "ab", "ba", "0", "12"])
PATHS = st.lists(COMPONENT, min_size=1, max_size=5).map("/".join)
WILD = st.sampled_from(["*", "**", "a*", "*b", "?", "a?", "**b", "a**", "*a*", "0"])
PATTERNS = st.lists(COMPONENT | WILD, min_size=1, max_size=4).map("/".join)


@settings(max_examples=1500)
@given(PATTERNS, PATHS)
def test_matches_as_the_slow_matcher_does(pattern: str, path: str) -> None:
    assert matches(pattern, path) == slow_matches(pattern, path)


# Pattern, path, expected, and the part of the grammar that decides it.
TABLE = [
    ("a/b", "a/b", True, "itself"),
    ("a/b", "a/b/c", True, "ancestor"),
    ("a/b", "a", False, "not a descendant"),
    ("a", "ab", False, "whole components"),
    ("*/b", "a/b", True, "* is one component"),
    ("*/b", "a/a/b", False, "* does not cross /"),
    ("*", "a/b", True, "* as an ancestor"),
    ("**/b", "b", True, "**/ may be empty"),
    ("**/b", "a/a/b", True, "** crosses /"),
    ("**/b", "a/ab", False, "** ends at a /"),
    ("a/**", "a/b/c", True, "below"),
    ("a/**", "a", False, "a/** is below a only"),
    ("a/**/c", "a/c", True, "inner **/ may be empty"),
    ("a/**/c", "ab/c", False, "inner ** keeps its /"),
    ("a**/c", "ab/a/c", True, "** within a component"),
    ("a**/c", "a/c", True, "** within a component may be empty"),
    ("a**/c", "ac", False, "the / stays"),
    ("**/norm*", "x/norm_mlp/scale", True, "ancestor by wildcard"),
    ("layers/mlp", "layers/3/mlp/up", True, "layer index left out"),
    ("layers/3", "layers/3/mlp", True, "layer index named"),
    ("layers/4", "layers/3/mlp", False, "another layer"),
    ("layers/*/mlp", "layers/3/mlp", True, "layer index by *"),
    ("a?", "ab", True, "? is one character"),
    ("a?b", "a/b", False, "? is not /"),
    ("a.b", "axb", False, ". is itself"),
    ("a+", "aa", False, "+ is itself"),
    ("[ab]", "a", False, "brackets are themselves"),
]


@pytest.mark.parametrize(("pattern", "path", "expected", "why"), TABLE, ids=[t[3] for t in TABLE])
def test_grammar_by_hand(pattern: str, path: str, expected: bool, why: str) -> None:
    assert matches(pattern, path) is expected
    assert slow_matches(pattern, path) is expected


@pytest.mark.parametrize("missing", ["ancestors", "indices"])
def test_a_matcher_without_a_part_of_the_grammar_is_told_apart(missing: str) -> None:
    mutant = [slow_matches(pattern, path, **{missing: False}) for pattern, path, *_ in TABLE]
    assert mutant != [expected for _, _, expected, _ in TABLE]


def test_spellings_drop_every_index() -> None:
    assert spellings("a/0/b/12/c") == ("a/0/b/12/c", "a/b/c")
    assert spellings("a/b1") == ("a/b1",)


def test_a_rule_is_split_at_the_first_equals_sign() -> None:
    rule = parse_rule("**/head=p=f32,c=bf16,o=f32")
    assert rule == Rule("**/head", parse_policy("p=f32,c=bf16,o=f32"))
    assert str(rule) == "**/head=p=f32,c=bf16,o=f32"
    assert parse_rule(str(rule)) == rule
    assert parse_rule(rule) is rule


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_as_a_value_is_its_policy_for_the_rest(name: str) -> None:
    assert parse_rule(f"**={name}").policy == parse_rule(f"x={name}").policy


def test_bf16_as_a_value_keeps_float32_weights_and_bfloat16_does_not() -> None:
    assert policy_text(parse_rule("a=bf16").policy) == "p=f32,c=bf16,o=bf16"
    assert policy_text(parse_rule("a=bfloat16").policy) == "p=bf16,c=bf16,o=bf16"


@pytest.mark.parametrize("text", ["", "a", "=f32", "a=", "="])
def test_half_a_rule_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write PATTERN=VALUE, such as \*\*/norm\*=fp32"):
        parse_rule(text)


@pytest.mark.parametrize("pattern", ["", " ", "a b", "a\tb", " a", "a\n", "a=b"])
def test_a_pattern_is_one_word_without_equals_sign(pattern: str) -> None:
    with pytest.raises(ConfigError, match="write PATTERN=VALUE"):
        Rule(pattern, F32)


def test_a_bad_value_names_its_rule() -> None:
    with pytest.raises(ConfigError, match=r"^rule 'a=fp33': unknown 'fp33'; did you mean fp32"):
        parse_rule("a=fp33")


def test_near_misses_find_the_misspelt_component_first() -> None:
    paths = ["decoder/layers/0/norm_mlp", "decoder/layers/1/norm_mlp", "decoder/head"]
    assert near_misses("**/nrom_mlp", paths)[0] == "**/norm_mlp"
    assert "decoder/head" in near_misses("decoder/haed", paths)
    assert near_misses("zzz", paths) == ["decoder/head", "decoder/layers/norm_mlp"]


# Paths as four libraries and two families of ours have them.
MODELS: dict[str, list[str]] = {
    "decoder": [
        *(f"decoder/layers/{i}/{part}" for i in range(2) for part in (
            "norm_attention", "attention/query", "attention/key", "attention/value",
            "attention/out", "norm_mlp", "mlp/up", "mlp/gate", "mlp/down")),
        "decoder/embed", "decoder/norm", "decoder/head",
    ],
    "flax": [f"encoder/layer_{i}/{part}" for i in range(3) for part in (
        "LayerNorm_0", "MultiHeadDotProductAttention_0/query", "Dense_0", "Dense_1")],
    "transformers": [f"bert/encoder/layer/{i}/{part}" for i in range(2) for part in (
        "attention/self/query", "attention/output/dense", "intermediate/dense", "output/dense")],
    "equinox": [f"blocks/{i}/{part}" for i in range(2) for part in (
        "attention/query_proj", "mlp/layers/0", "mlp/layers/1")],
    "resnet": [f"resnet/stage{i}/block{j}/{part}" for i in range(2) for j in range(1) for part in (
        "convolution1", "convolution2", "norm1")],
}  # fmt: skip


def mistyped(word: str) -> set[str]:
    """A word with two neighbours swapped, one letter left out, doubled or replaced."""
    spots = range(len(word))
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in spots[:-1]}
    left_out = {word[:i] + word[i + 1 :] for i in spots}
    doubled = {word[:i] + word[i] + word[i:] for i in spots}
    replaced = {word[:i] + "q" + word[i + 1 :] for i in spots}
    return (swapped | left_out | doubled | replaced) - {word}


@pytest.mark.parametrize("model", MODELS)
def test_a_slip_of_one_letter_is_put_right_in_any_component(model: str) -> None:
    """Every component of every pattern is mistyped; the right one is suggested."""
    paths = MODELS[model]
    bare = sorted({spellings(path)[-1] for path in paths})
    parents = {
        "/".join(path.split("/")[:n]) for path in bare for n in range(1, path.count("/") + 2)
    }
    patterns = sorted({f"**/{path.split('/')[-1]}" for path in parents} | parents)
    tried = found = 0
    for pattern in patterns:
        parts = pattern.split("/")
        for index, part in enumerate(parts):
            if not part.isalpha() or len(part) < 3:
                continue
            for wrong in sorted(mistyped(part))[::3]:
                typo = "/".join([*parts[:index], wrong, *parts[index + 1 :]])
                if any(matches(typo, path) for path in paths):
                    continue
                near = near_misses(typo, paths)
                assert all(any(matches(one, path) for path in paths) for one in near), (typo, near)
                tried, found = tried + 1, found + (pattern in near)
    assert tried > 90
    assert found == tried


@pytest.mark.parametrize(
    ("pattern", "model", "text"),
    [
        ("**/mpl", "decoder", "near misses: **/mlp"),
        ("**/mpl/up", "decoder", "near misses: **/mlp/up"),
        ("mlp", "decoder", "near misses: **/mlp"),
        ("decoder/layres/mlp", "decoder", "near misses: decoder/layers/mlp"),
        ("decoder/layers/1/mpl", "decoder", "near misses: decoder/layers/1/mlp"),
        ("**/nrom*", "decoder", "near misses: **/norm*"),
        ("**/*_nrom", "decoder", "near misses: **/"),
        ("layers/2", "decoder", "there are 2 layers, 0 to 1"),
        ("**/layers/99/mlp", "decoder", "there are 2 layers, 0 to 1"),
        ("decoder/layers/2/**/up", "decoder", "there are 2 layers, 0 to 1"),
        ("encoder/layer_3", "flax", "there are 3 layer, 0 to 2"),
        ("bert/encoder/layer/2", "transformers", "there are 2 layer, 0 to 1"),
        ("blocks/2", "equinox", "there are 2 blocks, 0 to 1"),
        ("**/mlp/layers/5", "equinox", "there are 2 layers, 0 to 1"),
        ("**/stage2", "resnet", "there are 2 stage, 0 to 1"),
    ],
)
def test_what_is_said_of_a_pattern_that_matches_nothing(
    pattern: str, model: str, text: str
) -> None:
    assert not any(matches(pattern, path) for path in MODELS[model])
    assert nearest(pattern, MODELS[model]).startswith(text)
