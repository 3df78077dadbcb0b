"""The Vision Transformer: patches of an image as tokens, one more for the class, by its published config.

B batch   P patches   D width   C classes

Source: Dosovitskiy et al. 2020, arXiv:2010.11929, section 3.1.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ShapeError, UnsupportedError
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.models.feed_forward import ACTIVATIONS, FeedForward
from mha_jax.models.sizes import check_config, check_named, check_numbers, published
from mha_jax.models.weights import arrays, variables_of
from mha_jax.types import Array, ArrayLike, Float, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are those of ViT-B/16.

    Args:
      classes: Of images, C.
      image: Rows and columns of an image.
      patch: Rows and columns of a patch; they divide the image's.
      channels: Of an image.
      width: Features of a token, D; a multiple of `num_heads`.
      num_heads: Attention heads.
      hidden: Inner width of the feed-forward layers.
      layers: How many.
      activation: One of `models.feed_forward.ACTIVATIONS`.
      epsilon: Of the norms.
      qkv_bias: Whether the projections to queries, keys and values have biases.

    Raises:
      ShapeError: A size cannot be meant.
    """

    classes: int = 1000
    image: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 768
    num_heads: int = 12
    hidden: int = 3072
    layers: int = 12
    activation: str = "gelu"
    epsilon: float = 1e-12
    qkv_bias: bool = True

    def __post_init__(self):
        names = ("classes", "image", "patch", "channels", "width", "num_heads", "hidden")
        check_config(self, **dict.fromkeys(names, 1), layers=0)
        check_named(self, activation=ACTIVATIONS)
        check_numbers(self, epsilon=0)
        if self.image % self.patch:
            raise ShapeError(
                f"patch must divide image: got patch={self.patch} and image={self.image}."
            )


class Layer(nn.Module):
    """Self-attention, then feed-forward, each in a residual connection with its norm first."""

    config: Config

    @nn.compact
    def __call__(self, x):
        config = self.config
        norm = partial(nn.LayerNorm, config.epsilon, use_fast_variance=False)
        attend = MultiHeadAttention(
            config.num_heads,
            config.width // config.num_heads,
            use_bias=config.qkv_bias or ("attention_output",),
            name="attention",
        )
        y = norm(name="attention_norm")(x)
        x = x + attend(y, y)
        feed_forward = FeedForward(config.hidden, config.width, config.activation, name="mlp")
        return x + feed_forward(norm(name="hidden_norm")(x))


class ViT(nn.Module):
    """An image classifier whose tokens are patches.

    >>> model = ViT(Config(5, image=12, patch=4, width=8, num_heads=2, hidden=16, layers=1))
    >>> images = jnp.ones((3, 12, 12, 3))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
    >>> jax.eval_shape(model.apply, variables, images).shape
    (3, 5)
    """

    config: Config = Config()

    @nn.compact
    def __call__(self, images: Float[ArrayLike, "B rows columns channels"]) -> Float[Array, "B C"]:
        """Map images to logits of the classes.

        Raises:
          ShapeError: The images have not the config's size.
        """
        config, images = self.config, jnp.asarray(images)
        size = (config.image, config.image, config.channels)
        if images.shape[1:] != size:
            raise ShapeError(
                f"images must be [B, rows, columns, channels] = [B, {size}]: got {images.shape}."
            )
        side = config.image // config.patch
        batch, patch, channels = images.shape[0], config.patch, config.channels
        # One axis at a time: so a batch over explicit axes of a mesh stays where it is.
        x = images.reshape(batch, side, patch, config.image, channels)
        x = x.reshape(batch, side, patch, side, patch, channels).swapaxes(2, 3)
        x = x.reshape(batch, side * side, patch, patch, channels)
        patches = x.reshape(batch, side * side, patch * patch * channels)
        x = nn.Dense(config.width, name="patches")(patches)
        first = nn.Embed(1, config.width, name="first")
        places = nn.Embed(side * side + 1, config.width, name="positions")
        table = places.embedding.at[:1].add(first.embedding)
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0))) + table[None]
        for i in range(config.layers):
            x = Layer(config, name=f"layer_{i}")(x)
        x = nn.LayerNorm(config.epsilon, use_fast_variance=False, name="norm")(x[:, 0])
        return nn.Dense(config.classes, name="classes")(x)


_LAYER = "vit.encoder.layer.{i}."
_NAMES = {
    "first": "vit.embeddings.cls_token",
    "positions": "vit.embeddings.position_embeddings",
    "patches": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "classes": "classifier",
    "layer_{i}/attention_norm": _LAYER + "layernorm_before",
    "layer_{i}/hidden_norm": _LAYER + "layernorm_after",
    "layer_{i}/attention/query": _LAYER + "attention.attention.query",
    "layer_{i}/attention/key": _LAYER + "attention.attention.key",
    "layer_{i}/attention/value": _LAYER + "attention.attention.value",
    "layer_{i}/attention/attention_output": _LAYER + "attention.output.dense",
    "layer_{i}/mlp/up": _LAYER + "intermediate.dense",
    "layer_{i}/mlp/down": _LAYER + "output.dense",
}
# What transformers 5 calls the same.
_RENAMED = {
    "vit.layers.": "vit.encoder.layer.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def read(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[ViT, dict[str, Params]]:
    """Return the model of a published config, and its parameters from PyTorch's tensors.

    Args:
      config: A Hugging Face config as a dictionary.
      tensors: NumPy arrays by PyTorch's names, as published or as transformers 5 names them.

    Raises:
      UnsupportedError: If the config is none of ViT's.
      WeightsError: A tensor is missing or has another shape.
    """
    config = published(config)
    named = config.get("hidden_act", "gelu")
    if config.get("model_type") != "vit" or named not in tuple(ACTIVATIONS):
        raise UnsupportedError(
            f"the config is of the family {config.get('model_type')!r} with "
            f"hidden_act={config.get('hidden_act')!r}: expected vit with one of {', '.join(ACTIVATIONS)}."
        )
    found = dict(_published(name, x) for name, x in arrays(tensors).items())
    ours = Config(
        found["classifier.bias"].size if "classifier.bias" in found else 1,
        config["image_size"],
        config["patch_size"],
        config.get("num_channels", 3),
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        named,
        config.get("layer_norm_eps", 1e-12),
        config.get("qkv_bias", True),
    )
    model = ViT(ours)
    images = jax.ShapeDtypeStruct((1, ours.image, ours.image, ours.channels), jnp.float32)
    return model, variables_of(model, _NAMES, found, images)


def _published(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a tensor as of modules with published names, patches as rows of a matrix."""
    for theirs, first in _RENAMED.items():
        name = name.replace(theirs, first)
    if name in (_NAMES["first"], _NAMES["positions"]):
        return f"{name}.weight", x[0] if x.shape[:-2] == (1,) else x
    if name == f"{_NAMES['patches']}.weight" and x.ndim == 4:  # (D, channels, rows, columns)
        return name, x.transpose(0, 2, 3, 1).reshape(len(x), -1)
    return name, x
