"""List the commands: `python -m mha_jax`."""

from mha_jax import __version__
from mha_jax.cli import COMMANDS

if __name__ == "__main__":
    print(f"mha_jax {__version__}. Commands, each of which explains itself with --help:\n")
    for name, what in COMMANDS.items():
        print(f"  python -m {name:<26}{what}")
