"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax

# What an example may use without importing it.
NAMES = {"jax": jax, "jnp": jnp, "np": np, "mj": mha_jax}
# Programs, whose modules need the packages of the `train` extra.
PROGRAMS = ("mha_jax.train",)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(mha_jax.__path__, "mha_jax.")
    if not module.name.startswith(PROGRAMS)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
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
