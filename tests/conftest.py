"""What every test runs under: 8 host CPU devices, strict promotion, no rank promotion, no window.

The settings go into the environment first, so that a test's subprocesses have them too, and then
into `jax.config`, because a pytest plugin may have imported JAX before this file was read.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
atexit.register(shutil.rmtree, os.environ["MPJAX_CACHE"], ignore_errors=True)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotated shapes and dtypes are checked at every call of the parts that take arrays. Settings are
# left out: a wrong one must reach the code that refuses it with a ConfigError.
CHECKED = [
    "mpjax.formats",
    "mpjax.models",
    "mpjax.ops.attention",
    "mpjax.ops.cross_entropy",
    "mpjax.ops.norm",
    "mpjax.ops.rotary",
    "mpjax.optim",
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# JAX makes millions of objects that stay; a young collection every 700 costs 6 % of the time.
gc.set_threshold(100_000, 20, 50)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a run train it once: `--dist loadgroup` gives them to one worker."""
    for item in items:
        for shared in {"trained", "run"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(shared))


@pytest.fixture(scope="module")
def fast_compile() -> Iterator[None]:
    """Compiles a module's programs sooner, for tests that are not about XLA's rewrites."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
