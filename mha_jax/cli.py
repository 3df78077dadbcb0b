"""The frame of every command: a mistake ends in one sentence and a code, without a traceback."""

import functools
import sys
from collections.abc import Callable

from mha_jax.errors import MhaError
from mha_jax.rooms import packages

COMMANDS = {
    "mha_jax.train": "train an example model: --list names the experiments",
    "mha_jax.train.predict": "pronounce words with a trained speller",
    "mha_jax.models.minilm": "say how alike sentences are",
    "mha_jax.models.rxnmapper": "say which atom of a reaction becomes which",
    "mha_jax.models.smollm2": "answer a question, or continue a text",
}


def command(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Let errors of the library, and packages that are missing, end the program in a sentence."""

    @functools.wraps(main)
    def framed(arguments: list[str]) -> None:
        try:
            with packages():
                main(arguments)
        except MhaError as error:
            sys.exit(f"error: {error}")

    return framed
