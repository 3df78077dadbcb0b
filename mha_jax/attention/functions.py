"""The public calls: attend, dot_product_attention, attention_scores, explain.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size
"""

import dataclasses
from typing import Any, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from typing_extensions import Unpack

from mha_jax.attention import attention_fn, softmax
from mha_jax.attention.biases import Bias, OfHeads
from mha_jax.attention.by_hand import extended
from mha_jax.attention.cache import Cache
from mha_jax.attention.call import Call, Output, Problem, logits
from mha_jax.attention.check import Names, check, check_static, checked_sinks, with_numbers
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.given import shape_of
from mha_jax.attention.masks import Dense, Full, Mask
from mha_jax.attention.slots import Slots
from mha_jax.attention.tokens import Tokens, zero_invalid
from mha_jax.engine import by_blocks
from mha_jax.engine.run import explain as explain_problem
from mha_jax.engine.run import run
from mha_jax.errors import ShapeError
from mha_jax.types import Array, ArrayLike, Float, Int, Precision


def attend(call: Call, backend: Any = None) -> Output:
    """Run one attention call.

    Args:
      call: The call; any number of leading batch axes, folded for the backend.
      backend: A name, a backend object, or None to choose by the platform lowered for.

    Returns:
      Output(out [*B, T, N, V], lse [*B, N, T]). Rows that see no key: out 0, lse -inf, gradients 0.

    Raises:
      ShapeError: If the call is malformed.
      UnsupportedError: If a named backend cannot run it.

    Cost: O(B N T S (H + V)) operations, O(T + S) memory on every backend but `reference`.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Dao 2023, arXiv:2307.08691.

    >>> x = jnp.ones((2, 5, 3, 8))
    >>> attend(Call(x, x, x)).out.shape
    (2, 5, 3, 8)
    """
    out, m, l = run(checked(call), backend, call.sinks)
    lead = call.q.shape[:-3]
    return Output(_unfolded(out, lead), _unfolded(softmax.logsumexp(m, l), lead))


def checked(call: Call, names: Names = Names()) -> Problem:  # noqa: B008
    """Return the problem of a call, with zeros where no token is, so that NaN and Inf there reach nothing.

    Raises:
      ShapeError: If the call is malformed.
    """
    problem = check(call, names)
    if call.sinks is not None:
        checked_sinks(call.sinks, problem.q.shape[2])
    q, k, v = problem.q, problem.k, problem.v
    if problem.mask.hides_invalid_keys and not isinstance(k, Slots):
        k, v = (zero_invalid(x, problem.k_tokens) for x in (k, v))
    if problem.mask.hides_invalid_queries:
        q = zero_invalid(q, problem.q_tokens)
    return dataclasses.replace(problem, q=q, k=k, v=v)


def _unfolded(x: Array, lead: tuple[int, ...]) -> Array:
    """Unfold the batch axis of an array into those of the call."""
    return x if len(lead) == 1 else x.reshape(*lead, *x.shape[1:])


class _Options(attention_fn.FlaxArguments, total=False):
    mask: Mask | ArrayLike | None
    bias: Bias | ArrayLike | None
    sinks: ArrayLike | None
    dropout: Dropout | None
    query_tokens: Tokens | None
    key_tokens: Tokens | None
    scale: float | ArrayLike | None
    logit_cap: float | None
    precision: Precision
    backend: Any


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    cache: None = None,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike | None,
    value: ArrayLike | None,
    *,
    cache: Cache,
    **options: Unpack[_Options],
) -> tuple[Array, Cache]: ...


@attention_fn.shows_flax_arguments
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"] | None,
    value: Float[ArrayLike, "*B S K V"] | None,
    *,
    mask: Mask | ArrayLike | None = None,
    bias: Bias | ArrayLike | None = None,
    sinks: Float[ArrayLike, "N"] | None = None,
    dropout: Dropout | None = None,
    query_tokens: Tokens | None = None,
    key_tokens: Tokens | None = None,
    scale: float | Float[ArrayLike, ""] | None = None,
    logit_cap: float | None = None,
    precision: Precision = None,
    cache: Cache | None = None,
    backend: Any = None,
    **flax: Unpack[attention_fn.FlaxArguments],
) -> Any:
    """Attend with projected queries, keys and values.

    It is also an `attention_fn` for `flax.linen.MultiHeadDotProductAttention` and
    `flax.nnx.MultiHeadAttention`.

    Args:
      query, key, value: NumPy or JAX arrays, any leading batch axes; K divides N.
      mask: A `Mask`, or a boolean array [T, S], [*B, T, S] or [*B, N, T, S], axes of 1 broadcast.
        True means "may attend".
      bias: Added to the scaled and capped logits: a rule, `mj.biases`, or an array [T, S] or [*B, N, T, S],
        axes of 1 broadcast; differentiable.
      sinks: A logit for every query head, [N], that takes part in the denominator of the softmax alone, so
        that a query's weights sum to less than 1; differentiable.
      dropout: `Dropout(key, rate)`, or None.
      query_tokens, key_tokens: Positions, segments and validity; plain ones if None.
      scale: Factor on the logits; 1 / sqrt(H) if None.
      logit_cap: Soft cap on the logits, or None.
      precision: As for `jnp.einsum`.
      cache: Keys and values of the tokens before, or None. `key` and `value` [B, L, K, H] are appended, those
        that `key_tokens` call invalid are not, and the queries attend to all that it holds, where it lies;
        `key=None, value=None` appends nothing. A query stands at the position of its own token where there
        are as many queries as keys, at `cache.count` and after otherwise, or where `query_tokens` says. With
        `key=None`, `key_tokens` are those of the slots, as mask arrays and bias arrays always are.
      backend: As for `attend`.
      **flax: What Flax's layers pass, with Flax's meaning: see `attention_fn.FlaxArguments`. With any
        of these, the axes of a mask array and of `bias` are aligned at the last one, as in Flax.

    Returns:
      The attended values [*B, T, N, V], in the dtype of `value`; with a cache, (values, cache).

    Raises:
      ShapeError, UnsupportedError: As `attend`; and if an argument of Flax's cannot be honoured.
      ArgumentError: If a keyword is unknown, with what it is here.

    Cost: As `attend`.

    >>> from mha_jax.attention.masks import Causal
    >>> q, k, v = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8)), jnp.ones((2, 7, 2, 16))
    >>> dot_product_attention(q, k, v, mask=Causal()).shape
    (2, 5, 4, 16)
    """
    rule = Dense(mask) if isinstance(mask, (jax.Array, np.ndarray)) else mask
    call = Call(
        *(query, key, value, query_tokens, key_tokens),
        mask=Full() if rule is None else rule,
        bias=bias,
        dropout=dropout,
        sinks=sinks,
        scale=scale,
        logit_cap=logit_cap,
        precision=precision,
    )
    if flax:
        attention_fn.check_names(dot_product_attention, flax)
        if cache is not None:
            raise ShapeError(
                f"a cache and what Flax's layers pass do not go together: got cache= and {', '.join(flax)}. "
                "Write mask=mj.Causal(), dropout=mj.Dropout(key, rate)."
            )
        call = attention_fn.with_flax_arguments(call, flax)
    if cache is not None:
        call, cache = extended(call, cache)
    # Without the lse, whose few operations cost an eager call much.
    state = run(checked(call, _ARGUMENTS), backend, call.sinks)
    if (module := flax.get("module")) is not None:
        attention_fn.sow(module, attention_scores(call))
    out = _unfolded(state.out, call.q.shape[:-3])
    return out if cache is None else (out, cache)


_ARGUMENTS = Names("query", "key", "value", "query_tokens", "key_tokens")


def attention_scores(
    call: Call,
    lse: Float[Array, "*B N T"] | None = None,
    *,
    rows: slice | Int[ArrayLike, "R"] | None = None,
    heads: slice | Int[ArrayLike, "M"] | None = None,
) -> Float[Array, "*B M R S"]:
    """Return the attention weights before dropout.

    Args:
      call: The call whose scores are wanted.
      lse: Its `attend(call).lse`, where it is at hand: it saves a pass over the logits. Rows are normalized
        by their own sums, so scores are right at any size of the logits.
      rows: Which queries; all if None.
      heads: Which query heads; all if None.

    Returns:
      Scores in the dtype of `call.q`; the rows sum to 1, to less where there are sinks, to 0 where a query
      sees no key.

    Raises:
      ShapeError: If the call is malformed, or `lse` is not of its shape.

    Cost: O(B M R S H) operations and O(B M R S) memory: what was asked for, nothing T x S.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> attention_scores(Call(x, x, x), rows=slice(0, 1)).shape
    (1, 2, 1, 5)
    """
    problem = checked(call)
    lead = call.q.shape[:-3]
    b, t, n, _ = problem.q.shape
    if lse is not None and getattr(lse, "shape", None) != (*lead, n, t):
        raise ShapeError(
            f"lse of shape {shape_of(lse)} is not of this call: expected {(*lead, n, t)}, [*B, N, T]. "
            "Pass attend(call).lse of the same call, or None."
        )
    near = None if lse is None else lse.reshape(b, n, t, 1)
    sinks = None if call.sinks is None else checked_sinks(call.sinks, n)
    if heads is not None:
        heads = _chosen("heads", heads, n)
        problem, near = _of_heads(problem, heads), None if near is None else near[:, heads]
        sinks = None if sinks is None else sinks[heads]
    if rows is not None:
        rows = _chosen("rows", rows, t)
        problem, near = _of_rows(problem, rows), None if near is None else near[:, :, rows]
    x = by_blocks.logits(problem) if isinstance(problem.k, Slots) else logits(problem)
    scores = softmax.scores(x, near)
    if sinks is not None:
        scores = scores * softmax.share(*softmax.statistics(x), sinks)[..., None]
    return _unfolded(scores.astype(call.q.dtype), lead)


def explain(call: Call, platform: str | None = None, backend: Any = None) -> dict[str, str]:
    """Say for every backend whether it can run a call, without running it.

    Args:
      call: The call; `jax.ShapeDtypeStruct`s do for its arrays.
      platform: "cpu", "cuda", "rocm" or "tpu"; that of this process if None.
      backend: As for `attend`; a `Sharded` with names of mesh axes, say.

    Returns:
      A sentence for each backend, in order of preference: "can run", or what stands in the way. Where the
      context or the types of arrays have a mesh that cuts the tokens, "sequence" says how, and why so; where
      nothing says what some of its axes cut, "mesh" names them.

    Raises:
      ShapeError: If the call is malformed or the platform unknown.
      UnsupportedError: If the call cannot be cut as `backend` says.

    >>> x = jax.ShapeDtypeStruct((1, 5, 2, 4), jnp.float32)
    >>> explain(Call(x, x, x), platform="cpu")["blockwise"]
    'can run'
    """
    check_static(call)
    found: dict[str, str] = {}

    def trace(call):
        found.update(explain_problem(check(call), platform, backend))

    jax.eval_shape(trace, with_numbers(call))
    return found


def _chosen(name: str, which: Any, count: int) -> Int[ArrayLike, "M"]:
    """Return which of `count` heads or rows were asked for, as indices; traced ones as they are."""
    if isinstance(which, jax.core.Tracer):
        if which.ndim == 1 and jnp.issubdtype(which.dtype, jnp.integer):
            return which
        which = f"{which.dtype}{list(which.shape)}"
    try:
        chosen = np.arange(count)[which]
    except (IndexError, TypeError, ValueError):
        chosen = None
    if chosen is None or chosen.ndim != 1:
        raise ShapeError(
            f"{name}={which!r} do not exist: expected a slice, or a list or array of integers from 0 to "
            f"{count - 1}."
        )
    return chosen


def _of_rows(problem: Problem, rows: Int[ArrayLike, "R"]) -> Problem:
    """Return the problem of some queries only."""

    def take(a):
        return a if a.shape[2] == 1 else a[:, :, rows]

    tokens = problem.q_tokens.map(lambda a: jnp.asarray(a)[:, rows], len(rows), 0)
    return dataclasses.replace(
        problem,
        q=problem.q[:, rows],
        q_tokens=dataclasses.replace(tokens, index=jnp.asarray(problem.q_tokens.rows)[:, rows]),
        mask=jax.tree.map(take, problem.mask),
        bias=None if problem.bias is None else take(problem.bias),
    )


def _of_heads(problem: Problem, heads: Int[ArrayLike, "M"]) -> Problem:
    """Return the problem of some query heads only, each with its key-value head."""

    def take(a):
        return a if a.shape[1] == 1 else a[:, heads]

    shared, rule = heads // problem.groups, problem.bias_rule
    return dataclasses.replace(
        problem,
        q=problem.q[:, :, heads],
        k=_taken(problem.k, shared),
        v=_taken(problem.v, shared),
        mask=jax.tree.map(take, problem.mask),
        bias=None if problem.bias is None else take(problem.bias),
        bias_rule=None if rule is None else OfHeads(rule, heads),
    )


def _taken(x: Array | Slots, heads: Int[ArrayLike, "M"]) -> Array | Slots:
    return x.of_heads(heads) if isinstance(x, Slots) else x[:, :, heads]
