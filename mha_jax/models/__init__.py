"""Flax models composed of the layer, each imported when first used."""

import typing as _typing

if _typing.TYPE_CHECKING:
    from mha_jax.models import bert as bert
    from mha_jax.models import decoder as decoder
    from mha_jax.models import decoder_config as decoder_config
    from mha_jax.models import deepseek as deepseek
    from mha_jax.models import feed_forward as feed_forward
    from mha_jax.models import gguf as gguf
    from mha_jax.models import gpt as gpt
    from mha_jax.models import latent as latent
    from mha_jax.models import layouts as layouts
    from mha_jax.models import llama as llama
    from mha_jax.models import minilm as minilm
    from mha_jax.models import rxnmapper as rxnmapper
    from mha_jax.models import sizes as sizes
    from mha_jax.models import smiles as smiles
    from mha_jax.models import smollm2 as smollm2
    from mha_jax.models import t5 as t5
    from mha_jax.models import torch_file as torch_file
    from mha_jax.models import transformer as transformer
    from mha_jax.models import vit as vit
    from mha_jax.models import weights as weights
    from mha_jax.models import wordpiece as wordpiece
else:
    from mha_jax.rooms import inside as _inside
    from mha_jax.rooms import lazy as _lazy
    from mha_jax.rooms import modules as _modules

    __getattr__, __dir__ = _lazy(__name__, _inside(__name__, *_modules(__path__)))
