"""One call of the layer over folded axes in float64 NumPy, forward and by hand, with an error bar.

B batch   T queries   S keys   N query heads   K key-value heads
H query-key head size   V value head size

Every number that the layer rounds may be rounded otherwise here: what then comes out tells how far off a
right implementation may be.
"""

import numpy as np

from tests.fuzz_calls import definition


class Layer:
    """Parameters in float64, and the sums of their gradients over calls.

    Args:
      params: {name: {part: array}}.
      eps: Relative rounding of arrays.
      noise: (relative rounding of logits, generator), or None: nothing is rounded.
    """

    def __init__(self, params, eps=0.0, noise=None):
        self.eps, self.noise = eps, noise
        self.w = {
            name: {part: self.rounded(x.astype(np.float64)) for part, x in group.items()}
            for name, group in params.items()
        }
        self.slopes = {
            name: {part: np.zeros_like(x) for part, x in group.items()}
            for name, group in self.w.items()
        }

    def rounded(self, x):
        """Return what numbers, infinite ones too, may be rounded to."""
        if self.noise is None:
            return x
        return x * (1 + self.eps * self.noise[1].standard_normal(x.shape))

    def blurred(self, x, size):
        """Return what a sum of terms whose sizes add up to `size` may be rounded to."""
        if self.noise is None:
            return x
        return x + self.eps * self.noise[1].standard_normal(x.shape) * size

    def project(self, name, x, axes=1):
        kernel = self.w[name]["kernel"]
        bias = self.w[name].get("bias", np.zeros(()))
        y = np.tensordot(x, kernel, axes) + bias
        return self.blurred(y, np.tensordot(np.abs(x), np.abs(kernel), axes) + np.abs(bias))

    def pull(self, name, x, d, axes=1):
        """Add to the gradients of a projection, given its input and its output's cotangent; return dx."""
        kernel, outer = self.w[name]["kernel"], tuple(range(x.ndim - axes))
        slope = np.tensordot(x, d, (outer, outer))
        size = np.tensordot(np.abs(x), np.abs(d), (outer, outer))
        self.slopes[name]["kernel"] += self.blurred(slope, size)
        if "bias" in self.w[name]:
            self.slopes[name]["bias"] += self.blurred(d.sum(outer), np.abs(d).sum(outer))
        inner = tuple(range(len(outer), d.ndim)), tuple(range(axes, kernel.ndim))
        dx = np.tensordot(d, kernel, inner)
        return self.blurred(dx, np.tensordot(np.abs(d), np.abs(kernel), inner))

    def normalized(self, kind, name, x):
        c = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        r = (np.mean(c * c, -1, keepdims=True) + 1e-6) ** -0.5
        return self.rounded(c * r * self.w[name]["scale"]), (c * r, r)

    def pull_normalized(self, kind, name, kept, d):
        unit, r = kept
        self.slopes[name]["scale"] += self.blurred(
            (d * unit).sum((0, 1, 2)), np.abs(d * unit).sum((0, 1, 2))
        )
        d = d * self.w[name]["scale"]
        mean = np.mean(d * unit, -1, keepdims=True)
        whole = np.abs(d) + np.abs(unit) * np.mean(np.abs(d * unit), -1, keepdims=True)
        dx = r * self.blurred(d - unit * mean, whole)
        return dx - dx.mean(-1, keepdims=True) if kind == "layer" else dx

    def turned(self, x, angles, interleaved, sign=1):
        """Turn pairs of features [B, L, heads, H] by angles [B, L, pairs]; the others stay."""
        size = 2 * angles.shape[-1]
        a, b = (
            (x[..., 0:size:2], x[..., 1:size:2])
            if interleaved
            else (x[..., : size // 2], x[..., size // 2 : size])
        )
        cos, sin = np.cos(angles)[:, :, None], sign * np.sin(angles)[:, :, None]
        y = x.copy()
        pair = a * cos - b * sin, b * cos + a * sin
        wide = (np.abs(a) + np.abs(b)) * (1 + np.abs(angles).max(-1, initial=0)[:, :, None, None])
        pair = [self.blurred(z, wide) for z in pair]
        if interleaved:
            y[..., 0:size:2], y[..., 1:size:2] = pair
        else:
            y[..., : size // 2], y[..., size // 2 : size] = pair
        return y

    def stored(self, x):
        """Return what may be read of tokens that were rounded to eight bits with a scale for each head."""
        if self.noise is None:
            return x
        step = np.abs(x).max(-1, keepdims=True, initial=0) / 127
        return x + self.noise[1].uniform(-0.5, 0.5, x.shape) * step

    def attend(self, given, positions, seen, bias, d, *, rotary, qk_norm, scale, cap, coarse=False):
        """Return the output, the scores, and the cotangents of inputs and of a bias's leaves.

        Args:
          given: {"query": [B, T, D], "value": [B, S, D], "key": [B, S, D] or None}.
          positions: Those of queries [B, T] and of keys [B, S].
          seen: Booleans [B, N, T, S], which weights dropout keeps [B, N, T, S], and its rate.
          bias: Leaves, and what each adds to the logits.
          d: Cotangents of the output [B, T, E] and of the scores [B, N, T, S].
          rotary: What `angles` takes, or None.
          coarse: Whether keys and values are rounded to eight bits.
        """
        x = given | {"key": given["value"] if given["key"] is None else given["key"]}
        q, k, v = (self.project(name, x[name]) for name in ("query", "key", "value"))
        if qk_norm is not None:
            q, q_kept = self.normalized(qk_norm, "query_norm", q)
            k, k_kept = self.normalized(qk_norm, "key_norm", k)
        if rotary is not None:
            turns = [angles(rotary, p, y.shape[-1]) for p, y in zip(positions, (q, k))]
            q, k = (self.turned(y, a, rotary.interleaved) for y, a in zip((q, k), turns))
        if coarse:
            k, v = self.stored(k), self.stored(v)
        gate = 1.0
        if "gate" in self.w:
            gate = self.rounded(
                1 / (1 + np.exp(-np.clip(self.project("gate", x["query"]), -700, 700)))
            )

        d_y, d_scores = (self.rounded(a.astype(np.float64)) for a in d)
        kernel = self.w["attention_output"]["kernel"]
        width = d_y.shape[-1]
        flat = kernel.reshape(*kernel.shape[:2], width)
        d_heads = np.tensordot(d_y, flat, (2, 2))
        d_heads = self.blurred(d_heads, np.tensordot(np.abs(d_y), np.abs(flat), (2, 2)))
        noise, shape = None, seen[0].shape
        if self.noise is not None:
            each = (self.noise[0], shape), (self.eps, shape), (self.eps, (*shape[:3], 1))
            each = (*each, (self.noise[0], shape))
            noise = [size * self.noise[1].standard_normal(own) for size, own in each]
        sinks = self.w["sinks"]["logits"] if "sinks" in self.w else None
        leaves, terms = bias
        visible, keep, rate = seen
        results, slopes = definition(
            *((q, k, v, leaves, sinks), terms, visible, keep, rate),
            *(q.shape[-1] ** -0.5 if scale is None else scale, cap),
            (d_heads * gate, np.zeros(shape[:3]), d_scores),
            noise,
        )
        attended, _, scores = results
        attended = self.rounded(attended)
        heads = self.rounded(attended * gate)
        y = self.project("attention_output", heads, 2)
        dq, dk, dv, by_leaf, d_sinks = slopes
        if sinks is not None:
            self.slopes["sinks"]["logits"] += d_sinks
        wide = d_y.reshape(*d_y.shape[:2], *kernel.shape[2:])
        self.pull("attention_output", heads, wide, 2)
        if rotary is not None:
            dq, dk = (self.turned(y, a, rotary.interleaved, -1) for y, a in zip((dq, dk), turns))
        if qk_norm is not None:
            dq = self.pull_normalized(qk_norm, "query_norm", q_kept, dq)
            dk = self.pull_normalized(qk_norm, "key_norm", k_kept, dk)
        found = {
            "query": self.pull("query", x["query"], self.rounded(dq)),
            "key": self.pull("key", x["key"], self.rounded(dk)),
            "value": self.pull("value", x["value"], self.rounded(dv)),
        }
        if "gate" in self.w:
            d_gate = self.rounded(d_heads * attended * gate * (1 - gate))
            found["query"] = found["query"] + self.pull("gate", x["query"], d_gate)
        if given["key"] is None:
            found["value"], found["key"] = found["value"] + found["key"], None
        return y.reshape(*y.shape[:2], width), scores, found | {"leaves": by_leaf}


def angles(rotary, positions, head_size):
    """Return the angles [B, L, pairs] by which the tokens' pairs of features turn, those of axes in turn."""
    axes = rotary.axes or (None,)
    size = round(head_size * rotary.fraction) // len(axes)
    factor = 1.0 if rotary.scaling is None else rotary.scaling.factor
    slow = rotary.base ** (-np.arange(0, size, 2) / size) / factor
    parts, inside = [], 1
    for length in reversed(axes):
        own = positions if length is None else positions // inside % length
        parts.insert(0, own[..., None] * slow)
        inside *= length or 1
    return np.concatenate(parts, -1)
