"""The script that a user with a TPU runs, on a machine without one. No time is judged."""

import json
import math

import jax
import pytest

from benchmarks import tpu, tpu_times, tpu_ways


@pytest.mark.parametrize("backward", [False, True])
def test_our_kernel_is_timed(backward, monkeypatch, capsys):
    work = tpu_ways.Work(backward, length=128, size=8, mask="causal", rate=0.5)
    monkeypatch.setitem(tpu_ways.WORKS, "tiny", work)
    (line,) = tpu_times.measure(["tiny"], "v5e", interpret=True, rounds=2)
    assert len(line["seconds"]) == 2 and min(line["seconds"]) > 0
    assert math.isclose(line["teraflops"], work.timed_flops / sum(line["seconds"]) * 2 / 1e12)
    assert capsys.readouterr().out.startswith("tiny")


def test_a_machine_without_a_tpu_is_told_so():
    with pytest.raises(SystemExit, match=r"runs on 'cpu', not on a TPU\. Expected one of TPU v4"):
        tpu.main(["--measure", "--case", "forward_128_full"])


def test_what_is_found_is_written_to_a_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tpu_times.KINDS, "cpu", "v5e")
    line = {"case": "x", "kind": "v5e", "way": "mha_jax", "seconds": [2.0], "teraflops": 1.0}
    monkeypatch.setattr(tpu_times, "measure", lambda names, kind: [{**line, "case": names[0]}])
    name = "backward_64_full_4096"
    tpu.main(["--measure", "--case", name, "--json", str(tmp_path / "times.json")])
    written = json.loads((tmp_path / "times.json").read_text())
    assert written["times"][0]["case"] == name
    assert written["machine"]["jax"] == jax.__version__
    assert "Please send it in" in capsys.readouterr().out


def test_what_does_not_run_says_so():
    line = {"case": "x", "kind": "v5e", "way": "flash", "error": "out of memory"}
    assert "does not run: out of memory" in tpu_times.row(line)
