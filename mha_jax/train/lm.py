"""Causal language models of characters that see a sliding window, on text that Python carries.

The task "lm" trains a Transformer's, "decoder" one of today's: rotary positions, grouped heads, and caches
that roll where it writes.

The text is the language reference inside the standard library (`pydoc_data.topics`, what `help()`
shows), so its length and the result differ a little between Python versions. One topic in ten, by a
hash of its name, is held out.
"""

import pathlib
import zlib
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ConfigError
from mha_jax.models.decoder import CausalLM
from mha_jax.models.transformer import Config, LanguageModel
from mha_jax.train.data import endless
from mha_jax.train.losses import token_loss
from mha_jax.train.modern import Modern
from mha_jax.train.tasks import Batch
from mha_jax.types import ArrayLike

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = ALPHABET.index("?")


def read_topics() -> dict[str, str]:
    """Read the topics of Python's own help."""
    from pydoc_data.topics import topics

    return dict(topics)


def encode(text: str) -> np.ndarray:
    """Number characters; those outside ASCII become question marks."""
    codes = {character: code for code, character in enumerate(ALPHABET)}
    return np.array([codes.get(character, UNKNOWN) for character in text], np.int32)


def decode(codes: np.ndarray) -> str:
    """Give the characters of codes.

    >>> decode(encode("for x in y:"))
    'for x in y:'
    """
    return "".join(ALPHABET[code] for code in codes)


def cut(text: str, length: int) -> np.ndarray:
    """Cut a text into rows `[B, length + 1]` that overlap by one character."""
    codes = encode(text)
    rows = (len(codes) - 1) // length
    return np.stack([codes[i * length : (i + 1) * length + 1] for i in range(rows)])


class Characters:
    """The task "lm"; see the module docstring."""

    best = "validation_bits"

    def __init__(self, config: Any):
        train, held_out = [], []
        for name, text in read_topics().items():
            (held_out if zlib.crc32(name.encode()) % 10 == 0 else train).append(text)
        most = (len("".join(held_out)) - 1) // config.batch_size
        if config.length > most:
            raise ConfigError(
                f"config.length={config.length} with config.batch_size={config.batch_size} leaves no "
                f"whole batch of the text held out. Expected a length of at most {most}, or smaller batches."
            )
        self.held_out = cut("".join(held_out), config.length)
        text = cut("".join(train), config.length)
        self.data = f"{text.size:,} characters to learn from, {self.held_out.size:,} held out"
        self.batches = endless({"text": text}, config.batch_size, config.seed)
        self.model = self.make_model(config.model.to_dict())
        self.chunk = config.batch_size
        self.seed = config.seed
        self.bits = jax.jit(self._bits)

    def make_model(self, sizes: dict[str, Any]) -> LanguageModel | CausalLM:
        return LanguageModel(len(ALPHABET), Config(**sizes))

    def batch(self, step: int) -> Batch:
        return cast(Batch, self.batches[step])

    def inputs(self, batch: Batch) -> tuple[jax.typing.ArrayLike, ...]:
        return (batch["text"][:, :-1],)

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        return token_loss(outputs, batch["text"][:, 1:])

    def _bits(self, params: Any, text: jax.Array) -> jax.Array:
        outputs = self.model.apply({"params": params}, text[:, :-1])
        return self.loss(cast(jax.Array, outputs), {"text": text}) / jnp.log(2.0)

    def _mean_bits(self, params: Any, chunks: int | None = None) -> float:
        whole = len(self.held_out) // self.chunk
        parts = [
            self.bits(params, self.held_out[i * self.chunk : (i + 1) * self.chunk])
            for i in range(min(whole, chunks or whole))
        ]
        return float(jnp.stack(parts).mean())

    def validate(self, params: Any) -> dict[str, float]:
        return {"validation_bits": self._mean_bits(params, chunks=4)}

    def judge(self, params: Any, workdir: pathlib.Path) -> dict[str, float]:
        bits = self._mean_bits(params)
        begun = self.held_out[:1, :64]
        told = write_on(self.model, params, begun, 192, jax.random.key(self.seed))
        print(f"\n{decode(begun[0])}>>>{decode(np.asarray(told)[0, begun.shape[1] :])}")
        print(f"\nheld-out topics: {bits:.3f} bits a character")
        return {"bits": bits}

    def card(self) -> dict[str, Any]:
        return {"alphabet": ALPHABET}


class ModernCharacters(Characters):
    """The task "decoder"; see the module docstring."""

    def make_model(self, sizes: dict[str, Any]) -> CausalLM:
        return CausalLM(Modern(**sizes).decoder(len(ALPHABET)))


@partial(jax.jit, static_argnames=("model", "length"))
def write_on(
    model: LanguageModel | CausalLM,
    params: Any,
    begun: ArrayLike,
    length: int,
    key: jax.Array,
    temperature: float | jax.Array = 0.7,
) -> jax.Array:
    """Continue texts `[B, T]` by `length` characters, drawn at a temperature.

    Cost: One pass over T characters, then `length` over one character a text, with a cache; that of a
      `CausalLM` rolls, so that its layers with a window hold as many characters alone.
    """
    batch, place = begun.shape

    def read(tokens: ArrayLike, start: Any, caches: Any) -> tuple[jax.Array, Any]:
        if isinstance(model, CausalLM):
            logits, caches = cast(Any, model.apply({"params": params}, tokens, None, caches))
            return logits[:, -1], caches
        variables = {"params": params, "cache": caches}
        logits, kept = cast(Any, model.apply(variables, tokens, start=start, mutable=["cache"]))
        return logits[:, -1], kept["cache"]

    rolling = {}
    if isinstance(model, CausalLM):  # caches of windows longer than the text would hold more
        windows = (layer.window for layer in model.config.layers if layer.window is not None)
        rolling = {"rolling": all(window <= place + length for window in windows)}

    def step(state: Any, place: jax.Array) -> tuple[Any, jax.Array]:
        logits, caches = state
        drawn = jax.random.categorical(jax.random.fold_in(key, place), logits / temperature)
        drawn = drawn.astype(begun.dtype)
        return read(drawn[:, None], place, caches), drawn

    state = read(begun, 0, model.empty_caches(batch, place + length, **rolling))
    _, drawn = jax.lax.scan(step, state, place + jnp.arange(length))
    return jnp.concatenate([begun, drawn.T], axis=1)
