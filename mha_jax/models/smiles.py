"""Reactions in SMILES: their tokens, atoms, bonds and hydrogens, as far as an atom mapping needs them.

Source: OpenSMILES specification 1.0, sections 3.1 to 3.5.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mha_jax.errors import InputError

ARROW = ">>"
TOKEN = re.compile(r"\[[^\[\]]+\]|Br|Cl|[BCNOPSFI]|[bcnops]|%\d\d|\d|>>|[-=#$:~/\\().*]")
ATOM = re.compile(r"\[\d*(?P<element>[A-Z][a-z]?|se|as|te|[bcnops]|\*)")
ORDERS = {"-": 1, "=": 2, "#": 3, "$": 4, ":": 1, "~": 1, "/": 1, "\\": 1}
# Bonds that an atom without brackets makes; hydrogens fill up to the next of them.
VALENCES = {
    **{"B": (3,), "C": (4,), "N": (3, 5), "O": (2,), "P": (3, 5), "S": (2, 4, 6)},
    **dict.fromkeys(("F", "Cl", "Br", "I"), (1,)),
}


@dataclasses.dataclass(frozen=True)
class Molecules:
    """One side of a reaction.

    Args:
      tokens: Its SMILES in pieces.
      atoms: Which tokens are atoms.
      elements: The element of each atom; "*" is any.
      bonds: Order of the bond between each two atoms, 0 for none; aromatic ones count 1.

    >>> ethanol = Molecules.parse("CC[OH]")
    >>> ethanol.elements, ethanol.bonds.tolist()
    (('C', 'C', 'O'), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    """

    tokens: tuple[str, ...]
    atoms: tuple[int, ...]
    elements: tuple[str, ...]
    bonds: np.ndarray

    @classmethod
    def parse(cls, smiles: str) -> "Molecules":
        """Read SMILES.

        Raises:
          InputError: It is no SMILES: a character, bracket, branch or ring is wrong, or an atom
            carries a number already.
        """
        tokens = tokenize(smiles)
        atoms = [place for place, token in enumerate(tokens) if is_atom(token)]
        if not atoms:
            raise InputError(f"{smiles!r} has no atoms. Expected SMILES such as 'CCO'.")
        return cls(
            tokens=tuple(tokens),
            atoms=tuple(atoms),
            elements=tuple(element(tokens[place]) for place in atoms),
            bonds=bonds(tokens),
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The atoms as they are written, each with its number from 1.

        >>> Molecules.parse("CC[O-]").labels
        ('C 1', 'C 2', '[O-] 3')
        """
        return tuple(f"{self.tokens[token]} {i}" for i, token in enumerate(self.atoms, start=1))

    def hydrogens(self, atom: int) -> int:
        """Count the hydrogens that an atom without brackets has by its element and its bonds."""
        order = int(self.bonds[atom].sum())
        valences = VALENCES.get(self.elements[atom], ())
        if self.tokens[self.atoms[atom]].islower():
            return max(0, valences[0] - order - 1)
        return next((valence - order for valence in valences if valence >= order), 0)

    def numbered(self, numbers: Mapping[int, int]) -> str:
        """Write the SMILES with numbers on some atoms, given by atom.

        >>> Molecules.parse("CC[O-]").numbered({0: 7, 2: 8})
        '[CH3:7]C[O-:8]'
        """
        tokens = list(self.tokens)
        for atom, number in numbers.items():
            token = tokens[self.atoms[atom]]
            if not token.startswith("["):
                hydrogens = self.hydrogens(atom)
                token = f"[{token}{'H' * (hydrogens > 0)}{hydrogens if hydrogens > 1 else ''}]"
            tokens[self.atoms[atom]] = f"{token[:-1]}:{number}]"
        return "".join(tokens)


def tokenize(smiles: str) -> list[str]:
    """Cut SMILES into its tokens.

    Raises:
      InputError: A character is none of SMILES.

    >>> tokenize("CC(Cl)[O-]>>C%12=C%12")
    ['C', 'C', '(', 'Cl', ')', '[O-]', '>>', 'C', '%12', '=', 'C', '%12']
    """
    tokens, place = [], 0
    while place < len(smiles):
        match = TOKEN.match(smiles, place)
        if match is None:
            raise InputError(
                f"{smiles!r} is no SMILES: character {place + 1}, {smiles[place]!r}, begins no atom, "
                "bond, ring or branch. Expected something like 'CC(=O)O.OCC>>CC(=O)OCC'."
            )
        tokens.append(match[0])
        place = match.end()
    return tokens


def is_atom(token: str) -> bool:
    """Whether a token of SMILES is an atom."""
    return token[0].isalpha() or token[0] in "[*"


def element(token: str) -> str:
    """Return the element of an atom: "C" for "C", "c" and "[13CH2]".

    Raises:
      InputError: There is none in the brackets, or a number of an atom mapping.
    """
    match = ATOM.match(token if token[0] == "[" else f"[{token}")
    if match is None:
        raise InputError(
            f"the atom {token} has no element. Expected something like [NH4+] or [nH]."
        )
    if re.search(r":\d+\]$", token):
        raise InputError(
            f"the atom {token} carries a number already. Expected a reaction that is not mapped: "
            "remove the numbers."
        )
    return match["element"].capitalize()


def bonds(tokens: Sequence[str]) -> np.ndarray:
    """Return the orders of the bonds between the atoms of SMILES, in their order.

    Raises:
      InputError: A branch or a ring is not closed or begins nowhere, or a bond leads nowhere.
    """
    count = sum(map(is_atom, tokens))
    found = np.zeros((count, count), int)
    here: int | None = None
    order: int | None = None
    atoms = iter(range(count))
    branches: list[int | None] = []
    rings: dict[str, tuple[int, int | None]] = {}
    for token in tokens:
        if is_atom(token):
            atom = next(atoms)
            if here is not None:
                found[here, atom] = found[atom, here] = order or 1
            here, order = atom, None
        elif token in ORDERS:
            order = ORDERS[token]
        elif token == ".":
            here, order = None, None
        elif token == "(":
            branches.append(here)
        elif token == ")" and branches:
            here = branches.pop()
        elif token in rings and here is not None:
            other, first_order = rings.pop(token)
            found[here, other] = found[other, here] = order or first_order or 1
            order = None
        elif here is not None and token != ")":
            rings[token], order = (here, order), None
        else:
            raise _unbalanced(tokens, f"{token!r} closes or continues nothing")
    if branches or rings or order is not None:
        left = f"ring {min(rings)}" if rings else "a branch" if branches else "the last bond"
        raise _unbalanced(tokens, f"{left} has one end only")
    return found


def _unbalanced(tokens: Sequence[str], what: str) -> InputError:
    return InputError(
        f"{''.join(tokens)!r} is no SMILES: {what}. Expected two ends of every branch, ring and bond."
    )
