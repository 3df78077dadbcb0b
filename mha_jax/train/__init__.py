"""Training of the example models: `python -m mha_jax.train --config=configs/g2p.py`.

In reading order: `tasks` (what a task is), `g2p` with `cmudict` (the main job), `optimizer`,
`loop`, `checkpoints`, `progress`, `decoding`, `scoring`, `__main__`.
"""
