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


WRONG_CONFIGS = [
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
