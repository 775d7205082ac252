"""The files in a run's folder."""

import errno

import pytest

from support.tiny_runs import arguments_for
from trainer.run import main


def test_no_space_for_the_log_is_reported_in_one_line(digits, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("trainer.monitor.telemetry.Telemetry._write", full)
    with pytest.raises(SystemExit) as end:
        main(arguments_for(digits, tmp_path))
    assert end.value.code == 1
    assert "error: metrics.jsonl: No space left on device. Make room" in capsys.readouterr().err
