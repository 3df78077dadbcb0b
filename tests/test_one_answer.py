"""One answer: no backend, no request for scores, no idle dropout and no jit changes the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Causal, SameSegment, Tokens, ValidKeys, Window
from tests import oracles
from tests.backends import backends, tiles
from tests.drawn import draw, draw_variables

B, T, S, N, K, H, V, D = 2, 5, 7, 4, 2, 3, 2, 6
BACKENDS = backends(small_tiles=tiles(2, 4))
EPSILON = np.finfo(np.float32).eps
RANDOM = np.random.default_rng(0)
PAIRS = RANDOM.random((B, N, T, S)) < 0.6
K_VALID = RANDOM.random((B, S)) < 0.7
V_VALID = RANDOM.random((B, S)) < 0.7
Q_VALID = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 0]], bool)
Q_SEGMENT = np.array([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]], np.int32)
K_SEGMENT = np.array([[0, 0, 1, 1, 1, 2, -1], [0, 0, 0, 1, 2, 2, -1]], np.int32)
AHEAD = np.arange(S)[None] - np.arange(T)[:, None]
SAME = ((Q_SEGMENT[:, :, None] == K_SEGMENT[:, None]) & (K_SEGMENT[:, None] >= 0))[:, None]
SEGMENTED = {
    "query_tokens": Tokens(T, segment=Q_SEGMENT),
    "key_tokens": Tokens(S, segment=K_SEGMENT),
}

# Every kind of mask: arguments of the layer, arguments of the call, and what they mean.
MASKS = {
    "none": ({}, {}, True),
    "causal": ({}, {"use_causal_mask": True}, AHEAD <= 0),
    "window": ({"sliding_window": 2}, {}, abs(AHEAD) < 2),
    "causal_window": (
        {"sliding_window": 3},
        {"use_causal_mask": True},
        (AHEAD <= 0) & (AHEAD > -3),
    ),
    "array_t_s": ({}, {"attention_mask": PAIRS[0, 0]}, PAIRS[0, 0]),
    "array_b_t_s": ({}, {"attention_mask": PAIRS[:, 0]}, PAIRS[:, :1]),
    "array_b_n_t_s": ({}, {"attention_mask": PAIRS}, PAIRS),
    "array_of_integers": ({}, {"attention_mask": PAIRS[:, :1].astype(np.int32)}, PAIRS[:, :1]),
    "query_mask": ({}, {"query_mask": Q_VALID}, Q_VALID[:, None, :, None]),
    "value_mask": ({}, {"value_mask": V_VALID}, V_VALID[:, None, None]),
    "key_mask": ({}, {"key_mask": K_VALID}, K_VALID[:, None, None]),
    "segments": ({}, dict(mask=SameSegment(), **SEGMENTED), SAME),
    "rule": ({}, {"mask": Causal() | ~Window(2, 2)}, (AHEAD <= 0) | (abs(AHEAD) > 2)),
    "all": (
        {"sliding_window": 4},
        {
            "use_causal_mask": True,
            "attention_mask": PAIRS,
            "query_mask": Q_VALID,
            "value_mask": V_VALID,
            "key_mask": K_VALID,
            "mask": ~Window(0, 0) & ValidKeys(),
        },
        PAIRS
        & (AHEAD < 0)
        & (AHEAD > -4)
        & Q_VALID[:, None, :, None]
        & (V_VALID & K_VALID)[:, None, None],
    ),
}


X, Y, Z = draw(1, B, T, D), draw(2, B, S, D), draw(3, B, S, D)


def layer_of(mask, backend, dropout=0.0):
    return mj.MultiHeadAttention(
        num_heads=N,
        num_kv_heads=K,
        key_dim=H,
        value_dim=V,
        backend=BACKENDS[backend],
        dropout=dropout,
        bias_initializer="random_normal",
        **MASKS[mask][0],
    )


def function(mask, backend, scores, dropout=0.0):
    layer = layer_of(mask, backend, dropout)
    options = MASKS[mask][1]

    def run(params, x, y, z):
        out = layer.apply({"params": params}, x, y, z, return_attention_scores=scores, **options)
        return out if scores else (out, None)

    return run


PARAMS = draw_variables(layer_of("none", "reference"), X, Y, Z)["params"]


def runs(mask):
    """Yield what to compare: (backend, how, scores).

    Without jit, each loop of a tiled backend compiles anew; what differs there is the code around the
    backend, which does not know its tiles.
    """
    for backend in BACKENDS:
        yield from ((backend, "jit", scores) for scores in (False, True))
    yield from (("reference", "eager", scores) for scores in (False, True))
    yield from (("blockwise", "eager", scores) for scores in (False, True)[: 1 + (mask == "all")])


@pytest.mark.parametrize("mask", MASKS)
def test_one_answer(mask):
    want, want_scores = oracles.layer(PARAMS, X, Y, Z, visible=MASKS[mask][2])
    errors, outputs = {}, {}
    for at in runs(mask):
        backend, how, scores = at
        run = function(mask, backend, scores)
        out, got = (jax.jit(run) if how == "jit" else run)(PARAMS, X, Y, Z)
        outputs[at] = np.asarray(out)
        errors[(*at, "out")] = oracles.relative_error(out, want)
        if scores:
            errors[(*at, "scores")] = oracles.relative_error(got, want_scores)
    for backend, how, scores in outputs:
        if scores:
            np.testing.assert_array_equal(
                outputs[backend, how, True].view(np.uint32),
                outputs[backend, how, False].view(np.uint32),
                err_msg=f"{backend}, {how}: asking for scores changes the output",
            )
    for (*at, what), error in errors.items():
        plain = errors["reference", "jit", True, what]
        assert error <= max(2 * plain, EPSILON), f"{at} {what}: {error:.3g}, reference {plain:.3g}"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_idle_dropout_is_the_same_program(backend, mask):
    for scores in (False, True):
        with_, without = (
            jax.jit(function(mask, backend, scores, rate)).lower(PARAMS, X, Y, Z).as_text()
            for rate in (0.3, 0.0)
        )
        assert with_ == without


@pytest.mark.parametrize("mask", ["none", "all"])
def test_the_default_is_one_of_the_backends(mask):
    out = jax.jit(function(mask, "blockwise", False))(PARAMS, X, Y, Z)[0]
    layer = layer_of(mask, "blockwise").clone(backend=None)
    automatic = jax.jit(lambda p, *a: layer.apply({"params": p}, *a, **MASKS[mask][1]))
    np.testing.assert_array_equal(automatic(PARAMS, X, Y, Z), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_change_no_bit_of_the_gradients(backend):
    def gradients(scores):
        run = function("causal", backend, scores)
        return jax.jit(jax.grad(lambda *a: jnp.sin(run(*a)[0]).sum(), (0, 1, 2, 3)))(
            PARAMS, X, Y, Z
        )

    for a, b in zip(jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(False))):
        np.testing.assert_array_equal(a, b)


def test_dropout_in_training_is_one_answer_too():
    outputs = []
    for backend in BACKENDS:
        layer = layer_of("causal", backend, dropout=0.3)
        out = layer.apply(
            {"params": PARAMS},
            X,
            Y,
            Z,
            use_causal_mask=True,
            training=True,
            rngs={"dropout": jax.random.key(5)},
        )
        outputs.append(np.asarray(out))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=8 * EPSILON * np.abs(outputs[0]).max())
    np.testing.assert_allclose(outputs[2], outputs[0], atol=8 * EPSILON * np.abs(outputs[0]).max())
