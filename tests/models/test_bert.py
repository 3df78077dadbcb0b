"""BERT and ALBERT against their formulas in float64 NumPy."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import ShapeError
from mha_jax.models.bert import Bert, Config, scores

BERT = Config(
    vocabulary=29, positions=13, width=12, num_heads=3, hidden=20, layers=(0, 1), dropout=0.5
)
ALBERT = dataclasses.replace(BERT, embedding=7, layers=(0, 0, 0))
CONFIGS = {"bert": BERT, "albert": ALBERT}
TOKENS = np.random.default_rng(0).integers(1, 29, (2, 11))
SEGMENTS = (np.arange(11) > 4).astype(int)[None].repeat(2, 0)
MASK = np.arange(11)[None] < np.array([[7], [11]])


def make(config):
    """Return the model and parameters, none of them at a symmetric start."""
    model = Bert(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    draw = np.random.default_rng(1).standard_normal
    return model, {"params": jax.tree.map(lambda x: 0.5 * draw(x.shape, np.float32), shapes)}


def run(model, variables, *inputs, **options):
    return jax.jit(partial(model.apply, **options))(variables, *inputs)


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def dense(p, x):
    return np.tensordot(x, p["kernel"], p["kernel"].ndim - p["bias"].ndim) + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(p, x, mask):
    q, k, v = (dense(p[name], x) for name in ("query", "key", "value"))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(logits) * mask[:, None, None, :]
    weights /= weights.sum(-1, keepdims=True)
    return dense(p["attention_output"], np.einsum("bnts,bsnh->btnh", weights, v)), weights


def oracle(config, params):
    """Return the states and the attention scores of all layers."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    p = params["embeddings"]
    x = p["symbols"]["embedding"][TOKENS] + p["positions"]["embedding"][:11]
    x = norm(p["norm"], x + p["segments"]["embedding"][SEGMENTS])
    x = x if config.embedding is None else dense(p["projection"], x)
    states, weights = [x], []
    for i in config.layers:
        p = params[f"layer_{i}"]
        attended, seen = attention(p["attention"], x, MASK)
        x = norm(p["attention_norm"], x + attended)
        x = norm(p["outer_norm"], x + dense(p["outer"], gelu(dense(p["inner"], x))))
        states.append(x)
        weights.append(seen)
    return states, weights


@pytest.mark.parametrize("name", CONFIGS)
def test_states_are_the_formulas(name):
    model, variables = make(CONFIGS[name])
    want, _ = oracle(model.config, variables["params"])
    out, kept = run(model, variables, TOKENS, MASK, SEGMENTS, mutable=["hidden"])
    got = kept["hidden"]["states"]
    assert len(got) == len(want) == len(model.config.layers) + 1
    for ours, theirs in zip(got, want):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(out, got[-1])
    np.testing.assert_array_equal(out, run(model, variables, TOKENS, MASK, SEGMENTS))


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_of_any_layer_and_heads_are_the_formulas(name):
    model, variables = make(CONFIGS[name])
    zeros = jnp.zeros_like(variables["params"]["embeddings"]["segments"]["embedding"])
    variables["params"]["embeddings"]["segments"]["embedding"] = zeros
    _, want = oracle(model.config, variables["params"])
    for layer, heads in ((0, [2]), (1, [2, 0]), (len(want) - 1, range(3))):
        got = scores(model, variables, TOKENS, MASK, layer=layer, heads=heads)
        assert got.shape == (2, len(heads), 11, 11)
        np.testing.assert_allclose(got, want[layer][:, list(heads)], atol=1e-5)


def test_scores_run_under_jit_and_without_a_mask():
    model, variables = make(ALBERT)
    few = partial(scores, model, layer=2, heads=[1])
    got = jax.jit(few)(variables, TOKENS)
    np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(got, few(variables, TOKENS, np.ones_like(MASK)), atol=1e-5)


def test_scores_compute_neither_other_heads_nor_higher_layers():
    """The rest may be NaN."""
    model, variables = make(BERT)
    want = scores(model, variables, TOKENS, MASK, layer=1, heads=[1])
    params = variables["params"]
    params["layer_1"] = jax.tree.map(lambda x: x * np.nan, params["layer_1"]) | {
        "attention": jax.tree.map(lambda x: x.copy(), params["layer_1"]["attention"])
    }
    for name in ("query", "key"):
        params["layer_1"]["attention"][name]["kernel"][:, [0, 2]] = np.nan
    np.testing.assert_array_equal(
        scores(model, variables, TOKENS, MASK, layer=1, heads=[1]), np.asarray(want)
    )


def test_padding_changes_no_bit_of_real_tokens():
    model, variables = make(BERT)
    before = np.asarray(run(model, variables, TOKENS, MASK))
    after = np.asarray(run(model, variables, np.where(MASK, TOKENS, 3), MASK))
    np.testing.assert_array_equal(before[MASK], after[MASK])
    alone = run(model, variables, TOKENS[:1, :7])
    np.testing.assert_allclose(before[:1, :7], alone, atol=1e-5)


def test_albert_has_one_layer_and_a_projection():
    params = make(ALBERT)[1]["params"]
    assert set(params) == {"embeddings", "layer_0"}
    assert params["embeddings"]["symbols"]["embedding"].shape == (29, 7)
    assert params["embeddings"]["projection"]["kernel"].shape == (7, 12)
    assert set(make(BERT)[1]["params"]) == {"embeddings", "layer_0", "layer_1"}


def test_init_makes_parameters_alone():
    assert set(jax.eval_shape(Bert(BERT).init, jax.random.key(0), TOKENS)) == {"params"}


def test_base_has_the_papers_parameters():
    """110 million with the pooler of the paper, whose 590,592 are not here."""
    shapes = jax.eval_shape(Bert().init, jax.random.key(0), TOKENS)["params"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count + 768 * 768 + 768 == 109_482_240


def test_dropout_acts_in_training_only():
    model, variables = make(dataclasses.replace(BERT, layers=(0,)))
    still = run(model, variables, TOKENS)
    train = jax.jit(partial(model.apply, training=True, rngs={"dropout": jax.random.key(3)}))
    moved, again = (train(variables, TOKENS) for _ in range(2))
    assert np.any(np.asarray(still) != np.asarray(moved))
    np.testing.assert_array_equal(moved, again)


def test_every_parameter_has_a_gradient():
    """All but the key biases, which softmax cancels."""
    model, variables = make(dataclasses.replace(ALBERT, layers=(0, 0)))

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, TOKENS, MASK, SEGMENTS)))

    for path, gradient in jax.tree_util.tree_leaves_with_path(
        jax.jit(jax.grad(loss))(variables["params"])
    ):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:
            assert np.abs(gradient).max() > 1e-6, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2, "heads": [0]}, r"layer=2 does not exist: expected one from 0 to 1"),
        ({"layer": -1, "heads": [0]}, r"layer=-1 does not exist"),
        ({"layer": 0, "heads": [0, 3]}, r"heads=\[0, 3\] do not exist: expected .* 0 to 2"),
        ({"layer": 0, "heads": [-1]}, r"heads=\[-1\] do not exist"),
        ({"layer": 0.5, "heads": [0]}, r"layer=0.5 does not exist"),
        ({"layer": 0, "heads": 0}, r"heads=0 do not exist"),
        ({"layer": 0, "heads": [0.5]}, r"heads=\[0.5\] do not exist"),
    ],
)
def test_wrong_layers_and_heads_are_named(options, message):
    model, variables = make(BERT)
    with pytest.raises(ShapeError, match=message):
        scores(model, variables, TOKENS, **options)


def test_a_sequence_longer_than_the_positions_is_refused():
    model, variables = make(BERT)
    with pytest.raises(ShapeError, match=r"\(1, 14\) are longer than the 13 positions.*Shorten"):
        model.apply(variables, np.ones((1, 14), int))
