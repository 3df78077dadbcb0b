"""Keras's layer: its arguments, its steps, and the modules around them."""

from mha_jax.layer.linen import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
