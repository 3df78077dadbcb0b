"""Random calls of the layer, written as Python that can be pasted, against the layer in float64 NumPy.

A call goes through all three doors, the function, linen and nnx, and through one of them with gradients.
With `pieces` it is a sequence of calls with a cache; what every piece may see is told by a list in NumPy.

>>> LayerCall(seed=3, shape=(2, 3, 5), axes=(2,), keys=(7,), mask="Causal() | Window(0, 1)").check()
"""

import contextlib
import dataclasses
import math
import re
from functools import lru_cache
from math import inf as inf
from math import nan as nan
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import mha_jax as mj
from mha_jax.attention import rotary
from tests import fuzz_calls
from tests.drawn import double_precision
from tests.fuzz_calls import BACKENDS, DTYPES, LEAST, RULES, SLOW, Linear, dice, kept, read
from tests.fuzz_layer_oracle import Layer
from tests.keras_peer import OPTIONS
from tests.layer_oracle import fold, unfold

DOORS = ("function", "linen", "nnx")
TURNS = {name: getattr(rotary, name) for name in rotary.__all__}


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A call of the layer; `check` compares every door's results and gradients with the oracle.

    Args:
      door: The one whose gradients are compared.
      shape: Of the query, without features.
      axes: Attended axes; `given` is how the caller writes them.
      keys: Sizes of the attended axes of the value.
      widths: Of query, value, and key, None without a key.
      shared: Whether value is query, the same array.
      masks: (name, expression) of `attention_mask` and of those over an input's axes.
      pieces: (queries, tokens, what then happens to the cache), one call each; or None. Then `q_tokens`
        has tokens for each, and `k_tokens` are those of the slots.
      cache: Arguments of `empty_cache`, after the batch.
      second: Whether the tangents of results and gradients are compared, too.
    """

    seed: int
    door: str = "function"
    backend: str = "reference"
    shape: tuple[int, ...] = (2, 5)
    axes: tuple[int, ...] = (1,)
    given: Any = None
    keys: tuple[int, ...] = (7,)
    widths: tuple[int, int, int | None] = (3, 4, None)
    shared: bool = False
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, int] = (4, 3)
    output_shape: Any = None
    use_bias: Any = True
    use_gate: bool = False
    use_sinks: bool = False
    qk_norm: str | None = None
    rotary: str | None = None
    scale: float | None = None
    logit_cap: float | None = None
    sliding_window: int | None = None
    causal: bool = False
    masks: tuple[tuple[str, str], ...] = ()
    mask: str | None = None
    q_tokens: str | None = None
    k_tokens: str | None = None
    bias: str | None = None
    rate: float = 0.0
    scores: bool = False
    dtype: str = "float32"
    mixed: bool = False
    magnitudes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    poison: float | None = None
    traced: bool = False
    pieces: tuple[tuple, ...] | None = None
    cache: tuple[tuple[str, Any], ...] = ()
    second: bool = False

    def check(self) -> None:
        """Raise unless all doors give what the oracle gives."""
        wide, ignored = self.dtype == "float64", np.errstate(over="ignore", invalid="ignore")
        with double_precision(wide), jax.numpy_rank_promotion("raise"), ignored:
            self._check()

    # ---- sizes --------------------------------------------------------------------------------------------

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(n for axis, n in enumerate(self.shape) if axis not in self.axes)

    @property
    def batch(self) -> int:
        return math.prod(self.lead)

    @property
    def lengths(self) -> tuple[int, int]:
        return math.prod(self.shape[axis] for axis in self.axes), math.prod(self.keys)

    def whole(self, extent) -> tuple[int, ...]:
        """Return the shape of an input whose attended axes have these sizes."""
        sizes = dict(zip(self.axes, extent))
        return tuple(sizes.get(axis, n) for axis, n in enumerate(self.shape))

    @property
    def output(self) -> tuple[int, ...]:
        shape = self.widths[0] if self.output_shape is None else self.output_shape
        return (shape,) if isinstance(shape, int) else shape

    @property
    def integers(self) -> bool:
        """Whether a cache rounds to eight bits: then nothing is differentiated."""
        return dict(self.cache).get("dtype") == "int8"

    def drawn_params(self, rng, dtype) -> dict[str, dict[str, np.ndarray]]:
        (n, kv), (h, v) = self.heads, self.sizes
        d, dv, dk = self.widths
        shapes = {
            "query": ((d, n, h), 1),
            "key": ((dv if dk is None else dk, kv, h), 1),
            "value": ((dv, kv, v), 1),
            **({"gate": ((d, n, v), 1)} if self.use_gate else {}),
            "attention_output": ((n, v, *self.output), 2),
        }
        params: dict[str, Any] = {}
        for name, (shape, used) in shapes.items():
            size = max(math.prod(shape[:used]), 1) ** -0.5
            params[name] = {"kernel": (rng.standard_normal(shape) * size).astype(dtype)}
            biased = self.use_bias if isinstance(self.use_bias, bool) else name in self.use_bias
            if biased:
                own = rng.standard_normal(shape[used:]) / 2
                params[name]["bias"] = own.astype(dtype)
        if self.qk_norm is not None:
            for name in ("query_norm", "key_norm"):
                params[name] = {"scale": (1 + rng.standard_normal(h) / 4).astype(dtype)}
        if self.use_sinks:
            params["sinks"] = {"logits": rng.standard_normal(n).astype(dtype)}
        return params

    # ---- what is right ------------------------------------------------------------------------------------

    def _check(self) -> None:
        compute = DTYPES[self.dtype]
        stored = np.dtype(np.float32) if self.mixed else np.dtype(compute)
        rng = np.random.default_rng(self.seed)
        (t, s), (d, dv, dk) = self.lengths, self.widths

        def draw(*shape, magnitude=1.0, dtype=stored):
            return (rng.standard_normal(shape) * magnitude).astype(dtype)

        params = self.drawn_params(rng, stored)
        inputs = [draw(self.batch, t, d, magnitude=self.magnitudes[0])]
        if not self.shared:
            inputs.append(draw(self.batch, s, dv, magnitude=self.magnitudes[1]))
        if dk is not None:
            inputs.append(draw(self.batch, s, dk, magnitude=self.magnitudes[2]))
        masks = {name: read(text, RULES) for name, text in self.masks}
        plan = self._plan(masks)
        d_y = [draw(self.batch, p["T"], math.prod(self.output), dtype=compute) for p in plan]
        d_scores = [
            draw(self.batch, self.heads[0], p["T"], p["slots"], dtype=compute)
            if self.scores
            else None
            for p in plan
        ]
        bias = None if self.bias is None else read(self.bias, RULES)
        leaves = [] if bias is None else [np.asarray(x) for x in jax.tree.leaves(bias)]
        first = jax.random.key(self.seed % 2**32)
        key = jax.random.fold_in(first, 0)  # as the first key of a stream of nnx
        folded = _folded(key)

        moves = jax.tree.map(lambda x: draw(*x.shape, dtype=x.dtype), (params, inputs, leaves))

        def exact(eps=0.0, noise=None):
            def at(step=0.0):
                moved = jax.tree.map(
                    lambda x, d: x.astype(np.float64) + step * d.astype(np.float64),
                    *((params, inputs, leaves), moves),
                )
                fresh = noise and (noise[0], np.random.default_rng(noise[1]))
                return self._exact(*moved, plan, d_y, d_scores, folded, eps, fresh)

            tangents = fourth_order(at) if self.second else {}
            return at() | {f"tangent of {name}": x for name, x in tangents.items()}

        want = exact()
        fine = float(2.0 ** (-52 if self.dtype == "float64" else -23))
        eps = float(jnp.finfo(compute).eps)
        near = [exact(eps, (fine, [self.seed, i])) for i in range(3)]

        given = self._poisoned(inputs, plan)
        moving = params, given, bias
        keys = first, key, folded
        found = self._run(moving, moves, masks, keys, d_y, d_scores)
        for door, got in found.items():
            for name in sorted(want):
                derived = name.startswith(("gradient", "tangent"))
                if derived and (self.integers or door != self.door):
                    continue
                a = np.asarray(got[name])
                assert a.size == want[name].size, f"{door}: {name}: shape {a.shape}"
                others = [x[name] for x in near]
                compared(
                    f"{door}: {name}",
                    *(a.reshape(want[name].shape), want[name], others),
                    # What differences of fourth order leave.
                    eps=max(eps, 1e-10) if name.startswith("tangent") else eps,
                    fine=fine,
                    share=8 if self.integers else 32,
                    tiny=1e-6 if self.dtype == "float16" else float(np.finfo(np.float32).tiny),
                )

    def _valid(self, masks, name, extent):
        """Return a mask over an input's axes as [B, L], or None."""
        if name not in masks:
            return None
        flags = np.broadcast_to(masks[name].astype(bool), self.whole(extent))
        return fold(flags[..., None], self.axes)[..., 0]

    def _plan(self, masks) -> list[dict[str, Any]]:
        """Return what every piece of the call sees: whose tokens, where they stand, and what is visible."""
        (t, s), b = self.lengths, self.batch
        q_extent = [self.shape[axis] for axis in self.axes]
        valid_q = self._valid(masks, "query_mask", q_extent)
        valid_k = None
        for name in ("value_mask", "key_mask"):
            own = self._valid(masks, name, self.keys)
            if own is not None:
                valid_k = own if valid_k is None else valid_k & own
        if self.pieces is None:
            k_text = self.k_tokens
            packed = self.mask is not None and "SameSegment" in self.mask
            if self.shared and k_text is None and packed and "segment" in (self.q_tokens or ""):
                k_text = self.q_tokens
            q, k = (
                fuzz_calls._tokens(text, length, (b,))
                for text, length in ((self.q_tokens, t), (k_text, s))
            )
            ids = np.arange(b * s).reshape(b, s)
            if valid_q is not None:
                q["valid"] = q["valid"] & valid_q
            if valid_k is not None:
                k["valid"] = k["valid"] & valid_k
            one = {"T": t, "L": s, "start": (0, 0), "q": q, "k": k, "ids": ids, "slots": s}
            one["hidden"] = (
                None if valid_q is None else ~q["valid"],
                None if valid_k is None else ~k["valid"],
            )
            one["visible"] = self._visible(one, masks, valid_k is not None)
            return [one]
        return self._cached_plan(masks, valid_q, valid_k)

    def _cached_plan(self, masks, valid_q, valid_k):
        s, b = self.lengths[1], self.batch
        valid_k = np.ones((b, s), bool) if valid_k is None else valid_k
        held: list[list[int]] = [[] for _ in range(b)]
        plan, t0, s0 = [], 0, 0
        options, pieces = dict(self.cache), self.pieces or ()
        by_piece = read(self.q_tokens or "None", RULES) or (None,) * len(pieces)
        for q_tokens, (queries, tokens, then) in zip(by_piece, pieces):
            own = valid_k[:, s0 : s0 + tokens]
            count = np.array([len(x) for x in held], np.int64).reshape(b, 1)
            steps = np.cumsum(own, 1) - 1 if queries == tokens else np.arange(queries)[None]
            for row in range(b):
                held[row] += [row * s + s0 + j for j in range(tokens) if own[row, j]]
            slots = options["capacity"]
            if options.get("rolling"):
                slots = max([1, *map(len, held)])
            ids = np.full((b, slots), -1)
            for row, x in enumerate(held):
                ids[row, : len(x)] = x
            at = np.broadcast_to(count + steps, (b, queries))
            places = np.broadcast_to(np.arange(slots, dtype=np.int64), (b, slots))
            one = {"T": queries, "L": tokens, "start": (t0, s0), "ids": ids, "slots": slots}
            one["q"] = fuzz_calls._tokens(q_tokens, queries, (b,))
            if q_tokens is None:
                one["q"] |= {"rows": at, "positions": at}
            one["k"] = {"rows": places, "positions": places, "segment": None, "valid": True}
            if self.k_tokens is not None:
                one["k"] = fuzz_calls._tokens(self.k_tokens, slots, (b,))
            one["k"]["valid"] = one["k"]["valid"] & (ids >= 0)
            if valid_q is not None:
                one["q"]["valid"] = one["q"]["valid"] & valid_q[:, t0 : t0 + queries]
            one["hidden"] = (None if valid_q is None else ~one["q"]["valid"], ~own)
            one["visible"] = self._visible(one, masks, True)
            plan.append(one)
            t0, s0 = t0 + queries, s0 + tokens
            if then is not None and then[0] == "truncated":
                kept_counts = np.broadcast_to(np.asarray(then[1]), (b,))
                held = [x[:c] for x, c in zip(held, kept_counts)]
            if then is not None and then[0] == "reorder":
                held = [list(held[row]) for row in then[1]]
        assert s0 == s
        return plan

    def _visible(self, one, masks, hides):
        b, n, t, s = self.batch, self.heads[0], one["T"], one["slots"]
        rows, columns = (
            one["q"]["positions"][:, None, :, None],
            one["k"]["positions"][:, None, None],
        )
        seen = np.ones((b, n, t, s), bool)
        if self.causal:
            seen = seen & (columns <= rows)
        if self.sliding_window is not None:
            seen = seen & (np.abs(columns - rows) < self.sliding_window)
        if self.mask is not None:
            seen = seen & read(self.mask, fuzz_calls.meaning(one["q"], one["k"], (b,)))
        if "query_mask" in masks:
            seen = seen & one["q"]["valid"][:, None, :, None]
        if hides:
            seen = seen & one["k"]["valid"][:, None, None, :]
        if "attention_mask" in masks:
            extent = [self.shape[axis] for axis in self.axes] if self.pieces is None else [t]
            slots = self.keys if self.pieces is None else (s,)
            mask, pairs = masks["attention_mask"], len(extent) + len(slots)
            lead, tail = mask.shape[: mask.ndim - pairs], mask.shape[mask.ndim - pairs :]
            full = (*self.lead, n, *extent, *slots)
            missing = (1,) * (len(full) - mask.ndim)
            mask = np.broadcast_to(mask.reshape(*lead, *missing, *tail), full)
            seen = seen & mask.reshape(seen.shape).astype(bool)
        return seen

    def _exact(self, params, inputs, leaves, plan, d_y, d_scores, folded, eps, noise):
        """Return everything in float64; rounded otherwise with a relative error `eps` and a noise."""
        layer = Layer(params, eps, noise)
        xs = [layer.rounded(x.astype(np.float64)) for x in inputs]
        x_q = xs[0]
        x_v = x_q if self.shared else xs[1]
        x_k = None if self.widths[2] is None else xs[-1]
        slopes = [np.zeros_like(x) for x in xs]
        leaves = [layer.rounded(x.astype(np.float64)) for x in leaves]
        by_leaf = [np.zeros_like(x) for x in leaves]
        b, s = self.batch, self.lengths[1]
        result: dict[str, Any] = {"output": [], "scores": []}
        turns = None if self.rotary is None else read(self.rotary, TURNS)
        for one, d, d_score in zip(plan, d_y, d_scores):
            first = one["start"][0]
            own = slice(first, first + one["T"])
            ids = np.maximum(one["ids"], 0)
            visible = one["visible"] & (one["ids"] >= 0)[:, None, None, :]
            shape = visible.shape

            def taken(x, ids=ids):
                flat = x.reshape(b * s, x.shape[-1])
                return flat[ids] if b * s else np.zeros((*ids.shape, x.shape[-1]))

            keep = np.ones(shape, bool)
            if self.rate:
                words = np.asarray(jax.random.key_data(folded))
                sides = one["q"]["rows"], one["k"]["rows"]
                keep = kept(words, self.rate, self.heads[0], *sides)
            terms = Linear()
            if self.bias is not None:
                terms = read(self.bias, fuzz_calls.linear(one["q"], one["k"], (b,), self.heads[0]))
            given = {
                "query": x_q[:, own],
                "value": taken(x_v),
                "key": None if x_k is None else taken(x_k),
            }
            out, scores, found = layer.attend(
                given,
                (one["q"]["positions"], one["k"]["positions"]),
                (visible, keep, self.rate),
                (leaves, [term for _, term in terms.terms]),
                (d, np.zeros(shape) if d_score is None else d_score),
                rotary=turns,
                qk_norm=self.qk_norm,
                scale=self.scale,
                cap=self.logit_cap,
                coarse=self.integers,
            )
            result["output"].append(out)
            result["scores"].append(scores)
            slopes[0][:, own] += found["query"]
            into = {"value": 0 if self.shared else 1, "key": -1}
            for name, slope in found.items():
                if name in into and slope is not None:
                    flat = slopes[into[name]].reshape(b * s, slope.shape[-1])
                    there = one["ids"] >= 0
                    np.add.at(flat, one["ids"][there], slope[there])
            for total, more in zip(by_leaf, found["leaves"]):
                total += more
        result = {
            f"{name} {i}": x
            for name, parts in result.items()
            for i, x in enumerate(parts)
            if name == "output" or self.scores
        }
        result |= {f"gradient of input {i}": x for i, x in enumerate(slopes)}
        result |= {f"gradient of bias {i}": x for i, x in enumerate(by_leaf)}
        for name, group in layer.slopes.items():
            result |= {f"gradient of {name} {part}": x for part, x in group.items()}
        return result

    def _poisoned(self, inputs, plan):
        """Return the inputs with anything in the place of tokens that a mask over them hides."""
        if self.poison is None:
            return inputs
        inputs = [x.copy() for x in inputs]
        for one in plan:
            (t0, s0), (q, k) = one["start"], one["hidden"]
            if self.shared:
                if q is not None and k is not None:
                    inputs[0][:, t0 : t0 + one["T"]][q & k] = self.poison
                continue
            if q is not None:
                inputs[0][:, t0 : t0 + one["T"]][q] = self.poison
            for x in inputs[1:] if k is not None else ():
                x[:, s0 : s0 + one["L"]][k] = self.poison
        return inputs

    # ---- the library's turn -------------------------------------------------------------------------------

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes the layer."""
        compute = jnp.dtype(DTYPES[self.dtype])
        return {
            **{"num_heads": self.heads[0], "num_kv_heads": self.heads[1]},
            **{"key_dim": self.sizes[0], "value_dim": self.sizes[1]},
            **{"output_shape": self.output_shape, "use_bias": self.use_bias},
            **{"use_gate": self.use_gate, "use_sinks": self.use_sinks, "dropout": self.rate},
            **{"param_dtype": "float32" if self.mixed else compute},
            **{"kernel_initializer": "zeros"},
        } | self.of_call

    @property
    def of_call(self) -> dict[str, Any]:
        """What makes the layer, and is told to its function at every call."""
        return {
            **{"attention_axes": self.given, "sliding_window": self.sliding_window},
            **{"backend": BACKENDS[self.backend], "qk_norm": self.qk_norm},
            **{"dtype": DTYPES[self.dtype] if self.mixed else None},
            **{"rotary": None if self.rotary is None else read(self.rotary, TURNS)},
            **{"scale": self.scale, "logit_cap": self.logit_cap},
        }

    def _run(self, moving, moves, masks, keys, d_y, d_scores):
        def laid(x, extent):
            return jnp.asarray(unfold(x, self.whole(extent), self.axes))

        t_extent = [self.shape[axis] for axis in self.axes]
        extents = [t_extent, *[self.keys] * 2]
        params, inputs, bias = moving
        leaves = jax.tree.unflatten(jax.tree.structure(bias), moves[2])
        moving, moves = (
            jax.tree.map(jnp.asarray, (params, [laid(x, e) for x, e in zip(inputs, extents)], bias))
            for params, inputs, bias in ((params, inputs, bias), (*moves[:2], leaves))
        )
        pieces = [(p[0],) for p in self.pieces] if self.pieces else [t_extent]
        d_out = [
            laid(d, extent).reshape(*self.whole(extent), *self.output)
            for d, extent in zip(d_y, pieces)
        ]
        tokens = tuple(read(text or "None", RULES) for text in (self.q_tokens, self.k_tokens))
        rule = None if self.mask is None else read(self.mask, RULES)
        rule = jax.tree.map(lambda a: np.int32(a) if type(a) is int else a, rule)
        known = (masks, tokens, rule) if self.traced else None
        with self._context():
            results, tangents = _program(self._structure)(
                moving, moves, known, keys, d_out, d_scores
            )

        width = math.prod(self.output)

        def flat(outputs, scores, slopes):
            by_param, by_input, by_bias = slopes
            got = {
                f"output {i}": fold(np.asarray(x).reshape(*self.whole(e), width), self.axes)
                for i, (x, e) in enumerate(zip(outputs, pieces))
            }
            got |= {f"scores {i}": x for i, x in enumerate(scores)}
            got |= {
                f"gradient of input {i}": fold(np.asarray(x), self.axes)
                for i, x in enumerate(by_input)
            }
            leaves = jax.tree.leaves(by_bias)
            got |= {f"gradient of bias {i}": x for i, x in enumerate(leaves)}
            for name, group in by_param.items():
                got |= {f"gradient of {name} {part}": x for part, x in group.items()}
            return got

        named = {door: flat(*found) for door, found in results.items()}
        if tangents is not None:
            more = flat(*tangents)
            named[self.door] |= {f"tangent of {name}": x for name, x in more.items()}
        return named

    @property
    def _structure(self) -> "LayerCall":
        given = {"q_tokens": None, "k_tokens": None, "mask": None} if self.traced else {}
        masks = () if self.traced else self.masks
        one = dataclasses.replace(self, seed=0, magnitudes=(1.0,) * 3, poison=None, masks=masks)
        return dataclasses.replace(one, bias=None, **given)

    def _context(self):
        if self.backend not in ("gather", "ring"):
            return contextlib.nullcontext()
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        return jax.set_mesh(mesh)

    def through(self, name, params, keys):
        """Return the layer as one of its three doors has it: a function of inputs and options."""
        first, key, folded = keys
        if name == "function":
            dropout = mj.Dropout(folded, self.rate) if self.rate else None
            return lambda *a, **k: mj.multi_head_attention(
                params, *a, **k, **self.of_call, dropout=dropout
            )
        training = True if self.rate else None
        if name == "linen":
            layer, rngs = mj.MultiHeadAttention(**self.arguments), {"dropout": key}
            return lambda *a, **k: layer.apply(
                {"params": params}, *a, **k, training=training, rngs=rngs
            )
        d, dv, dk = self.widths
        widths = {"in_features": d, "value_features": dv, "key_features": dk}
        layer = mj.nnx.MultiHeadAttention(**self.arguments, **widths, rngs=nnx.Rngs(params=0))
        nnx.update(layer, params)
        return lambda *a, **k: layer(
            *a, **k, training=training, rngs=nnx.Rngs(dropout=first) if self.rate else None
        )

    def called(self, door, inputs, bias, known):
        """Return the outputs and the scores of all pieces."""
        masks, (q_tokens, k_tokens), rule = known
        x_q = inputs[0]
        x_v = x_q if self.shared else inputs[1]
        x_k = None if self.widths[2] is None else inputs[-1]
        options = {
            **{"return_attention_scores": self.scores, "use_causal_mask": self.causal},
            **{"mask": rule, "bias": bias},
        }
        if self.pieces is None:
            tokens = {"query_tokens": q_tokens, "key_tokens": k_tokens}
            results = door(x_q, x_v, x_k, **masks, **tokens, **options)
            return ([results[0]], [results[1]]) if self.scores else ([results], [])
        own = dict(self.cache)
        layer = own.pop("layer", None)
        if layer is not None:
            own["layers"] = 2
        own = {"dtype": DTYPES[self.dtype]} | own
        module = mj.MultiHeadAttention(**self.arguments)
        cache = module.empty_cache(self.batch, own.pop("capacity"), **own)
        if layer is not None:
            cache = cache.of_layer(layer)
        (axis,) = self.axes
        outputs, scores, t0, s0 = [], [], 0, 0
        for own_tokens, (queries, tokens, then) in zip(
            q_tokens or (None,) * len(self.pieces), self.pieces
        ):

            def part(x, first, size):
                if x is None or (isinstance(x, np.ndarray) and x.ndim <= axis):
                    return x
                whole = jax.lax.slice_in_dim(x, first, first + size, axis=axis)
                return whole

            def flags(name, first, size):
                mask = masks.get(name)
                if mask is None or size == 0:
                    return None
                mask = jnp.broadcast_to(
                    mask.reshape((1,) * (len(self.shape) - mask.ndim) + mask.shape),
                    self.whole((self.lengths[0 if name == "query_mask" else 1],)),
                )
                return part(mask, first, size)

            q = part(x_q, t0, queries)
            v = q if self.shared else part(x_v, s0, tokens) if tokens else None
            k = part(x_k, s0, tokens) if tokens else None
            more = {name: flags(name, s0, tokens) for name in ("value_mask", "key_mask")}
            more["query_mask"] = flags("query_mask", t0, queries)
            more["attention_mask"] = masks.get("attention_mask")
            more |= {"query_tokens": own_tokens, "key_tokens": k_tokens}
            out, *score, cache = door(q, v, k, **more, **options, cache=cache)
            outputs.append(out)
            scores += score
            t0, s0 = t0 + queries, s0 + tokens
            if then is not None:
                cache = getattr(cache, then[0])(np.asarray(then[1], np.int32))
        return outputs, scores


def _folded(key):
    """Return the key that linen's layer makes of its stream's."""
    return flax.core.apply(lambda scope: scope.make_rng("dropout"))({}, rngs={"dropout": key})


def fourth_order(at, step=2e-4):
    """Return the slopes at 0 of the arrays that a function of a number returns."""
    a, b, c, d = (at(x * step) for x in (1, -1, 2, -2))
    return {name: (8 * (a[name] - b[name]) - (c[name] - d[name])) / (12 * step) for name in a}


def compared(name, got, want, near, *, eps, fine, share, tiny):
    """Raise unless numbers are as near as those that are rounded otherwise."""
    assert np.isfinite(got).all(), f"{name}: NaN or infinity"
    if not want.size:
        return
    eps = max(eps, fine, float(jnp.finfo(got.dtype).eps))
    spread = max(float(np.abs(x - want).max()) for x in near)
    allowed = share * spread + 16 * eps * float(np.abs(want).max()) + tiny
    worst = float(np.abs(got.astype(np.float64) - want).max())
    assert worst <= allowed, f"{name}: largest error {worst:.3g}, allowed {allowed:.3g}"


@lru_cache(maxsize=4)
def _program(call: LayerCall) -> Any:
    """Return the compiled function of (what moves, how, what is traced of the masks, keys, cotangents)."""
    own = {name: read(text, RULES) for name, text in call.masks}
    tokens = tuple(read(text or "None", RULES) for text in (call.q_tokens, call.k_tokens))
    rule = None if call.mask is None else read(call.mask, RULES)

    def program(moving, moves, known, keys, d_out, d_scores):
        known = (own, tokens, rule) if known is None else known

        def through(name):
            def forward(moving):
                params, inputs, bias = moving
                return call.called(call.through(name, params, keys), inputs, bias, known)

            def first(moving):
                (outputs, scores), vjp = jax.vjp(forward, moving)
                d = [a.reshape(b.shape).astype(b.dtype) for a, b in zip(d_scores, scores)]
                d = [a.astype(b.dtype) for a, b in zip(d_out, outputs)], d
                return outputs, scores, vjp(d)[0]

            if call.integers or name != call.door:
                return (*forward(moving), moving), None
            return jax.jvp(first, (moving,), (moves,)) if call.second else (first(moving), None)

        found = {name: through(name) for name in DOORS}
        return {name: results for name, (results, _) in found.items()}, found[call.door][1]

    return jax.jit(program, compiler_options=OPTIONS)


# ---- drawing calls ------------------------------------------------------------------------------------

LARGE = (1.0, 0.0, 1e-30, 1e3, 1e6)
AXES = {
    2: [(None, (0,)), (0, (0,)), (-2, (0,))],
    3: [(None, (1,)), (1, (1,)), (-2, (1,)), (0, (0,)), ((1,), (1,)), ((-3,), (0,))],
    4: [(None, (1, 2)), (1, (1,)), (-2, (2,)), ((2, 1), (2, 1)), ((-4, 2), (0, 2)), (0, (0,))],
    5: [(None, (1, 2, 3)), ((3, 1), (3, 1)), (2, (2,)), ((-4, -2), (1, 3)), (-2, (3,))],
}
LENGTHS = {2: (1, 2, 5, 7, 11, 13, 17), 3: (1, 2, 3, 5, 7, 11, 13), 4: (1, 2, 3, 5), 5: (1, 2, 3)}


def draw_layer_call(seed: int, index: int) -> LayerCall:
    """Return call number `index` of a seed; four in a row differ in values alone, and share a program."""
    call, variant = _drawn(seed, index // 4), index % 4
    if not variant:
        return call
    rng = np.random.default_rng([seed, index])
    magnitudes = call.magnitudes
    if magnitudes != (1.0, 1.0, 1.0):
        magnitudes = tuple(float(rng.choice(LARGE)) for _ in range(3))
    poison = None if call.poison is None else float(rng.choice([nan, inf, -inf, 1e18, 0.0]))

    def again(text):
        return text and re.sub(
            r"\((\d{4,6}), ", lambda found: f"({int(found[1]) + variant}, ", text
        )

    texts: dict[str, Any] = {"bias": again(call.bias)}
    if call.traced:
        texts |= {name: again(getattr(call, name)) for name in ("mask", "q_tokens", "k_tokens")}
        texts["masks"] = tuple((name, again(text)) for name, text in call.masks)
    own = {"seed": call.seed + variant, "magnitudes": magnitudes, "poison": poison}
    return dataclasses.replace(call, **own, **texts)


def _drawn(seed: int, index: int) -> LayerCall:
    rng = np.random.default_rng([7, seed, index])
    pick, chance, number = dice(rng)

    def text(*sizes):
        return ", ".join(str(x) for x in sizes)

    def cut(sizes, share=0.3):
        return tuple(1 if chance(share) else x for x in sizes)

    cached = chance(0.3)
    backend = (
        pick(*SLOW)
        if chance(0.04) and not cached
        else pick(*(b for b in BACKENDS if b not in SLOW))
    )
    sharded = backend in ("gather", "ring")
    rank = 3 if sharded else pick(2, 3, 3, 3, 3, 4, 4, 5)
    given, axes = (None, (1,)) if sharded else pick(*AXES[rank])
    if cached:
        given, axes = pick(*(x for x in AXES[rank] if len(x[1]) == 1))
    empty = 0.03
    shape = [pick(*LENGTHS[rank]) if a in axes else pick(1, 2, 3) for a in range(rank - 1)]
    keys = [pick(*LENGTHS[rank]) for _ in axes]
    shape, keys = ([0 if chance(empty) else x for x in y] for y in (shape, keys))
    if sharded:
        shape, keys = (2, 2 * max(shape[1], 1)), [2 * max(keys[0], 1)]
    shared = chance(0.4)
    pieces, rolling = None, cached and chance(0.3)
    if cached:
        pieces = []
        for _ in range(pick(2, 3, 4)):
            queries = pick(1, 1, 2, 3, 5)
            tokens = queries if shared or chance(0.3) else pick(1, 2, 3, 4, 0)
            pieces.append((queries, tokens, None))
        shape[axes[0]], keys = sum(p[0] for p in pieces), [sum(p[1] for p in pieces)]
    if shared:
        keys = [shape[axis] for axis in axes]
    if cached:  # a cache has a row at least
        shape = [x or (a not in axes) * 1 for a, x in enumerate(shape)]
    lead = tuple(n for axis, n in enumerate(shape) if axis not in axes)
    batch, extent, shape = math.prod(lead), [shape[axis] for axis in axes], tuple(shape)
    t, s = math.prod(extent), math.prod(keys)
    width = pick(1, 2, 3, 4, 5)
    widths = (width, width if shared else pick(1, 2, 3, 5), pick(1, 3, 5) if chance(0.3) else None)
    n, kv = pick((1, 1), (2, 2), (4, 2), (3, 1), (6, 3))
    h, v = pick(1, 2, 3, 4, 6), pick(1, 2, 3, 5)
    dtype = pick(*["float32"] * 7, "bfloat16", "bfloat16", "float16", "float64")
    if backend == "pallas_tpu" and dtype == "float64":
        dtype = "float32"
    wild = dtype in ("float32", "float64") and chance(0.15)
    turns = None
    if h % 2 == 0 and chance(0.4):
        options = ["base=100.0"] * chance(0.5) + ["interleaved=True"] * chance(0.4)
        options += ["fraction=0.5"] * (h % 4 == 0 and chance(0.3))
        options += [f"scaling=Linear({pick(2.0, 3.0)})"] * chance(0.2)
        if h % 4 == 0 and len(axes) == 2 and extent == keys and "fraction=0.5" not in options:
            options += [f"axes={tuple(extent)}"] * (min(extent) > 0)
        turns = f"Rotary({', '.join(options)})"

    # Masks over the inputs' axes, over pairs, by rule.
    masks = []
    kind = pick("", "", '.astype("int32")', '.astype("uint8")')
    for name, sizes in (("query_mask", extent), ("value_mask", keys), ("key_mask", keys)):
        if chance(0.25):
            inside = dict(zip(axes, sizes))
            own = tuple(inside.get(axis, x) for axis, x in enumerate(shape))
            own = own if cached else (*cut(own[:1]), *own[1:])
            masks.append((name, f"flags({number()}, {text(*own)}, share=0.75){kind}"))
    options: dict[str, Any] = {}
    held = 0
    if cached:
        held = s + pick(0, 0, 2)
        window = None
        if rolling:
            window = pick(1, 2, 3, 4)
            held = window + pick(0, 0, 1, 3)
            options["rolling"] = True
        held = max(held, 1)
        options = {"capacity": held} | options
        if chance(0.25) and dtype != "float64":
            options["dtype"] = "int8"
        if chance(0.25):
            options["layer"] = pick(0, 1)
        for i, (queries, tokens, _) in enumerate(pieces):
            then = pick("truncated", "reorder") if chance(0.3) else None
            if then == "reorder":
                pieces[i] = (
                    queries,
                    tokens,
                    (then, tuple(pick(*range(batch)) for _ in range(batch))),
                )
            if then == "truncated" and not rolling:
                counts = tuple(pick(0, 1, 2, 3, 5) for _ in range(batch))
                pieces[i] = queries, tokens, (then, pick(counts, counts[0] if counts else 0))
        pieces = tuple(pieces)
    over = ([1], [held]) if cached else (extent, keys)
    arrays = not rolling
    if arrays and chance(0.3):
        most = rng.integers(len(lead) + 2)
        outer = (*lead, n) if most > len(lead) else lead[:most]
        own = cut((*outer, *over[0], *over[1]), 0.2)
        masks.append(("attention_mask", f"flags({number()}, {text(*own)}){kind}"))
    q_one, k_one = (1, held) if cached else (t, s)
    segments = not rolling and chance(0.3)
    reordered = any(then is not None and then[0] == "reorder" for *_, then in pieces or ())

    def tokens(length, one=False):
        if not one and (rolling or not (segments or chance(0.4))):
            return None
        if cached and isinstance(length, list):
            return f"({', '.join(tokens(queries, True) for queries in length)},)"
        # The keys of a row have been turned to positions that a later row may not have.
        own = text(1 if reordered or chance(0.3) else batch, length)
        parts = [f"{length}"] + [f"start={pick(-3, 2, 11)}"] * chance(0.3)
        if chance(0.4):
            parts.append(f"pos=ints({number()}, -3, 20, {own})")
        if segments:
            parts.append(f"segment=ints({number()}, -1, {pick(1, 2)}, {own})")
        if chance(0.4):
            parts.append(f"valid=flags({number()}, {own})")
        return f"Tokens({', '.join(parts)})"

    q_tokens = tokens([queries for queries, *_ in pieces] if cached else t)
    k_tokens = tokens(held if cached else s)
    if segments and not cached and shared and widths[2] is None and chance(0.5):
        k_tokens = None

    def dense():
        own = pick((q_one, k_one), cut((batch, n, q_one, k_one), 0.4))
        return f"flags({number()}, {text(*own)})"

    def rule(depth=0):
        if depth < 2 and chance(0.5):
            kind = pick("&", "&", "|", "~", *(["array"] if arrays else []))
            if kind == "~":
                return f"~({rule(depth + 1)})"
            if kind == "array":
                return f"({rule(depth + 1)} {pick('&', '|')} {dense()})"
            return f"({rule(depth + 1)} {kind} {rule(depth + 1)})"
        choices = [
            "Causal()",
            f"Window({pick(-1, 0, 1, 2, 5)}, {pick(-2, 0, 1, 3)})",
            f"ChunkedCausal({pick(1, 2, 3, 5)})",
            f"Dilated({pick(1, 2, 3)})",
            f"PrefixLM({pick(0, 1, 3)})",
            "Full()",
        ]
        if arrays:
            choices.append(f"Dense({dense()})")
        if not rolling:
            choices += ["ValidKeys()", "ValidQueries()"]
        if segments:
            choices.append("SameSegment()")
        return pick(*choices)

    def bias():
        own = pick((q_one, k_one), cut((batch, n, q_one, k_one), 0.4))
        kinds = [
            f"Alibi(normal({number()}, {n}))",
            f"Buckets(normal({number()}, {pick(4, 8)}, {n}), {pick(True, False)}, {pick(9, 16)})",
            f"Relative(normal({number()}, {pick(3, 5, 9)}, {n}))",
        ]
        if arrays:
            filled = f"either({number()}, {pick('-inf', LEAST, -1e9, 1e6, 88.5)}, {text(*own)})"
            kinds += [f"Array(normal({number()}, {text(*own)}))"] * 2 + [f"Array({filled})"]
        if backend in SLOW or dtype == "float64":
            kinds = [k for k in kinds if k.startswith("Array")]
        return pick(*kinds) if kinds else None

    mask = rule() if segments or chance(0.5) else None
    biased = ("query", "key", "value", "attention_output")
    call = LayerCall(
        seed=number(),
        door=pick(*DOORS),
        backend=backend,
        shape=shape,
        axes=axes,
        given=given,
        keys=tuple(keys),
        widths=widths,
        shared=shared,
        heads=(n, kv),
        sizes=(h, v),
        output_shape=pick(None, None, 1, 5, (2, 3), (3, 1, 2)),
        use_bias=pick(True, True, False, tuple(x for x in biased if chance(0.5)) or False),
        use_gate=chance(0.25),
        use_sinks=chance(0.2),
        qk_norm=pick(None, None, "rms", "layer"),
        rotary=turns,
        scale=pick(None, None, None, 0.3, -1.0, 0.0),
        logit_cap=pick(None, None, None, 0.5, 3.0, 30.0),
        sliding_window=window if rolling else pick(None, None, None, 1, 2, 3, 5),
        causal=rolling or chance(0.4),
        masks=tuple(masks),
        mask=mask,
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        bias=bias() if chance(0.3) else None,
        rate=pick(0.0, 0.0, 0.1, 0.5),
        scores=not rolling and chance(0.3),
        dtype=dtype,
        mixed=dtype in ("bfloat16", "float16") and chance(0.5),
        magnitudes=tuple(pick(*LARGE) for _ in range(3)) if wild else (1.0, 1.0, 1.0),
        poison=pick(None, nan, inf, -inf, 1e18)
        if backend != "pallas_tpu" and dtype != "float16"
        else None,
        traced=chance(0.3),
        pieces=pieces,
        cache=tuple(options.items()),
    )
    calm = not wild and "either" not in f"{call.bias}" and not call.integers
    return dataclasses.replace(call, second=calm and backend not in SLOW and chance(0.5))
