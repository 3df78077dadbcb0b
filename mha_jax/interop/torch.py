"""`torch.nn.MultiheadAttention` and ours, both ways: same weights bit for bit, and torch's masks turned over.

E width of queries and output (torch's embed_dim)   N heads   H = E // N head size

torch keeps the kernels of query, key and value in one [3 E, E] matrix, or in three where `kdim` or `vdim`
differ from E; rows are outputs there and columns are here. What differs in a call:

* the order: torch's is (query, key, value), ours (query, value, key);
* the masks: True hides in torch's `attn_mask` and `key_padding_mask`, True shows here: `import_masks`;
* the layout: inputs are [B, T, E] here, which is torch's `batch_first=True`; weights do not depend on it;
* a query that may attend to nothing gives zeros here and NaN in torch;
* the weights: torch returns their mean over heads, after dropout; ours are of every head, before it.

torch is imported by `export_layer` alone; `import_state` reads NumPy arrays without it.
(Type checkers take `torch` for this file: hence the ignores.)
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mha_jax.attention.given import as_array, integer, of_kind, text
from mha_jax.errors import ShapeError, UnsupportedError, WeightsError
from mha_jax.interop import weights
from mha_jax.interop.torch_tensors import read, tensor
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.types import ArrayLike, Params

_TARGET = "torch.nn.MultiheadAttention"
_SEPARATE = {"query": "q_proj_weight", "key": "k_proj_weight", "value": "v_proj_weight"}
_APPENDED = {"bias_k": "add_bias_kv=True", "bias_v": "add_bias_kv=True"}
# What torch lets a user put before, after or in place of what the layer's class computes.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_METHODS = ("forward", "merge_masks", "_call_impl")


def import_layer(torch_layer: Any) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return our module and variables for a `torch.nn.MultiheadAttention`.

    Args:
      torch_layer: The layer, on any device. `batch_first` and `training`, which belong to the call
        here, are left out.

    Returns:
      (module, {"params": ...}) with the same weights and dropout, in the same dtype.

    Raises:
      WeightsError: If the layer is of another class, has forward hooks or methods of its own, or weights
        without numbers, on the meta device.
      UnsupportedError: If it has `add_bias_kv` or `add_zero_attn`.

    >>> import torch                                              # doctest: +SKIP
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)      # doctest: +SKIP
    >>> module, variables = import_layer(layer)                   # doctest: +SKIP
    """
    kind = type(torch_layer)
    if f"{kind.__module__}.{kind.__name__}" != "torch.nn.modules.activation.MultiheadAttention":
        raise WeightsError(
            f"cannot import a {kind.__module__}.{kind.__name__}: expected a {_TARGET}, not a module that "
            "holds one or a subclass of one. From a model, pass model.get_submodule(name)."
        )
    hooks = [name for name in _HOOKS if getattr(torch_layer, name)]
    if replaced := hooks + [name for name in _METHODS if name in vars(torch_layer)]:
        raise WeightsError(
            f"the layer has {', '.join(replaced)} of its own: what it computes is not what mha_jax would. "
            "Remove them first, or, if they change nothing, import its weights alone: "
            "import_state(layer.state_dict(), layer.num_heads, dropout=layer.dropout)."
        )
    if torch_layer.add_zero_attn:
        weights.require_nothing(_TARGET, {"add_zero_attn=True": "no key of zeros is appended here"})
    return import_state(
        torch_layer.state_dict(), torch_layer.num_heads, dropout=torch_layer.dropout
    )


def import_state(
    state: Mapping[str, Any], num_heads: int, *, dropout: float = 0.0, prefix: str = ""
) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return our module and variables for the `state_dict` of a `torch.nn.MultiheadAttention`.

    Args:
      state: NumPy arrays or torch tensors by name. torch need not be installed.
      num_heads: Heads N: the weights do not show them.
      dropout: As for the layer: nor do they show that, nor `add_zero_attn`, which must be off.
      prefix: Of the names, in the state of a whole model: "encoder.layers.0.self_attn.", say.

    Raises:
      WeightsError: If weights are missing, unknown, or do not fit each other or `num_heads`.
      UnsupportedError: If the state is of a layer with `add_bias_kv`.

    >>> state = {"in_proj_weight": np.ones((48, 16), np.float32), "out_proj.weight": np.eye(16)}
    >>> state["out_proj.weight"] = state["out_proj.weight"].astype(np.float32)
    >>> module, variables = import_state(state, num_heads=2)
    >>> module.key_dim, module.use_bias, variables["params"]["query"]["kernel"].shape
    (8, False, (16, 2, 8))
    """
    of_kind("state", state, Mapping, "Pass layer.state_dict(), arrays by name.")
    text("prefix", prefix, "It is the start of the names, 'encoder.layers.0.self_attn.' say.")
    for name in state:
        text("a name in the state", name, "Pass layer.state_dict(), arrays by name.")
    found = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    weights.require_nothing(
        _TARGET, {_APPENDED[name]: f"the state holds {name}" for name in found if name in _APPENDED}
    )
    taken = {name: read(prefix + name, x, WeightsError) for name, x in found.items()}
    kernels, biases = _kernels(taken, prefix), _biases(taken)
    if taken:
        raise WeightsError(
            f"the state holds {sorted(taken)}, which a {_TARGET} has not. Pass the state of one layer, or "
            'the start of its names as prefix="encoder.layers.0.self_attn.", say.'
        )
    width = kernels["attention_output"].shape[0]
    whole = isinstance(num_heads, numbers.Integral) and not isinstance(num_heads, bool)
    if not whole or num_heads <= 0 or width % num_heads:
        raise WeightsError(
            f"num_heads must divide the width of the layer: got num_heads={num_heads!r} and width {width}. "
            "Pass the num_heads that the torch layer was made with."
        )
    _check_widths(kernels, biases, width)
    heads = (int(num_heads), width // int(num_heads))
    params: Params = {
        name: {"kernel": weights.array(f"{name} kernel", w.T).reshape(w.shape[1], *heads)}
        for name, w in kernels.items()
        if name != "attention_output"
    }
    output = weights.array("attention_output kernel", kernels["attention_output"].T)
    params["attention_output"] = {"kernel": output.reshape(*heads, width)}
    for name, bias in biases.items():
        shape = (width,) if name == "attention_output" else heads
        params[name]["bias"] = weights.array(f"{name} bias", bias).reshape(shape)
    module = MultiHeadAttention(
        num_heads=heads[0],
        key_dim=heads[1],
        dropout=dropout,
        use_bias=bool(biases),
        attention_axes=-2,
        param_dtype=params["query"]["kernel"].dtype,
    )
    weights.check_shapes(module, params, *weights.widths(params))
    return module, {"params": params}


def export_state(module: MultiHeadAttention, variables: dict[str, Params]) -> dict[str, np.ndarray]:
    """Return the `state_dict` of a `torch.nn.MultiheadAttention` as NumPy arrays, without torch.

    Args:
      module: The layer. Its `backend`, `training`, `precision`, `name` and initializers are left out.
      variables: {"params": ...}, as `module.init` makes them.

    Raises:
      WeightsError: If the weights do not fit the module.
      UnsupportedError: If torch's layer has no counterpart for an argument; the message lists them.

    >>> module, x = MultiHeadAttention(num_heads=2, key_dim=8), jnp.ones((1, 5, 16))
    >>> state = export_state(module, module.init(jax.random.key(0), x, x))
    >>> {name: x.shape for name, x in sorted(state.items())}
    {'in_proj_bias': (48,), 'in_proj_weight': (48, 16), 'out_proj.bias': (16,), 'out_proj.weight': (16, 16)}
    """
    of_kind("module", module, MultiHeadAttention, "It is made by mj.MultiHeadAttention(...).")
    params = weights.params_of(variables)
    query_size, value_size, key_size = weights.widths(params)
    also = {}
    if module.num_heads * module.key_dim != query_size:
        also["key_dim"] = f"num_heads * key_dim must be {query_size}, the width of the query"
    if module.output_shape not in (None, (query_size,)):
        also["output_shape"] = f"{module.output_shape} is not {query_size}, the width of the query"
    if module.dtype is not None and jnp.dtype(module.dtype) != jnp.dtype(module.param_dtype):
        also["dtype"] = f"torch computes in the dtype of the weights, {module.param_dtype}"
    weights.require_plain(module, _TARGET, also)
    weights.check_shapes(module, params, query_size, value_size, key_size)
    rows = {
        name: np.asarray(group["kernel"]).reshape(group["kernel"].shape[0], -1).T
        for name, group in params.items()
    }
    output = np.asarray(params["attention_output"]["kernel"]).reshape(query_size, query_size).T
    state = {"out_proj.weight": np.ascontiguousarray(output)}
    inputs = ("query", "key", "value")
    if key_size == value_size == query_size:
        state["in_proj_weight"] = _joined([rows[name] for name in inputs])
    else:
        state |= {_SEPARATE[name]: np.ascontiguousarray(rows[name]) for name in inputs}
    if module.use_bias:
        parts = [np.asarray(params[name]["bias"]).reshape(-1) for name in inputs]
        state["in_proj_bias"] = _joined(parts)
        state["out_proj.bias"] = np.asarray(params["attention_output"]["bias"])
    return state


def export_layer(
    module: MultiHeadAttention, variables: dict[str, Params], *, batch_first: bool = True
) -> Any:
    """Return a `torch.nn.MultiheadAttention` with the weights and dropout of our module.

    Args:
      module, variables: As for `export_state`. `training` is set where the module has it; else the
        layer is in training mode, as torch makes it.
      batch_first: Whether it takes [B, T, E], as our layer does, rather than [T, B, E].

    Raises:
      WeightsError: If the parameters are of several dtypes; as `export_state`.
      UnsupportedError: As `export_state`.

    >>> module, x = MultiHeadAttention(num_heads=2, key_dim=8), jnp.ones((1, 5, 16))
    >>> layer = export_layer(module, module.init(jax.random.key(0), x, x))    # doctest: +SKIP
    """
    state = export_state(module, variables)
    import torch  # type: ignore[import-not-found]

    params = weights.params_of(variables)
    query_size, value_size, key_size = weights.widths(params)
    tensors = {name: tensor(x) for name, x in state.items()}
    if len(dtypes := {str(x.dtype) for x in state.values()}) > 1:
        raise WeightsError(
            f"the parameters are of the dtypes {sorted(dtypes)} and would be rounded to one: expected one "
            f"dtype, which {_TARGET} has. Cast them: jax.tree.map(lambda x: x.astype(dtype), variables)."
        )
    layer = torch.nn.MultiheadAttention(  # type: ignore[attr-defined]
        query_size,
        module.num_heads,
        dropout=module.dropout,
        bias=bool(module.use_bias),
        kdim=key_size,
        vdim=value_size,
        batch_first=batch_first,
        dtype=tensors["out_proj.weight"].dtype,
    )
    layer.load_state_dict(tensors)
    return layer if module.training is None else layer.train(module.training)


def import_masks(
    attn_mask: ArrayLike | None = None,
    key_padding_mask: ArrayLike | None = None,
    *,
    num_heads: int,
    batch: int | None = None,
) -> dict[str, Any]:
    """Return the masks of a torch call as arguments of ours: what True hides there, False hides here.

    Args:
      attn_mask: [T, S] or [B * N, T, S], or [N, T, S] unbatched, True where a query may not attend. Floats
        are added to the logits: -inf hides, and if others are not 0, they are a bias.
      key_padding_mask: [B, S], or [S] unbatched, True (or -inf) for padding.
      num_heads: Heads N, which torch folds into the batch of `attn_mask`.
      batch: B. If None, `key_padding_mask` tells it; without one, an `attn_mask` of N rows is that of an
        unbatched call: pass 1 for a batch of one.

    Returns:
      {"attention_mask": ..., "bias": ..., "value_mask": ...}, each where given: `layer.apply(variables,
      query, value, key, **import_masks(...))`. torch's `is_causal=True` is `use_causal_mask=True`.

    Raises:
      ShapeError: If a mask holds integers, or its shape does not fit.
      UnsupportedError: If a float `key_padding_mask` holds more than 0 and -inf.

    >>> hidden = np.triu(np.ones((3, 3), bool), 1)               # torch's causal mask
    >>> import_masks(hidden, num_heads=2)["attention_mask"].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    integer("num_heads", num_heads, 1, 2**31 - 1, "It is num_heads of the layer.")
    if batch is not None:
        integer("batch", batch, 1, 2**31 - 1, "Pass None where key_padding_mask tells it.")
    result = {}
    axes = None if batch is None else (batch,)  # before the heads; () for an unbatched call
    if key_padding_mask is not None:
        hidden, added = _given("key_padding_mask", key_padding_mask, ranks=(1, 2))
        if added is not None:
            raise UnsupportedError(
                "key_padding_mask holds floats other than 0 and -inf, which torch adds to the logits of "
                "every query. Pass them as bias=key_padding_mask[:, None, None], of the layer or of "
                "dot_product_attention."
            )
        padding = ~hidden
        if axes not in (None, padding.shape[:-1]):
            raise ShapeError(
                f"key_padding_mask must be [B, S] with B = batch: got {padding.shape} and batch={batch}."
            )
        axes, result["value_mask"] = padding.shape[:-1], padding
    if attn_mask is not None:
        hidden, added = _given("attn_mask", attn_mask, ranks=(2, 3))
        shape = hidden.shape
        if len(shape) == 3:
            rows = shape[0]
            if axes is None:
                axes = () if rows == num_heads else (rows // num_heads,)
            if rows != num_heads * math.prod(axes):
                raise ShapeError(
                    f"an attn_mask of three axes is [B * num_heads, T, S], or [num_heads, T, S] of an "
                    f"unbatched call: got {shape} with num_heads={num_heads}"
                    + (f" and a batch of {axes[0]}." if axes else ".")
                )
            shape = (*axes, num_heads, *shape[1:])
        if added is None or hidden.any():
            result["attention_mask"] = ~hidden.reshape(shape)
        if added is not None:
            result["bias"] = added.reshape(shape)
    return result


def _given(name: str, mask: Any, ranks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what a mask of torch's hides, and what it adds to the logits beside, or None."""
    mask = as_array(name, read(name, mask, ShapeError), "an array of booleans, or of 0 and -inf")
    if mask.ndim not in ranks:
        raise ShapeError(
            f"{name} must have {ranks[0]} or {ranks[1]} axes, as torch takes it: got {mask.shape}."
        )
    if mask.dtype == np.bool_:
        return mask, None
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        raise ShapeError(
            f"{name} must hold booleans, True for hidden, or floats: got dtype {mask.dtype}. "
            "torch refuses it too; pass mask != 0."
        )
    hidden = np.isneginf(mask)
    added = np.where(hidden, np.zeros((), mask.dtype), mask)
    return hidden, added if added.any() else None


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Return parts one after the other, in a dtype that holds the numbers of each."""
    dtypes = {x.dtype for x in parts}
    wide = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
    return np.concatenate(parts, dtype=dtypes.pop() if len(dtypes) == 1 else wide)


def _kernels(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Take the matrices out of a state, by our names."""
    packed = "in_proj_weight" in state
    names = ("in_proj_weight",) if packed else tuple(_SEPARATE.values())
    missing = [name for name in (*names, "out_proj.weight") if name not in state]
    if missing:
        raise WeightsError(
            f"the state has no {', '.join(prefix + name for name in missing)}: found "
            f"{sorted(prefix + name for name in state) or 'nothing'}. Expected in_proj_weight, or "
            "q_proj_weight, k_proj_weight and v_proj_weight, and out_proj.weight; for a layer inside a "
            "model pass the start of its names as prefix."
        )
    matrices = [state.pop(name) for name in (*names, "out_proj.weight")]
    for name, matrix in zip((*names, "out_proj.weight"), matrices):
        if matrix.ndim != 2 or (name == "in_proj_weight" and matrix.shape[0] % 3):
            wanted = "[3 * embed_dim, embed_dim]" if name == "in_proj_weight" else "two axes"
            raise WeightsError(
                f"{name} must have the shape of torch's, {wanted}: got {matrix.shape}."
            )
    output = matrices.pop()
    parts = np.split(matrices[0], 3) if packed else matrices
    return {**dict(zip(("query", "key", "value"), parts)), "attention_output": output}


def _biases(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take the biases out of a state, by our names; none if the layer has none."""
    given = {name: state.pop(name) for name in ("in_proj_bias", "out_proj.bias") if name in state}
    if not given:
        return {}
    if len(given) == 1 or given["in_proj_bias"].shape != (3 * given["out_proj.bias"].size,):
        shapes = {name: x.shape for name, x in given.items()}
        raise WeightsError(
            f"the biases do not fit each other: got {shapes}. Expected in_proj_bias [3 * embed_dim] and "
            "out_proj.bias [embed_dim], or none of them."
        )
    parts = np.split(given["in_proj_bias"], 3)
    return {
        **dict(zip(("query", "key", "value"), parts)),
        "attention_output": given["out_proj.bias"],
    }


def _check_widths(
    kernels: dict[str, np.ndarray], biases: dict[str, np.ndarray], width: int
) -> None:
    """Refuse matrices whose sides are not torch's."""
    for name, matrix in kernels.items():
        columns = matrix.shape[1] if name in ("key", "value") else width
        bias = biases[name].shape if biases else (width,)
        if matrix.shape != (width, columns) or bias != (width,):
            raise WeightsError(
                f"the {name} weights do not fit a layer of width {width}, that of out_proj.weight: got a "
                f"matrix {matrix.shape} and a bias {bias}, expected ({width}, {columns}) and ({width},)."
            )
