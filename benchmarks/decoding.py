"""Time greedy decoding with a cache beside two ways without: one call of the model a symbol, which keeps
nothing, and the decoder over the whole prefix for every symbol, which keeps the encoder's output.

    python -m benchmarks decoding                          1,000 words at once, 12 symbols each
    python -m benchmarks decoding --batch 250              the same words in four batches
    python -m benchmarks decoding --length 48 --words 128 --batch 64
    python -m benchmarks decoding --workdir=workdir/g2p    a trained speller, held-out words

Without --workdir the model has the sizes of configs/g2p.py and random parameters, and no target
ever ends: every step up to the length is taken. With it, targets end where the speller ends them;
words of similar length share a batch. All ways run in turn in one process on the same batches; ratios
are of medians.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.timer import repeated, sample, turns
from mha_jax.models.transformer import Config, Transformer
from mha_jax.train.decoding import greedy

CONFIG = Config(128, 4, 512, encoder_layers=2, decoder_layers=2, dropout=0.0, norm_first=True)
LETTERS, SYMBOLS = 27, 42  # of the spelling task
PAD, BEGIN, END, NEVER = 0, 1, 2, -1


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and what it shall decode, in batches of one shape."""

    model: Transformer
    params: Any
    sources: list[np.ndarray]
    length: int
    end: int

    def run(self, decode: Callable[..., jax.Array]) -> list[np.ndarray]:
        """Decode every batch, one after the other."""
        marks = {"length": self.length, "begin": BEGIN, "end": self.end}
        return [np.asarray(decode(self.model, self.params, s, **marks)) for s in self.sources]

    def encode(self) -> None:
        """Run the encoder alone on every batch."""
        for source in self.sources:
            jax.block_until_ready(_encode(self.model, self.params, source))


@partial(jax.jit, static_argnums=0)
def _encode(model: Transformer, params: Any, source: jax.Array) -> jax.Array:
    return model.apply({"params": params}, source, source != PAD, method="encode")  # type: ignore[return-value]


def write(state: Any, logits: jax.Array, end: int) -> Any:
    """Write the most probable symbol of the logits `[B, L, W]` after the place of a state."""
    place, targets, running = state
    here = jax.lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False)
    symbol = here.at[:, jnp.array([PAD, BEGIN])].set(-jnp.inf).argmax(axis=-1)
    symbol = jnp.where(running, symbol, PAD).astype(targets.dtype)
    targets = jax.lax.dynamic_update_index_in_dim(targets, symbol, place + 1, axis=1)
    return place + 1, targets, running & (symbol != end)


def begun(source: jax.Array, length: int) -> Any:
    """Return the place, the targets and which of them have not ended, before the first symbol."""
    targets = jnp.full((len(source), length + 1), PAD, source.dtype).at[:, 0].set(BEGIN)
    return 0, targets, jnp.ones(len(source), bool)


@partial(jax.jit, static_argnames=("model", "length", "begin", "end"))
def uncached_greedy(
    model: Transformer, params: Any, source: jax.Array, *, length: int, begin: int, end: int
) -> jax.Array:
    """Decode as `greedy` does, by the definition: the decoder over all places for every symbol."""
    mask = source != PAD
    memory = model.apply({"params": params}, source, mask, method="encode")

    def unfinished(state):
        return (state[0] < length) & state[2].any()

    def step(state):
        targets = state[1][:, :-1]
        logits = model.apply({"params": params}, targets, memory, mask, method="decode")
        return write(state, logits, end)  # type: ignore[arg-type]

    return jax.lax.while_loop(unfinished, step, begun(source, length))[1][:, 1:]


def forgetful_greedy(
    model: Transformer, params: Any, source: jax.Array, *, length: int, begin: int, end: int
) -> jax.Array:
    """Decode as `greedy` does, by a call of the whole model for every symbol."""
    state = begun(source, length)
    while state[0] < length and state[2].any():
        state = _call_and_write(model, params, source, state, end)
    return state[1][:, 1:]


@partial(jax.jit, static_argnames=("model", "end"))
def _call_and_write(model: Transformer, params: Any, source: Any, state: Any, end: int) -> Any:
    logits = model.apply({"params": params}, source, state[1][:, :-1], source != PAD)
    return write(state, logits, end)  # type: ignore[arg-type]


def random_work(words: int, batch: int, length: int) -> Work:
    """Return a model of the speller's sizes whose targets never end; sources of `length` - 1."""
    model, draw = Transformer(SYMBOLS, LETTERS, CONFIG), np.random.default_rng(0)
    sources = [
        draw.integers(1, LETTERS, (batch, length - 1)).astype(np.int32)
        for _ in range(-(-words // batch))
    ]
    params = jax.jit(model.init)(jax.random.key(0), sources[0], sources[0])["params"]
    return Work(model, params, sources, length, NEVER)


def trained_work(words: int, batch: int, workdir: pathlib.Path) -> Work:
    """Return a trained speller and held-out words, sorted by length as `pronounce` does."""
    from mha_jax.train import cmudict, g2p, predict

    model, params, _ = predict.load(workdir)
    entries = {w: p for w, p in cmudict.read_words().items() if g2p.is_usable(w, p)}
    chosen = sorted(list(g2p.split(entries)[2])[:words], key=len)
    chosen += chosen[-1:] * (-len(chosen) % batch)
    sources = [g2p.encode_letters(chosen[i : i + batch]) for i in range(0, len(chosen), batch)]
    return Work(model, params, sources, g2p.LONGEST + 1, END)


def measure(work: Work, repeats: int) -> dict[str, float]:
    """Return the median seconds of every way to decode and of the encoder alone, timed in turn."""
    ways: dict[str, Callable[[], Any]] = {
        "nothing kept": lambda: work.run(forgetful_greedy),
        "encoder kept": lambda: work.run(uncached_greedy),
        "with a cache": lambda: work.run(greedy),
        "encoder alone": work.encode,
    }
    for run in ways.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in turns(dict.fromkeys(ways, repeats)):
        times[name].append(sample(repeated(ways[name])).wall)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def agreement(work: Work) -> float:
    """Return the share of targets on which every way agrees wholly."""
    ways = zip(*(work.run(way) for way in (forgetful_greedy, uncached_greedy, greedy)))
    return float(np.mean([((a == c) & (b == c)).all(axis=1) for a, b, c in ways]))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--words", type=int, default=1000, help="targets to decode (1000)")
    parser.add_argument("--batch", type=int, default=1000, help="targets of a batch (1000)")
    parser.add_argument("--length", type=int, default=12, help="most symbols of a target (12)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing (5)")
    parser.add_argument("--workdir", type=pathlib.Path, help="of a training run of configs/g2p.py")
    options = parser.parse_args(arguments)
    for name in ("words", "batch", "length", "repeats"):
        least = 2 if name == "length" else 1
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(options, name)}")
    return options


def main(arguments: list[str]) -> dict[str, float]:
    """Run the command line; return the medians."""
    options = parse(arguments)
    if options.workdir is None:
        work = random_work(options.words, options.batch, options.length)
    else:
        work = trained_work(options.words, options.batch, options.workdir)
    print(machine.sentence(machine.facts()), flush=True)
    rows, columns = len(work.sources) * options.batch, work.sources[0].shape[1]
    print(f"{rows} targets of at most {work.length} symbols, sources of {columns}")
    seconds = measure(work, options.repeats)
    for name, value in seconds.items():
        print(f"{name:>16} {value:8.3f} s")
    nothing, kept, new, encoder = seconds.values()
    print("the cache is faster:")
    print(f"{'than nothing':>16} {nothing / new:8.1f} times")
    print(f"{'than the encoder':>16} {kept / new:8.1f} times")
    print(f"{'in the decoder':>16} {(kept - encoder) / (new - encoder):8.1f} times")
    print(f"{'same targets':>16} {agreement(work):8.1%}")
    return seconds


if __name__ == "__main__":
    main(sys.argv[1:])
