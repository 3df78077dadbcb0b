"""The models are what the paper draws: shapes, parameter counts, masks, and scores on request."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.errors import ShapeError
from mha_jax.models.transformer import (
    Config,
    Encoder,
    ImageClassifier,
    LanguageModel,
    Transformer,
    sinusoids,
)

SMALL = Config(
    width=12, num_heads=3, hidden=20, encoder_layers=1, decoder_layers=1, norm_first=True
)
KEY = jax.random.key(0)


def make(model, *inputs):
    """Draw parameters, none of them at a symmetric start."""
    shapes = jax.eval_shape(model.init, KEY, *inputs)["params"]
    draw = np.random.default_rng(1).standard_normal
    return {"params": jax.tree.map(lambda x: 0.3 * draw(x.shape, np.float32), shapes)}


def run(model, variables, *inputs, **options):
    """Apply a model as one compiled program; keyword options are static."""
    return jax.jit(partial(model.apply, **options))(variables, *inputs)


@pytest.fixture(scope="module")
def translator():
    model = Transformer(17, 13, SMALL)
    source = jax.random.randint(KEY, (2, 7), 1, 13)
    target = jax.random.randint(KEY, (2, 5), 1, 17)
    return model, make(model, source, target), source, target


def count(variables) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"]))


def test_paper_base_has_the_papers_parameters():
    """Table 3 gives 65 million for a shared vocabulary of 37,000; the sum written out agrees."""
    model, tokens = Transformer(37_000), jnp.ones((1, 3), int)
    variables = jax.eval_shape(model.init, KEY, tokens, tokens)
    d, hidden = 512, 2048
    attention = 4 * (d * d + d)
    feed_forward = d * hidden + hidden + hidden * d + d
    norm = 2 * d
    encoder = 6 * (attention + feed_forward + 2 * norm)
    decoder = 6 * (2 * attention + feed_forward + 3 * norm)
    assert count(variables) == 37_000 * d + encoder + decoder
    assert round(count(variables) / 1e6) in (63, 64, 65)


def test_source_table_is_shared_only_without_a_source_vocabulary():
    tokens = jnp.ones((1, 3), int)
    shared = jax.eval_shape(Transformer(17, None, SMALL).init, KEY, tokens, tokens)
    apart = jax.eval_shape(Transformer(17, 13, SMALL).init, KEY, tokens, tokens)
    assert "source_embedding" not in shared["params"]
    assert apart["params"]["source_embedding"]["table"]["embedding"].shape == (13, 12)


def test_sinusoids_match_the_formula():
    got = sinusoids(jnp.arange(11), 6)
    angles = np.arange(11)[:, None] / 10_000 ** (np.arange(0, 6, 2) / 6)[None]
    want = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_logits_do_not_see_later_targets(translator):
    model, variables, source, target = translator
    before = run(model, variables, source, target)
    after = run(model, variables, source, target.at[:, 3].set(0))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.any(np.asarray(before[:, 3:]) != np.asarray(after[:, 3:]))


def test_masked_source_changes_no_bit(translator):
    model, variables, source, target = translator
    mask = jnp.arange(7)[None, :] < jnp.array([[4], [7]])
    before = run(model, variables, source, target, mask)
    after = run(model, variables, source.at[0, 5].set(0), target, mask)
    np.testing.assert_array_equal(before, after)
    short = run(model, variables, source[:1, :4], target[:1])
    np.testing.assert_allclose(before[:1], short, atol=2e-5)


def test_scores_are_kept_on_request_and_change_no_bit(translator):
    model, variables, source, target = translator
    plain = run(model, variables, source, target)
    logits, kept = run(model, variables, source, target, mutable=["attention"])
    np.testing.assert_array_equal(plain, logits)
    decoder = kept["attention"]["decoder"]["layer_0"]
    assert decoder["cross_attention"]["scores"].shape == (2, 3, 5, 7)
    assert decoder["self_attention"]["scores"].shape == (2, 3, 5, 5)
    assert kept["attention"]["encoder"]["layer_0"]["self_attention"]["scores"].shape == (2, 3, 7, 7)
    np.testing.assert_allclose(decoder["cross_attention"]["scores"].sum(-1), 1.0, atol=1e-5)


def test_parameters_alone_are_made_by_init(translator):
    model, _, source, target = translator
    assert set(jax.eval_shape(model.init, KEY, source, target)) == {"params"}


@pytest.mark.parametrize("first", [True, False])
def test_norm_stands_where_the_config_says(first):
    """The paper's layer ends in a norm; with the norm first, the stack does."""
    config = Config(**{**vars(SMALL), "norm_first": first})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 12), np.float32))
    module = Encoder(config)
    out = run(module, {"params": module.init(KEY, x)["params"]}, x)
    np.testing.assert_allclose(out.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(out.std(-1), 1.0, atol=1e-3)
    assert ("norm" in jax.eval_shape(module.init, KEY, x)["params"]) == first


def test_decoding_with_caches_is_the_whole_decoder(translator):
    """The memory is given once; scores are still kept on request, over the slots."""
    model, variables, source, target = translator
    mask = source > 3
    want = run(model, variables, source, target, mask)
    memory = run(model, variables, source, mask, method="encode")
    caches = {"cache": model.empty_caches(batch=2, length=5, memory_length=7)}
    options = {"method": "decode", "mutable": ["cache", "attention"]}
    logits, kept = run(model, variables | caches, target[:, :3], memory, mask, **options)
    np.testing.assert_allclose(logits, want[:, :3], atol=1e-5)
    scores = kept["attention"]["decoder"]["layer_0"]["self_attention"]["scores"]
    assert scores.shape == (2, 3, 3, 5) and not np.any(scores[..., 3:])
    for start in (3, 4):
        held = variables | {"cache": kept["cache"]}
        token = target[:, start : start + 1]
        logits, kept = run(model, held, token, None, start=start, **options)
        np.testing.assert_allclose(logits, want[:, start : start + 1], atol=1e-5)
    scores = kept["attention"]["decoder"]["layer_0"]["cross_attention"]["scores"]
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)


def test_a_causal_encoder_takes_caches_too():
    """Every attention does that finds one in its place."""
    config = Config(**{**vars(SMALL), "sliding_window": 3})
    model, tokens = Encoder(config), jax.random.normal(KEY, (2, 5, 12))
    variables = make(model, tokens)
    want = run(model, variables, tokens, causal=True)
    held = LanguageModel(7, config).empty_caches(batch=2, length=5)["encoder"]
    for t in range(5):
        got, kept = run(
            model, variables | {"cache": held}, tokens[:, t : t + 1], causal=True, mutable=["cache"]
        )
        held = kept["cache"]
        np.testing.assert_allclose(got[:, 0], want[:, t], atol=1e-5)


def test_dropout_acts_in_training_only(translator):
    model, variables, source, target = translator
    still = run(model, variables, source, target)
    train = jax.jit(partial(model.apply, training=True, rngs={"dropout": jax.random.key(3)}))
    moved, again = (train(variables, source, target) for _ in range(2))
    assert np.any(np.asarray(still) != np.asarray(moved))
    np.testing.assert_array_equal(moved, again)


def test_every_parameter_has_a_gradient(translator):
    """All but the key biases, which softmax cancels."""
    model, variables, source, target = translator

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, source, target)))

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:
            assert np.abs(gradient).max() > 1e-6, name


@pytest.mark.parametrize(
    "tokens", [np.full((1, 3), 11), np.full((1, 3), -1), np.ones((1, 3)), np.ones(3, int)]
)
def test_tokens_that_are_no_symbols_are_refused(tokens):
    config = Config(width=8, num_heads=2, hidden=16, encoder_layers=1, decoder_layers=1)
    one = np.ones((1, 3), int)
    for model, right, wrong in [
        (LanguageModel(11, config), (one,), (tokens,)),
        (Transformer(11, 11, config), (one, one), (tokens, one)),
        (Transformer(11, 11, config), (one, one), (one, tokens)),
    ]:
        variables = model.init(jax.random.key(0), *right)
        with pytest.raises(ShapeError, match=r"tokens must be integers from 0 to 10 of shape"):
            model.apply(variables, *wrong)


def test_language_model_sees_its_window_only():
    """Two layers that each see 3 tokens back from the last reach 4 further back together."""
    config = Config(**{**vars(SMALL), "encoder_layers": 2, "sliding_window": 3})
    model, tokens = LanguageModel(11, config), jnp.arange(13)[None, :] % 11
    variables = make(model, tokens)
    before = np.asarray(run(model, variables, tokens))
    after = np.asarray(run(model, variables, tokens.at[0, 4].set(0)))
    changed = np.flatnonzero(np.any(before != after, axis=(0, 2)))
    assert changed.tolist() == [4, 5, 6, 7, 8]


def test_image_classifier_attends_over_both_axes():
    """One layer lets every pixel reach the answer through every other."""
    config = Config(**{**vars(SMALL), "encoder_layers": 1, "attention_axes": (1, 2)})
    model, images = ImageClassifier(5, config), jax.random.uniform(KEY, (2, 3, 7, 1))
    variables = make(model, images)
    _, kept = run(model, variables, images, mutable=["attention"])
    scores = kept["attention"]["encoder"]["layer_0"]["self_attention"]["scores"]
    assert scores.shape == (2, 3, 3, 7, 3, 7)
    np.testing.assert_allclose(scores.sum((-1, -2)), 1.0, atol=1e-5)


def test_regularizer_fills_the_losses_collection():
    config = Config(**{**vars(SMALL), "kernel_regularizer": "l2"})
    model, tokens = LanguageModel(11, config), jnp.ones((1, 3), int)
    variables = make(model, tokens)
    _, kept = run(model, variables, tokens, mutable=["losses"])
    kernels = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(variables["params"]["encoder"])
        if "['layer']" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    ]
    want = sum(0.01 * float(jnp.sum(x**2)) for x in kernels)
    got = sum(float(jnp.sum(x)) for x in jax.tree.leaves(kept["losses"]))
    np.testing.assert_allclose(got, want, rtol=1e-5)
