"""Attention on many devices: the axes of a call on a mesh, and the shards that backends run on.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size   W words of a random key

Attention is independent for every example and every head, so a shard of B and of N is a call of its own:
no pass needs data of another shard, and no backend knows that it runs on one. A kernel and a loop over
groups of heads are closed to XLA's partitioner, which would gather their inputs; `Sharded` opens them:

* axes of a mesh that are explicit stand in the type of q: they are read off it while tracing;
* all others are decided when the program is partitioned, from the shardings that XLA has found;
* where XLA cannot be asked (TPU, and inside a `jax.shard_map` over a part of the mesh), the axes of the
  mesh are known by their names: `Sharded(batch=..., heads=...)` gives them, common names are the default.

The tokens of one example stay on one device. Where K is no multiple of the head axis, keys and values are
held by every device of it, and each takes the key-value head that its query heads read.

Source: Shoeybi et al. 2019, arXiv:1909.08053 (heads over devices); Xu et al. 2021, arXiv:2105.04663 and the
Shardy documentation (propagation of shardings by factors).
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from mha_jax.attention.call import Call, Gradients, Output
from mha_jax.engine.attention_pass import Axes, Plan, bind, whole_call
from mha_jax.types import Array, Params


def specs(call: Call, axes: Axes) -> Call:
    """Return the PartitionSpec of every array of a checked call.

    >>> from mha_jax.attention.check import check
    >>> x = jnp.ones((4, 5, 2, 8))
    >>> tuple(specs(check(Call(x, x, x)), Axes(batch=("data",), heads=("model",))).q)
    ('data', None, 'model', None)
    """
    return jax.tree.map(lambda a, letters: axes.spec(letters, jnp.shape(a)), call, letters_of(call))


def letters_of(call: Call) -> Call:
    """Return the letter of every axis of every array of a call."""
    q_tokens, k_tokens, dropout = call.q_tokens, call.k_tokens, call.dropout
    letters: dict[str, Any] = {
        "q": "BTNH",
        "k": "BSKH",
        "v": "BSKV",
        "q_tokens": jax.tree.map(lambda _: "BT", q_tokens),
        "k_tokens": jax.tree.map(lambda _: "BS", k_tokens),
        "mask": jax.tree.map(lambda _: "BNTS", call.mask),
        "bias": None if call.bias is None else "BNTS",
    }
    if dropout is not None:
        starts: dict[str, Any] = {"batch_start": "", "head_start": ""}
        words = "W" * jnp.ndim(dropout.key)  # a key, or its words
        letters["dropout"] = dataclasses.replace(dropout, key=words, **starts)  # type: ignore[arg-type]
    return dataclasses.replace(call, **letters)


_OUTPUT = Output("BTNV", "BNT")  # type: ignore[arg-type]
_GRADIENTS = Gradients("BTNH", "BSKH", "BSKV", "BNTS")  # type: ignore[arg-type]


def _letters(value: Any) -> Any:
    """Return the letters of what goes into a pass or comes out of it."""
    if isinstance(value, Call):
        return letters_of(value)
    if isinstance(value, Output):
        return _OUTPUT
    letters: Any = (None if a is None else x for a, x in zip(value, _GRADIENTS))
    return Gradients(*letters)


# ---- the backend around a backend --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A backend that runs another one on every device's shard of the batch and of the heads.

    Args:
      backend: One with the three passes `forward`, `cotangent` and `tangent`.
      batch, heads: Names of the mesh axes that cut the batch and the heads, for where they cannot be
        read off the arrays: on TPU, and inside a `jax.shard_map` over a part of the mesh. Names that
        the mesh does not have are passed over.
    """

    backend: Any = None
    batch: tuple[str, ...] | None = None
    heads: tuple[str, ...] | None = None

    plain_autodiff: ClassVar[bool] = False

    def why_not(self, call: Call, platform: str) -> str | None:
        return self.backend.why_not(call, platform)

    def forward(self, call: Call) -> Output:
        return self._run("forward", _OUTPUT, call)

    def cotangent(self, call: Call, output: Output, cotangent: Output) -> Gradients:
        bias = None if call.bias is None else "BNTS"
        letters = _GRADIENTS._replace(bias=bias)  # type: ignore[arg-type]
        return self._run("cotangent", letters, call, output, cotangent)

    def tangent(self, call: Call, output: Output, direction: Gradients) -> Output:
        return self._run("tangent", _OUTPUT, call, output, direction)

    def _run(self, name: str, out_letters: Any, call: Call, *rest: Any) -> Any:
        if call.dropout is not None:
            words = dataclasses.replace(call.dropout, key=call.dropout.words())
            call = dataclasses.replace(call, dropout=words)
        args = (call, *rest)
        leaves, tree = jax.tree.flatten(args)
        leaves = [_as_array(x) for x in leaves]
        outputs, out_tree = jax.tree.flatten(out_letters)
        sizes = {"B": call.q.shape[0], "N": call.q.shape[2], "K": call.k.shape[2]}
        plan = Plan(
            *(self.backend, name, self.batch, self.heads, tree, out_tree),
            shared="" if call.bias is None else _broadcast(call.bias),
            sizes=tuple(sizes.items()),
            inputs=tuple(jax.tree.leaves(tuple(map(_letters, args)))),
            outputs=tuple(outputs),
        )
        run = _explicit(plan, leaves) or partial(bind, plan)
        return jax.tree.unflatten(out_tree, run(leaves))


def _broadcast(bias: Array) -> str:
    return "".join(letter for letter, size in zip("BN", bias.shape) if size == 1)


def _as_array(x: Any) -> Array:
    return jnp.asarray(x, jnp.int32) if isinstance(x, int) else jnp.asarray(x)


def _explicit(plan: Plan, leaves: list) -> Callable[[list], list[Array]] | None:
    """Return the pass cut along the explicit axes of the mesh in the arrays' types, if there are any."""
    types = [jax.typeof(x) for x in leaves]
    mesh = jax.sharding.get_abstract_mesh()
    mesh = types[0].sharding.mesh if mesh.empty else mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    lengths = {name: mesh.shape[name] for name, x in kinds.items() if x == AxisType.Explicit}
    if not lengths:
        return None
    some = AxisType.Auto in kinds.values()
    if some:
        inner = Sharded(plan.backend, plan.batch, plan.heads)
        plan = dataclasses.replace(plan, backend=inner)
    axes = plan.axes_of(types[0].sharding.spec, types[1].sharding.spec, lengths)
    function = plan.on_shard(axes)
    out_shapes = jax.eval_shape(
        whole_call(plan), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types)
    )
    inputs, outputs = plan.specs(axes, types, out_shapes)
    inner = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=inputs,
        out_specs=outputs,
        axis_names=set(lengths) if some else set(),
        check_vma=False,
    )

    def run(leaves):
        return inner(*(jax.sharding.reshard(x, spec) for x, spec in zip(leaves, inputs)))

    return run


# ---- parameters ---------------------------------------------------------------------------------


def logical_axes(params: Params) -> Any:
    """Return the names of the axes of every kernel and bias: "embed", "heads", "kv_heads", "kv".

    Args:
      params: Parameters of the layer, or of a model made of it, or their shapes.

    Returns:
      The tree of `params` with a tuple of names for every array, as long as its rank. "kv_heads" are
      key-value heads where they are fewer than query heads. Axes that have no name have None.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8, use_bias=False)
    >>> logical_axes(params)["attention_output"]
    {'kernel': ('heads', 'kv', 'embed')}
    """
    if not isinstance(params, Mapping):
        return (None,) * len(params.shape)
    if not {"query", "key", "value", "attention_output"} <= set(params):
        return {name: logical_axes(value) for name, value in params.items()}
    heads = params["query"]["kernel"].shape[1]
    shared = params["key"]["kernel"].shape[1] < heads
    keys = ("embed", "kv_heads" if shared else "heads", "kv")
    names = {"key": keys, "value": keys, "attention_output": ("heads", "kv", "embed")}

    def of(name: str, part: str, array: Any) -> tuple[str | None, ...]:
        known = names.get(name, ("embed", "heads", "kv"))
        if part == "bias":
            known = known[2:] if name == "attention_output" else known[1:]
        return (*known, *(None,) * (len(array.shape) - len(known)))

    return {
        name: {part: of(name, part, array) for part, array in weights.items()}
        for name, weights in params.items()
    }


def partition_specs(params: Params, rules: Mapping[str, Any]) -> Any:
    """Return the PartitionSpec of every kernel and bias.

    Args:
      params: As for `logical_axes`.
      rules: Mesh axis, or axes, for every name of `logical_axes`; names without one are not cut.

    Returns:
      The tree of `params` with a PartitionSpec for every array.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> tuple(partition_specs(params, {"heads": "model"})["query"]["kernel"])
    (None, 'model', None)
    """

    def spec(names):
        return PartitionSpec(*(None if name is None else rules.get(name) for name in names))

    return jax.tree.map(spec, logical_axes(params), is_leaf=lambda x: isinstance(x, tuple))


def with_logical_names(params: Params) -> Any:
    """Box every kernel and bias with its names, as `flax.linen.with_logical_partitioning` does.

    That function gives one tuple of names to every kernel that an initializer draws; here the output
    kernel and the biases have those of their own axes.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> with_logical_names(params)["query"]["bias"].names
    ('heads', 'kv')
    """
    return jax.tree.map(
        lambda array, names: nn.LogicallyPartitioned(array, names), params, logical_axes(params)
    )
