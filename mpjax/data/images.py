"""Images with classes: scikit-learn's digits, a file of arrays, or a source of the caller's."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpjax.data.buckets import batches_of, check_sizes, record_generator
from mpjax.errors import ConfigError, need
from mpjax.typing import Sources

Batch = dict[str, np.ndarray]
Labelled = tuple[np.ndarray, np.ndarray]  # images (N, H, W[, C]) and labels (N,)
Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Images:
    """Training and held-out images; pixels are standardised by those of the training images.

    Args:
        train: images and their classes, `{"inputs": (N, H, W, C) float32, "targets": (N,) int32}`.
        held_out: the same for those that judge.
        classes: K; classes are 0 .. K - 1.
    """

    train: Batch
    held_out: Batch
    classes: int


def load_images(
    source: str,
    *,
    held_out: float = 0.2,
    sources: Sources[tuple[Labelled, Labelled]] | None = None,
) -> Images:
    """Reads images and holds some out: the source's own test set if any, else a random share.

    The share is drawn once, by a fixed seed, so that all runs are judged on the same images.

    Args:
        source: `digits` (1,797 of 8 x 8, from scikit-learn), one of `sources`, or FILE.npz with the
            arrays `images` and `labels`.
        held_out: share that judges, above 0 and below 1.
        sources: name -> a function that returns (images, labels) of training and of the test set.

    Raises:
        ConfigError: a source that is unknown, cannot be had or cannot be read, arrays of the wrong
            shape or type, or a share out of range.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.npz")
        ...     np.savez(path, images=np.eye(8).reshape(4, 4, 4), labels=[0, 1, 0, 1])
        ...     images = load_images(str(path), held_out=0.5)
        >>> images.train["inputs"].shape, images.classes
        ((2, 4, 4, 1), 2)
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out: {held_out} must be above 0 and below 1; give such as 0.2")
    sources = sources or {}
    if source in sources:
        train, test = sources[source]()
    else:
        images, labels = _digits() if source == "digits" else _arrays(source, sources)
        order = np.random.default_rng(0).permutation(len(labels))
        out = round(held_out * len(labels))
        if not 0 < out < len(labels):
            raise ConfigError(
                f"held_out: {held_out} of {len(labels)} images leaves one side empty; change it"
            )
        test, train = ((images[part], labels[part]) for part in (order[:out], order[out:]))
    mean, deviation = np.float64(train[0].mean()), np.float64(train[0].std())
    if not deviation > 0:
        raise ConfigError(f"data: all pixels of {source} are equal; give other images")

    def batch(images: np.ndarray, labels: np.ndarray) -> Batch:
        pixels = ((images - mean) / deviation).astype(np.float32)
        pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        return {"inputs": pixels, "targets": labels.astype(np.int32)}

    classes = 1 + max(int(labels.max()) for _, labels in (train, test))
    return Images(batch(*train), batch(*test), classes)


class _ImageEpochs:
    """A grain source whose elements are whole batches of images, one epoch after the other."""

    def __init__(self, data: Batch, batch: int, seed: int, transforms: Sequence[Transform]):
        self._data, self._batch, self._seed, self._transforms = data, batch, seed, transforms
        self._images = len(data["targets"])
        self._count = self._images // batch
        self._ordered: tuple[int, np.ndarray] = (-1, np.zeros(0, int))

    def __len__(self) -> int:
        return sys.maxsize // self._batch  # endless

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, self._count)
        if self._ordered[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._images)
            self._ordered = (epoch, order)
        rows = self._ordered[1][place * self._batch : (place + 1) * self._batch]
        batch = {name: array[rows] for name, array in self._data.items()}
        if self._transforms:
            batch["inputs"] = np.stack([self._anew(epoch, int(row)) for row in rows])
        return batch

    def _anew(self, epoch: int, row: int) -> np.ndarray:
        image, draw = self._data["inputs"][row], record_generator(self._seed, epoch, row)
        for transform in self._transforms:
            image = transform(image, draw)
        return image


def image_batches(
    data: Batch, *, batch: int, seed: int, transforms: Sequence[Transform] = (), workers: int = 0
) -> Iterator[Batch]:
    """Endless batches of training images; every epoch has an order of its own, fixed by the seed.

    The rest of an epoch that fills no batch is left out of it.

    Args:
        data: `Images.train`.
        batch: images a batch.
        seed: 0 or above.
        transforms: of each image, one after the other: (H, W, C), random generator -> (H, W, C), as
            those of `mpjax.data.augment`; the generator is one of seed, epoch and image alone.
        workers: processes that make batches ahead, as of `bucket_batches`.

    Returns:
        An iterator of batches, with ``get_state()`` and ``set_state()``.

    Raises:
        ConfigError: a batch larger than the data, workers below 0.

    Example:
        >>> data = {"inputs": np.zeros((5, 2, 2, 1), np.float32), "targets": np.arange(5)}
        >>> next(image_batches(data, batch=4, seed=0))["inputs"].shape
        (4, 2, 2, 1)
    """
    count = len(data["targets"])
    check_sizes(batch, seed)
    if batch > count:
        raise ConfigError(f"batch: {batch} is not in 1 .. {count}, the number of images; change it")
    return batches_of(_ImageEpochs(data, batch, seed, tuple(transforms)), workers)


def _digits() -> Labelled:
    sets = need("sklearn.datasets", "tasks", "data: digits", ", or give --data FILE.npz")
    digits = sets.load_digits()
    return digits.images, digits.target


def _arrays(source: str, known: Iterable[str]) -> Labelled:
    """The arrays of a file, checked."""
    names = ", ".join(["digits", *known])
    remedy = f"give {names}, or FILE.npz with the arrays images (N, H, W[, C]) and labels (N,)"
    if not source.endswith(".npz"):
        raise ConfigError(f"data: {source!r} is unknown; {remedy}")
    try:
        # np.load leaves a file open if it cannot read it
        with open(source, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except KeyError as error:
        raise ConfigError(f"data: {source}: {error.args[0]}; {remedy}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"data: {source} cannot be read ({reason}); {remedy}") from None
    what = ""
    real = np.issubdtype(images.dtype, np.integer) or np.issubdtype(images.dtype, np.floating)
    if images.ndim not in (3, 4) or not real or not images.size:
        what = f"images are {images.dtype.name} of shape {images.shape}, not (N, H, W[, C])"
    elif labels.shape != images.shape[:1]:
        what = f"labels have shape {labels.shape}, images {images.shape}"
    elif not np.issubdtype(labels.dtype, np.integer) or labels.size == 0 or labels.min() < 0:
        what = f"labels are {labels.dtype.name}, not whole numbers from 0"
    elif not np.isfinite(images).all():
        what = "images hold numbers that are not finite"
    elif len(np.unique(labels)) != labels.max() + 1 or labels.max() < 1:
        what = f"labels are {len(np.unique(labels))} kinds up to {labels.max()}, not 0 .. K - 1"
    if what:
        raise ConfigError(f"data: {source}: {what}; {remedy}")
    return images, labels
