"""`check`: every check of a call, and the one shape in which backends get it.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.call import Call
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import And, Mask, Not, Or, SameSegment
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.types import Array


def check(call: Call) -> Call:
    """Refuse a malformed call; return it with one batch axis, tokens, and a scale.

    Raises:
      ShapeError: With the values, what was expected, and how to fix it.
    """
    if not isinstance(call, Call):
        raise ShapeError(
            f"attention takes one Call: got {type(call).__name__}. Write attend(Call(q, k, v, mask=...)), "
            "or dot_product_attention(query, key, value, ...)."
        )
    check_mask("mask", call.mask)
    q, k, v = (_floats(name, getattr(call, name)) for name in "qkv")
    if min(q.ndim, k.ndim, v.ndim) < 3 or not q.ndim == k.ndim == v.ndim:
        raise ShapeError(
            f"q, k and v must have the same rank, at least 3: got q.shape={q.shape}, "
            f"k.shape={k.shape}, v.shape={v.shape}. Expected q [*B, T, N, H], k [*B, S, K, H], "
            "v [*B, S, K, V]: the heads are an axis of their own, before the last."
        )
    lead = q.shape[:-3]
    if k.shape[:-3] != lead or v.shape[:-3] != lead:
        raise ShapeError(
            f"q, k and v must have the same batch axes: got q.shape={q.shape}, k.shape={k.shape}, "
            f"v.shape={v.shape}. Broadcast them first (jnp.broadcast_to), or use jax.vmap with in_axes."
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(
            f"k and v must have the same length and heads: got k.shape={k.shape}, v.shape={v.shape}. "
            "Expected k [*B, S, K, H] and v [*B, S, K, V] with equal S and K. "
            "If v comes from another sequence, pass its keys too."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"q and k must have the same head size: got q.shape={q.shape}, k.shape={k.shape}. "
            "Expected q [*B, T, N, H] and k [*B, S, K, H] with equal H; only v may differ."
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ShapeError(
            f"the key-value heads must divide the query heads: got {q.shape[-2]} query heads in "
            f"q.shape={q.shape} and {k.shape[-2]} key-value heads in k.shape={k.shape}. "
            "The layout is [*B, length, heads, size]; transpose arrays that have heads first."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"q, k and v must have one dtype: got {q.dtype}, {k.dtype}, {v.dtype}. "
            "Cast them (x.astype(...)); the output has the dtype of v."
        )
    batch, t, s, heads = math.prod(lead), q.shape[-3], k.shape[-3], q.shape[-2]
    q_tokens = _tokens("q_tokens", call.q_tokens, t, lead)
    k_tokens = _tokens("k_tokens", call.k_tokens, s, lead)
    if _reads_segments(call.mask) and (q_tokens.segment is None or k_tokens.segment is None):
        raise ShapeError(
            "the mask holds SameSegment, but the tokens have no segments: got q_tokens.segment="
            f"{_of(q_tokens.segment)}, k_tokens.segment={_of(k_tokens.segment)}. "
            "Pass query_tokens=Tokens(T, segment=ids) and key_tokens=Tokens(S, segment=ids)."
        )
    shape = (*lead, heads, t, s)
    mask = jax.tree.map(lambda a: _mask_array(a, shape), call.mask)
    dropout = call.dropout
    if dropout is not None and not isinstance(dropout, Dropout):
        raise ShapeError(
            f"dropout must be a Dropout or None: got {dropout!r}. "
            "Pass dropout=Dropout(jax.random.key(0), rate)."
        )
    return dataclasses.replace(
        call,
        q=q.reshape(batch, t, heads, q.shape[-1]),
        k=k.reshape(batch, s, *k.shape[-2:]),
        v=v.reshape(batch, s, *v.shape[-2:]),
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        mask=mask,
        bias=None if call.bias is None else _bias(call.bias, shape),
        dropout=None if dropout is None or dropout.rate == 0 else dropout,
        scale=_number("scale", call.scale) if call.scale is not None else q.shape[-1] ** -0.5,
        logit_cap=_cap(call.logit_cap),
    )


def check_mask(name: str, mask: Any) -> None:
    """Refuse what is no rule.

    Raises:
      ShapeError: Saying how to write one.
    """
    if not isinstance(mask, Mask):
        raise ShapeError(
            f"{name} must be a Mask: got {mask if isinstance(mask, type) else type(mask).__name__}. Write a "
            "rule, Causal() or Window(4, 0) & ValidKeys() say; an array of booleans is Dense(array), "
            "or attention_mask= of the layer."
        )


def _of(array) -> str:
    return "None" if array is None else f"{array.dtype}{list(array.shape)}"


def _floats(name: str, x) -> Array:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise ShapeError(
            f"{name} must be a NumPy or JAX array: got {type(x).__name__}. "
            "Expected [*B, length, heads, size]; convert it with jnp.asarray."
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(
            f"{name} must hold floating-point numbers: got dtype {x.dtype}. "
            "Embed or cast it first, for example x.astype(jnp.float32)."
        )
    return x


def _tokens(name: str, tokens: Tokens | None, length: int, lead: tuple[int, ...]) -> Tokens:
    """Return tokens whose arrays are [1 or B, length], integers as int32."""
    if tokens is None:
        return Tokens(length)
    if not isinstance(tokens, Tokens):
        raise ShapeError(
            f"{name} must be Tokens or None: got {type(tokens).__name__}. "
            f"Pass Tokens({length}, pos=..., segment=..., valid=...)."
        )
    if tokens.length != length:
        raise ShapeError(
            f"{name} must describe every token: got Tokens(length={tokens.length}) for {length} "
            "tokens. q_tokens belongs to q (length T), k_tokens to k and v (length S)."
        )

    def fold(field: str):
        a = getattr(tokens, field)
        if a is None:
            return None
        a = a if isinstance(a, np.ndarray) else jnp.asarray(a)
        kinds, wanted = (jnp.integer, "integers") if field != "valid" else (jnp.bool_, "booleans")
        if not jnp.issubdtype(a.dtype, kinds):
            raise ShapeError(
                f"{name}.{field} must hold {wanted}: got dtype {a.dtype}. "
                "Positions, rows and segments are integers, validity is True or False."
            )
        if field != "valid":
            a = a.astype(np.int32)
        try:
            fits = np.broadcast_shapes(a.shape, (*lead, length)) == (*lead, length)
        except ValueError:
            fits = False
        if not fits or a.ndim == 0 or a.shape[-1] != length:
            raise ShapeError(
                f"{name}.{field} must have shape {(*lead, length)}, batch axes of 1 or left out "
                f"broadcast: got {a.shape}."
            )
        return _fold_batch(a, lead, 1)

    arrays = {field: fold(field) for field in ("index", "pos", "segment", "valid")}
    return Tokens(length, tokens.start, **arrays)


def _fold_batch(a: Any, lead: tuple[int, ...], rest: int) -> Any:
    """Fold the batch axes of `a` into one, of size 1 where all of them are 1 or left out."""
    own, tail = a.shape[: a.ndim - rest], a.shape[a.ndim - rest :]
    if math.prod(own) == 1:
        return a.reshape(1, *tail)
    xp = np if isinstance(a, np.ndarray) else jnp
    return xp.broadcast_to(a, (*lead, *tail)).reshape(math.prod(lead), *tail)


def _reads_segments(mask: Mask) -> bool:
    if isinstance(mask, (And, Or)):
        return _reads_segments(mask.a) or _reads_segments(mask.b)
    return _reads_segments(mask.a) if isinstance(mask, Not) else isinstance(mask, SameSegment)


def mask_array(a) -> Array:
    """Return a mask's array as booleans.

    Raises:
      ShapeError: If it holds floats, which are a bias, or integers that may be no truth values.
    """
    a = jnp.asarray(a)
    if jnp.issubdtype(a.dtype, jnp.floating):
        raise ShapeError(
            f"a mask holds True or False (or 1 and 0): got dtype {a.dtype}. "
            "If it is added to the logits (0 and -1e9, say), pass it as `bias`; "
            "if it marks what may be attended, pass mask != 0."
        )
    if not (jnp.issubdtype(a.dtype, jnp.integer) or a.dtype == jnp.bool_):
        raise ShapeError(
            f"a mask holds True or False (or 1 and 0): got dtype {a.dtype}. Pass mask.astype(bool)."
        )
    return a.astype(bool)


def _mask_array(a, shape: tuple[int, ...]) -> Array:
    """Return an array of a mask as [#B, #N, #T, #S] booleans; missing axes go before T and S."""
    a = mask_array(a)
    return _broadcastable("mask", a, shape, missing_heads=True)


def _bias(a, shape: tuple[int, ...]) -> Array:
    a = jnp.asarray(a)
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ShapeError(
            f"bias is added to the logits and must be floating point: got dtype {a.dtype}. "
            "Pass what marks the keys that may be attended as `mask`."
        )
    return _broadcastable("bias", a, shape, missing_heads=False)


def _broadcastable(name: str, a: Array, shape: tuple[int, ...], missing_heads: bool) -> Array:
    full, given = len(shape), a.shape
    if a.ndim == 2 or (missing_heads and 2 < a.ndim < full):
        a = a.reshape(*a.shape[:-2], *(1,) * (full - a.ndim), *a.shape[-2:])
    if a.ndim != full or any(x not in (1, y) for x, y in zip(a.shape, shape)):
        forms = ["[T, S]", "[*B, N, T, S]"]
        if missing_heads:
            forms.insert(1, "[*B, T, S]")
        raise ShapeError(
            f"{name} of shape {given} does not fit the logits [*B, N, T, S] = {shape}. "
            f"Expected {', '.join(forms)}, each axis of that size or 1. A mask over keys alone, "
            "[B, S], goes into Tokens(S, valid=...) with ValidKeys(), or key_mask= of the layer."
        )
    return _fold_batch(a, shape[:-3], 3)


def _number(name: str, x) -> float:
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not math.isfinite(x):
        raise ShapeError(
            f"{name} must be a finite Python number: got {x!r}. It is part of the compiled program; "
            "multiply q by a traced or learned factor instead."
        )
    return float(x)


def _cap(x) -> float | None:
    if x is None:
        return None
    if _number("logit_cap", x) <= 0:
        raise ShapeError(f"logit_cap must be positive: got {x!r}. Pass None for no cap.")
    return float(x)
