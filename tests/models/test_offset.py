"""An offset of the token embeddings: where it is added, and in which dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import decoder, encoder, recurrent, seq2seq

pytestmark = pytest.mark.usefixtures("fast_compile")
SMALL: Any = dict(layers=1, width=16, heads=2, vocabulary=40)
IDS = jnp.asarray([[5, 9, 7, 21]])  # each once, so that a row of the table is a token's
OFFSET = 0.1 * jax.random.normal(jax.random.key(4), (1, 4, 16))


def features(kind: str, precision: str = "fp32") -> tuple[Any, Any, Any]:
    """A model's weights, where their table is, and a function of weights and an offset."""
    if kind == "encoder":
        model: Any = encoder("bert-tiny", precision, **SMALL)

        def run(params: Any, offset: Any = None) -> Any:
            more = {} if offset is None else {"offset": offset}
            return model.apply(params, {"ids": IDS} | more)[0]["features"]
    elif kind == "seq2seq":
        model = seq2seq("seq2seq-tiny", precision, **SMALL)

        def run(params: Any, offset: Any = None) -> Any:
            more = {} if offset is None else {"source_offset": offset}
            return model.features(params, {"source": IDS, "inputs": IDS + 10} | more)[0]
    else:
        model = (
            recurrent("tiny", precision, width=16, vocabulary=40)
            if kind == "recurrent"
            else decoder("tiny", precision, scale_embed=True, tied=False, **SMALL)
        )

        def run(params: Any, offset: Any = None) -> Any:
            return model.features(params, IDS, offset=offset)[0]

    return model.init(jax.random.key(0)), "decoder" if kind == "seq2seq" else model.root, run


@pytest.mark.parametrize("kind", ["encoder", "decoder", "recurrent", "seq2seq"])
def test_an_offset_moves_rows_of_the_token_table(kind: str) -> None:
    params, root, run = features(kind)
    run = jax.jit(run)
    moved = jax.tree.map(lambda x: x, params)
    moved[root]["embed"]["table"] = params[root]["embed"]["table"].at[IDS].add(OFFSET)
    got, want = run(params, OFFSET), run(moved)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(np.asarray(want - run(params))).max() > 1e-2
    assert np.asarray(run(params, 0 * OFFSET)).tobytes() == np.asarray(run(params)).tobytes()


def test_an_offset_that_bfloat16_would_round_away_arrives() -> None:
    params, root, run = features("encoder", "bf16")
    table = params[root]["embed"]["table"] * 50  # of magnitude 1
    params[root]["embed"]["table"] = table
    small = OFFSET * (1e-3 / jnp.linalg.norm(OFFSET))
    found = [np.asarray(jax.jit(run)(params, x), np.float32) for x in (0 * small, small)]
    assert np.any(found[0] != found[1])
    # control: rows in bfloat16 plus an offset in bfloat16 are the same rows
    rows = table[IDS].astype(jnp.bfloat16)
    assert np.mean(np.asarray(rows + small.astype(jnp.bfloat16) != rows)) < 0.05


@pytest.mark.parametrize("kind", ["encoder", "decoder", "recurrent"])
def test_an_offset_of_another_shape_is_one_line(kind: str) -> None:
    params, root, run = features(kind)
    message = rf"{root}: offset has shape \(1, 3, 16\), the embeddings \(1, 4, 16\); give a vector"
    with pytest.raises(ConfigError, match=message):
        run(params, OFFSET[:, :3])
