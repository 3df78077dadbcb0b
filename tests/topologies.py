"""TPUs that are not there: libtpu compiles for any of them on any machine; no TPU is used."""

import functools
import importlib.metadata
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Several test processes may load the compiler at once; none of them has a TPU to fight over.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
VERSION = tuple(int(n) for n in importlib.metadata.version("libtpu").split("."))
if VERSION < (0, 0, 22):
    from jax._src import tpu_custom_call
    from jax._src.interpreters import pxla

    # On a TPU, jax asks the runtime for its age and writes kernels in a version that it reads.
    tpu_custom_call.get_ir_version = lambda context: 7
    # What jax asks for, once a program is compiled, is not there without a TPU: the process dies.
    pxla.is_default_layout = lambda layout, sharding, aval: True
_SHAPE = re.compile(r"\b(?:f32|bf16|f16|s32|u32|s8|pred)\[([\d,]+)\]")


@functools.lru_cache
def chips(topology):
    """Return the devices of a topology such as "v5e:16x16"."""
    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def on_one_chip(kind, tree):
    """Return the shapes of a tree of arrays, placed on one chip."""
    place = NamedSharding(Mesh(chips(TOPOLOGIES[kind])[:1], ("chip",)), PartitionSpec())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def compiled(kind, function, *arguments):
    """Compile a function, jitted or not, for one chip."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*on_one_chip(kind, arguments)).compile()


def largest_array(program):
    """Return the elements of the largest array anywhere in a compiled program."""
    shapes = {found[1] for found in _SHAPE.finditer(program.as_text())}
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)
