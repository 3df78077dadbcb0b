"""Published families of decoders against `transformers`, from small weights drawn here."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mha_jax import ShapeError, UnsupportedError, WeightsError
from mha_jax.attention.rotary import Rotary
from mha_jax.attention.rotary_scaling import Linear
from mha_jax.models import decoder, deepseek, gpt, llama
from mha_jax.models.latent import Latent

VOCABULARY, LENGTH = 37, 13
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_KINDS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "head_dim": 6,
}
_GEMMA = _SIZES | _KINDS | {"query_pre_attn_scalar": 7}
_NEOX = {"num_attention_heads": 3, "rotary_pct": 0.5}
_QWEN2 = {"num_attention_heads": 2, "tie_word_embeddings": True}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "rope_parameters": _YARN}
# Epsilons so large that a norm with another one is seen.
_EPSILON = {"rms_norm_eps": 0.01}
_OLMO2 = _EPSILON | {"hidden_size": 16, "pad_token_id": None}
_LLAMA4 = _EPSILON | {
    "head_dim": 6,
    "intermediate_size_mlp": 28,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 5,
    "floor_scale": 3,
    "rope_parameters": _LLAMA3,
}
_LLAMA4_PLAIN = {
    "use_qk_norm": False,
    "attn_temperature_tuning": False,
    "attention_chunk_size": None,
    "moe_layers": [0],
    "num_experts_per_tok": 1,
    "attention_bias": True,
}
_DEEPSEEK = _EPSILON | {
    "num_key_value_heads": 4,
    "q_lora_rank": 5,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "moe_intermediate_size": 11,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
    "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": True},
}
_DEEPSEEK_PLAIN = {
    "q_lora_rank": None,
    "attention_bias": True,
    "rope_interleave": False,
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
_NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 3,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 5,
    "max_position_embeddings": 17,
}
_GPTJ = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
_BLOOM = {"vocab_size": 37, "hidden_size": 12, "n_layer": 2, "n_head": 3}
_OPT = _SIZES | {"ffn_dim": 20, "max_position_embeddings": 17}
_GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}

# Name -> the class's stem in transformers, our module, what its config is given.
FAMILIES = {
    "gpt2": (
        "GPT2LMHead",
        "GPT2",
        gpt,
        {"vocab_size": 37, "n_embd": 12, "n_layer": 2, "n_head": 3},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoX", gpt, _SIZES | _NEOX),
    "llama3": (
        "LlamaForCausalLM",
        "Llama",
        llama,
        _SIZES | {"rope_parameters": _LLAMA3, "head_dim": 6},
    ),
    "mistral": (
        "MistralForCausalLM",
        "Mistral",
        llama,
        _SIZES | {"sliding_window": 5, "head_dim": 6},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2", llama, _SIZES | _QWEN2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", llama, _SIZES | {"head_dim": 6} | _EPSILON),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2", llama, _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", llama, _GEMMA | _EPSILON),
    "cohere": ("CohereForCausalLM", "Cohere", llama, _SIZES | {"hidden_size": 16}),
    "cohere_normed": (
        "CohereForCausalLM",
        "Cohere",
        llama,
        _SIZES | {"hidden_size": 16, "use_qk_norm": True, "layer_norm_eps": 0.01},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2", llama, _SIZES | _OLMO2),
    "llama4": ("Llama4ForCausalLM", "Llama4Text", llama, _SIZES | _LLAMA4),
    "llama4_plain": (
        "Llama4ForCausalLM",
        "Llama4Text",
        llama,
        _SIZES | _LLAMA4 | _LLAMA4_PLAIN,
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3", deepseek, _SIZES | _DEEPSEEK),
    "deepseek_v3_plain": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3",
        deepseek,
        _SIZES | _DEEPSEEK | _DEEPSEEK_PLAIN,
    ),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeo", gpt, _NEO),
    "bloom": ("BloomForCausalLM", "Bloom", gpt, _BLOOM),
    "gptj": ("GPTJForCausalLM", "GPTJ", gpt, _GPTJ),
    "opt": ("OPTForCausalLM", "OPT", gpt, _OPT),
    "falcon_7b": ("FalconForCausalLM", "Falcon", gpt, _SIZES | {"hidden_size": 16}),
    "falcon_40b": ("FalconForCausalLM", "Falcon", gpt, _SIZES | {"hidden_size": 16} | _GROUPED),
    "gpt_oss": ("GptOssForCausalLM", "GptOss", llama, _SIZES | _KINDS | _EXPERTS),
}
MASK = np.array([[False] * 4 + [True] * 9, [True] * 13, [True] * 6 + [False] * 7])


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers"
    )
    return pytest.importorskip("torch", reason="torch is not installed: pip install torch")


def make(name, torch, **changed):
    """Return PyTorch's model with drawn weights, its config, and our module that reads both."""
    import transformers

    model_name, config_name, module, fields = FAMILIES[name]
    fields = fields | changed
    model_name = model_name if model_name.endswith("LM") else f"{model_name}Model"
    config = getattr(transformers, f"{config_name}Config")(**fields)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs = getattr(transformers, model_name)(config).eval()
    draw = np.random.default_rng(1).standard_normal
    with torch.no_grad():
        chosen = [x for name, x in theirs.named_buffers() if "correction" in name]
        for x in (*theirs.parameters(), *chosen):
            x.copy_(torch.from_numpy(0.3 * draw(tuple(x.shape), np.float32)))
    return theirs, config.to_dict(), module


def tensors_of(theirs, kind=lambda x: x.detach()):
    return {name: kind(x).numpy() for name, x in theirs.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_its_logits_and_gradients(name, torch):
    theirs, config, module = make(name, torch)
    model, variables = module.read(config, tensors_of(theirs))
    draw = np.random.default_rng(2)
    tokens = draw.integers(0, VOCABULARY, MASK.shape)
    cotangent = draw.standard_normal((*MASK.shape, VOCABULARY), np.float32) * MASK[..., None]
    want = np.zeros(cotangent.shape, np.float32)
    for row, real in enumerate(
        MASK
    ):  # each text by itself: not every family of theirs knows padding
        out = theirs(torch.from_numpy(tokens[row, real])[None]).logits[0]
        (out * torch.from_numpy(cotangent[row, real])).sum().backward()
        want[row, real] = out.detach().numpy()

    def loss(variables):
        logits = model.apply(variables, tokens, MASK)
        return (logits * cotangent).sum(), logits

    (_, logits), got = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    np.testing.assert_allclose(logits[MASK], want[MASK], atol=1e-5, rtol=1e-5)

    # What reads weights is linear but for Gemma's 1 +, so that it reads their gradients, too.
    def gradient(x):  # what chooses experts has none
        return x.grad if x.requires_grad else torch.zeros_like(x)

    _, gradients = module.read(config, tensors_of(theirs, gradient))
    _, nothing = module.read(config, tensors_of(theirs, lambda x: torch.zeros_like(x).detach()))
    expected = jax.tree.map(np.subtract, gradients, nothing)
    largest = max(np.abs(y).max() for y in jax.tree.leaves(expected))
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected)):
        scale = max(np.abs(y).max(), 0.05 * largest)  # that of a key's bias is rounding alone
        np.testing.assert_allclose(x / scale, y / scale, atol=1e-5, err_msg=str(path))

    # Token by token, with a cache that holds real tokens only.
    caches, pieces, step = model.empty_caches(3, LENGTH), [], jax.jit(model.apply)
    for t in range(LENGTH):
        piece, caches = step(variables, tokens[:, t : t + 1], MASK[:, t : t + 1], caches)
        pieces.append(piece)
    np.testing.assert_allclose(np.concatenate(pieces, 1)[MASK], want[MASK], atol=1e-5, rtol=1e-5)


_UNTIED, _TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
_SLIDES = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
CHOICES = [
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    *[(name, _UNTIED) for name in ("gpt2", "gpt_neo", "bloom")],
    *[(name, _TIED) for name in ("gptj", "gpt_neox")],
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"hidden_size": 48, "rotary_pct": 0.3}),
    *[(name, _SLIDES) for name in ("qwen2", "qwen3")],
    ("deepseek_v3", {"n_shared_experts": 0}),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # torch, of no shared experts
@pytest.mark.parametrize("name, changed", CHOICES, ids=str)
def test_what_a_config_chooses_is_read(name, changed, torch):
    theirs, config, module = make(name, torch, **changed)
    if changed is _SLIDES:  # as configs were before they listed their layers
        config = {key: x for key, x in config.items() if key != "layer_types"}
    tensors = tensors_of(theirs)
    if changed is _TIED:  # files leave it out
        del tensors["lm_head.weight"]
    model, variables = module.read(config, tensors)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (2, LENGTH))
    want = theirs(torch.from_numpy(tokens)).logits.detach().numpy()
    got = jax.jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_weights_of_half_precision_are_read_as_their_numbers(name, torch):
    theirs, config, module = make(name, torch)
    halves = {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors_of(theirs).items()}
    _, want = module.read(config, {n: x.astype(np.float32) for n, x in halves.items()})
    _, got = module.read(config, halves)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_tied_table_may_have_a_bias_beside_it():
    model, tokens = decoder.CausalLM(dataclasses.replace(SMALL, tied=True)), np.ones((2, 5), int)
    biased = decoder.CausalLM(dataclasses.replace(SMALL, tied=True, output_bias=True))
    variables, bias = model.init(jax.random.key(0), tokens), np.arange(11.0, dtype=np.float32)
    shapes = jax.eval_shape(biased.init, jax.random.key(0), tokens)["params"]
    assert shapes["logits"]["bias"].shape == bias.shape
    both = {"params": variables["params"] | {"logits": {"bias": bias}}}
    want = np.asarray(model.apply(variables, tokens)) + bias
    np.testing.assert_allclose(biased.apply(both, tokens), want, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "falcon", "alibi": True},
            "the config has alibi=True, where the decoder can be False alone",
        ),
        (
            {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
            "the config has apply_residual_connection_post_layernorm=True, where the decoder can be",
        ),
        (
            {"model_type": "opt", "hidden_size": 8, "word_embed_proj_dim": 4},
            "the config has word_embed_proj_dim=4, where the decoder can be 8 alone",
        ),
        (
            {"model_type": "opt", "hidden_size": 8, "do_layer_norm_before": False},
            "the config has do_layer_norm_before=False, where the decoder can be True",
        ),
    ],
)
def test_what_a_relative_of_gpt2_has_beyond_is_refused(config, message):
    with pytest.raises(UnsupportedError, match=message):
        gpt.config_of(config)


def test_what_cannot_be_read_is_told():
    for module in (gpt, llama):
        with pytest.raises(UnsupportedError, match="the config is of the family 'mpt', where"):
            module.read({"model_type": "mpt"}, {})
    config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2}
    config["n_positions"] = 5
    with pytest.raises(UnsupportedError, match="activation 'selu', expected one of gelu_new"):
        gpt.read(config | {"activation_function": "selu"}, {})
    with pytest.raises(
        WeightsError, match=r"there is no tensor wte\.weight, which embedding/embedding"
    ):
        gpt.read(config, {})
    model = decoder.CausalLM(gpt.config_of(config))
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    with pytest.raises(ShapeError, match="has learned 5 positions: got 6 tokens"):
        jax.eval_shape(model.init, jax.random.key(0), tokens)
    with pytest.raises(ShapeError, match="caches must be one for each of the 1 layers: got 0"):
        jax.eval_shape(model.init, jax.random.key(0), tokens, None, ())


def test_layers_see_what_comes_later_in_no_decoder():
    config = {"model_type": "gemma3_text", "use_bidirectional_attention": True}
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention=True, where the deco"):
        llama.config_of(_GEMMA | config)


def test_configs_before_layer_types_name_their_windows():
    fields = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 7}
    fields |= {"num_hidden_layers": 4, "sliding_window": 3, "query_pre_attn_scalar": 4}
    gemma2 = llama.config_of(fields | {"model_type": "gemma2"})
    assert [local.window for local in gemma2.layers] == [3, None, 3, None]
    own = {"model_type": "gemma3_text", "sliding_window_pattern": 3, "rope_local_base_freq": 7.0}
    gemma3 = llama.config_of(fields | own | {"rope_theta": 9.0})
    assert [local.rotary.base for local in gemma3.layers] == [7.0, 7.0, 9.0, 7.0]
    own = {"model_type": "qwen2", "use_sliding_window": True}
    for first, windows in (({}, [None] * 4), ({"max_window_layers": 3}, [None] * 3 + [3])):
        qwen2 = llama.config_of(fields | own | first)
        assert [local.window for local in qwen2.layers] == windows


LLAMA4 = {"model_type": "llama4_text", "vocab_size": 7, "hidden_size": 8, "intermediate_size": 16}
LLAMA4 |= {"num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size_mlp": 11}
LLAMA4 |= {"num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 6}


# What shapes of weights tell, too: heads and low ranks that are not those of the model are refused there.
_SHAPED = {"num_kv_heads", "head_size", "latent", "scale"}


@pytest.mark.parametrize("name", sorted({fields[1] for fields in FAMILIES.values()}))
def test_what_a_config_leaves_out_is_what_transformers_takes(name, torch):
    import transformers

    whole = getattr(transformers, f"{name}Config")().to_dict()
    (module,) = {fields[2] for fields in FAMILIES.values() if fields[1] == name}
    listed = ("layer_types", "no_rope_layers", "moe_layers", "attention_layers")
    for config in (whole, {key: x for key, x in whole.items() if key not in listed}):
        said = module.config_of(config)
        for left_out in config:
            rest = {key: x for key, x in config.items() if key != left_out}
            try:
                found = module.config_of(rest)
            except (ShapeError, UnsupportedError):
                continue
            fields = {field.name for field in dataclasses.fields(found)} - _SHAPED
            assert not {x for x in fields if getattr(found, x) != getattr(said, x)}, left_out


def test_the_text_of_gemma3_is_read_as_it_is_published_beside_pictures():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = llama.config_of({"model_type": "gemma3", "text_config": text})
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (8, 4, 256)
    sliding, full = config.layers[4:6]
    assert sliding == decoder.Local(Rotary(base=1e4), window=1024)
    assert full == decoder.Local(Rotary(base=1e6, scaling=Linear(8.0)))


def test_positions_with_a_factor_before_a_norm_are_refused():
    config = LLAMA4 | {"rope_parameters": _YARN}
    with pytest.raises(UnsupportedError, match="before a norm of queries and keys, where the deco"):
        llama.config_of(config)
    assert llama.config_of(config | {"use_qk_norm": False}).layers[0].rotary.scaling.factor == 4


def test_llama4_is_read_from_what_its_config_says_and_what_it_leaves_out():
    config = llama.config_of(LLAMA4)
    chunked = decoder.Local(Rotary(base=5e5, interleaved=True), chunk=6)
    free = decoder.Local(scale=llama.Tempered(0.5, 0.1, 8192), normed=False)
    assert config.layers == (*(chunked,) * 3, free, chunked)
    assert config.experts == decoder.SharedExperts(2, 1) and config.epsilon == 1e-5

    layers = llama.config_of(LLAMA4 | {"interleave_moe_layer_step": 2}).layers
    assert [local.sparse for local in layers] == [False, True, False, True, False]
    layers = llama.config_of(LLAMA4 | {"no_rope_layers": [0, 1, 1, 0, 1]}).layers
    assert [local.chunk for local in layers] == [None, 6, 6, None, 6]


def test_the_text_of_a_model_that_reads_pictures_is_read(torch):
    theirs, config, _ = make("llama4", torch)
    tensors = tensors_of(theirs)
    beside = {f"language_model.{name}": x for name, x in tensors.items()}
    found = llama.read({"model_type": "llama4", "text_config": config}, beside)
    model, variables = llama.read(config, tensors)
    assert found[0] == model
    jax.tree.map(np.testing.assert_array_equal, found[1], variables)


def test_layers_that_the_decoder_has_not_are_refused():
    fields = {"model_type": "qwen3", "num_hidden_layers": 1}
    with pytest.raises(UnsupportedError, match="layer_types of the config names linear_attention"):
        llama.config_of(fields | {"layer_types": ["linear_attention"]})
    with pytest.raises(UnsupportedError, match="hidden_act='tanh', expected one of silu"):
        llama.config_of(fields | {"hidden_act": "tanh"})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"norm": "batch"}, "norm must be one of rms, layer: got 'batch'"),
        (
            {"activation": "tanh"},
            "activation must be one of relu, silu, gelu, gelu_tanh: got 'tanh'",
        ),
        ({"width": 9}, "width must be a multiple of num_heads: got width=9 and num_heads=2"),
        ({"head_size": 0}, "head_size must be a whole number from 1 on: got 0"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1: got 1.0"),
        (
            {"latent": Latent(4, 3, 2, 3), "logit_cap": 3.0, "layers": (decoder.Local(window=3),)},
            "got logit_cap, window of a layer beside latent=",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(wrong, message):
    fields = {"vocabulary": 7, "width": 8, "hidden": 16, "num_heads": 2, "layers": ()}
    with pytest.raises(ShapeError, match=message):
        decoder.Config(**fields | wrong)


LAYERS = (decoder.Local(Rotary(), window=3), decoder.Local(Rotary()), decoder.Local(chunk=4))
SMALL = decoder.Config(11, 8, 16, 2, LAYERS, num_kv_heads=1)


def test_caches_of_layers_with_a_window_or_chunks_may_roll():
    """They hold a window or a chunk each, and the text is longer; the others hold it whole."""
    model, tokens = decoder.CausalLM(SMALL), np.random.default_rng(3).integers(0, 11, (2, 13))
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    caches, pieces, step = model.empty_caches(2, 13, rolling=True), [], jax.jit(model.apply)
    assert [cache.capacity for cache in caches] == [3, 13, 4]
    for piece in np.split(tokens, [5, 6, 7, 8, 9, 10, 11, 12], axis=1):
        logits, caches = step(variables, piece, None, caches)
        pieces.append(logits)
    whole = jax.jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)


def test_learned_positions_and_texts_without_end_are_refused():
    model = decoder.CausalLM(dataclasses.replace(SMALL, positions=7))
    with pytest.raises(ShapeError, match="has learned 7 positions, and rolling=True is for texts"):
        model.empty_caches(2, 5, rolling=True)


def test_dropout_is_there_in_training_alone():
    model, tokens = decoder.CausalLM(dataclasses.replace(SMALL, dropout=0.5)), np.ones((2, 5), int)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    apply = jax.jit(model.apply, static_argnames="training")
    rngs = [{"dropout": jax.random.key(i)} for i in range(2)]
    one, other = (apply(variables, tokens, training=True, rngs=rng) for rng in rngs)
    assert np.abs(one - other).max() > 0.1
    plain = jax.jit(decoder.CausalLM(SMALL).apply)(variables, tokens)
    np.testing.assert_array_equal(apply(variables, tokens), plain)


def single_experts(tensors):
    """Return tensors with each expert by itself, as the published files hold them."""
    single = {}
    for name, x in tensors.items():
        place, kind = name.rsplit(".", 1)
        if kind == "gate_up_proj":
            for part, both in zip(("gate", "up"), np.split(x, 2, axis=1)):
                single |= {f"{place}.{j}.{part}_proj.weight": w for j, w in enumerate(both)}
        elif kind == "down_proj":
            single |= {f"{place}.{j}.{kind}.weight": w for j, w in enumerate(x)}
        else:
            single[name] = x
    assert len(single) > len(tensors)
    return single


def test_experts_of_deepseek_are_read_one_by_one_too(torch):
    theirs, config, module = make("deepseek_v3", torch)
    tensors = tensors_of(theirs)
    single = single_experts(tensors)
    found, want = module.read(config, single), module.read(config, tensors)
    assert found[0] == want[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], want[1])


def test_weights_of_another_deepseek_are_named(torch):
    theirs, config, module = make("deepseek_v3", torch)
    tensors = tensors_of(theirs)
    single, layer = single_experts(tensors), "model.layers.1."
    odd, lost = np.ones((3, 3), np.float32), f"{layer}mlp.experts.2.up_proj.weight"
    heads = f"{layer}self_attn.kv_b_proj.weight"
    wrong = [
        (f"no tensor {lost}", {name: x for name, x in single.items() if name != lost}),
        (
            rf"no tensor {layer}mlp.experts.0.up_proj.weight",
            {name: x for name, x in single.items() if "up" not in name},
        ),
        (rf"{lost} has shape \(3, 3\), where that of the first", single | {lost: odd}),
        (rf"{heads} has shape .* of \d heads need", tensors | {heads: tensors[heads][1:]}),
        (
            "experts_gate_up.* of shape",
            tensors | {f"{layer}mlp.experts.gate_up_proj": odd},
        ),
    ]
    for message, changed in wrong:
        with pytest.raises(WeightsError, match=message):
            module.read(config, changed)


def test_what_a_relative_of_deepseek_has_beyond_is_refused():
    with pytest.raises(UnsupportedError, match="family 'deepseek_v2', where deepseek_v3 can be"):
        deepseek.config_of({"model_type": "deepseek_v2"})
    with pytest.raises(UnsupportedError, match="hidden_act='gelu', expected silu"):
        deepseek.config_of({"model_type": "deepseek_v3", "hidden_act": "gelu"})
    with pytest.raises(ShapeError, match="rank must be"):
        Latent(0, 3, 2, 3)


@pytest.mark.parametrize(
    "experts",
    [None, decoder.Experts(4, 2), decoder.SharedExperts(4, 2), decoder.GroupedExperts(4, 2, 2, 1)],
    ids=str,
)
def test_no_rows_and_no_tokens_have_no_logits(experts):
    layers = (decoder.Local(Rotary()),)
    model = decoder.CausalLM(decoder.Config(11, 8, 16, 2, layers=layers, experts=experts))
    variables = model.init(jax.random.key(0), np.ones((1, 3), int))
    for rows, length in ((0, 3), (2, 0)):
        tokens = np.zeros((rows, length), int)
        assert model.apply(variables, tokens).shape == (rows, length, 11)


def test_no_layers_have_no_caches():
    model = decoder.CausalLM(decoder.Config(11, 8, 16, 2, layers=()))
    tokens = np.ones((1, 3), int)
    variables = model.init(jax.random.key(0), tokens)
    logits, caches = model.apply(variables, tokens, None, model.empty_caches(1, 3))
    assert caches == () and logits.shape == (1, 3, 11)
