"""What masks are made of, and what the rules of users must say.

B batch   T query length   S key length   N query heads
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import biases
from mha_jax.attention.biases import Bias
from mha_jax.attention.masks import And, Mask, Not, Or, Reach, SameSegment
from mha_jax.attention.tokens import Tokens, extents
from mha_jax.errors import ShapeError


def rules_of(mask: Mask) -> Iterator[Mask]:
    """Yield the rules that a mask is made of by &, | and ~."""
    if isinstance(mask, Not):
        yield from rules_of(mask.a)
    elif isinstance(mask, (And, Or)):
        yield from rules_of(mask.a)
        yield from rules_of(mask.b)
    else:
        yield mask


def reads_segments(mask: Mask) -> bool:
    """Return whether a mask compares the segments of tokens."""
    return any(isinstance(rule, SameSegment) for rule in rules_of(mask))


def check_masks(mask: Mask, q: Tokens, k: Tokens, shape: tuple[Any, ...]) -> None:
    """Refuse rules of users that say something else than True or False.

    Raises:
      ShapeError: Naming the class, and what it returned.
    """
    for rule in filter(_of_users, rules_of(mask)):
        hint = "Compare (==, <=) what it reads of q and k, and combine comparisons by &, | and ~."
        facts = q.as_queries(), k.as_keys()
        _check_said(rule, "visible", facts, shape, ("booleans", (jnp.bool_,)), hint)
        _check_reach(rule, q, k, shape)


def check_biases(bias: Bias | None, q: Tokens, k: Tokens, shape: tuple[Any, ...]) -> None:
    """Refuse biases of users that say something else than numbers of pairs.

    Raises:
      ShapeError: Naming the class, and what it returned.
    """
    for rule in () if bias is None else filter(_of_users, biases.apart(bias)[1]):
        hint = (
            "Keep the axes of what it reads of q and k; a rule that says True or False is a mask."
        )
        facts = biases.queries(q, shape[1]), k.as_keys()
        numbers = ("real numbers", (jnp.floating, jnp.integer))
        _check_said(rule, "logits", facts, shape, numbers, hint)


def _of_users(rule: Any) -> bool:
    return not type(rule).__module__.startswith("mha_jax.attention.")


def _check_said(rule: Any, method: str, facts: Any, shape: Any, wanted: Any, hint: str) -> None:
    """Refuse a rule that returns, of facts, not what is wanted, in words and dtypes."""
    name, (words, kinds) = f"{type(rule).__name__}.{method}", wanted
    of = getattr(type(rule), method)
    traced, said = jax.make_jaxpr(of, return_shape=True)(rule, *facts)
    if any(isinstance(const, jax.core.Tracer) for const in traced.consts):
        raise ShapeError(
            f"{name} closes over a traced value, whose gradient JAX could not know: make it a field of "
            f"{type(rule).__name__}, which is a pytree."
        )
    if not _fits(said, kinds, shape):
        raise ShapeError(
            f"{name} must return {words} that broadcast to [B, N, T, S] = {shape}: got {_kind(said)}. {hint}"
        )


def _check_reach(rule: Mask, q: Tokens, k: Tokens, shape: tuple[Any, ...]) -> None:
    """Refuse a rule whose `reach` of one tile of all tokens is none."""
    if type(rule).reach is Mask.reach or not all(isinstance(n, int) and n for n in shape):
        return
    q_facts, k_facts = (extents(x.facts(), x.length) for x in (q, k))
    said = rule.reach(
        jax.tree.map(lambda a: a[:, None, :, None], q_facts),
        jax.tree.map(lambda a: a[:, None, None, :], k_facts),
    )
    parts = said if isinstance(said, Reach) else ()
    if not parts or not all(_fits(part, (jnp.bool_,), (*shape[:2], 1, 1)) for part in parts):
        got = [_kind(part) for part in parts] or type(said).__name__
        raise ShapeError(
            f"{type(rule).__name__}.reach must return Reach(some, every), of booleans that broadcast to "
            f"[B, N, blocks of T, blocks of S]: got {got}. Compare the ends, q.positions[1] >= "
            "k.positions[0] say. Leave reach out if nothing is known: every tile is visited then."
        )


def _fits(said: Any, kinds: tuple[Any, ...], shape: Any) -> bool:
    """Whether something is an array of one of the kinds, or stands for one, and broadcasts to a shape."""
    said = np.bool_(said) if isinstance(said, bool) else said
    return (
        isinstance(said, (jax.ShapeDtypeStruct, jax.Array, np.ndarray, np.bool_))
        and any(jnp.issubdtype(said.dtype, kind) for kind in kinds)
        and len(said.shape) in (0, 4)
        and all(x in (1, y) for x, y in zip(said.shape, shape))
    )


def _kind(said: Any) -> str:
    if hasattr(said, "dtype") and hasattr(said, "shape"):
        return f"{said.dtype}{list(said.shape)}"
    return type(said).__name__
