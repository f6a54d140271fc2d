"""Words that we do not write, and what we write instead. One word for one thing, plain English."""

from __future__ import annotations

import re

import pytest

from tests.support.source import ROOT, relative

TEXT = {".py", ".md", ".sh", ".cpp", ".h", ".cu", ".cuh"}
# CHANGELOG.md names what was renamed, bench/results is written by programs.
FOLDERS = ("mezo", "mezo_kernels", "csrc", "bench", "docs", "examples")
FILES = ("README.md", "CONTRIBUTING.md", "Makefile")
UNITS = (
    "adapter|batch|call|column|direction|element|engine|evaluation|example|file|format|group|key|"
    "launch|layer|lane|link|module|op|option|page|prompt|question|rank|round|row|run|sequence|"
    "sign|slot|step|task|tensor|thread|token|verb|word"
)

# pattern -> what we write
WORDS = {
    # Identifiers of old.
    r"\bMez[o]Config\b": "MeZOConfig",
    r"\b[Rr]eadout": "LogprobProcessor",
    r"\bReadings?\b|\breadings\b|\breading\.|\bfor reading in": "ScoredToken, scored tokens",
    r"\breplaced\(": "patched(",
    r"\bpublish(ed|es|ing)?(_\w+)?\b": "sync",
    r"\b[Bb]reakdown|_breakdown\b": "profile",
    r"\b[Bb]oot(s|ed|ing)?\b|plain_boot": "spawn, start",
    r"\b[Cc]omposed\b|\bcomposed_\w+": "two_pass",
    r"\bMEZO_ATTENTION_FOR[M]\b": "MEZO_ATTENTION_KERNEL",
    r"\b(named_form|form_of|check_named_form|FORMS|attention_forms)\b": "attention kernel",
    r"\bforms? of (the )?(paired )?attention\b|\battention forms?\b": "attention kernel",
    r"\bLevels?\(|\bplan\.levels\b|\battention\.levels\b|\blevels of prefix": "cascade",
    r"(?<![.\w])(private|shared)\(|mezo-private": "temporary(, cached(",
    r"\bmezo_slots\b|\b_NamedSlots\b|\bfree_row\b": "kv_slots, req_slot",
    r"\btruth\b": "reference",
    # English.
    r"\balone(?=[.,;:)]|$)": "only, before what it is about",
    r"\b(SGLang|tokens|states|rows|model|backends?|host|kernels|prefix|group|case) alone\b": "only",
    rf"\b(one|once|twice|bytes|elements|examples|tokens|registers|lock|fma|us|ms|nats|seconds) an? "
    rf"({UNITS})\b(?! call)": "per",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"; take [^a-z]*'": "use",
    r"\ball the same\b": "still",
}
# Lines on which a pattern means something else.
EXCEPT = (
    r"(leaves?|left) (the )?\w+ alone",
    r"\b[Ww]hich elements a thread\b",
    r"\bgetattr\(mezo, ",  # bench.against runs checkouts with the old name
    r"\bwhich one a (call|batch)\b",
)


def lines():
    paths = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        paths += [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in TEXT]
    for path in paths:
        name = relative(path)
        if not name.startswith("bench/results/"):
            text = path.read_text(encoding="utf-8")
            yield from ((name, i, line) for i, line in enumerate(text.splitlines(), 1))


@pytest.mark.parametrize("pattern", WORDS, ids=WORDS.get)
def test_old_words_do_not_come_back(pattern):
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, number, line in LINES
        if re.search(pattern, line) and not any(re.search(other, line) for other in EXCEPT)
    ]
    assert not found, "\n".join([f"write {WORDS[pattern]!r}:", *found])


def test_files_have_no_old_names():
    old = re.compile(r"boot|composed|readout|breakdown|levels|_forms?\b")
    names = {relative(p) for folder in (*FOLDERS, "tests") for p in (ROOT / folder).rglob("*.py")}
    assert not {name for name in names if old.search(name)}


LINES = list(lines())
