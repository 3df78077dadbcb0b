"""Norms that are a Flax module's class, scales by position, and `on_projection`, at every door."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax import ShapeError, WeightsError
from tests.drawn import draw, draw_variables

B, T, D, N, K, H = 2, 7, 11, 6, 3, 4
X = draw(0, B, T, D)
LEAST = {"num_heads": N, "key_dim": H, "num_kv_heads": K}


class PerHead(nn.Module):
    """Sees all heads, and has a parameter for each."""

    @nn.compact
    def __call__(self, x):
        assert x.ndim == 4 and x.shape[-1] == H
        return x * self.param("weight", nn.initializers.ones, (1, 1, *x.shape[-2:]))


class PerHeadOfNnx(nnx.Module):
    def __init__(self, size, *, rngs):
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (size,)))

    def __call__(self, x):
        return x * self.weight[None, None, None]


NORMS = {
    "rms": nn.RMSNorm,
    "with_bias": functools.partial(nn.LayerNorm, epsilon=1e-5),
    "own": PerHead,
}


def loss(apply, params):
    return jax.grad(lambda params: (apply(params) ** 2).sum())(params)


# ---- a module's class -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_a_linen_class_is_the_same_in_the_module_in_the_function_and_by_hand(name):
    made, rotary = NORMS[name], mj.Rotary()
    layer = mj.MultiHeadAttention(**LEAST, qk_norm=made, rotary=rotary)
    variables = draw_variables(layer, X, X)
    params = variables["params"]

    def function(params):
        return mj.multi_head_attention(params, X, X, qk_norm=made, rotary=rotary)

    norms = {x: made().bind({"params": params[f"{x}_norm"]}) for x in ("query", "key")}

    def by_hand(name, y):
        return norms[name](y) if name in norms else y

    plain = {x: params[x] for x in ("query", "key", "value", "attention_output")}
    want = mj.multi_head_attention(plain, X, X, rotary=rotary, on_projection=by_hand)
    np.testing.assert_allclose(layer.apply(variables, X, X), want, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(layer.apply(variables, X, X), function(params))
    slopes = loss(lambda params: layer.apply({"params": params}, X, X), params)
    jax.tree.map(np.testing.assert_array_equal, slopes, loss(function, params))
    assert all(float(jnp.abs(g).max()) > 1e-4 for g in jax.tree.leaves(slopes["query_norm"]))
    fresh = mj.init_params(jax.random.key(0), X, X, **LEAST, qk_norm=made)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, dict(params))


def test_a_named_norm_is_that_of_flax():
    ours = mj.MultiHeadAttention(**LEAST, qk_norm="rms")
    theirs = mj.MultiHeadAttention(**LEAST, qk_norm=nn.RMSNorm)
    variables = draw_variables(ours, X, X)
    got, want = (layer.apply(variables, X, X) for layer in (ours, theirs))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("made", [nnx.RMSNorm, PerHeadOfNnx])
def test_an_nnx_class_holds_its_parameters_in_the_layer(made):
    layer = mj.nnx.MultiHeadAttention(**LEAST, qk_norm=made, in_features=D, rngs=nnx.Rngs(0))
    params = layer.params
    assert {"query_norm", "key_norm"} < set(params)
    norms = {"query": layer.query_norm, "key": layer.key_norm}
    plain = {x: params[x] for x in ("query", "key", "value", "attention_output")}
    want = mj.multi_head_attention(
        plain, X, X, on_projection=lambda name, y: norms[name](y) if name in norms else y
    )
    np.testing.assert_allclose(layer(X, X), want, rtol=1e-5, atol=2e-6)
    slopes = nnx.grad(lambda layer: (layer(X, X) ** 2).sum())(layer)
    slopes = nnx.to_pure_dict(slopes)
    assert all(float(jnp.abs(g).max()) > 1e-5 for g in jax.tree.leaves(slopes["key_norm"]))


def test_a_class_keeps_the_dtype_decodes_and_is_passed_by_penalties_and_constraints():
    made = functools.partial(nn.LayerNorm, epsilon=1e-5)
    rules = {"bias_regularizer": "l2", "bias_constraint": "non_neg", "dtype": jnp.bfloat16}
    layer = mj.MultiHeadAttention(**LEAST, qk_norm=made, **rules)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote
        check_others_pass_it_by(layer)


def check_others_pass_it_by(layer):
    variables = draw_variables(layer, X, X)
    out, state = layer.apply(variables, X, X, mutable=["losses"])
    assert out.dtype == jnp.bfloat16
    names = ("query", "key", "value", "attention_output")
    assert set(state["losses"]) == {f"{name}_bias" for name in names}
    params = variables["params"]
    kept = layer.constrain(params)
    np.testing.assert_array_equal(kept["key_norm"]["bias"], params["key_norm"]["bias"])
    assert (kept["key"]["bias"] >= 0).all() and (params["key_norm"]["bias"] < 0).any()
    axes = mj.sharding.logical_axes(params)
    assert axes["key_norm"] == {"scale": ("kv",), "bias": ("kv",)}
    whole = layer.apply(variables, X, X, use_causal_mask=True)
    cache = layer.empty_cache(B, T)
    for t in range(T):
        x = X[:, t : t + 1]
        step, cache = layer.apply(variables, x, x, use_causal_mask=True, cache=cache)
    np.testing.assert_allclose(
        step[:, 0].astype(np.float32), whole[:, -1].astype(np.float32), atol=0.1
    )


def test_axes_of_norms_over_heads_are_those_of_the_heads():
    params = mj.init_params(jax.random.key(0), X, X, **LEAST, qk_norm="rms_over_heads")
    axes = mj.sharding.logical_axes(params)
    assert axes["query_norm"]["scale"] == ("heads", "kv")
    assert axes["key_norm"]["scale"] == ("kv_heads", "kv")


def test_wrong_norms_are_explained():
    linen, rngs = {**LEAST, "qk_norm": nn.RMSNorm}, nnx.Rngs(0)
    of_nnx = LEAST | {"qk_norm": nnx.RMSNorm}
    for door, library in (
        (lambda: mj.MultiHeadAttention(**of_nnx), "linen"),
        (lambda: mj.init_params(jax.random.key(0), X, X, **of_nnx), "linen"),
        (lambda: mj.nnx.MultiHeadAttention(**linen, in_features=D, rngs=rngs), "nnx"),
    ):
        with pytest.raises(ShapeError, match=rf"class of a flax.{library} module here.*RMSNorm"):
            door()
    params = mj.init_params(jax.random.key(0), X, X, **linen)
    with pytest.raises(ShapeError, match=r"class of a flax.linen module here.*nnx"):
        mj.multi_head_attention(params, X, X, qk_norm=nnx.RMSNorm)
    with pytest.raises(ShapeError, match=r"a Flax module's class, or None: got RMSNorm"):
        mj.MultiHeadAttention(**LEAST, qk_norm=nn.RMSNorm())
    with pytest.raises(WeightsError, match=r"qk_norm=.*RMSNorm.*has no plain form"):
        mj.MultiHeadAttention(**linen).get_config()

    class Narrow(nn.Module):
        def __call__(self, x):
            return x[..., :1]

    layer = mj.MultiHeadAttention(**LEAST, qk_norm=Narrow)
    with pytest.raises(ShapeError, match=r"query_norm, a module.*got \(2, 7, 6, 1\) for"):
        layer.init(jax.random.key(0), X, X)


# ---- a scale by position ----------------------------------------------------------------------------


def by_position(positions):
    """Llama 4's."""
    return (1 + 0.5 * jnp.log1p(jnp.floor((positions + 1) / 3))) * H**-0.5


def test_a_scale_by_position_is_that_of_the_query_with_packing_and_with_a_cache():
    layer = mj.MultiHeadAttention(**LEAST, scale=by_position)
    variables = draw_variables(layer, X, X)
    params = variables["params"]
    other = mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0))

    def want(positions, **options):
        def scaled(name, y):
            return y * by_position(positions)[..., None, None] if name == "query" else y

        return mj.multi_head_attention(params, X, X, scale=1.0, on_projection=scaled, **options)

    places = np.arange(T, dtype=np.int32)[None]
    causal = {"use_causal_mask": True}
    whole = layer.apply(variables, X, X, **causal)
    np.testing.assert_allclose(whole, want(places, **causal), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(other(X, X, **causal), whole)
    np.testing.assert_array_equal(
        mj.multi_head_attention(params, X, X, scale=by_position, **causal), whole
    )
    tokens = mj.Tokens.packed(np.array([[0, 0, 0, 1, 1, 1, 1]]))
    packed = {"query_tokens": tokens, "key_tokens": tokens, "mask": mj.SameSegment()}
    np.testing.assert_allclose(
        layer.apply(variables, X, X, **packed), want(tokens.positions, **packed), atol=1e-6
    )
    cache = layer.empty_cache(B, T)
    for cut in (slice(0, 4), slice(4, 5), slice(5, 7)):
        out, cache = layer.apply(variables, X[:, cut], X[:, cut], **causal, cache=cache)
        np.testing.assert_allclose(out, whole[:, cut], rtol=1e-5, atol=2e-6)


def test_wrong_scales_are_explained():
    layer = mj.MultiHeadAttention(**LEAST, scale=lambda positions: jnp.ones(3))
    with pytest.raises(ShapeError, match=r"scale, a function.*got \(3,\) for positions \(1, 7\)"):
        layer.init(jax.random.key(0), X, X)
    with pytest.raises(WeightsError, match=r"scale=.*has no plain form"):
        layer.get_config()


# ---- on_projection ----------------------------------------------------------------------------------


def doubled(name, y):
    return 2 * y if name in ("query", "value") else y


def test_every_door_has_the_hook_and_penalties_see_what_the_kernels_gave():
    layer = mj.MultiHeadAttention(**LEAST, activity_regularizer="l2")
    variables = draw_variables(layer, X, X)
    other = mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0))
    want = mj.multi_head_attention(variables["params"], X, X, on_projection=doubled)
    got, state = layer.apply(variables, X, X, on_projection=doubled, mutable=["losses"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(other(X, X, on_projection=doubled), want, rtol=1e-5, atol=2e-6)
    _, plain = layer.apply(variables, X, X, mutable=["losses"])
    same = state["losses"]["value_activity"], plain["losses"]["value_activity"]
    np.testing.assert_array_equal(*same)
    losses = nnx.to_pure_dict(nnx.state(other.losses))
    np.testing.assert_allclose(losses["value_activity"], same[0][0], rtol=1e-6)


@pytest.mark.parametrize("door", ["linen", "nnx", "function"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_padding_reaches_neither_the_hook_nor_a_penalty_nor_a_gradient(door, bad):
    """Of what is hidden, NaN and Inf are zeros to who watches; finite numbers count, as in Keras."""
    rule = {} if door == "function" else {"activity_regularizer": "l2"}
    layer = mj.MultiHeadAttention(**LEAST, use_gate=True, **rule)
    variables = draw_variables(layer, X, X)
    real = np.arange(T)[None] < np.array([[7], [4]])
    masks = {"query_mask": real, "value_mask": real}

    def total(params, x):
        if door == "function":
            return (
                mj.multi_head_attention(params, x, x, **masks, on_projection=doubled) ** 2
            ).sum()
        if door == "linen":
            out, state = layer.apply(
                {"params": params}, x, x, **masks, on_projection=doubled, mutable=["losses"]
            )
            return (out**2).sum() + sum(jax.tree.leaves(state["losses"]))
        other = mj.nnx.MultiHeadAttention.from_linen(layer, {"params": params}, rngs=nnx.Rngs(0))
        out = other(x, x, **masks, on_projection=doubled)
        return (out**2).sum() + sum(jax.tree.leaves(nnx.pop(other, mj.nnx.Loss)))

    step = jax.value_and_grad(total, (0, 1))
    params = variables["params"]
    want = step(params, jnp.where(real[..., None], X, 0))
    got = step(params, jnp.where(real[..., None], X, bad))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got[0], want[0]
    )
    d_params, d_x = got[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), d_params, want[1][0]
    )
    assert np.isfinite(np.asarray(d_x)).all()


def test_a_hook_that_is_no_function_is_refused_at_every_door():
    layer = mj.MultiHeadAttention(**LEAST)
    variables = draw_variables(layer, X, X)
    other = mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0))
    for door in (
        lambda: layer.apply(variables, X, X, on_projection=3),
        lambda: other(X, X, on_projection=3),
        lambda: mj.multi_head_attention(variables["params"], X, X, on_projection=3),
    ):
        with pytest.raises(ShapeError, match="on_projection must be a function of a name and an"):
            door()


@pytest.mark.parametrize("name", ["gate", "attention_output"])
@pytest.mark.parametrize("returned", [lambda y: None, lambda y: y[:, :3], lambda y: y[:1]])
def test_a_hook_that_returns_something_else_is_refused(name, returned):
    layer = mj.MultiHeadAttention(2, 4, use_gate=True)
    x = jnp.ones((2, 5, 8))
    variables = layer.init(jax.random.key(0), x, x)

    def hook(which, y):
        return returned(y) if which == name else y

    with pytest.raises(mj.ShapeError, match=rf"must return of '{name}' what has its shape"):
        layer.apply(variables, x, x, on_projection=hook)
