"""Generation: padded and alone, stopped, streamed, and through caches in other formats."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import sqnr
from mpjax.models import beam_search, generate, left_pad, recurrent, stream
from mpjax.models.core.storage import stored_bytes
from mpjax.models.inference.prompt import check_prompt
from tests.models.shapes import FAST, IDS, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")
PROMPTS = [[3, 4, 5, 6], [9]]
ONE: dict[str, Any] = {"layers": 1, "loop": "scan"}  # compiles sooner
GREEDY: dict[str, Any] = {"new": 6, "temperature": 0.0}


@pytest.mark.parametrize(("kind", "loop"), [("llama", "unroll"), ("gpt", "scan")])
def test_padded_prompts_continue_as_each_alone(kind: str, loop: str) -> None:
    model = small("fp32", kind, loop=loop, layers=1 if loop == "unroll" else 2)
    params = stirred(model)
    ids, lengths = left_pad(PROMPTS)
    together = generate(model, params, ids, lengths=lengths, **GREEDY)
    for tokens, prompt in zip(together, PROMPTS, strict=True):
        assert np.array_equal(tokens, generate(model, params, jnp.array([prompt]), **GREEDY)[0])
    # the negative control: padding that is taken for text
    assert not np.array_equal(generate(model, params, ids, **GREEDY)[1:], together[1:])


def test_cached_greedy_is_what_the_whole_model_would_say() -> None:
    model = small(**ONE)
    params = stirred(model)
    tokens = generate(model, params, IDS, **GREEDY)
    whole = jnp.concatenate([IDS, tokens], axis=1)
    logits = jax.jit(lambda p, i: model.apply(p, i)[0], compiler_options=FAST)(params, whole)
    assert np.array_equal(jnp.argmax(logits[:, IDS.shape[1] - 1 : -1], axis=-1), tokens)


def test_rows_end_and_stay_ended() -> None:
    model = small(**ONE)
    params = stirred(model)
    free = np.asarray(generate(model, params, IDS, **GREEDY))
    end = int(free[0, 2])
    ended = np.asarray(generate(model, params, IDS, end=end, **GREEDY))
    for row, expected in zip(ended, free, strict=True):
        stop = list(expected).index(end) + 1 if end in expected else len(expected)
        assert np.array_equal(row[:stop], expected[:stop]) and (row[stop:] == end).all()
    assert (ended != free).any(), "or nothing was stopped"
    found = beam_search(model, params, IDS, new=6, beams=2, end=end)
    for tokens in np.asarray(found.tokens).reshape(-1, 6):
        assert end not in tokens or (tokens[list(tokens).index(end) :] == end).all()


def test_draws_follow_their_key_and_filters() -> None:
    model = small(**ONE)
    params = stirred(model)
    keys = [jax.random.key(n) for n in (0, 0, 1)]
    one, same, other = (generate(model, params, IDS, new=6, key=key, top_p=0.95) for key in keys)
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert not np.array_equal(one, generate(model, params, IDS, **GREEDY))
    drawn = list(stream(model, params, IDS, new=6, key=keys[0], top_p=0.95))
    assert np.array_equal(np.stack(drawn, axis=1), one)


# (storage, least dB, most dB) of a cache against float32 keys and values
ERRORS = {
    "bf16": (45, 65),
    "int8": (40, 55),
    "int8+offset": (40, 60),
    "e4m3": (28, 42),
    "int4": (15, 30),
    "int2": (-3, 9),
}


def test_caches_lose_what_their_formats_lose() -> None:
    model = small(**ONE)
    params = stirred(model)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
    def prefill(storage: str) -> Any:
        return model.apply(params, IDS, state=model.init_cache(2, 9, storage))[1]["layers"]

    exact = prefill("f32")
    for storage, (least, most) in ERRORS.items():
        stored = prefill(storage)
        decibels = [float(sqnr(x, q)) for x, q in zip(exact, stored, strict=True)]
        assert all(least < d < most for d in decibels), (storage, decibels)
    slots = {s: stored_bytes(model.init_cache(2, 9, s)["layers"]) for s in ("", "bf16", "int8")}
    numbers = 2 * 2 * 9 * 2 * 4  # keys and values, rows, slots, heads, width
    assert slots == {"": 4 * numbers, "bf16": 2 * numbers, "int8": numbers + numbers // 4 * 4}


def test_a_quantised_cache_is_the_same_in_parts() -> None:
    model = small(**ONE)
    params = stirred(model)
    step = jax.jit(model.apply, compiler_options=FAST)

    def run(*parts: int) -> tuple[np.ndarray, Any]:
        state, at, out = model.init_cache(2, 9, "int8"), 0, []
        for part in parts:
            logits, state = step(params, IDS[:, at : at + part], state=state)
            out.append(np.asarray(logits))
            at += part
        return np.concatenate(out, axis=1), state

    whole, parts = run(9), run(4, 1, 4)
    assert np.abs(whole[0] - parts[0]).max() < 0.02 * np.abs(whole[0]).max()
    values = whole[1]["layers"][0].values, parts[1]["layers"][0].values
    assert np.mean(np.asarray(values[0]) != np.asarray(values[1])) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new": 0}, "new: 0 tokens"),
        ({"end": 32}, "end: 32 is no token"),
        ({"lengths": [9, 10]}, "lengths: .9, 10. do not fit"),
        ({"lengths": [0, 9]}, "lengths: .0, 9. do not fit"),
        ({"cache": "int8@tensor"}, "shares a scale between tokens"),
        ({"cache": "in8"}, "cache: 'in8': format: unknown name"),
        ({"temperature": 1.0}, "needs a key"),
        ({"top_k": 33, "temperature": 1.0}, "top_k: 33 is more than the 32"),
    ],
)
def test_a_wrong_setting_is_one_line(options: dict[str, Any], message: str) -> None:
    model = small()
    with pytest.raises(ConfigError, match=message) as caught:
        generate(model, stirred(model), IDS, **(GREEDY | options))
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_without_keys_and_values_generates_unpadded() -> None:
    model = recurrent("tiny", layers=1, width=8, vocabulary=32)
    params = model.init(jax.random.key(0))
    assert generate(model, params, IDS, **GREEDY).shape == (2, 6)
    for options in ({"cache": "int8"}, {"lengths": [3, 9]}):
        with pytest.raises(ConfigError, match="Recurrent keeps no keys and values"):
            generate(model, params, IDS, **(GREEDY | options))


def test_wrong_prompts_are_one_line() -> None:
    model = small("fp32", "gpt")
    params = stirred(model)
    with pytest.raises(ConfigError, match="prompt: 40 is no token of the model, whose ids are"):
        generate(model, params, jnp.array([[1, 40]]), **GREEDY)
    for odd, given in (([[1, 2]], "list"), (jnp.zeros(3, jnp.int32), r"int32 \(3,\)"),
                       (jnp.zeros((1, 3)), r"float32 \(1, 3\)")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"prompt: {given}; give integer ids of shape"):
            check_prompt(model, params, odd, None, 6, "")
    with pytest.raises(ConfigError, match="is empty"):
        generate(model, params, jnp.zeros((1, 0), jnp.int32), **GREEDY)
    with pytest.raises(ConfigError, match="longer than context=16"):
        generate(model, params, IDS, new=8, temperature=0.0)
    with pytest.raises(ConfigError, match="4 tokens do not fit length=3"):
        left_pad(PROMPTS, 3)
    with pytest.raises(ConfigError, match="empty"):
        left_pad([[1], []])
