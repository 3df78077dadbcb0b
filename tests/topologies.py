"""TPUs that are not there: libtpu compiles for any of them on any machine; no TPU is used."""

import functools
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
