"""Flax models composed of the layer; imported by name, never by `import mha_jax`."""
