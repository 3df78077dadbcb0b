"""Traps of JAX turned into errors, and annotations checked as they run."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")
# Eight devices; and small programs are compiled sooner in one piece than in parallel ones.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1",
)
# libtpu, where it is installed, must not look for a machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

from tests.typed import install

install()

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.drawn import double_precision  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where versions are tested and not speed, the environment says so for all. Collecting is done quickly, too.
ALL_QUICKLY = jax.config.read("jax_disable_most_optimizations")
jax.config.update("jax_disable_most_optimizations", True)


# Compiled as a user's programs are; all others without what makes programs fast: they compare kinds of
# programs, not how well LLVM writes the loops of small ones.
OPTIMIZED = (
    "tests/test_attention.py",
    "tests/test_attention_fn.py",
    "tests/test_functional.py",
    "tests/test_initializers.py",
    "tests/test_layer.py",
    "tests/test_memory.py",
    "tests/test_precision.py",
    "tests/test_softmax.py",
)
# Begun early: what takes minutes must not be what one worker is left with at the end.
LONG = (
    "tests/train/test_resume.py",
    "tests/train/test_meshes.py",
    "tests/test_notebooks.py",
    "tests/test_keras_parity.py",
)


def pytest_addoption(parser):
    words = "random calls of attention, and a quarter as many of the layer"
    parser.addoption("--fuzz", type=int, default=240, help=words)


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: (not item.nodeid.startswith(OPTIMIZED), not item.nodeid.startswith(LONG))
    )


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
    """Compile most files' programs without what makes them fast, and none of both kinds: bits may differ."""
    quickly = ALL_QUICKLY or not item.nodeid.startswith(OPTIMIZED)
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture
def x64():
    """Run a test with 64-bit types."""
    with double_precision():
        yield
