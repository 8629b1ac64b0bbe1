"""Images through dm-pix, beside NumPy and SciPy."""

import sys

import numpy as np
import pytest
from scipy import ndimage

from mpjax.data.augment import ColourJitter, RandomCrop, RandomFlip, RandomRotation
from mpjax.errors import ConfigError

pytest.importorskip("dm_pix")
IMAGE = np.random.default_rng(0).normal(size=(7, 7, 2)).astype(np.float32)


def many(transform, count=60, image=IMAGE):
    return [transform(image, np.random.default_rng(i)) for i in range(count)]


def test_a_crop_is_a_window_of_the_padded_image():
    wide = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = [wide[i : i + 7, j : j + 7] for i in range(5) for j in range(5)]
    places = [
        next(i for i, w in enumerate(windows) if np.array_equal(w, found))
        for found in many(RandomCrop(2), 200)
    ]
    assert set(places) == set(range(25))


def test_half_of_the_images_are_flipped():
    flipped = [np.array_equal(found, IMAGE[:, ::-1]) for found in many(RandomFlip(), 100)]
    stayed = [np.array_equal(found, IMAGE) for found in many(RandomFlip(), 100)]
    assert all(a != b for a, b in zip(flipped, stayed, strict=True))
    assert abs(sum(flipped) - 50) < 4 * 5


def turned(image, degrees):
    """scipy's rotation about the centre, bilinear, the nearest pixel beyond the border."""
    return ndimage.rotate(image, degrees, reshape=False, order=1, mode="nearest")


def test_a_rotation_is_one_of_an_angle_in_range():
    angles = np.linspace(-30, 30, 1201)
    candidates = np.stack([turned(IMAGE, a) for a in angles])
    best = []
    for found in many(RandomRotation(30), 12):
        errors = np.abs(candidates - found).max((1, 2, 3))
        best.append(angles[errors.argmin()])
        assert errors.min() < 0.02, "half a step of 0.05 degrees"
    assert min(best) < -8 and max(best) > 8
    assert np.abs(candidates - turned(IMAGE, 40)).max((1, 2, 3)).min() > 0.1, "the control"


def test_colours_are_an_affine_map_of_each_channel():
    for found in many(ColourJitter(0.3, 0.2)):
        mean = IMAGE.mean((0, 1))
        factor = (found - found.mean((0, 1))) / (IMAGE - mean)
        shift = (found.mean((0, 1)) - mean).round(5)
        assert np.ptp(factor) < 1e-3 and 0.8 <= np.median(factor) <= 1.2
        assert shift[0] == pytest.approx(shift[1], abs=2e-5) and abs(shift[0]) <= 0.3
    same = many(ColourJitter(0.0, 0.0), 2)
    assert np.array_equal(same[0], IMAGE)


def test_the_same_generator_gives_the_same_bits():
    for transform in (RandomCrop(2), RandomFlip(), RandomRotation(30), ColourJitter()):
        first, again = many(transform, 6), many(transform, 6)
        assert np.array_equal(first, again) and first[0].dtype == np.float32
        assert any(not np.array_equal(first[0], other) for other in first[1:])


def test_mistakes_are_one_line(monkeypatch):
    for make, said in (
        (lambda: RandomCrop(0), "padding=0; expected a whole number of 1"),
        (lambda: RandomCrop(1.5), "padding=1.5"),
        (lambda: RandomRotation(181), "degrees=181; expected 0 or above and at most 180"),
        (lambda: RandomRotation("much"), "degrees='much'"),
        (lambda: ColourJitter(brightness=-1), "brightness=-1; expected 0 or above"),
        (lambda: ColourJitter(brightness=float("inf")), "brightness=inf; give a finite"),
        (lambda: ColourJitter(contrast=1.0), "contrast=1.0"),
        (lambda: RandomFlip()(IMAGE[0], np.random.default_rng(0)), "expected an image (H, W, C)"),
        (lambda: RandomFlip()(IMAGE.astype(np.uint8), np.random.default_rng(0)), "of float32"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert said in str(error.value), str(error.value)
    monkeypatch.setitem(sys.modules, "dm_pix", None)
    with pytest.raises(ConfigError, match=r"needs the package dm_pix.*\[images\]"):
        RandomFlip()
