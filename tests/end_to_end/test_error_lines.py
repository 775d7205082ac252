"""A mistake of the user or the machine ends a command with one line; no character in the output ends one."""

import errno
import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from conftest import REPOSITORY
from pipelines.common.errors import UserError, exit_on_user_error, reason_of, system_error_text
from tools import shard_imagenet
from tools.lib.evaluate.report import show

COMMANDS = [path.stem for path in sorted((REPOSITORY / "tools").glob("*.py")) if "def main(" in path.read_text()]


def ended_by(error: BaseException, capsys) -> str:
    """What a command writes to stderr when it ends by an error."""
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        raise error
    assert end.value.code == 1
    return capsys.readouterr().err


def of_system(action) -> OSError:
    with pytest.raises(OSError) as found:
        action()
    return found.value


@pytest.fixture
def system_errors(tmp_path) -> dict[str, OSError]:
    """Errors that the operating system has really raised."""
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return {
        "missing: No such file or directory. Look whether": of_system((tmp_path / "missing").read_bytes),
        f"{tmp_path}: Is a directory. Name another place": of_system(tmp_path.read_bytes),
        "file/x: Not a directory. Name another place": of_system((tmp_path / "file" / "x").read_bytes),
        "circle: Too many levels of symbolic links. Name another": of_system((tmp_path / "circle").read_bytes),
        "File name too long. Name another": of_system((tmp_path / ("x" * 300)).read_bytes),
        "file: File exists. Name another place": of_system((tmp_path / "file").mkdir),
        f"missing -> {tmp_path}/b: No such file": of_system(lambda: (tmp_path / "missing").rename(tmp_path / "b")),
    }


def test_an_error_of_the_system_is_one_line_with_the_file_and_what_helps(system_errors, capsys):
    for expected, error in system_errors.items():
        line = ended_by(error, capsys)
        assert line.startswith("error: ") and line.count("\n") == 1 and expected in line, line


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/a"),
            "error: /data/a: Permission denied. Change its",
        ),
        (OSError(errno.ENOSPC, "No space left on device", b"/data/\xff"), "error: /data/\\udcff: No space left"),
        (OSError(errno.EIO, "Input/output error"), "error: Input/output error. Look at the disk"),
        (OSError("cannot identify this"), "error: cannot identify this. USI_TRACEBACK=1 in the environment shows"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "error: Connection reset by peer. USI"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "error: Broken pipe. USI"),  # The pipe is not the output.
        (UserError("a:\n b. Do\tc"), "error: a: b. Do c\n"),
    ],
)
def test_an_error_without_much_to_say_is_one_line(error, expected, capsys):
    line = ended_by(error, capsys)
    assert line.startswith(expected) and line.count("\n") == 1, line


def test_the_traceback_is_kept_where_it_is_asked_for(monkeypatch, capsys):
    """A message advises USI_TRACEBACK=1 in the environment."""
    monkeypatch.setenv("USI_TRACEBACK", "1")
    for error in (UserError("a: b. Do c"), OSError("cannot identify this")):
        with pytest.raises(type(error)), exit_on_user_error():
            raise error


def test_a_mistake_of_the_program_keeps_its_traceback():
    for error in (ValueError("x"), RuntimeError("x"), KeyError("x")):
        with pytest.raises(type(error)), exit_on_user_error():
            raise error


def test_a_long_message_loses_its_middle_and_keeps_its_advice(capsys):
    line = ended_by(UserError(f"{'a' * 400} {'b' * 4000}. Do this"), capsys)
    assert len(line) < 650 and line.startswith("error: aaa") and " [...] " in line and line.endswith(". Do this\n")
    assert ended_by(UserError("x" * 600), capsys) == f"error: {'x' * 600}\n"


def test_an_error_without_words_is_named_by_the_line_that_raised_it():
    with pytest.raises(AssertionError) as silent:
        raise AssertionError
    assert re.fullmatch(r"test_error_lines.py:\d+: raise AssertionError", reason_of(silent.value))
    assert reason_of(ValueError("no such size")) == "no such size" and reason_of(MemoryError()) == "MemoryError"


def test_a_system_error_says_where_it_happened_in_any_bytes():
    assert system_error_text(FileNotFoundError(errno.ENOENT, "No such file", "a")).startswith("a: No such file. ")
    assert system_error_text(OSError()).startswith("OSError. ")


# --- output ---

PRINTS = """
import sys
from pipelines.common.errors import exit_on_user_error
with exit_on_user_error():
    for number in range(int(sys.argv[1])):
        print("a line", number)
"""


def run_python(script: str, *arguments, **popen) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *arguments], cwd=REPOSITORY, **popen)


@pytest.mark.parametrize("lines", ["1", "100000"])
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(lines):
    """`head` does that: it has gone before the program writes, or goes while it does."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run_python(PRINTS, lines, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("lines", ["1", "100000"])
def test_output_to_a_full_disk_is_one_line(lines):
    with open("/dev/full", "w") as full:
        done = run_python(PRINTS, lines, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device. Make room there, and run the same command again\n"


def test_a_command_without_any_output_works():
    done = run_python(PRINTS, "3", stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert done.returncode == 0 and done.stderr == b""


def ascii_output(monkeypatch) -> Callable[[], str]:
    """Makes stdout and stderr as with PYTHONIOENCODING=ascii. Gives what was written so far."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def written() -> str:
        for stream in streams.values():
            stream.flush()
        return b"".join(stream.buffer.getvalue() for stream in streams.values()).decode("ascii")

    return written


@pytest.mark.parametrize("name", ["caf\xe9", "\u732b", "\U0001f600", os.fsdecode(b"broken\xff"), "a\u0301"])
def test_any_name_is_printed_by_any_command_in_ascii(monkeypatch, name):
    written, table = ascii_output(monkeypatch), Table(title=name)
    table.add_column("class \u2588")
    table.add_row(name)
    with pytest.raises(SystemExit), exit_on_user_error():
        print(name)
        Console().print(table)
        raise UserError(f"{name}: not found. Give another")
    escaped = name.encode("ascii", "backslashreplace").decode()
    assert f"error: {escaped}: not found" in written() and written().startswith(f"{escaped}\n")


def test_a_file_name_of_broken_bytes_is_printed_in_utf_8_too(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with exit_on_user_error():
        print(os.fsdecode(b"caf\xc3\xa9 \xff"))
    assert stream.buffer.getvalue() == b"caf\xc3\xa9 \\udcff\n"


@pytest.mark.parametrize("columns", ["1", "20", "200"])
def test_classes_of_any_name_are_built_shown_and_evaluated_on_an_ascii_terminal(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    written = ascii_output(monkeypatch)
    names = ["caf\xe9", "\u732b"]
    for split in ("train", "val"):
        for label, name in enumerate(names):
            (tmp_path / "\xfc" / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = np.full((8, 8, 3), 90 * label + number, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "\xfc" / split / name / f"{split}-{number}.jpg")
    out = tmp_path / "d\xe4ta"
    shard_imagenet.main(["build", str(tmp_path / "\xfc"), str(out), "--workers", "1"])
    shard_imagenet.main(["info", str(out)])
    shard_imagenet.main(["verify", str(out), "--workers", "1"])
    row = {"words": "\u732b", "images": 2, "top1": 50.0, "taken_for": [{"class": names[1], "percent": 50.0}]}
    numbers = {"top1": 50.0, "top5": 100.0, "loss": 0.7, "ece": 1.0, "images": 4, "outputs": 2}
    transform = {"image_size": 8, "crop_mode": "center", "crop_pct": 1.0, "interpolation": "bicubic"}
    found = {"model": "m", "source": str(tmp_path / "\xfc"), "weights": "ema", "view": transform, "dataset": str(out)}
    with exit_on_user_error():
        show({**found, **numbers, "classes": [{"class": name, **row} for name in names], "damaged": ["\xe9: x"]})
    assert (out / "manifest.json").is_file() and "d\\xe4ta: 4 train, 4 val" in written()


@pytest.mark.parametrize("columns", ["1", "20"])
@pytest.mark.parametrize("command", [*COMMANDS, "run", "evaluate"])
def test_help_is_printed_on_a_narrow_ascii_terminal(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    written = ascii_output(monkeypatch)
    with pytest.raises(SystemExit) as end:
        main_of(command)()
    assert end.value.code == 0 and "usage:" in written().lower()


def main_of(command: str):
    folder = "tools" if (REPOSITORY / "tools" / f"{command}.py").is_file() else "trainer"
    return importlib.import_module(f"{folder}.{command}").main


@pytest.mark.parametrize("command", [*COMMANDS, "run", "evaluate"])
def test_every_command_ends_its_errors_in_one_place(command):
    folder = "tools" if command in COMMANDS else "trainer"
    text = (REPOSITORY / folder / f"{command}.py").read_text()
    assert re.search(r"with exit_on_user_error\(\)", text)
