"""Traps of JAX turned into errors, and shapes checked at run time where no test passes wrong
ones."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# libtpu, where it is installed, must not look for a machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

from tests.typed import install

install(everything=bool(os.environ.get("MHA_JAX_TYPED")))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Begun first: what takes minutes must not be what one worker is left with at the end.
LONG = (
    "tests/train/test_resume.py",
    "tests/train/test_meshes.py",
    "tests/test_notebooks.py",
    "tests/test_keras_parity.py",
)
# What they compare is kinds of programs, not how well LLVM writes the loops of small ones.
QUICKLY = (
    "tests/models/test_bert.py",
    "tests/models/test_transformer.py",
    "tests/train/test_meshes.py",
    "tests/test_backends.py",
    "tests/test_biases.py",
    "tests/test_cache.py",
    "tests/test_cache_kinds.py",
    "tests/test_constant_bias.py",
    "tests/test_derivatives.py",
    "tests/test_fuzz",
    "tests/test_gpu_tiles.py",
    "tests/test_groups.py",
    "tests/test_guide.py",
    "tests/test_linear_map.py",
    "tests/test_modern_layer.py",
    "tests/test_mosaic_gpu",
    "tests/test_nnx.py",
    "tests/test_norms_and_hooks.py",
    "tests/test_one_answer.py",
    "tests/test_programs.py",
    "tests/test_sequence.py",
    "tests/test_sharding.py",
)
# Where versions are tested and not speed, the environment says so for all.
ALL_QUICKLY = jax.config.read("jax_disable_most_optimizations")


def pytest_addoption(parser):
    words = "random calls of attention, and a quarter as many of the layer"
    parser.addoption("--fuzz", type=int, default=240, help=words)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (not item.nodeid.startswith(LONG), item.nodeid.startswith(QUICKLY)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let the worker that is done take tests from the other: they differ a thousandfold in time."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_finish():
    """Scan for garbage seldom: what the imports made stays, and traces make much that dies young."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compile some files' programs without what makes them fast, and none of both kinds: bits may differ."""
    quickly = ALL_QUICKLY or item.nodeid.startswith(QUICKLY)
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture
def x64():
    """Run a test with 64-bit types."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
