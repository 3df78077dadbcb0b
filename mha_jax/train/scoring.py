"""How far a decoded sequence is from the right one."""

from collections.abc import Sequence


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Count the insertions, deletions and substitutions that turn `a` into `b`.

    Cost: O(len(a) * len(b)).
    Source: Wagner & Fischer 1974, "The string-to-string correction problem".

    >>> edit_distance("K AE T".split(), "K AA T S".split())
    2
    """
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


def error_rates(answers: Sequence[Sequence], truths: Sequence[Sequence]) -> tuple[float, float]:
    """Compare decoded sequences with the right ones.

    Args:
      answers: What was decoded.
      truths: What is right; as many, and none empty.

    Returns:
      The symbol error rate (edits over the symbols of the truths) and the share wholly right.

    >>> error_rates([["K", "AE"], ["B"]], [["K", "AE", "T"], ["B"]])
    (0.25, 0.5)
    """
    edits = sum(edit_distance(a, t) for a, t in zip(answers, truths, strict=True))
    right = sum(tuple(a) == tuple(t) for a, t in zip(answers, truths, strict=True))
    return edits / sum(map(len, truths)), right / len(truths)
