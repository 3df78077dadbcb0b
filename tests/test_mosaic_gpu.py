"""The Mosaic GPU kernels on the CPU, interpreted: cases of the table, forward and backward.

All but the tensor cores is interpreted: copies, barriers, masks and dropout. What the compiler makes of it is
in `test_gpu_compile.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import (
    Call,
    Causal,
    Dense,
    Dropout,
    Tokens,
    UnsupportedError,
    ValidKeys,
    attend,
    explain,
)
from mha_jax.attention import softmax
from mha_jax.attention.call import Output, without_constants
from mha_jax.attention.check import check
from mha_jax.backends.mosaic_gpu import MosaicGPU
from mha_jax.backends.reference import Reference
from mha_jax.engine import choose
from tests import oracles
from tests.cases import CASES
from tests.test_backends import BACKWARD, FORWARD, truth

SINCE = jax.__version_info__ >= (0, 11)
needs_jax = pytest.mark.skipif(not SINCE, reason="Mosaic GPU's kernels need jax 0.11")


def interpreted(**options):
    """Return the kernels on the CPU; memory that nobody wrote is NaN."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    parameters = plgpu.InterpretGPUParams  # type: ignore[attr-defined]
    return MosaicGPU(parameters(uninitialized_memory="nan", **options))


def both_passes(backend, call, d_out, d_lse):
    """Return out, lse and the gradients by name; those of a rule's numbers have one each."""

    def passes(call, d_out, d_lse):
        state = backend.forward(call)
        output = Output(state.out, softmax.logsumexp(state.m, state.l))
        d_lse = jnp.where(jnp.isinf(output.lse), 0, d_lse)
        return output, backend.cotangent(call, state, Output(d_out, d_lse))

    (out, lse), moves = jax.jit(passes)(call, d_out, d_lse)
    found = {"out": out, "lse": lse}
    moved = without_constants(call, moves)
    named = {f"d{name}": getattr(moved, name) for name in ("q", "k", "v", "bias")}
    rules = {f"drule.{i}": x for i, x in enumerate(jax.tree.leaves(moved.bias_rule))}
    return found | {name: x for name, x in (named | rules).items() if x is not None}


def run(backend, case):
    d_out, d_lse = (jnp.asarray(a) for a in case.arrays(jnp.bfloat16)[-2:])
    return both_passes(backend, check(case.call(jnp.bfloat16)), d_out, d_lse)


def check_case(case, backend):
    (out, lse), gradients = truth(case, jnp.bfloat16)
    wanted = {"out": out, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}
    own, plain = run(backend, case), run(Reference(), case)
    for key, want in wanted.items():
        multiple = FORWARD if key in ("out", "lse") else BACKWARD
        got, least = (oracles.relative_error(x[key], want) for x in (own, plain))
        # One rounding of the weights, which the tensor cores take in 16 bits.
        allowed = max(multiple * least, float(jnp.finfo(jnp.bfloat16).eps))
        assert got <= allowed, f"{case.name} {key}: {got:.3g}, reference {least:.3g}"


# One case for every way that something reaches a kernel; few heads, as the interpreter is slow.
FEW = {
    "packed_causal": (2, 1),
    "some_rows_nothing": (1, 1),
    "prefix_lm": (1, 1),
    "dense_per_head_dropout": (6, 3),
    "bias_dense": (6, 6),
    "bias_shared": (6, 3),
    "soft_cap": (2, 1),
    "wide_values": (2, 1),
}


@needs_jax
@pytest.mark.parametrize("name", FEW)
def test_the_kernels_agree_with_the_oracle(name):
    (case,) = (case for case in CASES if case.name == name)
    if case.bias is None and case.name != "dense_per_head_dropout":
        case = dataclasses.replace(case, heads=FEW[name])
    check_case(case, interpreted())


def problem(t, s, heads=2, kv_heads=1, size=32, dtype=jnp.bfloat16, batch=1, **options):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, *shape, size)), dtype)
        for shape in ((t, heads), (s, kv_heads), (s, kv_heads))
    )
    return check(Call(q, k, v, **options))


@needs_jax
def test_many_tiles_pass_by_without_a_race():
    call = problem(131, 397, 1, mask=Causal(), dropout=Dropout(jax.random.key(0), 0.3))
    call = dataclasses.replace(call, q_tokens=Tokens(131, start=266))
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(call.q.shape), jnp.bfloat16)
    d_lse = jnp.asarray(rng.standard_normal((1, 1, 131)), jnp.float32)
    own = both_passes(interpreted(detect_races=True), call, d_out, d_lse)
    wide = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}
    wanted = both_passes(
        Reference(), dataclasses.replace(call, **wide), d_out.astype(jnp.float32), d_lse
    )
    for name, want in wanted.items():
        assert oracles.relative_error(own[name], want) < 2 * float(jnp.finfo(jnp.bfloat16).eps), (
            name
        )


@needs_jax
def test_what_nobody_sees_reaches_nothing():
    valid = jnp.arange(140)[None] < 133
    call = problem(9, 140, k_tokens=Tokens(140, valid=valid), mask=ValidKeys())
    poisoned = dataclasses.replace(
        call, k=call.k.at[:, 135].set(jnp.nan), v=call.v.at[:, 137].set(jnp.inf)
    )
    d_out, d_lse = jnp.ones_like(call.q), jnp.ones((1, 2, 9), jnp.float32)
    clean, other = (both_passes(interpreted(), x, d_out, d_lse) for x in (call, poisoned))
    for name in clean:
        assert bool(jnp.all(clean[name] == other[name])), name


def test_no_choice_falls_on_what_was_never_measured():
    call = problem(64, 64, dropout=Dropout(jax.random.key(0), 0.1))
    assert type(choose.choose(call, "cuda")).__name__ == "Blockwise"
    assert type(choose.choose(problem(64, 64), "cuda")).__name__ == "CuDNN"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": jnp.float32}, "its products are of float16 or bfloat16; q, k and v are float32"),
        ({"size": 264}, "its accumulators hold head sizes up to 256; this call has 264"),
        ({"precision": "highest"}, "it rounds weights to bfloat16; precision is"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_in_words(options, text, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert (MosaicGPU().why_not(problem(8, 8, **options), "cuda") or "").startswith(text)


def test_where_the_kernels_do_not_run_is_said_in_words(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr("mha_jax.backends.mosaic_gpu._capability", lambda: "8.0")
    why = MosaicGPU().why_not
    assert why(problem(8, 8), "cuda") == (
        "its products are those of compute capability 9.0; this GPU has 8.0"
    )
    assert why(problem(8, 8), "tpu") == "it needs an NVIDIA GPU; this program is for tpu"
    monkeypatch.setattr("mha_jax.backends.mosaic_gpu._capability", lambda: None)
    assert why(problem(8, 8), "cuda") is None
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    x = jnp.ones((1, 8, 2, 4))
    assert "it needs jax 0.11" in explain(Call(x, x, x))["mosaic_gpu"]
    with pytest.raises(UnsupportedError, match="backend MosaicGPU cannot run this call"):
        attend(Call(x, x, x), "mosaic_gpu")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "can run"),
        (
            {"mask": Dense(np.ones((1, 2, 1, 8), bool))},
            "as a mask or a bias has a line of keys for each of",
        ),
    ],
)
def test_explain_says_which_gradients_the_tiles_take(options, text, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr("mha_jax.backends.mosaic_gpu._capability", lambda: None)
    says = choose.reasons(problem(8, 8, **options), "cuda")["mosaic_gpu"]
    before = "can run; all gradients go through the tiles, blockwise, " if options else ""
    assert says.startswith(before + text)
