"""The command that times decoding runs, and both ways of decoding agree."""

import pytest

from benchmarks import decoding
from benchmarks.__main__ import dispatch


def test_a_small_run_times_both_ways(monkeypatch, capsys):
    small = decoding.Config(8, 2, 12, 1, 1, dropout=0.0, norm_first=True)
    monkeypatch.setattr(decoding, "CONFIG", small)
    seconds = decoding.main(["--words=5", "--batch=3", "--length=4", "--repeats=1"])
    names = ["nothing kept", "encoder kept", "with a cache", "encoder alone"]
    assert list(seconds) == names
    assert min(seconds.values()) > 0
    lines = capsys.readouterr().out.splitlines()
    assert "6 targets of at most 4 symbols, sources of 3" in lines
    assert [line.split()[0] for line in lines[-4:]] == ["than", "than", "in", "same"]
    assert lines[-1].split() == ["same", "targets", "100.0%"]


def test_sizes_that_cannot_be_are_refused(capsys):
    with pytest.raises(SystemExit):
        dispatch(["decoding", "--length=1"])
    assert "--length must be at least 2, not 1" in capsys.readouterr().err
