"""O(T + S) memory: no T x S array in the program, and temporaries that grow with T, not with T x T."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import (
    Call,
    Causal,
    ChunkedCausal,
    Dilated,
    Dropout,
    PrefixLM,
    SameSegment,
    Tokens,
    ValidKeys,
    ValidQueries,
    Window,
    biases,
)
from mha_jax.backends.reference import Reference
from mha_jax.layer.axes import Folding

LONG, HEADS, SIZE = 4096, 2, 8
DROPOUT = Dropout(jax.random.key(0), 0.1)

CASES = {
    "full": {},
    "causal": {"mask": Causal()},
    "window": {"mask": Window(255, 255)},
    "segments": {"mask": SameSegment() & Causal()},
    "padding": {"mask": ValidKeys() & ValidQueries()},
    "dropout": {"mask": Causal(), "dropout": DROPOUT},
    "bias_of_keys": {"mask": Causal(), "logit_cap": 5.0},
}


def tokens(length):
    at = np.arange(length, dtype=np.int32)[None]
    return Tokens(length, pos=at % 700, segment=at // 700, valid=at % 5 != 0)


def call_of(name, length, heads=HEADS, size=SIZE):
    x = jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)
    own = (
        {}
        if name in ("full", "causal", "window", "dropout", "bias_of_keys")
        else {
            "q_tokens": tokens(length),
            "k_tokens": tokens(length),
        }
    )
    bias = jnp.zeros((1, heads, 1, length)) if name == "bias_of_keys" else None
    return Call(x, x, x, bias=bias, **own, **CASES[name])


def gradients(call, backend=None):
    def total(q, k, v):
        return mj.attend(dataclasses.replace(call, q=q, k=k, v=v), backend).out.sum()

    return jax.value_and_grad(total, (0, 1, 2))


def largest(function, *arguments):
    """Return the number of elements of the largest array in the program that is lowered."""
    text = jax.jit(function).lower(*arguments).as_text()
    shapes = set(re.findall(r"tensor<((?:\d+x)+)", text))
    return max(math.prod(int(n) for n in shape[:-1].split("x")) for shape in shapes)


def temporaries(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", CASES)
def test_no_array_of_all_pairs_forward_and_backward(name):
    call = call_of(name, LONG)
    most = largest(gradients(call), call.q, call.k, call.v)
    assert 256 * 256 < most < LONG * LONG / 4


def test_the_measure_sees_the_pairs_of_the_reference():
    call = call_of("causal", 256)
    assert largest(gradients(call, Reference()), call.q, call.k, call.v) >= HEADS * 256 * 256


@pytest.mark.parametrize("name", CASES)
def test_temporaries_grow_with_the_length(name):
    small, large = (
        temporaries(gradients(call), call.q, call.k, call.v)
        for call in (call_of(name, LONG // 2), call_of(name, LONG))
    )
    # One T x S array of float32 would be 64 MiB, and doubling T would make it four times as large.
    assert large < 2.5 * small
    assert large < LONG * LONG * 4 / 4


@pytest.mark.parametrize("name", CASES)
def test_temporaries_of_32768_tokens_are_under_ten_times_the_queries(name):
    call = call_of(name, 32768, heads=8, size=64)
    assert temporaries(gradients(call), call.q, call.k, call.v) < 10 * 32768 * 8 * 64 * 4


@pytest.mark.parametrize("mask", [mj.Causal(), mj.ValidKeys()], ids=str)
def test_keeping_nan_behind_a_mask_costs_no_copies(mask):
    """Of keys, values, queries or cotangents: they are cleaned tile by tile."""
    size = 8 * LONG * HEADS * 8 * 4
    tokens = mj.Tokens(LONG, valid=jnp.ones((8, LONG), bool))
    x = jnp.ones((8, LONG, HEADS, 8))
    plain, hiding = (
        temporaries(gradients(mj.Call(x, x, x, tokens, tokens, mask)), x, x, x)
        for mask in (mj.Full(), mask)
    )
    assert hiding < plain + size / 2


FEATURES = {
    "alibi": {"bias": biases.Alibi.of_heads(8)},
    "buckets": {"bias": biases.Buckets(np.zeros((32, 8), np.float32))},
    "relative": {"bias": biases.Relative(np.zeros((255, 8), np.float32))},
    "relative_grid": {"bias": biases.Relative(np.zeros((255 * 511, 8), np.float32), (128, 256))},
    "sinks": {"sinks": np.zeros(8, np.float32)},
    "chunks": {"mask": ChunkedCausal(4096)},
    "dilated": {"mask": Causal() & ~Dilated(3)},
    "prefix": {"mask": PrefixLM(np.array([700]))},
}


@pytest.mark.parametrize("name", FEATURES)
def test_temporaries_of_32768_tokens_with_a_feature_are_under_ten_times_the_queries(name):
    call = dataclasses.replace(call_of("causal", 32768, heads=8, size=64), **FEATURES[name])
    assert temporaries(gradients(call), call.q, call.k, call.v) < 10 * 32768 * 8 * 64 * 4


def test_temporaries_of_32768_tokens_on_two_axes_are_under_ten_times_the_queries():
    folding = Folding((128, 2, 256), (0, 2))
    x = jax.ShapeDtypeStruct((128, 2, 256, 4 * 64), jnp.float32)

    def total(q, k, v):
        q, k, v = (folding.fold(a).reshape(2, 32768, 4, 64) for a in (q, k, v))
        out = mj.attend(Call(q, k, v, mask=Causal())).out
        return (folding.unfold(out.reshape(2, 32768, 4 * 64)) ** 2).sum()

    assert temporaries(jax.value_and_grad(total, (0, 1, 2)), x, x, x) < 10 * x.size * 4


def test_attention_axes_cost_no_more_than_the_folded_sequence():
    layer = mj.MultiHeadAttention(
        num_heads=HEADS, key_dim=SIZE, attention_axes=(1, 2), sliding_window=64
    )
    x = jnp.zeros((1, 64, 64, SIZE))
    params = jax.eval_shape(layer.init, jax.random.key(0), x, x)

    def total(params, x):
        return layer.apply(params, x, x, use_causal_mask=True).sum()

    assert temporaries(jax.value_and_grad(total), params, x) < LONG * LONG * 4 / 4


def test_forward_mode_costs_no_array_of_all_pairs():
    call = call_of("causal", LONG // 2)
    value = gradients(call, "blockwise")

    def hessian_vector(q, k, v):
        return jax.jvp(lambda q: value(q, k, v)[1], (q,), (q,))[1]

    assert 256 * 256 < largest(hessian_vector, call.q, call.k, call.v) < (LONG // 2) ** 2 / 2


def test_a_layer_with_scores_costs_one_array_of_scores():
    layer = mj.MultiHeadAttention(num_heads=HEADS, key_dim=SIZE)
    x = jnp.zeros((1, 512, SIZE))
    params = jax.eval_shape(layer.init, jax.random.key(0), x, x)

    def run(params, x):
        return layer.apply(params, x, x, return_attention_scores=True)

    assert temporaries(run, params, x) < 3 * HEADS * 512 * 512 * 4
