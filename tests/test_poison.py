"""What a mask hides cannot be felt: NaN and Inf in masked keys and values, and any change of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import (
    Call,
    Causal,
    Dense,
    Dropout,
    SameSegment,
    Tokens,
    ValidKeys,
    ValidQueries,
    Window,
)
from tests.backends import backends, tiles
from tests.drawn import draw, draw_variables

B, T, S, N, K, H, V, D = 2, 5, 7, 4, 2, 3, 2, 6
BACKENDS = backends(small_tiles=tiles(2, 4))
K_VALID = np.array([[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0]], bool)
Q_VALID = np.array([[1, 1, 1, 0, 1], [1, 1, 1, 0, 0]], bool)
Q_SEGMENT = np.array([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]], np.int32)
K_SEGMENT = np.array([[0, 0, 1, 1, 1, 2, -1], [0, 0, 0, 1, 2, 2, -1]], np.int32)
POISONS = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf, "huge": 3e38, "zero": 0.0}


def same_bits(got, want):
    """Raise unless two trees hold the same bits; NaN equals NaN, 0 differs from -0."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
        a, b = np.asarray(a), np.asarray(b)
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=name)


def poisoned(x, valid, value):
    """Put a value, in one feature and in all, where tokens are not valid."""
    hidden = ~valid.reshape(*valid.shape, *(1,) * (x.ndim - 2))
    return jnp.where(hidden, jnp.float32(value), x)


# ---- NaN and Inf behind a key mask ------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mask", [ValidKeys(), Causal() & ValidKeys() & ValidQueries()], ids=str)
def test_nothing_in_masked_tokens_reaches_an_output_or_a_gradient(name, mask):
    call = Call(
        draw(1, B, T, N, H),
        draw(2, B, S, K, H),
        draw(3, B, S, K, V),
        Tokens(T, valid=Q_VALID),
        Tokens(S, valid=K_VALID),
        mask,
        draw(4, 1, N, T, S),
        Dropout(jax.random.key(1), 0.2),
    )
    d_out, d_lse = draw(5, B, T, N, V), draw(6, B, N, T)

    @jax.jit
    def run(q, k, v, bias):
        def forward(q, k, v, bias):
            moved = dataclasses.replace(call, q=q, k=k, v=v, bias=bias)
            return mj.attend(moved, BACKENDS[name])

        output, vjp = jax.vjp(forward, q, k, v, bias)
        seen = jnp.where(jnp.isinf(output.lse), 0, d_lse)
        return output, vjp(mj.Output(d_out, seen))

    clean = run(call.q, call.k, call.v, call.bias)
    for value in POISONS.values():
        k, v = poisoned(call.k, K_VALID, value), poisoned(call.v, K_VALID, -value)
        q = poisoned(call.q, Q_VALID, value) if mask.hides_invalid_queries else call.q
        got = run(q, k, v, call.bias)
        same_bits(got, clean)
        _, (_, dk, dv, _) = got
        np.testing.assert_array_equal(np.asarray(dk)[~K_VALID], 0)
        np.testing.assert_array_equal(np.asarray(dv)[~K_VALID], 0)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("name", ["value_mask", "key_mask", "all_masks"])
def test_the_layer_and_its_weights_feel_nothing(backend, name):
    layer = mj.MultiHeadAttention(
        num_heads=N, key_dim=H, backend=backend, dropout=0.2, use_gate=True, use_bias=True
    )
    x, y, z = draw(7, B, T, D), draw(8, B, S, D), draw(9, B, S, D)
    variables = draw_variables(layer, x, y, z)
    masks = {name: K_VALID}
    if name == "all_masks":
        masks = {"query_mask": Q_VALID, "value_mask": K_VALID, "key_mask": K_VALID}
    weight = draw(10, B, T, D)

    @jax.jit
    def run(params, x, y, z):
        def loss(params, x, y, z):
            out, scores = layer.apply(
                {"params": params},
                x,
                y,
                z,
                **masks,
                training=True,
                return_attention_scores=True,
                rngs={"dropout": jax.random.key(1)},
            )
            return (out * weight).sum() + (scores**2).sum(), (out, scores)

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, x, y, z)

    clean = run(variables["params"], x, y, z)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    for value in POISONS.values():
        hidden_x = poisoned(x, Q_VALID, value) if name == "all_masks" else x
        hidden = hidden_x, poisoned(y, K_VALID, value), poisoned(z, K_VALID, -value)
        same_bits(run(variables["params"], *hidden), clean)


# ---- any change of a hidden pair --------------------------------------------------------------

DENSE = np.random.default_rng(3).random((B, N, T, S)) < 0.6
MASKS = {
    "causal": Causal(),
    "window": Window(2, 1),
    "causal_window": Causal() & Window(2, 2),
    "segments": SameSegment(),
    "padding": ValidKeys(),
    "dense": Dense(DENSE),
    "dense_shared": Dense(DENSE[:1, :1]),
    "algebra": (SameSegment() | ~Window(3, 3)) & Dense(DENSE[:, :1]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_hidden_key_changes_no_bit_and_a_seen_one_changes_something(name, mask):
    tokens = Tokens(T, segment=Q_SEGMENT), Tokens(S, segment=K_SEGMENT, valid=K_VALID)
    q, k, v = draw(1, B, T, N, H), draw(2, B, S, K, H), draw(3, B, S, K, V)
    seen = np.broadcast_to(MASKS[mask].matrix(*tokens), (B, N, T, S))
    assert seen.any() and not seen.all()

    @jax.jit
    def run(k, v):
        return mj.attend(Call(q, k, v, *tokens, MASKS[mask]), BACKENDS[name])

    out, lse = (np.asarray(x) for x in run(k, v))
    for s in range(S):
        new_out, _ = (np.asarray(x) for x in run(k, v.at[:, s].add(1.0)))
        _, new_lse = (np.asarray(x) for x in run(k.at[:, s].add(1.0), v))
        out_changed = (new_out != out).any(-1).swapaxes(1, 2)
        np.testing.assert_array_equal(out_changed, seen[..., s], err_msg=f"value {s}")
        np.testing.assert_array_equal(new_lse != lse, seen[..., s], err_msg=f"key {s}")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["reference", "small_tiles"])
def test_no_gradient_reaches_a_hidden_pair(name, mask):
    """The gradient of a bias has one number a pair: it is zero where the mask hides the pair."""
    tokens = Tokens(T, segment=Q_SEGMENT), Tokens(S, segment=K_SEGMENT, valid=K_VALID)
    q, k, v = draw(1, B, T, N, H), draw(2, B, S, K, H), draw(3, B, S, K, V)
    seen = np.broadcast_to(MASKS[mask].matrix(*tokens), (B, N, T, S))

    @jax.jit
    def of_bias(bias):
        call = Call(q, k, v, *tokens, MASKS[mask], bias)
        return (mj.attend(call, BACKENDS[name]).out ** 2).sum()

    gradient = np.asarray(jax.grad(of_bias)(draw(4, B, N, T, S)))
    np.testing.assert_array_equal(gradient[~seen], 0)
    alone = seen.sum(-1, keepdims=True) == 1  # a weight of 1 has slope 0
    assert (gradient[seen & ~alone] != 0).all()
