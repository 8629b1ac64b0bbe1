"""The page of recipes is what the code says now, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.recipe_table import about, product_rows, recipe_page
from mpjax.precision import Operand, Precision, Recipe, get_recipe, recipe_names, register_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == recipe_page(), "python -m benchmarks.recipe_table > docs/recipes.md"


def test_the_page_holds_every_recipe_and_follows_a_new_one() -> None:
    page = recipe_page()
    for name in recipe_names():
        assert page.count(f"| `{name}` |") >= 2, name
    pair = (Operand("e3m4", "row", "stochastic"), None)
    register_recipe(Recipe("mine", pair, pair, pair, accumulate="e6m9"))
    assert "| `mine` | fprop | x: e3m4 row, stochastic | W: compute dtype |" in recipe_page()
    assert recipe_page() != page


def test_a_recipe_has_a_row_for_each_product() -> None:
    fp8, *_ = rows = list(product_rows(get_recipe("fp8")))
    assert [row[1] for row in rows] == ["fprop", "dgrad", "wgrad"]
    assert fp8[2:4] == ("x: e4m3 tensor", "W: e4m3 tensor")
    assert fp8[5:] == ("float8 unit", "bfloat16") and fp8[4] != "float8 unit", "cpu has none"
    assert rows[1][2] == "dy: e5m2 tensor"


def test_what_else_a_recipe_does_is_told() -> None:
    assert about(get_recipe("int8"))[1] == "int32" and "needs a key" in about(get_recipe("int8"))[2]
    assert "1024 steps" in about(get_recipe("fp8-delayed"))[2]
    assert "Hadamard" in about(get_recipe("nvfp4"))[2]
    assert about(get_recipe("mxfp4"))[1:3] == ("float32", "–")


def test_the_example_of_the_page_runs() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(source, names)
    precision = names["precision"]
    assert isinstance(precision, Precision)
    mlp = precision.recipe("decoder/layers/mlp/up")
    assert mlp is not None and mlp.name == "mine" and mlp.wgrad[1] is None
    assert precision.recipe("decoder/layers/attention/query") is None
