"""NVIDIA GPUs that are not there: XLA compiles for any of them on any machine, and we count what it made.

What it takes, 220 MB of wheels and no driver, cuDNN or GPU; the first two in the version of jax:

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12==12.9.86

A program is the one that the card would run, but that products are not tuned, for which there is nothing to
time, and that cuDNN's graphs are not built: a call of cuDNN stays a call.

Source: openxla/xla, `xla/backends/gpu/target_config/specs` (what a card is).
"""

import functools
import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Card(NamedTuple):
    """What XLA must know of a card.

    Args:
      capability: Compute capability.
      multiprocessors: Their number.
      lanes: Float32 operations of one in a cycle.
      shared: Bytes of shared memory that a block may ask for; a multiprocessor has a KiB more.
      cache: Bytes of L2.
      bandwidth: Bytes a second.
      clock: GHz.
      memory: Bytes.
    """

    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    shared: int
    cache: int
    bandwidth: float
    clock: float
    memory: float


CARDS = {
    "A100": Card((8, 0), 108, 64, 166_912, 40 << 20, 2.04e12, 1.41, 80e9),
    "H100": Card((9, 0), 132, 128, 232_448, 50 << 20, 3.35e12, 1.98, 85e9),
    "H200": Card((9, 0), 132, 128, 232_448, 50 << 20, 4.80e12, 1.98, 151e9),
    "B200": Card((10, 0), 148, 128, 232_448, 126 << 20, 8.0e12, 1.97, 192e9),
}


def missing() -> str | None:
    """Say what is not installed, or return None."""
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    spec = importlib.util.find_spec("jax_plugins")
    if spec is not None and any(importlib.util.find_spec(name) for name in plugins):
        return None
    return (
        "XLA's CUDA compiler is not installed: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, "
        f"both in version {jax.__version__}, and nvidia-cuda-nvcc-cu12==12.9.86"
    )


def place(name: str) -> Any:
    """Return the sharding of arrays that lie on one card."""
    return jax.sharding.SingleDeviceSharding(devices(name)[0])


@functools.lru_cache
def devices(name: str, topology: str = "1x1x1") -> Any:
    """Return cards that only compile, of a topology: slices x hosts x cards of a host."""
    from jax.experimental import topologies

    card = CARDS[name]
    major, minor = card.capability
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    config = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {card.shared}
      shared_memory_per_core: {card.shared + 1024}
      core_count: {card.multiprocessors} fpus_per_core: {card.lanes}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      memory_bandwidth: {int(card.bandwidth)} l2_cache_size: {card.cache}
      clock_rate_ghz: {card.clock} device_memory_size: {int(card.memory)}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
      device_address_bits: 64 name: "NVIDIA {name}" dnn_version: "9.19.0"
      driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 19 patch: 0 }}
    device_description_str: "NVIDIA {name}"
    """
    described = topologies.get_topology_desc(
        platform="cuda", topology=topology, target_config=config
    )
    return described.devices


def compiled(card: str, function: Any, *arguments: Any) -> Any:
    """Compile a function of arrays of these shapes, jitted or not, for a card."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(card)), arguments
    )
    return jitted.lower(*shapes).compile()


# ---- what a program is made of --------------------------------------------------------------------

_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id"),
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(")
_PRODUCT = re.compile(r" dot\(|custom_call_target=\"__cublas")
_SHAPE = re.compile(r"\b(?:f64|f32|bf16|f16|s32|u32|s8|u8|pred)\[([\d,]+)\]")


class Counts(NamedTuple):
    """What XLA made of a program.

    Args:
      kernels: Launches outside loops and branches.
      loops: Of every loop, inner ones apart, the launches of one turn.
      a_product: Launches where products are, for each product of them; 0 where XLA makes none.
      temporaries: Bytes.
      largest: Elements of the largest array.
      calls: Names of what libraries are called for.
    """

    kernels: int
    loops: tuple[int, ...]
    a_product: float
    temporaries: int
    largest: int
    calls: tuple[str, ...]


def counts(program: Any) -> Counts:
    """Count what a compiled program launches."""
    text = program.as_text()
    own, products, bodies, branches, entry = {}, {}, set(), set(), ""
    for name, lines in _computations(text):
        # What is called stands before what calls it.
        called = re.findall(r"(?<=calls=)%?([\w.-]+)", "\n".join(lines))
        products[name] = sum(products[x.lstrip("%")] for x in called)
        products[name] += sum(bool(_PRODUCT.search(line)) for line in lines)
        if lines[0].startswith("ENTRY"):
            entry = name
        operations = [found[1] for line in lines if (found := _INSTRUCTION.match(line))]
        own[name] = sum(operation not in _NO_KERNEL for operation in operations)
        bodies |= set(re.findall(r"body=%?([\w.-]+)", "\n".join(lines)))
        branches |= set(re.findall(r"(?:true|false)_computation=%?([\w.-]+)", "\n".join(lines)))
        for found in re.findall(r"branch_computations=\{(.*?)\}", "\n".join(lines)):
            branches |= set(re.findall(r"[\w.-]+", found))
    working = [name for name in (*bodies, *branches, entry) if products[name]]
    made = sum(products[name] for name in working)
    calls = re.findall(r'custom_call_target="(.*?)"', text)
    sizes = (math.prod(map(int, found[1].split(","))) for found in _SHAPE.finditer(text))
    return Counts(
        own[entry],
        tuple(sorted(own[name] for name in bodies)),
        sum(own[name] for name in working) / made if made else 0.0,
        program.memory_analysis().temp_size_in_bytes,
        max(sizes),
        tuple(sorted(set(calls))),
    )


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the lines of every computation of a program."""
    lines: list[str] = []
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%?[\w.-]+ .*\{$", line):
            lines = [line]
        elif line == "}" and lines:
            yield lines[0].removeprefix("ENTRY ").split(" ")[0].lstrip("%"), lines
            lines = []
        elif lines:
            lines.append(line)
