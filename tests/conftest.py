"""Strict settings for every test, and the two places data comes from."""

import os
from collections.abc import Iterator
from pathlib import Path

from jaxlib import version

# Compiling takes most of the time of tests. Processes that they start inherit both; with 0 code is optimised as usual.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and version.__version_info__ < (0, 11):
    # The older way to generate code compiles in half the time. XLA ends a process that sets a flag it does not have.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

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
