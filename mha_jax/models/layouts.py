"""Attention as PyTorch's models keep it: by the names of its projections, or in one matrix.

N query heads   K key-value heads   G = N // K   H head size   D input width   R = (N + 2 K) H rows

Matrices are those of `torch.nn.Linear`, (out, in). *Stacked* ones hold all heads of the queries, then of the
keys, then of the values (GPT-2's c_attn, Phi's qkv_proj). *Grouped* ones hold the G query heads of a
key-value head, its key, its value, and then the next group (query_key_value of GPT-NeoX, BLOOM and Falcon).
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.given import integer, text
from mha_jax.errors import WeightsError
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.models.weights import arrays, fill
from mha_jax.types import Params

Layout: TypeAlias = Literal["stacked", "grouped"]
_STACKED, _GROUPED = ("c_attn", "qkv_proj", "in_proj"), ("query_key_value",)
_PARTS = ("q_proj", "k_proj", "v_proj")
_NAMES = {
    "query": ("q_proj", "query", "q"),
    "key": ("k_proj", "key", "k"),
    "value": ("v_proj", "value", "v"),
    "attention_output": ("o_proj", "out_proj", "c_proj", "dense", "o"),
    "query_norm": ("q_norm", "query_norm", "q_layernorm"),
    "key_norm": ("k_norm", "key_norm", "k_layernorm"),
}
# What PyTorch's modules keep beside their weights.
_BUFFERS = ("masked_bias", "rotary_emb.inv_freq")


def split(
    fused: np.ndarray | jax.Array,
    layout: Layout,
    num_heads: int,
    num_kv_heads: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take the matrices, or the biases, of query, key and value out of one.

    Args:
      fused: [R, D], or [R].
      layout: How the rows lie.
      num_heads: N.
      num_kv_heads: K; N if None.

    Returns:
      [N H, D], [K H, D], [K H, D], or without D.

    Raises:
      WeightsError: If the rows do not fall into so many heads.

    >>> query, key, value = split(np.arange(8), "grouped", num_heads=4, num_kv_heads=2)
    >>> query.tolist(), key.tolist(), value.tolist()
    ([0, 1, 4, 5], [2, 6], [3, 7])
    """
    kv = num_heads if num_kv_heads is None else num_kv_heads
    for name, count in (("num_heads", num_heads), ("num_kv_heads", kv)):
        integer(name, count, 1, 2**31 - 1, "It is that of the model.")
    if not isinstance(fused, (np.ndarray, jax.Array)):
        raise WeightsError(f"fused weights must be a NumPy array: got {type(fused).__name__}.")
    fused = np.asarray(fused)
    if not fused.ndim or not fused.size:
        raise WeightsError(f"fused weights must be [R, D] or [R]: got shape {fused.shape}.")
    rows, heads = fused.shape[0], num_heads + 2 * kv
    _known(layout)
    if rows % heads or num_heads % kv:
        raise WeightsError(
            f"the fused weights have {rows} rows, which must be those of {num_heads} query heads and twice "
            f"{kv} key-value heads, a multiple of {heads}. Pass the num_heads and num_kv_heads of the model."
        )
    if layout == "stacked":
        size = rows // heads
        parts = np.split(fused, [num_heads * size, (num_heads + kv) * size])
    else:
        groups = fused.reshape(kv, num_heads // kv + 2, rows // heads, *fused.shape[1:])
        parts = [groups[:, :-2], groups[:, -2], groups[:, -1]]
    query, key, value = (x.reshape(-1, *fused.shape[1:]) for x in parts)
    return query, key, value


def _known(layout: Any) -> None:
    if layout not in get_args(Layout):
        raise WeightsError(f"layout must be one of {', '.join(get_args(Layout))}: got {layout!r}.")


def separated(
    tensors: Mapping[str, np.ndarray],
    num_heads: int,
    num_kv_heads: int | None = None,
    layout: Layout | None = None,
) -> dict[str, np.ndarray]:
    """Return the tensors of a model with q_proj, k_proj and v_proj for every fused matrix and bias.

    Args:
      tensors: By PyTorch's names; those of modules called c_attn, qkv_proj, in_proj or query_key_value are
        taken apart.
      num_heads, num_kv_heads: As for `split`.
      layout: As for `split`; if None, by the module's name: query_key_value is grouped, others are stacked.

    Raises:
      WeightsError: As `split`; if a fused matrix stands beside separate ones.

    >>> sorted(separated({"h.0.attn.c_attn.bias": np.zeros(12)}, num_heads=2))
    ['h.0.attn.k_proj.bias', 'h.0.attn.q_proj.bias', 'h.0.attn.v_proj.bias']
    """
    found = {}
    for name, x in arrays(tensors).items():
        module, _, part = name.rpartition(".")
        above, _, last = module.rpartition(".")
        if last not in _STACKED + _GROUPED:
            found[name] = x
            continue
        lies = layout or ("stacked" if last in _STACKED else "grouped")
        for ours, piece in zip(_PARTS, split(x, lies, num_heads, num_kv_heads)):
            own = f"{above}.{ours}.{part}".lstrip(".")
            if own in tensors or own in found:
                raise WeightsError(
                    f"there are both {name!r} and {own!r}, of its own or out of another matrix, and one "
                    "of them would be left out. Pass those that the model computes with."
                )
            found[own] = piece
    return found


def _upright(state: Mapping[str, np.ndarray], num_heads: int, kv: int) -> Mapping[str, np.ndarray]:
    """Return matrices as (out, in), if a fused one fits its bias and the output's as (in, out) alone.

    Raises:
      WeightsError: If they fit both ways.
    """
    shapes = {name: x.shape for name, x in state.items() if x.ndim == 2 or name.endswith(".bias")}
    fused, output = (
        next((name for name in names if f"{name}.weight" in shapes), None)
        for names in (_STACKED + _GROUPED, _NAMES["attention_output"])
    )
    if fused is None or output is None:
        return state
    matrix, out = shapes[f"{fused}.weight"], shapes[f"{output}.weight"]
    bias = shapes.get(f"{fused}.bias")

    def fits(turned: bool) -> bool:
        size, rest = divmod(matrix[turned], num_heads + 2 * kv)
        joined = out[not turned] == num_heads * size
        return joined and not rest and bias in (None, (matrix[turned],))

    if fits(True) and fits(False):
        raise WeightsError(
            f"{fused}.weight of shape {matrix} and {output}.weight of shape {out} may be (out, in), or (in, "
            "out) as GPT-2's. Pass q_proj, k_proj and v_proj as split makes them of an (out, in) one."
        )
    if not fits(True):
        return state
    return {name: x.T if name.endswith(".weight") else x for name, x in state.items()}


def import_attention(
    state: Mapping[str, np.ndarray],
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    prefix: str = "",
    layout: Layout | None = None,
    **arguments: Any,
) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return a layer and its variables for one attention module of a PyTorch model.

    Args:
      state: NumPy arrays by name: q_proj, k_proj, v_proj, o_proj (Llama and its relatives, OPT, BART with
        out_proj, T5 with q, k, v, o), or a fused matrix that `separated` knows, with c_proj or dense; those
        of GPT-2, (in, out), too.
      num_heads, num_kv_heads: N and K, which the weights do not show.
      prefix: Of the names, in the state of a whole model: "model.layers.0.self_attn.", say.
      layout: Of a fused matrix, as for `separated`: "grouped" for GPTBigCode's c_attn without multi_query.
      **arguments: Of the layer, which the weights do not show either: `rotary=...`, `scale=1.0`,
        `sliding_window=...`. Biases are found, and norms of queries and keys: by the shape of their weights
        "rms", "rms_over_heads" (OLMo 2) or "layer_per_head" (Cohere), unless `qk_norm` says otherwise;
        sinks, too (gpt-oss). The weights of norms are taken as they are: add the 1 that Gemma's are kept
        without.

    Raises:
      WeightsError: If a projection is missing, weights do not fit each other, or some have no place.

    >>> names = ("q_proj", "k_proj", "v_proj", "o_proj")
    >>> state = {f"{name}.weight": np.ones((6 if name[0] in "kv" else 12, 12), np.float32) for name in names}
    >>> layer, variables = import_attention(state, num_heads=4, num_kv_heads=2)
    >>> layer.key_dim, variables["params"]["key"]["kernel"].shape
    (3, (12, 2, 3))
    """
    kv = num_heads if num_kv_heads is None else num_kv_heads
    for name, count in (("num_heads", num_heads), ("num_kv_heads", kv)):
        integer(name, count, 1, 2**31 - 1, "It is that of the model.")
    if layout is not None:
        _known(layout)
    state, prefix = arrays(state), text("prefix", prefix, "Pass '' for none.")
    own = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    if own.get("bias", np.zeros(0)).ndim == 4:  # a causal mask
        del own["bias"]
    found = separated(_upright(own, num_heads, kv), num_heads, num_kv_heads, layout)
    there = {ours: [x for x in theirs if f"{x}.weight" in found] for ours, theirs in _NAMES.items()}
    names = {ours: theirs[0] for ours, theirs in there.items() if theirs}
    missing = [" or ".join(_NAMES[name]) for name in list(_NAMES)[:4] if name not in names]
    query = found.get(f"{names.get('query')}.weight")
    shapes = {x: found[f"{names[x]}.weight"].shape for x in list(_NAMES)[:4] if x in names}
    flat = any(len(shape) != 2 for shape in shapes.values())
    if missing or flat or query is None or query.shape[0] % num_heads or not query.size:
        raise WeightsError(
            f"there is no whole attention under {prefix!r}: missing {missing or 'nothing'}, and matrices, "
            f"the query's (num_heads * head size, width) with num_heads={num_heads}, have shapes {shapes}. "
            f"Found {sorted(own)[:9] or 'nothing'}; pass the start of the names as prefix."
        )
    if "query_norm" in names:
        norm = found[f"{names['query_norm']}.weight"]
        together = norm.size > query.shape[0] // num_heads
        kind = "layer_per_head" if norm.ndim > 1 else "rms_over_heads" if together else "rms"
        arguments.setdefault("qk_norm", kind)
    if "sinks" in found and arguments.setdefault("use_sinks", True):
        names["sinks"] = "sinks"
        found["sinks.weight"] = found.pop("sinks")
    biased = tuple(ours for ours in list(_NAMES)[:4] if f"{names[ours]}.bias" in found)
    layer = MultiHeadAttention(
        num_heads,
        query.shape[0] // num_heads,
        num_kv_heads=num_kv_heads,
        use_bias=biased or False,
        output_shape=found[f"{names['attention_output']}.weight"].shape[0],
        param_dtype=jnp.dtype(query.dtype),
        **arguments,
    )
    x, memory = (
        jax.ShapeDtypeStruct((1, 1, found[f"{names[name]}.weight"].shape[-1]), query.dtype)
        for name in ("query", "value")
    )
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, memory)["params"]
    taken = {f"{names.get(name)}.{part}" for name in shapes for part in ("weight", "bias")}
    if left := sorted(set(found) - taken - set(_BUFFERS)):
        raise WeightsError(
            f"these weights under {prefix!r} have no place in the layer: {', '.join(left[:9])}. Take them "
            "out of the state if the model computes without them."
        )
    return layer, {"params": fill(shapes, names, found)}
