"""Configurations, inputs, published configs and weights that cannot be meant, refused in words."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mha_jax as mj
from mha_jax.models import bert, decoder, deepseek, gpt, layouts, llama, t5, vit
from mha_jax.models.weights import fill

NAN = float("nan")
TOKENS = np.array([[1, 2, 3, 4, 5]] * 3)
SMALL = {"vocabulary": 11, "width": 8, "hidden": 16, "num_heads": 2, "layers": (decoder.Local(),)}
WRONG_FIELDS = [
    *[("layers", x) for x in ((None,), 5, "ab")],
    *[("epsilon", x) for x in (-1.0, NAN, "a", None)],
    *[(name, x) for name in ("embedding_scale", "output_scale") for x in (NAN, None, "a")],
    *[("output_cap", x) for x in (0, -1.0, NAN, "a")],
    *[("experts", x) for x in ("a", 4)],
    *[("dtype", x) for x in ("int8", "foo", jnp.int32)],
    ("activation", ["silu"]),
    ("norm", None),
]


@pytest.mark.parametrize("name, value", WRONG_FIELDS, ids=str)
def test_fields_of_a_decoder_that_cannot_be_meant(name, value):
    with pytest.raises(mj.ShapeError, match=name):
        decoder.Config(**SMALL | {name: value})


def test_layers_and_experts_that_cannot_be_meant():
    for wrong in ({"window": 0}, {"window": -1}, {"chunk": 2.5}, {"scale": NAN}, {"rotary": "x"}):
        with pytest.raises(mj.ShapeError, match=next(iter(wrong))):
            decoder.Local(**wrong)
    for kind in (decoder.Experts, decoder.SharedExperts, decoder.GroupedExperts):
        for count, chosen in ((2, 3), (0, 0), (2, 0), ("2", 1)):
            with pytest.raises(mj.ShapeError, match="experts"):
                kind(count, chosen)
    for wrong in ({"groups": 4}, {"groups": 0}, {"groups": "a"}, {"groups": 2, "groups_chosen": 3}):
        with pytest.raises(mj.ShapeError, match="groups of experts"):
            decoder.GroupedExperts(6, 2, **wrong)
    for wrong in ({"groups": 6}, {"shared": -1}, {"shared": None}):
        with pytest.raises(mj.ShapeError, match="experts must be an integer"):
            decoder.GroupedExperts(6, 2, **wrong)
    with pytest.raises(mj.ShapeError, match="limit"):
        decoder.Experts(2, 1, limit=-1.0)
    for config in (t5.Config, vit.Config):
        for name, value in (("activation", "foo"), ("epsilon", -1.0), ("epsilon", NAN)):
            with pytest.raises(mj.ShapeError, match=name):
                config(**{name: value})
    with pytest.raises(mj.ShapeError, match="each of layers"):
        bert.Config(layers=(0, "1"))


WRONG_TOKENS = [TOKENS * 1.0, TOKENS[0], TOKENS[None], TOKENS > 2, [[-1]], [[11]]]


@pytest.mark.parametrize("tokens", WRONG_TOKENS, ids=lambda x: str(np.shape(x)))
def test_tokens_that_are_none(tokens):
    read = jnp.ones((1, 2), int)
    model = decoder.CausalLM(decoder.Config(**SMALL))
    variables = model.init(jax.random.key(0), read)
    of_bert = bert.Bert(bert.Config(11, width=8, num_heads=2, hidden=16, layers=(0,)))
    both = t5.T5(t5.Config(11, 8, 16, 2, 4, encoder_layers=1, decoder_layers=1))
    calls = [
        lambda x: model.apply(variables, x),
        lambda x: of_bert.apply(of_bert.init(jax.random.key(0), read), x),
        lambda x: both.apply(both.init(jax.random.key(0), read, read), x, read),
        lambda x: both.apply(both.init(jax.random.key(0), read, read), read, x),
    ]
    for call in calls:
        with pytest.raises(mj.ShapeError):
            call(tokens)


def test_masks_and_caches_that_do_not_fit():
    model = decoder.CausalLM(decoder.Config(**SMALL))
    variables = model.init(jax.random.key(0), jnp.asarray(TOKENS))
    for mask in (np.ones((3, 4), bool), np.ones(5, bool), np.full((3, 5), 2), np.ones((3, 5))):
        with pytest.raises(mj.ShapeError, match="mask"):
            model.apply(variables, TOKENS, mask)
    # Traced integers: 1 alone is real, for positions as for attention.
    odd = np.array([[1, 2, 1, 1, 1]] * 3)
    logits = jax.jit(model.apply)(variables, TOKENS, odd)
    np.testing.assert_allclose(logits, model.apply(variables, TOKENS, odd == 1), atol=1e-5)
    for caches in ((1,), (), model.empty_caches(3, 9) * 2):
        with pytest.raises(mj.ShapeError, match="one for each of the 1 layers"):
            model.apply(variables, TOKENS, None, caches)


def test_masks_of_integers_are_those_of_booleans():
    models = (
        bert.Bert(bert.Config(11, 8, 2, 16, layers=(0,))),
        t5.T5(t5.Config(11, 8, 16, 2, 4, 1, 1)),
    )
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    for model, tokens in zip(models, ((TOKENS,), (TOKENS, TOKENS[:, :4]))):
        variables = model.init(jax.random.key(0), *tokens)
        for run in (model.apply, jax.jit(model.apply)):
            got, want = (run(variables, *tokens, mask=x) for x in (mask, mask == 1))
            np.testing.assert_array_equal(got, want)


LLAMA = {"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2}
GPT2 |= {"n_positions": 13}


def test_published_configs_say_what_they_lack():
    for read, config in ((llama.config_of, LLAMA), (gpt.config_of, GPT2)):
        for name in config.keys() - {"model_type"}:
            rest = {key: x for key, x in config.items() if key != name}
            with pytest.raises(mj.UnsupportedError, match=f"has no '{name}'"):
                read(rest)
        for wrong in (None, "text", [], {"text_config": 5}):
            with pytest.raises((mj.ShapeError, mj.UnsupportedError)):
                read(wrong)
    families = [(llama.config_of, x) for x in ("gemma2", "gpt_oss", "llama4_text")]
    families += [
        (gpt.config_of, x) for x in ("gpt_neo", "gptj", "gpt_neox", "opt", "falcon", "bloom")
    ]
    families += [(t5.config_of, "t5"), (deepseek.config_of, "deepseek_v3")]
    families += [(lambda config: vit.read(config, {}), "vit")]
    for read, family in families:
        with pytest.raises(mj.UnsupportedError, match="config has no"):
            read({"model_type": family})


SIZES = {key: x for key, x in LLAMA.items() if key != "model_type"}
GPT_NEO = {"model_type": "gpt_neo", "vocab_size": 11, "hidden_size": 8, "num_layers": 2}
GPT_NEO |= {"num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 3}
GPT_NEO |= {"max_position_embeddings": 9}
GPTJ = {"model_type": "gptj", "vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2}
DEEPSEEK = SIZES | {"model_type": "deepseek_v3", "kv_lora_rank": 4, "qk_nope_head_dim": 3}
DEEPSEEK |= {"qk_rope_head_dim": 2, "v_head_dim": 3, "n_routed_experts": 6}
DEEPSEEK |= {"num_experts_per_tok": 2, "moe_intermediate_size": 5, "n_group": 1, "topk_group": 1}
T5 = {"model_type": "t5", "vocab_size": 11, "d_model": 8, "d_ff": 16, "num_heads": 2}
T5 |= {"num_layers": 2, "d_kv": 4}
VIT = SIZES | {"model_type": "vit", "image_size": 8, "patch_size": 4}
READERS = [(gpt, GPT2), (gpt, GPT_NEO), (llama, LLAMA), (deepseek, DEEPSEEK), (t5, T5), (vit, VIT)]
WRONG_BESIDE = [
    *[(gpt, GPT2, {name: x}) for name in ("n_embd", "n_head", "n_positions") for x in (None, [1])],
    *[(gpt, GPT2, {"activation_function": ["gelu"]}), (gpt, GPT2, {"n_head": 0})],
    *[(gpt, GPT_NEO, {"attention_types": x}) for x in ([["global"], 12], 5, [[["global"], 7]])],
    *[(gpt, GPT_NEO, {"attention_layers": x}) for x in (["global", "lokal"], ["global"], 3)],
    *[(gpt, GPT_NEO, {"num_layers": 7}), (gpt, GPT_NEO, {"window_size": None})],
    *[(gpt, GPTJ, {"rotary_dim": x}) for x in (None, 0, "a", 9)],
    *[(deepseek, DEEPSEEK, {name: "a"}) for name in ("n_group", "topk_group", "n_shared_experts")],
    *[(deepseek, DEEPSEEK, {"n_group": 4}), (deepseek, DEEPSEEK, {"n_group": 2, "topk_group": 5})],
    *[(deepseek, DEEPSEEK, {name: None}) for name in ("first_k_dense_replace", "n_shared_experts")],
    (deepseek, DEEPSEEK, {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": "a"}}),
    (t5, T5, {"feed_forward_proj": ["relu"]}),
    *[(vit, VIT, {"hidden_act": ["gelu"]}), (vit, VIT, {"qkv_bias": "a"})],
]


@pytest.mark.parametrize("module, config, wrong", WRONG_BESIDE, ids=str)
def test_published_configs_of_others_that_cannot_be_meant(module, config, wrong):
    with pytest.raises((mj.ShapeError, mj.UnsupportedError)):
        module.read(config | wrong, {})


def test_the_config_of_a_text_is_read_where_it_is_one_of_several():
    for module, config in READERS:
        with pytest.raises(mj.WeightsError, match="there is no tensor"):
            module.read({"model_type": "several", "text_config": config}, {})


def test_tensors_that_are_none_are_named_at_every_door():
    one = np.ones(1, np.float32)
    for module, config in READERS:
        for wrong in (None, [one], one):
            with pytest.raises(mj.WeightsError, match="must be a dictionary of NumPy arrays"):
                module.read(config, wrong)
        with pytest.raises(mj.WeightsError, match="names, which are texts: got 5"):
            module.read(config, {5: one})
        for wrong in ([1.0], None, "a"):
            with pytest.raises(mj.WeightsError, match=r"c_attn.* must be a NumPy array"):
                module.read(config, {"h.0.attn.c_attn.bias": wrong})


def test_tensors_without_the_axes_they_need_are_named():
    scalar = np.ones((), np.float32)
    opt = SIZES | {"model_type": "opt", "ffn_dim": 16, "max_position_embeddings": 9}
    embedding = {"model.decoder.embed_tokens.weight": np.ones((11, 8), np.float32)}
    places = {"model.decoder.embed_positions.weight": scalar}
    first = {"vit.embeddings.cls_token": np.ones((2, 1, 8), np.float32)}
    patches = {"classifier.bias": scalar}
    for module, config, tensors in ((gpt, opt, embedding | places), (vit, VIT, first | patches)):
        with pytest.raises(mj.WeightsError, match=r"has shape|there is no tensor"):
            module.read(config, tensors)


LLAMA4 = LLAMA | {"model_type": "llama4_text", "num_local_experts": 3, "num_experts_per_tok": 2}
LLAMA4 |= {"intermediate_size_mlp": 5}
GEMMA = LLAMA | {"model_type": "gemma3_text", "query_pre_attn_scalar": 4, "sliding_window": 3}
QWEN = LLAMA | {"model_type": "qwen3", "use_sliding_window": True}
WRONG_CONFIGS = [
    *[{name: x} for name in ("hidden_size", "num_attention_heads") for x in (None, 0, [8])],
    *[{"layer_types": x} for x in (3, "ab", [1, 2], ["full_attention", "chunked_attention"])],
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"hidden_act": ["silu"]},
    {"rope_parameters": 5},
    *[GEMMA | {"hidden_size": x} for x in (None, 0, [8])],
    *[GEMMA | {"hidden_activation": x} for x in ("gelu_new", ["gelu"])],
    *[GEMMA | {"sliding_window_pattern": x} for x in (None, 0, "a")],
    *[GEMMA | {"use_bidirectional_attention": True}],
    *[LLAMA4 | {"interleave_moe_layer_step": x} for x in (None, 0)],
    *[LLAMA4 | {"no_rope_layer_interval": x} for x in (None, 0)],
    *[LLAMA4 | {name: x} for name in ("num_attention_heads", "hidden_size") for x in (None, 0)],
    *[LLAMA4 | {"moe_layers": x} for x in (3, "ab", [-1])],
    *[LLAMA4 | {"floor_scale": 0}, LLAMA4 | {"attn_scale": "a"}, LLAMA4 | {"head_dim": "a"}],
    *[LLAMA4 | {"layer_types": ["full_attention", "lokal"]}, LLAMA4 | {"no_rope_layers": 3}],
    *[QWEN, QWEN | {"sliding_window": 3, "max_window_layers": None}],
    *[{"num_hidden_layers": x} for x in (-1, "2", 2.5, NAN)],
    *[{"layer_types": ["full_attention"] * n} for n in (1, 5)],
    *[{"rms_norm_eps": x} for x in (None, "1e-5")],
    *[{"model_type": "mistral", "sliding_window": x} for x in (-3, "a")],
    {"rope_theta": "a"},
    {"rope_scaling": 5},
    {"rope_scaling": {"rope_type": "llama3"}},
    {"model_type": "gemma2", "query_pre_attn_scalar": 0},
    {"model_type": ["llama"]},
]


@pytest.mark.parametrize("wrong", WRONG_CONFIGS, ids=str)
def test_published_configs_that_cannot_be_meant(wrong):
    with pytest.raises((mj.ShapeError, mj.UnsupportedError)):
        llama.config_of(LLAMA | wrong)


def test_weights_that_mean_more_than_their_numbers_are_refused():
    shapes = {"dense": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}
    names, weight = {"dense": "linear"}, np.ones((2, 3), np.float32)
    for dtype in (np.int8, np.uint8, bool, np.complex64, ml_dtypes.float8_e4m3fn, np.int32):
        with pytest.raises(mj.WeightsError, match=r"linear\.weight holds"):
            fill(shapes, names, {"linear.weight": weight.astype(dtype)})
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        assert fill(shapes, names, {"linear.weight": weight.astype(dtype)})["dense"]["kernel"].all()
    with pytest.raises(mj.WeightsError, match="must be a NumPy array: got list"):
        fill(shapes, names, {"linear.weight": weight.tolist()})
    for part in ("bias", "weight_scale", "g_idx"):
        with pytest.raises(mj.WeightsError, match=f"linear.{part} would be lost"):
            fill(shapes, names, {"linear.weight": weight, f"linear.{part}": np.ones(2)})
    # What belongs to no module that is read is none of ours.
    fill(shapes, names, {"linear.weight": weight, "linear.rotary.inv_freq": np.ones(2)})


def test_parts_of_a_layer_that_no_state_has_are_named():
    state = {
        f"{x}.weight": np.ones((8, 8), np.float32) for x in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    for options in ({"use_gate": True}, {"use_sinks": True}):
        with pytest.raises(mj.WeightsError, match="no tensor is known for"):
            layouts.import_attention(state, 2, **options)
