"""Training of the example models: `python -m mha_jax.train --config=g2p`.

In reading order: `tasks` (what a task is), `g2p` with `cmudict` (the main job), `optimizer`, `loop`,
`layout`, `processes`, `workdir`, `checkpoints`, `progress`, `decoding`, `scoring`, `command`. A module is
imported when first used.
"""

import typing as _typing

if _typing.TYPE_CHECKING:
    from mha_jax.train import checkpoints as checkpoints
    from mha_jax.train import cmudict as cmudict
    from mha_jax.train import command as command
    from mha_jax.train import configs as configs
    from mha_jax.train import data as data
    from mha_jax.train import decoding as decoding
    from mha_jax.train import digits as digits
    from mha_jax.train import g2p as g2p
    from mha_jax.train import layout as layout
    from mha_jax.train import lm as lm
    from mha_jax.train import loop as loop
    from mha_jax.train import losses as losses
    from mha_jax.train import modern as modern
    from mha_jax.train import optimizer as optimizer
    from mha_jax.train import predict as predict
    from mha_jax.train import processes as processes
    from mha_jax.train import progress as progress
    from mha_jax.train import scoring as scoring
    from mha_jax.train import settings as settings
    from mha_jax.train import tasks as tasks
    from mha_jax.train import translation as translation
    from mha_jax.train import workdir as workdir
else:
    from mha_jax.rooms import inside as _inside
    from mha_jax.rooms import lazy as _lazy
    from mha_jax.rooms import modules as _modules

    __getattr__, __dir__ = _lazy(__name__, _inside(__name__, *_modules(__path__)))
