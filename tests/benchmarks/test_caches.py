"""The bench of caches: every step is named and timed, and both ways attend to the same. No time is judged."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import caches


def test_every_step_is_timed(capsys):
    sizes = ["--capacity", "16", "--window", "16", "--repeats", "2", "--calls", "1"]
    medians = caches.main(sizes)
    names = ["rolling, 10 tokens before", "rolling, 1,000 tokens before", "capacity 16, 8 held"]
    assert {*names, "capacity 16, by hand", "capacity 2, 1 held"} <= set(medians)
    assert all(seconds > 0 for seconds in medians.values())
    assert "capacity 16, by hand" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        caches.parse(["--window", "1"])


def test_by_hand_is_the_same_step():
    found = caches.steps(batch=2, capacity=16, window=16)
    a, b = (found[f"capacity 16, {name}"] for name in ("15 held", "by hand"))
    outs = [
        step.step(step.cache, step.token + jnp.arange(2.0)[:, None, None, None])[0]
        for step in (a, b)
    ]
    np.testing.assert_allclose(*outs, rtol=1e-6)
