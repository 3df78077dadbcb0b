"""The experiments, one file each: `python -m mha_jax.train --config=<name>`."""
