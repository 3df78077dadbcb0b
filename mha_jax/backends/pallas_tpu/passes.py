"""The two passes: their operands, the launch of their kernels, and what is left to do outside.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mha_jax.attention import hidden, softmax
from mha_jax.attention.biases import floats
from mha_jax.attention.call import Moves, Output, Problem, State, moving
from mha_jax.attention.hidden import Rows
from mha_jax.backends.pallas_tpu import kernels, rules
from mha_jax.backends.pallas_tpu import operands as ops
from mha_jax.backends.pallas_tpu.operands import Plan, Stream, contains, folds, make_plan
from mha_jax.backends.pallas_tpu.patterns import LANES
from mha_jax.backends.pallas_tpu.sizes import Tuning
from mha_jax.backends.pallas_tpu.view import View
from mha_jax.types import Array


def forward(tuning: Tuning, problem: Problem) -> State:
    """Attend; return the output and every row's (m, l)."""
    dtype = problem.v.dtype
    problem = _computable(problem)
    if problem.bias_rule is not None and rules.is_line(problem):
        line = rules.written_out(problem)(problem.bias, rules.numbers(problem.bias_rule))
        problem = dataclasses.replace(problem, bias=line, bias_rule=None)
    if contains(problem):
        problem = hidden.forward(problem)
    g = tuning.sizes.lay(problem, "q")
    plan, streams = make_plan(problem, g)
    size_v = problem.v.shape[-1]
    inputs = {
        "q": ops.outer_stream(g, problem.q, 1),
        "k": ops.inner_stream(g, problem.k, g.groups, ops.source(plan)),
        "v": ops.inner_stream(g, problem.v, g.groups, ops.source(plan)),
        **streams,
    }
    outputs = {
        "out": ops.outer_output(g, size_v, dtype),
        "m": ops.vector_output(g),
        "l": ops.vector_output(g),
    }
    scratch = {
        "m_sum": ((g.rows, LANES), jnp.float32),
        "l_sum": ((g.rows, LANES), jnp.float32),
        "acc": ((g.rows, size_v), jnp.float32),
    }
    run = _Kernel("attention_forward", kernels.forward, plan, g.chunks, _precision(problem))
    out, m, l = run(tuning, inputs, outputs, scratch, 0)
    t = g.lengths[0]
    m, l = m[:, :, 0, :t], l[:, :, 0, :t]
    if (scale := _folded_scale(plan)) != 1:
        # The kernel's m is before the scale; l shall belong to m scaled and rounded.
        m, rest = _product(softmax.finite(m), scale)
        m, l = jnp.where(l != 0, m, -jnp.inf), l * jnp.exp(rest)
    return State(out[:, :, :t].swapaxes(1, 2), m, l)


def _folded_scale(plan: Plan) -> float:
    """Return what turns the kernel's own logits into logits."""
    return plan.rules.scale if folds(plan) else 1.0


def _product(x: Array, number: float) -> tuple[Array, Array]:
    """Return x * number rounded, and what rounding lost: their sum is the product, exactly.

    Source: Dekker 1971, "A floating-point technique for extending the available precision", sec. 5; halves
    are cut off by their bits, so that no compiler can reassociate them away.
    """
    factor = jnp.asarray(number, jnp.float32)
    product = x * factor
    x_high, factor_high = _upper_half(x), _upper_half(factor)
    x_low, factor_low = x - x_high, factor - factor_high
    rest = x_high * factor_high - product
    rest = rest + x_high * factor_low + x_low * factor_high
    return product, rest + x_low * factor_low


def _upper_half(x: Array) -> Array:
    """Return a float32 with the lower 12 bits of its significand cut off."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
    return lax.bitcast_convert_type(bits, jnp.float32)


# ---- backward ----------------------------------------------------------------------------------


def cotangent(tuning: Tuning, problem: Problem, state: State, cotangent: Output) -> Moves:
    """Return the cotangents of q, k, v, bias and the floats of its rule."""
    if problem.bias_rule is not None and rules.is_line(problem):
        return _with_line(tuning, problem, state, cotangent)
    given, asked, problem = problem, moving(problem), _computable(problem)
    d_out, out = (x.astype(jnp.float32).swapaxes(1, 2) for x in (cotangent.out, state.out))
    shift, ratio = _shift(problem, state)
    rows = Rows(problem.q.swapaxes(1, 2), d_out, shift, cotangent.lse)
    rows = hidden.rows(rows, out, state.l, None, contains(problem))
    # The kernels multiply d_out by it; a row of NaN says so in what `hidden.rows` returns.
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 1)
    extra = {"shift": rows.shift, "ratio": ratio, "delta": rows.delta * ratio}
    d_out = rows.d_out.swapaxes(1, 2).astype(problem.v.dtype)
    seen = hidden.cleaned(problem) if contains(problem) else problem
    problem = dataclasses.replace(seen, q=rows.q.swapaxes(1, 2))
    dq, dk, dv, d_bias, d_rule = _backward(tuning, problem, given.q.dtype, d_out, extra)
    if asked.bias is not None:
        if d_bias is None:
            d_bias = _dense_bias_gradient(tuning, problem, d_out, extra)
        d_bias = d_bias.astype(asked.bias.dtype)
    return Moves(
        dq.astype(given.q.dtype),
        dk.astype(given.k.dtype),
        dv.astype(given.v.dtype),
        d_bias,
        _like(asked.bias_rule, d_rule),
    )


def _with_line(tuning: Tuning, problem: Problem, state: State, ct: Output) -> Moves:
    """Return the cotangents where a bias by rule is written out."""
    numbers = rules.numbers(problem.bias_rule)
    line, pull = jax.vjp(rules.written_out(problem), problem.bias, numbers)
    whole = dataclasses.replace(problem, bias=line, bias_rule=None, constants=())
    moves = cotangent(tuning, whole, state, ct)
    d_bias, d_rule = pull(moves.bias)
    return moves._replace(bias=d_bias, bias_rule=_like(floats(problem.bias_rule), d_rule))


def _like(given: Any, moved: Any) -> Any:
    """Return gradients in the dtypes of what they are of."""
    return jax.tree.map(lambda a, d: d.astype(jnp.result_type(a)), given, moved)


def _shift(problem: Problem, state: State) -> tuple[Array, Array]:
    """Return `softmax.shift` with the shift before the scale, as the kernel's own logits are."""
    shift, ratio = softmax.shift(state.m, state.l)
    scale = problem.logits.scale
    if not folds(problem) or scale == 1:
        return shift, ratio
    seen = state.l != 0
    finite = jnp.where(seen, shift, 0)
    own = finite / jnp.asarray(scale, jnp.float32)
    back, rest = _product(own, scale)
    ratio = ratio * jnp.exp((back - finite) + rest)
    return jnp.where(seen, own, jnp.inf), ratio


def _backward(
    tuning: Tuning, problem: Problem, dtype: Any, d_out: Array, extra: dict[str, Array]
) -> tuple[Array, Array, Array, Array | None, Any]:
    """Return dq, dk, dv, and the gradients of a bias that is O(T + S) and of the rule's floats."""
    g = tuning.sizes.lay(problem, "k")
    plan, streams = make_plan(problem, g, extra)
    size_h, size_v = problem.q.shape[-1], problem.v.shape[-1]
    t, s = g.lengths
    inputs = {
        "q": ops.inner_stream(g, problem.q, 1, ops.chunk),
        "k": ops.outer_stream(g, problem.k, g.groups),
        "v": ops.outer_stream(g, problem.v, g.groups),
        "d_out": ops.inner_stream(g, d_out, 1, ops.chunk),
        **streams,
    }
    alone = g.chunks == 1 and g.groups == 1
    outputs = {
        "dq": ops.resident_output(g, size_h, dtype),
        "dk": ops.outer_output(g, size_h, dtype if alone else jnp.float32),
        "dv": ops.outer_output(g, size_v, dtype if alone else jnp.float32),
    }
    scratch = {
        "d_out_scaled": ((g.chunk, size_v), d_out.dtype),
        "dq_sum": ((g.chunk, size_h), jnp.float32),
        "dk_sum": ((g.rows, size_h), jnp.float32),
        "dv_sum": ((g.rows, size_v), jnp.float32),
    }
    asked = moving(problem)
    ruled = bool(jax.tree.leaves(asked.bias_rule))
    moved = [name for term in plan.terms for name in term.moving] if ruled else []
    if asked.bias is not None and "bias" in plan.vectors:
        moved.append("bias")
    for name in moved:
        of_keys = plan.vectors[name] == "k"
        outputs[f"d.{name}"] = ops.vector_output(g) if of_keys else ops.resident_vector(g)
        if of_keys:
            scratch[f"d.{name}.sum"] = ((g.rows, LANES), jnp.float32)
    if ruled and plan.by_distance:
        outputs["d_distances"] = ops.table_output(g)
    plan = dataclasses.replace(plan, moved=tuple(moved))
    run = _Kernel("attention_backward", kernels.backward, plan, 1, _precision(problem))
    if g.chunks == 1:
        found = dict(zip(outputs, run(tuning, inputs, outputs, scratch, 0)))
    else:
        found = _by_chunk(run, tuning, problem, g, inputs, outputs, scratch)
    dq, dk, dv = (found[name] for name in ("dq", "dk", "dv"))
    if g.groups > 1:
        dk, dv = (x.reshape(g.batch, -1, g.groups, *x.shape[2:]).sum(2) for x in (dk, dv))
    lines = {
        name: found[f"d.{name}"][..., :s]
        if plan.vectors[name] == "k"
        else found[f"d.{name}"][..., :t].swapaxes(2, 3)
        for name in moved
    }
    d_bias, d_rule = None, asked.bias_rule
    if "bias" in lines:
        d_bias = _reduce_to(lines.pop("bias"), problem.bias.shape)  # type: ignore[union-attr]
    if ruled:
        made, pull = jax.vjp(rules.ruled(problem, g, lines), rules.numbers(problem.bias_rule))
        table = found["d_distances"][:, :, 0].sum(0) if plan.by_distance else None
        read = {name: _reduce_to(line, made.read[name].shape) for name, line in lines.items()}
        (d_rule,) = pull(rules.Ruled(table, read))
    back = (dq[:, :, :t], dk[:, :, :s], dv[:, :, :s])
    return *(x.swapaxes(1, 2) for x in back), d_bias, d_rule  # type: ignore[return-value]


def _by_chunk(run, tuning, problem, g, inputs, outputs, scratch):
    """Go through the queries chunk by chunk where not all of them fit into VMEM."""
    of_queries = [name for name in run.plan.moved if run.plan.vectors[name] == "q"]
    by_query = {"dq": 2} | {f"d.{name}": 3 for name in of_queries}
    summed = [name for name in outputs if name not in by_query]
    sums = {name: jnp.zeros(outputs[name][0].shape, jnp.float32) for name in summed}

    def step(sums, chunk):
        before = {f"{name}_before": Stream(sums[name], outputs[name][1]) for name in ("dk", "dv")}
        found = dict(zip(outputs, run(tuning, {**inputs, **before}, outputs, scratch, chunk)))
        more = {name: found[name] + sums[name] for name in summed if name not in ("dk", "dv")}
        return {"dk": found["dk"], "dv": found["dv"], **more}, {x: found[x] for x in by_query}

    sums, by_chunk = lax.scan(step, sums, jnp.arange(g.chunks, dtype=jnp.int32))

    def joined(name):  # chunks side by side
        axis, shape = by_query[name], list(outputs[name][0].shape)
        shape[axis] *= g.chunks
        return jnp.moveaxis(by_chunk[name], 0, axis).reshape(shape)

    share = 1.0 if problem.dropout is None else problem.dropout.factor
    sums = {**sums, "dk": sums["dk"] * problem.logits.scale, "dv": sums["dv"] * share}
    return {**sums, **{name: joined(name) for name in by_query}}


def _dense_bias_gradient(
    tuning: Tuning, problem: Problem, d_out: Array, extra: dict[str, Array]
) -> Array:
    """Return the gradient of a bias that is itself T x S."""
    g = tuning.sizes.lay(problem, "q", writes_slab=True)
    plan, streams = make_plan(problem, g, extra)
    inputs = {
        "q": ops.outer_stream(g, problem.q, 1),
        "k": ops.inner_stream(g, problem.k, g.groups, ops.chunk),
        "v": ops.inner_stream(g, problem.v, g.groups, ops.chunk),
        "d_out": ops.outer_stream(g, d_out, 1),
        **streams,
    }
    shape = (g.batch, g.heads, g.padded["q"], g.padded["k"])
    block = pl.BlockSpec((None, None, g.rows, g.chunk), lambda b, n, r, m, *_: (b, n, r, m))
    outputs = {"d_bias": (jax.ShapeDtypeStruct(shape, jnp.float32), block)}
    run = _Kernel("attention_bias", kernels.bias_gradient, plan, g.chunks, _precision(problem))
    (d_logits,) = run(tuning, inputs, outputs, {}, 0)
    t, s = g.lengths
    return _reduce_to(d_logits[:, :, :t, :s], problem.bias.shape)  # type: ignore[union-attr]


def _reduce_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that broadcast."""
    axes = tuple(axis for axis, (have, want) in enumerate(zip(x.shape, shape)) if have != want)
    return jnp.sum(x, axes, keepdims=True)


# ---- the launch --------------------------------------------------------------------------------


def _computable(problem: Problem) -> Problem:
    """Return a problem that the kernels can compute: float16 is widened, exactly."""
    if problem.q.dtype != jnp.float16:
        return problem
    wide = {name: getattr(problem, name).astype(jnp.float32) for name in "qkv"}
    bias = problem.bias
    if bias is not None and bias.dtype == jnp.float16:
        wide["bias"] = bias.astype(jnp.float32)
    return dataclasses.replace(problem, **wide)


def _precision(problem: Problem) -> Any:
    """Return the products' precision: float32 means float32 unless the caller says otherwise."""
    if problem.q.dtype == jnp.bfloat16:
        return None
    asked = problem.logits.precision
    asked = asked[0] if isinstance(asked, tuple) else asked
    fast = asked in (lax.Precision.DEFAULT, "default", "fastest", "bfloat16")
    return lax.Precision.DEFAULT if fast else lax.Precision.HIGHEST


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
        tuning: Tuning,
        inputs: dict[str, Stream],
        outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        scratch: dict[str, tuple[tuple[int, ...], Any]],
        chunk: Array | int,
    ) -> Sequence[Array]:
        """Run the kernel from column chunk `chunk` on."""
        g, order = self.plan.geometry, self.plan.order
        columns = {
            f"{name}.column": ((g.rows, LANES), inputs[name].array.dtype)
            for name in self.plan.outer_vectors
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
        # Sums that go in and out, block by block, are added to where they lie.
        places = {name: place for place, name in enumerate(inputs, spec.num_scalar_prefetch)}
        sums = {place: name for place, name in enumerate(outputs) if f"{name}_before" in inputs}
        launch = pl.pallas_call(
            kernel,
            input_output_aliases={places[f"{x}_before"]: place for place, x in sums.items()},
            out_shape=[shape for shape, _ in outputs.values()],
            grid_spec=spec,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=tuning.sizes.vmem,
            ),
            interpret=tuning.interpret,
            name=self.name,
        )
        at = jnp.asarray(chunk, jnp.int32).reshape(1)
        prefetched = (at, jnp.asarray(order.table), jnp.asarray(order.source))
        with jax.named_scope(self.name):  # jax 0.7 names the kernel nowhere in the program
            return launch(*prefetched, *(stream.array for stream in inputs.values()))
