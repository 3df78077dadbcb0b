"""Count what XLA makes of our attention on NVIDIA GPUs, beside jax's own ways; time it where a GPU is.

    python -m benchmarks gpu [--card H100 B200] [--case causal ...] [--json FILE]
    python -m benchmarks gpu --measure        times, on a machine with an NVIDIA GPU

Without --measure no GPU is used: programs are compiled ahead of time (`gpu_cards` says what that takes), and
launches and bytes are counted; of Mosaic GPU's kernels, from jax 0.11 on, registers, spills, shared memory
and the instructions of a loop's turn (`gpu_kernels`). They are not seconds. "a tile": launches for each tile
of logits, of which are two products forward and five backward; dense attention is one tile.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import gpu_cards, gpu_kernels, gpu_torch
from benchmarks.gpu_ways import WORKS, Work, ways
from benchmarks.tpu_times import arguments_of, facts, seconds

# ---- without a GPU --------------------------------------------------------------------------------

HEADER = (
    f"{'case':30s}{'card':6s}{'way':22s}{'launches':>9s}{'a tile':>8s}{'temporary MiB':>15s}  calls"
)


def count(name: str, card: str, way: str, function: Callable) -> dict[str, Any]:
    """Compile one way to do a work for a card, and return a line of what XLA made of it."""
    line: dict[str, Any] = {"case": name, "card": card, "way": way}
    arguments = WORKS[name].arguments
    try:
        if "mosaic_gpu" in way and gpu_kernels.missing() is None:
            program, kernels = gpu_kernels.kernels(card, function, *arguments)
            line["mosaic"] = [kernel._asdict() for kernel in kernels]
        else:
            program = gpu_cards.compiled(card, function, *arguments)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return line | {"error": str(error).split("\n")[0][:100]}
    return line | gpu_cards.counts(program)._asdict()


def row(line: dict[str, Any]) -> str:
    """Return one line of the table of counts."""
    start = f"{line['case']:30s}{line['card']:6s}{line['way']:22s}"
    if "error" in line:
        return f"{start}  does not compile: {line['error']}"
    # Of a tile are two products forward, and five backward.
    tile = line["a_product"] * (7 if WORKS[line["case"]].backward else 2)
    launches = f"{line['kernels']:9d}{f'{tile:.1f}' if tile else '-':>8s}"
    calls = ", ".join(x for x in line["calls"] if "cudnn" in x)
    mib = line["temporaries"] / 2**20
    kernels = "".join(map(_kernel_row, line.get("mosaic", ())))
    return f"{start}{launches}{mib:15,.1f}  {calls}{kernels}"


def _kernel_row(kernel: dict[str, Any]) -> str:
    loops = ", ".join(str(loop.instructions) for loop in kernel["loops"] or ())
    return (
        f"\n    {kernel['name']}: {kernel['registers']} registers, {kernel['spills']} bytes spilled, "
        f"{kernel['shared']:,} of shared memory; instructions of a turn: {loops or 'not read'}"
    )


# ---- with a GPU -----------------------------------------------------------------------------------

TIMES = f"{'case':30s}{'way':22s}{'ms':>10s}{'TFLOP/s':>10s}"


def measure(names: list[str], rounds: int = 5, at_least: float = 0.1) -> list[dict[str, Any]]:
    """Time every way to do the named works on the GPU of this process; print a line for each."""
    lines = []
    for name in names:
        work = WORKS[name]
        timed = _timed(work, rounds, at_least)
        for way, time in timed.items():
            line: dict[str, Any] = {"case": name, "way": way}
            try:
                times = time()
                rate = work.flops / statistics.median(times) / 1e12
                line |= {"seconds": times, "teraflops": rate}
            except (RuntimeError, NotImplementedError, ValueError) as error:
                line["error"] = str(error).split("\n")[0][:100]
            print(time_row(line), flush=True)
            lines.append(line)
    return lines


def _timed(work: Work, rounds: int, at_least: float) -> dict[str, Callable[[], list[float]]]:
    """Return what times each way, ours first."""

    def of(function):
        return lambda: seconds(function, arguments_of(work.arguments), rounds, at_least)

    timed = {way: of(function) for way, function in ways(work).items()}
    if gpu_torch.missing() is None:
        timed["torch sdpa"] = lambda: gpu_torch.seconds(work, "cuda", rounds, at_least)
    return timed


def time_row(line: dict[str, Any]) -> str:
    """Return one line of the table of times."""
    start = f"{line['case']:30s}{line['way']:22s}"
    if "error" in line:
        return f"{start}  does not run: {line['error']}"
    return f"{start}{statistics.median(line['seconds']) * 1e3:10.3f}{line['teraflops']:10.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
      SystemExit: What was asked for is not there: a case, a GPU, the compiler.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--card", nargs="+", default=["H100"], choices=gpu_cards.CARDS)
    parser.add_argument("--case", nargs="+", default=list(WORKS), help="names, or parts of them")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--measure", action="store_true", help="time them on this machine's GPU")
    options = parser.parse_args(arguments)
    names = [name for name in WORKS if any(part in name for part in options.case)]
    if not names:
        raise SystemExit(f"no case matches {options.case}. Cases: {', '.join(WORKS)}")
    if options.measure:
        return _measured(names, options.json or "gpu_times.json")
    if (why := gpu_cards.missing()) is not None:
        raise SystemExit(f"error: {why}")
    print("Launches and bytes of compiled programs. They are not seconds; no GPU was used.")
    print(HEADER, flush=True)
    lines = []
    for name in names:
        for card in options.card:
            for way, function in ways(WORKS[name], card).items():
                lines.append(count(name, card, way, function))
                print(row(lines[-1]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(lines, file, indent=1)


def _measured(names: list[str], file: str) -> None:
    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"error: this process runs on {jax.devices()[0].device_kind!r}, not on a GPU. Run it on a "
            "machine with an NVIDIA GPU after pip install 'mha_jax[cuda12]', or leave --measure away to "
            "compile without one."
        )
    known = facts()
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    print(TIMES, flush=True)
    lines = measure(names)
    with open(file, "w") as out:
        json.dump({"machine": known, "times": lines}, out, indent=1)
    print(f"\nWritten to {file}. Please send it in: open an issue and attach the file.")


if __name__ == "__main__":
    main()
