"""The bench: what it measures is named, and what it says follows from the times. No time is judged."""

import dataclasses
import importlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as program
from benchmarks import measure as measuring
from benchmarks import report, runs, timer
from benchmarks.measure import Settings, measure, rounds
from benchmarks.peers import MODULES, NAMES, load
from benchmarks.peers.base import JaxPeer, dense_mask
from benchmarks.peers.ours import Ours
from benchmarks.results import OURS, Result, best, find, ratio
from benchmarks.rows import PUBLISHED, ROWS, Row, draw

TINY = Row("tiny-row", "function", length=5, heads=2, size=3)
QUICK = Settings(repeats=2, sample=0.0)


def fake(peer, times, row="layer-512", framework="jax", **more):
    return Result(row, peer, framework, "measured", times=tuple(times), **more)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run the program once on two tiny rows; return (results, file of JSON, terminal text)."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    text = []
    rows = ["layer-512-train", "grid-function-padding"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: text.append(" ".join(map(str, words))))
        patch.setattr(program, "progress", lambda text: None)
        results = program.main(
            ["--quick", "--repeats", "2", "--rows", *rows, "--peers", "linen", "jax.nn"]
            + ["--json", str(path), "--markdown"]
        )
    return results, json.loads(path.read_text()), "\n".join(text)


class TestProgram:
    def test_every_peer_is_measured_and_agrees_with_us(self, ran):
        results, _, _ = ran
        assert [(r.row, r.peer) for r in results] == [
            (row, peer)
            for row in ("layer-512-train", "grid-function-padding")
            for peer in (OURS, "linen", "jax.nn")
        ]
        for result in results:
            assert result.status == "measured", result.reason
            assert len(result.times) == 2
            assert result.temporary_bytes is not None
            assert result.first_call > result.median > 0
            assert result.difference < 1e-5

    def test_the_json_holds_all_that_is_needed_to_judge_a_figure(self, ran):
        results, whole, _ = ran
        assert whole["schema"] == report.SCHEMA
        assert set(whole) == {
            *("schema", "date", "commit", "versions", "machine", "rows", "results")
        }
        assert set(whole["machine"]) == {
            *("cores", "processor", "isa", "memory_gib", "device", "load_at_start")
        }
        assert whole["versions"]["jax"]
        assert [r["median"] for r in whole["results"]] == [r.median for r in results]
        assert {field.name for field in dataclasses.fields(Result)} <= set(whole["results"][0])
        assert whole["rows"][0]["title"] == "layer B2 T13 4x4, forward+backward"

    def test_the_terminal_shows_rows_and_the_table_for_the_readme(self, ran):
        _, _, text = ran
        assert "layer-512-train: layer B2 T13 4x4, forward+backward" in text
        assert "grid-function-padding: function B2 T13 4x4, key padding, forward" in text
        assert "| work | mha_jax | temporaries | best JAX peer | linen | jax.nn |" in text
        assert "Measured by `python -m benchmarks`: 20" in text

    def test_an_unknown_row_or_peer_is_named(self):
        with pytest.raises(SystemExit, match=r"no row layer-513\. --list names them all"):
            program.main(["--rows", "layer-513"])
        with pytest.raises(SystemExit, match=r"no peer flaxx\. They are: mha_jax, linen"):
            program.main(["--peers", "flaxx"])

    def test_list_names_every_row(self, capsys):
        program.main(["--list"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(ROWS)

    def test_tpu_goes_to_its_own_command(self, monkeypatch):
        asked = []
        module = types.SimpleNamespace(main=asked.append)
        monkeypatch.setitem(sys.modules, "benchmarks.tpu", module)
        program.dispatch(["tpu", "--kind", "v5e"])
        assert asked == [["--kind", "v5e"]]

    def test_without_a_choice_the_published_rows_are_run(self):
        rows = [row.name for row in program.chosen(program.parser().parse_args([]))]
        assert tuple(rows) == PUBLISHED


class TestPeers:
    def test_a_library_that_is_missing_is_named_with_the_reason(self, monkeypatch):
        real = importlib.import_module

        def without(name):
            if name.endswith("haiku_layer"):
                raise ModuleNotFoundError("No module named 'haiku'\nand more")
            return real(name)

        monkeypatch.setattr(importlib, "import_module", without)
        peers, absent = load((OURS, "haiku"))
        assert [p.name for p in peers] == [OURS]
        reason = "not importable: No module named 'haiku' (pip install dm-haiku)"
        assert [(a.name, a.reason) for a in absent] == [("haiku", reason)]
        results = measure(TINY, peers, absent, QUICK)
        assert [(r.peer, r.status, r.reason) for r in results][1:] == [("haiku", "absent", reason)]
        assert f"haiku: absent, {reason}" in report.row_table(TINY, results)
        assert f"- Not here: haiku ({reason})." in report.markdown([TINY], results, FACTS)

    def test_the_list_of_names_is_what_the_modules_bring(self):
        peers, absent = load()
        assert {p.name for p in peers} | {a.name for a in absent} == set(NAMES)
        assert len(NAMES) == sum(len(brings) for _, brings in MODULES.values())

    def test_a_feature_that_a_peer_lacks_is_a_sentence(self):
        (ours, linen), _ = load((OURS, "linen"))
        assert linen.cannot(ROWS["grid-layer-grouped"]) == "no grouped heads"
        assert linen.cannot(ROWS["grid-layer-causal"]) is None
        assert all(ours.cannot(row) is None for row in ROWS.values())

    @pytest.mark.parametrize("causal", [False, True])
    def test_the_floor_is_the_products_and_no_rival(self, causal):
        """Causal, a row of tiles multiplies what stands before it; here that is one tile or two."""
        row = dataclasses.replace(TINY, length=1024, size=3, causal=causal)
        peers, _ = load((OURS, "products alone"))
        results = measure(row, peers, [], QUICK)
        assert [r.status for r in results] == ["measured", "measured"]
        assert best(results, row.name, "jax") is None
        q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1024, 2, 3), np.float32)
        got = jax.jit(lambda *x: peers[1].attend(row, *x, {}))(q, k, v)
        seen = np.ones((1024, 1024)) if not causal else np.kron(np.tri(2), np.ones((512, 512)))
        want = np.einsum("btnh,bsnh,ts,bsnv->btnv", *(q, k, seen, v), optimize=True)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-2)
        assert "self-attention only" in peers[1].cannot(ROWS["grid-layer-grouped"])

    @pytest.mark.parametrize("name", ["window", "padding", "per-head", "causal"])
    def test_the_dense_mask_says_what_the_row_says(self, name):
        row = ROWS[f"grid-layer-{name}"].shrunk()
        data = draw(row)
        extras = {key: jnp.asarray(x) for key, x in data.masks.items()}
        mask = np.broadcast_to(dense_mask(row, extras), (2, 4, 13, 13))
        for b, n, t, s in np.ndindex(mask.shape):
            expected = (
                (s <= t or not row.causal)
                and (row.window is None or t - row.window < s <= t)
                and (not row.padding or s < data.masks["lengths"][b])
                and (not row.per_head or data.masks["heads"][0, n, t, s])
            )
            assert mask[b, n, t, s] == expected, (b, n, t, s)


class Scaled(JaxPeer):
    """A peer whose output is ours times a factor."""

    def __init__(self, factor):
        self.name, self.factor = "scaled", factor

    def attend(self, row, q, k, v, extras):
        return Ours().attend(row, q, k, v, extras) * self.factor


class Raising(JaxPeer):
    name = "raising"

    def attend(self, row, q, k, v, extras):
        raise ValueError("heads must be prime\nand so on")


class TestMeasure:
    def test_a_peer_that_raises_is_reported_with_its_first_line(self):
        results = measure(TINY, [Ours(), Raising()], [], QUICK)
        assert [r.status for r in results] == ["measured", "failed"]
        assert results[1].reason == "ValueError: heads must be prime"

    def test_our_own_error_is_not_caught(self, monkeypatch):
        monkeypatch.setattr(Ours, "attend", Raising.attend)
        with pytest.raises(ValueError, match="heads must be prime"):
            measure(TINY, [Ours()], [], QUICK)

    def test_a_peer_that_computes_something_else_is_not_timed(self):
        results = measure(TINY, [Ours(), Scaled(1.25)], [], QUICK)
        assert (results[1].status, results[1].times) == ("skipped", ())
        assert results[1].reason == "its numbers are 25.0% from ours"

    def test_a_slow_peer_is_left_out_with_a_note(self):
        results = measure(TINY, [Ours(), Scaled(1.0)], [], Settings(2, limit=0.0, sample=0.0))
        assert [(r.status, r.reason) for r in results] == [("skipped", "> 0 s")] * 2

    def test_a_slow_peer_gets_the_rounds_that_fit_and_says_so(self, monkeypatch):
        five = Settings(repeats=5, limit=60.0)
        assert [rounds(first, five) for first in (0.0, 12.0, 13.0, 25.0, 59.0)] == [5, 5, 4, 2, 1]
        monkeypatch.setattr(measuring, "rounds", lambda first, settings: 1)
        (result,) = measure(TINY, [Ours()], [], QUICK)
        assert (len(result.times), result.status) == (1, "measured")
        assert "mha_jax: measured, slow, so timed 1x" in report.row_table(TINY, [result])

    def test_a_program_that_would_not_fit_is_not_run(self, monkeypatch):
        monkeypatch.setattr(measuring, "available_bytes", lambda: 64)
        row = dataclasses.replace(TINY, length=64, backward=True)
        (result,) = measure(row, [Ours()], [], QUICK)
        assert result.status == "skipped"
        assert result.reason == "needs 0.0 GiB, 0.0 GiB are free"

    def test_rounds_take_turns(self, monkeypatch):
        called = []

        def sample(run, calls):
            called.append(run)
            return timer.Sample(1.0, 2.0, 0.5)

        monkeypatch.setattr(runs.Run, "sample", sample)
        monkeypatch.setattr(measuring, "_calls", lambda run, wanted: 1)
        results = measure(TINY, [Ours(), Scaled(1.0)], [], Settings(repeats=3))
        first, second = called[:2]
        assert called == [first, second, second, first, first, second]
        assert first != second
        assert [(r.median, r.cpu_median) for r in results] == [(1.0, 2.0)] * 2

    def test_a_row_of_our_own_runs_alone(self):
        row = dataclasses.replace(TINY, alone=True)
        assert [r.peer for r in measure(row, [Ours(), Scaled(1.0)], [], QUICK)] == [OURS]

    def test_a_sample_is_the_mean_of_its_calls_after_one_that_is_not_counted(self, monkeypatch):
        calls = []
        readings = iter([timer.Sample(10.0, 1.0, 0.0), timer.Sample(16.0, 10.0, 1.5)])
        monkeypatch.setattr(timer, "clocks", lambda: next(readings))
        assert timer.sample(timer.repeated(lambda: calls.append(1)), 3) == (2.0, 3.0, 0.5)
        assert len(calls) == 4

    def test_the_difference_is_relative_and_the_largest_of_all(self):
        ours = {"out": np.ones(4), "d_x": np.full(4, 2.0)}
        theirs = {"out": np.full(4, 1.1), "d_x": np.full(4, 3.0)}
        assert runs.difference(ours, theirs) == 0.5


class TestFigures:
    def test_a_ratio_is_of_medians(self):
        results = [fake(OURS, [1, 2, 90]), fake("linen", [7, 3, 8]), fake("nnx", [4, 4, 5])]
        assert ratio(results, "layer-512", "linen") == 3.5
        assert ratio(results, "layer-512", "keras") is None
        assert best(results, "layer-512", "jax").peer == "nnx"
        assert find(results, "layer-512", "nnx").median == 4

    def test_a_first_call_is_tracing_compiling_and_running(self):
        result = fake("linen", [3], trace_times=(1, 5, 2), compile_times=(10, 20, 40))
        assert result.compile_median == 25
        assert result.first_call == 28

    def test_units(self):
        assert report.seconds(0.0123) == "12.3 ms"
        assert report.seconds(123.4) == "123 s"
        assert report.seconds(4.5e-5) == "45.0 us"
        assert report.size(3 * 2**30) == "3.0 GiB"
        assert report.size(1000) == "1000 B"
        assert report.times(31.44) == "31.4x"

    def test_where_we_are_slower_is_shown_in_bold(self):
        results = [fake(OURS, [2]), fake("linen", [1]), fake("nnx", [4])]
        text = report.markdown([ROWS["layer-512"]], results, FACTS)
        assert "| **0.50x** | 2.00x |" in text
        assert "2026-01-02, commit abc, 2 cores of chip (avx), 8 GiB; jax 1" in text


FACTS = {
    "date": "2026-01-02",
    "commit": "abc",
    "versions": {"jax": "1"},
    "machine": {
        **{"cores": 2, "processor": "chip", "isa": ["avx"], "memory_gib": 8},
        **{"device": "cpu", "load_at_start": 0.0},
    },
}


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    results = [
        fake(OURS, [1], temporary_bytes=2**20),
        fake("linen", [4], temporary_bytes=2**24),
        fake("torch sdpa", [0.5], framework="torch"),
    ]
    path = tmp_path / "bench.png"
    plot.draw([ROWS["layer-512"]], results, str(path), "a caption")
    assert path.read_bytes()[:4] == b"\x89PNG"
