"""Where a run's figures go: the terminal, a CSV file and TensorBoard events."""

import csv
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from mha_jax.visualize import curves

COLUMNS = "step", "seconds", "name", "value"


def clock(seconds: float) -> str:
    """Write a duration as minutes and seconds, or hours too.

    >>> clock(75.2), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """One line on the terminal, rewritten in place, or one line a report when it is no terminal."""

    def __init__(self, start: int, steps: int):
        self.start, self.steps = start, steps
        self.begun = time.monotonic()
        self.noted: dict[str, float] = {}

    def note(self, figures: Mapping[str, float]) -> None:
        """Show these figures from now on, until the next of the same names."""
        self.noted.update(figures)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the step, the figures, the speed and the time left."""
        spent = time.monotonic() - self.begun
        speed = (step - self.start) / max(spent, 1e-9)
        left = clock((self.steps - step) / speed) if speed else "?"
        texts = [f"{name} {value:.4f}" for name, value in (self.noted | dict(figures)).items()]
        line = " | ".join(
            [f"step {step:,}/{self.steps:,}", *texts, f"{speed:.1f} steps/s", f"{left} left"]
        )
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
    """

    def __init__(self, workdir: pathlib.Path, start: int, tensorboard: bool):
        path = workdir / "metrics.csv"
        rows = [row for row in read_metrics(path) if int(row["step"]) <= start]
        draft = path.with_name("metrics.csv.tmp")
        self.file = draft.open("w", newline="", encoding="utf-8")
        self.table = csv.writer(self.file)
        self.table.writerow(COLUMNS)
        self.table.writerows([row[column] for column in COLUMNS] for row in rows)
        self.file.flush()
        os.replace(draft, path)
        self.begun = time.monotonic() - (float(rows[-1]["seconds"]) if rows else 0.0)
        self.events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.events = SummaryWriter(str(workdir), purge_step=start + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of a step."""
        seconds = f"{time.monotonic() - self.begun:.2f}"
        for name, value in figures.items():
            self.table.writerow([step, seconds, name, f"{value:.6g}"])
            if self.events is not None:
                self.events.add_scalar(name, value, step)
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()


def draw_metrics(workdir: pathlib.Path) -> pathlib.Path:
    """Draw the figures of `metrics.csv` into `curves.png`."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(workdir / "metrics.csv"):
        steps, values = series.setdefault(row["name"], ([], []))
        steps.append(float(row["step"]))
        values.append(float(row["value"]))
    curves(series, workdir / "curves.png")
    return workdir / "curves.png"


def read_metrics(path: pathlib.Path) -> list[dict[str, str]]:
    """Read the rows of `metrics.csv`; none when the file is absent, a torn last row left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row.get(column) for column in COLUMNS)]
