"""`check`: every check of a call, which turns it into the problem that backends get.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.call import Call, Logits, Problem
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.fitted import fitted_bias, fitted_mask, fold_batch, int32
from mha_jax.attention.given import floats, is_integer, is_number, native, of_kind, precision
from mha_jax.attention.masks import check_mask
from mha_jax.attention.rules import check_biases, check_masks, reads_segments
from mha_jax.attention.slots import Slots
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.types import Array, Size

# Of a larger cap, products over it would leave float32: it changes no logit.
_LARGEST_CAP = 1e30


class Names(NamedTuple):
    """What the caller calls the arguments, for the texts of errors."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    q_tokens: str = "q_tokens"
    k_tokens: str = "k_tokens"


def check(call: Call, names: Names = Names()) -> Problem:  # noqa: B008
    """Refuse a malformed call; return it with one batch axis, tokens, and a scale.

    Raises:
      ShapeError: With the values, what was expected, and how to fix it.
    """
    check_static(call)
    check_mask("mask", call.mask)
    q, k, v = _arrays(call, names)
    lead, (t, heads, size), s = q.shape[:-3], q.shape[-3:], k.shape[-3]
    q_tokens = _tokens(names.q_tokens, call.q_tokens, t, lead)
    k_tokens = _tokens(names.k_tokens, call.k_tokens, s, lead)
    if reads_segments(call.mask) and (q_tokens.segment is None or k_tokens.segment is None):
        raise ShapeError(
            f"the mask holds SameSegment, but the tokens have no segments: got {names.q_tokens}.segment="
            f"{_of(q_tokens.segment)}, {names.k_tokens}.segment={_of(k_tokens.segment)}. "
            "Pass query_tokens=Tokens(T, segment=ids) and key_tokens=Tokens(S, segment=ids)."
        )
    shape = (*lead, heads, t, s)
    mask = fitted_mask(call.mask, shape)
    check_masks(mask, q_tokens, k_tokens, (math.prod(lead), heads, t, s))
    bias, rule = fitted_bias(call.bias, shape, q.dtype == jnp.float64)
    check_biases(rule, q_tokens, k_tokens, (math.prod(lead), heads, t, s))
    scale, factor = _scale(call.scale, size)
    return Problem(
        q=_folded(q if factor is None else _times(q, factor)),
        k=_folded(k),
        v=_folded(v),
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        mask=mask,
        bias=bias,
        bias_rule=rule,
        dropout=_dropout(call.dropout),
        logits=Logits(scale, _cap(call.logit_cap), call.precision),
        heads_first=call.heads_first,
    )


def check_static(call: Any) -> None:
    """Refuse what is no call, and what of it is no array and cannot be meant: it is the key of programs.

    Raises:
      ShapeError: With what was expected.
    """
    hint = (
        "Write Call(q, k, v, mask=...); dot_product_attention(query, key, value, ...) needs none."
    )
    of_kind("call", call, Call, hint)
    if not isinstance(call.heads_first, bool):
        raise ShapeError(
            f"heads_first must be True or False: got {call.heads_first!r}. It says how keys and values lie "
            "in memory."
        )
    if call.precision is not None:
        precision("precision", call.precision)


def with_numbers(call: Call) -> Call:
    """Return a call whose scale and cap are numbers, where they are known.

    Raises:
      ShapeError: If they are none.
    """
    scale, cap = call.scale, _cap(call.logit_cap)
    if not (scale is None or isinstance(scale, jax.core.Tracer)):
        scale, _ = _scale(scale, 1)
    return dataclasses.replace(call, scale=scale, logit_cap=cap)


def _arrays(call: Call, names: Names) -> tuple[Array, Array | Slots, Array | Slots]:
    """Return q, k and v, which fit each other."""
    q = floats(names.q, call.q)
    k, v = (  # those of a cache as they lie
        x if isinstance(x, Slots) else floats(name, x)
        for name, x in ((names.k, call.k), (names.v, call.v))
    )
    got = ", ".join(f"{name}.shape={x.shape}" for name, x in zip(names, (q, k, v)))
    if min(q.ndim, k.ndim, v.ndim) < 3 or not q.ndim == k.ndim == v.ndim:
        raise ShapeError(
            f"{names.q}, {names.k} and {names.v} must have the same rank, at least 3: got {got}. Expected "
            f"{names.q} [*B, T, N, H], {names.k} [*B, S, K, H], {names.v} [*B, S, K, V]: the heads are an "
            "axis of their own, before the last."
        )
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ShapeError(
            f"{names.q}, {names.k} and {names.v} must have the same batch axes: got {got}. "
            "Broadcast them first (jnp.broadcast_to), or use jax.vmap with in_axes."
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(
            f"{names.k} and {names.v} must have the same length and heads: got {got}. Expected {names.k} "
            f"[*B, S, K, H] and {names.v} [*B, S, K, V] with equal S and K. "
            f"If {names.v} comes from another sequence, pass its keys too."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"{names.q} and {names.k} must have the same head size: got {got}. Expected {names.q} "
            f"[*B, T, N, H] and {names.k} [*B, S, K, H] with equal H; only {names.v} may differ."
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ShapeError(
            f"the key-value heads must divide the query heads: got {q.shape[-2]} query heads in "
            f"{names.q}.shape={q.shape} and {k.shape[-2]} key-value heads in {names.k}.shape={k.shape}. "
            "The layout is [*B, length, heads, size]; transpose arrays that have heads first."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"{names.q}, {names.k} and {names.v} must have one dtype: got {q.dtype}, {k.dtype}, {v.dtype}. "
            f"Cast them (x.astype(...)); the output has the dtype of {names.v}."
        )
    return q, k, v


def _folded(x: Any) -> Any:
    """Fold the batch axes of [*B, L, N, H] into one."""
    return x if x.ndim == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def checked_sinks(sinks: Any, heads: int) -> Array:
    """Return the logits of sinks, one for each query head.

    Raises:
      ShapeError: If they are none.
    """
    native("sinks", sinks)
    if not isinstance(sinks, (jax.Array, np.ndarray)) or not (
        sinks.shape == (heads,) and jnp.issubdtype(sinks.dtype, jnp.floating)
    ):
        got = _of(sinks) if hasattr(sinks, "dtype") else repr(sinks)
        raise ShapeError(
            f"sinks must be a floating-point logit for every query head, [N] = [{heads}]: got {got}. "
            f"One for all heads is jnp.full({heads}, logit)."
        )
    return jnp.asarray(sinks)


def _dropout(dropout: Any) -> Dropout | None:
    """Return dropout with its key as data, None where nothing is dropped."""
    if dropout is None:
        return None
    if not isinstance(dropout, Dropout):
        raise ShapeError(
            f"dropout must be a Dropout or None: got {dropout!r}. "
            "Pass dropout=Dropout(jax.random.key(0), rate)."
        )
    return None if dropout.rate == 0 else dropout.of_data()


def _of(array) -> str:
    return "None" if array is None else f"{array.dtype}{list(array.shape)}"


def check_tokens(name: str, tokens: Any, length: Any = "length") -> None:
    """Refuse what is neither tokens nor None.

    Raises:
      ShapeError: Naming it.
    """
    if tokens is not None and not isinstance(tokens, Tokens):
        raise ShapeError(
            f"{name} must be Tokens or None: got {type(tokens).__name__}. "
            f"Pass Tokens({length}, pos=..., segment=..., valid=...)."
        )


def _tokens(name: str, tokens: Tokens | None, length: Size, lead: tuple[Size, ...]) -> Tokens:
    """Return tokens whose arrays are [1 or B, length], integers as int32."""
    if tokens is None:
        return Tokens(length)
    check_tokens(name, tokens, length)
    if isinstance(tokens.length, (jax.Array, np.ndarray)):
        raise ShapeError(
            f"{name} begin with their number: got Tokens({_of(tokens.length)}). Pass Tokens({length}, "
            "segment=ids), or Tokens.packed(ids) with positions that restart, valid=flags for padding."
        )
    if tokens.length != length:
        raise ShapeError(
            f"{name} must describe every token: got Tokens(length={tokens.length}) for {length} "
            "tokens. Queries (length T) have their own, keys and values (length S) theirs."
        )

    limits = np.iinfo(np.int32)
    start = tokens.start
    whole_number = is_integer(start)
    symbolic = not isinstance(length, int)
    last = 0 if symbolic or not whole_number else start + max(length - 1, 0)
    if not whole_number or not limits.min <= start <= limits.max or last > limits.max:
        raise ShapeError(
            f"{name}.start must be an integer, and every row from it on fit 32 bits: got start={start!r} for "
            f"{length} tokens. Rows that are traced go into index=."
        )

    def fold(field: str):
        a = getattr(tokens, field)
        if a is None:
            return None
        if not isinstance(a, (jax.Array, np.ndarray)):
            raise ShapeError(
                f"{name}.{field} must be an array [*B, {length}]: got {type(a).__name__}. Pass "
                f"np.asarray({field})."
            )
        kinds, wanted = (jnp.integer, "integers") if field != "valid" else (jnp.bool_, "booleans")
        if not jnp.issubdtype(a.dtype, kinds):
            raise ShapeError(
                f"{name}.{field} must hold {wanted}: got dtype {a.dtype}. "
                "Positions, rows and segments are integers, validity is True or False."
            )
        if field != "valid":
            a = int32(f"{name}.{field}", a)
        whole = (*lead, length)
        sizes = zip(a.shape[::-1], whole[::-1])
        fits = 0 < a.ndim <= len(whole) and all(x == 1 or x == y for x, y in sizes)
        if not fits or a.shape[-1] != length:
            raise ShapeError(
                f"{name}.{field} must have shape {(*lead, length)}, batch axes of 1 or left out "
                f"broadcast: got {a.shape}."
            )
        return fold_batch(a, lead, 1)

    arrays = {field: fold(field) for field in ("index", "pos", "segment", "valid")}
    return Tokens(length, int(start), **arrays)


def _scale(x: Any, size: int) -> tuple[float, Array | None]:
    """Return the scale of the logits, and a traced factor that the queries take instead."""
    if x is None:
        # Heads of no features attend evenly, whatever their logits, all 0, are multiplied by.
        return (size**-0.5 if size else 1.0), None
    if (
        isinstance(x, jax.core.Tracer)
        and jnp.ndim(x) == 0
        and jnp.issubdtype(x.dtype, jnp.floating)
    ):
        return 1.0, x
    return _number("scale", x, "a finite number, traced or not"), None


def _number(name: str, x: Any, wanted: str) -> float:
    if (
        isinstance(x, (jax.Array, np.ndarray))
        and jnp.ndim(x) == 0
        and jnp.issubdtype(x.dtype, jnp.number)
        and not isinstance(x, jax.core.Tracer)
    ):
        x = x.item()
    if not is_number(x) or not abs(float(x)) <= float(np.finfo(np.float32).max):
        raise ShapeError(
            f"{name} must be {wanted}, within float32: got {x!r}. Expected a Python number or an array of no "
            "axes, 0.125 or 1 / jnp.sqrt(64) say."
        )
    return float(x)


def _times(q: Array, factor: Array) -> Array:
    """Multiply queries by a traced factor, which is not rounded to their dtype before."""
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    return (q.astype(wide) * factor.astype(wide)).astype(q.dtype)


def _cap(x: Any) -> float | None:
    if x is None:
        return None
    if isinstance(x, jax.core.Tracer):
        raise ShapeError(
            f"logit_cap must be known while tracing: got {x!r}. It is part of the compiled program; mark it "
            "static, jax.jit(..., static_argnames='logit_cap')."
        )
    if not 0 < (cap := _number("logit_cap", x, "a finite number")) <= _LARGEST_CAP:
        raise ShapeError(
            f"logit_cap must be positive, and at most {_LARGEST_CAP:g}: got {x!r}. Pass None for no cap."
        )
    return cap
