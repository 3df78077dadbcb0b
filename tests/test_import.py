"""What `import mha_jax` brings with it, in a fresh process."""

import json
import subprocess
import sys

import pytest

OPTIONAL = ("keras", "torch", "matplotlib", "tensorflow", "tokamax", "haiku", "equinox", "h5py")


def modules_after(code):
    """Run code in a new interpreter; return the names of the modules it then has."""
    code = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def imported():
    return modules_after("import mha_jax")


def test_no_optional_package_is_imported(imported):
    found = {name for name in imported if name.split(".")[0] in OPTIONAL}
    assert not found


def test_no_backend_is_imported_before_it_is_chosen(imported):
    backends = {name for name in imported if name.startswith("mha_jax.backends.")}
    # Shards of a sequence are what the engine makes of a backend, no choice of its own.
    shards = {"mha_jax.backends.sequence", "mha_jax.backends.visits"}
    assert backends <= {"mha_jax.backends.base", *shards}


def test_nothing_above_the_core_is_imported(imported):
    above = ("models", "train", "interop", "visualize")
    assert not {name for name in imported if name.startswith(tuple(f"mha_jax.{x}" for x in above))}


def test_what_a_layer_is_made_with_waits_for_the_first_layer(imported):
    rooms = {f"mha_jax.layer.{x}" for x in ("initializers", "regularizers", "constraints")}
    assert not rooms & imported
    made = modules_after("import mha_jax; mha_jax.MultiHeadAttention(num_heads=1, key_dim=1)")
    assert rooms <= made


def test_the_import_starts_no_backend_of_jax():
    code = "import mha_jax; from jax._src import xla_bridge; assert not xla_bridge._backends"
    modules_after(code)


def test_naming_one_backend_imports_no_kernel_of_another():
    code = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
import mha_jax, jax.numpy as jnp
x = jnp.ones((1, 2, 1, 2))
mha_jax.dot_product_attention(x, x, x, backend="reference")
"""
    found = {name for name in modules_after(code) if name.startswith("mha_jax.backends.pallas")}
    assert not found


def test_no_experimental_module_that_jax_may_drop_is_needed():
    code = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
sys.modules["jax.experimental.jet"] = None
import mha_jax, jax, jax.numpy as jnp
x = jnp.ones((1, 2, 1, 2))
assert jax.grad(lambda x: mha_jax.dot_product_attention(x, x, x).sum())(x).shape == x.shape
"""
    assert "mha_jax.engine.derivative" in modules_after(code)
