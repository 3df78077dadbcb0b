"""The two passes: their operands, the launch of their kernels, and what is left to do outside.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from mha_jax.attention import hidden, softmax
from mha_jax.attention.call import Moves, Output, Problem, State, moving
from mha_jax.attention.hidden import Rows
from mha_jax.backends.mosaic_gpu import kernels, rules, sums
from mha_jax.backends.mosaic_gpu.operands import (
    ROWS,
    WARPGROUPS,
    WHOLE,
    Operands,
    Plan,
    contains,
    pad,
    plan,
    unit,
    whole,
)
from mha_jax.backends.mosaic_gpu.products import Plain, TensorCores
from mha_jax.types import Array

# Bytes of a line of shared memory that the copies can turn for the tensor cores.
_SWIZZLE = 128
_STEPS = 2
# Columns of a tile of a backward kernel, and of one whose heads are larger than _BOTH: there a sum takes half
# of the registers, so that keys and values have a kernel each.
_COLUMNS, _FEW, _BOTH = 64, 32, 128


def forward(problem: Problem, interpret: Any) -> State:
    """Attend; return the output and every row's (m, l)."""
    if contains(problem):
        problem = hidden.forward(problem)
    b, t, n, _ = problem.q.shape
    q, k, v = (_operand(x) for x in (problem.q, problem.k, problem.v))
    columns = 128 if max(q.shape[3], v.shape[3]) <= 128 else 64
    planned, operands = plan(problem, "q", columns, _STEPS, {})
    line = jax.ShapeDtypeStruct((b, n, whole(t)), jnp.float32)
    kernel = _Kernel("attention_forward", kernels.forward, planned, operands, interpret)
    out, m, l = kernel(
        rows={"q": q},
        streams={"k": k, "v": v},
        outputs={
            "out": jax.ShapeDtypeStruct((b, whole(t), n, v.shape[3]), v.dtype),
            "m": line,
            "l": line,
        },
        grid=(n, whole(t) // WHOLE, b),
    )
    m, l = m[:, :, :t], l[:, :, :t]
    m = jnp.where(l != 0, m * (1 / planned.unit), -jnp.inf)
    return State(out[:, :t, :, : problem.v.shape[3]], m, l)


def cotangent(problem: Problem, state: State, cotangent: Output, interpret: Any) -> Moves:
    """Return the cotangents of q, k, v and biases."""
    given, hides = problem, contains(problem)
    if hides:
        problem = hidden.cleaned(problem)
    d_out, out = (x.astype(jnp.float32).swapaxes(1, 2) for x in (cotangent.out, state.out))
    shift, ratio = softmax.shift(state.m, state.l)
    # A NaN of q tells itself by the shift: a product of what nobody sees shall be finite.
    nothing = jnp.zeros((*shift.shape, 1), jnp.float32)
    rows = hidden.rows(Rows(nothing, d_out, shift, cotangent.lse), out, state.l, ratio, hides)
    q = problem.q
    if hides:
        q = jnp.where(jnp.isfinite(q), q, jnp.zeros((), q.dtype))
    biased = problem.bias is not None or problem.bias_rule is not None
    extra = {"shift": rows.shift * unit(biased) + rows.q[..., 0], "delta": rows.delta}
    d_out = rows.d_out.swapaxes(1, 2).astype(problem.v.dtype)
    (b, t, n, h), (s, kv, v_size) = problem.q.shape, problem.v.shape[1:]
    q, k, v, d_out = (_operand(x) for x in (q, problem.k, problem.v, d_out))

    large = max(q.shape[3], v.shape[3]) > _BOTH

    def run(name, body, side, **operands):
        planned, beside = plan(problem, side, _FEW if large else _COLUMNS, _STEPS, extra)
        return _Kernel(name, body, planned, beside, interpret)(**operands)

    (dq,) = run(
        "attention_backward_queries",
        kernels.backward_queries,
        "q",
        rows={"q": q, "d_out": d_out},
        streams={"k": k, "v": v},
        outputs={"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        grid=(n, whole(t) // WHOLE, b),
    )

    def of_keys(name, rows, *outputs):
        return run(
            name,
            kernels.backward_keys,
            "k",
            rows=rows,
            streams={"q": q, "d_out": d_out},
            outputs={f"d{x}": jax.ShapeDtypeStruct(y.shape, y.dtype) for x, y in outputs},
            grid=(kv, whole(s) // WHOLE, b),
        )

    if large:
        (dk,) = of_keys("attention_backward_keys", {"k": k, "v": v}, ("k", k))
        (dv,) = of_keys("attention_backward_values", {"k": k}, ("v", v))
    else:
        dk, dv = of_keys("attention_backward_keys", {"k": k, "v": v}, ("k", k), ("v", v))

    def of_bias(name, summed):
        outer, tiles = summed.outer, summed.shape
        shape = *outer, tiles[0] * WHOLE, tiles[1] * _COLUMNS
        steps = 1 if large else _STEPS  # rows pass by, too
        planned, beside = plan(problem, "q", _COLUMNS, steps, extra, summed)
        (found,) = _Kernel(name, kernels.backward_bias, planned, beside, interpret)(
            rows={},
            streams={"q": q, "k": k, "d_out": d_out, "v": v},
            outputs={"d_bias": jax.ShapeDtypeStruct(shape, jnp.float32)},
            grid=(outer[1], tiles[0] * tiles[1], outer[0]),
        )
        return found

    asked, tile = moving(given), (WHOLE, _COLUMNS)
    d_bias, d_rule = None, asked.bias_rule
    if asked.bias is not None:
        summed = sums.of_array(given, asked.bias.shape, *tile)
        d_bias = sums.shared(of_bias("attention_backward_bias", summed), asked.bias)
    if jax.tree.leaves(asked.bias_rule):
        tiles = of_bias("attention_backward_distances", sums.of_distances(given, *tile))
        d_rule = rules.pulled(given, asked, sums.along(tiles[0], whole(t), t, t + s - 1))
    return Moves(
        dq[:, :t, :, :h].astype(given.q.dtype),
        dk[:, :s, :, :h].astype(given.k.dtype),
        dv[:, :s, :, :v_size].astype(given.v.dtype),
        d_bias,
        d_rule,
    )


def _operand(x: Array) -> Array:
    """Pad [B, L, heads, H] to whole tiles; zeros add nothing to any product."""
    size = x.shape[3]
    size = 32 if size <= 32 else size + -size % 64
    return pad(pad(x, 3, size), 1, whole(x.shape[1]))


# ---- the launch -------------------------------------------------------------------------------------

# Who lies in whose memory when the rows are not needed any more.
_TAKES = {"dq": "q", "dk": "k", "dv": "v"}


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel with its plan, ready to be given operands by name."""

    name: str
    body: Callable
    plan: Plan
    operands: Operands
    interpret: Any

    def __call__(
        self,
        rows: dict[str, Array],
        streams: dict[str, Array],
        outputs: dict[str, jax.ShapeDtypeStruct],
        grid: tuple[int, int, int],
    ) -> list[Array]:
        plan, operands = self.plan, self.operands
        arrays = {
            **rows,
            **streams,
            "table": operands.table,
            **operands.vectors,
            **operands.slabs,
        }
        takes, scratch = self._tiles(rows, streams, outputs)
        for name in itertools.chain(*plan.passing.values()):
            dtype = operands.vectors[name].dtype
            scratch[f"{name}.tile"] = plgpu.SMEM((plan.steps, *plan.room(name)), dtype)
        if rows:
            scratch["rows.ready"] = plgpu.Barrier(num_arrivals=len(rows), num_barriers=WARPGROUPS)
        if plan.summed is not None:
            scratch["turn"] = plgpu.Barrier(num_arrivals=1)
        for group, passing in (plan.passing | {name: (name,) for name in streams}).items():
            count = sum(math.prod(plan.room(name)[:-1]) for name in passing)
            scratch[f"{group}.ready"] = plgpu.Barrier(num_arrivals=count, num_barriers=plan.steps)
            scratch[f"{group}.free"] = plgpu.Barrier(
                num_arrivals=WARPGROUPS, num_barriers=plan.steps
            )
        names = (*arrays, *outputs, *scratch)
        products = TensorCores() if self.interpret is None else Plain()

        def kernel(*refs):
            named = dict(zip(names, refs, strict=True))
            sweep = kernels.Sweep if plan.summed is None else kernels.Sum
            self.body(sweep(plan, named, tuple(rows), tuple(streams), takes), products)

        kernel.__name__ = self.name
        launch = plgpu.kernel(
            kernel,
            out_type=list(outputs.values()),
            scratch_types=list(scratch.values()),
            grid=grid,
            grid_names=("head", "block", "example"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=self.interpret,
        )
        with jax.named_scope(self.name):
            return launch(*arrays.values())

    def _tiles(self, rows, streams, outputs) -> tuple[dict[str, str], dict[str, Any]]:
        """Return whose memory the outputs take, and the memory of rows and streams."""
        takes, scratch = {}, {}
        for name, x in rows.items():
            scratch[f"{name}.tile"] = self._matrix((WARPGROUPS, ROWS, x.shape[3]), x.dtype)
        for name, x in streams.items():
            shape = self.plan.steps, *self.plan.room(name), x.shape[3]
            scratch[f"{name}.tile"] = self._matrix(shape, x.dtype)
        for name, x in outputs.items():
            takes[name] = taken if (taken := _TAKES.get(name)) in rows else name
            if self.plan.summed is not None:
                scratch[f"{name}.tile"] = self._matrix((ROWS, self.plan.columns), x.dtype)
                continue
            if name == "out" and x.shape[3] == rows["q"].shape[3]:
                takes[name] = "q"
            if len(x.shape) == 3:
                scratch[f"{name}.tile"] = plgpu.SMEM((WARPGROUPS, ROWS), x.dtype)
            elif takes[name] == name:
                scratch[f"{name}.tile"] = self._matrix((WARPGROUPS, ROWS, x.shape[3]), x.dtype)
        return takes, scratch

    def _matrix(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return memory whose lines are turned so that the tensor cores read them at full speed."""
        size = jnp.dtype(dtype).itemsize
        # A product takes whole turns of the columns that it sums over.
        bytes_ = min(_SWIZZLE, shape[-1] * size, self.plan.columns * size)
        transforms = plgpu.TilingTransform((8, bytes_ // size)), plgpu.SwizzleTransform(bytes_)
        return plgpu.SMEM(shape, dtype, transforms=transforms)
