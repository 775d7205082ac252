"""The index names every page, every link inside the repository leads somewhere, and the README stays short."""

import re
from pathlib import Path

import pytest

from conftest import REPOSITORY
from support.documented import DOCUMENTS

PAGES = [*DOCUMENTS, REPOSITORY / "CHANGELOG.md"]
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")  # not to another host


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for path, anchor in LINK.findall(without_blocks(page)):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_inside_the_repository_leads_to_a_file_and_a_heading(page):
    assert not broken_links(page)


def test_a_link_to_no_file_and_one_to_no_heading_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c!\n[a](#a-b-c) [b](#b) [c](none.md) [d](https://example.org/none)\n```\n[e](none)\n```\n"
    )
    assert broken_links(page) == ["#b", "none.md#"]


def test_the_index_names_every_page():
    named = {path for path, _ in LINK.findall((REPOSITORY / "docs" / "README.md").read_text())}
    assert named >= {page.name for page in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 200
