"""When, where and with what: facts that go beside the figures."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

DISTRIBUTIONS = (
    "jax",
    "jaxlib",
    "flax",
    "keras",
    "tokamax",
    "dm-haiku",
    "equinox",
    "torch",
    "numpy",
)
ISA = (
    *("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16"),
)


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def available_bytes() -> int | None:
    """Return the free memory of the host, or None where it does not say."""
    if jax.default_backend() != "cpu":
        return None
    memory = pathlib.Path("/proc/meminfo")
    if not memory.exists():
        return None
    lines = dict(line.split(":", 1) for line in memory.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024


def facts() -> dict[str, Any]:
    """Return date, commit, versions and machine; no host names and no paths."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(pathlib.Path(__file__).parent),
        "versions": _versions(),
        "machine": {
            "cores": cores(),
            "processor": _processor("model name") or platform.machine(),
            "isa": [flag for flag in ISA if flag in (_processor("flags") or "").split()],
            "memory_gib": _memory_gib(),
            "device": jax.devices()[0].device_kind,
            "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
    }


def sentence(known: dict[str, Any]) -> str:
    """Return the facts as one line of text."""
    machine = known["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    isa = f" ({' '.join(machine['isa'])})" if machine["isa"] else ""
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']} GiB"
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return (
        f"{known['date']}, commit {known['commit']}, {machine['cores']} cores of "
        f"{machine['processor']}{isa}{memory}{device}; {versions}"
    )


def commit(folder: str | os.PathLike) -> str:
    """Return the commit of a checkout, and whether it was changed since."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor(field: str) -> str | None:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field),
        None,
    )


def _memory_gib() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
