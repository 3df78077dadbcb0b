"""The workloads: what is computed, at which sizes, from which numbers.

B batch   T query length   S key length   N query heads   K key-value heads   H head size
A extent of an axis beside the attended one
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One workload. The layer is N H wide; `window` counts the query itself and keys before it."""

    name: str
    level: Literal["layer", "function"] = "layer"
    backward: bool = False
    batch: int = 1
    length: int = 1024
    keys: int | None = None
    heads: int = 8
    kv_heads: int | None = None
    size: int = 64
    beside: int | None = None
    causal: bool = False
    window: int | None = None
    padding: bool = False
    per_head: bool = False
    dropout: float = 0.0
    rotary: bool = False
    buckets: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    compiles: int = 1
    alone: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.size

    @property
    def key_length(self) -> int:
        return self.length if self.keys is None else self.keys

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def features(self) -> tuple[str, ...]:
        """What a peer must be able to do, in words that peers use to say that they cannot."""
        asked = {
            self.level: True,
            "N-D axes": self.beside is not None,
            "grouped heads": self.key_heads != self.heads,
            "dropout": self.dropout > 0,
            "window": self.window is not None,
            "padding": self.padding,
            "per-head mask": self.per_head,
            "cross": self.keys is not None,
            "rotary": self.rotary,
            "bias by buckets": self.buckets is not None,
            "bfloat16": self.dtype == "bfloat16",
        }
        return tuple(name for name, present in asked.items() if present)

    @property
    def title(self) -> str:
        """The workload in one line for people."""
        masks = {
            "causal": self.causal,
            f"window {self.window}": self.window is not None,
            "key padding": self.padding,
            "mask per head": self.per_head,
            f"dropout {self.dropout:g}": self.dropout > 0,
            f"{self.key_heads} key heads": self.key_heads != self.heads,
            "rotary": self.rotary,
            f"bias of {self.buckets} buckets": self.buckets is not None,
            f"axis of {self.beside} beside": self.beside is not None,
            "bfloat16": self.dtype == "bfloat16",
        }
        keys = "" if self.keys is None else f" S{self.keys}"
        words = [
            f"{self.level} B{self.batch} T{self.length}{keys} {self.heads}x{self.size}",
            *(word for word, present in masks.items() if present),
            "forward+backward" if self.backward else "forward",
        ]
        return ", ".join(words)

    def shrunk(self) -> "Row":
        """Return the same features at a size that takes no time."""

        def least(value, most):
            return None if value is None else min(value, most)

        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            length=min(self.length, 13),
            keys=least(self.keys, 17),
            heads=min(self.heads, 4),
            kv_heads=least(self.kv_heads, 2),
            size=min(self.size, 4),
            beside=least(self.beside, 3),
            window=least(self.window, 5),
            compiles=1,
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """The numbers of a row, the same for every peer, in NumPy and float32.

    Args:
      inputs: {"x"} or {"query", "value"} [B, T, (A,) N H] of a layer, {"query", "key", "value"}
        [B, T, N, H] of a function, "table" [buckets, N] of a bias; gradients are taken by all of them.
      weights: {"query" | "key" | "value" | "attention_output": {"kernel", "bias"}}, or {}.
      masks: "lengths" [B] and "valid" [B, S], "heads" [1, N, T, S], as the row asks.
      cotangent: Of the output.
    """

    inputs: dict[str, np.ndarray]
    weights: dict[str, dict[str, np.ndarray]]
    masks: dict[str, np.ndarray]
    cotangent: np.ndarray


def draw(row: Row, seed: int = 0) -> Data:
    """Draw the numbers of a row."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return scale * rng.standard_normal(shape, dtype=np.float32)

    width, n, k, h = row.width, row.heads, row.key_heads, row.size
    beside = () if row.beside is None else (row.beside,)
    shapes: dict[str, tuple[int, ...]] = {"x": (row.batch, row.length, *beside, width)}
    if row.level == "function":
        shapes = {
            "query": (row.batch, row.length, n, h),
            "key": (row.batch, row.key_length, k, h),
            "value": (row.batch, row.key_length, k, h),
        }
        if row.buckets is not None:
            shapes["table"] = (row.buckets, n)
    elif row.keys is not None:
        shapes = {
            "query": (row.batch, row.length, *beside, width),
            "value": (row.batch, row.keys, *beside, width),
        }
    kernels = {"query": (width, n, h), "key": (width, k, h), "value": (width, k, h)}
    kernels["attention_output"] = (n, h, width)
    weights = {
        name: {
            "kernel": normal(*shape, scale=width**-0.5),
            "bias": normal(*(shape[1:] if shape[0] == width else (width,)), scale=0.1),
        }
        for name, shape in kernels.items()
        if row.level == "layer"
    }
    out = shapes["x"] if "x" in shapes else shapes["query"]
    return Data(
        {name: normal(*shape) for name, shape in shapes.items()},
        weights,
        _masks(row, rng),
        normal(*out),
    )


def _masks(row: Row, rng: np.random.Generator) -> dict[str, np.ndarray]:
    masks = {}
    if row.padding:
        lengths = rng.integers(max(1, row.key_length // 2), row.key_length + 1, row.batch)
        masks["lengths"] = lengths.astype(np.int32)
        masks["valid"] = np.arange(row.key_length) < lengths[:, None]
    if row.per_head:
        heads = rng.random((1, row.heads, row.length, row.key_length)) < 0.7
        heads[..., 0] = True
        masks["heads"] = heads
    return masks


def _rows() -> dict[str, Row]:
    long = {"length": 4096, "causal": True}
    rows = [
        Row("layer-512", batch=8, length=512),
        Row("layer-512-train", batch=8, length=512, backward=True, compiles=5),
        Row("layer-512-train-dropout", batch=8, length=512, backward=True, dropout=0.1, compiles=5),
        Row("layer-4096-causal", **long),
        Row("layer-4096-grouped", kv_heads=2, **long),
        Row("layer-4096-rotary", kv_heads=2, rotary=True, **long),
        Row("function-4096-buckets-train", "function", True, length=4096, buckets=32),
        Row("function-4096-buckets-causal-train", "function", True, buckets=32, **long),
        Row("layer-4096-causal-train", backward=True, compiles=5, **long),
        Row("layer-4096-causal-train-dropout", backward=True, dropout=0.1, compiles=5, **long),
        Row("layer-16384-window", length=16384, causal=True, window=1024),
        Row("decode", "function", batch=8, length=1, keys=4096),
        Row("tiny", length=4, heads=2, size=4),
        Row("function-4096-causal", "function", **long),
        Row("function-4096-causal-train", "function", backward=True, **long),
        # Lengths and windows of the same work a query: only our own times, compared per T * w.
        Row("window-4096-1024", "function", length=4096, causal=True, window=1024, alone=True),
        Row("window-16384-1024", "function", length=16384, causal=True, window=1024, alone=True),
        Row("window-16384-4096", "function", length=16384, causal=True, window=4096, alone=True),
        # The shape of PyTorch's own figures for its fused CPU kernel (pytorch/pytorch #105131).
        Row("function-1024-25-heads", "function", heads=25),
        Row("function-8192-causal", "function", length=8192, causal=True),
        Row("layer-decode", batch=8, length=1, keys=4096),
    ]
    features = {
        "plain": {},
        "dropout": {"dropout": 0.1},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 128},
        "padding": {"padding": True},
        "per-head": {"per_head": True},
        "axes": {"beside": 4},
        "grouped": {"kv_heads": 2},
        "bfloat16": {"dtype": "bfloat16"},
        "cross": {"keys": 768},
        "everything": {"causal": True, "window": 128, "padding": True, "dropout": 0.1},
    }
    ways = itertools.product(features.items(), ("layer", "function"), (False, True))
    for (feature, asked), level, backward in ways:
        if feature != "axes" or level == "layer":
            name = f"grid-{level}-{feature}" + ("-train" if backward else "")
            rows.append(Row(name, level, backward, batch=2, **asked))
    return {row.name: row for row in rows}


ROWS = _rows()
# Those of the README's table, and what its words beside the table rest on.
PUBLISHED = (
    "layer-512",
    "layer-512-train",
    "layer-512-train-dropout",
    "layer-4096-causal",
    "layer-4096-causal-train",
    "layer-4096-causal-train-dropout",
    "layer-16384-window",
    "decode",
    "tiny",
    "window-4096-1024",
    "window-16384-1024",
    "window-16384-4096",
    "function-4096-causal",
    "function-4096-causal-train",
)
