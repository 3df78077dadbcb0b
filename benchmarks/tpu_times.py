"""Time our kernels on a real TPU beside jax's own, and write what was found to a file to send in.

    python -m benchmarks tpu --measure [--case forward_128 ...] [--json FILE]

Times are wall clock: the median of several rounds, each of enough calls to last a tenth of a second.
"""

import json
import platform
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timer import sample
from benchmarks.tpu_ways import WORKS, ours, rivals
from mha_jax.backends.pallas_tpu.sizes import KINDS

HEADER = f"{'case':28s}{'kind':7s}{'way':26s}{'ms':>10s}{'TFLOP/s':>10s}"


def arguments_of(shapes: tuple, seed: int = 0) -> tuple:
    """Return arrays of these shapes: normal numbers, and words of a key where they are integers."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(
        jax.random.normal(key, a.shape, a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else jnp.ones(a.shape, a.dtype)
        for key, a in zip(keys, shapes)
    )


def seconds(
    function: Callable, arguments: tuple, rounds: int = 5, at_least: float = 0.1
) -> list[float]:
    """Return the seconds of one call in each round; compilation and the first call are not counted."""
    compiled = jax.jit(function).lower(*arguments).compile()

    def run(count):
        result = None
        for _ in range(count):
            result = compiled(*arguments)
        jax.block_until_ready(result)

    run(1)
    calls = 1
    while 0 < sample(run, calls).wall * calls < at_least and calls < 2**14:
        calls *= 2
    return [sample(run, calls).wall for _ in range(rounds)]


def measure(names: list[str], kind: str, interpret: bool = False, rounds: int = 5) -> list[dict]:
    """Time every way to do the named works on the TPU of this process; print a line for each.

    Args:
      names: Of `tpu_ways.WORKS`.
      kind: Of `tpu_ways.KINDS`: whose tiles are taken.
      interpret: Run our kernel alone, interpreted, on any machine: a test of this program.
      rounds: Times that each is timed.
    """
    lines = []
    for name in names:
        work = WORKS[name]
        ways = rivals(work, kind)
        if interpret:
            ways = {"mha_jax": lambda work=work: ours(work, kind, interpret=True)}
        for way, make in ways.items():
            line: dict[str, Any] = {"case": name, "kind": kind, "way": way}
            rival = make()
            at_least = 0.0 if interpret else 0.1
            try:
                function, shapes = rival.timed or (rival.function, rival.arguments)
                times = seconds(function, arguments_of(shapes), rounds, at_least)
                line |= {
                    "seconds": times,
                    "teraflops": work.timed_flops / statistics.median(times) / 1e12,
                }
            except jax.errors.JaxRuntimeError as error:
                line["error"] = str(error).split("\n")[0][:100]
            print(row(line), flush=True)
            lines.append(line)
    return lines


def row(line: dict[str, Any]) -> str:
    """Return one line of the table."""
    start = f"{line['case']:28s}{line['kind']:7s}{line['way']:26s}"
    if "error" in line:
        return f"{start}  does not run: {line['error']}"
    return f"{start}{statistics.median(line['seconds']) * 1e3:10.3f}{line['teraflops']:10.1f}"


def facts() -> dict[str, str]:
    """Return what a reader of the times must know of the machine."""
    import jaxlib

    device = jax.devices()[0]
    client = str(getattr(device.client, "platform_version", ""))
    return {
        "device": device.device_kind,
        "chips": str(jax.device_count()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": client.replace("\n", " "),
        "python": platform.python_version(),
    }


def main(names: list[str], file: str) -> None:
    """Time the cases on this machine's TPU and write them down.

    Raises:
      SystemExit: There is no TPU, or one of a kind that the table of sizes does not know.
    """
    found = jax.devices()[0].device_kind
    if found not in KINDS:
        raise SystemExit(
            f"error: this process runs on {found!r}, not on a TPU. Expected one of "
            f"{', '.join(KINDS)}: run it on a TPU machine after pip install 'mha_jax[tpu]', "
            "or leave --measure away to compile without one."
        )
    known = facts()
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    print(HEADER, flush=True)
    lines = measure(names, KINDS[found])
    with open(file, "w") as out:
        json.dump({"machine": known, "times": lines}, out, indent=1)
    print(f"\nWritten to {file}. Please send it in: open an issue and attach the file.")
