"""Flax's layers and ours, both ways."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax import MultiHeadAttention
from mha_jax.errors import UnsupportedError, WeightsError
from mha_jax.interop import flax as interop
from tests.drawn import double_precision, draw_variables, redraw
from tests.oracles import assert_close, relative_error

B, T, S, D, D2, D3, N, H = 2, 5, 7, 11, 3, 13, 4, 3
RNG = np.random.default_rng(0)
X, Y, Z = (RNG.standard_normal(s, np.float32) for s in ((B, T, D), (B, S, D2), (B, S, D3)))
# Half an ulp of the largest number: what rounding a float32 result once may cost.
ROUNDING = 2.0**-24
MASK = RNG.random((B, N, T, S)) < 0.7
MASK[..., 0] = True  # a query that sees nothing differs by design
CAUSAL = np.tril(np.ones((T, T), bool))
GROUPED = "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters
LINEN = {
    "plain": {},
    "widths": {"qkv_features": N * H, "out_features": 6},
    "no bias": {"qkv_features": N * H, "use_bias": False},
    "dropout": {"qkv_features": 20, "dropout_rate": 0.3, "broadcast_dropout": False},
    "deterministic": {"qkv_features": 20, "deterministic": True, "precision": "highest"},
    "normalized": {"qkv_features": 20, "normalize_qk": True},
    "initializers": {"qkv_features": 20, "kernel_init": nn.initializers.he_uniform()},
    "named": {"qkv_features": 20, "name": "attention", "attention_fn": mj.dot_product_attention},
}
NNX = {
    "plain": {},
    "widths": {"qkv_features": N * H, "out_features": 6, "in_kv_features": D3},
    "no bias": {"qkv_features": N * H, "use_bias": False},
    "dropout": {"qkv_features": 20, "dropout_rate": 0.3, "broadcast_dropout": False},
    "deterministic": {"qkv_features": 20, "deterministic": True, "precision": "highest"},
    "normalized": {"qkv_features": 20, "normalize_qk": True},
    "bfloat16": {"qkv_features": 20, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
}
if GROUPED:
    NNX["grouped"] = {"qkv_features": 20, "num_kv_heads": 2}


def equal(got, want):
    """Raise unless two trees are the same, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def in_float64(compute, tree):
    """Return `compute` of a tree's numbers in float64, as NumPy's."""
    with double_precision(), jax.numpy_dtype_promotion("standard"):  # Flax and jax.nn need that.
        out = np.asarray(compute(jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)))
    assert out.dtype == np.float64
    return out


def linen_in_float64(layer, variables, *inputs, **options):
    """Return the outputs of a linen layer in float64."""
    twin = layer.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    return in_float64(lambda given: twin.apply(*given, **options), (variables, *inputs))


def nnx_in_float64(settings, layer, *inputs, **options):
    """Return the outputs of `flax_nnx(**settings)` in float64."""

    def compute(given):
        params, *wide = given
        twin = flax_nnx(**settings, dtype=jnp.float64, param_dtype=jnp.float64)
        nnx.update(twin, params)
        return twin(*wide, **options)

    return in_float64(compute, (nnx.to_pure_dict(nnx.state(layer, nnx.Param)), *inputs))


def assert_as_right(got, want, truth):
    """Raise unless ours errs at most twice as much as Flax's, or as one rounding of the largest number.

    By the root mean square; and no number alone by more than eight such roundings.
    """
    mine, theirs = relative_error(got, truth), relative_error(want, truth)
    assert mine <= max(2 * theirs, ROUNDING), f"error {mine:.3g}, Flax {theirs:.3g}"
    assert_close(got, truth, 8 * ROUNDING * np.abs(truth).max())


def linen(kind=nn.MultiHeadDotProductAttention, **more):
    """Return (linen layer, variables) with random parameters; width 12 where none is given."""
    layer = kind(N, **{"qkv_features": 12, **more})
    deterministic = {} if layer.deterministic is not None else {"deterministic": True}
    return layer, draw_variables(layer, X, Z, Y, **deterministic)


def flax_nnx(**more):
    layer = nnx.MultiHeadAttention(
        N, D, **{"qkv_features": 12, "decode": False, "rngs": nnx.Rngs(0), **more}
    )
    nnx.update(layer, redraw(nnx.to_pure_dict(nnx.state(layer, nnx.Param))))
    return layer


@pytest.mark.parametrize("kind", [nn.MultiHeadDotProductAttention, nn.MultiHeadAttention])
@pytest.mark.parametrize("settings", LINEN)
def test_linen_there_and_back(settings, kind):
    layer, variables = linen(kind, **LINEN[settings])
    module, ours = interop.import_linen(layer, variables)
    equal(ours["params"]["attention_output"], dict(variables["params"]["out"]))
    again, back = interop.export_linen(module, ours)
    equal(back, variables)
    kept = {
        f: getattr(layer, f)
        for f in layer.__dataclass_fields__
        if f not in ("parent", "attention_fn")
    }
    got = {f: getattr(again, f) for f in kept}
    assert got == kept
    assert interop.import_linen(again, back)[0] == module


def aligned(x):
    """Return a copy in memory of which JAX on a CPU could make an array without copying."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def test_imported_weights_do_not_change_with_the_arrays_they_came_from():
    layer, variables = linen()
    given = jax.tree.map(aligned, variables)
    _, ours = interop.import_linen(layer, given)
    for x in jax.tree.leaves(given):
        x.fill(np.nan)
    equal(ours["params"]["query"], variables["params"]["query"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours))


@pytest.mark.parametrize("settings", LINEN)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_of_linen(settings, masked):
    layer, variables = linen(**LINEN[settings])
    module, ours = interop.import_linen(layer, variables)
    theirs = {"mask": MASK} if masked else {}
    deterministic = {} if layer.deterministic is not None else {"deterministic": True}
    options = theirs | deterministic
    want = layer.apply(variables, X, Z, Y, **options)
    got = module.apply(ours, X, Y, Z, **({"attention_mask": MASK} if masked else {}))
    assert_as_right(got, want, linen_in_float64(layer, variables, X, Z, Y, **options))


def test_causal_outputs_of_linen_and_any_batch_axes():
    layer = nn.MultiHeadDotProductAttention(N, qkv_features=12)
    variables = draw_variables(layer, X)
    module, ours = interop.import_linen(layer, variables)
    for x in (X, np.stack([X, 2 * X, -X])):
        causal = nn.make_causal_mask(x[..., 0])
        want = layer.apply(variables, x, mask=causal)
        got = module.apply(ours, x, x, use_causal_mask=True)
        assert_as_right(got, want, linen_in_float64(layer, variables, x, mask=causal))


def test_gradients_of_linen():
    layer, variables = linen()
    module, ours = interop.import_linen(layer, variables)
    got = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(module.apply(v, X, Y, Z)))))(ours)
    want = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, X, Z, Y)))))(variables)
    _, renamed = interop.export_linen(module, got)
    for a, b in zip(jax.tree.leaves(renamed), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=5e-6)


def test_ours_to_linen_and_back():
    module = MultiHeadAttention(
        N, H, output_shape=6, dropout=0.2, training=False, dtype="bfloat16", kernel_initializer="he_normal",
        attention_axes=-2, name="mine",
    )  # fmt: skip
    variables = draw_variables(module, X, Y, Z)
    layer, theirs = interop.export_linen(module, variables)
    assert layer.broadcast_dropout is False and layer.deterministic is True
    again, back = interop.import_linen(layer, theirs)
    assert again == module
    equal(back, variables)
    fresh = jax.jit(layer.init)(jax.random.key(0), X, Z, Y)["params"]["query"]["kernel"]
    assert float(fresh.std()) == pytest.approx((2 / D) ** 0.5, rel=0.2)  # he_normal


def test_an_imported_layer_has_a_configuration():
    config = interop.import_linen(*linen())[0].get_config()
    assert config["kernel_initializer"]["class_name"] == "LecunNormal"
    assert MultiHeadAttention.from_config(config).num_heads == N


@pytest.mark.parametrize("settings", NNX)
def test_nnx_there_and_back(settings):
    layer = flax_nnx(**NNX[settings])
    module, ours = interop.import_nnx(layer)
    tree = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    equal(ours["params"]["query"], tree["query"])
    again = interop.export_nnx(module, ours, rngs=nnx.Rngs(1))
    equal(nnx.to_pure_dict(nnx.state(again, nnx.Param)), tree)
    for name in ("num_heads", "in_features", "qkv_features", "out_features", "in_kv_features"):
        assert getattr(again, name) == getattr(layer, name), name
    for name in ("dtype", "param_dtype", "dropout_rate", "deterministic", "precision", "use_bias"):
        assert getattr(again, name) == getattr(layer, name), name
    assert interop.import_nnx(again)[0] == module


@pytest.mark.parametrize("settings", [name for name in NNX if name != "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_of_nnx(settings, masked):
    layer = flax_nnx(**NNX[settings])
    module, ours = interop.import_nnx(layer)
    own = np.random.default_rng(1)
    y = Z if layer.in_kv_features == D3 else own.standard_normal((B, S, D), np.float32)
    theirs = {"mask": jnp.asarray(MASK)} if masked else {}
    deterministic = {} if layer.deterministic is not None else {"deterministic": True}
    options = theirs | deterministic
    want = layer(X, y, **options)
    got = module.apply(ours, X, y, **({"attention_mask": MASK} if masked else {}))
    assert_as_right(got, want, nnx_in_float64(NNX[settings], layer, X, y, **options))
    np.testing.assert_allclose(
        mj.nnx.MultiHeadAttention.from_linen(module, ours, rngs=nnx.Rngs(0))(X, y, **(
            {"attention_mask": MASK} if masked else {}
        )),
        got,
        atol=0,
    )  # fmt: skip


def test_causal_outputs_of_nnx():
    layer = flax_nnx()
    module, ours = interop.import_nnx(layer)
    got = module.apply(ours, X, X, use_causal_mask=True)
    causal = jnp.asarray(CAUSAL[None, None])
    assert_as_right(got, layer(X, mask=causal), nnx_in_float64({}, layer, X, mask=causal))


def test_dropout_of_an_exported_nnx_layer():
    module = MultiHeadAttention(N, H, dropout=0.5)
    variables = draw_variables(module, X, X)
    layer = interop.export_nnx(module, variables, rngs=nnx.Rngs(1))
    out = layer(X, deterministic=False)
    assert not np.allclose(out, layer(X, deterministic=False))
    assert layer.broadcast_dropout is False
    want = layer(X, deterministic=True)
    settings = {"qkv_features": N * H}
    truth = nnx_in_float64(settings, layer, X, deterministic=True)
    assert_as_right(module.apply(variables, X, X), want, truth)


class Own(nn.MultiHeadDotProductAttention):
    pass


def _imports():
    own = "has no counterpart for these arguments of flax MultiHeadDotProductAttention: "
    yield {"decode": True}, own + r"decode \(import it with decode=False"
    yield {"attention_fn": max}, own + r"attention_fn \(<built-in function max> is not Flax's"
    yield (
        {"dropout_rate": 0.1},
        own
        + r"broadcast_dropout \(with dropout_rate=0\.1 .* import it with broadcast_dropout=False",
    )
    yield {"qkv_dot_general": max}, own + r"qkv_dot_general \(products of its own\)"
    yield {"out_kernel_init": nn.initializers.ones}, own + r"out_kernel_init \(it differs from ker"
    yield (
        {"out_bias_init": nn.initializers.ones},
        own + r"out_bias_init \(it differs from bias_init",
    )
    yield {"qkv_dot_general": max, "decode": True}, r"qkv_dot_general \(.*\); decode \("


@pytest.mark.parametrize("arguments, message", list(_imports()))
def test_linen_layers_that_are_refused(arguments, message):
    layer = nn.MultiHeadDotProductAttention(N, qkv_features=12, **arguments)
    with pytest.raises(UnsupportedError, match=message):
        interop.import_linen(layer, linen()[1])


def test_the_same_output_initializer_is_no_difference():
    init = nn.initializers.ones
    layer, variables = linen(kernel_init=init, out_kernel_init=init)
    assert interop.import_linen(layer, variables)[0].kernel_initializer is init


def test_other_modules_are_refused():
    layer, variables = linen()
    message = r"cannot import a tests Own: expected a flax\.linen\.MultiHeadDotProductAttention"
    with pytest.raises(WeightsError, match=message):
        interop.import_linen(Own(N), variables)
    with pytest.raises(WeightsError, match=r"cannot import a flax Dense"):
        interop.import_linen(nn.Dense(3), variables)
    with pytest.raises(WeightsError, match=r"expected a flax\.nnx\.MultiHeadAttention"):
        interop.import_nnx(layer)
    with pytest.raises(WeightsError, match=r'variables must be \{"params": \.\.\.\}.*the keys'):
        interop.import_linen(layer, dict(sorted(variables["params"].items(), reverse=True)))
    with pytest.raises(WeightsError, match=r"no kernel for attention_output: got \['key', 'query'"):
        params = {k: v for k, v in variables["params"].items() if k != "out"}
        interop.import_linen(layer, {"params": params})
    with pytest.raises(WeightsError, match=r"query bias: \(4, 3\), expected none"):
        interop.import_linen(layer.clone(use_bias=False), variables)
    with pytest.raises(
        WeightsError, match=r"attention_output kernel: \(4, 3, 11\), expected \(4, 3, 9\)"
    ):
        interop.import_linen(layer.clone(out_features=9), variables)
    integers = jax.tree.map(lambda a: a.astype(jnp.int8), variables)
    with pytest.raises(WeightsError, match=r"the key bias has dtype int8, expected floating"):
        interop.import_linen(layer, integers)


def test_nnx_layers_that_are_refused():
    for arguments, message in (
        (
            {"decode": True},
            r"arguments of flax MultiHeadAttention: decode \(import it with decode=False",
        ),
        ({"dropout_rate": 0.1}, r"broadcast_dropout \(with dropout_rate=0\.1"),
        ({"attention_fn": max}, r"attention_fn \("),
        ({"out_dot_general": max}, r"out_dot_general \("),
    ):
        layer = nnx.MultiHeadAttention(N, D, qkv_features=12, **arguments, rngs=nnx.Rngs(0))
        with pytest.raises(UnsupportedError, match=message):
            interop.import_nnx(layer)
    if "qkv_promote_dtype" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters:
        options = {"qkv_features": 12, "qkv_promote_dtype": lambda x, **_: x, "rngs": nnx.Rngs(0)}
        with pytest.raises(UnsupportedError, match=r"qkv_promote_dtype \(a promotion of its own"):
            interop.import_nnx(nnx.MultiHeadAttention(N, D, **options))


class Doubled(nnx.LinearGeneral):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def _product(*args, **options):
    return 2 * jax.lax.dot_general(*args, **options)


def _parts():
    rngs = nnx.Rngs(0)
    norm = {"use_bias": False, "rngs": rngs}
    shape = (D, (N, H))
    yield "query", Doubled(*shape, rngs=rngs), "query is a tests Doubled, not a flax LinearGeneral"
    linear = nnx.LinearGeneral(*shape, dot_general=_product, rngs=rngs)
    yield "key", linear, r"key\.dot_general is <function _product .*not None"
    if "preferred_element_type" in inspect.signature(nnx.LinearGeneral).parameters:
        linear = nnx.LinearGeneral(*shape, preferred_element_type=jnp.bfloat16, rngs=rngs)
        yield "value", linear, r"value\.preferred_element_type is <class .*bfloat16"
    linear = nnx.LinearGeneral((N, H), D, axis=(-2, -1), dtype=jnp.bfloat16, rngs=rngs)
    yield "out", linear, r"out\.dtype is <class .*bfloat16.*, not None"
    yield "query_ln", nnx.RMSNorm(H, rngs=rngs), "query_ln is a flax RMSNorm, not a flax LayerNorm"
    yield "key_ln", nnx.LayerNorm(H, epsilon=0.5, **norm), r"key_ln\.epsilon is 0\.5, not 1e-06"
    yield "key_ln", nnx.LayerNorm(H, reduction_axes=-2, **norm), r"key_ln\.reduction_axes is -2"


@pytest.mark.parametrize("name, part, message", list(_parts()))
def test_parts_of_an_nnx_layer_that_were_replaced(name, part, message):
    layer = flax_nnx(normalize_qk=True)
    setattr(layer, name, part)
    with pytest.raises(UnsupportedError, match=message + r".*nnx\.update\(new"):
        interop.import_nnx(layer)


def test_parts_of_an_nnx_layer_that_were_made_anew_the_same():
    layer = flax_nnx(normalize_qk=True, kernel_init=nnx.initializers.he_normal())
    layer.query = nnx.LinearGeneral(D, (N, H), rngs=nnx.Rngs(5))
    layer.query_ln = nnx.LayerNorm(H, use_bias=False, rngs=nnx.Rngs(5))
    layer.key.remark = "seen"
    layer.set_attributes(precision="highest")
    layer.eval()
    module, variables = interop.import_nnx(layer)
    np.testing.assert_allclose(module.apply(variables, X, X), layer(X), atol=1e-6, rtol=1e-6)


def _exports():
    yield {"value_dim": 5}, r"value_dim \(5 differs from key_dim=3\)"
    yield {"attention_axes": 0}, r"attention_axes \(\(0,\) is not the axis before the features\)"
    yield {"output_shape": (2, 3)}, r"output_shape \(\(2, 3\) has more than one axis\)"
    yield {"sliding_window": 2}, r"sliding_window \(2: clear it and pass a mask to the call\)"
    yield {"use_gate": True}, r"use_gate \(there is no gate\)"
    yield {"kernel_regularizer": "l2"}, r"kernel_regularizer \(L2\(.*\): apply it yourself"
    yield {"bias_constraint": "non_neg"}, r"bias_constraint \(NonNeg"
    yield {"seed": 3, "use_gate": True}, r"use_gate \(.*\); seed \(3: .*module\.clone"


PLAIN = MultiHeadAttention(N, H)


@pytest.mark.parametrize("arguments, message", list(_exports()))
def test_exports_that_are_refused(arguments, message):
    module = MultiHeadAttention(N, H, **arguments)
    variables = draw_variables(module.clone(attention_axes=None), X, X)
    start = r"flax\.{}.* has no counterpart for "
    with pytest.raises(UnsupportedError, match=start.format("linen") + message):
        interop.export_linen(module, variables)
    with pytest.raises(UnsupportedError, match=start.format("nnx") + message):
        interop.export_nnx(module, variables, rngs=nnx.Rngs(0))
    # Nothing else was in the way: with these arguments cleared, as the message says, it goes.
    cleared = module.clone(**{name: getattr(PLAIN, name) for name in arguments})
    variables = draw_variables(cleared, X, X)
    _, theirs = interop.export_linen(cleared, variables)
    equal(theirs["params"]["query"], variables["params"]["query"])


def test_more_exports_that_are_refused():
    module = MultiHeadAttention(N, H, num_kv_heads=2)
    variables = draw_variables(module, X, Y, Z)
    with pytest.raises(UnsupportedError, match=r"num_kv_heads \(2 of 4 heads\)"):
        interop.export_linen(module, variables)
    with pytest.raises(
        UnsupportedError, match=r"inputs of two widths \(value has 3 features, key 13"
    ):
        interop.export_nnx(module, variables, rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match=r"query kernel: \(11, 4, 3\), expected \(11, 4, 2\)"):
        interop.export_linen(
            MultiHeadAttention(N, 2), draw_variables(MultiHeadAttention(N, H), X, X)
        )
