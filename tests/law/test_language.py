"""Field words in names, comments, messages and documents: the left columns of the glossary occur nowhere.

docs/concepts.md has the glossary. A word that means something else in plain English is forbidden only in the form in
which it stood for a term of the field.
"""

import io
import re
import tokenize
from collections.abc import Callable
from pathlib import Path

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


def words_in(text: str) -> list[str]:
    """Each line with a phrase of PHRASES, and what to write instead."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in PHRASES.items():
            if match := re.search(pattern, line):
                found.append(f"line {number}: {match[0]!r}; write: {better}")
    return found


def names_in(source: str) -> list[str]:
    """Each line with an identifier of NAMES, and what to write instead; and each with a comment that is a caption."""
    found, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and not (before == "." and token.string in METHODS):
            words = [word.lower() for word in re.findall(r"[a-z]+|[A-Z][a-z]*", token.string)]
            better = [NAMES[word] for word in words if word in NAMES]
            found += [f"line {token.start[0]}: {token.string!r}; write: {each}" for each in better]
        if token.type == tokenize.COMMENT and CAPTION.match(token.string):
            found.append(f"line {token.start[0]}: {token.string!r}; write a sentence with a subject and a verb")
        before = token.string
    return found


def found_in(paths: list[Path], look: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """Collect the findings of each file; files without any are left out."""
    found = {str(path.relative_to(REPOSITORY)): look(path.read_text()) for path in paths}
    return {path: lines for path, lines in found.items() if lines}


def test_text_has_the_words_of_the_field():
    assert len(TEXTS) > 400 and not found_in(TEXTS, words_in)


def test_names_and_comments_have_the_words_of_the_field():
    assert not found_in(sorted({*SOURCES} - {Path(__file__)}), names_in)


def test_the_words_are_found():
    assert (
        len(
            words_in(
                "It is built anew.\nThe others are told.\nWhere it comes to nothing\nthe GPU's own share of memory"
            )
        )
        == 3
    )
    assert not words_in("Resuming reads the newest complete checkpoint. Averages are logged.")
    assert len(names_in("turns = x.beat  # of each\ny.view(1).tell()\n")) == 3
