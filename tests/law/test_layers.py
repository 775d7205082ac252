"""Imports go one way: tools -> trainer -> pipelines; and within a folder never in a circle."""

import ast
import graphlib
import re

import pytest

from conftest import REPOSITORY

MAY_IMPORT = {"pipelines": set(), "trainer": {"pipelines"}, "tools": {"pipelines", "trainer"}}
FILES = [path for folder in MAY_IMPORT for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imported(path) -> set[str]:
    """The project's own modules that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name.split(".")[0] in MAY_IMPORT}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_imports_only_its_own_folder_and_lower_ones(path):
    folder = path.relative_to(REPOSITORY).parts[0]
    assert {name.split(".")[0] for name in imported(path)} <= MAY_IMPORT[folder] | {folder}


def test_no_imports_in_a_circle():
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in FILES}
    graph = {name: {other for other in imported(path) if other in modules} for name, path in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_planning_needs_no_torch():
    planning = [REPOSITORY / "pipelines" / "shards" / "index.py", *(REPOSITORY / "pipelines" / "plan").glob("*.py")]
    for name in planning:
        for node in ast.walk(ast.parse(name.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in ("torch", "torchvision", "timm", "PIL", "nvidia"), (name, module)


def test_no_file_is_named_like_a_standard_library_module():
    import sys

    assert not {path.stem for path in FILES} & set(sys.stdlib_module_names) - {"__init__"}


def test_no_file_is_mapped_into_memory_but_where_that_is_measured():
    """A mapped file that shrinks in the meantime ends the process with SIGBUS, which is no error that can be named."""
    for path in FILES:
        if "benchmark" not in path.parts:
            assert not {"mmap", "memmap", "mmap_mode"} & set(re.findall(r"\w+", path.read_text())), path
