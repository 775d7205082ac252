"""Placeholder until the report is merged."""

from pathlib import Path

from tools.lib.study.results import StudyResults


def write_report(out: Path, results: StudyResults) -> Path:
    """Write the results as text."""
    path = out / "index.html"
    path.write_text(str(results))
    return path
