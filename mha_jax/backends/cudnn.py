"""Attention by cuDNN's fused kernels, on NVIDIA GPUs: two custom calls that XLA turns into cuDNN's graphs.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size

The calls are made by `jax.ffi` alone: no GPU and no cuDNN is asked for while a program is traced or lowered,
so that it can be exported and compiled on a machine without them.

What a row saw is known to cuDNN as its lse, in float32: (m, l) = (lse, 1). Rows that see nothing, for which
cuDNN promises nothing, are set to what they are everywhere, zeros and (-inf, 0), and give no gradient.

cuDNN hides keys by a length for each example. Whether the valid keys are the first ones is known when the
program runs, and so is whether anybody uses lse's cotangent, which cuDNN does not take: where it is not as
cuDNN wants it, a branch of the program computes the same by tiles. XLA drops the branch where the answer is
known while compiling, as it is for a call whose lse is not used.

Source: NVIDIA, "cuDNN frontend API: scaled dot product attention", forward and backward; Dao 2023,
arXiv:2307.08691.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from mha_jax.attention import softmax
from mha_jax.attention.call import Moves, Output, Problem, State
from mha_jax.attention.given import is_integer
from mha_jax.attention.masks import And, Causal, Full, Mask, ValidKeys, ValidQueries, Window
from mha_jax.attention.tokens import Tokens
from mha_jax.backends.base import Backend
from mha_jax.errors import ShapeError
from mha_jax.types import Array

_DTYPES = {jnp.dtype(jnp.bfloat16): "BF16", jnp.dtype(jnp.float16): "F16"}
# Head sizes that every card since compute capability 8.0 takes, and those since 9.0.
_SIZES, _SIZES_SINCE_9 = 128, 256
_MULTIPLE = 8
# The lse of rows that see nothing, for the backward pass: all their weights are exp(x - this), 0.
_UNSEEN = 1e30


@dataclasses.dataclass(frozen=True)
class CuDNN(Backend):
    """Attention by cuDNN.

    Args:
      capability: Compute capability of the GPUs that programs are for, (9, 0) say. None takes that of this
        process's GPUs; where it has none, what every GPU since (8, 0) can do.
      cuda: Version of CUDA that programs run on, (12, 9) say. None takes that of this process, if it has one.
    """

    capability: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("capability", "cuda"):
            version = getattr(self, name)
            pair = (
                isinstance(version, tuple) and len(version) == 2 and all(map(is_integer, version))
            )
            if version is not None and not pair:
                raise ShapeError(
                    f"CuDNN({name}={version!r}) is no version: expected two integers, (9, 0) say, or None "
                    "for that of this process."
                )

    def why_not(self, problem: Problem, platform: str) -> str | None:
        if platform != "cuda":
            return f"it needs an NVIDIA GPU; this program is for {platform}"
        return self._of_the_card(problem) or _of_the_call(problem) or _of_the_mask(problem)

    def _of_the_card(self, problem: Problem) -> str | None:
        here = of_this_process()
        capability, cuda = self.capability or here[0], self.cuda or here[1]
        if capability is not None and capability < (8, 0):
            return f"cuDNN attends since compute capability 8.0; this GPU has {_dotted(capability)}"
        if cuda is not None and cuda >= (13, 0):
            return (
                f"cuDNN is known to build no attention on CUDA 13; this is CUDA {_dotted(cuda)}. Install "
                "jax[cuda12], or try it all the same with backend=CuDNN(cuda=(12, 9))"
            )
        most = _SIZES if capability is None or capability < (9, 0) else _SIZES_SINCE_9
        size = max(problem.q.shape[3], problem.v.shape[3])
        if size <= most:
            return None
        text = f"cuDNN takes head sizes up to {most}; this call has {size}"
        if size > _SIZES_SINCE_9:
            return text
        if capability is None:
            return f"{text}, which GPUs since 9.0 take: pass backend=CuDNN(capability=(9, 0))"
        return f"{text}, which needs compute capability 9.0; this GPU has {_dotted(capability)}"

    def forward(self, problem: Problem) -> State:
        return _by_examples(self._forward)(_bare(problem))

    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        return _by_examples(self._cotangent)(_bare(problem), state, cotangent)

    def _forward(self, problem: Problem) -> State:
        first = _valid_keys_are_first(problem)
        if first is None:
            return _forward(problem)
        return lax.cond(first, _forward, self._tiles().forward, problem)

    def _cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        fits, first = jnp.all(cotangent.lse == 0), _valid_keys_are_first(problem)
        fits = fits if first is None else fits & first
        return lax.cond(fits, _backward, self._tiles().cotangent, problem, state, cotangent)

    def _tiles(self) -> Backend:
        return self.tiled().on("cuda")


# ---- what cuDNN can do ----------------------------------------------------------------------------


def of_this_process() -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return the compute capability and the CUDA version of this process's GPUs; None for what it has not."""
    if jax.default_backend() != "gpu":
        return None, None
    device = jax.devices()[0]
    version = re.search(r"cuda (\d+)(\d\d)\d\b", str(device.client.platform_version).lower())
    if version is None:  # ROCm
        return None, None
    major, minor = str(device.compute_capability).split(".")
    return (int(major), int(minor)), (int(version[1]), int(version[2]))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _of_the_call(problem: Problem) -> str | None:
    """Say what of a call, but for its mask, cuDNN cannot do."""
    rules = problem.logits
    if problem.q.dtype not in _DTYPES:
        return (
            f"cuDNN attends in float16 and bfloat16; q, k and v are {problem.q.dtype}: cast them, "
            "or pass dtype=jnp.bfloat16 to the layer"
        )
    if problem.dropout is not None:
        return "cuDNN's dropout is another stream of bits; this call has dropout"
    if problem.bias is not None:
        return "cuDNN's gradients of a bias are not right for every shape; this call has a bias"
    if rules.cap is not None:
        return f"cuDNN has no soft cap; logit_cap is {rules.cap}"
    if rules.precision not in (None, "default", lax.Precision.DEFAULT):
        return f"cuDNN rounds weights to {problem.q.dtype}; precision is {rules.precision}"
    if rules.scale <= 0:
        return f"cuDNN takes a positive scale; scale is {rules.scale}"
    if not all(isinstance(size, int) for size in (*problem.q.shape, problem.k.shape[1])):
        return f"cuDNN's graph needs sizes known while compiling; q.shape={problem.q.shape} has symbols"
    return None


class Pattern(NamedTuple):
    """A mask as cuDNN knows it, from row numbers.

    Args:
      causal: Query t sees the keys up to t.
      window: How many keys a query sees, its own included; 0 for all.
    """

    causal: bool
    window: int

    @property
    def name(self) -> str:
        return "CAUSAL" if self.causal else "NO_MASK"


def _rules(mask: Mask) -> list[Mask]:
    """Return the rules that a mask is the conjunction of."""
    if type(mask) is And:
        return [*_rules(mask.a), *_rules(mask.b)]
    return [] if type(mask) is Full else [mask]


def _of_the_mask(problem: Problem) -> str | None:
    found = _pattern(problem)
    return None if isinstance(found, Pattern) else found


def _pattern(problem: Problem) -> Pattern | str:
    """Return a mask as cuDNN knows it, or what it cannot do."""
    t, s = problem.q.shape[1], problem.k.shape[1]
    left, right = t + s, t + s  # how far a query sees: everywhere
    places = [x for x in _rules(problem.mask) if type(x) not in (ValidKeys, ValidQueries)]
    for rule in places:
        if type(rule) is Causal:
            right = min(right, 0)
        elif type(rule) is Window:
            left, right = min(left, rule.left), min(right, rule.right)
        else:
            return (
                "cuDNN knows Causal(), Window(left, 0), ValidKeys() and ValidQueries(), joined by &; "
                f"this mask has {type(rule).__name__}"
            )
    if places:
        sides = {"queries": problem.q_tokens, "keys": problem.k_tokens}
        moved = [x for x, a in sides.items() if a.pos is not None or a.index is not None]
        if moved:
            return f"cuDNN counts rows from 0; the {' and '.join(moved)} of this call have own positions"
        # Rows count from 0 on both sides there.
        ahead = problem.q_tokens.start - problem.k_tokens.start
        left, right = left - ahead, right + ahead
    causal, windowed = right < s - 1, left < t - 1
    if causal and right != 0:
        return f"cuDNN's query t sees up to key t or all; the queries of this call see up to key t{right:+d}"
    if windowed and (not causal or left < 0):
        return (
            "cuDNN's windows end at query t, Window(left, 0); the queries of this call see from key "
            f"t{-left:+d} to {'t' if causal else 'the last'}"
        )
    return Pattern(causal, left + 1 if windowed else 0)


# ---- one call -------------------------------------------------------------------------------------


def _bare(problem: Problem) -> Problem:
    """Return a problem of the arrays that cuDNN's passes read, each with all its examples."""
    rules = {type(rule) for rule in _rules(problem.mask)}
    b = problem.q.shape[0]

    def tokens(tokens: Tokens, rule: type) -> Tokens:
        valid = tokens.valid if rule in rules else None
        if valid is not None:
            valid = jnp.broadcast_to(jnp.asarray(valid), (b, tokens.length))
        return Tokens(tokens.length, tokens.start, valid=valid)

    return dataclasses.replace(
        problem,
        q_tokens=tokens(problem.q_tokens, ValidQueries),
        k_tokens=tokens(problem.k_tokens, ValidKeys),
        heads_first=False,
    )


def _by_examples(function: Callable) -> Callable:
    """Let `vmap` fold the axis that it adds into the examples, the first axis of every array."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _(size, batched, *arguments):
        def fold(x, there):
            x = x if there else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        out = mapped(*jax.tree.map(fold, arguments, tuple(batched)))
        out = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _valid_keys_are_first(problem: Problem) -> Array | None:
    """Return whether the valid keys of every example are its first ones; None where all are valid."""
    valid = problem.k_tokens.valid
    if valid is None:
        return None
    rows = np.arange(valid.shape[1], dtype=np.int32)[None]
    return jnp.all(valid == (rows < _lengths(problem)[:, None]))


def _lengths(problem: Problem) -> Array:
    return jnp.sum(jnp.asarray(problem.k_tokens.valid), 1, dtype=jnp.int32)


def _seen(problem: Problem) -> Any:
    """Return which rows see a key, [B or 1, T]; None where all do."""
    t, s = problem.q.shape[1], problem.k.shape[1]
    pattern, rows = _of(problem), np.arange(t)[None]
    first = np.maximum(rows + 1 - pattern.window, 0) if pattern.window else np.zeros_like(rows)
    last: Any = np.minimum(rows, s - 1) if pattern.causal else np.full_like(rows, s - 1)
    if problem.k_tokens.valid is not None:
        last = jnp.minimum(last.astype(np.int32), _lengths(problem)[:, None] - 1)
        first = first.astype(np.int32)
    seen = first <= last
    if problem.q_tokens.valid is not None:
        seen = seen & problem.q_tokens.valid
    return None if isinstance(seen, np.ndarray) and seen.all() else jnp.asarray(seen)


def _of(problem: Problem) -> Pattern:
    pattern = _pattern(problem)
    if isinstance(pattern, str):
        raise NotImplementedError(pattern)
    return pattern


def _forward(problem: Problem) -> State:
    """Attend; valid keys come first."""
    (b, t, n, _), v = problem.q.shape, problem.v.shape[3]
    q, k, v_ = _padded(problem.q, problem.k, problem.v)
    size = q.shape[3]
    out, lse = _call(
        "__cudnn$fmhaSoftmax",
        [((b, n, t, size), q.dtype), ((b, n, t), jnp.float32)],
        _configuration(problem, _FORWARD),
        *(q, k, v_, *_both_lengths(problem)),
    )
    out, m, l = out[..., :v], lse, jnp.ones_like(lse)
    if (seen := _seen(problem)) is not None:
        out = jnp.where(seen[:, :, None, None], out, jnp.zeros((), out.dtype))
        m, l = (jnp.where(seen[:, None], x, y) for x, y in ((m, -jnp.inf), (l, 0.0)))
    return State(out, m, l)


def _backward(problem: Problem, state: State, cotangent: Output) -> Moves:
    """Return the cotangents of q, k and v; valid keys come first, and lse's cotangent is 0."""
    lse = softmax.logsumexp(state.m, state.l)
    d_out, out, seen = cotangent.out, state.out, _seen(problem)
    if seen is not None:
        lse = jnp.where(seen[:, None], lse, _UNSEEN)
        d_out = jnp.where(seen[:, :, None, None], d_out, jnp.zeros((), d_out.dtype))
    q, k, v, d_out, out = _padded(problem.q, problem.k, problem.v, d_out, out)
    (b, t, n, size), (s, kv) = q.shape, k.shape[1:3]
    dq, dk, dv = _call(
        "__cudnn$fmhaSoftmaxBackward",
        [(shape, q.dtype) for shape in ((b, n, t, size), (b, kv, s, size), (b, kv, s, size))],
        _configuration(problem, _BACKWARD),
        *(q, k, v, lse, d_out, out, *_both_lengths(problem)),
    )
    if seen is not None:
        dq = jnp.where(seen[:, :, None, None], dq, jnp.zeros((), dq.dtype))
    if problem.k_tokens.valid is not None:
        valid = problem.k_tokens.valid[:, :, None, None]
        dk, dv = (jnp.where(valid, x, jnp.zeros((), x.dtype)) for x in (dk, dv))
    h, v_size = problem.q.shape[3], problem.v.shape[3]
    return Moves(dq[..., :h], dk[..., :h], dv[..., :v_size], None)


def _padded(*arrays: Array) -> list[Array]:
    """Pad heads with zeros to one size, a multiple of 8: they add nothing to any product."""
    size = max(x.shape[3] for x in arrays)
    size += -size % _MULTIPLE
    widths = ((0, 0),) * 3
    return [
        x if x.shape[3] == size else jnp.pad(x, (*widths, (0, size - x.shape[3]))) for x in arrays
    ]


def _both_lengths(problem: Problem) -> tuple[Array, ...]:
    """Return how many queries and keys of every example there are, where the keys have a length."""
    if problem.k_tokens.valid is None:
        return ()
    b, t = problem.q.shape[:2]
    return jnp.full((b,), t, jnp.int32), _lengths(problem)


def _call(
    target: str, results: Sequence[tuple], configuration: str, *operands: Array
) -> list[Array]:
    """Make a custom call; its results of four axes, [B, N, T, H], lie as [B, T, N, H] in memory."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA finds out how much
    layouts = [
        (0, 2, 1, 3) if len(shape) == 4 else tuple(range(len(shape))) for shape, _ in results
    ]
    call = jax.ffi.ffi_call(
        target,
        [*shapes, workspace],
        output_layouts=[*layouts, (0,)],
        custom_call_api_version=2,
        legacy_backend_config=configuration,
    )
    found = call(*operands)[:-1]
    return [x.transpose(0, 2, 1, 3) if x.ndim == 4 else x for x in found]


# The products of the two passes: contracted axis and batch axes, of the left and of the right side, which
# are [B, T, N, H] and [B, S, K, H], or weights [B, N, T, S].
_Side = tuple[int, tuple[int, int]]
_FORWARD: dict[str, tuple[_Side, _Side]] = {
    "bmm1": ((3, (0, 2)), (3, (0, 2))),
    "bmm2": ((3, (0, 1)), (1, (0, 2))),
}
_BACKWARD: dict[str, tuple[_Side, _Side]] = {
    "bmm1_grad_gemm1": ((2, (0, 1)), (1, (0, 2))),
    "bmm1_grad_gemm2": ((3, (0, 1)), (1, (0, 2))),
    "bmm2_grad_gemm1": ((2, (0, 1)), (1, (0, 2))),
    "bmm2_grad_gemm2": ((3, (0, 2)), (3, (0, 2))),
}


def _configuration(problem: Problem, products: dict[str, tuple[_Side, _Side]]) -> str:
    """Return what a call says of its graph: XLA's CudnnfMHABackendConfig as JSON."""
    (b, t, n, _), s = problem.q.shape, problem.k.shape[1]
    pattern = _of(problem)
    mask = pattern.name
    if problem.k_tokens.valid is not None:
        mask = "PADDING_CAUSAL" if pattern.causal else "PADDING"
    algorithm = {
        "algo_id": "0",
        "math_type": "TENSOR_OP_MATH",
        "tuning_knobs": {"17": "1", "24": "0"},
        "is_cudnn_frontend": True,
        "workspace_size": "0",
    }
    fields: dict[str, Any] = {
        "algorithm": algorithm,
        "fmha_scale": problem.logits.scale,
        "intermediate_tensor_shape": _weights(_DTYPES[problem.q.dtype], (b, n, t, s)),
        "is_flash_attention": True,
        "mask_type": mask,
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": pattern.window,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    for name, sides in products.items():
        numbers: dict[str, list[str]] = {}
        for side, (contracted, batch) in zip(("lhs", "rhs"), sides):
            numbers[f"{side}_contracting_dimensions"] = [str(contracted)]
            numbers[f"{side}_batch_dimensions"] = [str(axis) for axis in batch]
        fields[f"{name}_dot_dimension_numbers"] = numbers
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": fields})


def _weights(element: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the shape of the weights, which are never there, as XLA writes shapes."""
    layout = {
        "dim_level_types": [],
        "dim_unique": [],
        "dim_ordered": [],
        "minor_to_major": ["3", "2", "1", "0"],
        "tiles": [],
        "element_size_in_bits": "0",
        "memory_space": "0",
        "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
        "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
        "dynamic_shape_metadata_prefix_bytes": "0",
    }
    return {
        "element_type": element,
        "dimensions": [str(size) for size in shape],
        "tuple_shapes": [],
        "layout": layout,
        "is_dynamic_dimension": [False] * 4,
    }
