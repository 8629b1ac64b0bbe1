"""Transforms of images through dm-pix: crop, flip, rotation, colour.

dm-pix computes with JAX. One adapter runs it on the host's CPU, whatever trains, with a key that
the random generator draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, brief, is_whole, need
from mpjax.typing import Array, Key

Change = Callable[[Any, Any, Key, Array], Array]  # dm-pix, transform, key, image -> image


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(change: Change, transform: Any, key: Key, image: Array) -> Array:
    return change(_dm_pix(), transform, key, image)


def _dm_pix() -> Any:
    return need("dm_pix", "images", "image transforms")


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:  # JAX_PLATFORMS names others only
        raise ConfigError(
            f"image transforms: JAX has no CPU here ({error}); add it, as JAX_PLATFORMS=cuda,cpu"
        ) from None


def _changed(
    change: Change, transform: Any, image: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """An image changed on the CPU."""
    if getattr(image, "ndim", 0) != 3 or getattr(image, "dtype", None) != np.float32:
        raise ConfigError(
            f"{type(transform).__name__}: {brief(image)}; expected an image (H, W, C) of float32"
        )
    # dm-pix mixes whole numbers and floats, and ranks, in its rotation.
    with (
        jax.default_device(_cpu()),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        key = jax.random.key(int(draw.integers(2**31)))
        return np.asarray(_compiled(change, transform, key, image))


def _check(transform: object, name: str, most: float, least: float = 0.0) -> None:
    value = getattr(transform, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and least <= value <= most):
        top = f" and at most {most:g}" if most < math.inf else ""
        raise ConfigError(
            f"{type(transform).__name__}: {name}={brief(value)}; expected {least:g} or above{top}"
        )
    _dm_pix()


@dataclass(frozen=True)
class RandomCrop:
    """The image is padded with its border's pixels, and a part of its own size is cut out.

    Args:
        padding: pixels at each side, 1 or above.

    Raises:
        ConfigError: padding out of range, dm-pix is not there; when called, no float32 image.

    Example:
        >>> image = np.arange(4, dtype=np.float32).reshape(2, 2, 1)
        >>> RandomCrop(1)(image, np.random.default_rng(5))[..., 0].tolist()
        [[0.0, 1.0], [0.0, 1.0]]

    References:
        He et al. 2016, Deep Residual Learning for Image Recognition, section 4.2.
    """

    padding: int = 4

    def __post_init__(self) -> None:
        if not is_whole(self.padding, 1):
            raise ConfigError(
                f"RandomCrop: padding={brief(self.padding)}; expected a whole number of 1 or above"
            )
        _dm_pix()

    def __call__(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        return _changed(_crop, self, image, draw)


def _crop(pix: Any, transform: RandomCrop, key: Key, image: Array) -> Array:
    width = (transform.padding, transform.padding)
    wide = jnp.pad(image, (width, width, (0, 0)), mode="edge")
    return pix.random_crop(key, wide, image.shape)


@dataclass(frozen=True)
class RandomFlip:
    """Left and right are exchanged in half of the images.

    Raises:
        ConfigError: dm-pix is not there; when called, no float32 image.

    Example:
        >>> image = np.arange(2, dtype=np.float32).reshape(1, 2, 1)
        >>> [RandomFlip()(image, np.random.default_rng(i)).ravel().tolist() for i in (2, 3)]
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __post_init__(self) -> None:
        _dm_pix()

    def __call__(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        return _changed(_flip, self, image, draw)


def _flip(pix: Any, transform: RandomFlip, key: Key, image: Array) -> Array:
    return pix.random_flip_left_right(key, image)


@dataclass(frozen=True)
class RandomRotation:
    """The image is turned about its centre; corners take the nearest pixels.

    Args:
        degrees: the largest angle, either way.

    Raises:
        ConfigError: an angle out of range, dm-pix is not there; when called, no float32 image.

    Example:
        >>> image = np.ones((3, 3, 1), np.float32)
        >>> bool((RandomRotation(30)(image, np.random.default_rng(0)) == 1).all())
        True
    """

    degrees: float = 15.0

    def __post_init__(self) -> None:
        _check(self, "degrees", 180.0)

    def __call__(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        return _changed(_turn, self, image, draw)


def _turn(pix: Any, transform: RandomRotation, key: Key, image: Array) -> Array:
    most = math.radians(transform.degrees)
    return pix.rotate(image, jax.random.uniform(key, minval=-most, maxval=most))


@dataclass(frozen=True)
class ColourJitter:
    r"""Brightness and contrast: $f (x - \bar x) + \bar x + b$ with the mean $\bar x$ of a channel.

    Args:
        brightness: $b$ is drawn between this and its negative; in units of the pixels, which
            `load_images` gives the standard deviation 1.
        contrast: $f$ is drawn between 1 less and 1 more than this, below 1.

    Raises:
        ConfigError: a setting out of range, dm-pix is not there; when called, no float32 image.

    Example:
        >>> image = np.arange(2, dtype=np.float32).reshape(1, 2, 1)
        >>> ColourJitter(contrast=0.0)(image, np.random.default_rng(3)).ravel().tolist()
        [-0.158..., 0.841...]
    """

    brightness: float = 0.2
    contrast: float = 0.2

    def __post_init__(self) -> None:
        _check(self, "brightness", math.inf)
        if self.brightness == math.inf:
            raise ConfigError("ColourJitter: brightness=inf; give a finite number")
        _check(self, "contrast", 1 - 2**-20)

    def __call__(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        return _changed(_colour, self, image, draw)


def _colour(pix: Any, transform: ColourJitter, key: Key, image: Array) -> Array:
    first, second = jax.random.split(key)
    if transform.contrast:
        low, high = 1 - transform.contrast, 1 + transform.contrast
        image = pix.random_contrast(first, image, low, high)
    if transform.brightness:
        image = pix.random_brightness(second, image, transform.brightness)
    return image
