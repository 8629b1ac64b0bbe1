"""What every test runs under: 8 host CPU devices, strict promotion, no rank promotion, no window.

The settings go into the environment first, so that a test's subprocesses have them too, and then
into `jax.config`, because a pytest plugin may have imported JAX before this file was read.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import signal
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

DEVICES = "--xla_force_host_platform_device_count"
ROOT = Path(__file__).resolve().parent.parent

if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax-tests"))
os.environ.update(
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    MPLBACKEND="agg",
    # One folder a process: the user's cached tokenizers and assets must not decide a test.
    MPJAX_CACHE=tempfile.mkdtemp(prefix="mpjax-tests-"),
)
if hasattr(signal, "SIGHUP"):  # nohup ignores it, and what a test starts would do so too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
atexit.register(shutil.rmtree, os.environ["MPJAX_CACHE"], ignore_errors=True)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

from tests.compiling import plain_code  # noqa: E402

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotated shapes and dtypes are checked at every call, in the modules that have some; elsewhere
# the checks would cost a quarter of the time and say what mypy says. Parts that take settings are
# left out: a wrong one must reach the code that refuses it with a ConfigError.
PARTS = [
    "formats",
    "models",
    "ops/attention",
    "ops/cross_entropy",
    "ops/norm",
    "ops/rotary",
    "ops/splash",
    "optim",
]
CHECKED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for part in PARTS
    for path in sorted((ROOT / "mpjax").glob(f"{part}/**/*.py")) or [ROOT / f"mpjax/{part}.py"]
    if "jaxtyping" in path.read_text(encoding="utf-8")
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# JAX makes millions of objects that stay; a young collection every 700 costs 6 % of the time.
gc.set_threshold(100_000, 20, 50)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# What takes longest begins first, so that no worker is left with it at the end.
SLOW = [
    "train/processes/test_peers.py",  # waits more than it computes
    "interpret/monitor/test_monitor.py",
    "ops/test_dot_general.py",
    "optim/per_layer/test_layer_view.py",
    "formats/test_rounding.py",
    "train/test_sharding.py",
    "optim/moments/test_use.py",
    "ops/test_recipe_accuracy.py",
    "formats/test_quantize.py",
    "optim/test_fp8_weights.py",
    "models/inference/test_gptq.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files; tests that share a run are for one worker, which trains it once."""
    ranks = {ROOT / "tests" / name: -len(SLOW) + i for i, name in enumerate(SLOW)}
    assert all(path.exists() for path in ranks), "SLOW names a file that is no more"
    items.sort(key=lambda item: ranks.get(item.path, 0))
    for item in items:
        for shared in {"trained", "run"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(shared))


MOST = 2 << 30  # bytes; with what one module adds a worker stays below 5 GB


def _resident() -> int:
    """Bytes that this process holds; where the system does not say, too many."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return MOST


def _compiling(item: pytest.Item) -> str:
    """How the programs of a test are compiled."""
    if ROOT / "mpjax" in item.path.parents:
        return "fast_compile"
    names = getattr(item, "fixturenames", ())
    return next((name for name in ("fast_compile", "unoptimized") if name in names), "")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between modules, programs go that are compiled otherwise than the next ones, or too many."""
    if nextitem is None or nextitem.path != item.path:
        if nextitem and _compiling(item) == _compiling(nextitem) and _resident() < MOST:
            return
        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def _unoptimized() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    plain, usual = plain_code(), compiler.get_compile_options

    def get_compile_options(*args: Any, **options: Any) -> Any:
        own = options.get("env_options_overrides") or {}
        return usual(*args, **options | {"env_options_overrides": plain | own})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        yield


@pytest.fixture(scope="module")
def unoptimized() -> Iterator[None]:
    """LLVM optimizes nothing: programs compile sooner. What XLA does to them before stays."""
    with _unoptimized():
        yield


@pytest.fixture(scope="module")
def fast_compile() -> Iterator[None]:
    """A module's programs compile in a third of the time, for tests not about XLA's rewrites.

    LLVM optimizes nothing and, where this jaxlib can, XLA writes simpler code for it.
    """
    with _unoptimized(), _plain():
        yield


def pytest_configure(config: pytest.Config) -> None:
    """What docstrings' examples, outside this folder, share with the tests.

    Recipes and presets that a test registers go with it, and those examples compile fast too.
    """

    @pytest.fixture(autouse=True)
    def names_go() -> Iterator[None]:
        from mpjax.precision import presets, recipe

        with mock.patch.dict(recipe._RECIPES), mock.patch.dict(presets._PRESETS):
            yield

    @pytest.fixture(scope="module", autouse=True)
    def examples_compile_fast(request: pytest.FixtureRequest) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if ROOT / "mpjax" in request.node.path.parents:
                stack.enter_context(_unoptimized())
                stack.enter_context(_plain())
            yield

    plugin = types.ModuleType("examples")
    plugin.names_go = names_go  # type: ignore[attr-defined]
    plugin.examples_compile_fast = examples_compile_fast  # type: ignore[attr-defined]
    config.pluginmanager.register(plugin)
