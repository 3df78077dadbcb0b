"""The public calls: attend, dot_product_attention, attention_scores, explain.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size
"""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from typing_extensions import Unpack

from mha_jax.attention import attention_fn, softmax
from mha_jax.attention.call import Call, Output, logits
from mha_jax.attention.check import check
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Dense, Full, Mask
from mha_jax.attention.tokens import Tokens, silence
from mha_jax.engine import run as dispatch
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
    checked = check(call)
    output = dispatch.run(_silenced(checked), backend)
    return Output(*(a.reshape(*call.q.shape[:-3], *a.shape[1:]) for a in output))


@attention_fn.shows_flax_arguments
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    *,
    mask: Mask | ArrayLike | None = None,
    bias: Float[ArrayLike, "..."] | None = None,
    dropout: Dropout | None = None,
    query_tokens: Tokens | None = None,
    key_tokens: Tokens | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    precision: Precision = None,
    backend: Any = None,
    **flax: Unpack[attention_fn.FlaxArguments],
) -> Float[Array, "*B T N V"]:
    """Attend with projected queries, keys and values.

    It is also an `attention_fn` for `flax.linen.MultiHeadDotProductAttention` and
    `flax.nnx.MultiHeadAttention`.

    Args:
      query, key, value: NumPy or JAX arrays, any leading batch axes; K divides N.
      mask: A `Mask`, or a boolean array [T, S], [*B, T, S] or [*B, N, T, S], axes of 1 broadcast.
        True means "may attend".
      bias: Added to the scaled logits, [T, S] or [*B, N, T, S], axes of 1 broadcast; differentiable.
      dropout: `Dropout(key, rate)`, or None.
      query_tokens, key_tokens: Positions, segments and validity; plain ones if None.
      scale: Factor on the logits; 1 / sqrt(H) if None.
      logit_cap: Soft cap on the logits, or None.
      precision: As for `jnp.einsum`.
      backend: As for `attend`.
      **flax: What Flax's layers pass, with Flax's meaning: see `attention_fn.FlaxArguments`. With any
        of these, the axes of a mask array and of `bias` are aligned at the last one, as in Flax.

    Returns:
      The attended values, in the dtype of `value`.

    Raises:
      ShapeError, UnsupportedError: As `attend`; and if an argument of Flax's cannot be honoured.
      TypeError: If a keyword is unknown.

    Cost: As `attend`.

    >>> from mha_jax.attention.masks import Causal
    >>> q, k, v = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8)), jnp.ones((2, 7, 2, 16))
    >>> dot_product_attention(q, k, v, mask=Causal()).shape
    (2, 5, 4, 16)
    """
    rule = Dense(mask) if isinstance(mask, (jax.Array, np.ndarray)) else mask
    call = Call(
        *(query, key, value),  # type: ignore[arg-type]
        *(query_tokens, key_tokens),  # type: ignore[arg-type]
        mask=Full() if rule is None else rule,
        bias=bias,  # type: ignore[arg-type]
        dropout=dropout,
        scale=scale,  # type: ignore[arg-type]
        logit_cap=logit_cap,
        precision=precision,
    )
    if flax:
        call = attention_fn.with_flax_arguments(call, flax)
    output = attend(call, backend)
    if (module := flax.get("module")) is not None:
        attention_fn.sow(module, attention_scores(call, output.lse))
    return output.out


def attention_scores(
    call: Call,
    lse: Float[Array, "*B N T"] | None = None,
    *,
    rows: slice | Int[ArrayLike, "R"] | None = None,
    heads: slice | Int[ArrayLike, "M"] | None = None,
) -> Float[Array, "*B M R S"]:
    """Return the attention weights before dropout, recomputed from `lse`.

    Args:
      call: The call whose scores are wanted.
      lse: Its `attend(call).lse`; computed if None.
      rows: Which queries; all if None.
      heads: Which query heads; all if None.

    Returns:
      Scores in the dtype of `call.q`; the rows sum to 1, or to 0 where a query sees no key.

    Raises:
      ShapeError: If the call is malformed.

    Cost: O(B M R S H) operations and O(B M R S) memory: what was asked for, nothing T x S.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> attention_scores(Call(x, x, x), rows=slice(0, 1)).shape
    (1, 2, 1, 5)
    """
    checked = check(call)
    lead = call.q.shape[:-3]
    call = _silenced(dataclasses.replace(checked, dropout=None))
    b, t, n, _ = call.q.shape
    if lse is None:
        lse = dispatch.run(call, None).lse
    elif lse.shape != (*lead, n, t):
        raise ShapeError(
            f"lse of shape {lse.shape} is not of this call: expected {(*lead, n, t)}, [*B, N, T]. "
            "Pass attend(call).lse of the same call, or None."
        )
    lse = lse.reshape(b, n, t)
    if heads is not None:
        heads = _chosen("heads", heads, n)
        call, lse = _of_heads(call, heads), lse[:, heads]
    if rows is not None:
        rows = _chosen("rows", rows, t)
        call, lse = _of_rows(call, rows), lse[:, :, rows]
    scores = softmax.weights(logits(call), lse[..., None]).astype(call.q.dtype)
    return scores.reshape(*lead, *scores.shape[1:])


def explain(call: Call, platform: str | None = None) -> dict[str, str]:
    """Say for every backend whether it can run a call, without running it.

    Args:
      call: The call; `jax.ShapeDtypeStruct`s do for its arrays.
      platform: "cpu", "cuda", "rocm" or "tpu"; that of this process if None.

    Returns:
      A sentence for each backend, in order of preference: "can run", or what stands in the way.

    Raises:
      ShapeError: If the call is malformed or the platform unknown.

    >>> x = jax.ShapeDtypeStruct((1, 5, 2, 4), jnp.float32)
    >>> explain(Call(x, x, x), platform="cpu")["blockwise"]
    'can run'
    """
    reasons: dict[str, str] = {}

    def trace(call):
        reasons.update(dispatch.reasons(check(call), platform))

    jax.eval_shape(trace, call)
    return reasons


def _chosen(name: str, which: Any, count: int) -> Int[np.ndarray, "M"]:
    """Return which of `count` heads or rows were asked for, as indices; traced ones as they are."""
    if isinstance(which, jax.core.Tracer):
        return which  # type: ignore[return-value]
    try:
        return np.arange(count)[which]
    except IndexError as error:
        raise ShapeError(
            f"{name}={which!r} do not exist: expected a slice, or integers from 0 to {count - 1}."
        ) from error


def _silenced(call: Call) -> Call:
    """Zero what the mask hides by token, so that NaN and Inf there reach no output or gradient."""
    if call.mask.hides_invalid_keys:
        k, v = silence(call.k, call.k_tokens), silence(call.v, call.k_tokens)
        call = dataclasses.replace(call, k=k, v=v)
    if call.mask.hides_invalid_queries:
        call = dataclasses.replace(call, q=silence(call.q, call.q_tokens))
    return call


def _of_rows(call: Call, rows: Int[np.ndarray, "R"]) -> Call:
    """Return the call of some queries only."""

    def take(a):
        return a if a.shape[2] == 1 else a[:, :, rows]

    tokens = call.q_tokens.map(lambda a: jnp.asarray(a)[:, rows], len(rows), 0)
    return dataclasses.replace(
        call,
        q=call.q[:, rows],
        q_tokens=dataclasses.replace(tokens, index=jnp.asarray(call.q_tokens.rows)[:, rows]),
        mask=jax.tree.map(take, call.mask),
        bias=None if call.bias is None else take(call.bias),
    )


def _of_heads(call: Call, heads: Int[np.ndarray, "M"]) -> Call:
    """Return the call of some query heads only, each with its key-value head."""

    def take(a):
        return a if a.shape[1] == 1 else a[:, heads]

    shared = heads // call.groups
    return dataclasses.replace(
        call,
        q=call.q[:, :, heads],
        k=call.k[:, :, shared],
        v=call.v[:, :, shared],
        mask=jax.tree.map(take, call.mask),
        bias=None if call.bias is None else take(call.bias),
    )
