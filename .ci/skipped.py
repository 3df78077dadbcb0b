"""Fail if a test was skipped in every environment: `python skipped.py LEG.xml ...`, JUnit's reports."""

import sys
import xml.etree.ElementTree as ElementTree


def read(path: str) -> tuple[set[str], dict[str, str]]:
    """Return the tests and files of tests that ran, and those that were skipped with the reason."""
    ran, skipped = set(), {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        file, name = case.get("classname", ""), case.get("name", "")
        whole, reason = f"{file}.{name}".lstrip("."), case.find("skipped")
        if reason is None:
            ran |= {file, whole}
        else:  # A file that skips as a whole has its name alone.
            skipped[whole] = reason.text or ""
    return ran, skipped


def nowhere(paths: list[str]) -> dict[str, str]:
    """Return the tests, or files of tests, that were skipped and ran in no report, with the reason."""
    legs = [read(path) for path in paths]
    ran = set().union(*(ran for ran, _ in legs))
    return {
        name: reason for _, skipped in legs for name, reason in skipped.items() if name not in ran
    }


if __name__ == "__main__":
    left = nowhere(sys.argv[1:])
    for name, reason in sorted(left.items()):
        print(f"skipped everywhere: {name}: {reason}")
    print(f"{len(left)} tests were skipped everywhere.")
    sys.exit(bool(left))
