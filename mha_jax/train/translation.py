"""Translation of token sequences that the user brings: the paper's own task, at the paper's sizes.

The data is an `.npz` file with the integers `source` `[B, S]` and `target` `[B, T]`, padded with 0;
a target begins with a begin symbol and finishes with an end symbol. One row in a hundred is held out.
"""

import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import DataError
from mha_jax.files import npy_array, reading, zip_parts
from mha_jax.models.transformer import Config, Transformer
from mha_jax.train.data import endless
from mha_jax.train.losses import token_loss
from mha_jax.train.tasks import Batch

PAD = 0


def make_model(config: Any) -> Transformer:
    """Build the encoder-decoder with one table for both languages, as in the paper."""
    return Transformer(config.vocabulary, None, Config(**config.model.to_dict()))


def read_pairs(path: str, vocabulary: int) -> dict[str, np.ndarray]:
    """Read the pairs of a file.

    Raises:
      DataError: There is no file, or it does not hold what the module docstring says.
    """
    expected = "Expected an .npz file with integers `source` [B, S] and `target` [B, T]."
    if not path or not pathlib.Path(path).is_file():
        raise DataError(f"config.data={path!r} is not a file. {expected}")
    names = ("source", "target")
    with reading(f"config.data={path!r}", expected, DataError), open(path, "rb") as file:
        parts = zip_parts(file, [f"{name}.npy" for name in names])
        pairs = {name: npy_array(parts[f"{name}.npy"]) for name in names}
    for name, rows in pairs.items():
        if rows.ndim != 2 or rows.dtype.kind not in "iu" or len(rows) != len(pairs["source"]):
            raise DataError(f"{name} in {path!r} is {rows.dtype} {rows.shape}. {expected}")
        if rows.size and not 0 <= rows.min() <= rows.max() < vocabulary:
            raise DataError(
                f"{name} in {path!r} reaches from {rows.min()} to {rows.max()}. "
                f"Expected 0 to config.vocabulary - 1 = {vocabulary - 1}."
            )
    if len(pairs["source"]) < 100:
        raise DataError(f"{path!r} has {len(pairs['source'])} rows. Expected at least 100.")
    return {name: rows.astype(np.int32) for name, rows in pairs.items()}


class Translation:
    """The task "translation"; see the module docstring."""

    best = "validation_loss"

    def __init__(self, config: Any):
        pairs = read_pairs(config.data, config.vocabulary)
        held_out = np.arange(len(pairs["source"])) % 100 == 0
        train = {name: rows[~held_out] for name, rows in pairs.items()}
        self.held_out = {name: rows[held_out] for name, rows in pairs.items()}
        self.data = f"{len(train['source']):,} pairs to learn from, {len(self.held_out['source']):,} held out"
        self.model = make_model(config)
        self.batches = endless(train, config.batch_size, config.seed)
        self.smoothing = config.label_smoothing
        self.held_out_loss = jax.jit(self._held_out_loss)

    def batch(self, step: int) -> Batch:
        return cast(Batch, self.batches[step])

    def inputs(self, batch: Batch) -> tuple[jax.typing.ArrayLike, ...]:
        return batch["source"], batch["target"][:, :-1], batch["source"] != PAD

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        return token_loss(outputs, batch["target"][:, 1:], smoothing=self.smoothing, pad=PAD)

    def _held_out_loss(self, params: Any) -> jax.Array:
        outputs = self.model.apply({"params": params}, *self.inputs(self.held_out))
        answers = jnp.asarray(self.held_out["target"][:, 1:])
        return token_loss(jnp.asarray(outputs), answers, pad=PAD)

    def validate(self, params: Any) -> dict[str, float]:
        return {"validation_loss": float(self.held_out_loss(params))}

    def judge(self, params: Any, workdir: pathlib.Path) -> dict[str, float]:
        loss = float(self.held_out_loss(params))
        print(f"\n{len(self.held_out['source'])} held-out rows: perplexity {np.exp(loss):.2f}")
        return {"perplexity": float(np.exp(loss))}

    def card(self) -> dict[str, Any]:
        return {"vocabulary": self.model.vocabulary}
