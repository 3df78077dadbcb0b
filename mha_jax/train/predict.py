"""Use a trained model: `python -m mha_jax.train.predict --workdir=workdir/g2p attention heads`."""

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from mha_jax.cli import command
from mha_jax.errors import DataError, WorkdirError
from mha_jax.files import reading, reason
from mha_jax.train.workdir import CARD, read_card


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mha_jax.train.predict",
        description="Print how a trained speller pronounces words, or those on standard input.",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="letters a-z; none: read stdin")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of the training run")
    parser.add_argument(
        "--beam", type=int, default=1, metavar="N", help="keep the N best answers while decoding"
    )
    parser.add_argument("--attention", type=pathlib.Path, metavar="FILE.png", help="draw one word")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.png if it exists")
    return parser.parse_args(arguments)


def read_words(words: list[str], lines: Any) -> list[str]:
    """Take the words given, or one a line.

    Raises:
      DataError: There is none, one is empty, or the lines are no text.
    """
    try:
        words = words or [line.rstrip("\r\n") for line in lines]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is no text: {error}. Expected letters a-z.") from error
    if not words:
        raise DataError("there is no word to pronounce. Give words as arguments or on stdin.")
    for place, word in enumerate(words, start=1):
        if not word.strip():
            raise DataError(f"word {place} of {len(words)} is empty. Expected letters a-z.")
    return [word.strip().lower() for word in words]


def load(workdir: pathlib.Path) -> tuple[Any, Any, Any]:
    """Load the model, the parameters and the phonemes of a finished or unfinished run.

    Raises:
      WorkdirError: The folder holds no run, another kind of run, or no checkpoint.
    """
    card = read_card(workdir)
    if card["config"].get("task") != "g2p":
        raise WorkdirError(
            f"{workdir} holds a run of the task {card['config'].get('task')!r}. Expected 'g2p'."
        )
    from ml_collections import ConfigDict

    from mha_jax.train import g2p
    from mha_jax.train.checkpoints import read_params

    with reading(str(workdir / CARD), "Train again.", WorkdirError):
        phonemes = g2p.Phonemes(card["task"]["symbols"])
        model = g2p.make_model(ConfigDict(card["config"]), phonemes.symbols)
        word = jnp.ones((1, 1), int)
        template = jax.eval_shape(model.init, jax.random.key(0), word, word)["params"]
    return model, read_params(workdir, template), phonemes


def run(options: argparse.Namespace) -> None:
    """Print a line for each word and draw the attention on request."""
    if options.beam < 1:
        raise DataError(
            f"--beam={options.beam} is no width of a beam. Expected 1 (greedy) or more."
        )
    words = read_words(options.words, sys.stdin)
    picture = options.attention
    if picture is not None:
        check_picture(picture, words, options.overwrite)
    model, params, phonemes = load(options.workdir)

    from mha_jax.train.g2p import draw_attention, pronounce

    chunk = min(256, len(words))
    answers = pronounce(model, params, phonemes, words, chunk=chunk, beam=options.beam)
    for word, answer in zip(words, answers):
        print(f"{word}\t{' '.join(answer)}")
    if picture is not None:
        try:
            draw_attention(model, params, phonemes, words[0], answers[0], picture)
        except OSError as error:
            raise DataError(f"{picture} cannot be written: {reason(error)}.") from error
        print(f"attention of {words[0]!r}: {picture}", file=sys.stderr)


def check_picture(picture: pathlib.Path, words: list[str], overwrite: bool) -> None:
    """Refuse a picture that cannot or must not be written, before any work is done."""
    if len(words) != 1:
        raise DataError(f"--attention draws one word; {len(words)} were given.")
    if picture.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise DataError(f"--attention={picture} is no picture. Expected .png, .svg or .pdf.")
    if not picture.parent.is_dir():
        raise DataError(f"the folder of --attention={picture} does not exist. Make it first.")
    if picture.is_dir():
        raise DataError(f"--attention={picture} is a folder. Expected the name of a picture in it.")
    if picture.exists() and not overwrite:
        raise DataError(f"{picture} exists already. Pass --overwrite to replace it.")


@command
def main(arguments: list[str]) -> None:
    run(parse(arguments))


@command
def start(arguments: list[str]) -> None:
    """Run as a program, which may silence what the libraries log."""
    from mha_jax.train.checkpoints import say_things_once

    say_things_once()
    main(arguments)


if __name__ == "__main__":
    start(sys.argv[1:])
