"""One example over up to 1,024 chips that are not there: what is sent, what overlaps, and what fits.

    python -m benchmarks scale                       TPU v5p, and H200 where XLA's CUDA compiler is installed
    python -m benchmarks scale --on tpu --chips 8    one of them, on so many chips
    python -m benchmarks scale --json FILE

A causal layer, and a training step of a decoder of `LAYERS` of them, rematerialised layer by layer, are
compiled ahead of time with the tokens of one example over all chips. Of the layer, whose keys and values go
round a ring, we count the collectives, and the bytes that a chip sends beside the formula: in every turn the
keys and values of a shard, and in the gradient these and their float32 gradients, which then go home. Of the
step we read the memory at two lengths; it grows linearly with the tokens of a chip, so that two give the
longest context that fits.

B batch 1   T tokens of all chips   P chips
"""

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import gpu_cards
from mha_jax import Causal, MultiHeadAttention, dot_product_attention
from mha_jax.sharding import Sharded

TOKENS = PartitionSpec(None, "context")


class Model(NamedTuple):
    """Sizes of a decoder; by default those of Llama 3's 8B, whose layers are repeated.

    Source: Grattafiori et al. 2024, arXiv:2407.21783, table 3.
    """

    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14_336
    layers: int = 32


class Fleet(NamedTuple):
    """Chips of a kind: by how many, the topology that the compiler knows, and bytes of one's memory."""

    name: str
    platform: str
    topologies: dict[int, str]
    memory: float


FLEETS = {
    "tpu": Fleet(
        *("TPU v5p", "tpu"),
        {8: "v5p:2x2x2", 64: "v5p:4x4x4", 256: "v5p:8x8x4", 1024: "v5p:8x8x16"},
        95e9,
    ),
    "gpu": Fleet("H200", "cuda", {8: "1x1x8", 64: "1x8x8", 256: "1x32x8", 1024: "1x128x8"}, 141e9),
}


def mesh_of(fleet: Fleet, chips: int) -> Mesh:
    """Return a mesh of one axis, context, of chips that only compile."""
    if fleet.platform == "tpu":
        from jax.experimental import topologies

        found = topologies.get_topology_desc(
            platform="tpu", topology_name=fleet.topologies[chips]
        ).devices
    else:
        found = gpu_cards.devices(fleet.name, fleet.topologies[chips])
    return Mesh(np.array(found), ("context",), axis_types=(AxisType.Auto,))


# ---- what is compiled ---------------------------------------------------------------------------


def attention(model: Model, mesh: Mesh, tokens: int, gradient: bool) -> Any:
    """Compile causal attention by a ring, or it and its gradients, with so many tokens a chip."""
    place, size = NamedSharding(mesh, TOKENS), model.width // model.heads
    q, k, v = (
        jax.ShapeDtypeStruct((1, tokens * mesh.size, n, size), jnp.bfloat16, sharding=place)
        for n in (model.heads, model.kv_heads, model.kv_heads)
    )

    def attend(q, k, v):
        ring = Sharded(strategy="ring")
        return dot_product_attention(q, k, v, mask=Causal(), backend=ring)

    def both(q, k, v):
        return jax.vjp(attend, q, k, v)[1](q)

    return jax.jit(both if gradient else attend).lower(q, k, v).compile()


class Layer(nn.Module):
    """A decoder's layer: attention, then a gated feed-forward layer, each after a norm."""

    model: Model

    @nn.compact
    def __call__(self, x, _):
        m, norm = self.model, nn.RMSNorm
        attend = MultiHeadAttention(
            num_heads=m.heads,
            key_dim=m.width // m.heads,
            num_kv_heads=m.kv_heads,
            use_bias=False,
            backend=Sharded(strategy="ring"),
        )
        y = norm(name="before_attention")(x)
        x = x + attend(y, y, use_causal_mask=True)
        y = norm(name="before_feed_forward")(x)
        dense = [nn.Dense(m.hidden, use_bias=False, name=name) for name in ("gate", "inner")]
        y = nn.silu(dense[0](y)) * dense[1](y)
        return x + nn.Dense(m.width, use_bias=False, name="outer")(y), None


def training(model: Model, mesh: Mesh, tokens: int) -> Any:
    """Compile a training step with Adam: parameters and moments cut over all chips, activations by tokens."""
    layers = nn.scan(
        nn.remat(Layer),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=model.layers,
    )(model)
    x = jax.ShapeDtypeStruct((1, tokens * mesh.size, model.width), jnp.bfloat16)
    small = jnp.zeros((1, 2, model.width), jnp.float32)
    params = jax.eval_shape(lambda: layers.init(jax.random.key(0), small, None)["params"])
    optimizer = optax.adam(1e-4)

    def step(params, moments, x):
        def loss(params):
            half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
            y, _ = layers.apply({"params": half}, x, None)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    def placed(a):
        whole = [i for i, n in enumerate(a.shape) if i and n % mesh.size == 0]
        cut = max(whole, key=lambda i: a.shape[i], default=None)
        spec = PartitionSpec(*("context" if i == cut else None for i in range(len(a.shape))))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(placed, (params, jax.eval_shape(optimizer.init, params)))
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, TOKENS))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*state, x).compile()


# ---- what is read off -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a compiled program sends.

    Args:
      kinds: Of the collectives, once for every place in the program.
      sent: Bytes that a chip sends by permutes, turns of loops multiplied.
      overlaps: For every loop of turns, whether permutes start before its product and end after it. The way
        home of gradients, one in so many turns, is none.
    """

    kinds: tuple[str, ...]
    sent: int
    overlaps: tuple[bool, ...]


_COLLECTIVE = re.compile(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(")
_SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_PRODUCT = re.compile(r" (conditional|custom-call|while|dot|convolution|fusion)\(")


def traffic(text: str) -> Traffic:
    """Read what a program sends off its text, scheduled."""
    bodies = dict(_computations(text))
    entry = next(name for name, lines in bodies.items() if lines[0].startswith("ENTRY"))
    permutes = [name for name, lines in bodies.items() if _permuted(lines)]
    return Traffic(
        tuple(_COLLECTIVE.findall(text)),
        _sent(bodies, entry),
        tuple(_overlaps(bodies[name]) for name in permutes if _is_turn(bodies[name], permutes)),
    )


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    for part in text.split("\n\n"):
        lines = part.strip().splitlines()
        if found := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", lines[0] if lines else ""):
            yield found[1], lines


def _permuted(lines: list[str]) -> list[str]:
    return [line for line in lines if re.search(r" collective-permute(-start)?\(", line)]


def _bytes(line: str) -> int:
    """Return the bytes that a permute sends: those of its result, a tuple with other things in a start."""
    result = re.split(r" collective-permute(?:-start)?\(", line)[0].split(" = ", 1)[1]
    arrays = [
        _SIZES[kind] * int(np.prod([int(n) for n in sizes.split(",") if n]))
        for kind, sizes in re.findall(r"\b(f32|bf16|f16|s32|u32|pred|s8|u8)\[([\d,]*)\]", result)
    ]
    real = [n for n in arrays if n > 8]  # a start holds operands, results and counters
    return sum(real) // (2 if "-start(" in line else 1)


def _is_turn(lines: list[str], permutes: list[str]) -> bool:
    """Say whether a computation is the body of a loop of turns: no entry, no loop over pieces."""
    loops = re.findall(r"\bbody=%?([\w.-]+)", "\n".join(lines))
    return not lines[0].startswith("ENTRY") and not set(loops) & set(permutes)


def _sent(bodies: dict[str, list[str]], name: str) -> int:
    total = sum(map(_bytes, _permuted(bodies[name])))
    for line in bodies[name]:
        found = re.search(r"\bwhile\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line)
        if found:
            ends = [*bodies[found[1]], line]  # what a counter is compared with; on GPUs it is said
            turns = re.findall(
                r' s32\[\]\S* constant\((\d+)\)|known_trip_count":{"n":"(\d+)"', "\n".join(ends)
            )
            total += max((int(a or b) for a, b in turns), default=1) * _sent(bodies, found[2])
        for other in re.findall(
            r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.-]+)", line
        ):
            if other in bodies:
                total += _sent(bodies, other)
    return total


def _overlaps(lines: list[str]) -> bool:
    """Say whether the largest product of a loop body stands between all starts and all ends."""
    starts = [i for i, line in enumerate(lines) if " collective-permute-start(" in line]
    ends = [i for i, line in enumerate(lines) if " collective-permute-done(" in line]
    work = [i for i, line in enumerate(lines) if _PRODUCT.search(line)]
    return bool(starts) and any(max(starts) < i < min(ends) for i in work)


def formula(model: Model, tokens: int, chips: int, gradient: bool) -> int:
    """Return the bytes that a chip sends: keys and values every turn; their gradients with them, and home."""
    shard = 2 * tokens * model.kv_heads * (model.width // model.heads)
    forward = chips * shard * 2
    # The keys and values again with their float32 gradients, which are bfloat16 on their way home.
    return forward if not gradient else 2 * forward + chips * shard * 4 + shard * 2


def memory(program: Any) -> int:
    """Return the bytes that a program needs on a chip."""
    found = program.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def longest(fleet: Fleet, measured: dict[int, int]) -> int:
    """Return the tokens of a chip that fit, from its bytes at two numbers of tokens."""
    (few, low), (many, high) = sorted(measured.items())
    each = (high - low) / (many - few)
    return int((fleet.memory - (low - few * each)) / each) // 128 * 128


def rows(fleet: Fleet, model: Model, chips: int, tokens: int) -> dict[str, Any]:
    """Return what is said of one number of chips."""
    mesh = mesh_of(fleet, chips)
    line: dict[str, Any] = {"on": fleet.name, "chips": chips, "tokens": tokens}
    for name, gradient in (("forward", False), ("gradient", True)):
        found = traffic(attention(model, mesh, tokens, gradient).as_text())
        line[name] = dataclasses.asdict(found) | {
            "formula": formula(model, tokens, chips, gradient)
        }
    measured = {n: memory(training(model, mesh, n)) for n in (tokens, 2 * tokens)}
    line |= {"memory": measured, "fits": longest(fleet, measured) * chips}
    return line


def said(line: dict[str, Any]) -> str:
    """Return a line of the table."""
    parts = [f"{line['on']:8s}{line['chips']:6d}"]
    for name in ("forward", "gradient"):
        one = line[name]
        gathers = sum(kind == "all-gather" for kind in one["kinds"])
        parts.append(
            f"{name}: {one['sent'] / 1e9:.3f} GB sent, formula {one['formula'] / 1e9:.3f}, "
            f"{gathers} gathers, {'overlapped' if all(one['overlaps']) else 'not overlapped'}"
        )
    each = {n: f"{x / 1e9:.1f} GB" for n, x in line["memory"].items()}
    parts.append(f"step: {each}, longest context {line['fits']:,}")
    return "; ".join(parts)


def missing(fleet: Fleet) -> str | None:
    """Say what is not installed, or return None."""
    if fleet.platform == "cuda":
        return gpu_cards.missing()
    import importlib.util

    there = importlib.util.find_spec("libtpu") is not None
    return None if there else "libtpu is not installed: pip install libtpu"


def main(arguments: list[str], out: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run the command line; return the lines of the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    parser.add_argument("--on", nargs="+", choices=FLEETS, default=list(FLEETS))
    parser.add_argument("--chips", nargs="+", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=8192, help="of a chip, in the layer (8192)")
    for name, value in Model()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    model = Model(**{name: getattr(options, name) for name in Model._fields})
    found = []
    for fleet in (FLEETS[name] for name in options.on):
        why = missing(fleet)
        if why is not None:
            out(f"{fleet.name}: {why}")
            continue
        for chips in options.chips:
            found.append(rows(fleet, model, chips, options.tokens))
            out(said(found[-1]))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1))
    return found
