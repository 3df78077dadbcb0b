"""Figures survive a run that is cut off: rows after the resumed step go, the others stay."""

import pytest

from mha_jax.train.progress import Metrics, Progress, clock, read_metrics


def rows(path):
    return [(int(r["step"]), r["name"], float(r["value"])) for r in read_metrics(path)]


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    metrics = Metrics(tmp_path, 0, tensorboard=False)
    for step in (10, 20, 30):
        metrics.write(step, {"loss": step / 100})
    metrics.close()
    metrics = Metrics(tmp_path, 20, tensorboard=False)
    assert rows(tmp_path / "metrics.csv") == [(10, "loss", 0.1), (20, "loss", 0.2)]
    metrics.write(30, {"loss": 0.7})
    metrics.close()
    assert rows(tmp_path / "metrics.csv")[-1] == (30, "loss", 0.7)
    assert len(read_metrics(tmp_path / "metrics.csv")) == 3


def test_a_torn_last_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,seconds,name,value\n10,1.0,loss,0.5\n20,2.0,lo")
    assert rows(path) == [(10, "loss", 0.5)]


def test_seconds_go_on_where_the_run_was_cut_off(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds,name,value\n10,500.0,loss,0.5\n")
    metrics = Metrics(tmp_path, 10, tensorboard=False)
    metrics.write(20, {"loss": 0.4})
    metrics.close()
    assert 500 <= float(read_metrics(tmp_path / "metrics.csv")[-1]["seconds"]) < 600


def test_events_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.write(10, {"loss": 0.5})
    metrics.close()
    events = list(tmp_path.glob("events.out.tfevents.*"))
    assert len(events) == 1 and b"loss" in events[0].read_bytes()


def test_progress_shows_speed_and_time_left(capsys):
    progress = Progress(start=100, steps=300)
    progress.begun -= 50
    progress.note({"validation_error": 0.25})
    progress.show(200, {"loss": 0.5})
    line = capsys.readouterr().out
    assert "step 200/300 | validation_error 0.2500 | loss 0.5000 | 2.0 steps/s | 0:50 left" in line


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59")])
def test_clock(seconds, text):
    assert clock(seconds) == text
