"""The figures of GPUs, on a machine without one. No time is judged."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_cards, gpu_torch, gpu_ways


@pytest.fixture
def tiny(monkeypatch):
    work = gpu_ways.Work(True, length=16, size=8, mask="causal", dtype=jnp.float32, heads=1)
    monkeypatch.setattr(gpu_ways.Work, "batch", 1)
    monkeypatch.setattr(gpu_ways.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(gpu.WORKS, "tiny", work)
    return work


def test_the_ways_are_timed(tiny, capsys):
    lines = gpu.measure(["tiny"], rounds=2, at_least=0.0)
    assert [line["way"] for line in lines] == ["mha_jax", "jax.nn xla"]
    for line in lines:
        assert len(line["seconds"]) == 2 and min(line["seconds"]) > 0
        assert math.isclose(line["teraflops"], tiny.flops / sum(line["seconds"]) * 2 / 1e12)
    assert capsys.readouterr().out.startswith("tiny")


@pytest.mark.parametrize("extra", ["", "bias"])
@pytest.mark.parametrize("mask", gpu_ways.MASKS)
def test_the_ways_do_the_same_work(mask, extra, monkeypatch):
    monkeypatch.setattr(gpu_ways.Work, "batch", 2)
    work = gpu_ways.Work(length=24, size=8, mask=mask, extra=extra, dtype=jnp.float32, heads=2)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, _, valid, bias, _ = work.arguments
    q, k, v, bias = (jax.random.normal(x, a.shape) for x, a in zip(keys, (q, k, v, bias)))
    valid = jnp.asarray(np.arange(24)[None] < np.array([[20], [5]]))
    found = gpu_ways.ways(work, "A100")
    ours, theirs = (
        found[name](q, k, v, q, valid, bias, jnp.zeros(2, jnp.uint32))
        for name in ("mha_jax", "jax.nn xla")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_flops_are_those_of_visible_pairs():
    work = gpu_ways.Work(length=2048, size=64, mask="window")
    rows = np.arange(2048)
    pairs = np.minimum(rows + 1, 1024).sum()
    assert work.flops == 4 * pairs * 64 * 8 * 16
    assert gpu_ways.Work(True).flops == 3.5 * gpu_ways.Work().flops


def test_a_machine_without_a_gpu_is_told_so():
    with pytest.raises(SystemExit, match=r"runs on 'cpu', not on a GPU\. Run it on a machine with"):
        gpu.main(["--measure", "--case", "forward_128_full"])
    with pytest.raises(SystemExit, match="no case matches"):
        gpu.main(["--case", "nothing"])


def test_a_machine_without_the_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(gpu_cards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="CUDA compiler is not installed: pip install --no-deps"):
        gpu.main(["--case", "forward_128_full"])


def test_what_is_found_is_written_to_a_file(monkeypatch, tmp_path, capsys):
    line = {"way": "mha_jax", "seconds": [2.0], "teraflops": 1.0}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "measure", lambda names: [{"case": name, **line} for name in names])
    name = "backward_64_full_4096"
    gpu.main(["--measure", "--case", name, "--json", str(tmp_path / "times.json")])
    written = json.loads((tmp_path / "times.json").read_text())
    assert written["times"][0]["case"] == name
    assert written["machine"]["jax"] == jax.__version__
    assert "Please send it in" in capsys.readouterr().out


def test_rows_say_what_does_not_work():
    line = {"case": "x", "card": "H100", "way": "jax.nn xla", "error": "out of memory"}
    assert "does not compile: out of memory" in gpu.row(line)
    assert "does not run: out of memory" in gpu.time_row(line)


# A program as XLA prints it, cut down.
PROGRAM = """\
HloModule jit_f, is_scheduled=true

%fused_add (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %add = f32[8,4]{1,0} add(%p, %p)
}

%body.1 (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %a = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
  %b = (f32[8,4]{1,0}, u8[64]{0}) custom-call(%a), custom_call_target="library"
  ROOT %r = (s32[], f32[8,4]{1,0}) tuple(%a, %a)
}

ENTRY %main.9 (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %c = f32[8,4]{1,0} copy(%p)
  %w = (s32[], f32[8,4]{1,0}) while(%c), condition=%cond.1, body=%body.1
  ROOT %g = f32[8,4]{1,0} get-tuple-element(%w), index=1
}
"""


def test_launches_are_counted_apart_for_loops():
    class Program:
        def as_text(self):
            return PROGRAM

        def memory_analysis(self):
            return type("Memory", (), {"temp_size_in_bytes": 99})

    assert gpu_cards.counts(Program()) == (1, (2,), 0.0, 99, 64, ("library",))
    program = Program()
    program.as_text = lambda: PROGRAM.replace("add(", "dot(").replace("library", "__cublas$gemm")
    assert gpu_cards.counts(program).a_product == 2 / 2


def test_pytorch_does_the_same_work(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(gpu_ways.Work, "batch", 1)
    for mask in gpu_ways.MASKS:
        work = gpu_ways.Work(True, 24, 8, mask, dtype=jnp.float32, heads=2)
        gradients = gpu_torch.attention(work, "cpu")()
        assert [tuple(x.shape) for x in gradients] == [(1, 2, 24, 8)] * 3
        assert all(bool(torch.isfinite(x).all()) for x in gradients)
    assert len(gpu_torch.seconds(work, "cpu", rounds=2, at_least=0.0)) == 2
    # Causal and biased: the mask is in the bias, and hides the same.
    work = gpu_ways.Work(length=24, size=8, mask="causal", extra="bias", dtype=jnp.float32)
    torch.manual_seed(0)
    biased = gpu_torch.attention(work, "cpu")()
    torch.manual_seed(0)
    plain = gpu_torch.attention(dataclasses.replace(work, extra=""), "cpu")()
    torch.testing.assert_close(biased, plain)


def test_ways_are_those_of_the_card():
    work = gpu_ways.WORKS["forward_128_causal_4096"]
    kernels = {"mha_jax mosaic_gpu", "jax mosaic_gpu, f16"}
    new = jax.__version_info__ >= (0, 11)
    assert kernels & set(gpu_ways.ways(work, "H100")) == (kernels if new else set())
    assert not kernels & set(gpu_ways.ways(work, "B200"))


def test_a_row_tells_of_kernels():
    name = "forward_128_causal_4096"
    kernel = {"name": "k", "registers": 168, "spills": 0, "shared": 1024, "loops": None}
    line = {"case": name, "card": "H100", "way": "w", "kernels": 1, "a_product": 0.0, "calls": ()}
    row = gpu.row(line | {"temporaries": 0, "mosaic": [kernel]})
    assert "-            0.0" in row
    assert row.endswith(
        "k: 168 registers, 0 bytes spilled, 1,024 of shared memory; instructions of a turn: not read"
    )
