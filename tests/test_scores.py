"""The reductions of the scores equal those of the whole scores, and hold few rows at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax.attention import scores as summaries
from tests.cases import CASES

NAMES = ["valid_both_causal", "packed_causal", "dense_per_head", "bias_dense", "many_query_heads"]
SOME = [case for case in CASES if case.name in NAMES]


def entropy(scores):
    logs = np.log(scores, where=scores > 0, out=np.zeros_like(scores))
    return -(scores * logs).sum(-1)


@pytest.mark.parametrize("held", [2**20, 2 * 6 * 53 * 5])  # all rows at once; five at a time
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_reductions_are_those_of_the_scores(case, held, monkeypatch):
    monkeypatch.setattr(summaries, "_HELD", held)
    call = dataclasses.replace(case.call(), dropout=None)
    scores = np.asarray(mj.attention_scores(call), np.float64)
    np.testing.assert_allclose(mj.scores_mean(call), scores.mean(1), atol=1e-6)
    np.testing.assert_allclose(mj.scores_max(call), scores.max(-1), atol=1e-6)
    np.testing.assert_allclose(mj.scores_entropy(call), entropy(scores), atol=1e-5)
    largest, keys = mj.scores_top_k(call, 3)
    np.testing.assert_allclose(largest, -np.sort(-scores, -1)[..., :3], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(scores, np.asarray(keys), -1), largest, atol=1e-6)


def test_no_array_of_all_scores_is_made():
    x = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    for reduction in (mj.scores_max, mj.scores_entropy):
        lowered = jax.jit(lambda x, f=reduction: f(mj.Call(x, x, x, mask=mj.Causal()))).lower(x)
        temporary = lowered.compile().memory_analysis().temp_size_in_bytes
        assert temporary < 2 * 4096 * 4096 * 4 / 4, f"{temporary:,} bytes"


def test_too_many_keys_are_refused():
    x = jnp.ones((1, 5, 2, 4))
    with pytest.raises(mj.ShapeError, match=r"k=6 largest scores of 5 keys.*from 1 to S"):
        mj.scores_top_k(mj.Call(x, x, x), 6)
