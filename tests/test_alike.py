"""What holds arrays can be compared: by class, dtypes, shapes and numbers, or one clear error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj

X = jnp.arange(40.0).reshape(1, 5, 2, 4)
MADE = {
    "dense": lambda a: mj.Dense(a > 2),
    "and": lambda a: mj.Causal() & mj.Dense(a > 2),
    "not": lambda a: ~mj.Dense(a > 2),
    "prefix": lambda a: mj.PrefixLM(a.astype(int)),
    "alibi": mj.biases.Alibi,
    "sum": lambda a: mj.biases.Alibi(a) + mj.biases.Buckets(a[:, None]),
    "tokens": lambda a: mj.Tokens(len(a), pos=a.astype(int)),
    "call": lambda a: mj.Call(X, X, X, bias=a),
    "dropout": lambda a: mj.Dropout(jax.random.key(int(a[0])), 0.5),
    "old dropout": lambda a: mj.Dropout(jax.random.PRNGKey(int(a[0])), 0.5),
    "cache": lambda a: dataclasses.replace(mj.Cache.empty(1, 3, 2, 4, 4), count=a.astype(int)),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_values_that_hold_arrays_are_compared_by_them(make):
    numbers, others = np.array([1.0, 3.0, 2.0]), np.array([3.0, 1.0, 2.0])
    for xp in (np, jnp):
        a, b, other, longer = (
            make(xp.asarray(x)) for x in (numbers, numbers, others, [*others, 1.0])
        )
        assert a == b and b == a and (a != b) is False
        assert a != other and other != a and (a == other) is False
        assert isinstance(a, mj.Dropout) or a != longer
        assert a != "text" and a != mj.Causal()
    # What can change, or is on a device, is no key of programs; what holds none is.
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)
    assert hash(mj.Causal() & mj.Window(2, 0)) == hash(mj.Causal() & mj.Window(2, 0))


def test_a_dtype_or_an_array_in_place_of_none_is_a_difference():
    assert mj.Tokens(2) != mj.Tokens(2, pos=np.arange(2))
    assert mj.biases.Alibi(np.ones(2)) != mj.biases.Alibi(np.ones(2, np.float32))
    assert mj.Tokens(2) == mj.Tokens(2) and hash(mj.Tokens(2)) == hash(mj.Tokens(2))


def test_traced_numbers_are_refused_where_they_would_decide():
    @jax.jit
    def equal(a, b):
        assert mj.Dense(a) == mj.Dense(a)
        assert mj.Dense(a) != mj.Dense(a[0])
        return mj.Dense(a) == mj.Dense(b)

    with pytest.raises(mj.ShapeError, match="no numbers to compare"):
        equal(np.ones((2, 2), bool), np.ones((2, 2), bool))
