"""GPT-2 and what came of it, by published configs: GPT-Neo, GPT-J, GPT-NeoX (Pythia), OPT, Falcon and BLOOM.

`read(config, tensors)` makes the model and its parameters of a Hugging Face config and PyTorch's tensors.
GPT-2, GPT-Neo and OPT learn their positions; GPT-J, GPT-NeoX and Falcon turn heads or a part of them, and
their sub-layers read the same input. GPT-Neo does not scale its logits, and every other layer has a window;
Falcon's query heads share one key-value head, or a few. BLOOM has no positions but biases by distance.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Wang & Komatsuzaki 2021
(GPT-J-6B); Black et al. 2022, arXiv:2204.06745; Zhang et al. 2022, arXiv:2205.01068 (OPT); Almazrouei et al.
2023, arXiv:2311.16867 (Falcon); Le Scao et al. 2022, arXiv:2211.05100 (BLOOM).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mha_jax.attention.given import is_integer
from mha_jax.attention.rotary import Rotary
from mha_jax.errors import UnsupportedError
from mha_jax.models.decoder import CausalLM, Config, Local, filled
from mha_jax.models.layouts import separated
from mha_jax.models.sizes import Published, of_each, published
from mha_jax.models.weights import arrays
from mha_jax.types import Params

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def _names(
    model: str, layer: str, attention: str, output: str, up: str, down: str, **others: str
) -> dict[str, str]:
    """Return the names of PyTorch's modules for ours; those of `others` with "layer_" are in a layer."""
    names = {f"attention/{ours}": attention + theirs for ours, theirs in _ATTENTION.items()}
    names |= {"attention/attention_output": attention + output}
    names |= {"feed_forward/up": up, "feed_forward/down": down}
    names |= {k.removeprefix("layer_"): v for k, v in others.items() if k.startswith("layer_")}
    found = {f"layer_{{i}}/{ours}": model + layer + theirs for ours, theirs in names.items()}
    own = {ours: name for ours, name in others.items() if not ours.startswith("layer_")}
    return found | {ours: model + name if ours != "logits" else name for ours, name in own.items()}


_GPT2_NORMS = {"layer_attention_norm": "ln_1", "layer_hidden_norm": "ln_2", "norm": "ln_f"}
_LEARNED = _GPT2_NORMS | {"embedding": "wte", "positions": "wpe", "logits": "lm_head"}
_NEOX_NORMS = {
    "layer_attention_norm": "input_layernorm",
    "layer_hidden_norm": "post_attention_layernorm",
}
_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_NAMES = {
    "gpt2": _names("", "h.{i}.", "attn.", "c_proj", "mlp.c_fc", "mlp.c_proj", **_LEARNED),
    "gpt_neo": _names(
        *("transformer.", "h.{i}.", "attn.attention.", "out_proj", "mlp.c_fc", "mlp.c_proj"),
        **_LEARNED,
    ),
    "gptj": _names(
        *("transformer.", "h.{i}.", "attn.", "out_proj", "mlp.fc_in", "mlp.fc_out"),
        **_GPT2_NORMS | {"embedding": "wte", "logits": "lm_head"},
    ),
    "gpt_neox": _names(
        *("gpt_neox.", "layers.{i}.", "attention.", "dense", *_MLP),
        **_NEOX_NORMS
        | {"embedding": "embed_in", "norm": "final_layer_norm", "logits": "embed_out"},
    ),
    "opt": _names(
        *("model.decoder.", "layers.{i}.", "self_attn.", "out_proj", "fc1", "fc2"),
        layer_attention_norm="self_attn_layer_norm",
        layer_hidden_norm="final_layer_norm",
        embedding="embed_tokens",
        positions="embed_positions",
        norm="final_layer_norm",
        logits="lm_head",
    ),
    "bloom": _names(
        *("", "h.{i}.", "self_attention.", "dense", *_MLP),
        **_NEOX_NORMS | {"embedding": "word_embeddings", "norm": "ln_f", "logits": "lm_head"},
        embedding_norm="word_embeddings_layernorm",
    ),
    "falcon": _names(
        *("transformer.", "h.{i}.", "self_attention.", "dense", *_MLP),
        **_NEOX_NORMS | {"embedding": "word_embeddings", "norm": "ln_f", "logits": "lm_head"},
    ),
}
# Falcon's norms where each of the parallel sub-layers has its own.
_TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def _gpt2(config: Published) -> Config:
    width, heads = config.size("n_embd"), config.size("n_head")
    sizes = (width, config.get("n_inner") or 4 * width, heads)
    scale = None if config.get("scale_attn_weights", True) else 1.0
    layers = (Local(),) * config.count("n_layer")
    if config.get("scale_attn_by_inverse_layer_idx"):
        first = (width / heads) ** -0.5 if scale is None else scale
        layers = tuple(Local(scale=first / (i + 1)) for i in range(len(layers)))
    return _config(config, sizes, layers, scale=scale, positions=config.size("n_positions"))


def _gpt_neo(config: Published) -> Config:
    width, window = config.size("hidden_size"), config.size("window_size")
    return _config(
        config,
        (width, config.get("intermediate_size") or 4 * width, config["num_heads"]),
        tuple(Local(window=window if kind == "local" else None) for kind in _kinds(config)),
        use_bias=("attention_output",),
        scale=1.0,
        positions=config.size("max_position_embeddings"),
    )


def _kinds(config: Published) -> list[str]:
    """Return for every layer whether its attention is local, as GPT-Neo lists it or counts it in groups."""
    count, known = config.count("num_layers"), ("global", "local")
    if config.get("attention_layers"):
        return of_each("attention_layers", config["attention_layers"], count, known)
    groups = config["attention_types"]
    if not isinstance(groups, (list, tuple)) or not all(_is_group(group) for group in groups):
        raise UnsupportedError(
            f"attention_types of the config must hold kinds of attention and how many times they come: got "
            f"{groups!r}. Expected [[['global', 'local'], 12]], say."
        )
    kinds = [kind for group, times in groups for kind in [*group] * min(times, count + 1)]
    return of_each("attention_types", kinds, count, known)


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, (list, tuple))
        and len(group) == 2
        and isinstance(group[0], (list, tuple))
        and is_integer(group[1])
    )


def _gptj(config: Published) -> Config:
    width, heads = config.size("n_embd"), config.size("n_head")
    rotary = Rotary(fraction=config.size("rotary_dim") * heads / width, interleaved=True)
    return _config(
        config,
        (width, config.get("n_inner") or 4 * width, heads),
        (Local(rotary),) * config.count("n_layer"),
        use_bias=False,
        parallel=True,
        one_norm=True,
        tied=bool(config.get("tie_word_embeddings")),
        output_bias=True,
    )


def _gpt_neox(config: Published) -> Config:
    rotary = Rotary.from_config({"rotary_pct": 0.25} | dict(config))
    return _config(
        config,
        (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]),
        (Local(rotary),) * config.count("num_hidden_layers"),
        use_bias=bool(config.get("attention_bias", True)),
        parallel=config.get("use_parallel_residual", True),
        tied=bool(config.get("tie_word_embeddings")),
    )


def _opt(config: Published) -> Config:
    width = config["hidden_size"]
    expected = {"do_layer_norm_before": True, "_remove_final_layer_norm": False}
    expected |= {"word_embed_proj_dim": width, "layer_norm_elementwise_affine": True}
    config.refuse(**expected)
    biased = config.get("enable_bias", True)
    return _config(
        config,
        (width, config["ffn_dim"], config["num_attention_heads"]),
        (Local(),) * config.count("num_hidden_layers"),
        use_bias=biased,
        hidden_bias=biased,
        positions=config.size("max_position_embeddings"),
    )


def _falcon(config: Published) -> Config:
    config.refuse(alibi=False)
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    grouped = config.get("new_decoder_architecture", False)
    alone = 1 if config.get("multi_query", True) else heads
    parallel = grouped or config.get("parallel_attn", True)
    return _config(
        config,
        (width, config.get("ffn_hidden_size") or 4 * width, heads),
        (Local(Rotary.from_config(config)),) * config.count("num_hidden_layers"),
        num_kv_heads=(config.get("num_kv_heads") or heads) if grouped else alone,
        use_bias=config.get("bias", False),
        hidden_bias=config.get("bias", False),
        parallel=parallel,
        one_norm=parallel and not _has_two_norms(config),
    )


def _bloom(config: Published) -> Config:
    config.refuse(apply_residual_connection_post_layernorm=False)
    width = config.size("n_embed" if config.get("n_embed") else "hidden_size")
    heads = config.get("n_head") or config["num_attention_heads"]
    layers = (Local(),) * config.count("n_layer" if config.get("n_layer") else "num_hidden_layers")
    return _config(config, (width, 4 * width, heads), layers, alibi=True, embedding_norm=True)


def _has_two_norms(config: Mapping[str, Any]) -> bool:
    grouped = config.get("new_decoder_architecture", False)
    return grouped and (config.get("num_ln_in_parallel_attn") or 2) == 2


_FAMILIES = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "falcon": _falcon,
    "bloom": _bloom,
}


def _config(
    config: Mapping[str, Any], sizes: tuple[int, int, int], layers: tuple[Local, ...], **own: Any
) -> Config:
    """Return our config with what all families have in common, which `own` may change."""
    names = ("activation_function", "hidden_act", "activation")
    usual = {"gpt_neox": "gelu", "falcon": "gelu", "opt": "relu"}
    named = next((config[name] for name in names if config.get(name)), None)
    named = named or usual.get(config["model_type"], "gelu_new")
    if named not in tuple(_ACTIVATIONS):
        raise UnsupportedError(
            f"the config has the activation {named!r}, expected one of {', '.join(_ACTIVATIONS)}."
        )
    common: dict[str, Any] = {
        "norm": "layer",
        "epsilon": config.get("layer_norm_epsilon") or config.get("layer_norm_eps") or 1e-5,
        "activation": _ACTIVATIONS[named],
        "gated": False,
        "use_bias": True,
        "hidden_bias": True,
        "tied": config.get("tie_word_embeddings", True),
    }
    return Config(config["vocab_size"], *sizes, layers, **common | own)


def config_of(config: Mapping[str, Any]) -> Config:
    """Return our config for a Hugging Face one.

    Args:
      config: A dictionary with `model_type`: gpt2, gpt_neo, gptj, gpt_neox, opt, falcon or bloom.

    Raises:
      UnsupportedError: If it is of another family, or has an activation or a layout that we have not.

    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2,
    ...           "n_positions": 13}
    >>> config_of(config).hidden
    32
    """
    config = published(config)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UnsupportedError(
            f"the config is of the family {family!r}, where {', '.join(_FAMILIES)} can be read here, and "
            "Llama's relatives by models.llama."
        )
    return _FAMILIES[family](config)


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
    config, tensors = published(config), arrays(tensors)
    ours, family = dataclasses.replace(config_of(config), dtype=dtype), config["model_type"]
    names = _NAMES[family]
    if family in ("gpt2", "bloom"):  # Published without the start of their names.
        tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    if family == "gpt2":
        # Its Conv1D keeps matrices as (in, out), unlike Linear.
        tensors = {name: x.T if ".c_" in name else x for name, x in tensors.items()}
    elif family == "gpt_neox":
        tensors = {name.replace("lm_head.", "embed_out."): x for name, x in tensors.items()}
    elif family == "opt":  # Its first two positions are of padding.
        tensors = {
            name: x[2:] if "embed_positions" in name and x.ndim else x
            for name, x in tensors.items()
        }
    elif family == "gptj" and ours.tied:  # Of its logits' module the bias alone is its own.
        tensors.pop("lm_head.weight", None)
    elif family == "falcon" and _has_two_norms(config):
        names = {
            ours: next((name.replace(a, b) for a, b in _TWO_NORMS.items() if a in name), name)
            for ours, name in names.items()
        }
    return filled(ours, names, separated(tensors, ours.num_heads, ours.num_kv_heads))
