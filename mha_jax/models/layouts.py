"""Attention as PyTorch's models keep it: by the names of its projections, or in one matrix.

N query heads   K key-value heads   G = N // K   H head size   D input width   R = (N + 2 K) H rows

Matrices are those of `torch.nn.Linear`, (out, in). *Stacked* ones hold all heads of the queries, then of the
keys, then of the values (GPT-2's c_attn, Phi's qkv_proj). *Grouped* ones hold the G query heads of a
key-value head, its key, its value, and then the next group (query_key_value of GPT-NeoX, BLOOM and Falcon).
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import WeightsError
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.models.weights import fill
from mha_jax.types import Params

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


def split(
    fused: np.ndarray,
    layout: Literal["stacked", "grouped"],
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
    rows, heads = fused.shape[0], num_heads + 2 * kv
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


def separated(
    tensors: Mapping[str, np.ndarray], num_heads: int, num_kv_heads: int | None = None
) -> dict[str, np.ndarray]:
    """Return the tensors of a model with q_proj, k_proj and v_proj for every fused matrix and bias.

    Args:
      tensors: By PyTorch's names; those of modules called c_attn, qkv_proj, in_proj or query_key_value are
        taken apart.
      num_heads, num_kv_heads: As for `split`.

    Raises:
      WeightsError: As `split`.

    >>> sorted(separated({"h.0.attn.c_attn.bias": np.zeros(12)}, num_heads=2))
    ['h.0.attn.k_proj.bias', 'h.0.attn.q_proj.bias', 'h.0.attn.v_proj.bias']
    """
    found = {}
    for name, x in tensors.items():
        module, _, part = name.rpartition(".")
        above, _, last = module.rpartition(".")
        if last not in _STACKED + _GROUPED:
            found[name] = x
            continue
        layout = "stacked" if last in _STACKED else "grouped"
        for ours, piece in zip(_PARTS, split(x, layout, num_heads, num_kv_heads)):
            found[f"{above}.{ours}.{part}".lstrip(".")] = piece
    return found


def import_attention(
    state: Mapping[str, np.ndarray],
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    prefix: str = "",
    **arguments: Any,
) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return a layer and its variables for one attention module of a PyTorch model.

    Args:
      state: NumPy arrays by name: q_proj, k_proj, v_proj, o_proj (Llama and its relatives, OPT, BART with
        out_proj, T5 with q, k, v, o), or a fused matrix that `separated` knows, with c_proj or dense.
      num_heads, num_kv_heads: N and K, which the weights do not show.
      prefix: Of the names, in the state of a whole model: "model.layers.0.self_attn.", say.
      **arguments: Of the layer, which the weights do not show either: `rotary=...`, `scale=1.0`,
        `sliding_window=...`. Biases are found, and norms of queries and keys: by the shape of their weights
        "rms", "rms_over_heads" (OLMo 2) or "layer_per_head" (Cohere), unless `qk_norm` says otherwise.

    Raises:
      WeightsError: If a projection is missing, or weights do not fit each other.

    >>> names = ("q_proj", "k_proj", "v_proj", "o_proj")
    >>> state = {f"{name}.weight": np.ones((6 if name[0] in "kv" else 12, 12), np.float32) for name in names}
    >>> layer, variables = import_attention(state, num_heads=4, num_kv_heads=2)
    >>> layer.key_dim, variables["params"]["key"]["kernel"].shape
    (3, (12, 2, 3))
    """
    own = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    found = separated(own, num_heads, num_kv_heads)
    there = {ours: [x for x in theirs if f"{x}.weight" in found] for ours, theirs in _NAMES.items()}
    names = {ours: theirs[0] for ours, theirs in there.items() if theirs}
    missing = [" or ".join(_NAMES[name]) for name in list(_NAMES)[:4] if name not in names]
    query = found.get(f"{names.get('query')}.weight")
    if missing or query is None or query.ndim != 2 or query.shape[0] % num_heads:
        shape = None if query is None else query.shape
        raise WeightsError(
            f"there is no whole attention under {prefix!r}: missing {missing or 'nothing'}, and the query's "
            f"matrix of shape {shape} must be (num_heads * head size, width) with num_heads={num_heads}. "
            f"Found {sorted(own)[:9] or 'nothing'}; pass the start of the names as prefix."
        )
    if "query_norm" in names:
        norm = found[f"{names['query_norm']}.weight"]
        together = norm.size > query.shape[0] // num_heads
        kind = "layer_per_head" if norm.ndim > 1 else "rms_over_heads" if together else "rms"
        arguments.setdefault("qk_norm", kind)
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
    return layer, {"params": fill(shapes, names, found)}
