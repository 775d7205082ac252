"""Imports go one way: tools -> trainer -> pipelines; and between the folders of each in the order below."""

import ast
import functools
import graphlib
import re
import sys

from conftest import REPOSITORY

# A room is a folder or a file. It imports from rooms of earlier lines, and no other room of its own line.
ORDER = {
    "pipelines": (
        ("common",),
        ("shards",),
        ("plan",),
        ("ops",),
        ("config", "batch", "prefetch"),
        ("cpu", "synthetic"),
        ("dali",),
        ("dali_probe",),
        ("executors", "reference"),
    ),
    "trainer": (
        ("config",),
        ("cluster",),
        ("models",),
        ("targets",),
        ("state",),
        ("update",),
        ("evaluation", "monitor"),
        ("feed",),
        ("micro_batch",),
        ("builder",),
        ("sharing", "session"),
        ("loop",),
        ("run",),
        ("together",),
    ),
}
MAY_IMPORT = {"pipelines": set(), "trainer": {"pipelines"}, "tools": {"pipelines", "trainer"}}
FILES = [path for folder in MAY_IMPORT for path in sorted((REPOSITORY / folder).rglob("*.py"))]


@functools.cache
def imported(path) -> set[str]:
    """The project's own modules that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name.split(".")[0] in MAY_IMPORT}


def rooms(path) -> tuple[str, str]:
    """The package and the room of a file; "" for a package's own __init__.py."""
    package, *parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return package, "" if parts == ["__init__"] else parts[0]


def test_a_file_imports_only_its_own_package_and_lower_ones():
    for path in FILES:
        package = path.relative_to(REPOSITORY).parts[0]
        assert {name.split(".")[0] for name in imported(path)} <= MAY_IMPORT[package] | {package}, path


def test_a_room_imports_only_lower_rooms():
    for path in FILES:
        package, room = rooms(path)
        if package in ORDER and room:
            line = {each: number for number, line in enumerate(ORDER[package]) for each in line}
            assert room in line, f"{package}/{room} has no place in ORDER"
            others = {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")} - {room}
            higher = [other for other in others if other in line and line[other] >= line[room]]
            assert not higher, f"{path} imports {', '.join(higher)}"


def test_no_command_imports_another_command_or_its_parts():
    """tools/NAME.py has its parts in tools/lib/NAME; what two of them need is in tools/lib/common or lib/shards.

    lib/shards makes datasets, also those that benchmarks and comparisons make for themselves.
    """
    for path in (REPOSITORY / "tools").rglob("*.py"):
        parts = path.relative_to(REPOSITORY / "tools").with_suffix("").parts
        own = {"shard_imagenet": "shards"}.get(parts[0], parts[0]) if parts[0] != "lib" else (*parts, "")[1]
        allowed = {"common"} if own == "common" else {"common", "shards", own}
        for name in imported(path):
            if name.startswith("tools.lib."):
                assert name.split(".")[2] in allowed, (path, name)
            elif name.startswith("tools.") and name != "tools.lib":
                raise AssertionError(f"{path} imports the command {name}")


def test_no_imports_in_a_circle():
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in FILES}
    graph = {name: {other for other in imported(path) if other in modules} for name, path in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_planning_needs_no_torch():
    shards = [REPOSITORY / "pipelines" / "shards" / f"{name}.py" for name in ("manifest", "index", "dataset")]
    planning = [*shards, *(REPOSITORY / "pipelines" / "plan").glob("*.py"), REPOSITORY / "pipelines" / "config.py"]
    for name in planning:
        for node in ast.walk(ast.parse(name.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in ("torch", "torchvision", "timm", "PIL", "nvidia"), (name, module)


def test_no_file_is_named_like_a_standard_library_module():
    assert not {path.stem for path in FILES} & set(sys.stdlib_module_names) - {"__init__"}


def test_no_file_is_mapped_into_memory_but_where_that_is_measured():
    """A mapped file that shrinks in the meantime ends the process with SIGBUS, which is no error that can be named."""
    for path in FILES:
        if "benchmark" not in path.parts:
            assert not {"mmap", "memmap", "mmap_mode"} & set(re.findall(r"\w+", path.read_text())), path


def test_folders_files_and_functions_stay_small():
    """At most 12 files in a folder, 450 lines in a file and 59 in a function.

    tools/ is the list of commands, each of which is a file, so it has as many as there are commands.
    """
    for folder in {path.parent for path in FILES} - {REPOSITORY / "tools"}:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= 12, folder
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno + 1 < 60, (path, node.name)


def test_no_two_test_files_have_the_same_name():
    """Pytest imports them by their names alone."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_no_test_file_imports_another():
    """What two of them need is in tests/support; another folder's test file is not found when it runs alone."""
    for path in (REPOSITORY / "tests").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) test_", path.read_text(), re.M), path
