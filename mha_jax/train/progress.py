"""Where a run's figures go: the terminal, a CSV file and TensorBoard events."""

import contextlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mha_jax.rooms import packages
from mha_jax.train.workdir import DAMAGED, write_whole, writing
from mha_jax.visualize import curves

METRICS, HEADER = "metrics.csv", "step,seconds,name,value"


class Row(NamedTuple):
    """One figure of one step, after so many seconds; as text a line of `metrics.csv`."""

    step: int
    seconds: float
    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.step},{self.seconds:.2f},{self.name},{self.value:.6g}"

    @classmethod
    def parse(cls, line: str) -> "Row | None":
        """Read a line; None if it is damaged."""
        match = _ROW.fullmatch(line)
        if match is None:
            return None
        return cls(int(match[1]), float(match[2]), match[3], float(match[4]))


_ROW = re.compile(
    r"(\d{1,15}),(\d{1,15}(?:\.\d{1,9})?),(\w{1,99}),"
    r"(nan|-?inf|-?\d{1,15}(?:\.\d{1,15})?(?:e[+-]?\d{1,3})?)\r?"
)


def clock(seconds: float) -> str:
    """Write a duration as minutes and seconds, or hours too.

    >>> clock(75.2), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """One line on the terminal, rewritten in place, or one line a report when it is no terminal.

    The speed and the time left are those of the steps that are counted: compiling is not.
    """

    def __init__(self, start: int, steps: int):
        self.begun, self.steps = time.monotonic(), steps
        self.uncounted_steps, self.uncounted_seconds = start, 0.0
        self.noted: dict[str, float] = {}

    @contextlib.contextmanager
    def uncounted(self, steps: int = 0) -> Iterator[None]:
        """Leave what happens in the `with` block, and this many steps, out of the speed."""
        begun = time.monotonic()
        yield
        self.uncounted_seconds += time.monotonic() - begun
        self.uncounted_steps += steps

    def note(self, figures: Mapping[str, float]) -> None:
        """Show these figures from now on, until the next of the same names."""
        self.noted.update(figures)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the step, the figures, the speed and the time left."""
        spent = time.monotonic() - self.begun - self.uncounted_seconds
        counted = step - self.uncounted_steps
        texts = [f"{name} {value:.4f}" for name, value in (self.noted | dict(figures)).items()]
        if counted > 0:
            left = clock((self.steps - step) * spent / counted)
            texts += [f"{counted / max(spent, 1e-9):.1f} steps/s", f"{left} left"]
        line = " | ".join([f"step {step:,}/{self.steps:,}", *texts])
        if sys.stdout.isatty():
            print(f"\r{line:<100}", end="" if step < self.steps else "\n", flush=True)
        else:
            print(line, flush=True)


class Metrics:
    """Figures by step in `metrics.csv` and, on request, as TensorBoard events.

    Args:
      workdir: Where the files go.
      start: The step that the run continues from; rows after it, of a run cut off, are dropped.
      tensorboard: Whether to write events as well; needs the package tensorboardX.

    Raises:
      WorkdirError: The files cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, start: int, tensorboard: bool):
        self.workdir, path = workdir, workdir / METRICS
        with writing(workdir):
            rows, damaged = read_metrics(path)
            rows = [row for row in rows if row.step <= start]
            if damaged:
                aside = path.with_name(f"{DAMAGED}{METRICS}")
                os.replace(path, aside)
                print(
                    f"{path} is damaged ({damaged} of its lines); it is now {aside}. The run goes on with "
                    "the others.",
                    file=sys.stderr,
                )
            write_whole(path, "".join(f"{line}\n" for line in [HEADER, *map(str, rows)]))
            self.file = path.open("a", encoding="utf-8")
        self.begun = time.monotonic() - (rows[-1].seconds if rows else 0.0)
        with writing(workdir):
            self.events = Events(workdir, start) if tensorboard else None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of a step."""
        seconds = time.monotonic() - self.begun
        with writing(self.workdir):
            for name, value in figures.items():
                self.file.write(f"{Row(step, seconds, name, value)}\n")
                if self.events is not None:
                    self.events.add(step, name, value)
            self.file.flush()

    def close(self) -> None:
        with writing(self.workdir):
            self.file.close()
            if self.events is not None:
                self.events.close()


class Events:
    """Figures as TensorBoard reads them.

    They are written by the thread that brings them. The writer that tensorboardX has for this is a thread of
    its own, which ends at a full disk or where the clock is set back, and then whoever writes waits for ever.

    Args:
      workdir: Where the file goes.
      start: The step that the run continues from; TensorBoard drops what it was told of later ones.

    Raises:
      OSError: The file cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        with packages():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        self.kind: Any = event_pb2
        self.scalar = summary.scalar
        self.file = event_file_writer.EventsWriter(str(workdir / "events"))
        begun = self.kind.SessionLog(status=self.kind.SessionLog.START)
        self._write(step=start + 1, session_log=begun)
        self._flush()

    def add(self, step: int, name: str, value: float) -> None:
        """Write a figure; it is on disk two minutes later."""
        self._write(step=step, summary=self.scalar(name, value))
        if time.monotonic() > self.due:
            self._flush()

    def close(self) -> None:
        self.file.close()

    def _write(self, **event: Any) -> None:
        self.file.write_event(self.kind.Event(wall_time=time.time(), **event))

    def _flush(self) -> None:
        self.file.flush()
        self.due = time.monotonic() + 120


class Nowhere:
    """Where the figures of all processes but the first go."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def draw_metrics(workdir: pathlib.Path) -> None:
    """Draw the figures of `metrics.csv` into `curves.png`, if there are any."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(workdir / METRICS)[0]:
        steps, values = series.setdefault(row.name, ([], []))
        steps.append(row.step)
        values.append(row.value)
    if series:
        curves(series, workdir / "curves.png")


def read_metrics(path: pathlib.Path) -> tuple[list[Row], int]:
    """Read the rows of `metrics.csv` and count its damaged lines; a torn last one is none.

    A file that is absent has no rows.
    """
    if not path.is_file():
        return [], 0
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [Row.parse(line) for line in lines[1:]]
    whole = [row for row in rows if row is not None]
    begun = lines[0] == HEADER if lines else HEADER.startswith(torn)
    return whole, len(rows) - len(whole) + (not begun)
