"""Weigh our TPU kernels beside jax's flash attention, splash and XLA, by the compiler's schedule.

    python -m benchmarks tpu [--kind v5e v6e] [--case forward_128 ...] [--json FILE]
    python -m benchmarks tpu --measure        real times, on a machine with a TPU (`tpu_times`)

No TPU is used without --measure: libtpu compiles ahead of time. Bundles are not seconds (`tpu_schedule`).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import tpu_times
from benchmarks.tpu_schedule import Schedule, read_dump
from benchmarks.tpu_ways import KINDS, WORKS, Rival, rivals

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
        return tpu_times.main(names, options.json or "tpu_times.json")
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
