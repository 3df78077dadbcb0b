"""Figures survive a run that is cut off: rows after the resumed step go, the others stay."""

import importlib
import re
import struct

import pytest

from mha_jax.errors import WorkdirError
from mha_jax.train.progress import Metrics, Progress, clock, draw_metrics, read_metrics
from tests.drawn import damaged


def rows(path):
    return [(row.step, row.name, row.value) for row in read_metrics(path)[0]]


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
    assert len(rows(tmp_path / "metrics.csv")) == 3


def test_a_torn_last_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,seconds,name,value\n10,1.0,loss,0.5\n20,2.0,lo")
    assert rows(path) == [(10, "loss", 0.5)]


def test_seconds_go_on_where_the_run_was_cut_off(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds,name,value\n10,500.0,loss,0.5\n")
    metrics = Metrics(tmp_path, 10, tensorboard=False)
    metrics.write(20, {"loss": 0.4})
    metrics.close()
    assert 500 <= read_metrics(tmp_path / "metrics.csv")[0][-1].seconds < 600


def test_events_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.write(10, {"loss": 0.5})
    metrics.close()
    assert events(tmp_path) == [(10, "loss", 0.5)]


def test_a_run_that_goes_on_tells_tensorboard_what_to_drop(tmp_path):
    pytest.importorskip("tensorboardX")
    Metrics(tmp_path, 6, tensorboard=True).close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    started = [e for e in read_events(path) if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in started] == [(7, 1)]


def test_events_that_cannot_be_written_end_the_run(tmp_path, monkeypatch):
    """In the thread that writes them: nobody waits for a writer that has ended."""
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, 0, tensorboard=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
    with pytest.raises(WorkdirError, match=r"cannot be written: .*No space left on device"):
        metrics.write(1, {"loss": 0.5})


def test_progress_shows_speed_and_time_left(capsys):
    progress = Progress(start=100, steps=300)
    progress.begun -= 50
    progress.note({"validation_error": 0.25})
    progress.show(200, {"loss": 0.5})
    line = capsys.readouterr().out
    assert "step 200/300 | validation_error 0.2500 | loss 0.5000 | 2.0 steps/s | 0:50 left" in line


def test_compiling_is_no_step(capsys):
    progress = Progress(start=0, steps=11)
    with progress.uncounted(steps=1):
        progress.begun -= 3600
        progress.uncounted_seconds += 3600
    progress.show(1, {"loss": 0.5})
    progress.begun -= 20
    progress.show(6, {"loss": 0.5})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1/11 | loss 0.5000"
    assert re.fullmatch(r"step 6/11 \| loss 0\.5000 \| 0\.2 steps/s \| 0:20 left", second)


def read_events(path):
    """Return the events of a file: of each its length, a checksum, itself and another checksum."""
    event = importlib.import_module("tensorboardX.proto.event_pb2").Event
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def events(workdir):
    """Return (step, name, value) of all figures in the files of events."""
    return [
        (event.step, value.tag, value.simple_value)
        for path in sorted(workdir.glob("events.out.tfevents.*"))
        for event in read_events(path)
        for value in event.summary.value
    ]


HEAD = b"step,seconds,name,value\n"


@pytest.mark.parametrize(
    ("text", "whole", "lines"),
    [
        (HEAD + b"2,0.10,loss,4\n4x,0.20,loss,3\n", [2], 1),
        (HEAD + b"2,abc,loss,4\n4,0.20,loss,nan\n", [4], 1),
        (HEAD + b"2,0.10,loss,-\n4,0.20,loss,-inf\n", [4], 1),
        (HEAD + b"2,0.10,loss,4,5\n", [], 1),
        (
            HEAD + b"2,0.10,loss,1.2.3\n2,0.20,loss,1e\n2,0.20,loss,1-2\n4,1.0,loss,1.5e+20\n",
            [4],
            3,
        ),
        (HEAD + b"\x00\xff\xfe\n2,0.10,loss,1e-06\n", [2], 1),
        (HEAD + b"2,0.10,loss," + b"9" * 200_000 + b"\n4,0.20,loss,3\n", [4], 1),
        (HEAD + b"\n\n", [], 2),
        (b"\x00\xff\xfe" * 9, [], 1),
        (b"other\n2,0.10,loss,4\n", [2], 1),
        (HEAD + b"2,0.10,loss,4\n3,0.20,lo", [2], 0),
        (HEAD[:9], [], 0),
        (b"", [], 0),
    ],
)
def test_a_damaged_file_is_set_aside_and_its_whole_lines_kept(tmp_path, capsys, text, whole, lines):
    path = tmp_path / "metrics.csv"
    path.write_bytes(text)
    assert ([row.step for row in read_metrics(path)[0]], read_metrics(path)[1]) == (whole, lines)
    metrics = Metrics(tmp_path, 4, tensorboard=False)
    metrics.write(5, {"loss": float("nan"), "error": 0.25})
    metrics.close()
    draw_metrics(tmp_path)
    assert [row.step for row in read_metrics(path)[0]] == [*whole, 5, 5]
    aside = tmp_path / "damaged-metrics.csv"
    assert (aside.read_bytes() == text) if lines else not aside.exists()
    assert ("metrics.csv is damaged" in capsys.readouterr().err) == bool(lines)
    assert (tmp_path / "curves.png").is_file()


def test_figures_that_may_not_be_read_are_told(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_bytes(HEAD)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(WorkdirError, match=r"cannot be written: .*Permission denied"):
        Metrics(tmp_path, 0, tensorboard=False)


def test_a_file_with_changed_bytes_never_stops_a_run(tmp_path):
    good = HEAD + b"".join(b"%d,%d.25,loss,0.125\n" % (i, i) for i in range(9))
    for data in damaged(good, 300):
        (tmp_path / "metrics.csv").write_bytes(data)
        Metrics(tmp_path, 9, tensorboard=False).close()
        assert read_metrics(tmp_path / "metrics.csv")[1] == 0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59")])
def test_clock(seconds, text):
    assert clock(seconds) == text
