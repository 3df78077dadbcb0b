"""Handwritten digits: 8 x 8 images whose pixels attend to all rows and columns at once.

The 1,797 images of scikit-learn's digits. Every fifth image is held out and judges the result; one
in twenty validates during training.

Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, UCI (CC BY 4.0).
"""

import gzip
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mha_jax.models.transformer import Config, ImageClassifier
from mha_jax.train.data import endless, read_checked
from mha_jax.train.tasks import Batch

FILE = "datasets/data/digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
SIDE = 8
BRIGHTEST = 16.0


def read_digits() -> dict[str, np.ndarray]:
    """Read `images` `[B, 8, 8, 1]` in [0, 1] and `labels` `[B]` from the installed scikit-learn.

    Raises:
      DataError: The package is absent, or its file is not the expected one.
    """
    text = gzip.decompress(read_checked("sklearn", FILE, SHA256, "scikit-learn")).decode("ascii")
    table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.float32)
    images = table[:, :-1].reshape(-1, SIDE, SIDE, 1) / np.float32(BRIGHTEST)
    return {"images": images, "labels": table[:, -1].astype(np.int32)}


class Digits:
    """The task "digits"; see the module docstring."""

    best = "validation_error"

    def __init__(self, config: Any):
        self.rows = read_digits()
        place = np.arange(len(self.rows["labels"]))
        self.held_out = self._pick(place % 5 == 0)
        self.validation = self._pick(place % 20 == 1)
        train = self._pick((place % 5 != 0) & (place % 20 != 1))
        self.data = (
            f"{len(train['labels']):,} images to learn from, {len(self.validation['labels']):,} to "
            f"validate, {len(self.held_out['labels']):,} held out"
        )
        self.batches = endless(train, config.batch_size, config.seed)
        self.model = ImageClassifier(10, Config(**config.model.to_dict()))
        self.answer = jax.jit(self._answer)

    def _answer(self, params: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(cast(jax.Array, self.model.apply({"params": params}, images)), axis=-1)

    def _pick(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        return {name: row[chosen] for name, row in self.rows.items()}

    def batch(self, step: int) -> Batch:
        return cast(Batch, self.batches[step])

    def inputs(self, batch: Batch) -> tuple[jax.typing.ArrayLike, ...]:
        return (batch["images"],)

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"]))

    def _error(self, params: Any, rows: dict[str, np.ndarray]) -> float:
        return float(np.mean(self.answer(params, rows["images"]) != rows["labels"]))

    def validate(self, params: Any) -> dict[str, float]:
        return {"validation_error": self._error(params, self.validation)}

    def judge(self, params: Any, workdir: pathlib.Path) -> dict[str, float]:
        answers = np.asarray(self.answer(params, self.held_out["images"]))
        wrong = np.flatnonzero(answers != self.held_out["labels"])
        for i in wrong[:2]:
            print(f"\ntaken for a {answers[i]}, but a {self.held_out['labels'][i]}:")
            for row in self.held_out["images"][i, :, :, 0]:
                print("".join(" .:-=+*#%@"[int(9 * pixel)] * 2 for pixel in row))
        right = 1 - len(wrong) / len(answers)
        print(f"\n{len(answers)} held-out images: {right:.2%} right")
        return {"images_right": right}

    def card(self) -> dict[str, Any]:
        return {"classes": 10}
