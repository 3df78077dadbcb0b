"""Attention of a few queries to many keys, one decoding step say: the keys are read once, in place.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size

Tiles would first turn keys and values heads first, which costs more than the attention itself. Here all
queries of an example stand in one block-diagonal matrix [K H, T G K], so that one product with the keys
as they lie, [S, K H], gives every logit, [S, T, G, K]. It multiplies K times as many numbers as needed,
most of them zeros, and still wins while reading the keys is what takes the time. The values are weighted
and summed as they lie, too. A NaN or an Inf in one head of a key is one in all of its heads: masks by head
go by tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import hidden, softmax
from mha_jax.attention.call import Problem, State

_MOST_ROWS = 32
_FEWEST_KEYS = 512
_FEWEST_NUMBERS = 2**21


def worthwhile(problem: Problem) -> bool:
    """Whether a problem has so few rows, T N of them, and so many keys that this is the faster way.

    Time over that of the tiled pass, two CPU cores, float32, N8 H64, B, T and S:

    | 8 1 4096 | 8 4 4096 | 8 16 4096 | 1 1 1024 | 1 1 512 | 8 1 128 | 32 1 128 | 64 1 128 | 256 1 32 |
    |---------:|---------:|----------:|---------:|--------:|--------:|---------:|---------:|---------:|
    |      0.2 |      0.4 |       1.2 |      0.6 |     1.6 |     1.7 |      1.0 |      0.3 |      0.5 |

    Tiles that need not turn their keys, those of a `Cache`, are faster still.
    """
    b, t, n, _ = problem.q.shape
    if not all(isinstance(size, int) for size in (b, t, problem.k.shape[1])):
        return False
    by_head = any(a.shape[1] > 1 for a in jax.tree.leaves(problem.mask))
    many = problem.k.shape[1] > _FEWEST_KEYS or problem.k.size >= _FEWEST_NUMBERS
    return not problem.heads_first and not by_head and t * n <= _MOST_ROWS and many


def forward(problem: Problem) -> State:
    """Attend with all logits of the few rows at once. O(B N T S) memory, for small T N."""
    b, t, n, h = problem.q.shape
    s, kv, v = problem.v.shape[1:]
    dtype, groups = problem.accumulator, problem.groups
    one_hot = jnp.eye(kv, dtype=problem.q.dtype)
    q = problem.q.reshape(b, t, kv, groups, h)
    q = jnp.einsum("BTKGH,KJ->BJHTGK", q, one_hot).reshape(b, kv * h, t * n)
    x = jnp.einsum(
        "BSC,BCM->BSM",
        problem.k.reshape(b, s, kv * h),
        q,
        precision=problem.logits.precision,
        preferred_element_type=dtype,
    )
    x = problem.logits.capped(x.reshape(b, s, t, groups, kv))
    if problem.bias is not None:
        x = x + _keys_first(problem, problem.bias).astype(x.dtype)
    q_facts = jax.tree.map(lambda a: a[:, None, :, None, None], problem.q_tokens.facts())
    k_facts = jax.tree.map(lambda a: a[:, :, None, None, None], problem.k_tokens.facts())
    if problem.bias_rule is not None:
        head = np.arange(n, dtype=np.int32).reshape(1, 1, 1, kv, groups).swapaxes(3, 4)
        q_side = q_facts._replace(head=head)
        x = x + jnp.asarray(problem.bias_rule.logits(q_side, k_facts)).astype(x.dtype)
    mask = jax.tree.map(lambda a: _keys_first(problem, a), problem.mask)
    x = jnp.where(mask.visible(q_facts, k_facts), x, -jnp.inf)
    m = jnp.max(x, axis=1, keepdims=True)
    p = softmax.weights(x, m)
    l = jnp.sum(p, axis=1, keepdims=True)
    inverse = softmax.reciprocal(l)[:, 0]
    if problem.dropout is not None:
        words = problem.dropout.row_keys(b, n, problem.q_tokens.rows)
        a, c = (_keys_first(problem, word[..., None]) for word in words)
        columns = problem.k_tokens.rows[:, :, None, None, None]
        p = jnp.where(problem.dropout.kept(a, c, columns), p, 0)
        inverse = inverse * jnp.asarray(problem.dropout.factor, dtype)
    parts = _parts(s)
    p = p.reshape(b, parts, s // parts, t, groups, kv, 1)
    out = p * problem.v.astype(dtype).reshape(b, parts, s // parts, 1, 1, kv, v)
    if hidden.anything(problem):
        out = jnp.where(p == 0, 0, out)
    out = (out.sum(2).sum(1) * inverse[..., None]).swapaxes(2, 3)
    m, l = (x[:, 0].transpose(0, 3, 2, 1).reshape(b, n, t) for x in (m, l))
    return State(out.reshape(b, t, n, v).astype(problem.v.dtype), m, l)


def _parts(length: int) -> int:
    """Return in how many parts to sum over keys: two sums of XLA's are faster than one, or a product.

    B8 T1 S4096 N8 V64: 4.0 ms in 8 parts, 3.8 in 16 to 256, 7.3 in one; 5.5 as a product of matrices.
    """
    return next(parts for parts in range(64, 0, -1) if length % parts == 0)


def _keys_first(problem: Problem, dense: Any) -> Any:
    """Turn [#B, #N, #T, #S] into [#B, #S, #T, #G, #K]."""
    b, n, t, s = dense.shape
    heads = (1, 1) if n == 1 else (n // problem.groups, problem.groups)
    return dense.reshape(b, *heads, t, s).transpose(0, 4, 3, 2, 1)
