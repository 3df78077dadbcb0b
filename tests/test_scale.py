"""The table of many chips: counts on a small topology, the formula, and what it says of what is absent."""

import re

import jax
import pytest
from jax.sharding import AxisType

from benchmarks import scale

SMALL = scale.Model(width=64, heads=4, kv_heads=2, hidden=64, layers=2)


def cpus():
    return jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_device_sends_the_bytes_of_the_formula_and_gathers_nothing(gradient):
    found = scale.traffic(scale.attention(SMALL, cpus(), 64, gradient).as_text())
    assert set(found.kinds) == {"collective-permute"}
    # XLA sends float32 on CPU, which has no products of bfloat16: those that are not sent as float32 anyway.
    shard = 2 * 64 * 2 * 16
    widened = 2 * shard * (8 if not gradient else 2 * 8 + 1)
    assert found.sent in {scale.formula(SMALL, 64, 8, gradient) + more for more in (0, widened)}


def test_on_tpus_that_are_not_there_a_ring_sends_the_formula_while_it_computes():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
    from tests.topologies import chips  # sets what several processes of libtpu need

    del chips
    mesh = scale.mesh_of(scale.FLEETS["tpu"], 8)
    found = scale.traffic(scale.attention(SMALL._replace(width=512), mesh, 256, True).as_text())
    assert found.sent == scale.formula(SMALL._replace(width=512), 256, 8, True)
    assert set(found.kinds) == {"collective-permute"} and found.overlaps == (True, True)


def test_the_longest_context_is_where_a_line_through_two_lengths_meets_the_memory():
    fleet = scale.FLEETS["tpu"]._replace(memory=10_000_000.0)
    # A million bytes, and a thousand a token.
    assert scale.longest(fleet, {128: 1_128_000, 256: 1_256_000}) == 9_000 // 128 * 128


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(scale.gpu_cards, "missing", lambda: "XLA's CUDA compiler is not installed")
    said: list[str] = []
    assert scale.main(["--on", "gpu"], said.append) == []
    assert said == ["H200: XLA's CUDA compiler is not installed"]


def test_a_line_of_the_table(monkeypatch):
    one = {"kinds": ("collective-permute",), "sent": 10**9, "formula": 10**9, "overlaps": (True,)}
    line = {
        "on": "H200",
        "chips": 8,
        "forward": one,
        "gradient": one,
        "memory": {4: 1e9},
        "fits": 1024,
    }
    monkeypatch.setattr(scale, "missing", lambda fleet: None)
    monkeypatch.setattr(scale, "rows", lambda *_: line)
    said: list[str] = []
    assert scale.main(["--on", "gpu", "--chips", "8"], said.append) == [line]
    assert re.search(r"forward: 1\.000 GB sent, formula 1\.000, 0 gathers, overlapped", said[0])
    assert said[0].endswith("longest context 1,024")
