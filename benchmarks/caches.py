"""What a step of decoding costs, by what its cache holds and by how it is read.

    python -m benchmarks caches
    python -m benchmarks caches --capacity 8192 --batch 8

Seconds of a step, medians of rounds in turns; 8 heads of 64. A rolling cache that was given 10, 1,000 and
100,000 tokens; a cache that holds 64 tokens, and all that it can; attention to a full one by
`dot_product_attention(cache=)` and by hand, its keys and values turned to what the function takes.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mha_jax as mj
from benchmarks import machine, report
from benchmarks.timer import repeated, sample, turns

HEADS, SIZE = 8, 64


class Step:
    """A step of decoding, one token over and over; its cache is donated, so that it is written in place."""

    def __init__(self, cache: mj.Cache, step: Callable[[mj.Cache, jax.Array], Any]):
        self.cache = cache
        self.token = jnp.ones((cache.keys.shape[0], 1, HEADS, SIZE))

        def again(cache, token):
            out, grown = step(cache, token)
            return out, dataclasses.replace(grown, count=cache.count, oldest=cache.oldest)

        self.step = jax.jit(again, donate_argnums=0)

    def __call__(self) -> None:
        out, self.cache = self.step(self.cache, self.token)
        out.block_until_ready()


def appended(cache: mj.Cache, x: jax.Array) -> Any:
    """Append and attend where the cache lies."""
    mask = mj.Window(cache.capacity - 1, 0) if cache.rolling else mj.Causal()
    return mj.dot_product_attention(x, x, x, mask=mask, cache=cache)


def by_hand(cache: mj.Cache, x: jax.Array) -> Any:
    """Append, and attend to keys and values as the function takes them without a cache."""
    cache = cache.append(x, x)
    tokens = mj.Tokens(1, index=cache.count[:, None] - 1)
    k, v = (a.swapaxes(1, 2) for a in (cache.keys, cache.values))
    mask = mj.Causal() & mj.ValidKeys()
    options = {"query_tokens": tokens, "key_tokens": cache.tokens, "mask": mask}
    return mj.dot_product_attention(x, k, v, **options), cache


def steps(batch: int, capacity: int, window: int) -> dict[str, Step]:
    """Return the steps by name."""

    def cache(count: int, size: int, rolling: bool = False) -> mj.Cache:
        held = mj.Cache.empty(batch, size, HEADS, SIZE, rolling=rolling)
        counts = jnp.full((batch,), count, jnp.int32)
        oldest = jnp.maximum(counts - size, 0) if rolling else None
        return dataclasses.replace(held, count=counts, oldest=oldest)

    rolling = {f"rolling, {n:,} tokens before": n for n in (10, 1_000, 100_000)}
    found = {name: Step(cache(n, window, True), appended) for name, n in rolling.items()}
    for size in (capacity // 8, capacity // 4, capacity // 2, capacity):
        for count in (min(64, size // 2), size - 1):
            found[f"capacity {size:,}, {count:,} held"] = Step(cache(count, size), appended)
    found[f"capacity {capacity:,}, by hand"] = Step(cache(capacity - 1, capacity), by_hand)
    return found


def measure(found: dict[str, Step], repeats: int, calls: int) -> dict[str, float]:
    """Return the median seconds of every step, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for step in found.values():
        step()
    for _, name in turns(dict.fromkeys(found, repeats)):
        times[name].append(sample(repeated(found[name]), calls).wall)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks caches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, text in (
        ("batch", 1, "rows"),
        ("capacity", 8192, "tokens of the largest cache"),
        ("window", 1024, "tokens of a rolling cache"),
        ("repeats", 9, "rounds of timing"),
        ("calls", 20, "steps of a timed sample"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value < (16 if name in ("capacity", "window") else 1):
            parser.error(f"--{name} is too small: {value}")
    return options


def main(arguments: list[str]) -> dict[str, float]:
    """Run the command line; return the medians."""
    options = parse(arguments)
    print(machine.sentence(machine.facts()), flush=True)
    found = steps(options.batch, options.capacity, options.window)
    medians = measure(found, options.repeats, options.calls)
    print(report.table(["step", "median"], [[x, report.seconds(t)] for x, t in medians.items()]))
    return medians


if __name__ == "__main__":
    main(sys.argv[1:])
