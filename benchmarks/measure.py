"""Time the peers on a row, in turns: A B C A B C, in one process."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.checkouts import REPORTED
from benchmarks.machine import available_bytes
from benchmarks.peers import Absent
from benchmarks.peers.base import Peer
from benchmarks.results import OURS, Result, Status
from benchmarks.rows import Row, draw
from benchmarks.runs import Costs, Run, difference
from benchmarks.timer import Sample, turns

# A peer whose numbers are further from ours than this computes something else, and is not timed.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
      repeats: Rounds of timing.
      limit: Seconds that a peer may take for all its rounds of a row: slow ones get fewer rounds, and
        none where the first call alone takes longer.
      sample: Seconds that a timed sample should last: short calls are repeated within it.
    """

    repeats: int = 5
    limit: float = 60.0
    sample: float = 0.05


@dataclasses.dataclass(eq=False)
class _Entry:
    """A peer under way on a row."""

    peer: Peer
    run: Run
    costs: list[Costs] = dataclasses.field(default_factory=list)
    distance: float | None = None
    samples: list[Sample] = dataclasses.field(default_factory=list)
    calls: int = 1
    rounds: int = 0

    @property
    def temporary_bytes(self) -> int | None:
        return self.costs[-1].temporary_bytes if self.costs else None


def measure(
    row: Row,
    peers: list[Peer],
    absent: list[Absent] = (),  # type: ignore[assignment]
    settings: Settings = Settings(),
    note: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Measure the peers on one row.

    Args:
      row: The workload.
      peers: Who takes part.
      absent: Who would, were it installed.
      settings: How to measure.
      note: Called with what is going on, for a progress line.

    Returns:
      One result for each peer, absent ones included, in the order given.
    """
    if row.alone:
        peers, absent = [p for p in peers if p.name == OURS], []
    names = [p.name for p in peers] + [a.name for a in absent]
    # A peer may count on jax's defaults where the caller's program forbids implicit promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        race = _Race(row, settings, note)
        race.prepare(peers)
        race.compile()
        race.warm_up()
        race.run()
    for a in absent:
        race.results[a.name] = Result(row.name, a.name, a.framework, "absent", a.reason)
    return sorted(race.results.values(), key=lambda r: names.index(r.peer))


class _Race:
    """The peers on one row: those still taking part, and the results of the others."""

    def __init__(self, row: Row, settings: Settings, note: Callable[[str], None]):
        self.row, self.settings, self.note = row, settings, note
        self.data = draw(row)
        self.entries: list[_Entry] = []
        self.results: dict[str, Result] = {}

    def prepare(self, peers: list[Peer]) -> None:
        """Build every peer's program, where it says that it can run the row."""
        for peer in peers:
            reason, run = peer.cannot(self.row), None
            status: Status = "cannot"
            if reason is None:
                status = "failed"
                run, reason = _guarded(peer, functools.partial(peer.run, self.row, self.data))
            if run is None:
                named = (self.row.name, peer.name, peer.framework)
                self.results[peer.name] = Result(*named, status, reason)
            else:
                self.entries.append(_Entry(peer, run))

    def compile(self) -> None:
        """Compile every program, in turns, as often as the row asks."""
        for turn in range(self.row.compiles):
            for entry in list(self.entries):
                self.say(entry, f"compiles, {turn + 1} of {self.row.compiles}")
                costs, reason = _guarded(entry.peer, entry.run.compile)
                if reason:
                    self.drop(entry, "failed", reason)
                elif costs is not None:
                    entry.costs.append(costs)

    def warm_up(self) -> None:
        """Run everyone once: drop who is too large, too slow, or computes something else."""
        ours = None
        for entry in list(self.entries):
            self.say(entry, "runs for the first time")
            free = available_bytes()
            if free is not None and (entry.temporary_bytes or 0) > 0.9 * free:
                needs = (entry.temporary_bytes or 0) / 2**30
                self.drop(
                    entry, "skipped", f"needs {needs:.1f} GiB, {free / 2**30:.1f} GiB are free"
                )
                continue
            compare = not self.row.dropout and entry.peer.framework != "floor"
            result, reason = _guarded(entry.peer, functools.partial(entry.run.first, compare))
            if result is None:
                self.drop(entry, "failed", reason)
                continue
            first, numbers = result
            ours = numbers if entry.peer.name == OURS else ours
            if ours is not None and numbers is not None:
                entry.distance = difference(ours, numbers)
            if first > self.settings.limit:
                self.drop(entry, "skipped", f"> {self.settings.limit:g} s")
            elif entry.distance is not None and not entry.distance < AGREEMENT[self.row.dtype]:
                self.drop(entry, "skipped", f"its numbers are {entry.distance:.1%} from ours")
            else:
                entry.calls = _calls(entry.run, self.settings.sample)
                entry.rounds = rounds(first, self.settings)

    def run(self) -> None:
        """Time those that are left, in turns."""
        entries = {entry.peer.name: entry for entry in self.entries}
        for turn, name in turns({name: entry.rounds for name, entry in entries.items()}):
            entry = entries[name]
            self.say(entry, f"round {turn + 1} of {entry.rounds}")
            entry.samples.append(entry.run.sample(entry.calls))
        for entry in list(self.entries):
            few = f"slow, so timed {entry.rounds}x" if entry.rounds < self.settings.repeats else ""
            self.drop(entry, "measured", few)

    def drop(self, entry: _Entry, status: Status, reason: str) -> None:
        """Turn an entry into a result."""
        self.entries.remove(entry)
        self.results[entry.peer.name] = Result(
            self.row.name,
            entry.peer.name,
            entry.peer.framework,
            status,
            reason,
            times=tuple(s.wall for s in entry.samples),
            cpu_times=tuple(s.process for s in entry.samples),
            trace_times=tuple(c.trace for c in entry.costs),
            compile_times=tuple(c.compile for c in entry.costs),
            temporary_bytes=entry.temporary_bytes,
            difference=entry.distance,
        )

    def say(self, entry: _Entry, what: str) -> None:
        self.note(f"{self.row.name}: {entry.peer.name} {what}")


def rounds(first: float, settings: Settings) -> int:
    """Return in how many rounds a peer takes part whose first call took so many seconds.

    >>> rounds(2.0, Settings()), rounds(25.0, Settings())
    (5, 2)
    """
    return max(1, min(settings.repeats, math.floor(settings.limit / max(first, 1e-9))))


def _calls(run: Run, wanted: float) -> int:
    """Return how many calls last as long as a sample should; long ones are not tried again."""
    once = run.sample(1).wall
    if once > wanted:
        return 1
    return max(1, math.ceil(wanted / max(run.sample(3).wall, 1e-6)))


def _guarded(peer: Peer, function: Callable[[], Any]) -> tuple[Any, str]:
    """Return (result, "") or, where a peer raises, (None, the error's first line)."""
    if peer.name == OURS:
        return function(), ""
    try:
        return function(), ""
    except REPORTED as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return None, f"{type(error).__name__}: {first}"[:160]


def progress(text: str) -> None:
    """Show one line that the next one overwrites, where someone is looking."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
