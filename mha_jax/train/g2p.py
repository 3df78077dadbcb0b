"""Spelling to pronunciation: an encoder-decoder from letters to phonemes, on CMUdict.

Words of 3 to 11 letters a-z with at most 11 phonemes, first pronunciation, no stress. A word is
held out when `crc32(word) % 50 == 0` and judges the result; one in 200 validates during training.
Inflected relatives of held-out words remain in the training data.

Words of similar length share a batch: each bucket pads to its own length, so little is wasted.
"""

import pathlib
import zlib
from functools import partial
from typing import Any, cast

import grain
import jax
import numpy as np

from mha_jax.errors import ConfigError, DataError
from mha_jax.models.transformer import Config, Transformer
from mha_jax.train import cmudict
from mha_jax.train.data import endless
from mha_jax.train.decoding import beam_search, greedy
from mha_jax.train.losses import token_loss
from mha_jax.train.scoring import error_rates
from mha_jax.train.tasks import Batch
from mha_jax.visualize import alignment

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 11
PAD, BEGIN, END = 0, 1, 2
MARKS = ("<pad>", "<begin>", "<end>")
END_LABEL = "end"

Words = dict[str, tuple[str, ...]]


def is_usable(word: str, phonemes: tuple[str, ...]) -> bool:
    """Say whether a dictionary entry is of the lengths and letters that the task uses."""
    return set(word) <= set(LETTERS) and 3 <= len(word) <= LONGEST and 0 < len(phonemes) <= LONGEST


def split(words: Words) -> tuple[Words, Words, Words]:
    """Split into words for training, for validation and held out, by a hash of the spelling."""
    train, validation, held_out = {}, {}, {}
    for word, phonemes in words.items():
        code = zlib.crc32(word.encode())
        part = held_out if code % 50 == 0 else validation if code % 200 == 1 else train
        part[word] = phonemes
    return train, validation, held_out


def encode_letters(words: list[str], length: int = LONGEST) -> np.ndarray:
    """Number the letters of words from 1, padded with 0 to `[B, length]`.

    Raises:
      DataError: A word is empty, too long or has other letters than a-z.
    """
    codes = np.zeros((len(words), length), np.int32)
    for row, word in zip(codes, words):
        strange = sorted(set(word) - set(LETTERS))
        if strange:
            raise DataError(
                f"the word {word!r} has {', '.join(map(repr, strange))}. "
                f"Expected the letters a-z only; spell it without accents, digits and marks."
            )
        if not 1 <= len(word) <= length:
            raise DataError(f"the word {word!r} has {len(word)} letters. Expected 1 to {length}.")
        row[: len(word)] = [LETTERS.index(letter) + 1 for letter in word]
    return codes


class Phonemes:
    """The target symbols: three marks, then the phonemes in alphabetical order."""

    def __init__(self, symbols: list[str]):
        self.symbols = symbols
        self.codes = {symbol: code for code, symbol in enumerate(symbols)}

    @classmethod
    def of(cls, words: Words) -> "Phonemes":
        return cls([*MARKS, *sorted({p for phonemes in words.values() for p in phonemes})])

    def encode(self, pronunciations: list[tuple[str, ...]], length: int = LONGEST) -> np.ndarray:
        """Number phonemes between `BEGIN` and `END`, padded to `[B, length + 2]`."""
        codes = np.full((len(pronunciations), length + 2), PAD, np.int32)
        for row, phonemes in zip(codes, pronunciations):
            row[: len(phonemes) + 2] = [BEGIN, *(self.codes[p] for p in phonemes), END]
        return codes

    def decode(self, codes: np.ndarray) -> tuple[str, ...]:
        """Read a row of codes up to its end."""
        return tuple(self.symbols[code] for code in codes if code not in (PAD, BEGIN, END))


def make_model(config: Any, symbols: list[str]) -> Transformer:
    """Build the encoder-decoder for these target symbols."""
    return Transformer(len(symbols), 1 + len(LETTERS), Config(**config.model.to_dict()))


def pronounce(
    model: Transformer,
    params: Any,
    phonemes: Phonemes,
    words: list[str],
    chunk: int = 256,
    beam: int = 1,
) -> list[tuple[str, ...]]:
    """Decode the phonemes of words, greedily or with a beam.

    Words of similar length share a chunk, which ends with its longest answer; all chunks have one
    shape, the last filled up with a word of its own, so there is one compilation.

    Raises:
      DataError: A word is empty, too long or has other letters than a-z.
      ShapeError: `beam` is not positive.
    """
    answers: list[tuple[str, ...]] = [()] * len(words)
    order = sorted(range(len(words)), key=lambda i: len(words[i]))
    marks = {"length": LONGEST + 1, "begin": BEGIN, "end": END}
    for begin in range(0, len(words), chunk):
        rows = order[begin : begin + chunk]
        filled = rows + rows[:1] * (chunk - len(rows))
        source = encode_letters([words[i] for i in filled])
        if beam == 1:
            codes = greedy(model, params, source, **marks)
        else:
            codes, _ = beam_search(model, params, source, **marks, beam=beam)
        for i, row in zip(rows, np.asarray(codes)):
            answers[i] = phonemes.decode(row)
    return answers


def draw_attention(
    model: Transformer,
    params: Any,
    phonemes: Phonemes,
    word: str,
    answer: tuple[str, ...],
    path: pathlib.Path,
) -> None:
    """Draw which letters each phoneme of the answer was read from, in the decoder's last layer."""
    source = encode_letters([word], len(word))
    target = phonemes.encode([answer], len(answer))[:, :-1]
    keep = jax.jit(partial(model.apply, mutable=["attention"]))
    _, kept = keep({"params": params}, source, target)
    layer = kept["attention"]["decoder"][f"layer_{model.config.decoder_layers - 1}"]
    alignment(
        layer["cross_attention"]["scores"][0],
        path,
        queries=[*answer, END_LABEL],
        keys=list(word),
        query_name="phoneme to say next",
        key_name="letter",
        title=f"{word}: {' '.join(answer)}",
    )


class Spelling:
    """The task "g2p"; see the module docstring."""

    best = "validation_error"

    def __init__(self, config: Any):
        entries = cmudict.read_words()
        words = {word: entry for word, entry in entries.items() if is_usable(word, entry)}
        train, self.validation, self.held_out = split(words)
        self.phonemes = Phonemes.of(words)
        self.data = (
            f"{len(train):,} words to learn from, {len(self.validation):,} to validate, "
            f"{len(self.held_out):,} held out"
        )
        self.model = make_model(config, self.phonemes.symbols)
        self.smoothing = config.label_smoothing
        self.batches = self._mix(train, config)

    def _mix(self, train: Words, config: Any) -> grain.MapDataset:
        """Batch each bucket of lengths by itself, and interleave the buckets by their sizes.

        Raises:
          ConfigError: The buckets do not rise to the longest word.
        """
        if list(config.buckets) != sorted({*config.buckets, LONGEST}):
            raise ConfigError(
                f"config.buckets={config.buckets} must rise and finish with {LONGEST}, the length "
                f"of the longest word; for example (6, 8, {LONGEST})."
            )
        buckets, shares = [], []
        for shorter, length in zip((0, *config.buckets), config.buckets):
            inside = {w: p for w, p in train.items() if shorter < max(len(w), len(p)) <= length}
            rows = {
                "source": encode_letters(list(inside), length),
                "target": self.phonemes.encode(list(inside.values()), length),
            }
            buckets.append(endless(rows, config.batch_size, config.seed + length))
            shares.append(len(inside) / len(train))
        return grain.MapDataset.mix(buckets, shares)

    def batch(self, step: int) -> Batch:
        return cast(Batch, self.batches[step])

    def inputs(self, batch: Batch) -> tuple[jax.typing.ArrayLike, ...]:
        return batch["source"], batch["target"][:, :-1], batch["source"] != PAD

    def loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        return token_loss(outputs, batch["target"][:, 1:], smoothing=self.smoothing, pad=PAD)

    def validate(self, params: Any) -> dict[str, float]:
        answers = pronounce(self.model, params, self.phonemes, list(self.validation))
        error, right = error_rates(answers, list(self.validation.values()))
        return {"validation_error": error, "validation_words": right}

    def judge(self, params: Any, workdir: pathlib.Path) -> dict[str, float]:
        words, truths = list(self.held_out), list(self.held_out.values())
        answers = pronounce(self.model, params, self.phonemes, words)
        error, right = error_rates(answers, truths)
        print(f"\n{'unseen word':<13} {'answer':<28} truth")
        for i in range(0, len(words), len(words) // 12):
            mark = "" if answers[i] == truths[i] else "  <- wrong"
            print(f"{words[i]:<13} {' '.join(answers[i]):<28} {' '.join(truths[i])}{mark}")
        print(
            f"\n{len(words):,} held-out words: phoneme error {error:.2%}, wholly right {right:.2%}"
        )
        picture = workdir / "attention.png"
        word = max(
            (w for w, a in zip(words, answers) if a == self.held_out[w]), key=len, default=words[0]
        )
        answer = answers[words.index(word)]
        draw_attention(self.model, params, self.phonemes, word, answer, picture)
        print(f"attention of {word!r}: {picture}")
        return {"phoneme_error": error, "words_right": right}

    def card(self) -> dict[str, Any]:
        return {"symbols": self.phonemes.symbols}
