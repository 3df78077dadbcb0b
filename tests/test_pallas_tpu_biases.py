"""Biases by rule inside the Mosaic kernels, interpreted, against the oracle and the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import mha_jax as mj
from mha_jax import Call, Causal, Dropout, SameSegment, Tokens, Window, biases
from mha_jax.attention.call import Output
from mha_jax.attention.check import check
from mha_jax.backends.pallas_tpu import diagonals, rules
from mha_jax.backends.pallas_tpu.patterns import Blocks
from mha_jax.backends.reference import Reference
from tests import oracles
from tests.test_biases import D_LSE, D_OUT, KEYS, RULES, VALUES, Q, call_of, draw, visible
from tests.test_pallas_tpu import COARSE, SMALL, interpreted

NAMES = {rule.name: rule for rule in RULES}
EPSILON = np.finfo(np.float32).eps


def both_passes(backend, call, d_out, d_lse):
    """Return out, lse and all gradients of a call as a flat list, compiled in haste."""
    call = check(call)
    assert backend.why_not(call, "tpu") is None

    def run(call):
        state = backend.forward(call)
        seen = state.l != 0
        lse = jnp.where(seen, state.m + jnp.log(jnp.where(seen, state.l, 1)), -jnp.inf)
        return (
            state.out,
            lse,
            backend.cotangent(call, state, Output(d_out, jnp.where(seen, d_lse, 0))),
        )

    options = {"xla_backend_optimization_level": 0}
    return jax.jit(run).lower(call).compile(compiler_options=options)(call)


@pytest.mark.parametrize("name", ["alibi", "alibi_packed", "buckets_shifted", "relative"])
def test_the_kernels_agree_with_the_oracle(name):
    rule = NAMES[name]
    out, lse, moves = both_passes(SMALL, call_of(rule), jnp.asarray(D_OUT), jnp.asarray(D_LSE))
    options = {"visible": visible(rule), "bias": rule.dense()}
    want, want_lse, _ = oracles.attention(Q, KEYS, VALUES, **options)
    d_lse = np.where(np.isinf(want_lse), 0, D_LSE)
    *wanted, dx = oracles.gradients(Q, KEYS, VALUES, D_OUT, d_lse, **options)
    assert oracles.relative_error(out, want) <= 4 * EPSILON
    assert oracles.relative_error(lse, want_lse) <= 4 * EPSILON
    for got, true in zip(moves[:3], wanted, strict=True):
        assert oracles.relative_error(got, true) <= 8 * EPSILON
    d_table = np.atleast_2d(jax.tree.leaves(moves.bias_rule)[0])
    sums = np.abs(dx * rule.factor[:, None]).sum()
    oracles.assert_close(d_table, rule.gradient(dx), EPSILON * sums)


def operations(ahead, same):
    """Return floats made of a distance by every operation that the kernels know."""
    x, few = ahead.astype(jnp.float32) / 8, jnp.abs(ahead)
    near, floats = ahead % 7 > 3, lambda a: a.astype(jnp.float32)
    return [
        jnp.abs(x) - x**3 / 4096 + jnp.square(x) / 64,
        jnp.cos(x) + jnp.sin(x) + jnp.tanh(x),
        jnp.exp(-jnp.abs(x)) + jnp.exp2(-jnp.abs(x)) + jnp.log(1 + jnp.abs(x)),
        jnp.sqrt(1 + jnp.abs(x)) + lax.rsqrt(1 + jnp.abs(x)) + 1 / (1 + jnp.abs(x)),
        jnp.sign(x) + x % 3 + floats(jnp.sign(ahead) + lax.rem(ahead, np.int32(5)) + ahead // 7),
        jnp.clip(x, -2, 2) + floats(jnp.maximum(ahead, -9)) / 8 + floats(jnp.minimum(few, 9)),
        jnp.where((near & same) | ~near ^ same, 1.0, -1.0) + floats(few // 3 <= 4),
        floats((ahead & 3) + (ahead ^ 5) - (ahead | 2) + ~ahead) / 64,
        jnp.where(jnp.where(ahead == 3, same, ahead != 5), 0.5, floats(x.astype(jnp.int32)) / 64),
    ]


@biases.pytree
class EveryOperation(biases.Bias):
    """A rule of a user's own of what the kernels compute pair by pair, and of nothing that they do not."""

    weights: object  # of operations
    scale: object

    def logits(self, q, k):
        made = operations(q.positions - k.positions, q.segment == k.segment)
        weighed = sum(w * x for w, x in zip(jnp.asarray(self.weights), made, strict=True))
        return weighed * jnp.asarray(self.scale)[q.head]


@biases.pytree
class Sides(biases.Bias):
    """Numbers of queries and of keys, of both, and of all pairs."""

    queries: object
    keys: object
    both: object

    def logits(self, q, k):
        queries, keys = (jnp.asarray(x) for x in (self.queries, self.keys))
        product = queries[q.rows % 5] * jnp.asarray(self.both) * keys[k.rows % 7]
        return product + jnp.where(k.rows > q.rows, keys[k.rows % 7], jnp.asarray(self.both))


def packed(length):
    ids = np.sort(np.random.default_rng(3).integers(0, 4, (2, length)), 1)
    tokens = Tokens.packed(jnp.asarray(ids))
    return {"q_tokens": tokens, "k_tokens": tokens}


def buckets(heads):
    return biases.Buckets(jnp.asarray(draw(6, 12, heads)), True, 21)


@dataclasses.dataclass(frozen=True)
class Long:
    """A call of several tiles, chunks of queries and heads that share keys."""

    name: str
    lengths: tuple[int, int]
    heads: tuple[int, int]
    options: dict

    def call(self):
        (t, s), (n, kv) = self.lengths, self.heads
        arrays = draw(1, 2, t, n, 8), draw(2, 2, s, kv, 8), draw(3, 2, s, kv, 5)
        return Call(*map(jnp.asarray, arrays), **self.options)


ALIBI = biases.Alibi(jnp.abs(draw(7, 2)))
CASES = [
    Long("shared_keys", (300, 200), (4, 2), {"bias": buckets(4), "mask": Causal()}),
    Long(
        *("sum_capped_dropped", (200, 300), (2, 2)),
        {
            "bias": buckets(2) + ALIBI,
            "logit_cap": 2.0,
            "dropout": Dropout(jax.random.key(0), 0.2),
        },
    ),
    Long(
        *("beside_an_array_of_keys", (389, 130), (2, 1)),
        {
            "bias": buckets(2) + biases.Array(draw(8, 2, 2, 1, 130)),
            "q_tokens": Tokens(389, start=-259),
            "mask": Causal(),
        },
    ),
    Long(
        *("beside_an_array_of_queries", (389, 130), (2, 1)),
        {"bias": buckets(2) + biases.Array(draw(8, 2, 2, 389, 1))},
    ),
    # Pair by pair, what data say of positions and segments among what is read.
    Long(
        *("packed_shared_keys", (300, 300), (4, 2)),
        {
            "bias": biases.Alibi(jnp.abs(draw(7, 4))),
            "mask": Causal() & SameSegment(),
            **packed(300),
        },
    ),
    Long(
        *("every_operation", (270, 270), (2, 2)),
        {"bias": EveryOperation(draw(4, 9) / 9, draw(5, 2)), "mask": Causal(), **packed(270)},
    ),
    Long(
        *("beside_what_is_laid", (389, 300), (2, 1)),
        {
            "bias": Sides(*(jnp.asarray(draw(n, n)) for n in (5, 7)), jnp.float32(0.3))
            + buckets(2)
            + biases.Array(draw(8, 2, 2, 1, 300)),
            "mask": Window(99, 40),
            "logit_cap": 2.0,
            "dropout": Dropout(jax.random.key(0), 0.2),
        },
    ),
    Long("beside_all_pairs", (150, 130), (2, 1), {"bias": ALIBI + biases.Array(draw(8, 150, 130))}),
    # A step of decoding: one query, whatever the rule reads and wherever its token is.
    Long(
        *("one_query", (1, 130), (2, 1)),
        {
            "bias": ALIBI + biases.Relative(jnp.asarray(draw(9, 9 * 13, 2)), (5, 7)),
            "q_tokens": Tokens(1, index=np.array([[70]], np.int32)),
            "mask": Causal(),
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tiles_chunks_and_heads_agree_with_the_definition(case):
    call = case.call()
    b, t, n, _ = call.q.shape
    d_out, d_lse = jnp.asarray(draw(4, b, t, n, 5)), jnp.asarray(draw(5, b, n, t))
    own, plain = (both_passes(x, call, d_out, d_lse) for x in (SMALL, Reference()))
    jax.tree.map(lambda a, b: oracles.assert_close(a, b, 3e-5 * np.abs(b).max()), own, plain)


def test_grains_and_parts_of_tiles_agree_with_the_definition():
    call = CASES[0].call()
    d_out, d_lse = jnp.asarray(draw(4, 2, 300, 4, 5)), jnp.asarray(draw(5, 2, 4, 300))
    own, plain = (both_passes(x, call, d_out, d_lse) for x in (COARSE, Reference()))
    jax.tree.map(lambda a, b: oracles.assert_close(a, b, 3e-5 * np.abs(b).max()), own, plain)


def test_heights_that_are_no_whole_squares_are_not_taken():
    backend = interpreted(Blocks(rows=256, columns=128, sweep=(192, 64)))
    x = jnp.zeros((1, 300, 2, 8), jnp.bfloat16)
    problem = check(Call(x, x, x, bias=ALIBI))
    assert backend.sizes.lay(problem, "q").sweep == (256,)
    assert backend.sizes.lay(dataclasses.replace(problem, bias_rule=None), "q").sweep == (192, 64)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (384, 256)])
def test_diagonals_are_laid_and_summed(height, width):
    line, part = draw(1, 1, height + width), draw(2, height, width)

    def kernel(line, part, laid, sums):
        laid[...] = diagonals.spread(line[...], height, width)
        sums[...] = diagonals.summed(part[...])

    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (part, line)]
    laid, sums = pl.pallas_call(kernel, shapes, interpret=True)(line, part)
    i, j = np.indices(part.shape)
    np.testing.assert_array_equal(laid, line[0][j - i + height])
    want = np.zeros(height + width)
    np.add.at(want, j - i + height, part)
    np.testing.assert_allclose(sums[0], want, atol=1e-4)


def test_tables_are_mapped_and_differentiated_twice():
    x, table = jnp.asarray(draw(1, 1, 9, 2, 4)), jnp.asarray(draw(6, 12, 2))
    tables = jnp.stack([table, 2 * table])

    def loss(table, backend):
        bias = biases.Buckets(table, True, 21)
        out = mj.dot_product_attention(x, x, x, bias=bias, mask=Causal(), backend=backend)
        return (out**3).sum()

    def derivatives(backend):
        mapped = jax.vmap(jax.grad(loss), (0, None))(tables, backend)
        return mapped, jax.grad(lambda t: (jax.grad(loss)(t, backend) ** 2).sum())(table)

    own, plain = (jax.jit(derivatives, static_argnums=0)(x) for x in (SMALL, Reference()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), own, plain)


def test_a_sum_of_distances_is_one_of_distances():
    class Own(biases.OfDistance):
        def at(self, distance, head):
            return jnp.where(distance == 0, 1.0, 0.0)

    heads = biases.OfHeads(ALIBI, np.array([1, 0]))
    assert (heads + Own()).only_distances
    assert not (ALIBI + biases.Relative(jnp.zeros((9, 2)), (2, 2))).only_distances
    distances, numbers = np.arange(-3, 4)[None], np.arange(2)[:, None]
    want = -np.abs(distances) * np.asarray(ALIBI.slopes)[::-1, None] + (distances == 0)
    np.testing.assert_allclose((heads + Own()).at(distances, numbers), want, rtol=1e-6)


@biases.pytree
class Narrow(biases.Bias):
    def logits(self, q, k):
        return (q.rows.astype(jnp.int16) + k.rows.astype(jnp.int16)).astype(jnp.float32)


@biases.pytree
class Held(biases.Bias):
    pairs: object

    def logits(self, q, k):
        return jnp.where(q.rows > k.rows, self.pairs, 0.0)


@pytest.mark.parametrize(
    ("bias", "tokens", "says"),
    [
        (
            biases.Relative(np.zeros((9, 2)), (2, 2)) + ALIBI,
            None,
            "Relative takes 'gather'; along the diagonals it cannot be laid, as it knows more than dist",
        ),
        (
            buckets(2),
            Tokens(5, pos=np.arange(5)[None]),
            "Buckets takes 'gather'; along the diagonals it cannot be laid, as positions are data; tiles",
        ),
        (Narrow(), None, "and Narrow takes 'add' of int16"),
        (Held(np.ones((1, 1, 5, 5), np.float32)), None, "and Held takes an array of T x S; along"),
        (ALIBI, Tokens(5, pos=np.arange(5)[None]), "can run"),
        (ALIBI, None, "can run"),
    ],
)
def test_explain_says_what_its_kernels_add(bias, tokens, says):
    x = np.ones((1, 5, 2, 4), np.float32)
    assert says in mj.explain(Call(x, x, x, tokens, tokens, bias=bias), "tpu")["pallas_tpu"]


def test_more_distances_than_are_held_are_computed_where_they_are_arithmetic():
    x = jax.ShapeDtypeStruct((1, rules.MOST // 2 + 1, 2, 8), jnp.float32)
    assert mj.explain(Call(x, x, x, bias=ALIBI), "tpu")["pallas_tpu"] == "can run"
    says = mj.explain(Call(x, x, x, bias=buckets(2)), "tpu")["pallas_tpu"]
    assert f"as {rules.MOST} distances are held, and here are {rules.MOST + 2}; tiles" in says


def test_long_sequences_are_computed_pair_by_pair_too(monkeypatch):
    call = CASES[0].call()
    call = dataclasses.replace(call, bias=biases.Alibi(jnp.abs(draw(7, 4))))
    d_out, d_lse = jnp.asarray(draw(4, 2, 300, 4, 5)), jnp.asarray(draw(5, 2, 4, 300))
    laid = both_passes(SMALL, call, d_out, d_lse)
    monkeypatch.setattr(rules, "MOST", 499)
    own = both_passes(SMALL, call, d_out, d_lse)
    jax.tree.map(lambda a, b: oracles.assert_close(a, b, 3e-5 * np.abs(b).max()), own, laid)


@pytest.mark.parametrize("name", ["alibi", "buckets_shifted"])
def test_a_part_of_the_keys_whose_places_are_data(name):
    rule = NAMES[name]
    problem = check(call_of(rule))
    start, length = problem.q_tokens.start, Q.shape[1]
    index = jnp.arange(start, start + length, dtype=jnp.int32)[None]
    placed = dataclasses.replace(problem, q_tokens=Tokens(length, index=index))
    assert (rules.why_not(placed) is None) == (name == "alibi")
    state = SMALL.forward(placed)
    want, _, _ = oracles.attention(Q, KEYS, VALUES, visible=visible(rule), bias=rule.dense())
    oracles.assert_close(state.out, want, 1e-5)
    zeros = jnp.zeros_like(state.l)
    moves, plain = (
        backend.cotangent(placed, state, Output(jnp.asarray(D_OUT), zeros))
        for backend in (SMALL, Reference())
    )
    jax.tree.map(lambda a, b: oracles.assert_close(a, b, 2e-5 * np.abs(b).max()), moves, plain)
