"""Call, Problem and their results: what one attention is, from the request to the answer.

B batch   T query length   S key length   N query heads   K key-value heads, N = G * K
H query-key head size   V value head size

`Call` is what a user asks. `check` turns it into a `Problem`, the only signature below: four-dimensional
arrays, tokens, and the `Logits` that turn q . k into logits,

    logits = cap(scale * q . k) + bias,    cap(x) = c tanh(x / c)

masked, then softmax, then dropout. A query head n reads the key-value head n // G.

A row of logits is summed up by its maximum m and by l, the sum of exp(logits - m), never by the log of the
sum alone: weights are exp(x - m) / l, right at any size of the logits. What users see is lse = m + log(l).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import biases, softmax
from mha_jax.attention.biases import Bias
from mha_jax.attention.brief import alike, brief
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Full, Mask, static
from mha_jax.attention.tokens import Tokens, finite, replaced
from mha_jax.types import Array, ArrayLike, Float, Keys, Precision, Queries, Values


@dataclasses.dataclass(frozen=True)
class Call:
    """A request for attention, as the user writes it; `check` refuses what cannot be right.

    Args:
      q: Queries [*B, T, N, H].
      k: Keys [*B, S, K, H]; K divides N.
      v: Values [*B, S, K, V].
      q_tokens: Tokens of the queries; plain ones if None.
      k_tokens: Tokens of the keys; plain ones if None.
      mask: Which query may attend to which key.
      bias: Added to the scaled and capped logits: a rule, `mj.biases`, or an array [T, S] or [*B, N, T, S],
        axes of 1 broadcast; differentiable.
      dropout: Dropout on the weights, or None.
      sinks: A logit for every query head [N] that takes part in the denominator of the softmax alone, or
        None: weights sum to less than 1. The statistics, lse, are those of the keys.
      scale: Factor on q . k, 1 / sqrt(H) if None. A Python number or a concrete array is part of the
        program, one that is traced, or goes into a program with its call, is multiplied into q.
      logit_cap: The scaled products become `logit_cap * tanh(x / logit_cap)`, or None.
      precision: What `jnp.einsum` takes; None is the platform's default.
      heads_first: Keys and values lie as [B, K, S, H] and [B, K, S, V] in memory, those of a `Cache`
        for example; here they are views. It changes what is fast, nothing else.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> Call(x, x, x).mask
    Full()
    """

    q: Any
    k: Any
    v: Any
    q_tokens: Any = None
    k_tokens: Any = None
    mask: Any = dataclasses.field(default_factory=Full)
    bias: Any = None
    dropout: Any = None
    sinks: Any = None
    scale: Any = static(default=None)
    logit_cap: Any = static(default=None)
    precision: Precision = static(default=None)
    heads_first: bool = static(default=False)

    def __repr__(self) -> str:
        return brief(self)

    __eq__ = alike


def _flat(call: Call) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    """Return what of a call goes into programs with their keys, and what programs are made of.

    A scale is one or the other: a number may be part of a program, an array cannot.
    """
    dynamic, fixed = [], []
    for field in dataclasses.fields(Call):
        x = getattr(call, field.name)
        # In jax 0.7 `vmap` puts bare objects in the place of arrays.
        array = isinstance(x, (jax.Array, np.ndarray)) or type(x) is object
        held = array or not field.metadata.get("static")
        dynamic.append((jax.tree_util.GetAttrKey(field.name), x if held else None))
        fixed.append(None if held else x)
    return dynamic, tuple(fixed)


def _of_flat(fixed: tuple[Any, ...], dynamic: Iterable[Any]) -> Call:
    return Call(*(x if said is None else said for said, x in zip(fixed, dynamic)))


jax.tree_util.register_pytree_with_keys(Call, _flat, _of_flat)


# What is smaller is no normal number of float32, and counts as 0 on some platforms.
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Logits:
    """How q . k becomes a logit, but for bias and mask: the part that every backend writes out itself.

    >>> Logits(scale=0.5, cap=None).capped(jnp.float32(3))
    Array(1.5, dtype=float32)
    """

    scale: float
    cap: float | None = None
    precision: Precision = None

    @property
    def scale_can_wait(self) -> bool:
        """Whether products order as logits do, and stay numbers where the exponent takes the scale."""
        return self.cap is None and self.scale >= _SMALLEST

    @property
    def multiplies(self) -> bool:
        """Whether anything is done to q . k, a multiplication last."""
        return self.scale != 1 or self.cap is not None

    def capped(self, dot: Float[Array, "*R"]) -> Float[Array, "*R"]:
        """Scale q . k and cap it."""
        x = dot if self.scale == 1 else dot * jnp.asarray(self.scale, dot.dtype)
        if self.cap is None:
            return x
        cap = jnp.asarray(self.cap, x.dtype)
        return cap * jnp.tanh(x / cap)

    def slope(self, capped: Float[Array, "*R"]) -> Float[Array, "..."]:
        """Return the derivative of the cap, given its value; 1 without a cap."""
        if self.cap is None:
            return jnp.ones((), capped.dtype)
        ratio = capped / jnp.asarray(self.cap, capped.dtype)
        return 1 - ratio * ratio


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """A checked call: what backends get.

    Args:
      q: Queries [B, T, N, H].
      k: Keys [B, S, K, H]; `Slots` of a cache are cut into blocks before any backend runs.
      v: Values [B, S, K, V], or `Slots`.
      q_tokens, k_tokens: The tokens of both sides, arrays [#B, length].
      mask: A rule; its arrays are [#B, #N, #T, #S] booleans.
      bias: Added to the capped logits, or None.
      bias_rule: Added to the capped logits, by rule, or None.
      dropout: Dropout whose key is key data, two 32-bit words, or None.
      logits: How q . k becomes a logit.
      heads_first: As in `Call`.
      constants: Which of "bias" and "bias_rule" nobody asks a gradient of; see `moving`.
    """

    q: Queries
    k: Any  # Keys, or Slots
    v: Any  # Values, or Slots
    q_tokens: Tokens
    k_tokens: Tokens
    mask: Mask
    bias: Float[ArrayLike, "#B #N #T #S"] | None
    bias_rule: Bias | None
    dropout: Dropout | None
    logits: Logits = static()
    heads_first: bool = static(default=False)
    constants: tuple[str, ...] = static(default=())

    @property
    def groups(self) -> int:
        """Query heads for each key-value head."""
        return self.q.shape[2] // max(1, self.k.shape[2])

    @property
    def accumulator(self) -> Any:
        """The dtype of logits, softmax and statistics: float64 for float64 inputs, else float32."""
        return jnp.float64 if self.q.dtype == jnp.float64 else jnp.float32


class Output(NamedTuple):
    """What attention returns: always both, so that outputs over disjoint keys can be merged."""

    out: Float[Array, "*B T N V"]
    lse: Float[Array, "*B N T"]  # log of the sum of exp(logits); -inf where a row saw no key


class State(NamedTuple):
    """What a forward pass returns and its derivatives rest on: the output and every row's (max, sum)."""

    out: Float[Array, "B T N V"]
    m: Float[Array, "B N T"]  # the largest logit; -inf where a row saw no key
    l: Float[Array, "B N T"]  # the sum of exp(logits - m); 0 where a row saw no key


def after_sinks(state: State, sinks: Float[ArrayLike, "N"] | None) -> State:
    """Return a state with the share of every row's weights that its sinks leave."""
    if sinks is None:
        return state
    return state._replace(out=kept(state.out, state, sinks))


def kept(x: Float[Array, "B T N V"], state: State, sinks: Float[ArrayLike, "N"]) -> Array:
    """Return rows times the share of their weights that sinks leave."""
    share = softmax.share(state.m, state.l, jnp.asarray(sinks)).swapaxes(1, 2)[..., None]
    return (x.astype(share.dtype) * share).astype(x.dtype)


class Moves(NamedTuple):
    """A direction in what is differentiable of a problem, or a cotangent of it.

    None means that an array does not move, or is not there.
    """

    q: Queries | None
    k: Keys | None
    v: Values | None
    bias: Array | None
    bias_rule: Any = None  # a rule with None where it has no floats


def of_keys(problem: Problem, k: Any, v: Any, start: Any, size: int) -> Problem:
    """Return the problem of some keys, `size` from `start` on, with their tokens, masks and biases.

    Args:
      problem: The whole.
      k, v: These keys and values.
      start: A number, traced or not.
      size: How many there are.
    """

    def cut(a: Any, axis: int) -> Any:
        if a is None or a.shape[axis] == 1:
            return a
        if isinstance(start, jax.Array):
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(a), start, size, axis)
        return jax.lax.slice_in_dim(jnp.asarray(a), start, start + size, axis=axis)

    tokens = problem.k_tokens.map(lambda a: cut(a, 1), size, 0)
    if problem.k_tokens.index is None:
        rows = jnp.arange(size, dtype=jnp.int32)[None] + (problem.k_tokens.start + start)
        tokens = dataclasses.replace(tokens, index=rows)
    mask, bias = jax.tree.map(lambda a: cut(a, 3), problem.mask), cut(problem.bias, 3)
    return dataclasses.replace(problem, k=k, v=v, k_tokens=tokens, mask=mask, bias=bias)


def moving(problem: Problem) -> Moves:
    """Return what a problem is differentiated in, None for arrays that are constants or not there."""
    found = Moves(*(getattr(problem, name) for name in Moves._fields))
    found = found._replace(bias_rule=biases.floats(problem.bias_rule))
    still = {name: jax.tree.map(lambda _: None, getattr(found, name)) for name in problem.constants}
    return found._replace(**still)


def without_constants(problem: Problem, moves: Moves) -> Moves:
    """Return cotangents of a problem without those of its constants, which a backend may compute, too."""
    return jax.tree.map(
        lambda asked, move: None if asked is None else move,
        *(moving(problem), moves),
        is_leaf=lambda x: x is None,
    )


def logits(problem: Problem) -> Float[Array, "B N T S"]:
    """Return every logit in the accumulator's dtype, -inf where the mask hides the key.

    NaN and Inf in what is hidden reach no gradient: products are taken of finite numbers, and the logits of
    the tokens that hold others are marked beside.
    """
    b, t, n, h = problem.q.shape
    q, q_mark = _apart(problem.q, problem)
    k, k_mark = _apart(problem.k, problem)
    dot = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        q.reshape(b, t, problem.k.shape[2], problem.groups, h),
        k,
        precision=problem.logits.precision,
        preferred_element_type=problem.accumulator,
    )
    x = problem.logits.capped(dot.reshape(b, n, t, problem.k.shape[1]))
    if q_mark is not None and k_mark is not None:
        k_mark = jnp.repeat(k_mark, problem.groups, 1)
        x = x + q_mark[..., :, None] + k_mark[..., None, :]
    if problem.bias is not None:
        x = x + problem.bias.astype(x.dtype)
    if problem.bias_rule is not None:
        facts = biases.queries(problem.q_tokens, n), problem.k_tokens.as_keys()
        x = x + jnp.asarray(problem.bias_rule.logits(*facts)).astype(x.dtype)
    visible = problem.mask.visible(problem.q_tokens.as_queries(), problem.k_tokens.as_keys())
    return jnp.where(visible, x, -jnp.inf)


def _apart(x: Array, problem: Problem) -> tuple[Array, Array | None]:
    """Return tokens as finite numbers, and marks [B, heads, L]: NaN where they were none, else 0.

    Where the mask hides nothing, they stay as they are.
    """
    if isinstance(problem.mask, Full):
        return x, None
    real = finite(x)
    mark = jnp.where(real[..., 0], 0, jnp.nan).astype(problem.accumulator)
    return replaced(x, real, 0.0), mark.swapaxes(1, 2)
