"""The peers, each in a file that imports its library; a library that is missing is named."""

import dataclasses
import importlib
from typing import Any

# Module of this package, the distribution to install, and the names it brings.
MODULES = {
    "ours": ("mha_jax", ("mha_jax",)),
    "linen": ("flax", ("linen",)),
    "nnx": ("flax", ("nnx",)),
    "keras_layer": ("keras", ("keras",)),
    "jax_nn": ("jax", ("jax.nn",)),
    "tokamax_op": ("tokamax", ("tokamax xla", "tokamax xla_chunked")),
    "haiku_layer": ("dm-haiku", ("haiku",)),
    "equinox_layer": ("equinox", ("equinox",)),
    "torch_layer": ("torch", ("torch sdpa", "torch mha")),
    "products": ("jax", ("products alone",)),
}
NAMES = tuple(name for _, names in MODULES.values() for name in names)


@dataclasses.dataclass(frozen=True)
class Absent:
    """A peer that is not here, and why."""

    name: str
    framework: str
    reason: str


def load(names: tuple[str, ...] = NAMES) -> tuple[list[Any], list[Absent]]:
    """Import the named peers.

    Returns:
      The peers, in the order of `NAMES`, and those whose library cannot be imported.
    """
    peers, absent = [], []
    for module, (distribution, brings) in MODULES.items():
        wanted = [name for name in brings if name in names]
        if not wanted:
            continue
        try:
            found = importlib.import_module(f"benchmarks.peers.{module}").PEERS
        except (ImportError, AttributeError, TypeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"not importable: {first} (pip install {distribution})"
            framework = "torch" if module == "torch_layer" else "jax"
            absent += [Absent(name, framework, reason) for name in wanted]
            continue
        peers += [peer for peer in found if peer.name in wanted]
    return peers, absent
