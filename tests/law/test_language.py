"""Field words in names, comments, messages and documents: the left columns of the glossary occur nowhere.

docs/concepts.md has the glossary. A word that means something else in plain English is forbidden only in the form in
which it stood for a term of the field.
"""

import io
import re
import tokenize
from pathlib import Path

import pytest

from conftest import REPOSITORY

# What stands in text, and what to write.
PHRASES = {
    r"\banew\b": "again, from scratch",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\brehears\w*": "warm up",
    r"\bso[- ]many(-th)?\b": "n, every n-th",
    r"\bcomes? to\b|\bcame to\b": "resolves to, reaches",
    r"\bcontenders?\b": "candidate",
    r"\btroubles?\b": "error",
    r"\b(is|are|was|were|be|been|being) told\b|(?<!\.)\btells?\b(?! apart)|\btelling\b": "logs, reports, raises",
    r"\bas (it|they) (is|are)\b(?! \w)": "unchanged",
    r"\bbeats\b(?! per)|\bBeating\b": "heartbeat",
    r"\b(GPU|graphics|this|the|each|a|one|other|another|same) cards?\b(?=.*\b(GPU|memory|device|driver)\b)": "GPU",
    r"\b(its|the|a|each|this|rank's|what|their|larger|equal) shares? of\b|\bshares of\b": "fraction, slice, weight",
    r"\b(is|are) whole\b|\bnewest whole\b|\bwhole checkpoints?\b": "complete, intact",
    r"\bgo(es|ing|ne)? on\b|\bwent on\b": "resume, continue",
}
# What stands in an identifier as a word of it, and what to write.
NAMES = {
    "refuse": "check",
    "anew": "again",
    "told": "reported, logged",
    "tell": "report, log",
    "tells": "reports, logs",
    "trouble": "error",
    "contender": "candidate",
    "contenders": "candidates",
    "rehearse": "warm_up",
    "beat": "heartbeat",
    "beats": "heartbeats",
    "turn": "timed_run",
    "turns": "timed_runs",
    "share": "fraction, lam, slice, weight",
    "shares": "fractions, weights",
    "view": "transform",
    "settle": "a verb with its object",
    "conduct": "a verb with its object",
}
# After a dot, `view` is NumPy's, torch's or pyarrow's and `tell` is a file's.
METHODS = {"view", "memoryview", "tell", "binary_view", "is_binary_view", "string_view"}
SOURCES = [
    path for folder in ("pipelines", "trainer", "tools", "tests") for path in (REPOSITORY / folder).rglob("*.py")
]
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "tests" / "README.md"]
TEXTS = sorted({*SOURCES, *PAGES, *(REPOSITORY / "configs").rglob("*.yaml")} - {Path(__file__)})
CAPTION = re.compile(r"#\s+(of|after|before|between|unless|what|whose|besides|by|behind)\b")


def found_in(text: str) -> list[str]:
    """Each line with a phrase of PHRASES, and what to write instead."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in PHRASES.items():
            if match := re.search(pattern, line):
                found.append(f"line {number}: {match[0]!r}; write: {better}")
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_text_has_the_words_of_the_field(path):
    assert not found_in(path.read_text())


@pytest.mark.parametrize(
    "path", sorted({*SOURCES} - {Path(__file__)}), ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_names_and_comments_have_the_words_of_the_field(path):
    found, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME and not (before == "." and token.string in METHODS):
            words = re.findall(r"[a-z]+|[A-Z][a-z]*", token.string)
            found += [(token.start[0], token.string, NAMES[w.lower()]) for w in words if w.lower() in NAMES]
        if token.type == tokenize.COMMENT and CAPTION.match(token.string):
            found.append((token.start[0], token.string, "a sentence with a subject and a verb"))
        before = token.string
    assert not found


def test_the_words_are_found():
    assert (
        len(
            found_in(
                "It is built anew.\nThe others are told.\nWhere it comes to nothing\nthe GPU's own share of memory"
            )
        )
        == 3
    )
    assert not found_in("Resuming reads the newest complete checkpoint. Averages are logged.")
