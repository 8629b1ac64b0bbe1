"""What a sweep varies is read as values of the settings' own types, and every arm is another."""

from __future__ import annotations

import dataclasses

import pytest

from common.grid import parse_grid, products, words
from experiments import sweep
from mpjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Settings:
    layers: int = 2
    lr: tuple[float, ...] = (1e-3,)
    warmup: int | None = None
    tied: bool = True
    precision: tuple[str, ...] = ("fp32",)
    out: str = "runs"


def test_values_have_the_types_of_their_settings() -> None:
    texts = ["layers=2, 4", "lr=1e-3,.1", "warmup=0,5", "tied=true,False",
             "precision=p=f32,c=bf16,o=f32|fp32"]  # fmt: skip
    grid = parse_grid(texts, Settings(), ("out",))
    assert grid == {
        "layers": (2, 4), "lr": (1e-3, 0.1), "warmup": (0, 5), "tied": (True, False),
        "precision": ("p=f32,c=bf16,o=f32", "fp32"),
    }  # fmt: skip
    assert [type(values[0]) for values in grid.values()] == [int, float, int, bool, str]


def test_all_combinations_are_products_and_no_label_leaves_its_folder() -> None:
    combined = products({"layers": (2, 4), "data": ("../a.txt", "b")})
    assert [words(changes) for changes in combined] == [
        " layers=2 data=..-a.txt", " layers=2 data=b", " layers=4 data=..-a.txt",
        " layers=4 data=b",
    ]  # fmt: skip
    assert products({}) == [()] and words(()) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tied=yes", "write true or false"),
        ("layers=2.5", "not a whole number"),
        ("out=a", "unknown setting 'out'"),
        ("layers=", "write NAME=VALUE,VALUE"),
        ("layers=2,", "layers='' is not a whole number"),
    ],
)
def test_what_is_no_value_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_grid([text], Settings(), ("out",))


def test_each_arm_is_compared_with_the_first_precision_at_the_same_settings() -> None:
    config = sweep.Config(precision=("fp32", "bf16"), lr=(1e-4, 1e-3, 1e-2), sweep=("layers=1,2",))
    arms = sweep.arms_of(config)
    assert [len(own) for own in arms.values()] == [6, 6]
    one = arms["bf16"][3]
    assert (one.label, one.reference) == ("bf16 lr=0.001 layers=2", "fp32 lr=0.001 layers=2")
    assert one.work(config).layers == 2 and one.work(config).width == config.width
    edges = [sweep.at_the_edge(arm.label, arms["fp32"]) for arm in arms["fp32"]]
    assert [" a smaller" in e or " a larger" in e for e in edges] == [True] * 2 + [False] * 2 + [
        True
    ] * 2
    with pytest.raises(ConfigError, match=r"two arms are called 'fp32 lr=0\.001'"):
        sweep.arms_of(dataclasses.replace(config, sweep=(), lr=(1e-3, 1.0000001e-3)))
