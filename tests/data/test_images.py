"""Images: read, split and standardised; what cannot be read is one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpjax.data.images import image_batches, load_images
from mpjax.errors import ConfigError

RNG = np.random.default_rng(0)
GOOD = RNG.normal(3, 2, size=(20, 4, 5))
LABELS = np.arange(20) % 3


def saved(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "x.npz", **arrays)
    return str(folder / "x.npz")


def test_a_file_is_split_once_and_standardised_by_its_training_side(tmp_path: Path) -> None:
    path = saved(tmp_path, images=GOOD, labels=LABELS)
    images = load_images(path, held_out=0.25)
    assert images.train["inputs"].shape == (15, 4, 5, 1) and images.classes == 3
    assert images.held_out["inputs"].shape == (5, 4, 5, 1)
    pixels = images.train["inputs"]
    assert pixels.dtype == np.float32 and abs(pixels.mean()) < 1e-6 and abs(pixels.std() - 1) < 1e-6
    assert abs(images.held_out["inputs"].mean()) > 1e-3
    both = [np.concatenate([images.train[k], images.held_out[k]]) for k in ("inputs", "targets")]
    rows = sorted((tuple(x.ravel().round(3)), int(y)) for x, y in zip(*both, strict=True))
    whole = (GOOD - GOOD.mean()) / GOOD.std()  # order is kept by any affine map
    want = sorted((tuple(x.ravel()), int(y)) for x, y in zip(whole, LABELS, strict=True))
    assert [label for _, label in rows] == [label for _, label in want]
    again = load_images(path, held_out=0.25)
    np.testing.assert_array_equal(again.train["inputs"], pixels)


def test_every_epoch_holds_every_image_once_in_another_order() -> None:
    data = {"inputs": np.zeros((6, 1, 1, 1), np.float32), "targets": np.arange(6)}
    stream = image_batches(data, batch=3, seed=1)
    seen = [list(next(stream)["targets"]) for _ in range(4)]
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == list(range(6)) and first != second
    again = image_batches(data, batch=3, seed=1)
    assert [list(next(again)["targets"]) for _ in range(4)] == seen
    other = image_batches(data, batch=3, seed=2)
    assert [list(next(other)["targets"]) for _ in range(4)] != seen


def test_digits_are_there_or_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ConfigError, match=r"pip install .*\[tasks\]', or give --data FILE"):
            load_images("digits")
    pytest.importorskip("sklearn")
    images = load_images("digits")
    assert images.train["inputs"].shape == (1438, 8, 8, 1) and images.classes == 10
    assert len(images.held_out["targets"]) == 359


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=GOOD), "labels.*give digits, or FILE.npz"),
        (dict(images=GOOD[0], labels=LABELS), r"images are float64 of shape \(4, 5\)"),
        (dict(images=GOOD.astype(str), labels=LABELS), "images are str"),
        (dict(images=GOOD + 1j, labels=LABELS), "images are complex128"),
        (dict(images=GOOD[:, :0], labels=LABELS), r"images are float64 of shape \(20, 0, 5\)"),
        (dict(images=GOOD, labels=LABELS[:5]), r"labels have shape \(5,\), images \(20, 4, 5\)"),
        (dict(images=GOOD, labels=LABELS - 1), "not whole numbers from 0"),
        (dict(images=GOOD, labels=LABELS / 2), "labels are float64"),
        (dict(images=GOOD, labels=LABELS * 2), "labels are 3 kinds up to 4"),
        (dict(images=np.where(GOOD > 6, np.nan, GOOD), labels=LABELS), "not finite"),
        (dict(images=GOOD * 0, labels=LABELS), "all pixels of .* are equal"),
        (dict(images=np.array([{}] * 20), labels=LABELS), "cannot be read .*pickle"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_images(saved(tmp_path, **arrays))
    assert "\n" not in str(error.value)


def test_other_mistakes_are_named_too(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    whole = saved(tmp_path, images=GOOD, labels=LABELS)
    (tmp_path / "half.npz").write_bytes(Path(whole).read_bytes()[:200])
    cases = [
        (lambda: load_images("digit"), "data: 'digit' is unknown; give digits"),
        (lambda: load_images(str(tmp_path / "none.npz")), "cannot be read .*No such file"),
        (lambda: load_images(str(tmp_path / "text.npz")), "cannot be read"),
        (lambda: load_images(str(tmp_path / "half.npz")), "cannot be read"),
        (lambda: load_images(whole, held_out=1.0), "held_out: 1.0 must be above 0 and below 1"),
        (lambda: load_images(whole, held_out=0.001), "leaves one side empty"),
        (
            lambda: image_batches({"targets": LABELS}, batch=21, seed=0),
            "batch: 21 is not in 1 .. 20",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
