"""What can be wrong about the input of a pretrained model."""

from mha_jax.errors import MhaError


class InputError(MhaError, ValueError):
    """A sentence or a reaction cannot be read."""
