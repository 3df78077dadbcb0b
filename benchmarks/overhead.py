"""What a call costs beside its arithmetic: ours beside flax.linen and flax.nnx.

    python -m benchmarks overhead
    python -m benchmarks overhead --baseline ../before     another checkout of ours as well, in turns
    python -m benchmarks overhead --figures eager trace --json FILE

CPU seconds, medians of rounds in turns, ours and Flax's in one process; x is [1, 4, 8], 2 heads of 4, unless
a figure says otherwise. An eager call and a jitted one are timed on the thread that calls; tracing, too,
with a function that JAX has not seen before; compiling, which has threads of its own, on the whole process
(and lowering is not counted); an import in a fresh process, by its user time. A baseline has a process
like ours, and its ratio to Flax is taken in it.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import mha_jax as mj
from benchmarks import machine, report
from benchmarks.checkouts import HERE, Checkout
from benchmarks.measure import progress
from benchmarks.results import BEFORE, OURS
from benchmarks.timer import repeated, sample, turns

FLAX = "flax"
LAYERS = 12


@dataclasses.dataclass(frozen=True)
class Figure:
    """One cost: who it is compared with, and how many rounds it takes for each that is asked for."""

    name: str
    title: str
    peer: str
    often: int = 1


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("eager-linen", "an eager call of the linen layer", "flax.linen", 10),
        Figure("eager-nnx", "an eager call of the nnx layer", "flax.nnx", 10),
        Figure("eager-function", "an eager call of the functional layer", "flax.linen", 10),
        Figure("jitted", "a jitted call of the linen layer", "flax.linen", 10),
        Figure("trace-forward", f"tracing {LAYERS} layers", "flax.linen"),
        Figure("trace-gradient", f"tracing {LAYERS} layers' loss gradient", "flax.linen"),
        Figure("compile", "compiling a layer's loss gradient, B8 T512 8x64", "flax.linen"),
        Figure("import", "the import", "flax.linen"),
    )
}


class Sampler:
    """Takes samples of every figure, of ours and of Flax's, in this process."""

    def __init__(self):
        self.apply, self.variables = _layers(batch=1, length=4, heads=2, size=4, abstract=False)
        self.wide = _layers(batch=8, length=512, heads=8, size=64, abstract=True)
        self.x = jnp.ones((1, 4, 8))
        flat, x = self.variables[OURS]["params"], self.x
        ours = mj.nnx.MultiHeadAttention(num_heads=2, key_dim=4, in_features=8, rngs=nnx.Rngs(0))
        flax = nnx.MultiHeadAttention(2, 8, 8, 8, decode=False, rngs=nnx.Rngs(0))
        jitted = {who: jax.jit(apply) for who, apply in self.apply.items()}
        eager = {who: self._call(who) for who in (OURS, FLAX)}
        self.calls: dict[tuple[str, str], Callable[[], Any]] = {
            ("eager-nnx", OURS): lambda: ours(x, x),
            ("eager-nnx", FLAX): lambda: flax(x),
            ("eager-function", OURS): lambda: mj.multi_head_attention(flat, x, x),
            ("eager-function", FLAX): eager[FLAX],
        }
        for who, call in eager.items():
            self.calls["eager-linen", who] = call
            self.calls["jitted", who] = self._call(who, jitted[who])

    def _call(self, who: str, apply: Callable | None = None) -> Callable[[], Any]:
        apply, variables, x = apply or self.apply[who], self.variables[who], self.x
        return lambda: apply(variables, x)

    def sample(self, figure: str, who: str) -> float:
        """Return the CPU seconds of one call, trace or compilation."""
        kind, _, what = figure.partition("-")
        if kind == "trace":
            stack = _stack(self.apply[who], what == "gradient")
            arguments = ([self.variables[who]] * LAYERS, self.x)
            return sample(repeated(lambda: jax.make_jaxpr(stack)(*arguments))).thread
        if kind == "compile":
            apply, variables = self.wide
            stack = _stack(apply[who], gradient=True)
            x = jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)
            lowered = jax.jit(stack).lower([variables[who]], x)
            return sample(repeated(lowered.compile)).process
        call = self.calls[figure, who]
        return sample(
            repeated(lambda: jax.block_until_ready(call())), 100 if kind == "jitted" else 1
        ).thread


def _layers(batch: int, length: int, heads: int, size: int, abstract: bool) -> tuple[dict, dict]:
    """Return apply(variables, x) and variables of both linen layers; abstract, shapes in their place."""
    ours = mj.MultiHeadAttention(num_heads=heads, key_dim=size)
    flax = nn.MultiHeadDotProductAttention(num_heads=heads)
    x, key = jnp.ones((batch, length, heads * size)), jax.random.key(0)
    apply = {
        OURS: lambda variables, x: ours.apply(variables, x, x),
        FLAX: lambda variables, x: flax.apply(variables, x),
    }
    begin = {OURS: lambda: ours.init(key, x, x), FLAX: lambda: flax.init(key, x)}
    return apply, {who: jax.eval_shape(f) if abstract else f() for who, f in begin.items()}


def _stack(apply: Callable, gradient: bool) -> Callable:
    """Return a new function of as many layers as it is given variables, or of its loss's gradient."""

    def forward(layers, x):
        for variables in layers:
            x = x + apply(variables, x)
        return x

    return jax.grad(lambda layers, x: (forward(layers, x) ** 2).sum()) if gradient else forward


def import_seconds(package: str, path: pathlib.Path) -> float:
    """Return the user CPU seconds of an import in a fresh process that finds packages in a folder.

    With bytecode, as installed packages have it: else a checkout is compiled every time.
    """
    code = (
        f"import sys; sys.path[0] = {str(path)!r}; import {package}; "
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    kept = {key: x for key, x in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=kept, stdout=subprocess.PIPE, check=True)
    return float(run.stdout)


def measure(
    names: list[str], repeats: int, baseline: str | None = None
) -> dict[str, dict[str, list[float]]]:
    """Measure figures in turns.

    Returns:
      The seconds of every round by figure and by who: "mha_jax", "flax", and with a baseline "before" and
      "flax before", which is Flax in the baseline's process.
    """
    ours = Sampler() if baseline is None else Checkout(HERE, "overhead:Sampler")
    before = None if baseline is None else Checkout(baseline, "overhead:Sampler")
    takers = {OURS: (ours, OURS, HERE), FLAX: (ours, FLAX, HERE)}
    if before is not None:
        takers[BEFORE] = before, OURS, before.path
        takers[f"{FLAX} {BEFORE}"] = before, FLAX, before.path

    def take(figure: str, who: str) -> float:
        where, name, path = takers[who]
        if figure == "import":
            return import_seconds("mha_jax" if name == OURS else "flax.linen", path)
        if isinstance(where, Checkout):
            return where.call("sample", figure, name)
        return where.sample(figure, name)

    times: dict[str, dict[str, list[float]]] = {}
    for figure in names:
        times[figure] = {who: [] for who in takers}
        for who in takers:
            take(figure, who)
        for turn, who in turns(dict.fromkeys(takers, repeats * FIGURES[figure].often)):
            progress(f"{figure}: {who}, round {turn + 1}")
            times[figure][who].append(take(figure, who))
    for checkout in (ours, before):
        if isinstance(checkout, Checkout):
            checkout.close()
    progress("")
    return times


def table(times: dict[str, dict[str, list[float]]]) -> str:
    """Return the medians and their ratios."""
    compared = any(BEFORE in by for by in times.values())
    heads = ["CPU time of", OURS, FLAX, f"{OURS}/{FLAX}", "peer"]
    heads += [BEFORE, f"{BEFORE}/{FLAX}", f"{OURS}/{BEFORE}"] if compared else []
    lines = []
    for name, by in times.items():
        m = {who: statistics.median(seconds) for who, seconds in by.items()}
        line = [FIGURES[name].title, report.seconds(m[OURS]), report.seconds(m[FLAX])]
        line += [f"{m[OURS] / m[FLAX]:.3f}", FIGURES[name].peer]
        if compared:
            line += [report.seconds(m[BEFORE]), f"{m[BEFORE] / m[f'{FLAX} {BEFORE}']:.3f}"]
            line += [f"{m[OURS] / m[BEFORE]:.3f}"]
        lines.append(line)
    return report.table(heads, lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--figures", nargs="+", default=list(FIGURES), help=f"names, or parts: {', '.join(FIGURES)}"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds, ten for each of a call (7)")
    parser.add_argument("--baseline", metavar="CHECKOUT", help="compare with another checkout")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Run the command line; return the seconds of every round."""
    options = parser().parse_args(arguments)
    names = [name for name in FIGURES if any(part in name for part in options.figures)]
    if not names:
        raise SystemExit(
            f"error: no figure matches {options.figures}. They are: {', '.join(FIGURES)}"
        )
    known = machine.facts()
    print(machine.sentence(known))
    if options.baseline:
        print(f"before: commit {machine.commit(options.baseline)}", flush=True)
    times = measure(names, options.repeats, options.baseline)
    print(table(times))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({**known, "seconds": times}, indent=1))
    return times
