"""RXNMapper maps the atoms of its authors' reactions as they publish it."""

import dataclasses
import importlib.util
import io
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest

from mha_jax.errors import InputError
from mha_jax.models import bert, rxnmapper
from mha_jax.models.rxnmapper import Reaction, pair_atoms

needs_package = pytest.mark.skipif(
    not importlib.util.find_spec(rxnmapper.PACKAGE), reason="rxnmapper is not installed"
)
# The third reaction of the package's own tests, its SMILES as RDKit writes them; its atoms 22, 23 and
# 28, 27 are alike, the two sides of one ring.
THIRD = (
    "C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>"
    "C=CCn1c(-c2cn3c(n2)CCCC3)nnc1N(C)Cc1ccc(C#N)cc1"
)
THIRD_MAPPED = (
    "[CH2:1]=[CH:2][CH2:3][N:4]=[C:17]=S.[CH3:19][NH:18][CH2:20][c:21]1[cH:22][cH:23][c:24]([C:25]"
    "#[N:26])[cH:27][cH:28]1.[NH2:16][NH:15][C:5](=O)[c:6]1[cH:7][n:8]2[c:9]([n:10]1)[CH2:11][CH2:12]"
    "[CH2:13][CH2:14]2>>[CH2:1]=[CH:2][CH2:3][n:4]1[c:5](-[c:6]2[cH:7][n:8]3[c:9]([n:10]2)[CH2:11]"
    "[CH2:12][CH2:13][CH2:14]3)[n:15][n:16][c:17]1[N:18]([CH3:19])[CH2:20][c:21]1[cH:22][cH:23]"
    "[c:24]([C:25]#[N:26])[cH:27][cH:28]1"
)
THIRD_CONFIDENCE = 0.919023506871605
# One more of those tests, mapped as it is written.
FOURTH = "C(C)O.BrC(C)>>CCOCC"
FOURTH_MAPPED = "[CH2:2]([CH3:1])[OH:3].Br[CH2:4]([CH3:5])>>[CH3:1][CH2:2][O:3][CH2:4][CH3:5]"
FOURTH_CONFIDENCE = 0.9754605679009868


@pytest.fixture(scope="module")
def reference():
    """Two reactions through the package's own code, in float32 on CPU."""
    path = pathlib.Path(__file__).parent.parent / "data" / "rxnmapper.npz"
    return dict(np.load(path, allow_pickle=False))


@pytest.fixture(scope="module")
def mapper():
    return rxnmapper.load()


def states(mapper, variables, reference):
    tokens, mask = reference["input_ids"].astype(np.int32), reference["attention_mask"]
    run = jax.jit(lambda *inputs: mapper.model.apply(*inputs, mutable=["hidden"])[1])
    return [np.asarray(x) for x in run(variables, tokens, mask)["hidden"]["states"]]


@pytest.fixture(scope="module")
def ours(mapper, reference):
    return states(mapper, mapper.variables, reference)


@needs_package
def test_tokens_are_the_references(mapper, reference):
    reactions = [Reaction.parse(text) for text in reference["reactions"].tolist()]
    assert [" ".join(each.tokens) for each in reactions] == reference["tokens"].tolist()
    tokens, mask = mapper.encode(reactions)
    length = tokens.shape[1]
    np.testing.assert_array_equal(tokens, reference["input_ids"][:, :length])
    np.testing.assert_array_equal(mask, reference["attention_mask"][:, :length])
    assert not reference["attention_mask"][:, length:].any()


@needs_package
def test_one_layer_runs_twelve_times_and_ends_at_the_references_states(mapper, ours, reference):
    assert set(mapper.variables["params"]) == {"embeddings", "layer_0"}
    assert len(ours) == 13
    mask = reference["attention_mask"]
    np.testing.assert_allclose(ours[12][mask], reference["hidden_12"][mask], rtol=0, atol=2e-5)


@needs_package
def test_float32_is_as_near_to_float64_as_the_reference(mapper, ours, reference, x64):
    """At padding, too, where twelve passes amplify every rounding: 2.0e-5 and the reference 2.4e-5."""
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), mapper.variables)
    with jax.numpy_dtype_promotion("standard"):  # for flax's LayerNorm
        exact = states(mapper, double, reference)[12]
    assert exact.dtype == np.float64
    theirs = np.abs(reference["hidden_12"] - exact)
    for rows in (reference["attention_mask"], ~reference["attention_mask"]):
        assert np.abs(ours[12] - exact)[rows].max() <= 2 * theirs[rows].max()


@needs_package
def test_scores_are_the_references(mapper, reference):
    tokens, mask = reference["input_ids"].astype(np.int32), reference["attention_mask"]
    got = jax.jit(
        lambda variables: bert.scores(
            mapper.model, variables, tokens, mask, layer=rxnmapper.LAYER, heads=[rxnmapper.HEAD]
        )
    )(mapper.variables)
    np.testing.assert_allclose(got[:, 0], reference["attention_10"], rtol=0, atol=2e-5)


@needs_package
def test_every_atom_of_the_reference_reactions_is_right(mapper, reference):
    """59 of 59, each with the confidence that the package gives."""
    texts = reference["reactions"].tolist()
    mappings = mapper.map([*texts, THIRD, FOURTH])
    for i, mapping in enumerate(mappings[:2]):
        pairs = sorted(mapping.pairs)
        want = reference[f"pxr_mapping_vector_{i}"].tolist()
        assert [pair.reactant for pair in pairs] == want
        assert [pair.product for pair in pairs] == list(range(len(want)))
        sure = [pair.score for pair in pairs]
        np.testing.assert_allclose(sure, reference[f"pxr_confidences_{i}"], rtol=0, atol=2e-5)
        assert mapping.confidence == pytest.approx(reference["confidence"][i], abs=2e-5)
        products = reference["mapped_rxn"][i].partition(">>")[2]
        assert mapping.smiles().partition(">>")[2] == products
    assert mappings[2].smiles() == THIRD_MAPPED
    assert mappings[2].confidence == pytest.approx(THIRD_CONFIDENCE, abs=2e-5)
    assert sum(len(mapping.pairs) for mapping in mappings[:3]) == 59
    assert mappings[3].smiles() == FOURTH_MAPPED
    assert mappings[3].confidence == pytest.approx(FOURTH_CONFIDENCE, abs=2e-5)


@needs_package
def test_attention_of_a_reaction_has_its_tokens(mapper, reference):
    tokens, scores = mapper.attention(reference["reactions"][0])
    assert " ".join(tokens) == reference["tokens"][0]
    length = len(tokens)
    want = reference["attention_10"][0, :length, :length]
    np.testing.assert_allclose(scores, want, rtol=0, atol=2e-5)


@needs_package
def test_the_command_prints_reactions_and_atoms(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("CC(=O)O.OCC>[H+]>CC(=O)OCC\n"))
    rxnmapper.main(["--atoms"])
    lines = capsys.readouterr().out.splitlines()
    smiles, confidence = lines[0].split("\t")
    assert smiles == (
        "[CH3:1][C:2](=[O:3])[OH:4].O[CH2:5][CH3:6].[H+]>>[CH3:1][C:2](=[O:3])[O:4][CH2:5][CH3:6]"
    )
    assert float(confidence) == pytest.approx(0.8858, abs=1e-3)
    assert lines[1].split() == ["product", "reactant", "score"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["C", "1", "C", "1"],
        ["C", "2", "C", "2"],
        ["O", "3", "O", "3"],
    ]


@needs_package
def test_weights_of_another_size_end_the_command(monkeypatch):
    config = dataclasses.replace(rxnmapper.CONFIG, vocabulary=592)
    monkeypatch.setattr(rxnmapper, "CONFIG", config)
    with pytest.raises(SystemExit, match=r"word_embeddings\.weight has shape \(591, 128\)"):
        rxnmapper.main(["CO>>OC"])


def test_an_atom_goes_to_its_own_element_only():
    """The score to another element may be as high as it likes."""
    reaction = Reaction.parse("CO>>OC")
    scores = np.full((7, 7), 0.01)
    scores[4, 1] = scores[1, 4] = 0.9
    pairs = pair_atoms(reaction, scores).pairs
    assert sorted(pair[:2] for pair in pairs) == [(0, 1), (1, 0)]


def test_both_directions_count():
    reaction = Reaction.parse("C.C>>C")
    scores = np.zeros((7, 7))
    scores[5, 1], scores[1, 5], scores[3, 5] = 0.4, 0.1, 0.45
    (pair,) = pair_atoms(reaction, scores).pairs
    assert pair[:2] == (0, 0)
    assert pair.score == pytest.approx(0.5 / 0.95)


def test_neighbours_of_a_pair_taken_are_favoured():
    """The last carbon looks elsewhere, but its neighbour's neighbour wins."""
    reaction = Reaction.parse("CO.C>>OC")
    before, after = reaction.reactant_tokens, reaction.product_tokens
    scores = np.zeros((len(reaction.tokens),) * 2)
    scores[after[0], before[1]] = 0.9
    scores[after[1], before[0]], scores[after[1], before[2]] = 0.1, 0.2
    mapping = pair_atoms(reaction, scores)
    assert [pair[:2] for pair in mapping.pairs] == [(0, 1), (1, 0)]
    assert mapping.pairs[1].score == pytest.approx(9 / 9.2)
    assert mapping.smiles() == "[CH3:2][OH:1].C>>[OH:1][CH3:2]"


def test_an_atom_from_nowhere_stays_without_a_number():
    reaction = Reaction.parse("CO>>CN")
    mapping = pair_atoms(reaction, np.full((7, 7), 0.1))
    assert mapping.smiles() == "[CH3:1]O>>[CH3:1]N"
    assert mapping.confidence == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'' is no reaction: expected reactants>>products"),
        ("CCO", r"'CCO' is no reaction"),
        (">>CCO", r"is no reaction"),
        ("CCO>>", r"is no reaction"),
        ("C>>C>>C", r"is no reaction"),
        ("CCx>>CC", r"character 3, 'x'"),
        ("C(C>>CC", r"a branch has one end only"),
        ("[CH3:1]O>>[CH3:1]O", r"carries a number already"),
    ],
)
def test_what_is_no_reaction_is_named(text, message):
    with pytest.raises(InputError, match=message):
        Reaction.parse(text)
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        rxnmapper.main(["CO>>OC", text])


def test_agents_are_reactants():
    assert Reaction.parse("C>O.N>S").tokens == Reaction.parse("C.O.N>>S").tokens


@pytest.fixture(scope="module")
def tiny():
    """A model with random parameters that knows carbon only."""
    config = bert.Config(
        vocabulary=5, positions=9, width=6, num_heads=2, hidden=10, layers=(0, 0), embedding=4
    )
    model = bert.Bert(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 1), np.int32))
    draw = np.random.default_rng(0).standard_normal
    variables = jax.tree.map(lambda x: 0.5 * draw(x.shape, np.float32), shapes)
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "C"]
    return rxnmapper.AtomMapper(
        model, variables, {symbol: i for i, symbol in enumerate(symbols)}, layer=1, head=1
    )


def test_unknown_tokens_and_padding(tiny):
    tokens, mask = tiny.encode([Reaction.parse("C>>[Uuo]C"), Reaction.parse("C>>C")])
    assert tokens.tolist() == [[2, 4, 1, 1, 4, 3], [2, 4, 1, 4, 3, 0]]
    assert mask.sum(1).tolist() == [6, 5]
    together = tiny.map(["C>>[U]C", "C>>C"])
    assert together[1].smiles() == "[CH4:1]>>[CH4:1]"
    assert re.fullmatch(r"product .*\nC 2 +C 1 +1\.0000", together[0].table())


def test_a_reaction_that_is_too_long_is_named(tiny):
    with pytest.raises(InputError, match=r"reaction 2 of 2 has 10 tokens\. Expected at most 9"):
        tiny.map(["C>>C", "CCC>>CCCC"])


def test_no_reaction_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit, match=r"^error: there is no reaction\. Give reactions"):
        rxnmapper.main([])


def test_the_package_absent_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps rxnmapper==0\.4\.3"):
        rxnmapper.main(["CO>>OC"])


def test_another_version_of_the_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / rxnmapper.FOLDER).mkdir(parents=True)
    (tmp_path / rxnmapper.FOLDER / "pytorch_model.bin").write_bytes(b"other")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    expected = rxnmapper.SHA256["pytorch_model.bin"]
    with pytest.raises(SystemExit, match=rf"sha256 \w+, expected {expected}.*pip install"):
        rxnmapper.main(["CO>>OC"])
