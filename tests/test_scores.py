"""The reductions of the scores equal those of the whole scores, and hold few rows at a time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

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


def test_reductions_are_exported_for_any_sizes():
    b, t = export.symbolic_shape("b, t", constraints=["t >= 2"])
    kind = jax.ShapeDtypeStruct((b, t, 4, 8), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 8)), jnp.float32)
    for reduce in (mj.scores_mean, mj.scores_max, mj.scores_entropy, partial(mj.scores_top_k, k=2)):

        def scored(x, reduce=reduce):
            return reduce(mj.Call(x, x, x, mask=mj.Causal()))

        got, want = export.export(jax.jit(scored))(kind).call(x), scored(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_no_heads_have_no_scores():
    x = jnp.ones((1, 5, 4, 8))
    for heads in (slice(0, 0), np.zeros(0, int)):
        assert mj.attention_scores(mj.Call(x, x, x), heads=heads).shape == (1, 0, 5, 5)
