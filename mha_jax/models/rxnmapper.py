"""RXNMapper: which atom of a reaction goes where, read off the attention scores of one head.

An ALBERT was trained to fill in hidden tokens of reactions. Its layer 10, head 5 turned out to look
from an atom of the product to the same atom of the reactants, and back: `AtomMapper.map` joins both
directions, keeps pairs of one element, and takes the best pair, one by one; the neighbours of a pair
taken are favoured from then on. Reactions are read as they are written: the published numbers are
those of canonical SMILES, as RDKit writes them.

`python -m mha_jax.models.rxnmapper 'CC(=O)O.OCC>>CC(=O)OCC'` prints the reaction with its atoms
numbered. Weights and vocabulary are those of the package rxnmapper, which is not imported.

Source: Schwaller et al. 2021, Science Advances 7, eabe4166, doi:10.1126/sciadv.abe4166.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mha_jax.cli import command
from mha_jax.errors import InputError
from mha_jax.models import bert, torch_file, weights
from mha_jax.models.smiles import ARROW, Molecules
from mha_jax.models.wordpiece import pad

CONFIG = bert.Config(
    vocabulary=591, embedding=128, width=256, num_heads=8, hidden=512, layers=(0,) * 12
)
LAYER, HEAD = 10, 5
NEIGHBOUR_FACTOR = 90.0

PACKAGE, REQUIREMENT = "rxnmapper", "--no-deps rxnmapper==0.4.3"
FOLDER = "models/transformers/albert_heads_8_uspto_all_1310k"
SHA256 = {
    "pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
    "vocab.txt": "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
}
_LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
NAMES = {
    "embeddings/symbols": "embeddings.word_embeddings",
    "embeddings/positions": "embeddings.position_embeddings",
    "embeddings/segments": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "embeddings/projection": "encoder.embedding_hidden_mapping_in",
    "layer_{i}/attention/query": f"{_LAYER}.attention.query",
    "layer_{i}/attention/key": f"{_LAYER}.attention.key",
    "layer_{i}/attention/value": f"{_LAYER}.attention.value",
    "layer_{i}/attention/attention_output": f"{_LAYER}.attention.dense",
    "layer_{i}/attention_norm": f"{_LAYER}.attention.LayerNorm",
    "layer_{i}/inner": f"{_LAYER}.ffn",
    "layer_{i}/outer": f"{_LAYER}.ffn_output",
    "layer_{i}/outer_norm": f"{_LAYER}.full_layer_layer_norm",
}


class Pair(NamedTuple):
    """One atom of the product, the atom of the reactants that it was, and how sure that is."""

    product: int
    reactant: int
    score: float


@dataclasses.dataclass(frozen=True)
class Reaction:
    """A reaction as the model reads it.

    >>> reaction = Reaction.parse("CC>O>CO")
    >>> reaction.tokens
    ('[CLS]', 'C', 'C', '.', 'O', '>>', 'C', 'O', '[SEP]')
    >>> reaction.product_tokens.tolist()
    [6, 7]
    """

    reactants: Molecules
    products: Molecules

    @classmethod
    def parse(cls, text: str) -> "Reaction":
        """Read `reactants>>products`, or `reactants>agents>products`, whose agents are reactants.

        Raises:
          InputError: It is no such reaction.
        """
        sides = text.strip().split(">")
        if len(sides) != 3 or not (sides[0] and sides[2]):
            raise InputError(
                f"{text!r} is no reaction: expected reactants>>products in SMILES, for example "
                "'CC(=O)O.OCC>>CC(=O)OCC'."
            )
        before = ".".join(side for side in sides[:2] if side)
        return cls(Molecules.parse(before), Molecules.parse(sides[2]))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Both sides in tokens, with the special ones around and between them."""
        return ("[CLS]", *self.reactants.tokens, ARROW, *self.products.tokens, "[SEP]")

    @property
    def reactant_tokens(self) -> np.ndarray:
        """Places of the reactants' atoms among the tokens."""
        return np.array(self.reactants.atoms, int) + 1

    @property
    def product_tokens(self) -> np.ndarray:
        """Places of the products' atoms among the tokens."""
        return np.array(self.products.atoms, int) + len(self.reactants.tokens) + 2


@dataclasses.dataclass(frozen=True)
class Mapping:
    """An atom mapping: pairs in the order in which they were found."""

    reaction: Reaction
    pairs: tuple[Pair, ...]

    @property
    def confidence(self) -> float:
        """The product of all scores."""
        return float(np.prod([pair.score for pair in self.pairs]))

    def smiles(self) -> str:
        """Write the reaction with a number on each mapped atom, by its place in the products."""
        before = {pair.reactant: pair.product + 1 for pair in self.pairs}
        after = {pair.product: pair.product + 1 for pair in self.pairs}
        reaction = self.reaction
        return reaction.reactants.numbered(before) + ARROW + reaction.products.numbered(after)

    def table(self) -> str:
        """Write a line for each atom of the products."""
        after, before = self.reaction.products.labels, self.reaction.reactants.labels
        lines = [f"{'product':12}{'reactant':12}score"]
        for product, reactant, score in sorted(self.pairs):
            lines.append(f"{after[product]:12}{before[reactant]:12}{score:.4f}")
        return "\n".join(lines)


def atom_scores(reaction: Reaction, scores: np.ndarray) -> np.ndarray:
    """Return the scores between the atoms of the products [P] and of the reactants [R].

    Args:
      reaction: P atoms in the products, R in the reactants.
      scores: Attention scores `[T, T]` between all its tokens.

    Returns:
      The mean of both directions [P, R], 0 between different elements.

    >>> reaction = Reaction.parse("CO>>OC")
    >>> atom_scores(reaction, np.full((7, 7), 0.5)).tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """
    before, after = reaction.reactant_tokens, reaction.product_tokens
    mean = (scores[np.ix_(after, before)] + scores[np.ix_(before, after)].T) / 2
    same = np.array(reaction.products.elements)[:, None] == reaction.reactants.elements
    return np.where(same, mean, 0.0)


def pair_atoms(reaction: Reaction, scores: np.ndarray) -> Mapping:
    """Read the atom mapping off the attention scores `[T, T]` of a reaction.

    >>> reaction = Reaction.parse("CO>>OC")
    >>> scores = np.zeros((7, 7))
    >>> scores[5, 1] = scores[4, 2] = 0.5
    >>> pair_atoms(reaction, scores).smiles()
    '[CH3:2][OH:1]>>[OH:1][CH3:2]'
    """
    left = atom_scores(reaction, scores).astype(np.float64)
    near_after, near_before = reaction.products.bonds > 0, reaction.reactants.bonds > 0
    pairs = []
    for _ in reaction.products.atoms:
        total = left.sum(axis=1, keepdims=True)
        shares = np.divide(left, total, out=np.zeros_like(left), where=total > 0)
        product, reactant = np.unravel_index(np.argmax(shares), shares.shape)
        if shares[product, reactant] < 1e-8:
            break
        pairs.append(Pair(int(product), int(reactant), float(shares[product, reactant])))
        left[np.ix_(near_after[product], near_before[reactant])] *= NEIGHBOUR_FACTOR
        left[product, :] = left[:, reactant] = 0.0
    return Mapping(reaction, tuple(pairs))


@dataclasses.dataclass(frozen=True)
class AtomMapper:
    """The model, its parameters and its vocabulary; `load()` makes one.

    Args:
      model: The encoder.
      variables: {"params": its parameters}.
      vocabulary: The number of every token.
      layer, head: Whose attention scores are the mapping.
    """

    model: bert.Bert
    variables: dict[str, Any]
    vocabulary: dict[str, int]
    layer: int = LAYER
    head: int = HEAD

    def encode(self, reactions: Sequence[Reaction]) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the tokens [B, T] and the mask [B, T].

        Raises:
          InputError: A reaction has more tokens than the model has positions.
        """
        longest = self.model.config.positions
        for place, reaction in enumerate(reactions, start=1):
            if len(reaction.tokens) > longest:
                raise InputError(
                    f"reaction {place} of {len(reactions)} has {len(reaction.tokens)} tokens. "
                    f"Expected at most {longest}: leave out what takes no part in it."
                )
        unknown = self.vocabulary["[UNK]"]
        return pad([[self.vocabulary.get(t, unknown) for t in r.tokens] for r in reactions])

    def attention(self, reaction: str) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the tokens of a reaction, and the scores [T, T] from each token to each.

        Raises:
          InputError: It is no reaction in SMILES, or too long a one.
        """
        parsed = Reaction.parse(reaction)
        return parsed.tokens, self._scores([parsed])[0]

    def map(self, reactions: Sequence[str]) -> list[Mapping]:
        """Map the atoms of reactions.

        Raises:
          InputError: One is no reaction in SMILES, or too long a one.
        """
        parsed = [Reaction.parse(text) for text in reactions]
        return [pair_atoms(*each) for each in zip(parsed, self._scores(parsed))]

    def _scores(self, reactions: Sequence[Reaction]) -> np.ndarray:
        scores = bert.scores(
            self.model,
            self.variables,
            *self.encode(reactions),
            layer=self.layer,
            heads=[self.head],
        )
        return np.asarray(scores[:, 0])


def load() -> AtomMapper:
    """Load RXNMapper from the files of the installed package.

    Raises:
      WeightsError: The package is absent, or its files are not the expected ones.
    """
    data = weights.read_all(PACKAGE, FOLDER, SHA256, REQUIREMENT)
    model = bert.Bert(CONFIG)
    tensors = torch_file.read(data["pytorch_model.bin"])
    variables = weights.variables_of(model, NAMES, tensors, prefix="albert.")
    symbols = data["vocab.txt"].decode("utf-8").splitlines()
    return AtomMapper(model, variables, {symbol: i for i, symbol in enumerate(symbols)})


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mha_jax.models.rxnmapper",
        description="Number the atoms of reactions: which atom of the reactants each became.",
    )
    parser.add_argument(
        "reactions", nargs="*", metavar="REACTION", help="A.B>>C in SMILES; none: read stdin"
    )
    parser.add_argument("--atoms", action="store_true", help="also print a line for every atom")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, lines: Any) -> None:
    """Print every reaction with its atoms numbered, and how sure that is."""
    reactions = options.reactions or [line.rstrip("\r\n") for line in lines]
    if not reactions:
        raise InputError("there is no reaction. Give reactions as arguments or on standard input.")
    for text in reactions:
        Reaction.parse(text)
    for mapping in load().map(reactions):
        print(f"{mapping.smiles()}\t{mapping.confidence:.4f}")
        if options.atoms:
            print(mapping.table(), end="\n\n")


@command
def main(arguments: list[str]) -> None:
    run(parse(arguments), sys.stdin)


if __name__ == "__main__":
    main(sys.argv[1:])
