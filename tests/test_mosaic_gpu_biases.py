"""Biases inside the Mosaic GPU kernels, interpreted, and what of them the tiles take."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import Call, Causal, Dense, SameSegment, Tokens, ValidKeys, biases, explain
from mha_jax.attention.call import moving
from mha_jax.backends import visits
from mha_jax.backends.blockwise import GPU, Blockwise
from mha_jax.backends.mosaic_gpu import rules, sums
from mha_jax.backends.reference import Reference
from mha_jax.engine import choose
from tests import oracles
from tests.test_biases import draw
from tests.test_mosaic_gpu import both_passes, interpreted, needs_jax, problem

T, N, B = 131, 2, 3
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
    "large_heads": {"bias": draw(3, T, T), "mask": Causal(), "size": 136},
}


# Whose gradients the kernels do not sum up: they are asked for q, k and v alone.
CONSTANT = ("own", "packed")


def check_call(call, **options):
    """Compare the kernels with the definition in float32; return what was compared.

    A sum over all pairs of a rule may lose more than a few roundings: so do the tiles, and for the same
    reason, as out reaches the passes in 16 bits.
    """
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(call.q.shape), jnp.bfloat16)
    d_lse = jnp.asarray(rng.standard_normal((len(call.q), *call.q.shape[2:0:-1])), jnp.float32)
    wide = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}
    wide = dataclasses.replace(call, **wide)
    want = both_passes(Reference(), wide, d_out.astype(jnp.float32), d_lse)
    own, tiles = (
        both_passes(backend, call, d_out, d_lse)
        for backend in (interpreted(**options), Blockwise(tuning=GPU))
    )
    for name, x in want.items():
        error, least = (oracles.relative_error(found[name], x) for found in (own, tiles))
        assert error < max(EPSILON / 8, 1.5 * least), f"{name}: {error:.3g}, tiles {least:.3g}"
    return set(want)


@needs_jax
@pytest.mark.parametrize("name", CASES)
def test_biases_agree_with_the_definition(name):
    call = problem(T, T, N, **CASES[name])
    if name in CONSTANT:
        call = dataclasses.replace(call, constants=("bias", "bias_rule"))
    names = check_call(call)
    assert (names > {"out", "lse", "dq", "dk", "dv"}) == (name not in CONSTANT)


@needs_jax
def test_a_bias_of_heads_gets_the_sum_of_all_examples_without_a_race():
    valid = jnp.asarray(np.arange(140)[None] < np.array([[133], [7]]))
    options = {"k_tokens": Tokens(140, valid=valid), "mask": ValidKeys()}
    call = problem(130, 140, N, N, batch=2, bias=draw(3, 1, N, 130, 140), **options)
    assert "dbias" in check_call(call, detect_races=True)


def seen(call, summed):
    """Return which tiles of logits every tile of a cotangent sums up, as (example, head, row, column)."""
    lines = summed.lines(visits.kinds(call, 4, 2))
    for at in np.ndindex(*summed.outer, len(summed.members)):
        line = lines[tuple(i if size > 1 else 0 for i, size in zip(at, lines.shape))]
        for number in summed.numbers[at[2]][line != visits.EMPTY]:
            for again in range(summed.again):
                entry, tile = divmod(number, summed.tiles)
                example, head = divmod(entry, summed.listed_heads)
                more, other = divmod(again, summed.again_heads)
                yield (
                    at,
                    (at[0] + example + more, at[1] + head + other, *divmod(tile, summed.across)),
                )


# Masks that are one, of an example, of a head, of both; cotangents that are shared along all sets of axes.
@pytest.mark.parametrize("shared", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("judged", [(1, 1), (B, 1), (1, N), (B, N)])
def test_every_tile_that_is_seen_is_summed_up_once_and_where_it_belongs(judged, shared):
    mask = Dense(np.random.default_rng(0).random((*judged, 11, 7)) < 0.1)
    call = problem(11, 7, N, N, batch=B, mask=mask)
    shape = tuple(1 if one else size for one, size in zip(shared, (B, N, 11, 7)))
    summed = sums.of_array(call, shape, 4, 2)
    own = {}
    for at, tile in seen(call, summed):
        assert tile not in own
        own[tile] = at
    kind = np.broadcast_to(visits.kinds(call, 4, 2), (B, N, 3, 4))
    assert set(own) == set(zip(*np.nonzero(kind != visits.EMPTY)))
    for (b, n, *place), (own_b, own_n, line) in own.items():
        row, column = divmod(line, summed.shape[1])
        want = [0 if one else x for one, x in zip(shared, (b, n, *place))]
        assert [own_b, own_n, row, column] == want


@pytest.mark.parametrize("bias", [RELATIVE, RELATIVE + ALIBI])
def test_sums_along_diagonals_are_what_laying_numbers_pulls_back(bias):
    call = problem(9, 11, N, bias=bias, mask=Causal(), q_tokens=Tokens(9, start=2))
    summed = sums.of_distances(call, 4, 2)
    moved = draw(5, N, 12, 12)  # that of every pair; what pads has none
    moved[:, 9:], moved[:, :, 11:] = 0, 0
    tiles = np.zeros((N, 4, 2 * summed.shape[1]), np.float32)
    for (_, n, line), (_, _, i, j) in seen(call, summed):
        tiles[n, :, 2 * line : 2 * line + 2] += moved[n, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2]
    found = rules.pulled(call, moving(call), sums.along(jnp.asarray(tiles), 12, 9, 9 + 11 - 1))
    hidden = np.repeat(np.repeat(visits.kinds(call, 4, 2)[0, 0] == visits.EMPTY, 4, 0), 2, 1)
    moved = np.where(hidden, 0, moved)[None, :, :9, :11]

    def logits(rule):
        return rule.logits(biases.queries(call.q_tokens, N), call.k_tokens.as_keys())

    (want,) = jax.vjp(logits, bias)[1](jnp.asarray(moved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, want)


@pytest.mark.parametrize(
    ("bias", "tokens", "text"),
    [
        (jnp.zeros((5, 5)), None, "can run"),
        (BUCKETS + ALIBI, None, "can run"),
        (
            Own(jnp.asarray(draw(1, N))),
            None,
            "all gradients go through the tiles, blockwise, as that of Own is asked for, and it knows more",
        ),
        (
            ALIBI,
            Tokens(5, pos=np.arange(5)[None]),
            "blockwise, as that of Alibi is asked for, and positions are data",
        ),
    ],
)
def test_explain_says_whose_gradient_the_tiles_take(bias, tokens, text, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr("mha_jax.backends.mosaic_gpu._capability", lambda: None)
    call = problem(5, 5, N, bias=bias, q_tokens=tokens, k_tokens=tokens)
    says = choose.reasons(call, "cuda")["mosaic_gpu"]
    assert says == text if text == "can run" else text in says


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
