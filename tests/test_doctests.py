"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
import mha_jax

# What an example may use without importing it.
NAMES = {"jax": jax, "jnp": jnp, "np": np, "mj": mha_jax}
# Modules that need packages which few have: those of the `train` extra, rivals of the bench.
TRAIN, RIVALS = "mha_jax.train.", "benchmarks.peers."
MODULES = [
    module.name
    for package in (mha_jax, benchmarks)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.startswith(RIVALS)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if name.startswith(TRAIN):
        for package in ("absl", "grain", "ml_collections", "orbax.checkpoint"):
            pytest.importorskip(package, reason='pip install -e ".[train]"')
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs=NAMES)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples of {name} failed"


def test_every_public_function_has_an_example():
    without = [
        name
        for name in mha_jax.__all__
        if callable(getattr(mha_jax, name))
        and not isinstance(getattr(mha_jax, name), type)
        and ">>>" not in (getattr(mha_jax, name).__doc__ or "")
    ]
    assert not without
