"""Attention axes: fold, unfold, masks, against explicit transposes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_jax import ShapeError
from mha_jax.layer.axes import Folding, fold_mask, foldings, resolve, unfold_scores


@pytest.mark.parametrize(
    "axes, rank, want",
    [
        (None, 3, (1,)),
        (None, 4, (1, 2)),
        (None, 5, (1, 2, 3)),
        (None, 2, (0,)),
        ((1,), 3, (1,)),
        ((-2,), 3, (1,)),
        ((-2,), 4, (2,)),
        ((-3, -2), 4, (1, 2)),
        ((2, 1), 4, (2, 1)),
        ((0,), 3, (0,)),
        ((-3,), 4, (1,)),
    ],
)
def test_axes_count_on_the_input_with_its_features(axes, rank, want):
    assert resolve(axes, rank) == want


@pytest.mark.parametrize("axes", [(3,), (-1,), (7,), (-5,), (1, 1), (1, -3), ()])
def test_impossible_axes_are_refused(axes):
    with pytest.raises(ShapeError, match="attention_axes="):
        resolve(axes, 4)


@st.composite
def folds(draw):
    rank = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=rank, max_size=rank)))
    order = draw(st.permutations(range(rank)))
    return Folding(shape, tuple(order[: draw(st.integers(1, rank))]))


@given(folding=folds(), rest=st.sampled_from([(), (2,), (3, 2)]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_unfold_undoes_fold(folding, rest):
    x = np.arange(np.prod(folding.shape + rest)).reshape(folding.shape + rest)
    folded = folding.fold(jnp.asarray(x))
    assert folded.shape == (int(np.prod(folding.batch)), folding.length, *rest)
    np.testing.assert_array_equal(folding.unfold(folded), x)


@given(folding=folds())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_folded_order_is_row_major_in_the_order_given(folding):
    x = np.arange(np.prod(folding.shape)).reshape(folding.shape)
    folded = np.asarray(folding.fold(jnp.asarray(x)))
    batches = list(np.ndindex(*folding.batch))
    for b, batch in enumerate(batches):
        for t, place in enumerate(np.ndindex(*folding.extent)):
            at = dict(zip(folding.batch_axes, batch)) | dict(zip(folding.attended, place))
            assert folded[b, t] == x[tuple(at[axis] for axis in range(len(folding.shape)))]


def test_flags_broadcast_from_the_right():
    folding = Folding((2, 3, 5), (1,))
    flags = np.array([True, False, True, True, False])
    want = np.broadcast_to(flags[None, :, None], (2, 5, 3)).reshape(10, 3)
    np.testing.assert_array_equal(folding.fold_flags("value_mask", flags), want)


QUERY, KEY, HEADS = Folding((2, 3, 5), (1, 2)), Folding((2, 7, 5), (1, 2)), 4
FULL = (2, HEADS, 3, 5, 7, 5)


@pytest.mark.parametrize(
    "shape, folded",
    [
        ((3, 5, 7, 5), (1, 1, 15, 35)),
        ((2, 3, 5, 7, 5), (2, 1, 15, 35)),
        ((1, 3, 5, 7, 5), (1, 1, 15, 35)),
        ((2, 4, 3, 5, 7, 5), (2, 4, 15, 35)),
        ((1, 4, 3, 5, 7, 5), (1, 4, 15, 35)),
        ((2, 1, 3, 5, 7, 5), (2, 1, 15, 35)),
        ((3, 5, 1, 1), (1, 1, 15, 1)),
        ((1, 1, 7, 5), (1, 1, 1, 35)),
        ((3, 1, 7, 1), (1, 1, 15, 35)),
    ],
)
def test_every_broadcast_form_of_a_mask(shape, folded):
    mask = np.random.default_rng(0).random(shape) < 0.5
    got = fold_mask(jnp.asarray(mask), QUERY, KEY, HEADS)
    assert got.shape == folded
    head = mask.shape[: mask.ndim - 4]
    full = mask.reshape(*head, *(1,) * (2 - len(head)), *mask.shape[-4:])
    want = np.broadcast_to(full, FULL).reshape(2, HEADS, 15, 35)
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


@pytest.mark.parametrize("shape", [(5, 7, 5), (3, 5, 7, 6), (3, 3, 5, 7, 5), (2, 3, 3, 5, 7, 5)])
def test_masks_that_do_not_fit_are_refused(shape):
    with pytest.raises(ShapeError, match="attention_mask of shape"):
        fold_mask(jnp.ones(shape, bool), QUERY, KEY, HEADS)


def test_two_batch_axes():
    query, key = Folding((2, 3, 5), (1,)), Folding((2, 7, 5), (1,))
    mask = np.random.default_rng(0).random((2, 5, HEADS, 3, 7)) < 0.5
    got = fold_mask(jnp.asarray(mask), query, key, HEADS)
    np.testing.assert_array_equal(got, mask.reshape(10, HEADS, 3, 7))


def test_scores_are_laid_out_as_in_keras():
    scores = jnp.zeros((2, HEADS, 15, 35))
    assert unfold_scores(scores, QUERY, KEY).shape == FULL


def test_foldings_agree_on_the_batch():
    query, value = jnp.zeros((2, 3, 5, 8)), jnp.zeros((2, 7, 5, 9))
    q, k = foldings(query, value, (1,))
    assert (q.batch, q.extent, k.extent) == ((2, 5), (3,), (7,))
    with pytest.raises(ShapeError, match="agree on the axes that are not attended"):
        foldings(query, value, (2,))
    with pytest.raises(ShapeError, match="Name every axis along which they may differ"):
        foldings(query, jnp.zeros((4, 7, 5, 9)), (1,))
    with pytest.raises(
        ShapeError, match=r"Repeat what stands once along an axis: jnp\.broadcast_to"
    ):
        foldings(query, value[:1], (1,))
    with pytest.raises(ShapeError, match="same rank"):
        foldings(query, value[0], (1,))
