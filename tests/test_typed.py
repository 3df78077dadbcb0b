"""The tests check the annotations of the package: what it accepts and returns is what they say."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError, jaxtyped

import mha_jax as mj
from mha_jax.errors import ShapeError
from mha_jax.types import Float
from tests.typed import checked


@jaxtyped(typechecker=checked)
def first(x: Float[jnp.ndarray, "B T"], *, row: int = 0) -> Float[jnp.ndarray, "T"]:
    if row < 0:
        raise ShapeError("no such row")
    return x[row] if row < 10 else x


def test_what_a_function_accepts_or_returns_against_its_annotations_is_found():
    assert first(jnp.ones((2, 3))).shape == (3,)
    with pytest.raises(TypeCheckError, match="first"):
        first(jnp.ones((2, 3), int))
    with pytest.raises(TypeCheckError, match="first"):
        first(jnp.ones((2, 3)), row=10)


def test_what_it_refuses_is_said_in_its_own_words():
    with pytest.raises(ShapeError, match="no such row"):
        first(jnp.ones((2, 3)), row=-1)


def test_every_module_of_the_package_is_checked():
    for function in (mj.dot_product_attention, mj.Tokens.map, mj.nnx.MultiHeadAttention.constrain):
        assert function.__wrapped__.__module__.startswith("mha_jax.")
