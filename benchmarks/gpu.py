"""Count what XLA makes of our attention on NVIDIA GPUs, beside jax's own ways; time it where a GPU is.

    python -m benchmarks gpu [--card H100 B200] [--case causal ...] [--json FILE]
    python -m benchmarks gpu --measure        times, on a machine with an NVIDIA GPU

Without --measure no GPU is used: programs are compiled ahead of time (`gpu_cards` says what that takes), and
launches and bytes are counted. They are not seconds.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_cards
from benchmarks.tpu_times import arguments_of, facts, seconds
from mha_jax import Call, Causal, Dropout, Full, Tokens, ValidKeys, Window, attend

MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(1023, 0),
    "padding": ValidKeys(),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of attention; 16,384 tokens and 16 heads if nothing else is said.

    Args:
      backward: The gradients of q, k and v, with the forward pass that they rest on.
      extra: "dropout" or "bias", beside the mask.
    """

    backward: bool = False
    length: int = 4096
    size: int = 128
    mask: str = "full"
    extra: str = ""
    dtype: Any = jnp.bfloat16
    heads: int = 16

    @property
    def batch(self) -> int:
        return max(1, 16384 // self.length)

    @property
    def flops(self) -> float:
        """Useful arithmetic: two products forward, five backward, of the visible pairs."""
        rows, columns = np.arange(self.length)[:, None], np.arange(self.length)[None]
        seen = np.ones((1, 1), bool)
        if self.mask in ("causal", "window"):
            seen = columns <= rows
        if self.mask == "window":
            seen = seen & (columns > rows - 1024)
        pairs = np.broadcast_to(seen, (self.length, self.length)).sum()
        return (7 if self.backward else 2) * 2.0 * pairs * self.size * self.batch * self.heads

    @property
    def arguments(self) -> tuple:
        """Shapes of q, k, v, the cotangent of the output, valid keys, a bias and a key's words."""
        x = jax.ShapeDtypeStruct((self.batch, self.length, self.heads, self.size), self.dtype)
        pairs = (1, self.heads, self.length, self.length) if self.extra == "bias" else (1,) * 4
        return (
            *(x, x, x, x),
            jax.ShapeDtypeStruct((self.batch, self.length), jnp.bool_),
            jax.ShapeDtypeStruct(pairs, self.dtype),
            jax.ShapeDtypeStruct((2,), jnp.uint32),
        )


def _works() -> dict[str, Work]:
    works = {}
    for backward in (False, True):
        start = "backward" if backward else "forward"
        for size in (64, 128, 256):
            for mask in ("full", "causal"):
                works[f"{start}_{size}_{mask}_4096"] = Work(backward, size=size, mask=mask)
        works[f"{start}_128_causal_1024"] = Work(backward, 1024, mask="causal")
        works[f"{start}_128_causal_16384"] = Work(backward, 16384, mask="causal")
        works[f"{start}_128_window_4096"] = Work(backward, mask="window")
        works[f"{start}_128_padding_4096"] = Work(backward, mask="padding")
        for extra in ("dropout", "bias"):
            works[f"{start}_128_{extra}_4096"] = Work(backward, mask="causal", extra=extra)
        works[f"{start}_128_float32_4096"] = Work(backward, mask="causal", dtype=jnp.float32)
    return works


WORKS = _works()


def _ours(work: Work, backend: Any = None) -> Callable:
    def attention(q, k, v, valid, bias, words):
        return attend(
            Call(
                *(q, k, v),
                mask=MASKS[work.mask],
                k_tokens=Tokens(work.length, valid=valid) if work.mask == "padding" else None,
                bias=bias if work.extra == "bias" else None,
                dropout=Dropout(words, 0.1) if work.extra == "dropout" else None,
            ),
            backend,
        ).out

    return attention


def _jax_nn(work: Work, implementation: Literal["xla", "cudnn"]) -> Callable:
    def attention(q, k, v, valid, bias, words):
        options: dict[str, Any] = {"is_causal": work.mask in ("causal", "window")}
        if work.mask == "window":
            options["local_window_size"] = (1023, 0)
        if work.mask == "padding":
            options["key_value_seq_lengths"] = valid.sum(-1, dtype=jnp.int32)
        if work.extra == "bias":
            options["bias"] = bias
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)

    return attention


def ways(work: Work, measured: bool) -> dict[str, Callable]:
    """Return the ways to do a work, functions of `work.arguments`.

    Args:
      measured: On a GPU: jax.nn asks for cuDNN while it is traced.
    """
    found = {"mha_jax": _ours(work)}
    if not work.extra and work.dtype != jnp.float32:
        found["mha_jax blockwise"] = _ours(work, "blockwise")
    if work.extra != "dropout":
        if measured and work.dtype != jnp.float32:
            found["jax.nn cudnn"] = _jax_nn(work, "cudnn")
        if work.length <= 4096:
            found["jax.nn xla"] = _jax_nn(work, "xla")
    return {name: _passes(way, work.backward) for name, way in found.items()}


def _passes(way: Callable, backward: bool) -> Callable:
    if not backward:
        return lambda q, k, v, d_out, *rest: way(q, k, v, *rest)

    def gradients(q, k, v, d_out, *rest):
        return jax.vjp(lambda *a: way(*a, *rest), q, k, v)[1](d_out)

    return gradients


# ---- without a GPU --------------------------------------------------------------------------------

HEADER = (
    f"{'case':30s}{'card':6s}{'way':20s}{'launches':>9s}{'a tile':>8s}{'temporary MiB':>15s}  calls"
)


def count(name: str, card: str, way: str, function: Callable) -> dict[str, Any]:
    """Compile one way to do a work for a card, and return a line of what XLA made of it."""
    line: dict[str, Any] = {"case": name, "card": card, "way": way}
    try:
        program = gpu_cards.compiled(card, function, *WORKS[name].arguments)
    except jax.errors.JaxRuntimeError as error:
        return line | {"error": str(error).split("\n")[0][:100]}
    return line | gpu_cards.counts(program)._asdict()


def row(line: dict[str, Any]) -> str:
    """Return one line of the table of counts."""
    start = f"{line['case']:30s}{line['card']:6s}{line['way']:20s}"
    if "error" in line:
        return f"{start}  does not compile: {line['error']}"
    # Of a tile are two products forward, and five backward.
    tile = line["a_product"] * (7 if WORKS[line["case"]].backward else 2)
    calls = ", ".join(x for x in line["calls"] if "cudnn" in x)
    mib = line["temporaries"] / 2**20
    return f"{start}{line['kernels']:9d}{tile:8.1f}{mib:15,.1f}  {calls}"


# ---- with a GPU -----------------------------------------------------------------------------------

TIMES = f"{'case':30s}{'way':20s}{'ms':>10s}{'TFLOP/s':>10s}"


def measure(names: list[str], rounds: int = 5, at_least: float = 0.1) -> list[dict[str, Any]]:
    """Time every way to do the named works on the GPU of this process; print a line for each."""
    lines = []
    for name in names:
        work = WORKS[name]
        for way, function in ways(work, jax.default_backend() == "gpu").items():
            line: dict[str, Any] = {"case": name, "way": way}
            try:
                times = seconds(function, arguments_of(work.arguments), rounds, at_least)
                rate = work.flops / statistics.median(times) / 1e12
                line |= {"seconds": times, "teraflops": rate}
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
                line["error"] = str(error).split("\n")[0][:100]
            print(time_row(line), flush=True)
            lines.append(line)
    return lines


def time_row(line: dict[str, Any]) -> str:
    """Return one line of the table of times."""
    start = f"{line['case']:30s}{line['way']:20s}"
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
            for way, function in ways(WORKS[name], measured=False).items():
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
