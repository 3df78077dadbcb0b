"""How a run lies on devices: the batch, the heads and the tokens over a mesh, of one process or of many.

`config.mesh`, "data:4,model:2,context:8" say, names the axes and their sizes: `data` cuts the batch, `model`
the heads and the inner width of feed-forward layers, `context` the tokens of an example. It says where things
are and nothing else: losses are those of one device up to rounding, dropout bits exactly.

Every process makes the whole batch, a function of the step, and puts there what its own devices hold. Figures
of validation are those of the whole parameters on one device of each process.
"""

import math
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mha_jax.errors import ConfigError
from mha_jax.sharding import partition_specs

AXES = ("data", "model", "context")
# Feed-forward layers, whose inner width `model` cuts.
INNER = {
    ("inner", "kernel"): PartitionSpec(None, "model"),
    ("inner", "bias"): PartitionSpec("model"),
    ("outer", "kernel"): PartitionSpec("model", None),
}


def parse(text: str) -> dict[str, int]:
    """Read the sizes of a mesh; axes that are not named have size 1.

    Raises:
      ConfigError: It is no list of axes and sizes.

    >>> parse("model:2,data:4")
    {'data': 4, 'model': 2, 'context': 1}
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, colon, size = part.strip().partition(":")
        if not colon or name not in AXES or name in found or not size.isdecimal() or size == "0":
            raise ConfigError(
                f"config.mesh={text!r} cannot be read at {part!r}. Expected axes among {', '.join(AXES)}, "
                "each once, with sizes from 1 on: --config.mesh=data:4,model:2 for 8 devices."
            )
        found[name] = int(size)
    return {name: found.get(name, 1) for name in AXES}


class Layout:
    """How the arrays of a run lie on the devices that `config.mesh` names; on one where it is empty.

    Args:
      config: The experiment.

    Attributes:
      mesh: With the axes data, model and context; None for one device.

    Raises:
      ConfigError: The devices are more or fewer, or the batch does not divide.
    """

    def __init__(self, config: Any):
        self.text = config.get("mesh") or ""
        self.mesh = None
        count, processes = jax.device_count(), jax.process_count()
        if not self.text:
            if processes > 1:
                raise ConfigError(
                    f"{processes} processes with {count} devices together train one model, but config.mesh "
                    f"is empty. Say how they share it: --config.mesh=data:{count}, for example."
                )
            return
        sizes = parse(self.text)
        wanted = math.prod(sizes.values())
        if wanted != count:
            raise ConfigError(
                f"config.mesh={self.text!r} is for {wanted} devices, and there are {count}, of {processes} "
                f"{'process' if processes == 1 else 'processes'}. Let the sizes multiply to {count}."
            )
        if config.batch_size % sizes["data"]:
            raise ConfigError(
                f"config.batch_size={config.batch_size} does not divide over data:{sizes['data']} of "
                f"config.mesh={self.text!r}. Expected a multiple of {sizes['data']}."
            )
        kinds = (AxisType.Auto,) * len(AXES)
        self.mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds)

    def _at(self, *spec: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))  # type: ignore[arg-type]

    def of_state(self, state: Any, optimizer: optax.GradientTransformation) -> Any:
        """Return the shardings of {"params", "optimizer"}, given its shapes; None for one device.

        Moments lie as the parameters that they belong to.

        Raises:
          ConfigError: An array does not divide.
        """
        if self.mesh is None:
            return None
        params = jax.tree_util.tree_map_with_path(self._of_param, *self._specs(state["params"]))
        moments = optax.tree_map_params(
            optimizer,
            lambda _, place: place,
            state["optimizer"],
            params,
            transform_non_params=lambda _: self._at(),
        )
        return {"params": params, "optimizer": moments}

    def _specs(self, params: Any) -> tuple[Any, Any]:
        return params, partition_specs(params, {"heads": "model", "kv_heads": "model"})

    def _of_param(self, path: Any, array: Any, spec: PartitionSpec) -> NamedSharding:
        names = tuple(key.key for key in path)
        spec = INNER.get(names[-2:], spec)
        for size, axis in zip(array.shape, spec):
            if axis is not None and size % self.mesh.shape[axis]:  # type: ignore[union-attr]
                raise ConfigError(
                    f"config.mesh={self.text!r} cannot cut {'/'.join(names)} {list(array.shape)}: {size} "
                    f"does not divide over {axis}:{self.mesh.shape[axis]}. "  # type: ignore[union-attr]
                    "Expected a size that divides the heads and the inner width of the model."
                )
        return NamedSharding(self.mesh, spec)  # type: ignore[arg-type]

    def placed(self, batch: Any) -> Any:
        """Put a batch of NumPy arrays, the same in every process, on the devices."""
        if self.mesh is None:
            return batch
        there = self._at("data")
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, there, lambda part: x[part]), batch
        )

    def cut(self, inputs: Any) -> Any:
        """Cut what a model takes in along the batch and, where it divides, the tokens; inside `jax.jit`.

        Attention pads tokens that do not divide; elsewhere every device then has all of them.
        """
        if self.mesh is None:
            return inputs
        parts = self.mesh.shape["context"]

        def one(x):
            tokens = "context" if x.ndim > 1 and x.shape[1] % parts == 0 else None
            return jax.lax.with_sharding_constraint(x, self._at("data", tokens))

        return jax.tree.map(one, inputs)

    def whole(self, tree: Any) -> Any:
        """Return arrays whole on one device of this process."""
        if self.mesh is None:
            return tree
        everywhere = jax.jit(lambda x: x, out_shardings=self._at())(tree)
        return jax.tree.map(lambda x: x.addressable_data(0), everywhere)
