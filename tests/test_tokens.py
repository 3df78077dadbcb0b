"""Tokens: rows, positions, slices, intervals, and the silencing of what is not valid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mha_jax as mj
from mha_jax import ShapeError, Tokens
from mha_jax.attention.tokens import extents, zero_invalid

ARRAYS = ("index", "pos", "segment", "valid")


def full(length=7, start=0, seed=0):
    r = np.random.default_rng(seed)
    integers = {name: r.integers(-3, 9, (2, length)).astype(np.int32) for name in ARRAYS[:3]}
    return Tokens(length, start, **integers, valid=r.random((2, length)) < 0.5)


def test_a_plain_sequence_has_no_arrays():
    tokens = Tokens(5, start=3)
    assert jax.tree.leaves(tokens) == []
    assert isinstance(tokens.rows, np.ndarray)
    assert tokens.rows.dtype == np.int32
    assert tokens.rows.tolist() == tokens.positions.tolist() == [[3, 4, 5, 6, 7]]


def test_rows_are_the_index_and_positions_the_rows_unless_given():
    index, pos = np.array([[5, 2]]), np.array([[0, 9]])
    assert Tokens(2, index=index).positions is index
    assert Tokens(2, index=index, pos=pos).rows is index
    assert Tokens(2, index=index, pos=pos).positions is pos


def test_tokens_are_a_pytree_whose_length_and_start_are_static():
    tokens = full()
    leaves, tree = jax.tree.flatten(tokens)
    assert len(leaves) == 4
    again = jax.tree.unflatten(tree, leaves)
    assert (again.length, again.start) == (7, 0)
    out = jax.jit(lambda t: t.rows + jnp.int32(t.length))(tokens)
    np.testing.assert_array_equal(out, tokens.rows + 7)


@given(
    length=st.integers(1, 12),
    start=st.integers(-4, 30),
    plain=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_cut_has_the_facts_of_its_tokens(length, start, plain, data):
    tokens = Tokens(length, start) if plain else full(length, start)
    first = data.draw(st.integers(0, length))
    size = data.draw(st.integers(0, length - first))
    cut = tokens.cut(first, size)
    assert cut.length == size
    for whole, part in zip(tokens.facts(), cut.facts()):
        assert (whole is None) == (part is None)
        if whole is not None:
            np.testing.assert_array_equal(part, whole[:, first : first + size])


def test_facts_broadcast_against_each_other():
    tokens = full()
    assert {a.shape for a in tokens.as_queries() if a is not None} == {(2, 1, 7, 1)}
    assert {a.shape for a in tokens.as_keys() if a is not None} == {(2, 1, 1, 7)}
    assert Tokens(7).as_keys().segment is None


@given(length=st.integers(1, 40), size=st.integers(1, 17))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_extents_are_the_extremes_of_every_block(length, size):
    facts = full(length).facts()
    blocks = range(0, length, size)
    for a, extent in zip(facts, extents(facts, size)):
        if a is None:  # tokens by themselves have no head
            assert extent is None
            continue
        low, high = extent
        assert isinstance(low, np.ndarray)
        np.testing.assert_array_equal(low, np.stack([a[:, i : i + size].min(1) for i in blocks], 1))
        np.testing.assert_array_equal(
            high, np.stack([a[:, i : i + size].max(1) for i in blocks], 1)
        )


def test_extents_of_traced_facts_are_those_of_numpy():
    facts = full(11).facts()
    traced = jax.jit(lambda f: extents(f, 4))(facts)
    for want, got in zip(jax.tree.leaves(extents(facts, 4)), jax.tree.leaves(traced)):
        np.testing.assert_array_equal(got, want)


def test_extents_keep_what_is_not_known():
    assert extents(Tokens(5).facts(), 2).segment is None


def test_zero_invalid_zeroes_what_is_not_valid_and_its_gradient():
    valid = np.array([[True, False, True]])
    x = jnp.array([[[1.0, 2.0], [jnp.nan, jnp.inf], [3.0, 4.0]]])
    tokens = Tokens(3, valid=valid)
    out, vjp = jax.vjp(lambda x: zero_invalid(x, tokens), x)
    np.testing.assert_array_equal(out, [[[1, 2], [0, 0], [3, 4]]])
    (dx,) = vjp(jnp.full_like(out, 5))
    np.testing.assert_array_equal(dx, [[[5, 5], [0, 0], [5, 5]]])


def test_zero_invalid_without_validity_returns_the_same_array():
    x = jnp.ones((1, 3, 2))
    assert zero_invalid(x, Tokens(3)) is x


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zero_invalid_keeps_the_dtype(dtype):
    out = zero_invalid(jnp.ones((1, 2, 3, 4), dtype), Tokens(2, valid=np.array([[True, False]])))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[:, 1], 0)


@given(ids=st.lists(st.integers(-1, 3), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_packed_positions_restart_with_every_sequence(ids):
    want, last = [], None
    for x in ids:
        want.append(want[-1] + 1 if x == last else 0)
        last = x
    for array in (np.array([ids]), jnp.array([ids], jnp.int32)):
        tokens = Tokens.packed(array)
        assert isinstance(tokens.positions, type(array))
        assert tokens.positions.dtype == np.int32
        assert tokens.positions.tolist() == [want]
        assert tokens.segment is array


def test_packed_takes_integers():
    with pytest.raises(ShapeError, match=r"got float32\[1, 2\].*\[\*B, L\]"):
        Tokens.packed(np.ones((1, 2), np.float32))


FEW_BITS = {
    "start": lambda n: Tokens(n(6), start=n(125)).rows,
    "start of a call": lambda n: (
        mj.attend(mj.Call(ONES, ONES, ONES, Tokens(n(6), start=n(125)), mask=mj.Causal())).lse
    ),
    "chunk": lambda n: mj.ChunkedCausal(n(103)).matrix(Tokens(6, start=100), Tokens(6, start=100)),
    "gap": lambda n: mj.Dilated(n(103)).matrix(Tokens(6, start=-200), Tokens(6, start=200)),
    "buckets": lambda n: mj.biases.Buckets(TABLE, True, n(100)).matrix(Tokens(6), Tokens(6), 2),
    "axes of a bias": lambda n: mj.biases.Relative(TABLE, (n(100), n(2))).matrix(
        Tokens(200), Tokens(200), 2
    ),
    "axes of rotary": lambda n: mj.Rotary(axes=(n(3), n(20), n(20)))(
        np.ones((1, 1200, 1, 12), np.float32), np.arange(1200, dtype=np.int32)
    ),
}
ONES = np.ones((1, 6, 2, 4), np.float32)
TABLE = np.arange(199 * 3 * 2, dtype=np.float32).reshape(-1, 2)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int64])
@pytest.mark.parametrize("name", FEW_BITS)
def test_a_setting_of_few_bits_is_a_number_like_any_other(name, kind):
    np.testing.assert_array_equal(FEW_BITS[name](kind), FEW_BITS[name](int))
