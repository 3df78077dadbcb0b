"""What Keras's initializers, regularizers and constraints share: checks, names and configs."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np

from mha_jax.errors import ShapeError, WeightsError

Rule: TypeAlias = tuple[str, str, Callable[[Any], bool]]  # names of settings, in words, as a test
_LARGEST = sys.float_info.max
_WORD = 2**31  # larger integers are no integers of JAX's


@dataclasses.dataclass(frozen=True)
class Settings:
    """A value whose settings fulfil its rules and can be hashed: numbers of Python's, tuples."""

    rules: ClassVar[tuple[Rule, ...]] = ()
    floats: ClassVar[bool] = False  # whether integers become floats
    home: ClassVar[str] = "keras"  # the package that a config names

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            value = value.item() if isinstance(value, np.generic) else value
            value = tuple(value) if isinstance(value, list) else value
            for names, expected, holds in self.rules:
                if name in names.split() and not holds(value):
                    got = f"{type(self).__name__} got {name}={value!r}"
                    raise ShapeError(f"{got}. Expected {expected}.")
            if isinstance(value, int) and name != "seed" and (self.floats or abs(value) >= _WORD):
                value = float(value)
            object.__setattr__(self, name, value)


def is_number(value: Any, least: float = -_LARGEST, most: float = _LARGEST) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and least <= value <= most


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of such values, with the words for its errors.

    Args:
      base: The class of all its values, whose name in lower case is the noun for one.
      known: Names, and what each makes of the settings in a config.
      name, config: Examples of what `get` takes.
      function, unless, accepts: What may be a plain function, and what not, in words; as a test.
      canonical: From a name as given to one in `known`.
    """

    base: type[Settings]
    known: Mapping[Any, Callable[..., Any]]
    name: str
    config: Mapping[str, Any]
    function: str
    unless: str = ""
    accepts: Callable[[Any], bool] = lambda spec: spec is None or callable(spec)
    canonical: Callable[[Any], Any] = lambda name: name

    @property
    def noun(self) -> str:
        return self.base.__name__.lower()

    def get(self, spec: Any) -> Any:
        """Return what a name, a config, a class or a value of Keras's or of ours describes."""
        if isinstance(spec, self.base):
            return spec
        if type(spec).__module__.partition(".")[0] == "keras":
            spec = {"class_name": type(spec).__name__, "config": spec.get_config()}
        if isinstance(spec, (str, type)):
            spec = {"class_name": getattr(spec, "__name__", spec)}
        one = f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"
        if isinstance(spec, dict):
            try:
                name = spec.get("registered_name") or spec["class_name"]
                return self._find(name)(**(spec.get("config") or {}))
            except (KeyError, TypeError) as error:
                raise WeightsError(
                    f"{spec!r} is not the config of {one}: {error}. Expected what Keras writes, "
                    f"{self.config} for example."
                ) from error
        if self.accepts(spec):
            return spec
        raise ShapeError(
            f"{spec!r} is not {one}. Expected {'None, ' if self.accepts(None) else ''}a name such "
            f"as {self.name!r}, a Keras config dict, a value of mha_jax.{self.noun}s, or a "
            f"function {self.function}{self.unless}."
        )

    def serialize(self, spec: Any) -> Any:
        """Return the config, a dict for JSON, of anything that `get` takes; None for None."""
        if (value := self.get(spec)) is None:
            return None
        if not isinstance(value, self.base):
            raise WeightsError(
                f"the {self.noun} {value!r} is a plain function and cannot be written to a config. "
                f"Pass a name such as {self.name!r} or a value of mha_jax.{self.noun}s."
            )
        config = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        for name, setting in config.items():
            if callable(setting):
                config[name] = self.serialize(setting)
            elif isinstance(setting, tuple):
                config[name] = list(setting)
        return {
            "module": f"{value.home}.{self.noun}s",
            "class_name": type(value).__name__,
            "config": config,
            "registered_name": None,
        }

    def _find(self, name: Any) -> Callable[..., Any]:
        known = self.canonical(name)
        if known not in self.known:
            nearest = difflib.get_close_matches(str(known), self.known, n=1, cutoff=0)[0]
            raise ShapeError(
                f"unknown {self.noun} {name!r}. Did you mean {nearest!r}? Known are "
                f"{', '.join(self.known)}. Pass another one as a function {self.function}."
            )
        return self.known[known]
