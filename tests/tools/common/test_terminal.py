"""Commands show their progress while they work."""

from tools.lib.common import terminal


def test_without_a_terminal_what_is_done_is_a_line_now_and_then(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.reporting_progress("starting") as report:
        for now in (101.0, 129.0, 131.0, 140.0, 162.0):
            report(f"[eager] at {now:g} s")
    assert capsys.readouterr().err == "[eager] at 131 s\n[eager] at 162 s\n"
