"""The exceptions of the package. Each message says what happened, what was expected, how to fix
it."""


class MhaError(Exception):
    """Every error that mha_jax raises on purpose."""


class ShapeError(MhaError, ValueError):
    """A size, rank, dtype or value of an argument cannot be right."""


class ArgumentError(MhaError, TypeError):
    """An argument that a class or function does not have."""


class UnsupportedError(MhaError, NotImplementedError):
    """A backend that was asked for by name cannot run this call."""


class WeightsError(MhaError, ValueError):
    """Weights or a configuration from elsewhere do not fit the layer, or their file is damaged."""


class MissingPackageError(MhaError, ImportError):
    """A package that only a part of the library needs is not installed."""


class InputError(MhaError, ValueError):
    """A sentence or a reaction cannot be read."""


class DataError(MhaError, ValueError):
    """A data file is absent, damaged or not the expected one, or an input word cannot be read."""


class ConfigError(MhaError, ValueError):
    """A configuration of a run names something that does not exist, or cannot be meant."""


class WorkdirError(MhaError, ValueError):
    """The working directory of a run holds something else, is in use, or cannot be written."""
