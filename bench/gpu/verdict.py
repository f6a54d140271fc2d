"""What a call found, in few lines, the stages last: the reply of a lent box keeps the end only."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LIMIT_CHARS = 10_000
# A form that is nowhere in use must beat what is by so much to stay.
LORA_MUST_WIN_BY = 1.5


def text(folder: Path, call: int) -> str:
    """The verdict on a call's folder, as far as it has come."""
    end = [*stages(folder), *following(folder, call)]
    room = LIMIT_CHARS - sum(len(line) + 1 for line in end)
    lines: list[str] = []
    for line in (line for section in SECTIONS for line in lines_of(section, folder)):
        room -= len(line[:220]) + 1
        if room < 0:
            lines.append("... the archive has the rest")
            break
        lines.append(line[:220])
    return "\n".join([*lines, *end]) + "\n"


def lines_of(section: Callable[[Path], Iterator[str]], folder: Path) -> Iterator[str]:
    """A section's lines; what a file that is not as expected raises is one of them."""
    try:
        yield from section(folder)
    except Exception as error:
        yield f"verdict: {section.__name__}: {type(error).__name__}: {error}"


def rows(path: Path) -> list[Row]:
    """The lines of a .jsonl that are whole."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def measured(folder: Path, name: str) -> list[Row]:
    """The rows of a question: of its JSON, or of what it had when it ended."""
    try:
        found: list[Row] = json.loads((folder / f"{name}.json").read_text())["rows"]
    except (OSError, ValueError):
        return rows(folder / f"{name}.jsonl")
    return found


def failed_tests(folder: Path) -> list[str]:
    """Names of failed tests: pytest's own lines."""
    found: dict[str, None] = {}
    for log in sorted(folder.glob("*.log")):
        for line in log.read_text(errors="replace").splitlines():
            match = re.match(r"(FAILED|ERROR) (\S+)", line)
            if match:
                found[match[2]] = None
    return list(found)


def failures(folder: Path) -> Iterator[str]:
    for log in sorted(folder.glob("*.log")):
        content = log.read_text(errors="replace").splitlines()
        yield from (
            f"{log.stem}: {line}" for line in content if re.search(r"\d+ (passed|failed)", line)
        )
    # Why the other stages failed: the ends of their logs.
    for row in rows(folder / "stages.jsonl"):
        if row["status"].lstrip("-").isdigit() and row["status"] != "0":
            log = (folder / f"{row['name']}.log").read_text(errors="replace")
            yield from (f"{row['name']}: {line}" for line in log.splitlines()[-3:] if line.strip())
    found = failed_tests(folder)
    yield from (f"FAILED {name}" for name in found[:25])
    if len(found) > 25:
        yield f"and {len(found) - 25} more"


def smoke(folder: Path) -> Iterator[str]:
    for row in rows(folder / "smoke.jsonl"):
        what, about = row.pop("what", ""), row.pop("at", "")
        row.pop("part", None)
        if what == "twins" and row.get("difference") != 0:
            what = "TWINS DIFFER"
        yield f"smoke {about} {what}: " + " ".join(f"{k}={v}" for k, v in row.items())


def probe(folder: Path) -> Iterator[str]:
    """Each part's answers; of variants the fastest one, against the first."""
    variants: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows(folder / "probe.jsonl"):
        if "variant" in row and "us" in row:
            variants[row["part"], row["what"]].append(row)
        else:
            values = " ".join(f"{k}={v}" for k, v in row.items() if k not in ("part", "what"))
            yield f"probe {row.get('part')} {row.get('what')}: {values}"
    for (part, what), found in variants.items():
        if part == "lanes":
            # What the switch can choose.
            found = [row for row in found if row["variant"].endswith(", 2 vectors")]
            found.sort(key=lambda row: not row["variant"].startswith("32 B"))
        if not found:
            continue
        base, best = found[0], min(found, key=lambda row: row["us"])
        bits = "" if best.get("same_bits", True) else ", OTHER BITS"
        yield (
            f"probe {part} {what}: {base['variant']} {base['us']} us; best {best['variant']} "
            f"{best['us']} us, x{base['us'] / best['us']:.2f}{bits}"
        )


def kernels(folder: Path) -> Iterator[str]:
    """Rows of our own kernels, and the decision on perturbed_lora."""
    for row in measured(folder, "directions"):
        if "fail" in row:
            yield f"directions {row['case']}: {row['path']}: FAIL {row['fail']}"
        elif "percent_of_copy" in row and "without" not in row["path"]:
            yield (
                f"directions {row['case']}: {row['path']} {row['p50_us']} us, x{row['ratio']}, "
                f"{row['percent_of_copy']} % of copy, {row['percent_of_torch_copy']} % of torch's"
            )
    for row in measured(folder, "paired"):
        if "fail" in row or row["path"].startswith(("triton (ours)", "label_nll")):
            said = row.get("fail") or f"{row['p50_us']} us, x{row['ratio']}"
            yield f"paired {row['case']}: {row['path']} {said}"
    ratios = [
        (row["ratio"], row["path"], row["case"])
        for row in measured(folder, "perturbed_lora")
        if row["path"] in ("cuda", "triton") and "ratio" in row and is_small(row["case"])
    ]
    if ratios:
        ratio, path, case = max(ratios)
        word = "stays" if ratio >= LORA_MUST_WIN_BY else "goes"
        yield f"perturbed_lora: best {path} x{ratio} of slots + products ({case}): {word}"


def is_small(case: str) -> bool:
    """Whether a case of perturbed_lora is one that decides: rank 8, at most 256 rows of a sign."""
    found = re.search(r" r8 T=(\d+)$", case)
    return found is not None and int(found[1]) <= 256


def steps(folder: Path) -> Iterator[str]:
    names = {
        p.name.rsplit(".json", 1)[0] for k in ("e2e", "graphs") for p in folder.glob(f"{k}-*.json*")
    }
    for name in sorted(names):
        for row in measured(folder, name):
            yield (
                f"{name}: {row['name']} {1e3 * row['seconds_p50']:.1f} ms, "
                f"x{row['ratio']:.2f}, {row['tokens'] or ''} tokens"
            )


def stages(folder: Path) -> Iterator[str]:
    for row in rows(folder / "stages.jsonl"):
        said = "ok" if row["status"] == "0" else row["status"]
        yield f"stage {row['name']}: {said}, {row['seconds']} s, at {row['at']} s"


def following(folder: Path, call: int) -> Iterator[str]:
    """The next command, without the families of tests that have failed."""
    built = {row["name"]: row["status"] for row in rows(folder / "stages.jsonl")}.get("build")
    if call == 3 or built != "0":
        return
    families = sorted({re.sub(r"^.*::|\[.*$", "", name) for name in failed_tests(folder)})
    narrowed = f"TESTS='not ({' or '.join(families)})' " if families else ""
    yield f"next: {narrowed}bash bench/gpu/contact.sh {call + 1}"


SECTIONS = (failures, smoke, probe, kernels, steps)
