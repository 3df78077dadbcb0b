"""Modules that are imported when first used, and packages that only some of them need.

`packages()` turns the absence of an optional package into one sentence with the extra to install.
"""

import contextlib
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mha_jax.errors import MissingPackageError

# The extra of pyproject.toml that brings a package, by the package's import name.
EXTRAS = {
    "absl": "train",
    "grain": "train",
    "h5py": "keras",
    "matplotlib": "visualize",
    "ml_collections": "train",
    "orbax": "train",
    "tensorboardX": "train",
    "tokenizers": "pretrained",
}


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """Say how to install an optional package that an import inside the `with` block misses.

    Raises:
      MissingPackageError: In the place of ModuleNotFoundError, for the packages of the extras.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingPackageError(
            f"the package {package} is not installed. Install it with: "
            f'pip install "mha_jax[{EXTRAS[package]}]"',
            name=package,
        ) from error


def lazy(
    package: str, rooms: Mapping[str, str], names: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__`, which imports rooms, and its `__dir__`.

    Args:
      package: Name of the package.
      rooms: Modules by the names under which the package shows them.
      names: What else the package shows.
    """

    def get(name: str) -> Any:
        if name in rooms:
            with packages():
                return importlib.import_module(rooms[name])
        raise AttributeError(f"module {package!r} has no attribute {name!r}{meant(name)}")

    def meant(name: str) -> str:
        """Say in which room a name is that the package does not show, or which one is near."""
        if name.startswith("_"):
            return ""
        if near := [own for own in listed() if own.lower() == name.lower()]:
            return f". Did you mean {near[0]!r}?"
        for room, module in rooms.items():
            for own, found in vars(sys.modules.get(module, object)).items():
                same = own.lower() == name.lower()
                if same and str(getattr(found, "__module__", "")).startswith(package):
                    return f". It is {package}.{room}.{own}"
        near = difflib.get_close_matches(name, listed(), 1)
        return f". Did you mean {near[0]!r}?" if near else ""

    def listed() -> list[str]:
        return sorted({*rooms, *names})

    return get, listed


def inside(package: str, *modules: str) -> dict[str, str]:
    """Name modules of a package as its rooms."""
    return {module: f"{package}.{module}" for module in modules}


def modules(folders: Iterable[str]) -> list[str]:
    """Return the names of all modules of a package, which lie in its `__path__`."""
    return [name for _, name, _ in pkgutil.iter_modules(folders) if name != "__main__"]
