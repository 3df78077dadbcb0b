"""Biases inside the Mosaic GPU kernels, interpreted, and what of them the tiles take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import Call, Causal, SameSegment, Tokens, biases, explain
from mha_jax.backends.mosaic_gpu import rules
from mha_jax.backends.reference import Reference
from tests import oracles
from tests.test_biases import draw
from tests.test_mosaic_gpu import both_passes, interpreted, needs_jax, problem

T, N = 131, 2
EPSILON = float(jnp.finfo(jnp.bfloat16).eps)


@biases.pytree
class Own(biases.Bias):
    """A rule of a user's: arithmetic of pairs, numbers looked up for a head, others for a token."""

    weight: object

    def logits(self, q, k):
        ahead = (k.positions - q.positions).astype(jnp.float32)
        near = jnp.tanh(ahead * 0.1) * jnp.asarray(self.weight)[q.head]
        return jnp.where(ahead < -3, -jnp.log(1 + jnp.abs(ahead)), near) + jnp.cos(
            k.positions.astype(jnp.float32)
        )


ALIBI = biases.Alibi.of_heads(N)
BUCKETS = biases.Buckets(jnp.asarray(draw(6, 12, N)), True, 21)
RELATIVE = biases.Relative(jnp.asarray(draw(6, 41, N)))
PACKED = Tokens.packed(
    jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (1, T)), -1).astype(np.int32))
)
# Rows of which all logits are as low as numbers go, of which none is one, and others.
LOW = np.array([0, -np.inf, np.finfo(np.float32).min], np.float32)[np.arange(T) % 3, None]
LOW = LOW + np.zeros(T, np.float32)
CASES = {
    "own": {"bias": Own(jnp.asarray(draw(1, N))), "mask": Causal()},
    "packed": {"bias": ALIBI, "mask": SameSegment(), "q_tokens": PACKED, "k_tokens": PACKED},
    "looked_up_and_arithmetic": {"bias": BUCKETS + ALIBI, "q_tokens": Tokens(T, start=3)},
    "beside_an_array": {"bias": RELATIVE + biases.Array(draw(3, T, T)), "logit_cap": 2.0},
    "as_low_as_numbers_go": {"bias": LOW},
}


def compared(call, **options):
    """Run the kernels and the definition in float32; return how far they are apart, by name."""
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(call.q.shape), jnp.bfloat16)
    d_lse = jnp.asarray(rng.standard_normal((1, *call.q.shape[2:0:-1])), jnp.float32)
    wide = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}
    own = both_passes(interpreted(**options), call, d_out, d_lse)
    wide = dataclasses.replace(call, **wide)
    want = both_passes(Reference(), wide, d_out.astype(jnp.float32), d_lse)
    return {name: oracles.relative_error(own[name], want[name]) for name in want}


@needs_jax
@pytest.mark.parametrize("name", CASES)
def test_constant_biases_agree_with_the_definition(name):
    call = dataclasses.replace(problem(T, T, N, **CASES[name]), constants=("bias", "bias_rule"))
    for name, error in compared(call).items():
        assert error < EPSILON / 8, f"{name}: {error:.3g}"


def steps(rule, **options):
    call = problem(9, 11, N, bias=rule, **options)
    return [step.primitive.name for term, _ in rules.terms(call)[0] for step in term.steps]


def test_only_what_pairs_say_is_left_to_the_tiles():
    assert steps(ALIBI) == ["sub", "abs", "convert_element_type", "neg", "mul"]
    assert steps(BUCKETS) == []
    own = Own(jnp.asarray(draw(1, N)))
    call = problem(9, 11, N, bias=own + BUCKETS)
    ((term, read),), others = rules.terms(call)
    assert isinstance(others, biases.Buckets)
    shapes = sorted(x.shape for x in read.values())
    assert shapes == [(1, 1, 1, 11), (1, 1, 1, 11), (1, 1, 9, 1), (1, N, 1, 1)]
    tile = term.tile((9, 11), lambda name: jnp.broadcast_to(read[name][0, -1], (9, 11)))
    whole = own.matrix(Tokens(9), Tokens(11), N)[0, -1]
    np.testing.assert_allclose(tile, whole, rtol=1e-6)


@pytest.mark.parametrize("rows", ["q", "k"])
def test_numbers_lie_along_the_diagonals(rows):
    call = problem(9, 11, N, bias=RELATIVE, q_tokens=Tokens(9, start=2))
    whole = RELATIVE.matrix(call.q_tokens, call.k_tokens, N)[0]
    lengths = (12, 12)
    numbers = rules.laid(call, RELATIVE, rows, 4, lengths)
    tile = np.concatenate([numbers[:, :, 8 - row : 20 - row] for row in (0, 4, 8)], 1)
    tile = tile if rows == "q" else tile.swapaxes(1, 2)
    np.testing.assert_array_equal(tile[:, :9, :11], whole)


@biases.pytree
class Table(biases.Bias):
    """A rule that looks pairs up by more than their distance."""

    def logits(self, q, k):
        return jnp.arange(7.0)[(q.positions + k.positions) % 7]


@pytest.mark.parametrize(
    ("bias", "tokens", "text"),
    [
        (
            Table(),
            None,
            "and Table takes 'gather'; along the diagonals it cannot be laid, as it knows more",
        ),
        (
            BUCKETS,
            Tokens(5, pos=np.arange(5)[None]),
            "and Buckets takes 'gather'; along the diagonals it cannot be laid, as positions are data; tiles",
        ),
        (BUCKETS + ALIBI, None, None),
        (ALIBI, Tokens(5, pos=np.arange(5)[None]), None),
    ],
)
def test_explain_says_what_the_kernels_add(bias, tokens, text, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr("mha_jax.backends.mosaic_gpu._capability", lambda: None)
    x = jnp.ones((1, 5, N, 8), jnp.bfloat16)
    says = explain(Call(x, x, x, tokens, tokens, bias=bias), "cuda")["mosaic_gpu"]
    assert (text or "can run") in says


@needs_jax
def test_a_part_of_the_keys_whose_places_are_data_goes_by_tiles():
    call = problem(9, 9, N, bias=BUCKETS)
    index = jnp.arange(9, dtype=jnp.int32)[None]
    placed = dataclasses.replace(call, q_tokens=Tokens(9, index=index))
    state, want = interpreted().forward(placed), Reference().forward(call)
    assert oracles.relative_error(state.out, want.out) < EPSILON
