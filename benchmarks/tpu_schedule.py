"""What the TPU compiler makes of a function: its static schedule, on a machine without a TPU.

A TPU core issues one VLIW bundle a cycle when nothing stalls. libtpu writes the final bundles of every
kernel; a bundle counts as often as the loops around it run. That is a lower bound on cycles: waits for
memory and for a full matrix unit come on top (a share of its peak above 100 % says that it will be full).
Bundles are not seconds.

Two counts are taken. `listed` multiplies the trip counts that stand in the listing, counts loops of unknown
trips once, and everything under a condition always. `issued` knows more: a Pallas grid of n > 1 steps is a
loop of n + 2 trips, two of which only move data; loops whose length the data decides are given by the
caller; and steps that a kernel skips because their tile is empty are not counted.
"""

import dataclasses
import glob
import os
import re

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?[:, ]*:?(?:\s*>)*\s*\{")
_START, _END = (re.compile(rf"{word} region (\d+)") for word in ("Start", "End"))
_BACK = re.compile(r"sbr\.rel \(!?%(\w+)\) target = \$region(\d+)")
_EXIT = re.compile(
    r"%(\w+) = scmp\.\w+\.s32\.totalorder (?:\(!?%\w+\), )?%\S+, (\d+) /\* loop exit test \*/"
)
_NAME = re.compile(r"^\d+-(.*?)-\d+-final_bundles\.txt$")
SMALL_LOOP = 100  # bundles; shorter loops of unknown length are waits and clean-up


@dataclasses.dataclass
class Loop:
    """One loop of a listing: its own bundles, its trips, and the loops around it."""

    around: list["Loop"]
    bundles: int = 0
    trips: int | None = None


@dataclasses.dataclass
class Schedule:
    """The final schedule of one kernel."""

    name: str
    straight: int
    loops: list[Loop]

    @property
    def listed(self) -> int:
        """Bundles by the trip counts in the listing alone."""
        return round(self._total(lambda loop: loop.trips or 1))

    def issued(self, trips: tuple[float, ...] = (), share: float = 1.0, grid: bool = True) -> int:
        """Return the bundles of a Pallas kernel that are issued.

        Args:
          trips: Mean trips of the loops whose length the data decides, in order.
          share: Share of the grid's steps that find work.
          grid: Whether the outermost loop is that of the grid: none is where it has one step.
        """
        unknown = [x for x in self.loops if x.trips is None and x.bundles >= SMALL_LOOP]
        if len(unknown) != len(trips):
            raise ValueError(
                f"{self.name} has {len(unknown)} loops of unknown trips, of "
                f"{[x.bundles for x in unknown]} bundles: got {len(trips)} trip counts."
            )
        given = {id(loop): count for loop, count in zip(unknown, trips)}

        def times(loop):
            if grid and not loop.around:
                return max((loop.trips or 3) - 2, 1) * share
            return given.get(id(loop), loop.trips or 1)

        return round(self._total(times))

    def _total(self, times) -> float:
        total = float(self.straight)
        for loop in self.loops:
            product = times(loop)
            for outer in loop.around:
                product *= times(outer)
            total += loop.bundles * product
        return total


def read(path: str) -> Schedule:
    """Read one listing of final bundles.

    A loop is a region that a branch at its end goes back to; what the compiler moved into it from
    outside is issued as often as the rest.
    """
    with open(path, errors="replace") as file:
        lines = [line for line in file if _BUNDLE.match(line)]
    started: set[str] = set()
    back: dict[str, str] = {}  # region -> predicate of the branch back to it
    trips: dict[str, int] = {}  # predicate -> the trips that it counts
    for line in lines:
        started |= set(_START.findall(line))
        trips |= {test: int(count) for test, count in _EXIT.findall(line)}
        back |= {region: test for test, region in _BACK.findall(line) if region in started}
    straight, loops, open_loops = 0, [], []
    for line in lines:
        for region in _START.findall(line):
            if region in back:
                loops.append(Loop([loop for _, loop in open_loops], 0, trips.get(back[region])))
                open_loops.append((region, loops[-1]))
        if open_loops:
            open_loops[-1][1].bundles += 1
        else:
            straight += 1
        ended = set(_END.findall(line))
        open_loops = [(region, loop) for region, loop in open_loops if region not in ended]
    name = _NAME.match(os.path.basename(path))
    return Schedule(name[1] if name else path, straight, loops)


def read_dump(folder: str) -> list[Schedule]:
    """Read and remove what the compiler wrote for one program: a schedule for every kernel in it."""
    schedules = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*-final_bundles.txt"))):
        name = os.path.basename(path)
        if "schedule-analysis" not in name and "-<late" not in name:
            schedules.append(read(path))
    for path in glob.glob(os.path.join(glob.escape(folder), "*")):
        os.remove(path)
    return schedules
