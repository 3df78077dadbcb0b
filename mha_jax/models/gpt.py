"""GPT-2 and GPT-NeoX (Pythia), by their published configs: `read(config, tensors)`.

GPT-2 learns its positions and ties the embedding's table; GPT-NeoX turns a quarter of every head, and both of
its sub-layers read the same input. Both keep query, key and value in one matrix.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Black et al. 2022,
arXiv:2204.06745.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mha_jax.attention.rotary import Rotary
from mha_jax.errors import UnsupportedError
from mha_jax.models.decoder import CausalLM, Config, Local, filled
from mha_jax.models.layouts import separated
from mha_jax.types import Params

_GPT2 = {
    "embedding": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "layer_{i}/attention_norm": "h.{i}.ln_1",
    "layer_{i}/hidden_norm": "h.{i}.ln_2",
    "layer_{i}/attention/query": "h.{i}.attn.q_proj",
    "layer_{i}/attention/key": "h.{i}.attn.k_proj",
    "layer_{i}/attention/value": "h.{i}.attn.v_proj",
    "layer_{i}/attention/attention_output": "h.{i}.attn.c_proj",
    "layer_{i}/feed_forward/up": "h.{i}.mlp.c_fc",
    "layer_{i}/feed_forward/down": "h.{i}.mlp.c_proj",
}
_LAYER = "gpt_neox.layers.{i}."
_NEOX = {
    "embedding": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "logits": "embed_out",
    "layer_{i}/attention_norm": _LAYER + "input_layernorm",
    "layer_{i}/hidden_norm": _LAYER + "post_attention_layernorm",
    "layer_{i}/attention/query": _LAYER + "attention.q_proj",
    "layer_{i}/attention/key": _LAYER + "attention.k_proj",
    "layer_{i}/attention/value": _LAYER + "attention.v_proj",
    "layer_{i}/attention/attention_output": _LAYER + "attention.dense",
    "layer_{i}/feed_forward/up": _LAYER + "mlp.dense_h_to_4h",
    "layer_{i}/feed_forward/down": _LAYER + "mlp.dense_4h_to_h",
}
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_COMMON = {"norm": "layer", "gated": False, "use_bias": True, "hidden_bias": True}


def config_of(config: Mapping[str, Any]) -> Config:
    """Return our config for a Hugging Face one.

    Args:
      config: A dictionary with `model_type`: gpt2 or gpt_neox.

    Raises:
      UnsupportedError: If it is of another family, or has an activation that we have not.

    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2,
    ...           "n_positions": 13}
    >>> config_of(config).hidden
    32
    """
    family = config.get("model_type")
    if family not in ("gpt2", "gpt_neox"):
        raise UnsupportedError(
            f"the config is of the family {family!r}, where gpt2 and gpt_neox can be read here, and Llama's "
            "relatives by models.llama."
        )
    named = config.get("activation_function", "gelu_new") if family == "gpt2" else None
    named = named or config.get("hidden_act", "gelu")
    if named not in _ACTIVATIONS:
        raise UnsupportedError(
            f"the config has the activation {named!r}, expected one of {', '.join(_ACTIVATIONS)}."
        )
    common: dict[str, Any] = _COMMON | {"activation": _ACTIVATIONS[named]}
    if family == "gpt2":
        width = config["n_embd"]
        hidden = config.get("n_inner") or 4 * width
        common |= {"epsilon": config.get("layer_norm_epsilon", 1e-5), "tied": True}
        layers = (Local(),) * config["n_layer"]
        heads, positions = config["n_head"], config["n_positions"]
        return Config(
            config["vocab_size"], width, hidden, heads, layers, positions=positions, **common
        )
    common |= {"epsilon": config.get("layer_norm_eps", 1e-5)}
    common |= {"parallel": config.get("use_parallel_residual", True)}
    rotary = Rotary.from_config({"rotary_pct": 0.25} | dict(config))
    sizes = (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"])
    layers = (Local(rotary),) * config["num_hidden_layers"]
    return Config(config["vocab_size"], *sizes, layers, **common)


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
    if config["model_type"] == "gpt2":
        # Its Conv1D keeps matrices as (in, out), unlike Linear.
        tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        tensors = {name: x.T if ".c_" in name else x for name, x in tensors.items()}
        names = _GPT2
    else:
        tensors = {name.replace("lm_head.", "embed_out."): x for name, x in tensors.items()}
        names = _NEOX
    return filled(ours, names, separated(tensors, ours.num_heads))
