"""Perplexity and accuracy against numpy, and the table of variants."""

from __future__ import annotations

import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import Variant, compare, judge
from mpjax.models.inference.perplexity import as_markdown
from tests.models.shapes import BATCH, judged, logits, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_perplexity_is_that_of_the_loss_and_accuracy_that_of_numpy() -> None:
    model = small(layers=1, loop="scan")
    params = stirred(model)
    got = judge(model, params, [BATCH, BATCH])
    assert got.loss == pytest.approx(judged(model, params), rel=1e-5)
    assert got.perplexity == pytest.approx(np.exp(got.loss))
    right = logits(model, params, BATCH["inputs"]).argmax(-1) == np.asarray(BATCH["targets"])
    assert got.accuracy == pytest.approx(right.mean()) and got.tokens == 2 * right.size
    with pytest.raises(ConfigError, match="no batch"):
        judge(model, params, [])


def test_variants_are_compared_with_the_first() -> None:
    model = small(layers=1, loop="scan")
    params = stirred(model)
    variants = (Variant(), Variant("int8", cache="int8"), Variant(cache="int2"))
    whole, eight, two = compare(model, params, [BATCH], variants)
    # two bits a key are too few: the negative control
    assert whole.change == 0 and abs(eight.change) < 1 < abs(two.change)
    assert whole.weight_bytes == two.weight_bytes > eight.weight_bytes
    assert whole.cache_bytes == 2 * 2 * 4 * 4 > eight.cache_bytes > two.cache_bytes
    table = as_markdown([whole, eight, two]).splitlines()
    assert len(table) == 5 and "| int8 weights, int8 cache |" in table[3]
    assert all(line.count("|") == 7 for line in table)
