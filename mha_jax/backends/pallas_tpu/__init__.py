"""Attention as one Mosaic kernel forward and one backward, with every feature of a call.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size

Lengths are padded to whole tiles, and only where they do not fit; padding changes no bit of the result.
Nothing of T x S bytes is ever made.

Source: Dao 2023, arXiv:2307.08691; Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mha_jax.attention.call import Call, Gradients, Output
from mha_jax.backends.pallas_tpu import kernels
from mha_jax.backends.pallas_tpu.operands import Plan, Stream, make_plan, pad_to
from mha_jax.backends.pallas_tpu.order import LANES, Blocks, Geometry, geometry, visited_pairs
from mha_jax.backends.pallas_tpu.view import LOG2E, View
from mha_jax.types import Array

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one kind of TPU core is given.

    Args:
      forward, backward: Tiles of the two passes: the first fit every call; others are taken where the
        mask does not depend on data and the pairs that they visit, times their cost, are fewer.
      vmem: Bytes of VMEM that a kernel may use.
      resident: Bytes of the columns held at once: keys and values, or queries and their cotangents.
      standing: Bytes of the rows held at once, with what is computed for them.
      dropout_sweep: Heights of the parts of a full tile with dropout, if others than without.
    """

    forward: tuple[Blocks, ...]
    backward: tuple[Blocks, ...]
    vmem: int
    resident: int
    standing: int
    dropout_sweep: tuple[int, ...] = ()

    def lay(self, call: Call, still: str, writes_slab: bool = False) -> Geometry:
        """Lay tiles over a call: queries stay still in the forward pass, keys in the backward pass.

        Columns and rows are held as many at once as their bytes allow.
        """
        forward = still == "q" and not writes_slab
        choices = self.forward if forward else self.backward
        token = (call.q.shape[-1] + call.v.shape[-1]) * call.q.dtype.itemsize * 2
        shape = (call.q.shape[1], call.k.shape[1])
        dense = [a for a in (*jax.tree.leaves(call.mask), call.bias) if a is not None]
        slabs = sum(a.dtype.itemsize for a in dense if a.shape[2:] == shape)
        if slabs or writes_slab or call.q.dtype.itemsize > 2:
            choices = choices[:1]
        column = token + choices[0].rows * 2 * (slabs + 4 * writes_slab)
        resident = self.resident // column // LANES * LANES
        # Backward, a row of k and v brings float32 sums in and out.
        standing = 0 if slabs or writes_slab else self.standing // (token if forward else 5 * token)

        def laid(blocks: Blocks) -> Geometry:
            most = max(min(blocks.resident, resident), blocks.columns)
            blocks = dataclasses.replace(blocks, resident=most, standing=standing)
            if call.q.dtype.itemsize > 2:
                # A float32 product is six of bfloat16: one tile at a time keeps the program small.
                blocks = dataclasses.replace(blocks, full=(1,), sweep=())
            elif forward and call.dropout is not None and self.dropout_sweep:
                blocks = dataclasses.replace(blocks, sweep=self.dropout_sweep)
            return geometry(call, still, blocks)

        first, *others = choices
        pairs = visited_pairs(call, laid(first)) if others else None
        if pairs is None:  # there is nothing to choose from, or only the data know
            return laid(first)

        def cost(blocks: Blocks) -> float:
            return visited_pairs(call, laid(blocks)) * blocks.cost  # type: ignore[operator]

        return laid(min(choices, key=cost))


def _medium(forward: tuple[Blocks, ...], backward: tuple[Blocks, ...], **options: Any) -> Sizes:
    memory = {"vmem": 56 * MIB, "resident": 12 * MIB, "standing": 12 * MIB}
    return Sizes(forward, backward, **memory, **options)


def _large(forward: tuple[Blocks, ...], backward: tuple[Blocks, ...], **options: Any) -> Sizes:
    memory = {"vmem": 100 * MIB, "resident": 24 * MIB, "standing": 24 * MIB}
    return Sizes(forward, backward, **memory, **options)


# By device kind, chosen by thousands of bundles for B 1, N 1, T 4096, H 128, bfloat16 (python -m
# benchmarks tpu), by the rows of a tile and the heights of the parts of a full one, 2048 columns wide.
# The compiler's schedules jump by a few per cent with nothing to explain it: heights are found by trying.
#
#     rows   heights          v5e: full causal window dropout      v6e: full causal window dropout
#     512    512                   64.6   37.8   22.6    99.3            44.5   29.3   19.7    83.6
#     1024   1024                  65.2   36.5   20.9    98.7            41.1   23.8   14.8    81.4
#     1024   512, 512              64.6   35.3   20.9    94.5            38.7   22.7   14.8    77.9
#     1024   256 each              65.8   36.4   20.9    90.8            41.4   23.7   14.8    81.8
#     1024   256, 320, 256, 192                          89.6
#     1024   192, 512, 320                                                                    76.0
#
#     backward                v5e: full causal                     v6e: full causal
#     512    512                  141.8   81.3                           88.3   50.7
#     1024   1024                 147.9   81.9                           85.9   49.0
_SHORT = Blocks(512, 512, full=(4, 1))
_TALL = Blocks(1024, 1024, full=(2, 1), sweep=(512, 512), cost=0.93)
_TALL_BACKWARD = Blocks(1024, 1024, full=(2, 1), cost=0.97)
_V4 = Blocks(512, 512, full=(2, 1)), Blocks(256, 512)
SIZES = {
    "v4": Sizes(_V4[:1], _V4[1:], vmem=16 * MIB, resident=3 * MIB, standing=MIB),
    "v5e": _large((_SHORT, _TALL), (_SHORT,), dropout_sweep=(256, 320, 256, 192)),
    "v5p": _medium((_SHORT, _TALL), (_SHORT,), dropout_sweep=(256, 320, 256, 192)),
    "v6e": _large((_SHORT, _TALL), (_SHORT, _TALL_BACKWARD), dropout_sweep=(192, 512, 320)),
    "tpu7x": _medium((_SHORT, _TALL), (_SHORT, _TALL_BACKWARD), dropout_sweep=(192, 512, 320)),
}
# The smallest core: what a program is compiled for when nothing says which TPU will run it.
ANY = "v4"
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class PallasTPU:
    """Attention on TPU.

    Args:
      sizes: Sizes of the tiles and of what is held; by the device kind of this process if None, and
        what fits every TPU when it has none.
      interpret: True or `pltpu.InterpretParams()` runs the kernels on any platform, slowly: for tests.
    """

    sizes: Sizes | None = None
    interpret: Any = False

    plain_autodiff: ClassVar[bool] = False

    @property
    def chosen(self) -> Sizes:
        """The sizes in use."""
        if self.sizes is not None:
            return self.sizes
        return SIZES[_KINDS.get(jax.devices()[0].device_kind, ANY)]

    def why_not(self, call: Call, platform: str) -> str | None:
        if platform != "tpu" and not self.interpret:
            return f"it needs a TPU; this program is for {platform}"
        if call.q.dtype == jnp.float64:
            return "TPUs have no float64; cast q, k and v to float32 or bfloat16"
        return None

    def forward(self, call: Call) -> Output:
        return _forward(self, call)

    def cotangent(self, call: Call, output: Output, cotangent: Output) -> Gradients:
        """Return the cotangents of q, k, v and bias."""
        return _cotangent(self, call, output, cotangent)


# ---- forward -----------------------------------------------------------------------------------


def _forward(backend: PallasTPU, call: Call) -> Output:
    dtype = call.v.dtype
    call = _computable(call)
    g = backend.chosen.lay(call, "q")
    plan, streams = make_plan(call, g)
    size_v = call.v.shape[-1]
    inputs = {
        "q": _still(g, call.q, 1),
        "k": _moving(g, call.k, g.groups, _source(plan)),
        "v": _moving(g, call.v, g.groups, _source(plan)),
        **streams,
    }
    outputs = {
        "out": _still_output(g, size_v, dtype),
        "lse": _vector_output(g),
    }
    scratch = {
        "m": ((g.rows, LANES), jnp.float32),
        "l": ((g.rows, LANES), jnp.float32),
        "acc": ((g.rows, size_v), jnp.float32),
    }
    run = _Kernel("attention_forward", kernels.forward, plan, g.chunks, _precision(call))
    out, lse = run(backend, inputs, outputs, scratch, 0)
    t = g.lengths[0]
    return Output(out[:, :, :t].swapaxes(1, 2), lse[:, :, 0, :t])


# ---- backward ----------------------------------------------------------------------------------


def _cotangent(backend: PallasTPU, call: Call, output: Output, cotangent: Output) -> Gradients:
    given, call = call, _computable(call)
    d_out = cotangent.out.astype(call.v.dtype)
    delta = jnp.sum(cotangent.out.astype(jnp.float32) * output.out.astype(jnp.float32), -1)
    unseen = output.lse == -jnp.inf
    extra = {
        "lse2": jnp.where(unseen, jnp.inf, output.lse * LOG2E),
        "delta": delta.swapaxes(1, 2) - cotangent.lse,
    }
    dq, dk, dv, d_bias = _backward(backend, call, given.q.dtype, d_out, extra)
    if given.bias is not None:
        if d_bias is None:
            d_bias = _dense_bias_gradient(backend, call, d_out, extra)
        d_bias = d_bias.astype(given.bias.dtype)
    return Gradients(
        dq.astype(given.q.dtype),
        dk.astype(given.k.dtype),
        dv.astype(given.v.dtype),
        d_bias,
    )


def _backward(
    backend: PallasTPU, call: Call, dtype: Any, d_out: Array, extra: dict[str, Array]
) -> tuple[Array, Array, Array, Array | None]:
    """Return dq, dk, dv, and the gradient of a bias that is O(T + S)."""
    g = backend.chosen.lay(call, "k")
    plan, streams = make_plan(call, g, extra)
    size_h, size_v = call.q.shape[-1], call.v.shape[-1]
    t, s = g.lengths
    inputs = {
        "q": _moving(g, call.q, 1, _chunk),
        "k": _still(g, call.k, g.groups),
        "v": _still(g, call.v, g.groups),
        "d_out": _moving(g, d_out, 1, _chunk),
        **streams,
    }
    alone = g.chunks == 1 and g.groups == 1
    outputs = {
        "dq": _resident_output(g, size_h, dtype),
        "dk": _still_output(g, size_h, dtype if alone else jnp.float32),
        "dv": _still_output(g, size_v, dtype if alone else jnp.float32),
    }
    scratch = {
        "dq_sum": ((g.chunk, size_h), jnp.float32),
        "dk_sum": ((g.rows, size_h), jnp.float32),
        "dv_sum": ((g.rows, size_v), jnp.float32),
    }
    bias_side = plan.vectors.get("bias")
    if bias_side is not None:
        outputs["d_bias"] = _vector_output(g) if bias_side == "k" else _resident_vector(g)
    if bias_side == "k":
        scratch["d_bias_sum"] = ((g.rows, LANES), jnp.float32)
    run = _Kernel("attention_backward", kernels.backward, plan, 1, _precision(call))
    if g.chunks == 1:
        dq, dk, dv, *rest = run(backend, inputs, outputs, scratch, 0)
    else:
        dq, dk, dv, *rest = _by_chunk(run, backend, call, g, inputs, outputs, scratch)
    if g.groups > 1:
        dk, dv = (x.reshape(g.batch, -1, g.groups, *x.shape[2:]).sum(2) for x in (dk, dv))
    d_bias = None
    if rest:
        line = rest[0][:, :, 0]
        line = line[:, :, :s] if bias_side == "k" else line[:, :, :t]
        dense = line[:, :, None, :] if bias_side == "k" else line[:, :, :, None]
        d_bias = _reduce_to(dense, call.bias.shape)  # type: ignore[union-attr]
    back = (dq[:, :, :t], dk[:, :, :s], dv[:, :, :s])
    return *(x.swapaxes(1, 2) for x in back), d_bias  # type: ignore[return-value]


def _by_chunk(run, backend, call, g, inputs, outputs, scratch):
    """Go through the queries chunk by chunk where not all of them fit into VMEM."""
    sums = {name: jnp.zeros(outputs[name][0].shape, jnp.float32) for name in ("dk", "dv")}

    def step(sums, chunk):
        spec = {name: outputs[name][1] for name in sums}
        before = {f"{name}_before": Stream(x, spec[name]) for name, x in sums.items()}
        dq, dk, dv, *rest = run(backend, {**inputs, **before}, outputs, scratch, chunk)
        return {"dk": dk, "dv": dv}, (dq, *rest)

    sums, (dq, *rest) = lax.scan(step, sums, jnp.arange(g.chunks, dtype=jnp.int32))
    dq = jnp.moveaxis(dq, 0, 2).reshape(g.batch, g.heads, -1, dq.shape[-1])
    share = 1.0 if call.dropout is None else 1 / (1 - call.dropout.rate)
    if rest and rest[0].shape[-1] == g.chunk and _bias_side(call) == "q":
        rest = [jnp.moveaxis(rest[0], 0, 3).reshape(g.batch, g.heads, 1, -1)]
    elif rest:
        rest = [rest[0].sum(0)]
    return dq, sums["dk"] * call.scale, sums["dv"] * share, *rest


def _bias_side(call: Call) -> str:
    return "k" if call.bias.shape[3] > 1 else "q"  # type: ignore[union-attr]


def _dense_bias_gradient(
    backend: PallasTPU, call: Call, d_out: Array, extra: dict[str, Array]
) -> Array:
    """Return the gradient of a bias that is itself T x S."""
    g = backend.chosen.lay(call, "q", writes_slab=True)
    plan, streams = make_plan(call, g, extra)
    inputs = {
        "q": _still(g, call.q, 1),
        "k": _moving(g, call.k, g.groups, _chunk),
        "v": _moving(g, call.v, g.groups, _chunk),
        "d_out": _still(g, d_out, 1),
        **streams,
    }
    shape = (g.batch, g.heads, g.padded["q"], g.padded["k"])
    block = pl.BlockSpec((None, None, g.rows, g.chunk), lambda b, n, r, m, *_: (b, n, r, m))
    outputs = {"d_bias": (jax.ShapeDtypeStruct(shape, jnp.float32), block)}
    run = _Kernel("attention_bias", kernels.bias_gradient, plan, g.chunks, _precision(call))
    (d_logits,) = run(backend, inputs, outputs, {}, 0)
    t, s = g.lengths
    return _reduce_to(d_logits[:, :, :t, :s], call.bias.shape)  # type: ignore[union-attr]


def _reduce_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that broadcast."""
    axes = tuple(axis for axis, (have, want) in enumerate(zip(x.shape, shape)) if have != want)
    return jnp.sum(x, axes, keepdims=True)


# ---- operands ----------------------------------------------------------------------------------


def _computable(call: Call) -> Call:
    """Return a call that the kernels can compute: float16 is widened, exactly."""
    if call.q.dtype != jnp.float16:
        return call
    wide = {name: getattr(call, name).astype(jnp.float32) for name in "qkv"}
    bias = call.bias
    if bias is not None and bias.dtype == jnp.float16:
        wide["bias"] = bias.astype(jnp.float32)
    return dataclasses.replace(call, **wide)


def _precision(call: Call) -> Any:
    """Return the products' precision: float32 means float32 unless the call says otherwise."""
    if call.q.dtype == jnp.bfloat16:
        return None
    asked = call.precision
    asked = asked[0] if isinstance(asked, tuple) else asked
    fast = asked in (lax.Precision.DEFAULT, "default", "fastest", "bfloat16")
    return lax.Precision.DEFAULT if fast else lax.Precision.HIGHEST


def _heads_first(x: Array, length: int) -> Array:
    return pad_to(x.swapaxes(1, 2), 2, length)


def _still(g: Geometry, x: Array, groups: int) -> Stream:
    """Stream [B, L, N, H] block of rows by block of rows."""
    x = _heads_first(x, g.rows * g.row_blocks)
    block = (None, None, g.rows * g.blocks, x.shape[-1])
    return Stream(x, pl.BlockSpec(block, lambda b, n, r, m, *_: (b, _shared(n, groups), r, 0)))


def _moving(g: Geometry, x: Array, groups: int, chunk: Callable) -> Stream:
    """Stream [B, L, N, H] chunk by chunk."""
    x = _heads_first(x, g.chunk * g.chunks)
    block = (None, None, g.chunk, x.shape[-1])

    def index(b, n, r, m, *prefetched):
        return b, _shared(n, groups), chunk(b, n, r, m, *prefetched), 0

    return Stream(x, pl.BlockSpec(block, index))


def _shared(n: Any, groups: int) -> Any:
    """Return the key-value head of a query head."""
    return n if groups == 1 else lax.div(n, groups)


def _chunk(b: Any, n: Any, r: Any, m: Any, at: Any, *_: Any) -> Any:
    return at[0] + m


def _source(plan: Plan) -> Callable:
    """Return the index map that stays where it is when a chunk has no tiles."""
    g, order = plan.geometry, plan.order
    if g.chunks == 1:
        return _chunk

    def index(b, n, r, m, at, table, source):
        return source[(order.group(b, n) * g.row_blocks + r) * g.chunks + m]

    return index


def _still_output(g: Geometry, size: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, g.rows * g.row_blocks, size)
    block = (None, None, g.rows * g.blocks, size)
    return jax.ShapeDtypeStruct(shape, dtype), pl.BlockSpec(
        block, lambda b, n, r, m, *_: (b, n, r, 0)
    )


def _vector_output(g: Geometry) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, 1, g.rows * g.row_blocks)
    spec = pl.BlockSpec((None, None, 1, g.rows * g.blocks), lambda b, n, r, m, *_: (b, n, 0, r))
    return jax.ShapeDtypeStruct(shape, jnp.float32), spec


def _resident_output(
    g: Geometry, size: int, dtype: Any
) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, g.chunk, size)
    spec = pl.BlockSpec((None, None, g.chunk, size), lambda b, n, r, m, *_: (b, n, 0, 0))
    return jax.ShapeDtypeStruct(shape, dtype), spec


def _resident_vector(g: Geometry) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, 1, g.chunk)
    spec = pl.BlockSpec((None, None, 1, g.chunk), lambda b, n, r, m, *_: (b, n, 0, 0))
    return jax.ShapeDtypeStruct(shape, jnp.float32), spec


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel with its plan, ready to be given operands by name."""

    name: str
    body: Callable[[View, Any], None]
    plan: Plan
    chunks: int
    precision: Any

    def __call__(
        self,
        backend: PallasTPU,
        inputs: dict[str, Stream],
        outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        scratch: dict[str, tuple[tuple[int, ...], Any]],
        chunk: Array | int,
    ) -> list[Array]:
        """Run the kernel from column chunk `chunk` on."""
        g, order = self.plan.geometry, self.plan.order
        columns = {
            f"{name}.column": ((g.rows, LANES), inputs[name].array.dtype)
            for name in self.plan.still_vectors
        }
        scratch = {**scratch, **columns}
        names = ("at", "table", "source", *inputs, *outputs, *scratch)
        plan = dataclasses.replace(self.plan, order=order._replace(table=None, source=None))

        def kernel(*refs):
            self.body(View(plan, dict(zip(names, refs))), self.precision)

        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(g.batch, g.heads, g.steps, self.chunks),
            in_specs=[stream.spec for stream in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        )
        call = pl.pallas_call(
            kernel,
            out_shape=[shape for shape, _ in outputs.values()],
            grid_spec=spec,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=backend.chosen.vmem,
            ),
            interpret=backend.interpret,
            name=self.name,
        )
        at = jnp.asarray(chunk, jnp.int32).reshape(1)
        prefetched = (at, jnp.asarray(order.table), jnp.asarray(order.source))
        return call(*prefetched, *(stream.array for stream in inputs.values()))
