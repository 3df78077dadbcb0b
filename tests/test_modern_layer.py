"""Rotary positions, norms, sinks, scale, cap and biases in the layer, against float64, at every door."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax import Rotary, SameSegment, ShapeError, Tokens, UnsupportedError, WeightsError, biases
from mha_jax.attention.rotary import Llama3, YaRN
from tests import oracles
from tests.test_rotary import turned

B, T, D, N, K, H = 2, 7, 11, 6, 3, 8
LEAST = {"num_heads": N, "key_dim": H, "num_kv_heads": K}
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
WHOLE = LEAST | {
    "rotary": Rotary(base=100.0, fraction=0.5),
    "qk_norm": "rms",
    "use_sinks": True,
    "scale": 0.7,
    "logit_cap": 3.0,
    "use_bias": ("query", "value"),
}
CAUSAL = np.tri(T, dtype=bool)


def drawn(arguments, seed=1):
    """Return the layer and parameters of which none is trivial."""
    layer = mj.MultiHeadAttention(**arguments)
    variables = layer.init(jax.random.key(0), X, X)
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.standard_normal(a.shape) / 2, a.dtype) for a in leaves]
    return layer, jax.tree.unflatten(tree, leaves)


def normalized(kind, own, x):
    axes = (-2, -1) if kind == "rms_over_heads" else -1
    if kind.startswith("layer"):
        x = x - x.mean(axes, keepdims=True)
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * own.get("scale", 1.0)


def oracle(layer, params, positions=None, visible=CAUSAL, bias=0.0):
    """Return the layer's output on X in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions

    def project(name):
        own = params[name]
        return np.einsum("btd,dnh->btnh", X.astype(np.float64), own["kernel"]) + own.get("bias", 0)

    q, k, v = (project(name) for name in ("query", "key", "value"))
    if layer.qk_norm:
        q = normalized(layer.qk_norm, params.get("query_norm", {}), q)
        k = normalized(layer.qk_norm, params.get("key_norm", {}), k)
    if layer.rotary:
        frequencies = layer.rotary.frequencies(H)
        q, k = (
            turned(x, positions[..., None], frequencies, layer.rotary.interleaved) for x in (q, k)
        )
    options = {"scale": layer.scale, "cap": layer.logit_cap, "visible": visible, "bias": bias}
    out, lse, scores = oracles.attention(q, k, v, **options)
    if layer.use_sinks:
        share = 1 / (1 + np.exp(params["sinks"]["logits"][:, None] - lse))
        out, scores = out * share.transpose(0, 2, 1)[..., None], scores * share[..., None]
    out = np.tensordot(out, params["attention_output"]["kernel"], 2)
    return out + params["attention_output"].get("bias", 0), scores


LAYERS = {
    "whole": WHOLE,
    "rotary": LEAST | {"rotary": Rotary(interleaved=True)},
    "layer_norm": LEAST | {"qk_norm": "layer", "use_bias": False},
    "rms_over_heads": LEAST | {"qk_norm": "rms_over_heads", "rotary": Rotary()},
    "layer_per_head": LEAST | {"qk_norm": "layer_per_head"},
    "l2": LEAST | {"qk_norm": "l2", "rotary": Rotary()},
    "sinks": LEAST | {"use_sinks": True},
    "scale_and_cap": LEAST | {"scale": 1.0, "logit_cap": 2.0, "use_bias": ["attention_output"]},
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_door_agrees_with_the_oracle(name):
    layer, variables = drawn(LAYERS[name])
    params = variables["params"]
    want, scores = oracle(layer, params)
    call = {"use_causal_mask": True, "return_attention_scores": True}
    other = mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0))
    given = ("rotary", "qk_norm", "scale", "logit_cap")
    given = {name: getattr(layer, name) for name in given}
    for out, own in (
        layer.apply(variables, X, X, **call),
        other(X, X, **call),
        mj.multi_head_attention(params, X, X, **call, **given),
    ):
        oracles.assert_close(out, want, 2e-5)
        oracles.assert_close(own, scores, 1e-5)
    fresh = mj.init_params(jax.random.key(0), X, X, **LAYERS[name])
    shapes = jax.tree.map(jnp.shape, fresh)
    assert shapes == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, other.params) == shapes


def test_gradients_are_those_of_the_oracle_by_differences():
    layer, variables = drawn(WHOLE)
    direction = jax.tree.map(lambda a: np.cos(np.arange(a.size)).reshape(a.shape), variables)

    def loss(variables):
        return (layer.apply(variables, X, X, use_causal_mask=True) ** 2).sum()

    gradients = jax.grad(loss)(variables)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(direction))
    slope = sum(float((np.asarray(g, np.float64) * d).sum()) for g, d in pairs)

    def moved(step):
        params = jax.tree.map(
            lambda a, d: np.asarray(a, np.float64) + step * d, variables, direction
        )
        return (oracle(layer, params["params"])[0] ** 2).sum()

    want = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert abs(slope - want) <= 1e-4 * abs(want)
    assert all(float(jnp.abs(g).max()) > 1e-4 for g in jax.tree.leaves(gradients))


def test_decoding_step_by_step_is_the_whole():
    layer, variables = drawn(WHOLE)
    whole = layer.apply(variables, X, X, use_causal_mask=True)
    for cuts in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 7]):
        cache, parts = layer.empty_cache(B, 13), []
        for a, b in itertools.pairwise(cuts):
            x = X[:, a:b]
            out, cache = layer.apply(variables, x, x, use_causal_mask=True, cache=cache)
            parts.append(out)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_rejected_drafts_and_beams():
    layer, variables = drawn(WHOLE)

    def step(x, cache):
        return layer.apply(variables, x, x, use_causal_mask=True, cache=cache)

    _, held = step(X[:, :3], layer.empty_cache(B, 13))
    _, drafted = step(X[:, 4:7], held)
    want, _ = step(X[:, 3:5], held)
    got, after = step(X[:, 3:5], drafted.truncated(3))
    np.testing.assert_array_equal(got, want)
    assert after.count.tolist() == [5, 5]
    assert drafted.truncated(np.array([9, 2])).count.tolist() == [6, 2]
    rows = np.array([1, 0, 1])
    beams, _ = step(X[rows, 3:5], held.reorder(rows))
    np.testing.assert_allclose(beams, want[rows], atol=1e-6)


def test_ragged_and_left_padded_rows_decode_as_if_alone():
    layer, variables = drawn(LEAST | {"rotary": Rotary()})
    valid = np.array([[False, False, True, True, True, True, True], [True] * 4 + [False] * 3])
    cache = layer.empty_cache(B, 11)
    options = {"use_causal_mask": True, "value_mask": valid, "query_mask": valid}
    out, cache = layer.apply(variables, X, X, **options, cache=cache)
    for row, kept in enumerate(valid):
        alone = X[row : row + 1, kept]
        want = layer.apply(variables, alone, alone, use_causal_mask=True)
        np.testing.assert_allclose(out[row : row + 1, kept], want, atol=1e-5)
    step, _ = layer.apply(variables, X[:, :1], X[:, :1], use_causal_mask=True, cache=cache)
    for row, kept in enumerate(valid):
        alone = np.concatenate([X[row : row + 1, kept], X[row : row + 1, :1]], 1)
        want = layer.apply(variables, alone, alone, use_causal_mask=True)
        np.testing.assert_allclose(step[row, 0], want[0, -1], atol=1e-5)


def test_positions_that_slots_are_given_turn_their_keys():
    layer, variables = drawn(LEAST | {"rotary": Rotary()})
    places = (np.arange(11) * 3 + 5)[None].astype(np.int32)
    cache, tokens = layer.empty_cache(B, 11), Tokens(11, pos=places)
    for a, b in ((0, 4), (4, 7)):
        x = X[:, a:b]
        queries = Tokens(b - a, pos=places[:, a:b])
        out, cache = layer.apply(
            *(variables, x, x),
            mask=mj.Causal(),
            cache=cache,
            query_tokens=queries,
            key_tokens=tokens,
        )
    want, _ = oracle(layer, variables["params"], np.broadcast_to(places[:, :T], (B, T)))
    oracles.assert_close(out, want[:, 4:], 1e-5)


def test_packed_sequences_restart():
    layer, variables = drawn(WHOLE)
    tokens = Tokens.packed(np.array([[0, 0, 0, 1, 1, 1, 1]]))
    options = {"mask": SameSegment(), "query_tokens": tokens, "key_tokens": tokens}
    out = layer.apply(variables, X, X, use_causal_mask=True, **options)
    for part in (slice(0, 3), slice(3, 7)):
        want = layer.apply(variables, X[:, part], X[:, part], use_causal_mask=True)
        np.testing.assert_allclose(out[:, part], want, atol=1e-5)


def test_a_bias_by_rule_or_as_an_array():
    layer, variables = drawn(LEAST)
    rule = biases.Alibi.of_heads(N)
    dense = rule.matrix(Tokens(T), Tokens(T), N)
    want, _ = oracle(layer, variables["params"], bias=dense)
    other = mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0))
    for bias in (rule, dense):
        for out in (
            layer.apply(variables, X, X, use_causal_mask=True, bias=bias),
            other(X, X, use_causal_mask=True, bias=bias),
            mj.multi_head_attention(variables["params"], X, X, use_causal_mask=True, bias=bias),
        ):
            oracles.assert_close(out, want, 1e-5)


def test_images_turn_by_both_axes():
    image = np.random.default_rng(3).standard_normal((B, 3, 5, D)).astype(np.float32)
    layer = mj.MultiHeadAttention(**LEAST, attention_axes=(1, 2), rotary=Rotary(axes=(3, 5)))
    variables = layer.init(jax.random.key(0), image, image)
    out = layer.apply(variables, image, image)
    # What is turned knows distances alone: a cut of the image sees its own tokens as before.
    flat = image.reshape(B, 15, D)
    params = variables["params"]
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", flat, params[n]["kernel"]) for n in ("query", "key", "value")
    )
    q, k = (layer.rotary(x, np.arange(15)) for x in (q, k))
    attended = mj.dot_product_attention(q, k, v)
    want = jnp.tensordot(attended, params["attention_output"]["kernel"], 2)
    np.testing.assert_allclose(out.reshape(B, 15, D), want, atol=1e-5)


@pytest.mark.parametrize("rotary", [Rotary(scaling=YaRN(4.0, 32)), Rotary(axes=(2, 3)), None])
def test_configurations_hold_them(rotary):
    layer = mj.MultiHeadAttention(**WHOLE | {"rotary": rotary})
    config = layer.get_config()
    assert config["use_bias"] == ["query", "value"]
    again = mj.MultiHeadAttention.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert (again.rotary, again.use_bias) == (rotary, layer.use_bias)


def test_dtypes_are_kept():
    layer = mj.MultiHeadAttention(**WHOLE, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), X, X)
    out = layer.apply(variables, X, X)
    assert out.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    names = mj.sharding.logical_axes(variables["params"])
    assert names["sinks"]["logits"] == ("heads",) and names["key_norm"]["scale"] == ("kv",)


def test_penalties_pass_them_by():
    layer, variables = drawn(WHOLE | {"kernel_regularizer": "l2", "bias_regularizer": "l2"})
    _, state = layer.apply(variables, X, X, mutable=["losses"])
    other = mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0))
    other(X, X)
    assert set(state["losses"]) == set(nnx.to_pure_dict(nnx.state(other.losses)))


def test_wrong_layers_are_explained():
    with pytest.raises(ShapeError, match=r"head size 7.*multiple of 2; change key_dim"):
        mj.MultiHeadAttention(num_heads=2, key_dim=7, rotary=Rotary())
    layer, variables = drawn(LEAST | {"qk_norm": "rms"})
    with pytest.raises(ShapeError, match=r"hold query_norm.*qk_norm=None.*'rms' or 'layer'"):
        mj.multi_head_attention(variables["params"], X, X)
    plain, others = drawn(LEAST)
    for door in (
        lambda: mj.multi_head_attention(others["params"], X, X, qk_norm="rms"),
        lambda: layer.apply(others, X, X),
    ):
        with pytest.raises(WeightsError, match=r"no query_norm/scale.*qk_norm"):
            door()
    turned = dataclasses.replace(plain, rotary=Rotary(scaling=Llama3(2.0)))
    for wrong in ({"query_tokens": 3}, {"key_tokens": X}):
        with pytest.raises(ShapeError, match=r"_tokens must be Tokens or None"):
            turned.apply(others, X, X, **wrong)
    from mha_jax.interop import flax as to_flax

    with pytest.raises(UnsupportedError, match=r"rotary \(Rotary.*scaling=Llama3"):
        to_flax.export_linen(turned, others)
    with pytest.raises(ShapeError, match=r"table of Relative.*N = 6: got \(3, 2\)"):
        plain.apply(others, X, X, bias=biases.Relative(np.ones((3, 2), np.float32)))
