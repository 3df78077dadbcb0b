"""Flax's attention layers, linen's and nnx's, and ours, both ways: same weights bit for bit.

D input width   E output width   N query heads   K key-value heads   H head size

The kernels have the same shapes; Flax's `out` is our `attention_output`. Flax attends over the axis
before the features and takes all others for batch axes: an imported layer has `attention_axes=(-2,)`.
The calls differ in order: Flax's is (query, key, value), ours (query, value, key). Flax's masks, True
for what may be attended, mean the same here (`mask != 0` where they are floats).

Two answers differ by design: a query that may attend to nothing gives zeros here and the mean of all
values in Flax; the softmax of half-precision inputs is taken in float32 here, in linen with
`force_fp32_for_softmax` only.
(Type checkers take `flax` for this file: hence the ignores.)
"""

import inspect
from typing import Any

import flax.linen as nn  # type: ignore[import-not-found]

from mha_jax.attention.functions import dot_product_attention
from mha_jax.attention.given import of_kind
from mha_jax.errors import UnsupportedError, WeightsError
from mha_jax.interop import weights
from mha_jax.layer import initializers
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.types import Params

_OURS = {
    **{"query": "query", "key": "key", "value": "value", "out": "attention_output"},
    **{"query_ln": "query_norm", "key_ln": "key_norm"},
}
_LINEN = (nn.MultiHeadDotProductAttention, nn.MultiHeadAttention, nn.SelfAttention)
# Arguments that would compute something else, unless None.
_LINEN_HOOKS = (
    "qkv_dot_general",
    "out_dot_general",
    "qkv_dot_general_cls",
    "out_dot_general_cls",
    "qk_attn_weights_einsum_cls",
    "attn_weights_value_einsum_cls",
)
_NNX_HOOKS = _LINEN_HOOKS[:4]
_PROMOTIONS = ("qkv_promote_dtype", "out_promote_dtype", "ln_promote_dtype")


def import_linen(
    linen_module: Any, variables: dict[str, Params]
) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return our module and variables for a linen attention layer and its variables.

    Args:
      linen_module: A `flax.linen.MultiHeadDotProductAttention`, `MultiHeadAttention` or
        `SelfAttention`. `deterministic` becomes `training`, its opposite.
      variables: {"params": ...}, as its `init` makes them.

    Returns:
      (module, {"params": ...}) with the same weights, and its arguments, name and dtypes.

    Raises:
      WeightsError: If the module is of another class, or the weights do not fit it.
      UnsupportedError: If it has arguments without counterpart: `decode`, `broadcast_dropout` with
        dropout, an `attention_fn` or products of its own, other initializers for the output than for the
        rest.

    >>> layer, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), jnp.ones((1, 5, 16))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> module, ours = import_linen(layer, variables)
    >>> bool(jnp.allclose(module.apply(ours, x, x), layer.apply(variables, x), atol=1e-6))
    True
    """
    if type(linen_module) not in _LINEN:
        raise WeightsError(
            f"cannot import a {_class(linen_module)}: expected a flax.linen.MultiHeadDotProductAttention, "
            "MultiHeadAttention or SelfAttention, not a module that holds one or a subclass of one."
        )
    layer = linen_module
    found = _without_counterpart(layer, nn.dot_product_attention, _LINEN_HOOKS)
    for name in ("kernel_init", "bias_init"):
        if getattr(layer, f"out_{name}") not in (None, getattr(layer, name)):
            found[f"out_{name}"] = f"it differs from {name}: clone(out_{name}=None)"
    weights.require_nothing(_class(layer), found)
    params = weights.params_of(variables)
    return _assemble(
        _renamed(params, _OURS),
        name=layer.name,
        output_shape=layer.out_features,
        kernel_initializer=_named(layer.kernel_init),
        bias_initializer=_named(layer.bias_init),
        **_shared(layer),
    )


def export_linen(
    module: MultiHeadAttention, variables: dict[str, Params]
) -> tuple[Any, dict[str, Params]]:
    """Return a `flax.linen.MultiHeadDotProductAttention` and its variables for our module.

    Args:
      module: The layer, called with [B, T, D] or with `attention_axes=(-2,)`. Its `backend` is left
        out: for our attention inside Flax's layer, `clone(attention_fn=mha_jax.dot_product_attention)`.
      variables: {"params": ...}, as `module.init` makes them.

    Raises:
      WeightsError: If the weights do not fit the module.
      UnsupportedError: If linen's layer has no counterpart for an argument; the message lists them.

    >>> module, x = MultiHeadAttention(num_heads=4, key_dim=8), jnp.ones((1, 5, 16))
    >>> layer, variables = export_linen(module, module.init(jax.random.key(0), x, x))
    >>> layer.qkv_features, variables["params"]["out"]["kernel"].shape
    (32, (4, 8, 16))
    """
    weights.require_plain(module, "flax.linen.MultiHeadDotProductAttention", {}, norm="layer")
    params = weights.params_of(variables)
    weights.check_shapes(module, params, *weights.widths(params))
    layer = nn.MultiHeadDotProductAttention(
        out_features=None if module.output_shape is None else module.output_shape[0],  # type: ignore[index]
        name=module.name,
        **_shared_of(module),
    )
    return layer, {"params": _renamed(params, {ours: theirs for theirs, ours in _OURS.items()})}


def import_nnx(nnx_layer: Any) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return our module and variables for a `flax.nnx.MultiHeadAttention`.

    Args:
      nnx_layer: The layer. Its random stream, its cache and the metadata of its variables are left
        out; `deterministic` becomes `training`, its opposite. The initializers are Flax's defaults:
        it does not keep its own.

    Returns:
      (module, {"params": ...}); the same tree is that of `mha_jax.layer.nnx.MultiHeadAttention`.

    Raises:
      WeightsError: If the layer is of another class, or its weights do not fit its arguments.
      UnsupportedError: As `import_linen`, or if a projection or norm in it was replaced or changed.

    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    >>> module, variables = import_nnx(layer)
    >>> module.key_dim, variables["params"]["query"]["kernel"].shape
    (8, (16, 2, 8))
    """
    from flax import nnx  # type: ignore[attr-defined]

    layer = nnx_layer
    if type(layer) is not nnx.MultiHeadAttention:
        raise WeightsError(
            f"cannot import a {_class(layer)}: expected a flax.nnx.MultiHeadAttention, not a module that "
            "holds one or a subclass of one."
        )
    found = _without_counterpart(layer, nnx.dot_product_attention, _NNX_HOOKS)
    promote = inspect.signature(nnx.LinearGeneral.__init__).parameters.get("promote_dtype")
    for name in _PROMOTIONS:
        if promote is not None and getattr(layer, name, promote.default) is not promote.default:
            found[name] = "a promotion of its own"
    weights.require_nothing(_class(layer), found)
    kv_heads = getattr(layer, "num_kv_heads", layer.num_heads)
    tree = weights.params_of({"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))})
    imported = _assemble(
        _renamed(tree, _OURS),
        num_kv_heads=None if kv_heads == layer.num_heads else kv_heads,
        output_shape=None if layer.out_features == layer.in_features else layer.out_features,
        kernel_initializer="lecun_normal",
        bias_initializer="zeros",
        **_shared(layer),
    )
    _refuse_replaced(layer)
    return imported


def export_nnx(module: MultiHeadAttention, variables: dict[str, Params], *, rngs: Any) -> Any:
    """Return a `flax.nnx.MultiHeadAttention` with the weights and arguments of our module.

    Args:
      module: The layer, called with [B, T, D] or with `attention_axes=(-2,)`. Its `backend` and
        `name` are left out.
      variables: {"params": ...}, as `module.init` makes them.
      rngs: `flax.nnx.Rngs`, from which the layer takes its stream for dropout.

    Raises:
      WeightsError: If the weights do not fit the module.
      UnsupportedError: If nnx's layer has no counterpart for an argument; the message lists them.

    >>> from flax import nnx
    >>> module, x = MultiHeadAttention(num_heads=4, key_dim=8), jnp.ones((1, 5, 16))
    >>> layer = export_nnx(module, module.init(jax.random.key(0), x, x), rngs=nnx.Rngs(0))
    >>> layer(x).shape
    (1, 5, 16)
    """
    from flax import nnx  # type: ignore[attr-defined]

    params = weights.params_of(variables)
    query_size, value_size, key_size = weights.widths(params)
    grouped = "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters
    also = {}
    if value_size != key_size:
        also["inputs of two widths"] = f"value has {value_size} features, key {key_size}"
    of_kind("rngs", rngs, nnx.Rngs, "Pass rngs=nnx.Rngs(0).")
    target = "flax.nnx.MultiHeadAttention"
    weights.require_plain(module, target, also, num_kv_heads=grouped, norm="layer")
    weights.check_shapes(module, params, query_size, value_size, key_size)
    layer = nnx.MultiHeadAttention(
        in_features=query_size,
        out_features=query_size if module.output_shape is None else module.output_shape[0],  # type: ignore[index]
        in_kv_features=key_size,
        decode=False,
        rngs=rngs,
        **({"num_kv_heads": module.num_kv_heads} if grouped else {}),
        **_shared_of(module),
    )
    nnx.update(layer, _renamed(params, {ours: theirs for theirs, ours in _OURS.items()}))
    return layer


def _class(x: Any) -> str:
    return f"{type(x).__module__.split('.')[0]} {type(x).__name__}"


def _without_counterpart(layer: Any, own: Any, hooks: tuple[str, ...]) -> dict[str, str]:
    found = {name: "products of its own" for name in hooks if getattr(layer, name) is not None}
    if layer.decode:
        found["decode"] = "import it with decode=False, the weights are the same"
    if layer.attention_fn not in (own, dot_product_attention):
        found["attention_fn"] = f"{layer.attention_fn!r} is not Flax's, nor ours"
    if layer.dropout_rate > 0 and layer.broadcast_dropout:
        found["broadcast_dropout"] = (
            f"with dropout_rate={layer.dropout_rate} Flax would drop the same weights in all examples and "
            "heads, ours are independent: import it with broadcast_dropout=False if that is as good"
        )
    return found


def _refuse_replaced(layer: Any) -> None:
    """Refuse projections and norms of an nnx layer that its own arguments would not have made.

    Raises:
      UnsupportedError: Naming them.
    """
    from flax import nnx  # type: ignore[attr-defined]

    kept = {
        name: getattr(layer, name)
        for name in inspect.signature(type(layer).__init__).parameters
        if hasattr(layer, name) and name != "rngs"
    }
    fresh = nnx.eval_shape(lambda: type(layer)(**kept, rngs=nnx.Rngs(0)))
    found = []
    for name in _OURS:
        own, given = getattr(fresh, name), getattr(layer, name)
        if type(given) is not type(own):
            found.append(f"{name} is a {_class(given)}, not a {_class(own)}")
            continue
        settings = {
            key: (getattr(given, key, None), x)
            for key, x in ({} if own is None else vars(own)).items()
            if not key.startswith("_")
            and not key.endswith("_init")
            and not isinstance(x, nnx.Variable)
        }
        found += [f"{name}.{key} is {x!r}, not {y!r}" for key, (x, y) in settings.items() if x != y]
    if found:
        raise UnsupportedError(
            f"parts of the layer were replaced or changed: {'; '.join(found)}. What they compute is not "
            "what mha_jax would. If they mean the same, give their weights to a new layer, "
            "nnx.update(new, nnx.state(layer, nnx.Param)), and import that."
        )


def _shared(layer: Any) -> dict[str, Any]:
    """Return our arguments for those that both of Flax's layers have under one name."""
    return {
        "num_heads": layer.num_heads,
        "use_bias": layer.use_bias,
        "attention_axes": -2,
        "qk_norm": "layer" if layer.normalize_qk else None,
        "dropout": layer.dropout_rate,
        "training": None if layer.deterministic is None else not layer.deterministic,
        "dtype": layer.dtype,
        "param_dtype": layer.param_dtype,
        "precision": layer.precision,
    }


def _shared_of(module: MultiHeadAttention) -> dict[str, Any]:
    """Return Flax's arguments, the reverse of `_shared`."""
    return {
        "num_heads": module.num_heads,
        "qkv_features": module.num_heads * module.key_dim,
        "normalize_qk": module.qk_norm == "layer",
        "use_bias": bool(module.use_bias),
        "kernel_init": _unnamed(module.kernel_initializer),
        "bias_init": _unnamed(module.bias_initializer),
        "dropout_rate": module.dropout,
        "broadcast_dropout": module.dropout == 0,
        "deterministic": None if module.training is None else not module.training,
        "dtype": module.dtype,
        "param_dtype": module.param_dtype,
        "precision": module.precision,
    }


def _assemble(params: Params, **arguments: Any) -> tuple[MultiHeadAttention, dict[str, Params]]:
    sizes = weights.widths(params)
    key_dim = int(params["query"]["kernel"].shape[-1])
    module = MultiHeadAttention(key_dim=key_dim, **arguments)
    weights.check_shapes(module, params, *sizes)
    return module, {
        "params": {
            name: {part: weights.array(f"{name} {part}", w) for part, w in group.items()}
            for name, group in params.items()
        }
    }


def _renamed(params: Params, names: dict[str, str]) -> Params:
    return {names.get(name, name): dict(group) for name, group in params.items()}


# Flax's default initializers, by the names under which a configuration can hold them.
_NAMED = {
    "lecun_normal": nn.MultiHeadDotProductAttention.kernel_init,
    "zeros": nn.initializers.zeros_init(),
}


def _named(initializer: Any) -> Any:
    """Return an initializer of Flax as our layer takes it: by name if it is Flax's default."""
    return next((name for name, theirs in _NAMED.items() if initializer is theirs), initializer)


def _unnamed(initializer: Any) -> Any:
    """Return an initializer of ours as Flax takes it, the reverse of `_named`."""
    ours = {name: initializers.get(name) for name in _NAMED}
    return next((_NAMED[name] for name, x in ours.items() if x == initializer), initializer)
