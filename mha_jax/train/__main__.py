"""Train a model: `python -m mha_jax.train --config=g2p [--config.steps=100 ...]`."""

import sys

from mha_jax.cli import command


@command
def main(arguments: list[str]) -> None:
    from mha_jax.train.command import run

    run(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
