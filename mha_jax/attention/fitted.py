"""Arrays of masks and biases, as the caller wrote them, fitted to the logits of a call.

B batch   T query length   S key length   N query heads
"""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import biases
from mha_jax.attention.biases import Bias
from mha_jax.attention.given import as_array, is_integer
from mha_jax.attention.masks import Dense, Mask
from mha_jax.attention.patterns import PrefixLM
from mha_jax.errors import ShapeError
from mha_jax.types import Array, Size


def mask_array(a, name: str = "a mask") -> Array:
    """Return a mask's array as booleans; `name` is what the caller calls it.

    Of traced integers, whose values cannot be seen, 1 alone means "may attend": what is no truth value hides.

    Raises:
      ShapeError: If it holds floats, which are a bias, or integers other than 0 and 1.
    """
    a = as_array(name, a, "an array of booleans, True where a query may attend")
    if jnp.issubdtype(a.dtype, jnp.floating):
        raise ShapeError(
            f"{name} holds True or False (or 1 and 0): got dtype {a.dtype}. "
            "If it is added to the logits (0 and -1e9, say), pass it as `bias`; "
            "if it marks what may be attended, pass mask != 0."
        )
    if not (jnp.issubdtype(a.dtype, jnp.integer) or a.dtype == jnp.bool_):
        raise ShapeError(
            f"{name} holds True or False (or 1 and 0): got dtype {a.dtype}. Pass mask.astype(bool)."
        )
    if a.dtype != jnp.bool_ and not isinstance(a, jax.core.Tracer):
        seen = np.asarray(a)
        other = seen[(seen != 0) & (seen != 1)]
        if other.size:
            raise ShapeError(
                f"{name} holds True or False (or 1 and 0): got {a.dtype} with the value {other[0]}. "
                "Numbers that are added to the logits are a bias: pass bias=mask.astype(float). Lengths are "
                "jnp.arange(S)[None] < lengths[:, None]. If anything but 0 may be attended, pass mask != 0."
            )
    return jnp.asarray(a == 1 if a.dtype != jnp.bool_ else a)


def fitted_mask(mask: Mask, shape: tuple[Size, ...]) -> Mask:
    """Return a mask whose arrays broadcast to the logits with one batch axis."""

    def fit(part):
        if isinstance(part, PrefixLM):
            return PrefixLM(_of_examples("the lengths of PrefixLM", part.lengths, shape[:-3]))
        if isinstance(part, Dense):
            return Dense(_mask_array(part.array, shape))
        return _mask_array(part, shape)

    return jax.tree.map(fit, mask, is_leaf=lambda part: isinstance(part, (Dense, PrefixLM)))


def _of_examples(name: str, a: Any, lead: tuple[Size, ...]) -> Array:
    """Return integers of examples as [#B, 1, 1, 1]."""
    # A Python integer stays one that can be looked at, in 64 bits too.
    a = np.asarray(a) if is_integer(a) else as_array(name, a, "an integer, or integers")
    sizes = zip(a.shape[::-1], lead[::-1])
    if (
        not jnp.issubdtype(a.dtype, jnp.integer)
        or a.ndim > len(lead)
        or any(x not in (1, y) for x, y in sizes)
    ):
        raise ShapeError(
            f"{name} must be an integer or integers of the batch axes {lead}, each axis of that size or 1: "
            f"got {a.dtype}{list(a.shape)}."
        )
    return jnp.asarray(fold_batch(int32(name, a)[..., None, None, None], lead, 3))


def _mask_array(a, shape: tuple[Size, ...]) -> Array:
    """Return an array of a mask as [#B, #N, #T, #S] booleans; missing axes go before T and S."""
    if isinstance(a, Mask):
        raise ShapeError(
            f"{type(a).__name__} is a mask, but no pytree: JAX cannot carry it into a program. "
            "Decorate its class with @jax.tree_util.register_dataclass and "
            "@dataclasses.dataclass(frozen=True)."
        )
    a = mask_array(a)
    return _broadcastable("mask", a, shape, missing_heads=True)


def fitted_bias(
    bias: Any, shape: tuple[Size, ...], wider: bool = False
) -> tuple[Array | None, Bias | None]:
    """Return the array of a bias, those of a sum added up, and its rules.

    Args:
      bias: As the caller wrote it.
      shape: Of the logits.
      wider: Whether the logits are float64, not float32.
    """
    arrays, rules = ([], []) if bias is None else biases.apart(bias)
    for rule in rules:
        if jax.tree.structure(rule) == jax.tree.structure(0):
            raise ShapeError(
                f"{type(rule).__name__} is no pytree, so that JAX cannot look into it: write "
                "@mj.biases.pytree above the class."
            )
        for leaf in jax.tree.leaves(rule):
            as_array(f"an array of {type(rule).__name__}", leaf, "an array of numbers")
        rule.check(shape[-3])
    dense = None
    for a in arrays:
        a = _bias(a, shape)
        if dense is not None:
            # What is added up is not rounded to less than the logits are.
            wide = jnp.float64 if wider else jnp.promote_types(dense.dtype, jnp.float32)
            a = dense.astype(wide) + a.astype(wide)
        dense = a
    return dense, biases.together(rules)


def _bias(a, shape: tuple[Size, ...]) -> Array:
    a = jnp.asarray(as_array("bias", a, "an array [*B, N, T, S] or a rule of mj.biases"))
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ShapeError(
            f"bias is added to the logits and must be floating point: got dtype {a.dtype}. "
            "Pass what marks the keys that may be attended as `mask`."
        )
    return _broadcastable("bias", a, shape, missing_heads=False)


def _broadcastable(name: str, a: Array, shape: tuple[Size, ...], missing_heads: bool) -> Array:
    full, given = len(shape), a.shape
    if a.ndim == 2 or (missing_heads and 2 < a.ndim < full):
        a = a.reshape(*a.shape[:-2], *(1,) * (full - a.ndim), *a.shape[-2:])
    if a.ndim != full or any(x not in (1, y) for x, y in zip(a.shape, shape)):
        forms = ["[T, S]", "[*B, N, T, S]"]
        if missing_heads:
            forms.insert(1, "[*B, T, S]")
        hint = (
            "A mask over keys alone, [B, S], goes into Tokens(S, valid=...) with ValidKeys(), or key_mask= "
            "of the layer."
        )
        if name == "bias":
            hint = (
                "One for all examples, [N, T, S], is bias[None]; a number for every head, "
                "bias[:, None, None]; slopes of ALiBi, mj.biases.Alibi(slopes)."
            )
        raise ShapeError(
            f"{name} of shape {given} does not fit the logits [*B, N, T, S] = {shape}. "
            f"Expected {', '.join(forms)}, each axis of that size or 1. {hint}"
        )
    return fold_batch(a, shape[:-3], 3)


def fold_batch(a: Any, lead: tuple[Size, ...], rest: int) -> Any:
    """Fold the batch axes of `a` into one, of size 1 where all of them are 1 or left out."""
    own, tail = a.shape[: a.ndim - rest], a.shape[a.ndim - rest :]
    if math.prod(own) == 1:
        return a.reshape(1, *tail)
    xp = np if isinstance(a, np.ndarray) else jnp
    return xp.broadcast_to(a, (*lead, *tail)).reshape(math.prod(lead), *tail)


def int32(name: str, a: Any) -> Any:
    """Return integers as 32-bit ones, whose values they must have.

    Raises:
      ShapeError: If a value does not fit, or cannot be seen and might not.
    """
    if jnp.iinfo(a.dtype).bits < 32 or a.dtype == np.int32:
        return a.astype(np.int32)
    limits = np.iinfo(np.int32)
    if isinstance(a, jax.core.Tracer):
        raise ShapeError(
            f"{name} must hold integers of at most 32 bits: got a traced {a.dtype}, whose values cannot be "
            f"checked. Pass {name.rpartition('.')[2]}.astype(jnp.int32)."
        )
    seen = np.asarray(a)
    if seen.size and (seen.min() < limits.min or seen.max() > limits.max):
        raise ShapeError(
            f"{name} must hold integers that fit 32 bits: got values from {seen.min()} to {seen.max()}. "
            "Number them from 0 first, ids by np.unique(ids, return_inverse=True), times by subtracting "
            "the first."
        )
    return a.astype(np.int32)
