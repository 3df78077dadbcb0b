"""Ahead-of-time compilation of the Mosaic GPU kernels: nothing spills, and the loops are short."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_kernels
from mha_jax import Call, Causal, Dropout, Tokens, ValidKeys
from mha_jax.attention.biases import Alibi, Buckets
from mha_jax.attention.call import Output, State
from mha_jax.attention.check import check
from mha_jax.backends.mosaic_gpu import MosaicGPU

if (why := gpu_kernels.missing()) is not None:
    pytest.skip(why, allow_module_level=True)

SHARED = 227 * 1024
X = jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16)
LINE = jax.ShapeDtypeStruct((1, 4, 4096), jnp.float32)
WORDS = jax.ShapeDtypeStruct((2,), jnp.uint32)


def forward(rate):
    def function(q, k, v, words):
        dropout = Dropout(words, rate) if rate else None
        return MosaicGPU().forward(check(Call(q, k, v, mask=Causal(), dropout=dropout)))

    return function, (X, X, X, WORDS)


def backward(bias, q, k, v, out, m, l, d_out, d_lse):
    problem = check(Call(q, k, v, mask=Causal(), bias=bias))
    problem = dataclasses.replace(problem, constants=("bias_rule",))
    moves = MosaicGPU().cotangent(problem, State(out, m, l), Output(d_out, d_lse))
    return moves.q, moves.k, moves.v


# With and without dropout: instructions of a loop over full tiles, of 64 x 128 weights.
@pytest.mark.parametrize(("rate", "most"), [(0, 480), (0.1, 1100)])
def test_the_forward_kernel_spills_nothing(rate, most):
    function, arguments = forward(rate)
    program, (kernel,) = gpu_kernels.kernels("H100", function, *arguments)
    assert kernel.spills == 0 and kernel.registers <= 168 and kernel.shared <= SHARED
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 4096
    if kernel.loops is not None:
        assert min(loop.instructions for loop in kernel.loops) <= most


# Narrow heads with a bias and padded keys, as AlphaFold's; wide ones; values of another size than keys.
@pytest.mark.parametrize(
    ("shape", "value_size", "biased"),
    [((384, 384, 4, 32), 32, True), ((1, 512, 2, 256), 256, False), ((1, 512, 2, 192), 128, True)],
)
def test_no_head_size_spills_forward(shape, value_size, biased):
    b, t, n, _ = shape
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    v = jax.ShapeDtypeStruct((b, t, n, value_size), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct((b, t), jnp.bool_)
    bias = jax.ShapeDtypeStruct((1, n, t, t), jnp.bfloat16)

    def function(q, k, v, valid, bias):
        tokens, bias = Tokens(t, valid=valid), bias if biased else None
        call = Call(q, k, v, mask=ValidKeys(), k_tokens=tokens, bias=bias)
        return MosaicGPU().forward(check(call))

    _, (kernel,) = gpu_kernels.kernels("H200", function, q, q, v, valid, bias)
    assert kernel.spills == 0 and kernel.shared <= SHARED


# AlphaFold's, which all examples share; T5's table, with all that adds up.
@pytest.mark.parametrize(
    ("shape", "kv_heads", "name"),
    [
        ((64, 384, 4, 32), 4, "bias"),
        ((1, 4096, 4, 128), 2, "distances"),
        ((1, 4096, 2, 256), 1, "distances"),
    ],
)
def test_the_gradient_of_a_bias_is_a_kernel_that_spills_nothing_and_keeps_no_pairs(
    shape, kv_heads, name
):
    b, t, n, h = shape
    x, kv = (jax.ShapeDtypeStruct((b, t, heads, h), jnp.bfloat16) for heads in (n, kv_heads))
    line = jax.ShapeDtypeStruct((b, n, t), jnp.float32)
    given = {"valid": jax.ShapeDtypeStruct((b, t), jnp.bool_), "array": (1, n, t, t)}
    given |= {"words": jax.ShapeDtypeStruct((2,), jnp.uint32), "table": (32, n)}
    given |= {x: jax.ShapeDtypeStruct(given[x], jnp.bfloat16) for x in ("array", "table")}

    def pulled(given, q, k, v, out, m, l, d_out, d_lse):
        options = {"mask": Causal(), "logit_cap": 9.0, "bias": Buckets(given["table"])}
        options["dropout"] = Dropout(given["words"], 0.1)
        if name == "bias":
            options = {"mask": ValidKeys(), "bias": given["array"]}
        call = Call(q, k, v, k_tokens=Tokens(t, valid=given["valid"]), **options)
        moves = MosaicGPU().cotangent(check(call), State(out, m, l), Output(d_out, d_lse))
        return moves.bias, moves.bias_rule  # the kernels of queries and keys are not compiled

    arguments = given, x, kv, kv, x, line, line, x, line
    program, (kernel,) = gpu_kernels.kernels("H100", pulled, *arguments)
    assert kernel.name == f"attention_backward_{name}"
    assert kernel.spills == 0 and kernel.registers <= 168 and kernel.shared <= SHARED
    assert program.memory_analysis().temp_size_in_bytes < 2 * b * n * t * t


# Sums of heads above 128 take half of the registers: keys and values have a kernel each.
@pytest.mark.parametrize(
    ("bias", "size", "names"),
    [
        (None, 128, ["keys", "queries"]),
        (Alibi.of_heads(4), 128, ["keys", "queries"]),
        (Alibi.of_heads(4), 256, ["keys", "queries", "values"]),
    ],
    ids=["plain", "alibi", "large_heads"],
)
def test_the_backward_kernels_spill_nothing(bias, size, names):
    function, x = (
        functools.partial(backward, bias),
        jax.ShapeDtypeStruct((1, 4096, 4, size), X.dtype),
    )
    _, kernels = gpu_kernels.kernels("H100", function, x, x, x, x, LINE, LINE, x, LINE)
    assert sorted(x.name for x in kernels) == [f"attention_backward_{name}" for name in names]
    for kernel in kernels:
        assert kernel.spills == 0 and kernel.registers <= 168 and kernel.shared <= SHARED
