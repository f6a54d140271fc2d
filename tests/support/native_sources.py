"""The native sources, as their lists name them (csrc/sources.txt says how they are written)."""

from dataclasses import dataclass
from pathlib import Path

from tests.support.source import ROOT

CSRC = ROOT / "csrc"
EXPERIMENTS = ROOT / "bench" / "experiments" / "csrc"
PARTS = ("always", "x86", "cuda")


@dataclass(frozen=True)
class Source:
    """One line of a list."""

    part: str
    path: Path
    flags: tuple[str, ...]


def listed(directory: Path) -> list[Source]:
    """The sources of the module whose list lies in a directory."""
    lines = (directory / "sources.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return [Source(part, directory / path, tuple(flags)) for part, path, *flags in rows]


def paths(directory: Path, *parts: str) -> list[Path]:
    """The paths of some parts."""
    return [source.path for source in listed(directory) if source.part in parts]
