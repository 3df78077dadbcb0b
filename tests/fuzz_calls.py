"""Random calls of attention, written as Python that can be pasted, against the formula in float64 NumPy.

A call is a value whose `repr` makes it again: masks, tokens and biases are expressions. The same text is read
twice: as the library's rules, and as the NumPy arrays and sums that these rules mean.

>>> FunctionCall(seed=3, lengths=(5, 7), mask="Causal() & ~Window(1, 1)").check()
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from functools import lru_cache
from math import inf as inf
from math import nan as nan
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType

import mha_jax as mj
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.pallas_tpu import PallasTPU
from tests.backends import backends, tiles
from tests.drawn import double_precision
from tests.keras_peer import OPTIONS

BACKENDS: dict[str, Any] = {
    "automatic": None,
    **backends(
        tiles_2_3=tiles(2, 3),
        tiles_4_4=tiles(4, 4),
        exhaustive=Blockwise(block_q=4, block_k=2, exhaustive=True),
        apart=Blockwise(block_q=4, block_k=4, apart=True),
        one_pair=Blockwise(block_q=8, block_k=4, pairs=1),
        pallas_tpu=PallasTPU(interpret=True),
    ),
    **{name: mj.sharding.Sharded(sequence=("x",), strategy=name) for name in ("gather", "ring")},
}
# Compiled in seconds, and so drawn seldom.
SLOW = ("pallas_tpu", "gather", "ring")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
DTYPES["float64"] = np.float64
LEAST = float(np.finfo(np.float32).min)


# ---- the words of the expressions ---------------------------------------------------------------------


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def flags(seed, *shape, share=0.6):
    return np.random.default_rng(seed).random(shape) < share


def ints(seed, low, high, *shape):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def either(seed, value, *shape):
    """Return numbers, about a third of which are `value`."""
    return np.where(flags(seed, *shape), normal(seed, *shape), np.float32(value))


WORDS = {"normal": normal, "flags": flags, "ints": ints, "either": either, "inf": math.inf}
RULES = {name: getattr(mj, name) for name in mj.__all__} | WORDS
RULES |= {name: getattr(mj.biases, name) for name in mj.biases.__all__}


def read(text: str, words: dict[str, Any]) -> Any:
    """Return what an expression of this file means."""
    return eval(text, {"__builtins__": {}}, words)


def _tokens(given: Any, length: int, lead: tuple[int, ...]) -> dict[str, Any]:
    """Return what tokens, or their text, say, in 64 bits, [B, L] each."""
    tokens = read(given, RULES) if isinstance(given, str) else given or mj.Tokens(length)
    rows = (
        tokens.start + np.arange(length, dtype=np.int64) if tokens.index is None else tokens.index
    )

    def each(a, dtype=np.int64):
        return np.broadcast_to(np.asarray(a, dtype), (*lead, length)).reshape(
            math.prod(lead), length
        )

    return {
        "rows": each(rows),
        "positions": each(rows if tokens.pos is None else tokens.pos),
        "segment": None if tokens.segment is None else each(tokens.segment),
        "valid": each(True if tokens.valid is None else tokens.valid, bool),
    }


def meaning(q: dict[str, Any], k: dict[str, Any], lead: tuple[int, ...]) -> dict[str, Any]:
    """Return the words of masks as booleans [#B, #N, T, S]."""
    rows, columns = q["positions"][:, None, :, None], k["positions"][:, None, None, :]

    def same_segment():
        a, b = q["segment"][:, None, :, None], k["segment"][:, None, None, :]
        return (a == b) & (b >= 0)

    def prefix(lengths):
        return (columns <= rows) | (
            columns < whole(np.asarray(lengths)[..., None, None, None], lead)
        )

    return WORDS | {
        "flags": lambda seed, *own, share=0.6: whole(flags(seed, *own, share=share), lead),
        "Full": lambda: np.ones((1, 1, 1, 1), bool),
        "Causal": lambda: columns <= rows,
        "Window": lambda left, right: (columns >= rows - left) & (columns <= rows + right),
        "ChunkedCausal": lambda n: (columns <= rows) & (columns // n == rows // n),
        "Dilated": lambda n: (columns - rows) % n == 0,
        "PrefixLM": prefix,
        "SameSegment": same_segment,
        "ValidKeys": lambda: k["valid"][:, None, None, :],
        "ValidQueries": lambda: q["valid"][:, None, :, None],
        "Dense": lambda array: array,
    }


def whole(a: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """Return an array [T, S] or [*#B, #N, #T, #S] as [#B, #N, #T, #S]."""
    if a.ndim == 2:
        return a[None, None]
    return np.broadcast_to(a, (*lead, *a.shape[-3:])).reshape(math.prod(lead), *a.shape[-3:])


class Linear:
    """Biases by what they mean: a sum of terms, each linear in one array."""

    def __init__(self, *terms):
        self.terms = terms  # (leaf, leaf -> [#B, #N, #T, #S])

    def __add__(self, other):
        return Linear(*self.terms, *other.terms)


def linear(
    q: dict[str, Any], k: dict[str, Any], lead: tuple[int, ...], heads: int
) -> dict[str, Any]:
    """Return the words of biases as sums of linear terms."""
    distance = k["positions"][:, None, None, :] - q["positions"][:, None, :, None]
    numbers = np.arange(heads)[None, :, None, None]

    def buckets(table, bidirectional, far):
        found = mj.biases.Buckets(table, bidirectional, far).buckets()
        return Linear((table, lambda t: t[found[np.clip(distance, -far, far) + far], numbers]))

    def relative(table):
        most = len(table) // 2
        return Linear((table, lambda t: t[most - np.clip(distance, -most, most), numbers]))

    return WORDS | {
        "Array": lambda a: Linear((a, lambda x: whole(x, lead))),
        "Alibi": lambda slopes: Linear((slopes, lambda x: -np.abs(distance) * x[numbers])),
        "Buckets": buckets,
        "Relative": relative,
    }


def pulled(leaf: np.ndarray, term: Any, d: np.ndarray) -> np.ndarray:
    """Return the cotangent of a linear term's array."""
    result = np.zeros(leaf.size)
    for i in range(leaf.size):
        one = np.zeros(leaf.size)
        one[i] = 1
        result[i] = (np.broadcast_to(term(one.reshape(leaf.shape)), d.shape) * d).sum()
    return result.reshape(leaf.shape)


# ---- the stream of dropout, version 1 -----------------------------------------------------------------


def threefry(key, counter):
    """Threefry-2x32, 20 rounds, on uint32."""
    words = [key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    x, y = counter[0] + words[0], counter[1] + words[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = (y << np.uint32(turn) | y >> np.uint32(32 - turn)) ^ x
        x, y = x + words[(group + 1) % 3], y + words[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def kept(key: Any, rate: float, heads: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return which weights [B, N, T, S] a key of two words keeps, for rows [B, T] and [B, S]."""
    b = np.arange(len(rows), dtype=np.uint32)[:, None, None, None]
    n = np.arange(heads, dtype=np.uint32)[None, :, None, None]
    t, s = ((x % 2**32).astype(np.uint32) for x in (rows[:, None, :, None], columns[:, None, None]))
    pair = threefry(np.uint32(key)[:, None], (b, n))
    a, c = threefry(pair, (t, np.uint32([1])))
    x = a + s * np.uint32(0x9E3779B9)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D) + c
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return x >= np.uint32(round(rate * 2**32))


# ---- the definition -----------------------------------------------------------------------------------


def definition(moving, terms, visible, keep, rate, scale, cap, d, noise=None):
    """Return (out, lse, scores) and the cotangents of everything that moves, in float64, by hand.

    Args:
      moving: q [B, T, N, H], k [B, S, K, H], v [B, S, K, V], leaves of the bias, sinks [N] or None.
      terms: What the leaves add to the logits.
      visible, keep: Booleans [B, N, T, S].
      d: Cotangents of out [B, T, N, V], lse [B, N, T] and scores [B, N, T, S].
      noise: Relative errors of the products whose differences count, q . k and d_out . v, or None.
    """
    q, k, v, leaves, sinks = moving
    groups = q.shape[2] // k.shape[2]
    qh = q.transpose(0, 2, 1, 3)
    kh, vh = (np.repeat(x.transpose(0, 2, 1, 3), groups, 1) for x in (k, v))
    dot = scale * (qh @ kh.swapaxes(-1, -2))
    size = np.abs(scale) * (np.abs(qh) @ np.abs(kh).swapaxes(-1, -2))
    x = dot if cap is None else cap * np.tanh(dot / cap)
    for leaf, term in zip(leaves, terms):
        added = term(leaf)
        x = x + added
        size = size + np.where(np.isfinite(added), np.abs(added), 0)
    if noise is not None:
        x = x + noise[0] * size
    x = np.where(visible, x, -np.inf)
    m = x.max(-1, keepdims=True, initial=-np.inf)
    seen = m > -np.inf
    shift = np.where(seen, m, 0)
    p = np.exp(x - shift)
    l = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(seen, shift + np.log(np.where(seen, l, 1)), -np.inf)
    p = p / np.where(seen, l, 1)
    again = p  # the weights that a backward pass rebuilds, of logits that are rounded otherwise
    if noise is not None:
        again = p * np.exp(np.clip(noise[3] * size, -60, 60))
    share = np.ones_like(l)
    if sinks is not None:
        gap = np.where(seen, lse, 0) - sinks[None, :, None, None]
        share = np.where(seen, 1 / (1 + np.exp(-np.clip(gap, -700, 700))), 0)
    scores = p * share
    factor = keep / (1 - rate)
    d_out, d_lse, d_scores = d
    dh = d_out.transpose(0, 2, 1, 3)
    out = ((scores * factor) @ vh).transpose(0, 2, 1, 3)
    # Backward.
    ds = (dh @ vh.swapaxes(-1, -2)) * factor + d_scores
    if noise is not None:
        ds = ds + noise[1] * (np.abs(dh) @ np.abs(vh).swapaxes(-1, -2) * factor + np.abs(d_scores))
    dv = (again * share * factor).swapaxes(-1, -2) @ dh
    delta = (scores * ds).sum(-1, keepdims=True)
    if noise is not None:
        delta = delta + noise[2] * (scores * np.abs(ds)).sum(-1, keepdims=True)
    dx = again * (share * (ds - delta) + d_lse[..., None])
    dx = np.where(visible & seen, dx, 0)
    slope = 1 if cap is None else 1 - np.tanh(dot / cap) ** 2 + (0 if noise is None else noise[0])
    inner = dx * slope * scale
    dq, dk = inner @ kh, inner.swapaxes(-1, -2) @ qh

    def shared(y):
        b, n, s, w = y.shape
        return y.reshape(b, n // groups, groups, s, w).sum(2).transpose(0, 2, 1, 3)

    left = 1 - share
    if noise is not None:
        left = left + np.where(seen, noise[2], 0)
    d_sinks = None if sinks is None else -(left * delta)[..., 0].sum((0, 2))
    d_leaves = [pulled(leaf, term, dx) for leaf, term in zip(leaves, terms)]
    return (out, lse[..., 0], scores), (
        dq.transpose(0, 2, 1, 3),
        shared(dk),
        shared(dv),
        d_leaves,
        d_sinks,
    )


# ---- a call -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """A call of `attend` and of what comes with it; `check` compares everything with the definition."""

    seed: int
    backend: str = "reference"
    lead: tuple[int, ...] = (2,)
    lengths: tuple[int, int] = (5, 7)
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, int] = (3, 2)
    dtype: str = "float32"
    magnitudes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    mask: str = "Full()"
    q_tokens: str | None = None
    k_tokens: str | None = None
    bias: str | None = None
    sinks: bool = False
    rate: float = 0.0
    scale: float | None = None
    cap: float | None = None
    poison: float | None = None
    scores: bool = False
    second: bool = False
    traced: bool = False

    def check(self) -> None:
        """Raise unless forward, statistics, scores and derivatives are those of the definition."""
        wide = self.dtype == "float64"
        ignored = np.errstate(over="ignore", invalid="ignore")
        with double_precision(wide), jax.numpy_rank_promotion("raise"), ignored:
            self._check(np.float64 if wide else np.float32)

    def _check(self, accumulator) -> None:
        dtype, (t, s), (n, kv), (h, size) = DTYPES[self.dtype], self.lengths, self.heads, self.sizes
        batch = math.prod(self.lead)
        shape = (batch, n, t, s)
        rng = np.random.default_rng(self.seed)

        def draw(*own, magnitude=1.0, kind=dtype):
            return (rng.standard_normal(own) * magnitude).astype(kind)

        qkv = [
            draw(batch, length, count, width, magnitude=magnitude)
            for (length, count, width), magnitude in zip(
                ((t, n, h), (s, kv, h), (s, kv, size)), self.magnitudes
            )
        ]
        rule = read(self.mask, RULES)
        q_facts, k_facts = (
            _tokens(text, length, self.lead)
            for text, length in ((self.q_tokens, t), (self.k_tokens, s))
        )
        visible = np.broadcast_to(read(self.mask, meaning(q_facts, k_facts, self.lead)), shape)
        bias = None if self.bias is None else read(self.bias, RULES)
        meant = (
            Linear() if bias is None else read(self.bias, linear(q_facts, k_facts, self.lead, n))
        )
        leaves = [leaf.astype(np.float64) for leaf, _ in meant.terms]
        terms = [term for _, term in meant.terms]
        sinks = draw(n, kind=np.float32) if self.sinks else None
        d = [draw(batch, t, n, size), draw(batch, n, t, kind=accumulator), draw(batch, n, t, s)]
        if not self.scores:
            d[2] = np.zeros(shape, dtype)
        keep, dropout = np.ones(shape, bool), None
        if self.rate:
            dropout = mj.Dropout(jax.random.key(self.seed % 2**32), self.rate)
            key = 0, self.seed % 2**32
            keep = kept(key, self.rate, n, q_facts["rows"], k_facts["rows"])
        scale = (h**-0.5 if h else 1.0) if self.scale is None else self.scale
        wide = None if sinks is None else sinks.astype(np.float64)
        moving = (*(x.astype(np.float64) for x in qkv), leaves, wide)

        def exact(moving, d=d, noise=None):
            d = [x.astype(np.float64) for x in d]
            rest = visible, keep, self.rate, scale, self.cap
            return definition(moving, terms, *rest, d, noise)

        (out, lse, weights), slopes = exact(moving)
        # As the library is given it: in the dtypes of what moves.
        stored = *qkv, [leaf for leaf, _ in meant.terms], sinks
        direction = jax.tree.map(
            lambda x: rng.standard_normal(x.shape).astype(x.dtype).astype(np.float64), stored
        )
        want = {"out": out, "lse": lse, "gradient": slopes}
        want["scores"] = [weights] if self.scores else []
        if self.second:
            want |= self._second(exact, moving, direction)
        noisy = [self._noisy(exact, moving, d, direction, i) for i in range(3)]

        # The library's turn: what nothing sees may hold anything.
        if self.poison is not None:
            hidden = ~visible.reshape(batch, kv, n // kv, t, s).any((2, 3)).swapaxes(1, 2)
            blind = ~visible.any(-1).swapaxes(1, 2)
            for x, where in zip(qkv, (blind, hidden, hidden)):
                x[where] = self.poison
        got = self._run(qkv, rule, bias, sinks, dropout, d, direction)
        for name in want:
            where = zip(*(jax.tree.leaves(x) for x in (got[name], want[name])), strict=True)
            for i, (a, b) in enumerate(where):
                near = [jax.tree.leaves(one[name])[i] for one in noisy]
                self._compare(f"{name} {i}", np.asarray(a).reshape(b.shape), b, near)

    @property
    def _epsilon(self) -> tuple[float, float]:
        """The relative rounding of arrays, and of logits."""
        wide = self.dtype == "float64"
        return float(jnp.finfo(DTYPES[self.dtype]).eps), 2.0 ** (-52 if wide else -23)

    def _noisy(self, exact, moving, d, direction, i):
        """Return what comes out where everything that goes in is rounded otherwise."""
        rng, (eps, fine) = np.random.default_rng([self.seed, i]), self._epsilon

        def rounded(x):
            return x * (1 + eps * rng.standard_normal(x.shape))

        whole = (*moving[0].shape[:1], self.heads[0], *self.lengths)
        each = (fine, whole), (eps, whole), (eps, (*whole[:3], 1)), (fine, whole)
        noise = [size * rng.standard_normal(own) for size, own in each]
        moved = jax.tree.map(rounded, moving)
        others = [rounded(x.astype(np.float64)) for x in d]

        def near(moving):
            return exact(moving, others, noise)

        (out, lse, weights), slopes = near(moved)
        found = {"out": out, "lse": lse, "scores": [weights], "gradient": slopes}
        return found | (self._second(near, moved, direction) if self.second else {})

    def _second(self, exact, moving, direction):
        """Return the tangents of everything, by differences of the definition, of fourth order."""
        step = 2e-4

        def at(sign):
            moved = jax.tree.map(lambda x, d: x + sign * step * d, moving, direction)
            (out, lse, _), slopes = exact(moved)
            return out, np.where(np.isinf(lse), 0, lse), slopes

        def slope(a, b, c, d):
            return (8 * (a - b) - (c - d)) / (12 * step)

        out, lse, slopes = jax.tree.map(slope, at(1), at(-1), at(2), at(-2))
        return {"tangent of out": out, "tangent of lse": lse, "second": slopes}

    def _compare(self, name, got, want, near):
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want), err_msg=f"{name}: infinities")
        finite = np.isfinite(want)
        if not finite.any():
            return
        eps = max(*self._epsilon, float(jnp.finfo(got.dtype).eps))
        got, want = got.astype(np.float64)[finite], want[finite]
        assert np.isfinite(got).all(), f"{name}: NaN or infinity"
        spread = max(float(np.abs(x[finite] - want).max()) for x in near)
        tiny = float(np.finfo(np.float32).tiny) if self.dtype != "float16" else 1e-6
        allowed = 32 * spread + 16 * eps * float(np.abs(want).max()) + tiny
        worst = float(np.abs(got - want).max())
        assert worst <= allowed, f"{name}: largest error {worst:.3g}, allowed {allowed:.3g}"

    def _run(self, qkv, rule, bias, sinks, dropout, d, direction):
        def laid(arrays):
            return [jnp.asarray(x.reshape(*self.lead, *x.shape[1:])) for x in arrays]

        tokens = tuple(read(text or "None", RULES) for text in (self.q_tokens, self.k_tokens))
        moving = *laid(qkv), jax.tree.map(jnp.asarray, bias), sinks
        moves = [
            jnp.asarray(y.reshape(x.shape), x.dtype)
            for x, y in zip(jax.tree.leaves(moving), jax.tree.leaves(direction), strict=True)
        ]
        moves = jax.tree.unflatten(jax.tree.structure(moving), moves)
        # A program is given integers of 32 bits; wider ones, whose values it cannot see, are refused.
        given = jax.tree.map(lambda a: np.int32(a) if type(a) is int else a, (tokens, rule))
        traced = given if self.traced else None
        with self._context():
            results, tangents = _program(self._structure)(dropout, traced, moving, laid(d), moves)
        (out, lse, *scores), slopes = results
        found = {"out": out, "lse": lse, "gradient": slopes, "scores": scores}
        if tangents is not None:
            (out, lse, *_), second = tangents
            found |= {"tangent of out": out, "tangent of lse": lse, "second": second}
        return found

    @property
    def _structure(self) -> "FunctionCall":
        """What a program is compiled for: calls that differ in values alone share one."""
        given = {"mask": "Full()", "q_tokens": None, "k_tokens": None} if self.traced else {}
        ones = (1.0, 1.0, 1.0)
        return dataclasses.replace(self, seed=0, magnitudes=ones, poison=None, bias=None, **given)

    def _context(self):
        if self.backend not in ("gather", "ring"):
            return contextlib.nullcontext()
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        return jax.set_mesh(mesh)


@lru_cache(maxsize=4)
def _program(call: FunctionCall) -> Any:
    """Return the compiled function of (dropout, traced tokens and rule, what moves, cotangents, moves)."""
    known = tuple(read(text or "None", RULES) for text in (call.q_tokens, call.k_tokens))
    known = known, read(call.mask, RULES)

    def program(dropout, traced, moving, d, moves):
        (q_tokens, k_tokens), rule = traced or known

        def forward(moving):
            q, k, v, bias, sinks = moving
            given = q_tokens, k_tokens, rule, bias, dropout, sinks
            one = mj.Call(q, k, v, *given, scale=call.scale, logit_cap=call.cap)
            out, lse = mj.attend(one, BACKENDS[call.backend])
            return (out, lse, mj.attention_scores(one)) if call.scores else (out, lse)

        def first(moving):
            results, vjp = jax.vjp(forward, moving)
            (slopes,) = vjp(tuple(d[: len(results)]))
            return results, slopes

        return jax.jvp(first, (moving,), (moves,)) if call.second else (first(moving), None)

    return jax.jit(program, compiler_options=OPTIONS)


# ---- drawing calls ------------------------------------------------------------------------------------


def draw_function_call(seed: int, index: int) -> FunctionCall:
    """Return call number `index` of a seed; four in a row differ in values alone, and share a program."""
    call, variant = _drawn(seed, index // 4), index % 4
    if not variant:
        return call
    rng = np.random.default_rng([seed, index])
    magnitudes = call.magnitudes
    if call.magnitudes != (1.0, 1.0, 1.0):
        magnitudes = (
            float(rng.choice(LARGE)),
            float(rng.choice(LARGE[:-1])),
            float(rng.choice([1, 1e6, 1e18])),
        )
    poison = (
        None if call.poison is None else float(rng.choice([np.nan, np.inf, -np.inf, 1e18, 0.0]))
    )

    def again(text):
        return text and re.sub(
            r"\((\d{4,6}), ", lambda found: f"({int(found[1]) + variant}, ", text
        )

    names = ("mask", "q_tokens", "k_tokens", "bias") if call.traced else ("bias",)
    texts = {name: again(getattr(call, name)) for name in names}
    seed = call.seed + variant
    return dataclasses.replace(call, seed=seed, magnitudes=magnitudes, poison=poison, **texts)


LARGE = (1.0, 0.0, 1e-30, 1e3, 1e6, 1e12)


def dice(rng: np.random.Generator) -> tuple[Callable, Callable, Callable]:
    """Return what draws one of its arguments, what is true so often, and what draws a seed."""

    def pick(*options):
        return options[rng.integers(len(options))]

    def chance(share):
        return rng.random() < share

    def number():
        return int(rng.integers(10**3, 10**6))

    return pick, chance, number


def _drawn(seed: int, index: int) -> FunctionCall:
    rng = np.random.default_rng([seed, index])
    pick, chance, number = dice(rng)
    backend = pick(*SLOW) if chance(0.06) else pick(*(b for b in BACKENDS if b not in SLOW))
    sharded = backend in ("gather", "ring")
    lead = (
        (2,)
        if sharded
        else pick((2,), (2,), (1,), (3,), (), (2, 3), (1, 2), (0,) if chance(0.2) else (1,))
    )
    t, s = (pick(1, 2, 3, 5, 7, 11, 13, 17, 0 if chance(0.2) else 5) for _ in range(2))
    if sharded:
        t, s = 2 * max(t, 1), 2 * max(s, 1)
    n, kv = pick((1, 1), (2, 2), (4, 2), (3, 1), (6, 3), (5, 5))
    h, v = (pick(1, 2, 3, 5, 7, 0 if chance(0.2) else 4) for _ in range(2))
    dtype = pick(*["float32"] * 8, "bfloat16", "bfloat16", "float16", "float64")
    if backend == "pallas_tpu" and dtype == "float64":
        dtype = "float32"
    wild = dtype in ("float32", "float64") and chance(0.2)
    magnitudes = (1.0, 1.0, 1.0)
    if wild:
        magnitudes = (pick(*LARGE[1:]), 1.0, pick(1.0, 1e6, 1e18, 1e-30))
    batch = math.prod(lead)

    def lead_axes():
        return tuple(1 if chance(0.3) else x for x in lead)

    def shape(*own):
        return ", ".join(str(x) for x in own)

    segments = chance(0.4)
    plain = chance(0.4)

    def tokens(length):
        if plain and not segments:
            return (
                None
                if chance(0.5)
                else f"Tokens({length}, start={pick(-3, 2, 11, 2**31 - 64, -(2**31))})"
            )
        own = shape(*lead_axes(), length)
        parts = [f"{length}"]
        if chance(0.3):
            parts.append(f"start={pick(-5, 3, 2**31 - 64)}")
        if chance(0.2):
            parts.append(f"index=ints({number()}, -3, 20, {own})")
        if chance(0.4):
            low, high = pick((-3, 9), (0, length + 1), (-(2**31), 2**31), (2**31 - 4, 2**31))
            parts.append(f"pos=ints({number()}, {low}, {high}, {own})")
        if segments:
            parts.append(f"segment=ints({number()}, -1, {pick(1, 2, 3)}, {own})")
        if chance(0.5):
            parts.append(f"valid=flags({number()}, {own})")
        return f"Tokens({', '.join(parts)})"

    def dense():
        if chance(0.3):
            return f"flags({number()}, {shape(t, s)})"
        axes = (*lead_axes(), *(1 if chance(0.4) else x for x in (n, t, s)))
        return f"flags({number()}, {shape(*axes)})"

    def prefix():
        if lead and chance(0.5):
            return f"PrefixLM(ints({number()}, 0, {s + 2}, {shape(*lead_axes())}))"
        return f"PrefixLM({pick(0, 1, 3, 40)})"

    def rule(depth=0):
        if depth < 2 and chance(0.5):
            kind = pick("&", "&", "|", "~", "array")
            if kind == "~":
                return f"~({rule(depth + 1)})"
            if kind == "array":
                return f"({rule(depth + 1)} {pick('&', '|')} {dense()})"
            return f"({rule(depth + 1)} {kind} {rule(depth + 1)})"
        choices = [
            "Causal()",
            f"Window({pick(-1, 0, 1, 2, 5, 2**40)}, {pick(-2, 0, 1, 3, 2**40)})",
            f"ChunkedCausal({pick(1, 2, 3, 5)})",
            "ValidKeys()",
            "ValidQueries()",
            f"Dense({dense()})",
            prefix(),
            "Full()",
        ]
        if not wide_positions:
            choices.append(f"Dilated({pick(1, 2, 3)})")
        if segments:
            choices.append("SameSegment()")
        return pick(*choices)

    q_tokens, k_tokens = tokens(t), tokens(s)
    wide_positions = "2147483" in f"{q_tokens} {k_tokens}"

    def bias():
        terms = []
        for _ in range(pick(1, 1, 2)):
            axes = (*lead_axes(), *(1 if chance(0.4) else x for x in (n, t, s)))
            own = shape(*pick(axes, (t, s)))
            filled = f"either({number()}, {pick('-inf', LEAST, -1e9, 1e6, 88.5)}, {own})"
            kinds = [f"Array(normal({number()}, {own}))"] * 2
            if not calm:
                kinds += [f"Array({filled})"] * 2
            if backend not in SLOW and not wide_positions and dtype != "float64":
                kinds += [
                    f"Alibi(normal({number()}, {n}))",
                    f"Buckets(normal({number()}, {pick(4, 8)}, {n}), {pick(True, False)}, {pick(9, 16)})",
                    f"Relative(normal({number()}, {pick(3, 5, 9)}, {n}))",
                ]
            terms.append(pick(*kinds))
        return " + ".join(terms)

    calm = not wild and chance(0.5)
    scale = pick(
        None, None, None, 0.3, -1.0, 0.0, *([] if calm or dtype == "float16" else [1e4, 1e-30])
    )
    cap = pick(None, None, None, 0.5, 3.0, 30.0)
    mask = rule()
    return FunctionCall(
        seed=number(),
        backend=backend,
        lead=lead,
        lengths=(t, s),
        heads=(n, kv),
        sizes=(h, v),
        dtype=dtype,
        magnitudes=magnitudes,
        mask=mask,
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        bias=bias() if batch and chance(0.4) else None,
        sinks=chance(0.2),
        rate=pick(0.0, 0.0, 0.1, 0.5),
        scale=scale,
        cap=cap,
        poison=pick(None, np.nan, np.inf, -np.inf, 1e18)
        if backend != "pallas_tpu" and dtype != "float16"
        else None,
        scores=chance(0.3),
        traced=chance(0.3),
        second=calm and backend not in SLOW and chance(0.35),
    )
