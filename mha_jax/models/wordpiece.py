"""BERT's tokenizer: words of lower-case letters without accents, cut into the longest known pieces.

Source: Devlin et al. 2018, arXiv:1810.04805, section 3; Wu et al. 2016, arXiv:1609.08144, section 4.1.
"""

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np

LONGEST_WORD = 100
# Scripts without spaces between words, whose every character is a word: first and last characters.
IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@dataclasses.dataclass(frozen=True)
class WordPiece:
    """A vocabulary and the way to cut text into its pieces.

    Args:
      vocabulary: The number of every piece; pieces inside a word start with "##".

    >>> pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "!"]
    >>> WordPiece({piece: i for i, piece in enumerate(pieces)}).cut("Playing chess!")
    ['[CLS]', 'play', '##ing', '[UNK]', '!', '[SEP]']
    """

    vocabulary: dict[str, int]

    @classmethod
    def from_text(cls, text: str) -> "WordPiece":
        """Make a tokenizer from a vocabulary with one piece a line."""
        return cls({piece: i for i, piece in enumerate(text.splitlines())})

    def cut(self, text: str) -> list[str]:
        """Cut text into pieces, between [CLS] and [SEP]."""
        pieces = itertools.chain.from_iterable(map(self._pieces, words(text)))
        return ["[CLS]", *pieces, "[SEP]"]

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the pieces [B, T] and the mask [B, T], True where there is a piece."""
        return pad([[self.vocabulary[piece] for piece in self.cut(text)] for text in texts])

    def _pieces(self, word: str) -> list[str]:
        """Cut one word into the longest pieces from the left, or into [UNK] where that fails."""
        pieces, start = [], 0
        while start < len(word) <= LONGEST_WORD:
            inside = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if inside + word[start:end] in self.vocabulary), None)
            if end is None:
                return ["[UNK]"]
            pieces.append(inside + word[start:end])
            start = end
        return pieces or ["[UNK]"]


def words(text: str) -> list[str]:
    """Cut text at spaces and around every punctuation mark and ideograph, in plain lower case.

    >>> words("Déjà-vu, 2 times")
    ['deja', '-', 'vu', ',', '2', 'times']
    """
    spaced = "".join(f" {char} " if _is_ideograph(char) else _clean(char) for char in text)
    plain = unicodedata.normalize("NFD", spaced)
    plain = "".join(char.lower() for char in plain if unicodedata.category(char) != "Mn")
    return "".join(f" {char} " if _is_mark(char) else char for char in plain).split()


def pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Fill rows up to the longest with zeros; return them and the mask, True where they were.

    >>> tokens, mask = pad([[5, 6, 7], [8]])
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6, 7], [8, 0, 0]], [[True, True, True], [True, False, False]])
    """
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = list(itertools.chain.from_iterable(rows))
    return tokens, mask


def _clean(char: str) -> str:
    control = char not in "\t\n\r" and unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs")
    if control or char == "\N{REPLACEMENT CHARACTER}":
        return ""
    return " " if char.isspace() else char


def _is_ideograph(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in IDEOGRAPHS)


def _is_mark(char: str) -> bool:
    ascii_mark = char.isascii() and char.isprintable() and not char.isalnum() and char != " "
    return ascii_mark or unicodedata.category(char)[0] == "P"
