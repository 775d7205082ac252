"""Finds the commands, options, settings and paths that documents and descriptions of programs show."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

SBATCH = "tools/slurm/train.sbatch"
_PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "tests" / "README.md"]
DOCUMENTS = [*_PAGES, *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = [
    *sorted((REPOSITORY / "tools").rglob("*.py")),
    *(REPOSITORY / "trainer" / name for name in ("run.py", "together.py")),
]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
SUBCOMMANDS = ("build", "merge", "index", "verify", "info")  # Docs name these of tools/shard_imagenet.py alone.
# Commands of others: nothing of theirs is checked.
NOT_OURS = ("pip", "pre-commit", "apt-get", "nc", "mkdir", "getent", "srun", "salloc")
_OURS = ("python", "torchrun", "sbatch", "make")
_OPTION = re.compile(r"^(?!--).*\s--\w")  # The option follows another word.
_WITH_ARGUMENTS = re.compile(r"(tools/\w+\.py|train\.sbatch|trainer/(?:run|together)\.py) +\S")


@dataclasses.dataclass(frozen=True)
class Shown:
    """Something between backticks, or a line of a block.

    Attributes:
      where: file and line.
      text: on one line, without what is said about it.
    """

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where} {self.text}"


def commands() -> list[Shown]:
    """Every line of every block of commands, and elsewhere what begins with a program's name or has options."""
    found = [line for path in DOCUMENTS for line in _blocks(path)]
    found += [span for path in DOCUMENTS for span in spans(path) if program(span.text) or _OPTION.search(span.text)]
    found += [command for path in PROGRAMS for command in _in_docstring(path)]
    found += [command for path in [REPOSITORY / SBATCH, *CONFIGS] for command in _in_script(path)]
    return [*found, *_in_makefile()]


def spans(path: Path) -> Iterator[Shown]:
    """All text between backticks outside of blocks."""
    text = re.sub(r"^```.*?^```$", _blank, path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.finditer(r"`([^`]+)`", text):
        yield Shown(_where(path, text, span.start()), " ".join(span[1].replace("\\|", "|").split()))


def program(text: str) -> str:
    """The name of the program that a text calls; "" where it is no command, or the program's name alone.

    A text that gives arguments to a program of this repository is a command, however it begins.
    """
    words = [word.removeprefix(".venv/bin/") for word in without_variables(text.split())]
    if len(words) < 2:
        return ""
    if words[0] in (*_OURS, *NOT_OURS) or _WITH_ARGUMENTS.search(text):
        return words[0]
    return words[0] if words[0] in SUBCOMMANDS and words[1].isupper() else ""


def without_variables(words: list[str]) -> list[str]:
    """A command's words without the variables that are set in front of it."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        quoted = words[0].count('"') == 1
        words = words[1:]
        while quoted and words:
            quoted, words = '"' not in words[0], words[1:]
    return words


def _blocks(path: Path) -> Iterator[Shown]:
    """The lines of fenced blocks without a language: each is a command."""
    blank = re.sub(r"^```\w+\n.*?^```$", _blank, path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in re.finditer(r"^```\n(.*?)^```$", blank, re.MULTILINE | re.DOTALL):
        yield from _lines(path, blank, block.start(1), block.end(1))


def _in_docstring(path: Path) -> Iterator[Shown]:
    """The commands in a module's docstring: on lines that are indented or begin with python, and between backticks."""
    text = path.read_text()
    if not text.startswith('"""'):
        return
    end = text.index('"""', 3)
    for line in re.finditer(r"^(?: {4}.*\n?)+|^(?:python|torchrun) .*", text[:end], re.MULTILINE):
        yield from (shown for shown in _lines(path, text, *line.span()) if program(shown.text))
    for span in re.finditer(r"`([^`]+)`", text[:end]):
        if program(span[1]):
            yield Shown(_where(path, text, span.start()), " ".join(span[1].split()))


def _in_script(path: Path) -> Iterator[Shown]:
    """The commands in the comments of a script or a configuration: each that is indented further than the text."""
    text = re.sub(r"^(?!#  ).*$|^#", "", path.read_text(), flags=re.MULTILINE)
    yield from _lines(path, text, 0, len(text))


def _in_makefile() -> Iterator[Shown]:
    path = REPOSITORY / "Makefile"
    text = path.read_text().replace("$(BIN)/", ".venv/bin/").replace("$(PYTHON_THERE)", "python")
    for line in re.finditer(r"^\t((?:\.venv/bin/)?python .*)$", text, re.MULTILINE):
        yield Shown(_where(path, text, line.start()), line[1])


def _lines(path: Path, text: str, start: int, end: int) -> Iterator[Shown]:
    """The commands of a part of a text: a backslash continues a line, # or three spaces begin words about a command.

    Among these words another command may stand.
    """
    for line in re.finditer(r"(?:.*\\\n)*.+", text[start:end]):
        pieces = re.split(r" {3,}", re.sub(r"\\\n\s*", "", line[0]).strip())
        for piece in [*pieces[:1], *(piece for piece in pieces[1:] if program(piece))]:
            if piece and not piece.startswith("#"):
                yield Shown(_where(path, text, start + line.start()), re.sub(r"\s+# .*", "", piece))


def _where(path: Path, text: str, position: int) -> str:
    return f"{path.relative_to(REPOSITORY)}:{text.count(chr(10), 0, position) + 1}"


def _blank(found: re.Match) -> str:
    return "\n" * found[0].count("\n")
