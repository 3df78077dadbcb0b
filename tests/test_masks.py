"""The mask algebra: every rule against plain NumPy, and `reach` against the rule itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mha_jax as mj
from mha_jax import (
    Causal,
    ChunkedCausal,
    Dense,
    Dilated,
    Full,
    Mask,
    PrefixLM,
    SameSegment,
    ShapeError,
    Tokens,
    ValidKeys,
    ValidQueries,
    Window,
    dot_product_attention,
)
from mha_jax.attention.masks import And, Not, Or, Reach
from mha_jax.attention.tokens import extents

B, N, T, S = 2, 3, 11, 13


def flags(seed, *shape, share=0.6):
    return np.random.default_rng(seed).random(shape) < share


def sides(kind, seed):
    """Return the tokens of both sides: plain, shifted, with every array, or at the ends of int32."""
    r = np.random.default_rng(seed)
    if kind == "plain":
        return Tokens(T), Tokens(S)
    if kind == "shifted":
        return Tokens(T, start=int(r.integers(-5, 9))), Tokens(S, start=int(r.integers(0, 4)))

    if kind == "ends":
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        places = np.array([low, low + 1, low + 2, -7, -1, 0, 3, high - 1, high], np.int32)
        return (Tokens(n, pos=np.sort(r.choice(places, (1, n)), -1)) for n in (T, S))

    def side(length, batch):
        return Tokens(
            length,
            index=r.permutation(length).astype(np.int32)[None],
            pos=np.sort(r.integers(0, 9, (batch, length)), -1).astype(np.int32),
            segment=np.sort(r.integers(-1, 3, (batch, length)), -1).astype(np.int32),
            valid=r.random((batch, length)) < r.choice([0.2, 0.9]),
        )

    return side(T, B), side(S, int(r.choice([1, B])))


def plain(mask, q, k):
    """Say what a mask means, in NumPy and without its own methods: [#B, #N, #T, #S]."""
    qp, kp = (np.asarray(x.positions).astype(np.int64) for x in (q, k))
    qp, kp = qp[:, None, :, None], kp[:, None, None, :]
    if isinstance(mask, And):
        return plain(mask.a, q, k) & plain(mask.b, q, k)
    if isinstance(mask, Or):
        return plain(mask.a, q, k) | plain(mask.b, q, k)
    if isinstance(mask, Not):
        return np.logical_not(plain(mask.a, q, k))
    if isinstance(mask, Causal):
        return kp <= qp
    if isinstance(mask, Window):
        return (qp - mask.left <= kp) & (kp <= qp + mask.right)
    if isinstance(mask, ChunkedCausal):
        return (kp <= qp) & (np.floor(kp / mask.size) == np.floor(qp / mask.size))
    if isinstance(mask, Dilated):
        return np.fmod(kp - qp, mask.step) == 0
    if isinstance(mask, PrefixLM):
        return (kp <= qp) | (kp < np.reshape(mask.lengths, (-1, 1, 1, 1)))
    if isinstance(mask, Dense):
        return np.asarray(mask.array)
    if isinstance(mask, SameSegment):
        a, b = q.segment[:, None, :, None], k.segment[:, None, None, :]
        return (a == b) & (a >= 0)
    if isinstance(mask, ValidKeys) and k.valid is not None:
        return k.valid[:, None, None, :]
    if isinstance(mask, ValidQueries) and q.valid is not None:
        return q.valid[:, None, :, None]
    return np.ones((1, 1, T, S), bool)


def whole(seen):
    seen = np.asarray(seen)
    return np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (B, N, T, S)))


SHAPES = [(1, 1, T, S), (B, 1, T, S), (1, N, T, S), (B, N, T, S), (B, N, T, 1), (1, 1, 1, S)]
PLAIN_RULES = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.just(ValidKeys()),
    st.just(ValidQueries()),
    st.builds(Window, st.integers(-3, 8), st.integers(-3, 8)),
    st.builds(ChunkedCausal, st.integers(1, 7)),
    st.builds(Dilated, st.integers(1, 5)),
    st.builds(PrefixLM, st.integers(0, 9) | st.sampled_from([np.array([2, 7], np.int32)])),
    st.builds(
        lambda shape, seed: Dense(flags(seed, *shape)), st.sampled_from(SHAPES), st.integers(0, 9)
    ),
)


def algebra(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=6,
    )


@st.composite
def expressions(draw):
    kind = draw(st.sampled_from(["plain", "shifted", "arrays", "ends"]))
    q, k = sides(kind, draw(st.integers(0, 99)))
    leaves = PLAIN_RULES if kind != "arrays" else PLAIN_RULES | st.just(SameSegment())
    return draw(algebra(leaves)), q, k


@given(expression=expressions())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_an_expression_means_what_numpy_says(expression):
    mask, q, k = expression
    seen = whole(mask.visible(q.as_queries(), k.as_keys()))
    assert seen.dtype == bool
    np.testing.assert_array_equal(seen, whole(plain(mask, q, k)))


@given(expression=expressions(), block_q=st.integers(1, T + 1), block_k=st.integers(1, S + 1))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_reach_is_sound(expression, block_q, block_k):
    mask, q, k = expression
    seen = whole(plain(mask, q, k))
    rows, columns = -(-T // block_q), -(-S // block_k)
    q_side = jax.tree.map(lambda a: a[:, None, :, None], extents(q.facts(), block_q))
    k_side = jax.tree.map(lambda a: a[:, None, None, :], extents(k.facts(), block_k))
    reach = mask.reach(q_side, k_side)
    some, every = (np.broadcast_to(np.asarray(x), (B, N, rows, columns)) for x in reach)
    assert some.dtype == every.dtype == bool
    for i in range(rows):
        for j in range(columns):
            at = slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
            tile = seen[:, :, at[0], at[1]]
            assert not (tile.any((2, 3)) & ~some[:, :, i, j]).any(), "a visible pair is skipped"
            assert not (~tile.all((2, 3)) & every[:, :, i, j]).any(), "a hidden pair is unmasked"


@pytest.mark.parametrize(
    "mask, live",
    [
        (Causal(), 10),
        (Window(0, 0), 4),
        (Causal() & Window(7, 7), 7),
        (~Causal(), 10),
        (Full(), 16),
    ],
    ids=str,
)
def test_reach_finds_the_empty_tiles(mask, live):
    facts = extents(Tokens(32).facts(), 8)
    q = jax.tree.map(lambda a: a[:, None, :, None], facts)
    k = jax.tree.map(lambda a: a[:, None, None, :], facts)
    assert np.broadcast_to(mask.reach(q, k).some, (1, 1, 4, 4)).sum() == live


@pytest.mark.parametrize("mask, full", [(Causal(), 6), (Window(16, 16), 10), (Full(), 16)], ids=str)
def test_reach_finds_the_full_tiles(mask, full):
    facts = extents(Tokens(32).facts(), 8)
    q = jax.tree.map(lambda a: a[:, None, :, None], facts)
    k = jax.tree.map(lambda a: a[:, None, None, :], facts)
    assert np.broadcast_to(mask.reach(q, k).every, (1, 1, 4, 4)).sum() == full


def test_plain_tokens_are_decided_while_tracing():
    facts = extents(Tokens(32).facts(), 8)
    reach = (Causal() & Window(3, 3) | ~Window(5, 5)).reach(facts, facts)
    assert all(isinstance(x, (np.ndarray, np.bool_)) for x in reach)


def test_a_matrix_keeps_numbers_and_reads_flags_as_truth():
    mask = PrefixLM(np.array([1, 3])) & Dense(np.array([[1, 1, 1, 0]]))
    matrix = mask.matrix(Tokens(2), Tokens(4))[:, 0]
    want = [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]]
    np.testing.assert_array_equal(matrix, np.array(want, bool))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: ChunkedCausal(0),
            r"size of ChunkedCausal must be an integer from 1 to 2147483647: got 0\.",
        ),
        (lambda: ChunkedCausal(2.5), r"size of ChunkedCausal.*got 2\.5\."),
        (lambda: Dilated(-1), r"step of Dilated must be an integer from 1 to .*got -1\."),
        (lambda: Dilated(True), r"step of Dilated.*got True\."),
        (lambda: ChunkedCausal(2**31), r"got 2147483648\..*one without end is Causal"),
    ],
)
def test_sizes_of_rules_are_positive_integers(make, sentence):
    with pytest.raises(ShapeError, match=sentence):
        make()


def test_windows_are_those_of_keras_and_jax():
    w, rows = 3, np.arange(9)
    distance = np.abs(rows[:, None] - rows)
    matrix = Window(w - 1, w - 1).matrix(Tokens(9), Tokens(9))
    np.testing.assert_array_equal(matrix, distance < w)
    q = jnp.zeros((1, 9, 1, 9))
    v = jnp.eye(9)[None, :, None]
    got = jax.nn.dot_product_attention(q, q, v, local_window_size=(4, 1))[0, :, 0] > 0
    np.testing.assert_array_equal(Window(4, 1).matrix(Tokens(9), Tokens(9)), got)


def test_causal_is_top_left_and_start_moves_it():
    np.testing.assert_array_equal(Causal().matrix(Tokens(3), Tokens(5)), np.tri(3, 5))
    np.testing.assert_array_equal(Causal().matrix(Tokens(3, start=2), Tokens(5)), np.tri(3, 5, 2))


def test_a_padding_segment_does_not_see_itself():
    tokens = Tokens(4, segment=np.array([[0, 0, -1, -1]]))
    want = np.zeros((4, 4), bool)
    want[:2, :2] = True
    np.testing.assert_array_equal(SameSegment().matrix(tokens, tokens), want)


def test_matrix_has_batch_and_heads_only_where_they_matter():
    tokens = Tokens(4, valid=flags(0, B, 4))
    assert Causal().matrix(Tokens(3), Tokens(4)).shape == (3, 4)
    assert ValidKeys().matrix(Tokens(3), tokens).shape == (B, 1, 3, 4)


def test_full_is_neutral():
    assert Full() & Causal() == Causal() & Full() == Causal()


def test_masks_are_pytrees_compared_and_hashed_by_their_type():
    mask = Causal() & ~Window(2, 1)
    assert jax.tree.leaves(mask) == []
    assert mask == Causal() & ~Window(2, 1)
    assert hash(mask) == hash(Causal() & ~Window(2, 1))
    assert len(jax.tree.leaves(mask | Dense(flags(0, 1, 1, T, S)))) == 1


def test_changed_mask_values_compile_nothing_new():
    traces = []

    @jax.jit
    def seen(mask, k):
        traces.append(1)
        return mask.visible(Tokens(T).as_queries(), k.as_keys())

    for seed in range(3):
        tokens = Tokens(S, valid=flags(seed, B, S))
        seen(ValidKeys() & Dense(flags(seed, 1, 1, T, S)), tokens)
    assert len(traces) == 1


KEYS, QUERIES = ValidKeys(), ValidQueries()


@pytest.mark.parametrize(
    "mask, keys, queries",
    [
        (Full(), False, False),
        (KEYS, True, False),
        (QUERIES, False, True),
        (KEYS & Causal(), True, False),
        (Causal() & QUERIES & KEYS, True, True),
        (KEYS | Causal(), False, False),
        ((KEYS & Causal()) | (KEYS & Window(1, 1)), True, False),
        (~KEYS, False, False),
        (~~KEYS, False, False),
        (KEYS | QUERIES, False, False),
    ],
    ids=str,
)
def test_what_surely_hides_invalid_tokens(mask, keys, queries):
    assert (mask.hides_invalid_keys, mask.hides_invalid_queries) == (keys, queries)


def test_a_new_mask_needs_only_visible():
    class Even(Mask):
        def visible(self, q, k):
            return k.positions % 2 == 0

    mask = Causal() & Even()
    want = np.tri(4, 5) * (np.arange(5) % 2 == 0)
    np.testing.assert_array_equal(mask.matrix(Tokens(4), Tokens(5)), want)
    facts = extents(Tokens(4).facts(), 2)
    reach = Even().reach(facts, facts)
    assert reach.some and not reach.every


LOW, HIGH = -(2**31), 2**31 - 1
ENDS = np.array([[LOW, LOW + 1, -2, -1, 0, 1, 2, HIGH - 1, HIGH]], np.int32)
SIZES = [0, 1, 2, 2**30, HIGH - 1, HIGH, HIGH + 1, HIGH + 2, 2**32 - 2, 2**32 - 1, 2**32, 2**63]


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_window_is_right_at_the_ends_of_32_bits(xp):
    tokens = Tokens(ENDS.size, pos=xp.asarray(ENDS))
    facts = extents(tokens.facts(), 1)
    ahead = ENDS.astype(object) - ENDS.astype(object).T  # Python's integers have no end
    for size in (*SIZES, *(-x for x in SIZES)):
        for mask, want in (
            (Window(size, 2**40), ahead >= -size),
            (Window(2**40, size), ahead <= size),
        ):
            np.testing.assert_array_equal(mask.matrix(tokens, tokens), want.astype(bool), str(mask))
            q, k = (jax.tree.map(lambda a, s=s: a.reshape(s), facts) for s in ((-1, 1), (1, -1)))
            some, every = mask.reach(q, k)
            assert not (want.astype(bool) & ~np.asarray(some)).any()
            np.testing.assert_array_equal(every, want.astype(bool), str(mask))


def test_a_mask_takes_an_array_on_either_side():
    array = flags(0, T, S)
    tokens = Tokens(T), Tokens(S)
    for xp in (np, jnp):
        a = xp.asarray(array)
        for both in (Causal() & a, a & Causal()):
            np.testing.assert_array_equal(both.matrix(*tokens), array & np.tri(T, S, dtype=bool))
        for either in (Window(0, 0) | a, a | Window(0, 0)):
            np.testing.assert_array_equal(either.matrix(*tokens), array | np.eye(T, S, dtype=bool))
    np.testing.assert_array_equal((~Dense(array.astype(int))).matrix(*tokens), ~array)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8])
def test_integers_mean_what_booleans_do_traced_or_not(dtype):
    array = flags(0, T, S).astype(dtype)
    q, k = jnp.ones((1, T, 1, 2)), jnp.ones((1, S, 1, 2))
    v = jnp.eye(S)[None, :, None]
    for run in (dot_product_attention, jax.jit(dot_product_attention)):
        seen = run(q, k, v, mask=jnp.asarray(array))[0, :, 0] > 0
        np.testing.assert_array_equal(seen, array == 1)


def test_traced_integers_that_are_no_truth_values_hide():
    q = jnp.ones((1, 2, 1, 2))
    additive = jnp.array([[0, -10000], [0, 2]])
    out = jax.jit(dot_product_attention)(q, q, q, mask=additive)
    np.testing.assert_array_equal(out, 0)


def test_the_base_class_has_no_rule():
    with pytest.raises(NotImplementedError):
        Mask().visible(Tokens(1).as_queries(), Tokens(1).as_keys())


def test_reach_combines_as_its_masks_do():
    yes, no, maybe = (Reach(*map(np.bool_, x)) for x in ((1, 1), (0, 0), (1, 0)))
    assert yes & no == no and yes & maybe == maybe and no | maybe == maybe and yes | maybe == yes
    assert ~yes == no and ~no == yes and ~maybe == maybe


def test_masks_biases_tokens_and_dropout_are_printed_without_their_numbers():
    table, valid = np.ones((8, 2), np.float32), np.ones((1, 50), bool)
    for value, text in (
        (Causal() & Dense(np.ones((50, 50), bool)), "And(a=Causal(), b=Dense(array=bool[50,50]))"),
        (~Window(3, 0), "Not(a=Window(left=3, right=0))"),
        (mj.PrefixLM(jnp.arange(2)), "PrefixLM(lengths=[0, 1])"),
        (mj.biases.Alibi(np.ones(50, np.float32)), "Alibi(slopes=float32[50])"),
        (mj.biases.Buckets(table, max_distance=9), "Buckets(table=float32[8,2], max_distance=9)"),
        (mj.Tokens(50, valid=valid), "Tokens(length=50, valid=bool[1,50])"),
        (mj.Dropout(jax.random.key(0), 0.5), "Dropout(key=key<fry>[], rate=0.5)"),
    ):
        assert repr(value) == text
