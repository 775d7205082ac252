"""The short version of `make fidelity`, and that its comparisons see what differs."""

import numpy as np
import pytest

from fidelity import command, learning_rate, old_timm
from fidelity.rows import alike, as_often, within

NAMES = "ours", "theirs"


@pytest.mark.skipif(not old_timm.FOLDER.is_dir(), reason="timm 0.5.4 is not installed: make fidelity does that")
def test_the_learning_rate_is_that_of_timm_0_5_4():
    old_timm.check_installed()
    (row,) = learning_rate.rows()
    assert row.ok and row.compared == 310


def test_comparisons_see_what_differs():
    values = np.random.default_rng(0).normal(size=10_000)
    assert within("", NAMES, values, values).ok and within("", NAMES, values, values + 1e-6, 1e-5).ok
    assert not within("", NAMES, values, values + 1e-6).ok
    assert not within("", NAMES, values, values + 1e-4, 1e-5, relative=True).ok
    assert alike("", NAMES, values[:5000], values[5000:]).ok
    assert not alike("", NAMES, values[:5000], values[5000:] * 1.2).ok
    assert as_often("", NAMES, np.array([100, 0, 200]), np.array([105, 0, 195])).ok
    assert not as_often("", NAMES, np.array([100, 200]), np.array([200, 100])).ok


def test_an_oracle_that_falls_ends_the_command_with_its_name(monkeypatch, tmp_path, capsys):
    values = np.zeros(3)
    rows = [within("one", NAMES, values, values), within("other", NAMES, values, values + 1)]
    monkeypatch.setattr(command, "check_installed", lambda: None)
    monkeypatch.setattr(learning_rate, "rows", lambda: rows)
    monkeypatch.setattr(command, "ORACLES", {"learning_rate": learning_rate})
    document = tmp_path / "parity.md"
    document.write_text(f"before\n{command.BEGIN}\nprevious\n{command.END}\nafter\n")
    with pytest.raises(SystemExit, match="learning_rate: other"):
        command.main(["--markdown", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "previous" not in text
    assert "1 of 2 comparisons hold" in text and "| NO |" in text


def test_a_part_of_the_oracles_does_not_replace_the_report_of_all(tmp_path, capsys):
    document = tmp_path / "parity.md"
    document.write_text("the report")
    with pytest.raises(SystemExit):
        command.main(["learning_rate", "--markdown", str(document)])
    assert "--markdown takes the report of all oracles" in capsys.readouterr().err
    assert document.read_text() == "the report"


def test_without_timm_0_5_4_the_command_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(old_timm, "FOLDER", tmp_path / "nothing")
    with pytest.raises(SystemExit):
        command.main(["learning_rate"])
    assert "timm 0.5.4 is not there. Install it with make fidelity" in capsys.readouterr().err


def test_a_folder_that_is_not_the_authors_repository_is_refused(monkeypatch, tmp_path):
    (tmp_path / "timm-0.5.4.dist-info").mkdir()
    monkeypatch.setattr(old_timm, "FOLDER", tmp_path)
    monkeypatch.setenv("AUTHORS", str(tmp_path))
    with pytest.raises(old_timm.UserError, match="which has no train.py"):
        old_timm.check_installed()


def test_help_lists_every_oracle_with_its_promise(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {command.promise(name)}" in page for name in command.ORACLES)
