"""Random configurations of the layer, over all of its arguments together.

A case is a function of (seed, index) alone. It says in plain NumPy which pairs are visible.
"""

import dataclasses
from typing import Any

import numpy as np

INITIALIZERS = [
    "glorot_uniform",
    "he_normal",
    "lecun_uniform",
    "truncated_normal",
    {"class_name": "RandomNormal", "config": {"mean": 0.0, "stddev": 0.3, "seed": 5}},
    {"class_name": "Orthogonal", "config": {"gain": 0.5, "seed": None}},
    {
        "class_name": "VarianceScaling",
        "config": {
            "scale": 2.0,
            "mode": "fan_out",
            "distribution": "untruncated_normal",
            "seed": None,
        },
    },
]
BIAS_INITIALIZERS = ["zeros", "ones", {"class_name": "Constant", "config": {"value": 0.25}}]
REGULARIZERS = [
    {"class_name": "L1", "config": {"l1": 0.07}},
    {"class_name": "L2", "config": {"l2": 0.03}},
    {"class_name": "L1L2", "config": {"l1": 0.02, "l2": 0.05}},
]
CONSTRAINTS = [
    {"class_name": "MaxNorm", "config": {"max_value": 0.6, "axis": 0}},
    {"class_name": "UnitNorm", "config": {"axis": -1}},
    {"class_name": "NonNeg", "config": {}},
    {
        "class_name": "MinMaxNorm",
        "config": {"min_value": 0.4, "max_value": 0.7, "rate": 0.75, "axis": 0},
    },
]
KERNEL_CONSTRAINTS = [
    *CONSTRAINTS,
    {"class_name": "MaxNorm", "config": {"max_value": 0.5, "axis": [0, 1]}},
]
AXES = {
    3: [None, None, 1, -2, (1,), (-2,), 0, -3],
    4: [None, 1, 2, -2, -3, (1, 2), (2, 1), (-3, -2), (1, -2)],
    5: [None, (1, 3), (3, 1), 2, (-2,), (-4, -2), (3, 2, 1)],
}
LENGTHS = {3: [1, 2, 3, 5, 7, 11], 4: [1, 2, 3, 5], 5: [1, 2, 3]}
_RULES = ("kernel_regularizer", "bias_regularizer", "activity_regularizer")


@dataclasses.dataclass
class Case:
    """One configuration with its inputs and masks; NumPy throughout."""

    seed: int
    index: int
    grouped: bool
    arguments: dict[str, Any]
    axes: tuple[int, ...]
    inputs: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    causal: bool
    scores: bool
    d_output: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    d_scores: np.ndarray | None = None

    @property
    def heads(self):
        return self.arguments["num_query_heads" if self.grouped else "num_heads"]

    def split(self, name):
        """Return the sizes of an input's axes that are not attended, and of those that are."""
        shape = self.inputs[name].shape[:-1]
        batch = tuple(x for a, x in enumerate(shape) if a not in self.axes)
        return batch, tuple(shape[a] for a in self.axes)

    @property
    def scores_shape(self):
        (batch, t), (_, s) = self.split("query"), self.split("value")
        return (*batch, self.heads, *t, *s)

    @property
    def native(self):
        """Whether Keras itself can be asked for these masks; else it gets them as one dense mask."""
        automatic = self.causal or self.arguments["sliding_window"] is not None
        automatic = automatic or len(self.masks) > ("attention_mask" in self.masks)
        mask = self.masks.get("attention_mask")
        plain = self.inputs["query"].ndim == 3 and self.axes == (1,)
        return plain and (mask is None or mask.ndim < 4 or not automatic)

    def visible(self):
        """Return booleans [B, N, T, S]."""
        (batch, t_axes), (_, s_axes) = self.split("query"), self.split("value")
        b, t, s = (int(np.prod(x)) for x in (batch, t_axes, s_axes))
        ahead = np.arange(s) - np.arange(t)[:, None]
        seen = np.ones((b, self.heads, t, s), bool)
        if self.causal:
            seen &= ahead <= 0
        if self.arguments["sliding_window"] is not None:
            seen &= np.abs(ahead) < self.arguments["sliding_window"]
        for name, mask in self.masks.items():
            if name == "attention_mask":
                pairs = len(t_axes) + len(s_axes)
                lead, tail = mask.shape[: mask.ndim - pairs], mask.shape[mask.ndim - pairs :]
                missing = len(self.scores_shape) - mask.ndim
                whole = mask.reshape(*lead, *(1,) * missing, *tail)
                seen &= np.broadcast_to(whole, self.scores_shape).reshape(seen.shape).astype(bool)
                continue
            side = "query" if name == "query_mask" else "value"
            shape = self.inputs[side].shape[:-1]
            whole = np.broadcast_to(mask.astype(bool), shape)
            order = [a for a in range(len(shape)) if a not in self.axes] + list(self.axes)
            flags = whole.transpose(order).reshape(b, 1, -1)
            seen &= flags[..., None] if name == "query_mask" else flags[..., None, :]
        return seen


def draw(seed, index):
    """Return case number `index` of a seed."""
    rng = np.random.default_rng([seed, index])

    def pick(options):
        return options[rng.integers(len(options))]

    def maybe(share, options):
        return pick(options) if rng.random() < share else None

    grouped = rng.random() < 0.25
    rank = 3 if grouped else int(rng.choice([3, 4, 5], p=[0.5, 0.35, 0.15]))
    given = None if grouped else pick(AXES[rank])
    listed = (given,) if isinstance(given, int) else given
    axes = tuple(range(1, rank - 1)) if listed is None else tuple(a % rank for a in listed)
    lead = [pick(LENGTHS[rank]) if a else pick([1, 2, 3]) for a in range(rank - 1)]
    keys = [pick(LENGTHS[rank]) if a in axes else x for a, x in enumerate(lead)]
    inputs = {
        "query": rng.standard_normal((*lead, pick([1, 3, 5, 7]))),
        "value": rng.standard_normal((*keys, pick([2, 3, 5, 11]))),
    }
    if rng.random() < 0.4:
        inputs["key"] = rng.standard_normal((*keys, pick([1, 3, 7])))
    arguments = {
        "dropout": maybe(0.25, [0.1, 0.5]) or 0.0,
        "use_bias": bool(rng.random() < 0.7),
        "sliding_window": maybe(0.25, [1, 2, 3, 5]),
        "kernel_initializer": pick(INITIALIZERS),
        "bias_initializer": pick(BIAS_INITIALIZERS),
        **{name: maybe(0.4, REGULARIZERS) for name in _RULES},
        "kernel_constraint": maybe(0.5, KERNEL_CONSTRAINTS),
        "bias_constraint": maybe(0.5, CONSTRAINTS),
        "use_gate": bool(rng.random() < 0.35),
        "seed": maybe(0.3, [0, 17]),
    }
    if grouped:
        heads, kv_heads = pick([(2, 1), (3, 1), (4, 2), (6, 3), (6, 2), (2, 2)])
        arguments |= {"head_dim": pick([1, 2, 3, 5])}
        arguments |= {"num_query_heads": heads, "num_key_value_heads": kv_heads}
    else:
        arguments |= {
            "num_heads": pick([1, 2, 3, 5]),
            "key_dim": pick([1, 2, 3, 7]),
            "value_dim": maybe(0.6, [1, 2, 5, 11]),
            "output_shape": maybe(0.5, [1, 7, (5,), (2, 3), (3, 1, 2)]),
            "attention_axes": given,
        }
    case = Case(
        seed=seed,
        index=index,
        grouped=grouped,
        arguments=arguments,
        axes=axes,
        inputs={name: x.astype(np.float32) for name, x in inputs.items()},
        masks={},
        causal=bool(rng.random() < 0.35),
        scores=bool(rng.random() < 0.5),
    )
    _draw_masks(case, rng, pick)
    output = (inputs["query"].shape[-1],) if grouped else arguments["output_shape"]
    output = inputs["query"].shape[-1] if output is None else output
    output = (output,) if isinstance(output, int) else output
    case.d_output = rng.standard_normal((*lead, *output)).astype(np.float32)
    if case.scores:
        case.d_scores = rng.standard_normal(case.scores_shape).astype(np.float32)
    return case


def _draw_masks(case, rng, pick):
    dtype = pick([bool, bool, np.int32, np.uint8])
    (batch, t), (_, s) = case.split("query"), case.split("value")
    if rng.random() < 0.5:
        kept = rng.integers(len(batch) + 2)
        lead = (*batch, case.heads) if kept > len(batch) else batch[:kept]
        shape = tuple(1 if rng.random() < 0.2 else x for x in (*lead, *t, *s))
        case.masks["attention_mask"] = (rng.random(shape) < 0.65).astype(dtype)
    for name in case.inputs:
        if rng.random() < 0.25:
            shape = case.inputs[name].shape[:-1]
            shape = (1, *shape[1:]) if rng.random() < 0.2 else shape
            case.masks[f"{name}_mask"] = (rng.random(shape) < 0.75).astype(dtype)
    if "key" not in case.inputs and rng.random() < 0.1:
        case.masks["key_mask"] = (rng.random(case.inputs["value"].shape[:-1]) < 0.75).astype(dtype)
