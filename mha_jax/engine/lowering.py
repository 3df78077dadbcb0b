"""`by_platform`: run the function that suits the platform a program is lowered for.

`jax.default_backend()` says where this process runs, which is wrong for programs compiled ahead of
time or exported. `jax.lax.platform_dependent` knows better, but traces every branch every time.
Here the choice is an operation of its own that is traced for a platform when it is lowered for it,
so that a kernel costs nothing where it does not run.

`turn` keeps kernels apart that Pallas interprets in one program.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.core
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# platform -> function of flat arrays; the same object at every call, since traces are cached by it.
ByPlatform = Callable[[str], Callable[..., list[jax.Array]]]


def default_platform() -> str:
    """Return the platform of this process by the name that lowering uses."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def by_platform(choose: Callable[[str], Callable], result: Any, *args: Any) -> Any:
    """Run `choose(platform)(*args)` for the platform lowered for.

    Args:
      choose: Returns the function of a platform; every one must return `result`. It is hashed, and
        so are the static fields of `args`.
      result: What the function returns, as arrays or `jax.ShapeDtypeStruct`s.
      *args: Pytrees of arrays.

    Returns:
      What the function returns. It has no derivative: give it one with `jax.custom_jvp`.

    >>> def choose(platform):
    ...     return lambda x: x + len(platform)
    >>> one = jax.numpy.int32(1)
    >>> int(by_platform(choose, one, one))
    4
    """
    leaves, tree = jax.tree.flatten(args)
    flat = _flat(choose, tree)
    out_leaves, out_tree = jax.tree.flatten(result)
    types = tuple((x.shape, x.dtype) for x in out_leaves)
    return jax.tree.unflatten(out_tree, by_platform_p.bind(*leaves, flat=flat, types=types))


@lru_cache(maxsize=1024)
def _flat(choose: Callable[[str], Callable], tree: Any) -> ByPlatform:
    @lru_cache(maxsize=len(PLATFORMS))
    def flat(platform: str) -> Callable[..., list[jax.Array]]:
        function = choose(platform)
        return jax.jit(lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    return flat


@lru_cache(maxsize=1024)
def _mapped(flat: ByPlatform, axes: tuple[int | None, ...], size: int) -> ByPlatform:
    @lru_cache(maxsize=len(PLATFORMS))
    def mapped(platform: str) -> Callable[..., list[jax.Array]]:
        return jax.jit(jax.vmap(flat(platform), in_axes=axes, axis_size=size))

    return mapped


def _run(
    *leaves: Any, flat: ByPlatform, types: Any, platform: str | None = None
) -> list[jax.Array]:
    return flat(platform or default_platform())(*leaves)


def _batch(leaves: Any, axes: Any, *, flat: ByPlatform, types: Any) -> tuple[list, list[int]]:
    (size,) = {x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None}
    types = tuple(((size, *shape), dtype) for shape, dtype in types)
    out = by_platform_p.bind(*leaves, flat=_mapped(flat, tuple(axes), size), types=types)
    return out, [0] * len(types)


def _types(*_: Any, types: Any, **__: Any) -> list[Any]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in types]


def _is_ordered(effect: Any) -> bool:
    return isinstance(turn(), type(effect))


def ordered_effects(jaxpr: Any) -> list[Any]:
    """Return the ordered effects of a pass in a `custom_partitioning`: an interpreted kernel has some."""
    calls = [eqn.params["call"] for eqn in jaxpr.eqns if "call" in eqn.params]
    return list({effect for call in calls for effect in call.effects if _is_ordered(effect)})


@lru_cache(maxsize=1)
def turn() -> Any:
    """Return the effect that an operation has instead of the ordered effects of its kernel.

    Pallas's TPU interpreter has one memory, so what it runs must come one after the other. JAX sees to
    that where it sees the effect, but allows that of `io_callback` under no custom derivative, and that
    of `jax.debug.callback` on one device only. This one is both, and allowed wherever one of them is.
    """

    def kinds(callback: Callable[..., Any]) -> list[type]:
        return [type(effect) for effect in jax.make_jaxpr(callback)().effects]

    kinds_of_both = (
        *kinds(lambda: jax.debug.callback(lambda: None, ordered=True)),
        *kinds(lambda: io_callback(lambda: None, None, ordered=True)),
    )
    return type("Turn", kinds_of_both, {"__str__": lambda _: "Turn"})()


by_platform_p = Primitive("by_platform")
by_platform_p.multiple_results = True
by_platform_p.def_impl(_run)
by_platform_p.def_abstract_eval(_types)
batching.primitive_batchers[by_platform_p] = _batch
for _platform in PLATFORMS:
    _lower = mlir.lower_fun(partial(_run, platform=_platform), multiple_results=True)
    mlir.register_lowering(by_platform_p, _lower, platform=_platform)
