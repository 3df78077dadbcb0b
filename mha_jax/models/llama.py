"""Llama and what came of it, by published configs: Mistral, Qwen 2 and 3, Gemma 2 and 3, OLMo 2, gpt-oss,
Cohere, and the text of Llama 4.

`read(config, tensors)` makes the model and its parameters of a Hugging Face config (a dictionary, as its
`config.json` holds it) and PyTorch's tensors by name (as `models.weights.read_safetensors` reads them).

Source: Touvron et al. 2023, arXiv:2302.13971; Jiang et al. 2023, arXiv:2310.06825; Yang et al. 2024,
arXiv:2407.10671, and 2025, arXiv:2505.09388; Gemma Team 2024, arXiv:2408.00118, and 2025, arXiv:2503.19786;
OpenAI 2025, arXiv:2508.10925; Cohere 2024 (Command R); OLMo Team 2024, arXiv:2501.00656; Meta 2025 (Llama 4).
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.given import integer, of_kind
from mha_jax.attention.rotary import Rotary
from mha_jax.errors import UnsupportedError
from mha_jax.models.decoder import CausalLM, Config, Experts, Local, SharedExperts, filled
from mha_jax.models.sizes import FLOAT32, Published, check_numbers, of_each, published
from mha_jax.models.weights import arrays
from mha_jax.types import Array, ArrayLike, Float, Int, Params

_SELF, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "logits": "lm_head",
    "layer_{i}/attention_norm": "model.layers.{i}.input_layernorm",
    "layer_{i}/hidden_norm": "model.layers.{i}.post_attention_layernorm",
    "layer_{i}/attention/query": _SELF + "q_proj",
    "layer_{i}/attention/key": _SELF + "k_proj",
    "layer_{i}/attention/value": _SELF + "v_proj",
    "layer_{i}/attention/attention_output": _SELF + "o_proj",
    "layer_{i}/attention/query_norm": _SELF + "q_norm",
    "layer_{i}/attention/key_norm": _SELF + "k_norm",
    "layer_{i}/attention/sinks": _SELF + "sinks",
    "layer_{i}/feed_forward/gate": _MLP + "gate_proj",
    "layer_{i}/feed_forward/up": _MLP + "up_proj",
    "layer_{i}/feed_forward/down": _MLP + "down_proj",
    "layer_{i}/feed_forward/router": _MLP + "router",
    "layer_{i}/feed_forward/experts_gate_up": _MLP + "experts.gate_up_proj",
    "layer_{i}/feed_forward/experts_down": _MLP + "experts.down_proj",
    "layer_{i}/feed_forward/shared/gate": _MLP + "shared_expert.gate_proj",
    "layer_{i}/feed_forward/shared/up": _MLP + "shared_expert.up_proj",
    "layer_{i}/feed_forward/shared/down": _MLP + "shared_expert.down_proj",
}
_NORMED_AFTER = {
    "layer_{i}/attention_norm_after": "model.layers.{i}.post_attention_layernorm",
    "layer_{i}/hidden_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "layer_{i}/hidden_norm_after": "model.layers.{i}.post_feedforward_layernorm",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_INPUTS = ("query", "key", "value")


_HEAD = "It is the head size, or a number in its place."


def _activation(name: str, found: Any) -> str:
    if found not in tuple(_ACTIVATIONS):
        raise UnsupportedError(
            f"the config has {name}={found!r}, expected one of {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[found]


def _gemma(config: Published) -> dict[str, Any]:
    config.refuse(use_bidirectional_attention=False)
    named = config.get("hidden_activation") or "gelu_pytorch_tanh"
    return {
        "norm_after": True,
        "activation": _activation("hidden_activation", named),
        "scale": integer("query_pre_attn_scalar", config["query_pre_attn_scalar"], 1, 2**20, _HEAD)
        ** -0.5,
        "logit_cap": config.get("attn_logit_softcapping"),
        "output_cap": config.get("final_logit_softcapping"),
        "embedding_scale": config.size("hidden_size") ** 0.5,
        "tied": config.get("tie_word_embeddings", True),
    }


def _gpt_oss(config: Published) -> dict[str, Any]:
    limit, slope = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
    experts = Experts(config["num_local_experts"], config["num_experts_per_tok"], limit, slope)
    return {"use_sinks": True, "experts": experts, "use_bias": config.get("attention_bias", True)}


def _olmo2(config: Published) -> dict[str, Any]:
    epsilon = config.get("rms_norm_eps", 1e-5)
    norms = {"norm_before": False, "norm_after": True, "epsilon": epsilon}
    return {"qk_norm": "rms_over_heads"} | norms


def _llama4(config: Published) -> dict[str, Any]:
    activation = _activation("hidden_act", config.get("hidden_act", "silu"))
    return {
        "qk_norm": "l2",
        "epsilon": config.get("rms_norm_eps", 1e-5),
        "experts": SharedExperts(
            config["num_local_experts"], config["num_experts_per_tok"], activation
        ),
        "dense_hidden": config["intermediate_size_mlp"],
    }


def _cohere(config: Published) -> dict[str, Any]:
    return {
        "qk_norm": "layer_per_head" if config.get("use_qk_norm") else None,
        "norm": "layer",
        "norm_bias": False,
        "epsilon": config.get("layer_norm_eps", 1e-5),
        "parallel": True,
        "one_norm": True,
        "output_scale": config.get("logit_scale", 0.0625),
        "tied": config.get("tie_word_embeddings", True),
    }


# What a family has beside Llama's config, by the config's model_type.
_FAMILIES = {
    "llama": lambda config: {},
    "mistral": lambda config: {},
    "qwen2": lambda config: {"use_bias": _INPUTS},
    "qwen3": lambda config: {"qk_norm": "rms"},
    "gemma2": _gemma,
    "gemma3_text": lambda config: _gemma(config) | {"qk_norm": "rms"},
    "gpt_oss": _gpt_oss,
    "cohere": _cohere,
    "olmo2": _olmo2,
    "llama4_text": _llama4,
}
_NEIGHBOURS = ("cohere", "llama4_text")  # whose rotary positions turn pairs of neighbours
# What transformers takes where a config leaves it out, as those of texts beside pictures do.
_USUAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "gemma2": {
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "gpt_oss": {
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "cohere": {"rope_theta": 500_000.0},
    "llama4_text": {"rope_theta": 500_000.0},
}


@dataclasses.dataclass(frozen=True)
class Tempered:
    """Llama 4's scale of queries by their positions: (1 + strength log(1 + floor((p + 1) / every))) scale.

    >>> print(Tempered(scale=0.5, strength=0.1, every=4)(jnp.asarray([[2, 3]])).round(3))
    [[0.5   0.535]]
    """

    scale: float
    strength: float
    every: float

    def __post_init__(self):
        check_numbers(self, scale=-FLOAT32, strength=-FLOAT32, every=1e-30)

    def __call__(self, positions: Int[ArrayLike, "B T"]) -> Float[Array, "B T"]:
        times = jnp.floor((jnp.asarray(positions, jnp.float32) + 1) / self.every)
        return (1 + self.strength * jnp.log1p(times)) * self.scale


def config_of(config: Mapping[str, Any]) -> Config:
    """Return our config for a Hugging Face one.

    Args:
      config: A dictionary with `model_type`: llama, mistral, qwen2, qwen3, gemma2, gemma3_text, gpt_oss,
        cohere, olmo2 or llama4_text; or with such a dictionary as its `text_config`.

    Raises:
      UnsupportedError: If it is of another family, or has an activation or positions that we have not.

    >>> config = {"model_type": "mistral", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...           "num_hidden_layers": 2, "num_attention_heads": 2, "sliding_window": 3}
    >>> [local.window for local in config_of(config).layers]
    [3, 3]
    """
    config = published(config, _USUAL)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UnsupportedError(
            f"the config is of the family {family!r}, where {', '.join(_FAMILIES)} can be read. "
            "Build a models.decoder.Config by hand if the family is made of the same parts."
        )
    activation = _activation("hidden_act", config.get("hidden_act", "silu"))
    layers = _llama4_layers(config) if family == "llama4_text" else _layers(config)
    fields: dict[str, Any] = {
        "activation": activation,
        "use_bias": bool(config.get("attention_bias")),
        "hidden_bias": bool(config.get("mlp_bias")),
        "tied": bool(config.get("tie_word_embeddings")),
        "epsilon": config.get("rms_norm_eps", 1e-6),
    }
    return Config(
        config["vocab_size"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
        layers,
        num_kv_heads=config.get("num_key_value_heads"),
        head_size=config.get("head_dim"),
        **fields | _FAMILIES[family](config),
    )


def _layers(config: Published) -> tuple[Local, ...]:
    kinds = _kinds(config)
    rotary = {kind: _rotary(config, kind) for kind in set(kinds)}
    window = config["sliding_window"] if "sliding_attention" in kinds else None
    return tuple(Local(rotary[k], window if k == "sliding_attention" else None) for k in kinds)


def _llama4_layers(config: Published) -> tuple[Local, ...]:
    """Return layers with rotary positions, in chunks, and those without, which scale by position."""
    count, every = config.count("num_hidden_layers"), config.size("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(count)]
    turned = of_each("no_rope_layers", turned, count)
    size = config.get("attention_chunk_size", 8192)
    full, chunked = "full_attention", "chunked_attention"
    kinds = config.get("layer_types") or [chunked if one else full for one in turned]
    kinds = of_each("layer_types", kinds, count, (full, chunked))
    sparse, tempered = _llama4_sparse(config, count), None
    if config.get("attn_temperature_tuning", True):
        usual = {"attn_scale": 0.1, "floor_scale": 8192} | dict(config)
        head_size = config.size("hidden_size") / config.size("num_attention_heads")
        head_size = config.size("head_dim") if config.get("head_dim") else head_size
        tempered = Tempered(head_size**-0.5, usual["attn_scale"], usual["floor_scale"])
    normed = config.get("use_qk_norm", True)
    rotary = {kind: _rotary(config, kind) for kind in (full, chunked)}
    if normed and any(turned):
        rotary = {kind: _before_norm(one) for kind, one in rotary.items()}
    return tuple(
        Local(
            rotary[kind] if turns else None,
            chunk=size if kind == chunked else None,
            scale=None if turns else tempered,
            normed=bool(turns) and normed,
            sparse=i in sparse,
        )
        for i, (turns, kind) in enumerate(zip(turned, kinds))
    )


def _before_norm(rotary: Rotary) -> Rotary:
    """Return rotary positions that a norm follows in Llama 4, which comes first here.

    Raises:
      UnsupportedError: If they have a factor, which changes what the norm's epsilon is.
    """
    if rotary.scaling is not None and rotary.scaling.magnitude != 1:
        raise UnsupportedError(
            f"the config has {rotary.scaling} before a norm of queries and keys, where the decoder has the "
            "norm first. Expected use_qk_norm=False, or positions without an attention factor."
        )
    return rotary


def _llama4_sparse(config: Published, count: int) -> Collection[int]:
    """Return the numbers of the layers that have experts."""
    if config.get("moe_layers") is None:
        step = config.size("interleave_moe_layer_step", 1)
        return range(step - 1, count, step)
    hint = "It lists the numbers of the layers that have experts, from 0 on."
    listed = of_kind("moe_layers", config["moe_layers"], Sequence, hint)
    return [integer("each of moe_layers", i, 0, 2**20, hint) for i in listed]


def _kinds(config: Published) -> list[str]:
    """Return for every layer whether its attention slides, as newer configs list it."""
    count = config.count("num_hidden_layers")
    full, sliding = "full_attention", "sliding_attention"
    if config.get("layer_types"):
        return of_each("layer_types", config["layer_types"], count, (full, sliding))
    slides = _sliding(config, count)
    return [sliding if i in slides else full for i in range(count)]


def _sliding(config: Published, count: int) -> Collection[int]:
    """Return the numbers of the layers that slide in a config that does not list them."""
    family = config["model_type"]
    if family in ("qwen2", "qwen3"):
        if not config.get("use_sliding_window") or config["sliding_window"] is None:
            return ()
        return range(config.size("max_window_layers", 28, least=0), count)
    if config.get("sliding_window") is None:
        return ()
    if family == "mistral":
        return range(count)
    if family in ("gemma2", "gpt_oss"):
        return range(0, count, 2)
    if family == "gemma3_text":
        every = config.size("sliding_window_pattern", 6)
        return [i for i in range(count) if (i + 1) % every]
    return ()


def _rotary(config: Published, kind: str) -> Rotary:
    """Return the rotary positions of a kind of layer; Gemma 3 has two bases."""
    rope, family = config.get("rope_parameters") or {}, config["model_type"]
    of_kind("rope_parameters", rope, Mapping, "Pass the config.json as it is.")
    found = {**config, "rope_parameters": rope.get(kind, rope)}
    if kind == "sliding_attention" and "rope_local_base_freq" in config:
        own = {"rope_theta": config["rope_local_base_freq"], "rope_scaling": None}
        found |= {**own, "rope_parameters": rope.get(kind)}
    rotary = Rotary.from_config(found)
    return dataclasses.replace(rotary, interleaved=True) if family in _NEIGHBOURS else rotary


def read(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any = None
) -> tuple[CausalLM, dict[str, Params]]:
    """Return the model of a published config, and its parameters from PyTorch's tensors.

    Args:
      config: As for `config_of`.
      tensors: NumPy arrays by PyTorch's names. Names that the model has not are left alone.
      dtype: Of the computation; that of the parameters, float32, if None.

    Raises:
      UnsupportedError: As `config_of`.
      WeightsError: A tensor is missing or has another shape.

    Cost: A copy of the tensors.
    """
    ours = dataclasses.replace(config_of(config), dtype=dtype)
    family = published(config)["model_type"]
    tensors = dict(_plain(name, x) for name, x in arrays(tensors).items())
    names = NAMES | (_NORMED_AFTER if ours.norm_after else {})
    if family == "llama4_text":
        names = {ours: name.replace(".mlp.", ".feed_forward.") for ours, name in names.items()}
    model, variables = filled(ours, names, tensors)
    if family.startswith("gemma"):  # Its norms multiply by 1 + weight.
        variables = jax.tree_util.tree_map_with_path(
            lambda path, x: x + 1 if path[-1].key == "scale" else x, variables
        )
    return model, variables


def _plain(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a parameter that is no module's as a module's: "sinks" as "sinks.weight"."""
    name = name.removeprefix("language_model.")  # beside one of pictures
    if name.endswith("_proj_bias"):
        return name.removesuffix("_bias") + ".bias", x.reshape(-1)
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight", x
