"""Text is cut as BERT's own tokenizer cuts it."""

import numpy as np
import pytest

from mha_jax.models.wordpiece import WordPiece, pad, words

TINY = WordPiece.from_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nun\n##aff\n##able\nable\n!\n##le\n##ab\n")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("unaffable", ["un", "##aff", "##able"]),
        ("UNable!", ["un", "##able", "!"]),
        ("able unx", ["able", "[UNK]"]),
        ("un" + "aff" * 32 + "le", ["un", *["##aff"] * 32, "##le"]),  # 100 letters
        ("un" + "aff" * 31 + "ableab", ["[UNK]"]),  # 101
        ("", []),
    ],
)
def test_the_longest_known_pieces_from_the_left(text, pieces):
    assert TINY.cut(text) == ["[CLS]", *pieces, "[SEP]"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Hello, World", ["hello", ",", "world"]),
        ("a\tb\nc\r d\u3000e\u2028f", ["a", "b", "c", "d", "e", "f"]),
        ("a\x00b\u200bc\ufffdd\x85e\x1ff", ["abcdef"]),
        ("ÀÉÎ İ ΣΑΣ", ["aei", "i", "σασ"]),
        ("中文 ab日c", ["中", "文", "ab", "日", "c"]),
        ("カタカナ", ["カタカナ"]),
        ("$5.00^_`~", ["$", "5", ".", "00", "^", "_", "`", "~"]),
        ("«¿quoi?» — 10°C", ["«", "¿", "quoi", "?", "»", "—", "10°c"]),
    ],
)
def test_words(text, want):
    assert words(text) == want


def test_rows_are_padded_to_the_longest():
    tokens, mask = TINY.encode(["able", "un !"])
    assert tokens.tolist() == [[2, 7, 3, 0], [2, 4, 8, 3]]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert pad([[1]])[0].dtype == np.int32
