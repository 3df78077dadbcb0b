"""The exceptions of the library. Each message says what happened, what was expected, how to fix
it."""


class MhaError(Exception):
    """Every error that mha_jax raises on purpose."""


class ShapeError(MhaError, ValueError):
    """A size, rank, dtype or value of an argument cannot be right."""


class UnsupportedError(MhaError, NotImplementedError):
    """A backend that was asked for by name cannot run this call."""


class WeightsError(MhaError, ValueError):
    """Weights or a configuration from elsewhere do not fit the layer."""
