"""Weigh our TPU kernels beside jax's flash attention, splash and XLA, by the compiler's schedule.

    python -m benchmarks tpu [--kind v5e v6e] [--case forward_128 ...] [--json FILE]
    python -m benchmarks tpu --measure        real times, on a machine with a TPU (`tpu_times`)

No TPU is used without --measure: libtpu compiles ahead of time. Bundles are not seconds (`tpu_schedule`).
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tpu_schedule import Schedule, read_dump
from mha_jax import Call, Causal, Dropout, Full, Window
from mha_jax.attention.call import Output, State
from mha_jax.attention.check import check
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.pallas_tpu.patterns import Order, entry, order
from mha_jax.backends.pallas_tpu.sizes import SIZES

# Topology, and bf16 multiply-adds of one core in a cycle, times two.
KINDS = {
    "v4": ("v4:2x2x1", 131_072),
    "v5e": ("v5e:2x2", 131_072),
    "v5p": ("v5p:2x2x1", 131_072),
    "v6e": ("v6e:2x2", 524_288),
    "tpu7x": ("tpu7x:2x2x1", 524_288),
}
MASKS = {"full": Full(), "causal": Causal(), "window": Window(1023, 0)}
SPLASH = [(1024, 1024, 512), (512, 2048, 512), (1024, 2048, 1024), (1024, 2048, 256)]
FLASH = (512, 1024, 512)


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of attention: B 1, N 1, bfloat16."""

    backward: bool = False
    length: int = 4096
    size: int = 128
    mask: str = "full"
    rate: float = 0.0

    @property
    def flops(self) -> float:
        """Useful arithmetic: two products forward, five backward, of the visible pairs."""
        rows, columns = np.arange(self.length)[:, None], np.arange(self.length)[None]
        pairs = {
            "full": self.length**2,
            "causal": int((columns <= rows).sum()),
            "window": int(((columns <= rows) & (columns > rows - 1024)).sum()),
        }[self.mask]
        return (5 if self.backward else 2) * 2.0 * pairs * self.size


def _works() -> dict[str, Work]:
    works = {}
    for backward, size in ((False, 128), (False, 64), (True, 128), (True, 64)):
        for mask, length in (("full", 4096), ("causal", 4096), ("window", 4096), ("causal", 16384)):
            name = f"{'backward' if backward else 'forward'}_{size}_{mask}_{length}"
            works[name] = Work(backward, length, size, mask)
    works["forward_128_full_16384"] = Work(length=16384)
    works["forward_128_dropout_4096"] = Work(rate=0.1)
    works["backward_128_dropout_4096"] = Work(True, rate=0.1)
    return works


WORKS = _works()


@dataclasses.dataclass(frozen=True)
class Rival:
    """A way to do the work: what to compile, and how its schedule is weighed.

    `reads` maps a kernel's name to what `Schedule.issued` is given; kernels that it does not know, for
    which it returns None, are XLA's and counted as listed.
    """

    function: Callable
    arguments: tuple
    reads: Callable[[str], tuple | None]


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _gradient_of(function: Callable, backward: bool) -> Callable:
    if not backward:
        return function
    return lambda d_out, *arrays: jax.vjp(function, *arrays)[1](d_out)


def ours(work: Work, kind: str, interpret: bool = False) -> Rival:
    """Return our own way to do the work with the tiles of a kind of chip."""
    backend, x = PallasTPU(SIZES[kind], interpret), _array(1, work.length, 1, work.size)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def call(q, k, v, words):
        dropout = Dropout(words, work.rate) if work.rate else None
        return check(Call(q, k, v, mask=MASKS[work.mask], dropout=dropout))

    def forward(q, k, v, words):
        return backend.forward(call(q, k, v, words)).out

    def backward(q, k, v, words, d_out, out, statistic):
        cotangent = Output(d_out, jnp.zeros_like(statistic))
        state = State(out, statistic, statistic)
        return backend.cotangent(call(q, k, v, words), state, cotangent)[:3]

    zeros = jnp.zeros(x.shape, x.dtype)
    plain = check(Call(zeros, zeros, zeros, mask=MASKS[work.mask]))
    g = SIZES[kind].lay(plain, "k" if work.backward else "q")
    trips = _mean_trips(order(plain, g), g)
    arguments = (x, x, x, words)
    if work.backward:
        arguments += (x, x, jax.ShapeDtypeStruct((1, 1, work.length), jnp.float32))
    function = backward if work.backward else forward
    read = trips, 1.0, g.steps * g.chunks > 1
    return Rival(function, arguments, lambda kernel: read if "attention_" in kernel else None)


def _mean_trips(tiles: Order, g: Any) -> tuple[float, ...]:
    """Return how often each loop over tiles runs for a block of rows, on average, where that differs."""
    if tiles.fixed is not None:
        return ()
    lists = np.asarray(tiles.table).reshape(-1, entry(g, tiles.shapes))
    means = lists[:, : len(tiles.shapes)].mean(0)
    return tuple(float(mean) for mean, count in zip(means, tiles.counts) if count is None)


def _live_share(work: Work, block_q: int, block_k: int) -> float:
    """Return the share of a grid's steps that are not empty."""
    first = np.arange(0, work.length, block_q)[:, None]
    column = np.arange(0, work.length, block_k)[None]
    live = np.ones((first.size, column.size), bool)
    if work.mask != "full":
        live = column <= first + block_q - 1
    if work.mask == "window":
        live &= column + block_k - 1 > first - 1024
    if work.mask == "window":  # splash's grid is as wide as its widest row of blocks
        return float(live.sum() / (live.shape[0] * live.sum(1).max()))
    return float(live.mean())


def _flash(work: Work) -> Rival:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q, major, k = FLASH
    blocks = flash.BlockSizes(
        **{"block_b": 1, "block_q": q, "block_k_major": major, "block_k": k},
        **{"block_q_major_dkv": q, "block_k_major_dkv": major, "block_k_dkv": k, "block_q_dkv": q},
        **{"block_k_major_dq": major, "block_k_dq": k, "block_q_dq": q},
    )
    function = functools.partial(
        flash.flash_attention,
        causal=work.mask == "causal",
        sm_scale=work.size**-0.5,
        block_sizes=blocks,
    )
    x = _array(1, 1, work.length, work.size)
    share = _live_share(work, q, major)
    arguments = (x,) * (4 if work.backward else 3)
    return Rival(
        _gradient_of(function, work.backward),
        arguments,
        lambda n: ((), share) if "flash" in n else None,
    )


def _splash(work: Work, sizes: tuple[int, int, int]) -> Rival:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (work.length, work.length)
    mask = {
        "full": lambda: masks.FullMask(shape),
        "causal": lambda: masks.CausalMask(shape),
        "window": lambda: masks.LocalMask(shape, (1023, 0), 0),
    }[work.mask]()
    q, kv, compute = sizes
    blocks = kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    attend = kernel.make_splash_mha_single_device(masks.MultiHeadMask([mask]), block_sizes=blocks)
    x = _array(1, work.length, work.size)
    arguments = (x,) * (4 if work.backward else 3)
    share = _live_share(work, q, kv)
    return Rival(
        _gradient_of(lambda *qkv: attend(*qkv), work.backward),
        arguments,
        lambda name: ((), share) if "splash" in name else None,
    )


def _dense(work: Work) -> Rival:
    def attend(q, k, v):
        x = jnp.einsum("th,sh->ts", q, k, preferred_element_type=jnp.float32) * work.size**-0.5
        if work.mask != "full":
            ahead = jnp.arange(work.length)[None] - jnp.arange(work.length)[:, None]
            seen = (ahead <= 0) & (ahead > (-1024 if work.mask == "window" else -work.length))
            x = jnp.where(seen, x, -1e30)
        return jax.nn.softmax(x, -1).astype(q.dtype) @ v

    x = _array(work.length, work.size)
    arguments = (x,) * (4 if work.backward else 3)
    return Rival(_gradient_of(attend, work.backward), arguments, lambda name: None)


def rivals(work: Work, kind: str) -> dict[str, Callable[[], Rival]]:
    """Return every way to do the work: what can run it, made when asked for."""
    ways: dict[str, Callable[[], Rival]] = {"mha_jax": lambda: ours(work, kind)}
    if work.rate:
        return ways
    if work.mask != "window":
        ways[f"flash {'/'.join(map(str, FLASH))}"] = lambda: _flash(work)
    for sizes in SPLASH:
        name = f"splash {'/'.join(map(str, sizes))}"
        ways[name] = functools.partial(_splash, work, sizes)
    if work.length <= 4096:
        ways["xla"] = lambda: _dense(work)
    return ways


# ---- one process a device kind: libtpu reads its flags once ------------------------------------


def weigh(rival: Rival, schedules: list[Schedule], backward: bool) -> tuple[int, int]:
    """Return (listed, issued) bundles; a gradient's forward kernel is left out."""
    listed = issued = 0
    for schedule in schedules:
        if backward and ("_fwd" in schedule.name or schedule.name.startswith("jvp_jit_flash")):
            continue
        read = rival.reads(schedule.name)
        listed += schedule.listed
        issued += schedule.listed if read is None else schedule.issued(*read)
    return listed, issued


def compile_all(kind: str, names: list[str], dump: str) -> None:
    """Compile the cases for one kind of chip and print a line of JSON for each."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    chips = topologies.get_topology_desc(platform="tpu", topology_name=KINDS[kind][0]).devices
    one = NamedSharding(Mesh(np.array(chips[:1]), ("chip",)), PartitionSpec())
    for name in names:
        work = WORKS[name]
        for way, make in rivals(work, kind).items():
            line: dict[str, Any] = {"kind": kind, "case": name, "way": way}
            rival = make()
            arguments = (
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for a in rival.arguments
            )
            lowered = jax.jit(rival.function).lower(*arguments)
            try:
                memory = lowered.compile().memory_analysis()
                listed, issued = weigh(rival, read_dump(dump), work.backward)
                line |= {"listed": listed, "issued": issued, "temporary": memory.temp_size_in_bytes}  # type: ignore[union-attr]
            except jax.errors.JaxRuntimeError as error:
                read_dump(dump)
                line["error"] = str(error).split("\n")[0][:100]
            print(json.dumps(line), flush=True)


def _collect(kind: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """Compile the cases for one kind in a process of its own; yield a line as soon as it is there."""
    with tempfile.TemporaryDirectory() as dump:
        flags = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
        )
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            LIBTPU_INIT_ARGS=flags,
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            TPU_SKIP_MDS_QUERY="1",
            TPU_WORKER_ID="0",
            TPU_WORKER_HOSTNAMES="localhost",
        )
        command = [sys.executable, "-m", "benchmarks.tpu", "--child", dump, "--kind", kind]
        child = subprocess.Popen(
            [*command, "--case", *names], env=environment, stdout=subprocess.PIPE, text=True
        )
        for line in child.stdout or ():
            yield json.loads(line)
        if child.wait():
            raise SystemExit(
                f"compiling for {kind} failed with status {child.returncode}; see above"
            )


HEADER = (
    f"{'case':28s}{'kind':7s}{'way':26s}{'issued':>11s}{'listed':>11s}{'FLOP/bundle':>13s}"
    f"{'of peak':>9s}{'temp bytes':>12s}"
)


def row(line: dict[str, Any]) -> str:
    """Return one line of the table."""
    start = f"{line['case']:28s}{line['kind']:7s}{line['way']:26s}"
    if "error" in line:
        return f"{start}  does not compile: {line['error']}"
    speed = WORKS[line["case"]].flops / line["issued"]
    share = speed / KINDS[line["kind"]][1]
    return (
        f"{start}{line['issued']:11,d}{line['listed']:11,d}{speed:13,.0f}{share:9.0%}"
        f"{line['temporary']:12,d}"
    )


def verdict(group: list[dict[str, Any]]) -> str:
    """Return our bundles over the fewest of any other way, both counts."""
    ours = next((x for x in group if x["way"] == "mha_jax" and "issued" in x), None)
    others = [x for x in group if x["way"] != "mha_jax" and "issued" in x]
    if ours is None or not others:
        return ""
    ratios = [f"{ours[c] / min(x[c] for x in others):.2f} {c}" for c in ("issued", "listed")]
    return f"{'':28s}{'':7s}mha_jax over the best other: {', '.join(ratios)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--kind", nargs="+", default=["v5e", "v6e"], choices=KINDS)
    parser.add_argument("--case", nargs="+", default=list(WORKS), help="names, or parts of them")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--measure", action="store_true", help="time them on this machine's TPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = [name for name in WORKS if any(part in name for part in options.case)]
    if not names:
        raise SystemExit(f"no case matches {options.case}. Cases: {', '.join(WORKS)}")
    if options.measure:
        times = importlib.import_module("benchmarks.tpu_times")
        return times.main(names, options.json or "tpu_times.json")
    if options.child:
        return compile_all(options.kind[0], names, options.child)
    print(
        "VLIW bundles of the final schedule, for the same work. They are not seconds; no TPU was used."
    )
    print(HEADER, flush=True)
    lines: list[dict[str, Any]] = []
    for kind in options.kind:
        for _, case in itertools.groupby(_collect(kind, names), key=lambda line: line["case"]):
            group = []
            for line in case:
                group.append(line)
                print(row(line), flush=True)
            print(verdict(group), flush=True)
            lines += group
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()
