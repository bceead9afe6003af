"""Strict settings for every test, and the two places data comes from."""

import os
from collections.abc import Iterator
from pathlib import Path

from jaxlib import version

# Compiling takes most of the time of tests. Processes that they start inherit both; with 0 code is optimised as usual.
flags = os.environ.get("XLA_FLAGS", "").split()
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and version.__version_info__ < (0, 11):
    # The older way to generate code compiles in half the time. XLA ends a process that sets a flag it does not have.
    flags = flags or ["--xla_cpu_use_fusion_emitters=false"]
if not any("device_count" in flag for flag in flags):
    # Programs for several cores take longer to compile; tests of several devices ask for them.
    flags.append("--xla_force_host_platform_device_count=1")
os.environ["XLA_FLAGS"] = " ".join(flags)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared() -> Path:
    """Folder with reference outputs and real data, beside the project."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("reference outputs and real data (../shared) are not here")
    return folder


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """For tests that compute more than they compile."""
    usual = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", usual)
