"""SMILES are read far enough for an atom mapping: atoms, elements, bonds, hydrogens."""

import numpy as np
import pytest

from mha_jax.errors import InputError
from mha_jax.models.smiles import Molecules, tokenize


def pairs(molecules):
    """Return every bond once: (atom, atom, order)."""
    places = np.argwhere(np.triu(molecules.bonds))
    return [(int(i), int(j), int(molecules.bonds[i, j])) for i, j in places]


@pytest.mark.parametrize(
    ("smiles", "want"),
    [
        ("CCO", [(0, 1, 1), (1, 2, 1)]),
        ("C.C", []),
        ("C=C#N", [(0, 1, 2), (1, 2, 3)]),
        ("CC(C)(C)O", [(0, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 1)]),
        ("C(=O)O", [(0, 1, 2), (0, 2, 1)]),
        ("C1CC1", [(0, 1, 1), (0, 2, 1), (1, 2, 1)]),
        ("C=1CC1", [(0, 1, 1), (0, 2, 2), (1, 2, 1)]),
        ("C1CC=1", [(0, 1, 1), (0, 2, 2), (1, 2, 1)]),
        ("C%12CC%12", [(0, 1, 1), (0, 2, 1), (1, 2, 1)]),
        (
            "C1CC1C1CC1",
            [(0, 1, 1), (0, 2, 1), (1, 2, 1), (2, 3, 1), (3, 4, 1), (3, 5, 1), (4, 5, 1)],
        ),
        ("C12CC1C2", [(0, 1, 1), (0, 2, 1), (0, 3, 1), (1, 2, 1), (2, 3, 1)]),
        ("[Na+]~[Cl-]", [(0, 1, 1)]),
        ("F/C=C\\F", [(0, 1, 1), (1, 2, 2), (2, 3, 1)]),
    ],
)
def test_bonds(smiles, want):
    molecules = Molecules.parse(smiles)
    assert pairs(molecules) == want
    np.testing.assert_array_equal(molecules.bonds, molecules.bonds.T)


@pytest.mark.parametrize(
    ("smiles", "want"),
    [
        ("ClBrc[nH][C@@H][13CH3][Na+][se][Pd]*B", "Cl Br C N C C Na Se Pd * B"),
        ("CnCoCsC[Cn]", "C N C O C S C Cn"),
    ],
)
def test_elements(smiles, want):
    assert Molecules.parse(smiles).elements == tuple(want.split())


@pytest.mark.parametrize(
    ("smiles", "want"),
    [
        ("CC(=O)O", "[CH3:1][C:2](=[O:3])[OH:4]"),
        ("c1ccccc1", "[cH:1]1[cH:2][cH:3][cH:4][cH:5][cH:6]1"),
        ("Cc1ccncc1", "[CH3:1][c:2]1[cH:3][cH:4][n:5][cH:6][cH:7]1"),
        ("c1cc[nH]c1", "[cH:1]1[cH:2][cH:3][nH:4][cH:5]1"),
        ("Cn1cccc1", "[CH3:1][n:2]1[cH:3][cH:4][cH:5][cH:6]1"),
        ("c1ccoc1", "[cH:1]1[cH:2][cH:3][o:4][cH:5]1"),
        ("N#CS", "[N:1]#[C:2][SH:3]"),
        ("CS(=O)(=O)Cl", "[CH3:1][S:2](=[O:3])(=[O:4])[Cl:5]"),
        ("CN(=O)=O", "[CH3:1][N:2](=[O:3])=[O:4]"),
        ("C[N+](C)(C)C", "[CH3:1][N+:2]([CH3:3])([CH3:4])[CH3:5]"),
        ("O.C.N.B.P*", "[OH2:1].[CH4:2].[NH3:3].[BH3:4].[PH2:5][*:6]"),
        ("O=c1cc[nH]cc1", "[O:1]=[c:2]1[cH:3][cH:4][nH:5][cH:6][cH:7]1"),
    ],
)
def test_numbers_on_atoms_keep_their_hydrogens(smiles, want):
    """As RDKit writes them."""
    molecules = Molecules.parse(smiles)
    assert molecules.numbered({i: i + 1 for i in range(len(molecules.atoms))}) == want
    assert molecules.numbered({}) == smiles


def test_tokens_are_the_whole_text():
    smiles = r"C[C@H](N)/C=C\c1ccc([N+](=O)[O-])cc1.[Na+]~[Br-]>>*C%10CC%10:c$I"
    assert "".join(tokenize(smiles)) == smiles


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("CCx", r"'CCx' is no SMILES: character 3, 'x', begins no atom"),
        ("CC O", r"character 3, ' '"),
        ("C[NH", r"character 2, '\['"),
        ("C[]", r"character 2, '\['"),
        ("", r"'' has no atoms"),
        ("-", r"'-' has no atoms"),
        ("C(C", r"a branch has one end only\. Expected two ends"),
        ("CC)", r"'\)' closes or continues nothing"),
        ("C1CC", r"ring 1 has one end only"),
        ("1CC1", r"'1' closes or continues nothing"),
        ("C=", r"the last bond has one end only"),
        ("C[+]", r"\[\+\] has no element.*\[NH4\+\]"),
        ("[CH3:1]O", r"\[CH3:1\] carries a number already.*remove the numbers"),
    ],
)
def test_what_is_no_smiles_is_named(smiles, message):
    with pytest.raises(InputError, match=message):
        Molecules.parse(smiles)
