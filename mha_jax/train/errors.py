"""What can be wrong about the surroundings of a run: data, configuration, working directory."""

from mha_jax.errors import MhaError


class DataError(MhaError, ValueError):
    """A data file is absent or is not the expected one, or an input word cannot be read."""


class ConfigError(MhaError, ValueError):
    """A configuration names something that does not exist or does not fit."""


class WorkdirError(MhaError, ValueError):
    """A working directory holds something else than what was asked for."""
