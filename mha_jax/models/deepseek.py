"""DeepSeek V3, and what has its config (R1 among it): latent attention, and experts in groups.

`read(config, tensors)` makes the model and its parameters of a Hugging Face config (a dictionary, as its
`config.json` holds it) and PyTorch's tensors by name. Layers that predict tokens further ahead are left out.

Source: DeepSeek-AI 2024, arXiv:2405.04434 (V2) and arXiv:2412.19437 (V3).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mha_jax.attention.rotary import Rotary
from mha_jax.attention.rotary_scaling import YaRN, yarn_magnitude
from mha_jax.errors import UnsupportedError, WeightsError
from mha_jax.models import llama, sizes
from mha_jax.models.decoder import CausalLM, Config, Local, filled
from mha_jax.models.feed_forward import GroupedExperts
from mha_jax.models.latent import Latent
from mha_jax.models.weights import arrays
from mha_jax.types import Params

_SELF, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
# Beside those that Llama has.
_NAMES = llama.NAMES | {
    "layer_{i}/attention/query_down": _SELF + "q_a_proj",
    "layer_{i}/attention/query_norm": _SELF + "q_a_layernorm",
    "layer_{i}/attention/latent": _SELF + "kv_a_proj_with_mqa",
    "layer_{i}/attention/latent_norm": _SELF + "kv_a_layernorm",
    "layer_{i}/attention/key": _SELF + "k_b_proj",
    "layer_{i}/attention/value": _SELF + "v_b_proj",
    "layer_{i}/feed_forward": _MLP + "gate.e_score_correction",
    "layer_{i}/feed_forward/router": _MLP + "gate",
    "layer_{i}/feed_forward/shared/gate": _MLP + "shared_experts.gate_proj",
    "layer_{i}/feed_forward/shared/up": _MLP + "shared_experts.up_proj",
    "layer_{i}/feed_forward/shared/down": _MLP + "shared_experts.down_proj",
}
# What transformers takes where a config leaves it out.
_USUAL = {
    "deepseek_v3": {
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
    }
}


def config_of(config: Mapping[str, Any]) -> Config:
    """Return our config for a Hugging Face one.

    Args:
      config: A dictionary whose `model_type` is deepseek_v3.

    Raises:
      UnsupportedError: If it is of another family, or has an activation that we have not.

    >>> config = {"model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...           "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 4, "q_lora_rank": None,
    ...           "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 3, "n_routed_experts": 6,
    ...           "num_experts_per_tok": 2, "moe_intermediate_size": 5, "first_k_dense_replace": 1,
    ...           "n_group": 1, "topk_group": 1}
    >>> config_of(config).latent
    Latent(rank=4, key_size=3, turned_size=2, value_size=3, query_rank=None)
    """
    config = sizes.published(config, _USUAL)
    if config.get("model_type") != "deepseek_v3":
        raise UnsupportedError(
            f"the config is of the family {config.get('model_type')!r}, where deepseek_v3 can be read. "
            "Build a models.decoder.Config by hand if the family is made of the same parts."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"the config has hidden_act={config['hidden_act']!r}, expected silu."
        )
    latent = _latent(config)
    experts = GroupedExperts(
        config.get("n_routed_experts") or config["num_local_experts"],
        config["num_experts_per_tok"],
        groups=config.get("n_group") or 1,
        groups_chosen=config.get("topk_group") or 1,
        shared=config["n_shared_experts"],
        normalized=config.get("norm_topk_prob", True),
        scale=config["routed_scaling_factor"],
    )
    rotary = Rotary.from_config(config)
    rotary = dataclasses.replace(rotary, interleaved=config.get("rope_interleave", True))
    dense = config.size("first_k_dense_replace", least=0)
    return Config(
        config["vocab_size"],
        config["hidden_size"],
        config["moe_intermediate_size"],
        config["num_attention_heads"],
        tuple(Local(rotary, sparse=i >= dense) for i in range(config.count("num_hidden_layers"))),
        head_size=latent.key_size + latent.turned_size,
        dense_hidden=config["intermediate_size"],
        epsilon=config.get("rms_norm_eps", 1e-6),
        experts=experts,
        use_bias=bool(config.get("attention_bias")),
        latent=latent,
        scale=_scale(config, latent, rotary),
        tied=bool(config.get("tie_word_embeddings")),
    )


def _latent(config: sizes.Published) -> Latent:
    return Latent(
        rank=config["kv_lora_rank"],
        key_size=config["qk_nope_head_dim"],
        turned_size=config["qk_rope_head_dim"],
        value_size=config["v_head_dim"],
        query_rank=config.get("q_lora_rank"),
    )


def _scale(config: sizes.Published, latent: Latent, rotary: Rotary) -> float:
    """Return the factor on logits, larger where YaRN has made positions longer."""
    scale = (latent.key_size + latent.turned_size) ** -0.5
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("mscale_all_dim") and isinstance(rotary.scaling, YaRN):
        scale *= yarn_magnitude(rotary.scaling.factor, rope["mscale_all_dim"]) ** 2
    return scale


def read(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any = None
) -> tuple[CausalLM, dict[str, Params]]:
    """Return the model of a published config, and its parameters from PyTorch's tensors.

    Args:
      config: As for `config_of`.
      tensors: NumPy arrays by PyTorch's names, experts each by itself or all in one. Names that the model has
        not are left alone.
      dtype: Of the computation; that of the parameters, float32, if None.

    Raises:
      UnsupportedError: As `config_of`.
      WeightsError: A tensor is missing or has another shape.

    Cost: A copy of the tensors.
    """
    ours = dataclasses.replace(config_of(config), dtype=dtype)
    latent = _latent(sizes.published(config))
    tensors = _as_ours(latent, ours.num_heads, _together(arrays(tensors)))
    of_queries = (
        {} if latent.query_rank is None else {"layer_{i}/attention/query": _SELF + "q_b_proj"}
    )
    return filled(ours, _NAMES | of_queries, tensors)


def _together(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors in which those of single experts, [out, in] each, are one, [X, out, in]."""
    found, numbers = {}, {}
    for name, x in tensors.items():
        one = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if one is None:
            found[name] = x
        else:
            numbers.setdefault(one[1], set()).add(one[2])
    for experts, known in numbers.items():
        gate, up, down = (
            _stacked([f"{experts}.{i}.{part}_proj.weight" for i in range(len(known))], tensors)
            for part in ("gate", "up", "down")
        )
        found[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], 1)
        found[f"{experts}.down_proj"] = down
    return found


def _stacked(names: list[str], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return one matrix of every expert as [X, out, in]."""
    for name in names:
        if name not in tensors:
            raise WeightsError(
                f"there is no tensor {name}, where other experts have theirs. Expected the weights of all "
                "experts of a layer."
            )
        first, shape = tensors[names[0]].shape, tensors[name].shape
        if shape != first or len(shape) != 2:
            raise WeightsError(
                f"the tensor {name} has shape {shape}, where that of the first expert has {first}. Expected "
                "matrices of one shape for all experts of a layer."
            )
    return np.stack([tensors[name] for name in names])


def _as_ours(
    latent: Latent, num_heads: int, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return tensors under the names of `_NAMES`: keys and values apart, experts as [X, in, out]."""
    found = {}
    for name, x in tensors.items():
        if name.endswith("kv_b_proj.weight"):
            needed = (num_heads * (latent.key_size + latent.value_size), latent.rank)
            if x.shape != needed:
                raise WeightsError(
                    f"the tensor {name} has shape {x.shape}, but keys and values of {num_heads} heads need "
                    f"{needed}. Expected the weights of this very model; compare the sizes in its config."
                )
            heads = x.reshape(-1, latent.key_size + latent.value_size, latent.rank)
            for part, own in zip("kv", np.split(heads, [latent.key_size], axis=1)):
                at = name.removesuffix("kv_b_proj.weight")
                found[f"{at}{part}_b_proj.weight"] = own.reshape(-1, latent.rank)
        elif name.endswith("e_score_correction_bias"):
            found[name.removesuffix("_bias") + ".weight"] = x
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[f"{name}.weight"] = x.swapaxes(1, 2) if x.ndim == 3 else x
        else:
            found[name] = x
    return found
