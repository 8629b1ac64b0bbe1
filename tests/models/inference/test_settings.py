"""Settings of generation: any kind of number is taken or is one line; several ends end."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import beam_search, generate, judge, left_pad, stream
from mpjax.models.inference.sampling import Sampling
from mpjax.models.inference.settings import as_cache, as_count, as_ends, as_number
from tests.models.shapes import IDS, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")
NEW = 6
WHOLE = (3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3))
NO_WHOLE = (3.0, np.float32(3), jnp.float32(3), True, np.True_, jnp.array(True), "3", None, [3],
            np.array([3, 4]), {}, 3j)  # fmt: skip
REAL = (0.5, np.float32(0.5), np.float16(0.5), jnp.float32(0.5), jnp.bfloat16(0.5), np.array(0.5))
NO_REAL = (True, "0.5", None, [0.5], np.array([0.5]), {}, 0.5j, np.True_)


def test_numbers_of_any_kind() -> None:
    for value in WHOLE:
        found = as_count(value, "x")
        assert (found, type(found)) == (3, int)
        assert as_number(value, "x") == 3.0
        assert as_ends(value, 8) == (3,)
    for value in REAL:
        found = as_number(value, "x")
        assert (found, type(found)) == (0.5, float)
    for several in ([2, 5], (2, 5), np.array([2, 5]), jnp.array([2, 5]), [jnp.int32(2), np.int8(5)],
                    [2, 5, 2]):  # fmt: skip
        assert as_ends(several, 8) == (2, 5)
    assert as_ends(None, 8) == as_ends([], 8) == ()
    for same in ("bf16", jnp.bfloat16, np.dtype(jnp.bfloat16), jnp.dtype("bfloat16")):
        assert str(as_cache(same)) == "bf16"
    assert str(as_cache(np.float32)) == "f32" and str(as_cache(jnp.int8)) == "int8@row"
    assert as_cache(None) == as_cache("") == ""
    assert Sampling(top_k=None, top_p=None) == Sampling()
    assert hash(Sampling(jnp.float32(0.5), np.int64(2), jnp.float32(0.5))) == hash(
        Sampling(0.5, 2, 0.5)
    )


def lines() -> list[tuple[str, Any]]:
    """Every setting, with every kind of thing that it is not."""
    model = small(layers=1, loop="scan")
    params = stirred(model)
    draw = dict(new=2, key=jax.random.key(0))
    batch = {"inputs": IDS, "targets": IDS}
    found: list[tuple[str, Any]] = []

    def add(name: str, wrong: Any, call: Any) -> None:
        found.extend((name, lambda v=v: call(v)) for v in wrong)

    def greedy(**kw: Any) -> Any:
        return generate(model, params, IDS, **({"new": 2, "temperature": 0.0} | kw))

    odd_ends = (2.0, True, "2", b"2", {"a": 1}, [2.5], [[2]], [None], -1, 32, [2, 99])
    odd_caches = (3, 0.5, True, [8], {}, jnp.zeros(2), "in8", int, object())
    add("new", (*NO_WHOLE, 0, -1), lambda v: greedy(new=v))
    add("end", odd_ends, lambda v: greedy(end=v))
    add("cache", odd_caches, lambda v: greedy(cache=v))
    add("state", (3, "x", [1], jnp.zeros(2)), lambda v: greedy(state=v))
    add("lengths", (1.5, [1.5, 2.0], "ab", [[1, 2]], ["a", "b"], [True, False], [1], {}, [1, [2]]),
        lambda v: greedy(lengths=v))  # fmt: skip
    add("temperature", (*NO_REAL, -1.0, np.nan, np.inf),
        lambda v: generate(model, params, IDS, **(draw | {"temperature": v})))  # fmt: skip
    no_k = [v for v in NO_WHOLE if v is not None]
    add("top_k", (*no_k, -1, 33), lambda v: generate(model, params, IDS, **draw, top_k=v))
    no_p = [v for v in NO_REAL if v is not None]
    add("top_p", (*no_p, 0.0, 1.5, np.nan), lambda v: generate(model, params, IDS, **draw, top_p=v))
    add("key", (0, "x", np.zeros(3), jax.random.split(jax.random.key(0), 2)),
        lambda v: generate(model, params, IDS, **(draw | {"key": v})))  # fmt: skip
    add(
        "stream", (*NO_WHOLE, 0), lambda v: list(stream(model, params, IDS, new=v, key=draw["key"]))
    )
    add("stream", odd_caches, lambda v: list(stream(model, params, IDS, **draw, cache=v)))

    def beams(**kw: Any) -> Any:
        return beam_search(model, params, IDS, **({"new": 2, "beams": 2} | kw))

    add("beams", (*NO_WHOLE, 0), lambda v: beams(beams=v))
    add("length_penalty", (*NO_REAL, -1.0, np.nan), lambda v: beams(length_penalty=v))
    add("beam new", (*NO_WHOLE, 0), lambda v: beams(new=v))
    add("beam end", odd_ends, lambda v: beams(end=v))
    add("beam cache", odd_caches, lambda v: beams(cache=v))
    add("judge cache", odd_caches, lambda v: judge(model, params, [batch], cache=v))
    add("left_pad", (["ab"], [[2**31]], [[1.7]], [1, 2], 3, "ab", {}, None, [[]], [[True]],
                     [[-1]], [[1, [2]]], [None], jnp.int32(3)), left_pad)  # fmt: skip
    no_length = (v for v in NO_WHOLE if v is not False)
    add("left_pad length", no_length, lambda v: left_pad([[1, 2]], v))
    return found


def test_a_setting_is_taken_or_one_line() -> None:
    cases = lines()
    assert len(cases) > 190
    for name, call in cases:
        with pytest.raises(ConfigError) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700, (name, caught.value)


def test_a_traced_setting_is_one_line() -> None:
    model = small(layers=1, loop="scan")
    params = stirred(model)
    for name in ("temperature", "new", "end"):
        with pytest.raises(ConfigError, match=f"{name}: .*traced|end: .*give the id"):
            jax.jit(
                lambda v, name=name: generate(
                    model, params, IDS, **({"new": 2, "temperature": 0.0} | {name: v})
                )
            )(1)


def test_any_of_several_ends_ends_a_row() -> None:
    """Against the tokens that are generated without an end, cut in plain Python."""
    model = small(layers=1, loop="scan")
    params = stirred(model)
    free = np.asarray(generate(model, params, IDS, new=NEW, temperature=0.0))
    stopped = 0
    for ends in ([int(free[0, 2]), int(free[1, 1])], [int(free[1, 0]), 31]):
        found = np.asarray(generate(model, params, IDS, new=NEW, temperature=0.0, end=ends))
        for row, tokens in zip(found, free.tolist(), strict=True):
            at = next((i for i, t in enumerate(tokens) if t in ends), NEW - 1)
            want = tokens[: at + 1] + [tokens[at]] * (NEW - at - 1)
            assert row.tolist() == want
            stopped += at < NEW - 1
    assert stopped >= 3


def test_beams_end_at_any_of_several_ends() -> None:
    """Against all continuations there are, one by one in float64."""
    model = small(layers=1, loop="scan", vocabulary=4)
    params, ends, steps = stirred(model), (1, 3), 3
    prompt = jnp.array([[0, 2]])
    found = beam_search(model, params, prompt, new=steps, beams=40, end=ends, length_penalty=0.5)
    rows = np.array(list(itertools.product(range(4), repeat=steps)), np.int32)
    whole = np.concatenate([np.broadcast_to(prompt, (len(rows), 2)), rows], axis=1)
    logits = np.asarray(jax.jit(lambda p, i: model.apply(p, i)[0])(params, whole), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores: dict[tuple[int, ...], float] = {}
    for row, p in zip(rows.tolist(), logp[:, 1:-1], strict=True):
        size = next((i + 1 for i, t in enumerate(row) if t in ends), steps)
        total = sum(p[i, row[i]] for i in range(size)) / size**0.5
        scores[tuple(row[:size] + [row[size - 1]] * (steps - size))] = total
    best = sorted(scores, key=lambda row: -scores[row])
    count = min(len(best), 40)
    assert count == len(best), "all of them are kept"
    assert [tuple(t) for t in np.asarray(found.tokens)[0, :count].tolist()] == best
    want = [scores[row] for row in best]
    np.testing.assert_allclose(np.asarray(found.scores)[0, :count], want, rtol=1e-5)
    assert np.isneginf(np.asarray(found.scores)[0, count:]).all()
