"""What the compiler makes of Mosaic GPU kernels, on any machine: registers, spills, shared memory, loops.

Beside what `gpu_cards` takes: jax 0.11, and nvidia-cuda-nvdisasm for loops, whose instructions are counted
with those that wait for barriers.
"""

import collections
import contextlib
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from benchmarks import gpu_cards


class Loop(NamedTuple):
    """An innermost loop with products.

    Args:
      instructions: Of one turn of a warp.
      products: How many of each kind the tensor cores run.
    """

    instructions: int
    products: dict[str, int]


class Kernel(NamedTuple):
    """What a kernel takes.

    Args:
      name: As it is called in the program.
      registers: Of a thread, before warps trade them.
      spills: Bytes that registers do not hold, stored and loaded.
      shared: Bytes of shared memory of a block.
      loops: None where nothing reads machine code.
    """

    name: str
    registers: int
    spills: int
    shared: int
    loops: list[Loop] | None


def missing() -> str | None:
    """Say what is not installed, or return None."""
    if jax.__version_info__ < (0, 11):
        return f"Mosaic GPU's kernels need jax 0.11; this is {jax.__version__}"
    if _tool("ptxas") is None:
        return "the kernels' compiler is not installed: pip install --no-deps nvidia-cuda-nvcc-cu12==12.9.86"
    return gpu_cards.missing()


def kernels(card: str, function: Any, *arguments: Any) -> tuple[Any, list[Kernel]]:
    """Compile a function of arrays of these shapes for a card; return the program and its Mosaic kernels."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with _dumping(folder):
            program = gpu_cards.compiled(card, function, *arguments)
        # A kernel's code and its memory have numbers of their own, and the same name.
        shared = {
            _name(path): int(re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())[0])
            for path in folder.glob("*.resources.txt")
        }
        found = [_kernel(path, shared) for path in sorted(folder.glob("*.ptxas"))]
    return program, found


def _kernel(path: pathlib.Path, shared: dict[str, int]) -> Kernel:
    text = path.read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)[-1]
    (registers,) = re.findall(r"Used (\d+) registers", text)
    code = path.with_suffix(".sass_ctrl")
    loops = list(_loops(code.read_text())) if code.exists() else None
    return Kernel(_name(path), int(registers), sum(map(int, spills)), shared[_name(path)], loops)


def _name(path: pathlib.Path) -> str:
    return path.name.split(".")[0].rsplit("_", 1)[0]


def _tool(name: str) -> pathlib.Path | None:
    """Return a program of NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = (path for root in roots for path in pathlib.Path(root).glob(f"*/bin/{name}"))
    return next(found, None)


@contextlib.contextmanager
def _dumping(folder: pathlib.Path) -> Iterator[None]:
    """Let the compiler write what it makes to a folder."""
    from jax.experimental.mosaic import gpu  # says itself where CUDA is

    del gpu
    compiler, reader = _tool("ptxas"), _tool("nvdisasm")
    wanted = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    if compiler is not None and reader is not None:
        root = folder / "cuda"
        (root / "bin").mkdir(parents=True)
        (root / "bin/ptxas").symlink_to(compiler)
        (root / "bin/nvdisasm").symlink_to(reader)
        (root / "nvvm").symlink_to(compiler.parent.parent / "nvvm")
        wanted |= {"MOSAIC_GPU_DUMP_SASS_CTRL": "1", "MOSAIC_GPU_CUDA_ROOT": str(root)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_OPERATION = re.compile(r"\s*\S*:\S*:\S*:[Y-]:\d+\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?(.*)")


def _loops(text: str) -> Iterator[Loop]:
    """Yield the innermost loops with products of a listing of machine code."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif operation := _OPERATION.match(line):
            code.append(operation[1])
    spans = []
    for last, operation in enumerate(code):
        back = re.search(r"\bBRA.*?(\.L_x_\d+)", operation)
        if back and labels.get(back[1], last + 1) <= last:
            spans.append(range(labels[back[1]], last + 1))
    # What begins anew is the whole kernel, or a wait outside of its loop.
    ends = [i for i, operation in enumerate(code) if operation.startswith("EXIT")]
    spans = [span for span in spans if not any(end in span for end in ends)]
    working = [span for span in spans if any("GMMA" in code[i] for i in span)]
    for span in working:
        if any(a is not span and a.start >= span.start and a.stop <= span.stop for a in working):
            continue
        body = [code[i] for i in span]
        products = collections.Counter(x.split()[0] for x in body if "GMMA" in x)
        yield Loop(len(body), dict(products))
