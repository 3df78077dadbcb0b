"""The two passes: their operands, the launch of their kernels, and what is left to do outside.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from mha_jax.attention import hidden, softmax
from mha_jax.attention.call import Moves, Output, Problem, State
from mha_jax.attention.hidden import Rows
from mha_jax.backends.mosaic_gpu import kernels
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
    """Return the cotangents of q, k and v."""
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

    def run(name, body, side, **operands):
        planned, beside = plan(problem, side, 64, _STEPS, extra)
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
    dk, dv = run(
        "attention_backward_keys",
        kernels.backward_keys,
        "k",
        rows={"k": k, "v": v},
        streams={"q": q, "d_out": d_out},
        outputs={
            "dk": jax.ShapeDtypeStruct(k.shape, k.dtype),
            "dv": jax.ShapeDtypeStruct(v.shape, v.dtype),
        },
        grid=(kv, whole(s) // WHOLE, b),
    )
    return Moves(
        dq[:, :t, :, :h].astype(given.q.dtype),
        dk[:, :s, :, :h].astype(given.k.dtype),
        dv[:, :s, :, :v_size].astype(given.v.dtype),
        None,
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
            scratch[f"{name}.tile"] = plgpu.SMEM((plan.steps, plan.columns), dtype)
        scratch["rows.ready"] = plgpu.Barrier(num_arrivals=len(rows), num_barriers=WARPGROUPS)
        copies = {group: len(names) for group, names in plan.passing.items()}
        copies |= dict.fromkeys(streams, 1)
        for group, count in copies.items():
            scratch[f"{group}.ready"] = plgpu.Barrier(num_arrivals=count, num_barriers=plan.steps)
            scratch[f"{group}.free"] = plgpu.Barrier(
                num_arrivals=WARPGROUPS, num_barriers=plan.steps
            )
        names = (*arrays, *outputs, *scratch)
        products = TensorCores() if self.interpret is None else Plain()

        def kernel(*refs):
            named = dict(zip(names, refs, strict=True))
            sweep = kernels.Sweep(plan, named, tuple(rows), tuple(streams), takes)
            self.body(sweep, products)

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
            scratch[f"{name}.tile"] = _matrix((WARPGROUPS, ROWS, x.shape[3]), x.dtype)
        for name, x in streams.items():
            scratch[f"{name}.tile"] = _matrix(
                (self.plan.steps, self.plan.columns, x.shape[3]), x.dtype
            )
        for name, x in outputs.items():
            takes[name] = _TAKES.get(name, name)
            if name == "out" and x.shape[3] == rows["q"].shape[3]:
                takes[name] = "q"
            if len(x.shape) == 3:
                scratch[f"{name}.tile"] = plgpu.SMEM((WARPGROUPS, ROWS), x.dtype)
            elif takes[name] == name:
                scratch[f"{name}.tile"] = _matrix((WARPGROUPS, ROWS, x.shape[3]), x.dtype)
        return takes, scratch


def _matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return memory whose lines are turned so that the tensor cores read them at full speed."""
    bytes_ = min(_SWIZZLE, shape[-1] * jnp.dtype(dtype).itemsize)
    tile = (8, bytes_ // jnp.dtype(dtype).itemsize)
    transforms = plgpu.TilingTransform(tile), plgpu.SwizzleTransform(bytes_)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
