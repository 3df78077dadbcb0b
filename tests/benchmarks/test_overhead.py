"""The costs of a call are sampled for ours and Flax's, and set beside each other. No time is judged."""

import json

import pytest

from benchmarks import overhead
from benchmarks.__main__ import dispatch
from benchmarks.results import OURS

SAMPLED = [name for name in overhead.FIGURES if name != "import"]


@pytest.fixture(scope="module")
def costs():
    return overhead.Sampler()


@pytest.mark.parametrize("figure", SAMPLED)
def test_every_figure_is_sampled_for_both(costs, figure, monkeypatch):
    monkeypatch.setattr(overhead, "LAYERS", 2)
    assert costs.sample(figure, OURS) > 0
    assert costs.sample(figure, overhead.FLAX) > 0


def test_an_import_is_timed_where_the_package_stands(tmp_path):
    (tmp_path / "slow_module.py").write_text("sum(range(10**6))")
    assert overhead.import_seconds("slow_module", tmp_path) > 0


def test_medians_and_ratios_are_printed_and_all_rounds_written(monkeypatch, tmp_path, capsys):
    taken = iter([9.0, 9.0, 1.0, 4.0, 5.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(overhead, "Sampler", lambda: None)
    monkeypatch.setattr(overhead, "import_seconds", lambda package, path: next(taken))
    file = tmp_path / "overhead.json"
    dispatch(["overhead", "--figures", "import", "--repeats", "3", "--json", str(file)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == ["the", "import", "2.00", "s", "4.00", "s", "0.500", "flax.linen"]
    assert json.loads(file.read_text())["seconds"] == {
        "import": {OURS: [1.0, 3.0, 2.0], "flax": [4.0, 5.0, 4.0]}
    }


def test_a_baseline_has_its_own_ratio_to_flax():
    by = {OURS: [1.0], "flax": [4.0], "before": [3.0], "flax before": [2.0]}
    heads, line = overhead.table({"jitted": by}).splitlines()
    assert heads.split()[-3:] == ["before", "before/flax", "mha_jax/before"]
    assert line.split()[-2:] == ["1.500", "0.333"]


def test_a_figure_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r"no figure matches \['lazy'\]\. They are: eager-linen"):
        overhead.main(["--figures", "lazy"])
