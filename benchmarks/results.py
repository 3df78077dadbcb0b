"""What was measured of one peer on one row, and how results are looked up."""

import dataclasses
import statistics
from typing import Any, Literal

OURS = "mha_jax"
BEFORE = "before"
Status = Literal["measured", "cannot", "absent", "skipped", "failed"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One peer on one row.

    Args:
      row, peer, framework: Which; the framework as `Peer` has it.
      status: "measured"; "cannot": the peer has no such feature; "absent": not installed or not
        importable; "skipped": too slow or too large; "failed": it raised.
      reason: Why it was not measured, or what to know about the figures.
      times: Seconds of a call, one of each round.
      cpu_times: The same, of all the CPUs that the process used.
      trace_times, compile_times: Seconds of tracing with lowering, and of XLA's compilation.
      temporary_bytes: Of the compiled program, by XLA's own account; None for torch.
      difference: Norm of the difference from our results over their norm; None with dropout.
    """

    row: str
    peer: str
    framework: str
    status: Status
    reason: str = ""
    times: tuple[float, ...] = ()
    cpu_times: tuple[float, ...] = ()
    trace_times: tuple[float, ...] = ()
    compile_times: tuple[float, ...] = ()
    temporary_bytes: int | None = None
    difference: float | None = None

    @property
    def median(self) -> float | None:
        """Seconds of a call, where it was measured."""
        measured = self.status == "measured" and self.times
        return statistics.median(self.times) if measured else None

    @property
    def lowest(self) -> float | None:
        """The shortest time of a call, where it was measured."""
        return min(self.times) if self.median is not None else None

    @property
    def cpu_median(self) -> float | None:
        """CPU seconds of a call, where it was measured."""
        measured = self.status == "measured" and self.cpu_times
        return statistics.median(self.cpu_times) if measured else None

    @property
    def compile_median(self) -> float | None:
        """Seconds of tracing, lowering and compiling together."""
        both = [a + b for a, b in zip(self.trace_times, self.compile_times)]
        return statistics.median(both) if both else None

    @property
    def first_call(self) -> float | None:
        """Seconds until the first result: trace, lower, compile and run."""
        if self.median is None or self.compile_median is None:
            return None
        return self.compile_median + self.median

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the derived figures as plain values."""
        derived = {
            "median": self.median,
            "compile_median": self.compile_median,
            "first_call": self.first_call,
        }
        return dataclasses.asdict(self) | derived


def find(results: list[Result], row: str, peer: str) -> Result | None:
    """Return the result of a peer on a row, if there is one."""
    return next((r for r in results if r.row == row and r.peer == peer), None)


def best(results: list[Result], row: str, framework: str) -> Result | None:
    """Return the fastest result of others on a row."""
    others = [
        r
        for r in results
        if r.row == row and r.framework == framework and r.peer != OURS and r.median is not None
    ]
    return min(others, key=lambda r: r.median or 0.0, default=None)


def ratio(
    results: list[Result], row: str, peer: str, figure: str = "median", over: str = OURS
) -> float | None:
    """Return a peer's figure over that of another, ours: above 1, we are faster."""
    below, above = find(results, row, over), find(results, row, peer)
    a = None if above is None else getattr(above, figure)
    b = None if below is None else getattr(below, figure)
    return None if a is None or not b else a / b
