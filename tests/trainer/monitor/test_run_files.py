"""The files in a run's folder."""

import errno
import fcntl
import threading
import time
from pathlib import Path

import pytest

from support.tiny_runs import arguments_for
from trainer.monitor.run_files import append_synced
from trainer.run import main


def test_no_space_for_the_log_is_reported_in_one_line(digits, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("trainer.monitor.telemetry.Telemetry._write", full)
    with pytest.raises(SystemExit) as end:
        main(arguments_for(digits, tmp_path))
    assert end.value.code == 1
    assert "error: metrics.jsonl: No space left on device. Make room" in capsys.readouterr().err


def is_waited_for(path: Path) -> bool:
    """Whether somebody waits for a lock of a file."""
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "-> FLOCK" in line]
    return any(f":{path.stat().st_ino} " in line for line in waiting)


def test_processes_that_add_lines_at_once_wait_for_each_other(tmp_path):
    path = tmp_path / "lines"
    append_synced(path, [b"1"])
    thread = threading.Thread(target=append_synced, args=(path, [b"3"]))
    with open(path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"half of a ")
        thread.start()
        while thread.is_alive() and not is_waited_for(path):
            time.sleep(0.001)
        file.write(b"line\n")
    thread.join()
    append_synced(path, [b"4", b"5"])
    assert path.read_bytes() == b"1\nhalf of a line\n3\n4\n5\n"


def test_a_line_that_was_cut_off_is_completed_before_others_are_added(tmp_path):
    (tmp_path / "lines").write_bytes(b"1\nhalf")
    append_synced(tmp_path / "lines", [b"2"])
    assert (tmp_path / "lines").read_bytes() == b"1\nhalf\n2\n"
