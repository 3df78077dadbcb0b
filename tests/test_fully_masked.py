"""A query row that may attend to nothing: exactly zero out, scores and gradients; lse is -inf."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Call, Causal, Dense, Dropout, Tokens, ValidKeys, ValidQueries, Window
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.reference import Reference
from tests import oracles
from tests.backends import backends, tiles
from tests.drawn import draw, draw_variables

B, T, S, N, K, H, V, D = 2, 5, 7, 4, 2, 3, 2, 6
BACKENDS = backends(small_tiles=tiles(2, 4))
DENSE = np.random.default_rng(1).random((B, N, T, S)) < 0.5
DENSE[0, 1, 2] = DENSE[1, 3, 4] = False
K_VALID = np.ones((B, S), bool)
K_VALID[1] = False
Q_VALID = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]], bool)

MASKS = {
    "nothing": Window(-1, 0) & Window(0, -1),
    "first_rows": Causal() & ~Window(1, 1),
    "dense": Dense(DENSE),
    "padding": ValidKeys() & Causal(),
    "padded_queries": ValidQueries(),
}
DROPOUT = Dropout(jax.random.key(3), 0.3)


def call_of(mask, **options):
    return Call(
        draw(1, B, T, N, H),
        draw(2, B, S, K, H),
        draw(3, B, S, K, V),
        Tokens(T, valid=Q_VALID),
        Tokens(S, valid=K_VALID),
        mask,
        draw(4, B, N, T, S),
        **options,
    )


def empty_rows(mask):
    """Return which rows [B, N, T] see nothing."""
    seen = mask.matrix(Tokens(T, valid=Q_VALID), Tokens(S, valid=K_VALID))
    return ~np.broadcast_to(seen, (B, N, T, S)).any(-1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_comes_out_and_nothing_flows_back(name, mask):
    call = call_of(MASKS[mask], dropout=DROPOUT, logit_cap=5.0)
    empty = empty_rows(call.mask)
    assert empty.any()
    # Cotangents on the empty rows only: nothing at all may flow back.
    d_out = jnp.where(empty.swapaxes(1, 2)[..., None], draw(5, B, T, N, V), 0)
    d_lse = jnp.zeros((B, N, T))

    @jax.jit
    def run(arrays, d_out):
        def forward(arrays):
            return mj.attend(dataclasses.replace(call, **arrays), BACKENDS[name])

        output, vjp = jax.vjp(forward, arrays)
        return output, vjp(mj.Output(d_out, d_lse))[0]

    arrays = {"q": call.q, "k": call.k, "v": call.v, "bias": call.bias}
    with jax.debug_nans(True):
        output, gradients = run(arrays, d_out)
        _, of_all = run(arrays, jnp.ones_like(d_out))
    out, lse = (np.asarray(x) for x in output)
    np.testing.assert_array_equal(out.swapaxes(1, 2)[empty], 0)
    np.testing.assert_array_equal(lse[empty], -np.inf)
    assert np.isfinite(lse[~empty]).all()
    for key, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, 0, err_msg=key)
    # With cotangents everywhere, the empty rows' own inputs still get exactly nothing.
    np.testing.assert_array_equal(np.asarray(of_all["q"]).swapaxes(1, 2)[empty], 0)
    np.testing.assert_array_equal(np.asarray(of_all["bias"])[empty], 0)
    if not empty.all():
        assert np.abs(of_all["q"]).max() > 0


@pytest.mark.parametrize("mask", MASKS)
def test_scores_of_empty_rows_are_zero(mask):
    call = call_of(MASKS[mask])
    empty = empty_rows(call.mask)
    with jax.debug_nans(True):
        scores = np.asarray(mj.attention_scores(call))
    np.testing.assert_array_equal(scores[empty], 0)
    np.testing.assert_allclose(scores[~empty].sum(-1), 1, rtol=1e-5)


def test_reference_and_oracle_agree_about_the_other_rows():
    call = call_of(MASKS["dense"])
    want, lse, _ = oracles.attention(call.q, call.k, call.v, visible=DENSE, bias=call.bias)
    output = mj.attend(call, Reference())
    oracles.assert_close(output.out, want, 1e-6, "out")
    oracles.assert_close(output.lse, lse, 1e-6, "lse")


@pytest.mark.parametrize("name", ["reference", "blockwise"])
@pytest.mark.parametrize("scores", [False, True], ids=["out", "scores"])
def test_the_layer_gives_its_bias_and_no_gradient(name, scores):
    layer = mj.MultiHeadAttention(
        num_heads=N, key_dim=H, backend=name, bias_initializer="ones", use_gate=True
    )
    x, y = draw(6, B, T, D), draw(7, B, S, D)
    variables = draw_variables(layer, x, y)
    empty = np.broadcast_to(~K_VALID.any(-1)[:, None], (B, T)) | ~Q_VALID

    @jax.jit
    def run(params, x, y):
        def total(params, x, y):
            out = layer.apply(
                {"params": params},
                x,
                y,
                query_mask=Q_VALID,
                value_mask=K_VALID,
                return_attention_scores=scores,
            )
            out = out[0] if scores else out
            return jnp.where(empty[..., None], jnp.sin(out), 0).sum(), out

        return jax.grad(total, (0, 1, 2), has_aux=True)(params, x, y)

    with jax.debug_nans(True):
        (of_params, *of_inputs), out = run(variables["params"], x, y)
    bias = variables["params"]["attention_output"]["bias"]
    np.testing.assert_array_equal(np.asarray(out)[empty], np.broadcast_to(bias, out.shape)[empty])
    flowing = of_params["attention_output"].pop("bias")
    assert np.abs(flowing).max() > 0
    for gradient in jax.tree.leaves((of_params, of_inputs)):
        np.testing.assert_array_equal(gradient, 0)


LEAST = np.finfo(np.float32).min
EVERY = BACKENDS | {
    "apart": Blockwise(block_q=4, block_k=4, apart=True),
    "pallas_tpu": PallasTPU(interpret=True),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_smallest_logit_is_more_than_a_hidden_one(name):
    """An additive mask may end at the smallest number; what a rule or -inf hides has less."""
    bias = np.full((1, 1, T, S), LEAST, np.float32)
    bias[..., 0, 2] = bias[..., 1, :] = -np.inf
    bias[..., 2, 5] = 0.0  # hidden by the rule
    visible = np.broadcast_to(np.arange(S) < 4, (T, S))
    call = dataclasses.replace(call_of(Dense(visible)), q=draw(1, B, T, N, H) * 0.1, bias=bias)
    v = np.array(call.v)
    v[:, 4:] = 1e18
    call = dataclasses.replace(call, v=v, q_tokens=None, k_tokens=None)

    def run(bias):
        return mj.attend(dataclasses.replace(call, bias=bias), EVERY[name])

    (out, lse), vjp = jax.vjp(run, jnp.asarray(bias))
    shown = visible & (bias[0, 0] > -np.inf)
    p = shown / np.maximum(shown.sum(-1, keepdims=True), 1)
    values = np.repeat(v, N // K, axis=2)
    np.testing.assert_allclose(out, np.einsum("ts,bsnv->btnv", p, values), atol=1e-5)
    expected = np.where(shown.any(-1), LEAST, -np.inf)
    np.testing.assert_array_equal(lse, np.broadcast_to(expected, lse.shape))
    (d_bias,) = vjp(mj.Output(jnp.ones_like(out), jnp.zeros_like(lse)))
    total = values.sum((0, 2, 3))
    np.testing.assert_allclose(d_bias[0, 0], p * (total - (p @ total)[:, None]), atol=1e-4)
