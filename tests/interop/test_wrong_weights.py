"""Weights that are none, or mean more than their numbers, at the doors of the importers and exporters."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax.errors import MhaError
from mha_jax.interop import flax, torch

RNG = np.random.default_rng(0)
SHAPES = {"in_proj_weight": (24, 8), "in_proj_bias": (24,), "out_proj.weight": (8, 8)}
SHAPES |= {"out_proj.bias": (8,)}
STATE = {name: RNG.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
X = jnp.ones((1, 3, 8))


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize(
    "dtype", [np.int8, bool, np.complex64, ml_dtypes.float8_e4m3fn, str, object]
)
def test_a_state_of_torch_that_holds_no_plain_weights(name, dtype):
    with pytest.raises(mj.WeightsError, match="has dtype"):
        torch.import_state(STATE | {name: STATE[name].astype(dtype)}, 2)


@pytest.mark.parametrize("name", STATE)
def test_any_order_of_bytes_and_of_axes_in_memory_is_read(name):
    module, variables = torch.import_state(STATE, 2)
    want = module.apply(variables, X, X)
    x = STATE[name]
    for same in (x.astype(x.dtype.newbyteorder()), np.asfortranarray(x), x[::-1].copy()[::-1]):
        module, variables = torch.import_state(STATE | {name: same}, 2)
        np.testing.assert_array_equal(module.apply(variables, X, X), want)


@pytest.mark.parametrize("name", [5, None, b"x"], ids=repr)
def test_names_of_a_state_are_texts(name):
    with pytest.raises(mj.ShapeError, match="a name in the state must be a text"):
        torch.import_state(STATE | {name: np.ones(3)}, 2)


@pytest.mark.parametrize("export", [torch.export_state, flax.export_linen])
@pytest.mark.parametrize("part", ["kernel", "bias"])
@pytest.mark.parametrize("projection", ["query", "attention_output"])
def test_variables_that_hold_no_weights_are_not_exported(export, projection, part):
    module = mj.MultiHeadAttention(num_heads=2, key_dim=4)
    variables = module.init(jax.random.key(0), X, X)
    x = np.asarray(variables["params"][projection][part])
    dtypes = (np.int32, bool, str, object, "M8[s]")
    wrong = [
        None,
        x.tolist(),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        *(np.zeros(x.shape, dtype) for dtype in dtypes),
    ]
    for weight in wrong:
        changed = copy.deepcopy(variables)
        changed["params"][projection][part] = weight
        with pytest.raises(MhaError, match="expected floating-point numbers"):
            export(module, changed)


def _linen():
    layer = nn.MultiHeadDotProductAttention(2)
    return flax.import_linen(layer, jax.eval_shape(layer.init, jax.random.key(0), X))


def _nnx():
    def make():
        return nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))

    return flax.import_nnx(nnx.eval_shape(make))


@pytest.mark.parametrize("load", [_linen, _nnx])
def test_shapes_without_numbers_are_not_imported(load):
    with pytest.raises(mj.WeightsError, match="is a ShapeDtypeStruct, expected floating-point"):
        load()
