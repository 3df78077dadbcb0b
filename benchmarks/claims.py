"""What the library claims about its speed, each as one ratio on one row, and whether it was met."""

import dataclasses
from typing import Literal

from benchmarks.results import OURS, Result, best, find


@dataclasses.dataclass(frozen=True)
class Claim:
    """Our figure over a rival's is at most `at_most`.

    Args:
      row: The row that is measured.
      rival: "jax": the fastest JAX peer of the row; "torch": the faster of torch's two ways; the
        name of a peer; or "row:<name>": ourselves on another row.
      at_most: The largest ratio that meets the claim.
      words: The claim in words.
      quantity: A run, or tracing and compiling together.
      work: How much more work the row is than the rival's; the ratio is divided by it.
    """

    row: str
    rival: str
    at_most: float
    words: str
    quantity: Literal["run", "compile"] = "run"
    work: float = 1.0


def _claims() -> tuple[Claim, ...]:
    def pair(row, faster, torch, torch_words):
        return (
            Claim(row, "jax", 1 / faster, f"{faster:g}x faster than the best JAX peer"),
            Claim(row, "torch", torch, f"{torch_words} PyTorch"),
        )

    compiling = (
        "layer-512-train",
        "layer-512-train-dropout",
        "layer-4096-causal-train",
        "layer-4096-causal-train-dropout",
    )
    proportional = "time per query and key of the window at most 1.2x that of"
    return (
        *pair("layer-512", 2, 1.1, "at most 1.1x the time of"),
        *pair("layer-512-train-dropout", 3, 1.0, "faster than"),
        *pair("layer-4096-causal", 4, 1.1, "at most 1.1x the time of"),
        *pair("layer-4096-causal-train", 5, 1.2, "at most 1.2x the time of"),
        *pair("layer-4096-causal-train-dropout", 8, 0.25, "4x faster than"),
        Claim("layer-16384-window", "jax", 1 / 30, "30x faster than the best dense JAX peer"),
        *pair("decode", 1.5, 1.1, "at most 1.1x the time of"),
        *(
            Claim(row, "linen", 1.5, "compiles in at most 1.5x linen's time", "compile")
            for row in compiling
        ),
        Claim("tiny", "linen", 1.0, "a call costs at most linen's"),
        Claim("window-16384-1024", "row:window-4096-1024", 1.2, f"{proportional} T4096", work=4),
        Claim("window-16384-4096", "row:window-16384-1024", 1.2, f"{proportional} w1024", work=4),
    )


CLAIMS = _claims()


def claimed_rows() -> tuple[str, ...]:
    """Return the names of the rows that the claims need, in the order of the claims."""
    needed = {}
    for claim in CLAIMS:
        if claim.rival.startswith("row:"):
            needed[claim.rival.removeprefix("row:")] = None
        needed[claim.row] = None
    return tuple(needed)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim beside its measurement; `ratio` is None where there is none, and `why` says so."""

    claim: Claim
    ours: float | None = None
    theirs: float | None = None
    rival: str = ""
    ratio: float | None = None
    why: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= self.claim.at_most


def judge(claim: Claim, results: list[Result]) -> Verdict:
    """Compare one claim with what was measured."""

    def figure(result: Result) -> float | None:
        return result.median if claim.quantity == "run" else result.compile_median

    ours = find(results, claim.row, OURS)
    if claim.rival.startswith("row:"):
        theirs = find(results, claim.rival.removeprefix("row:"), OURS)
    elif claim.rival in ("jax", "torch"):
        theirs = best(results, claim.row, claim.rival)
    else:
        theirs = find(results, claim.row, claim.rival)
    a = None if ours is None else figure(ours)
    if a is None:
        return Verdict(claim, why=ours.reason if ours else "the row was not run")
    b = None if theirs is None else figure(theirs)
    if theirs is None or b is None:
        reasons = [
            f"{r.peer}: {r.reason}"
            for r in results
            if r.row == claim.row and r.reason and claim.rival in (r.framework, r.peer)
        ]
        return Verdict(claim, a, why="; ".join(reasons) or "no rival was measured")
    named = claim.rival if claim.rival.startswith("row:") else theirs.peer
    return Verdict(claim, a, b, named, a / b / claim.work)


def judge_all(results: list[Result]) -> list[Verdict]:
    """Judge every claim whose row was run."""
    run = {result.row for result in results}
    return [judge(claim, results) for claim in CLAIMS if claim.row in run]
