"""One table of calls that every backend runs: forward, lse and gradients.

Shapes are distinct primes, so that a swapped axis cannot pass. Every case also says, in plain NumPy
and without the library's masks, which pairs are visible.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax import (
    Call,
    Causal,
    ChunkedCausal,
    Dense,
    Dilated,
    Dropout,
    Full,
    PrefixLM,
    SameSegment,
    Tokens,
    ValidKeys,
    ValidQueries,
    Window,
)

B, T, S, H, V = 2, 37, 53, 7, 5


def _random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def _flags(seed, share, *shape):
    return np.random.default_rng(seed).random(shape) < share


def _segments(seed, length):
    """Sorted ids of packed sequences, ending in padding (-1)."""
    ids = np.sort(np.random.default_rng(seed).integers(0, 4, (B, length)), -1)
    ids[:, -3:] = -1
    return ids.astype(np.int32)


def _restarted(segments):
    """Positions that restart with every segment."""
    positions = np.arange(segments.shape[1]) - np.array(
        [[np.flatnonzero(row == x)[0] for x in row] for row in segments]
    )
    return positions.astype(np.int32)


Q_SEGMENT, K_SEGMENT = _segments(11, T), _segments(12, S)
Q_POSITION, K_POSITION = _restarted(Q_SEGMENT), _restarted(K_SEGMENT)
Q_VALID, K_VALID = _flags(13, 0.8, B, T), _flags(14, 0.7, B, S)
K_VALID[1, 5:] = False
PER_HEAD = _flags(15, 0.5, B, 6, T, S)
PER_HEAD[0, 2, 3] = False
SHARED = _flags(16, 0.6, 1, 1, T, S)
ROWS, COLUMNS = np.arange(T)[:, None], np.arange(S)[None, :]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and what it means in plain NumPy."""

    name: str
    mask: Any = dataclasses.field(default_factory=Full)
    visible: Any = True
    heads: tuple[int, int] = (6, 3)
    lengths: tuple[int, int] = (T, S)
    sizes: tuple[int, int] = (H, V)
    q_tokens: Callable[[], Tokens] | None = None
    k_tokens: Callable[[], Tokens] | None = None
    bias: tuple[int, ...] | None = None
    rate: float = 0.0
    scale: float | None = None
    cap: float | None = None
    magnitude: float = 1.0

    def arrays(self, dtype=np.float32):
        """Return q, k, v, bias and a cotangent for out and lse, as NumPy in `dtype`."""
        (n, kv), (t, s), (h, v) = self.heads, self.lengths, self.sizes
        q, k = _random(1, B, t, n, h) * self.magnitude, _random(2, B, s, kv, h)
        bias = None if self.bias is None else _random(3, *self.bias).astype(dtype)
        if self.bias is not None and self.name == "bias_minus_infinity":
            bias[..., :7] = -np.inf
        return (
            q.astype(dtype),
            k.astype(dtype),
            _random(4, B, s, kv, v).astype(dtype),
            bias,
            _random(5, B, t, n, v).astype(dtype),
            _random(6, B, n, t).astype(np.float64 if dtype == np.float64 else np.float32),
        )

    def call(self, dtype=np.float32):
        q, k, v, bias, *_ = self.arrays(dtype)
        return Call(
            q=jnp.asarray(q),
            k=jnp.asarray(k),
            v=jnp.asarray(v),
            q_tokens=self.q_tokens and self.q_tokens(),
            k_tokens=self.k_tokens and self.k_tokens(),
            mask=self.mask,
            bias=None if bias is None else jnp.asarray(bias),
            dropout=self.dropout,
            scale=self.scale,
            logit_cap=self.cap,
        )

    @property
    def dropout(self):
        return Dropout(jax.random.key(7), self.rate) if self.rate else None

    def plain(self, dtype=np.float32):
        """Return the oracle's arguments (q, k, v, options)."""
        q, k, v, bias, *_ = self.arrays(dtype)
        keep = None
        if self.rate:
            t, s = self.lengths
            rows, columns = np.arange(t, dtype=np.int32)[None], np.arange(s, dtype=np.int32)[None]
            keep = np.asarray(self.dropout.keep(B, self.heads[0], rows, columns))
        options = {
            "visible": self.visible,
            "bias": bias,
            "keep": keep,
            "rate": self.rate,
            "scale": self.scale,
            "cap": self.cap,
        }
        return q, k, v, options


def _between(low, high):
    ahead = COLUMNS - ROWS
    return (ahead >= low) & (ahead <= high)


def _same_segment():
    a, b = Q_SEGMENT[:, None, :, None], K_SEGMENT[:, None, None, :]
    return (a == b) & (b >= 0)


def _restarted_causal():
    return Q_POSITION[:, None, :, None] >= K_POSITION[:, None, None, :]


def q_packed():
    return Tokens.packed(Q_SEGMENT)


def k_packed():
    return Tokens.packed(K_SEGMENT)


PREFIXES = np.array([11, 29], np.int32)


CASES = [
    Case("full"),
    Case("causal", Causal(), COLUMNS <= ROWS),
    Case(
        "causal_bottom_right",
        Causal(),
        COLUMNS <= ROWS + S - T,
        q_tokens=lambda: Tokens(T, start=S - T),
    ),
    Case("window", Window(9, 4), _between(-9, 4)),
    Case("causal_window", Causal() & Window(6, 6), _between(-6, 0)),
    Case("not_window", ~Window(2, 2), ~_between(-2, 2)),
    Case("nothing", Window(-1, 0) & Window(0, -1), np.zeros((T, S), bool)),
    Case("some_rows_nothing", Causal() & ~Window(5, 5), COLUMNS < ROWS - 5),
    Case(
        "valid_keys", ValidKeys(), K_VALID[:, None, None], k_tokens=lambda: Tokens(S, valid=K_VALID)
    ),
    Case(
        "valid_both_causal",
        Causal() & ValidKeys() & ValidQueries(),
        (COLUMNS <= ROWS) & K_VALID[:, None, None] & Q_VALID[:, None, :, None],
        q_tokens=lambda: Tokens(T, valid=Q_VALID),
        k_tokens=lambda: Tokens(S, valid=K_VALID),
    ),
    Case("packed", SameSegment(), _same_segment(), q_tokens=q_packed, k_tokens=k_packed),
    Case(
        "packed_causal",
        SameSegment() & Causal(),
        _same_segment() & _restarted_causal(),
        q_tokens=q_packed,
        k_tokens=k_packed,
        rate=0.25,
    ),
    Case(
        "odd_algebra",
        (~SameSegment() | Causal()) & Dense(SHARED),
        (~_same_segment() | _restarted_causal()) & SHARED,
        q_tokens=q_packed,
        k_tokens=k_packed,
    ),
    Case("chunked_causal", ChunkedCausal(11), (COLUMNS <= ROWS) & (COLUMNS // 11 == ROWS // 11)),
    Case(
        "chunked_causal_bottom_right",
        ChunkedCausal(16),
        (COLUMNS <= ROWS + S - T) & (COLUMNS // 16 == (ROWS + S - T) // 16),
        q_tokens=lambda: Tokens(T, start=S - T),
    ),
    Case(
        "prefix_lm",
        PrefixLM(PREFIXES),
        (COLUMNS <= ROWS) | (PREFIXES[:, None, None, None] > COLUMNS),
        rate=0.1,
    ),
    Case(
        "prefix_lm_shared_in_algebra",
        PrefixLM(7) & ~Dilated(5) & Dense(SHARED),
        ((COLUMNS <= ROWS) | (COLUMNS < 7)) & ((COLUMNS - ROWS) % 5 != 0) & SHARED,
    ),
    Case(
        "dilated_window",
        Causal() & Window(12, 0) & Dilated(3),
        _between(-12, 0) & ((COLUMNS - ROWS) % 3 == 0),
    ),
    Case("dense_shared", Dense(SHARED), SHARED),
    Case("dense_per_head", Dense(PER_HEAD), PER_HEAD),
    Case(
        "dense_per_head_dropout", Causal() & Dense(PER_HEAD), PER_HEAD & (COLUMNS <= ROWS), rate=0.1
    ),
    Case("dropout", rate=0.3),
    Case("dropout_causal", Causal(), COLUMNS <= ROWS, rate=0.1, heads=(3, 3)),
    Case("bias_dense", bias=(B, 6, T, S)),
    Case("bias_shared", Causal(), COLUMNS <= ROWS, bias=(1, 6, 1, S), rate=0.2),
    Case("bias_by_query", bias=(1, 1, T, 1)),
    Case("bias_minus_infinity", bias=(1, 1, 1, S)),
    Case("soft_cap", Causal(), COLUMNS <= ROWS, bias=(1, 1, T, S), cap=2.0, magnitude=3.0),
    Case("scale", scale=0.3),
    Case("one_head", heads=(1, 1)),
    Case("many_query_heads", Causal(), COLUMNS <= ROWS, heads=(7, 1)),
    Case("large_logits", magnitude=1e4),
    Case(
        "one_query",
        Causal(),
        np.arange(S)[None] <= S - 1,
        lengths=(1, S),
        q_tokens=lambda: Tokens(1, start=S - 1),
    ),
    Case("one_key", lengths=(T, 1)),
    Case("wide_values", sizes=(3, 19)),
    Case("size_one", sizes=(1, 1)),
]
