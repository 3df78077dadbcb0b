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
from mha_jax.attention.check import check
from mha_jax.backends.blockwise import Blockwise, few_rows
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.reference import Reference
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


# ---- NaN and Inf behind any mask ---------------------------------------------------------------

T2, S2 = 19, 31
Q_PACKED = np.sort(np.random.default_rng(4).integers(0, 3, (B, T2)), -1).astype(np.int32)
K_PACKED = np.sort(np.random.default_rng(5).integers(0, 3, (B, S2)), -1).astype(np.int32)
Q_PACKED[:, -2:] = K_PACKED[:, -3:] = -1
BY_HEAD = np.random.default_rng(6).random((B, N, T2, S2)) < 0.3
HIDING = {
    "causal": Causal(),
    "window": Window(4, 3),
    "segments": SameSegment(),
    "algebra": (SameSegment() & Causal()) | Window(0, 2),
    "by_head": Dense(BY_HEAD),
}
TILED = {
    "reference": Reference(),
    "default": None,
    "small_tiles": Blockwise(block_q=8, block_k=16),
    "exhaustive": Blockwise(block_q=8, block_k=16, exhaustive=True),
}
KERNEL = {"pallas_tpu": PallasTPU(interpret=True)}


def poisoned_keys_and_values(k, v, value):
    """Put a value into one feature of some keys, and into one of some other keys' values."""
    keys, values = np.zeros((B, S2), bool), np.zeros((B, S2), bool)
    keys[0, 17:19] = keys[1, 5] = keys[:, -1] = values[:, 23] = True
    k = jnp.where((keys[..., None] & (np.arange(H) == 1))[:, :, None], jnp.float32(value), k)
    v = jnp.where((values[..., None] & (np.arange(V) == 0))[:, :, None], jnp.float32(value), v)
    return k, v, keys | values


@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, mask) for name in TILED for mask in HIDING]
    + [("pallas_tpu", "algebra"), ("pallas_tpu", "by_head")],
)
def test_what_any_mask_hides_reaches_nothing(name, mask):
    """Rows that see no NaN are the same to the last bit, and so is all that they alone see."""
    tokens = Tokens(T2, segment=Q_PACKED), Tokens(S2, segment=K_PACKED)
    q, k, v = draw(1, B, T2, N, H), draw(2, B, S2, K, H), draw(3, B, S2, K, V)
    seen = np.broadcast_to(HIDING[mask].matrix(*tokens), (B, N, T2, S2))
    blind = ~seen.any(-1)

    @jax.jit
    def run(q, k, v, d_out, d_lse):
        def forward(q, k, v):
            call = Call(q, k, v, *tokens, HIDING[mask], logit_cap=3.0)
            return mj.attend(call, (TILED | KERNEL)[name])

        output, vjp = jax.vjp(forward, q, k, v)
        return output, vjp(mj.Output(d_out, d_lse))

    d_out, d_lse = draw(4, B, T2, N, V), jnp.where(blind, 0, draw(5, B, N, T2))
    for value in (np.nan, np.inf, -np.inf):
        bad_k, bad_v, bad = poisoned_keys_and_values(k, v, value)
        bad_q = jnp.where(blind.all(1)[..., None, None], jnp.float32(value), q)
        dirty = (seen & bad[:, None, None]).any(-1)
        assert dirty.any() and not (dirty | blind).all()
        across = dirty.swapaxes(1, 2)[..., None]
        # Nobody asks for the rows that see a NaN, and what comes back to rows that see nothing is one.
        silent = jnp.where(across, 0, d_out), jnp.where(dirty, 0, d_lse)
        nan = jnp.where(blind.swapaxes(1, 2)[..., None], jnp.nan, silent[0])
        (out, lse), clean = run(q, k, v, *silent)
        (got, got_lse), gradients = run(bad_q, bad_k, bad_v, nan, silent[1])
        np.testing.assert_array_equal(jnp.where(across, 0, got), jnp.where(across, 0, out))
        np.testing.assert_array_equal(np.asarray(got_lse)[~dirty], np.asarray(lse)[~dirty])
        assert np.isnan(np.asarray(got)[across[..., 0]]).any(-1).all()
        for a, b in zip(gradients, clean):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        # Somebody does: what they see is NaN, and nothing else is.
        _, clean = run(q, k, v, d_out, d_lse)
        _, gradients = run(bad_q, bad_k, bad_v, d_out, d_lse)
        reached = (seen & dirty[..., None]).any(2).reshape(B, K, N // K, S2).any(2).swapaxes(1, 2)
        for a, b, nan in zip(gradients, clean, (across[..., 0], reached, reached)):
            assert np.isnan(np.asarray(a)[nan]).any(-1).all()
            np.testing.assert_allclose(
                np.asarray(a)[~nan], np.asarray(b)[~nan], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_second_derivatives_are_not_reached(name, value):
    """By what nobody sees, and what sees nothing, whichever mode goes first."""
    seen = np.tri(5, 7, dtype=bool) & (np.arange(5) != 2)[:, None]
    q, k, v = draw(1, 1, 5, N, H), draw(2, 1, 7, K, H), draw(3, 1, 7, K, V)
    bad = q.at[:, 2, :, 0].set(value), k.at[:, 5, :, 0].set(value), v.at[:, 6, :, 0].set(value)
    moves = draw(6, *q.shape), draw(7, *k.shape), draw(8, *v.shape)

    def loss(q, k, v):
        out, lse = mj.attend(Call(q, k, v, mask=Dense(seen)), TILED[name])
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isinf(lse), 0, lse) ** 2)

    def gradient(*given):
        return jax.grad(loss, (0, 1, 2))(*given)

    def along(*given):
        return jax.jvp(loss, given, moves)[1]

    def product(*given):
        return sum(jnp.vdot(a, b) for a, b in zip(gradient(*given), moves))

    @jax.jit
    def all_modes(*given):
        forward_last = jax.jvp(gradient, given, moves)[1]
        return forward_last, *(jax.grad(f, (0, 1, 2))(*given) for f in (along, product))

    for got, want in zip(jax.tree.leaves(all_modes(*bad)), jax.tree.leaves(all_modes(q, k, v))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TILED)
def test_tangents_are_not_reached_by_directions(name):
    q, k, v = draw(1, B, T2, N, H), draw(2, B, S2, K, H), draw(3, B, S2, K, V)
    moves = draw(6, *q.shape), draw(7, *k.shape), draw(8, *v.shape)
    bad = moves[0], moves[1].at[:, 9, :, 0].set(np.nan), moves[2].at[:, 7, :, 0].set(np.nan)

    def out(q, k, v):
        return mj.attend(Call(q, k, v, mask=Causal()), TILED[name]).out

    got, want = (np.asarray(jax.jvp(out, (q, k, v), moved)[1]) for moved in (bad, moves))
    np.testing.assert_allclose(got[:, :7], want[:, :7], rtol=1e-5, atol=1e-6)
    assert np.isnan(got[:, 7:]).any(-1).all()


def test_few_rows_are_not_reached_either():
    """A step over many keys has a way of its own."""
    q, k, v = draw(1, 1, 1, N, H), draw(2, 1, 1031, K, H), draw(3, 1, 1031, K, V)
    call = Call(q, k, v, Tokens(1, start=700), None, Causal())
    assert few_rows.worthwhile(check(call))
    clean = mj.attend(call)
    hidden = np.arange(1031)[None] > 700
    for value in (np.nan, np.inf, -np.inf):
        bad = dataclasses.replace(
            call, k=poisoned(k, ~hidden, value), v=poisoned(v, ~hidden, -value)
        )
        same_bits(mj.attend(bad), clean)
    assert not few_rows.worthwhile(
        check(dataclasses.replace(call, mask=Dense(BY_HEAD[:1, :, :1, :1])))
    )


@pytest.mark.parametrize("mask", HIDING)
def test_gradients_and_tangents_of_scores_and_outputs_are_not_reached(mask):
    tokens = Tokens(T2, segment=Q_PACKED), Tokens(S2, segment=K_PACKED)
    q, k, v = draw(1, B, T2, N, H), draw(2, B, S2, K, H), draw(3, B, S2, K, V)
    seen = np.broadcast_to(HIDING[mask].matrix(*tokens), (B, N, T2, S2))
    bad_k, bad_v, bad = poisoned_keys_and_values(k, v, np.nan)
    dirty = (seen & bad[:, None, None]).any(-1)
    rows = dirty.swapaxes(1, 2)[..., None]

    def scores(q, k):
        found = mj.attention_scores(Call(q, k, v, *tokens, HIDING[mask]))
        return jnp.where(dirty[..., None], 0, found**2).sum()

    def out(q, k, v):
        return jnp.where(rows, 0, mj.attend(Call(q, k, v, *tokens, HIDING[mask])).out)

    reached = (seen & dirty[..., None]).any(2).reshape(B, K, N // K, S2).any(2).swapaxes(1, 2)
    pairs = zip(jax.grad(scores, (0, 1))(q, bad_k), jax.grad(scores, (0, 1))(q, k))
    for (got, want), nan in zip(pairs, (rows[..., 0], reached)):
        np.testing.assert_allclose(
            np.asarray(got)[~nan], np.asarray(want)[~nan], rtol=1e-5, atol=1e-6
        )
    moves = draw(6, *q.shape), draw(7, *k.shape), draw(8, *v.shape)
    bad_moves = moves[0], *poisoned_keys_and_values(*moves[1:], np.nan)[:2]
    got = jax.jvp(out, (q, bad_k, bad_v), bad_moves)[1]
    np.testing.assert_allclose(got, jax.jvp(out, (q, k, v), moves)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*TILED, *KERNEL])
def test_a_row_of_nan_says_so_in_its_statistics(name):
    """Not that it saw no key."""
    q, k, v = (jnp.full((1, 3, 1, 2), x, jnp.float32) for x in (1, 1, 1))
    for bias in (np.nan, np.inf):
        call = Call(q, k, v, bias=jnp.full((3, 3), bias, jnp.float32))
        out, lse = mj.attend(call, (TILED | KERNEL)[name])
        assert np.isnan(out).all() and np.isnan(lse).all()


@pytest.mark.parametrize("size", [0, 1, V, H])
@pytest.mark.parametrize("name", ["default", "small_tiles", "exhaustive"])
def test_a_value_that_is_seen_says_so_to_heads_of_any_size(name, size):
    """In outputs, and the direction of a value in tangents; without features, too."""
    q, k, v = draw(51, B, T2, N, size), draw(52, B, S2, K, size), draw(53, B, S2, K, V)
    bad = v.at[:, 7, :, 0].set(np.nan)

    def out(v):
        return mj.attend(Call(q, k, v, mask=Causal()), TILED[name]).out

    moved = jax.jvp(out, (v,), (jnp.zeros_like(v).at[:, 7, :, 1].set(np.inf),))[1]
    for found in (out(bad), moved):
        assert np.isfinite(np.asarray(found)[:, :7]).all()
        assert np.isnan(np.asarray(found)[:, 7:]).all(axis=-1).all()
    gradient = jax.grad(lambda v: out(v)[:, :7].sum())(bad)
    assert np.isfinite(np.asarray(gradient)).all()
