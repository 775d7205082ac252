"""Every command in README, docs, the SLURM script, the Makefile and the programs' descriptions is one that works.

Each is parsed by the program that it calls, and those that cost nothing are run. Whatever is not understood here fails.
"""

import contextlib
import dataclasses
import functools
import io
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

from chaos import command as chaos
from conftest import REPOSITORY
from fidelity import codecs
from fidelity import command as fidelity
from pipelines.common.errors import UserError
from support.documented import DOCUMENTS, NOT_OURS, SBATCH, SUBCOMMANDS, Shown, commands, spans, without_variables
from tools import (
    average,
    benchmark,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    parity,
    predict,
    record_teacher,
    report,
    shard_imagenet,
    study,
)
from tools.lib.common.evaluation import EvalConfig
from trainer import run, together
from trainer.cluster.world import World
from trainer.config.cli import parse_settings
from trainer.config.sections import Config, parse, to_yaml
from trainer.micro_batch import resolve_micro_batch

TOOLS = {
    f"tools/{tool.__name__.rpartition('.')[2]}.py": tool
    for tool in (
        *(average, benchmark, compare, demo, doctor, export, parity, predict, record_teacher, report, shard_imagenet),
        study,
    )
} | {
    "tests/chaos": chaos,
    "tests/fidelity": fidelity,
    "tests/fidelity/codecs.py": codecs,
    "trainer/together.py": together,
}
MODES = {
    average: ("uniform", "ema", "greedy"),
    benchmark: (*benchmark.BENCHMARKS, "gpu", "table"),
    record_teacher: record_teacher.SUBCOMMANDS,
    shard_imagenet: SUBCOMMANDS,
}
# Modules of others that `python -m` starts.
MODULES_NOT_OURS = ("pip", "pytest", "venv")
# Options of others that the docs speak of: of sbatch, srun and scancel, of timm.
OPTIONS_NOT_OURS = {
    *("signal", "requeue", "gpus-per-task", "cpu-bind", "kill-on-bad-exit", "wait", "open-mode", "output"),
    *("job-name", "cpus-per-task", "full", "dist-bn", "sync-bn", "pty", "array", "dependency", "wrap"),
}
SBATCH_OPTIONS = ("nodes", "ntasks-per-node", "gpus-per-node", "time", "array", "dependency", "cpus-per-task", "wrap")
# What stands for a value in the docs and is not a path, and a value that the program takes.
STAND_INS = {
    **dict.fromkeys(("N", "R", "B", "S"), "8"),
    **{"PX": "32", "M": "test_resnet", "T": "test_byobnet", "P": "auto", "HOST:29500": "localhost:29500"},
    **{
        "--section.key": "--optim.lr",
        "value": "0.001",
        "NAME": "loader",
        "BACKEND": "onnxruntime",
        "--OPTION": "--repeats",
        "VALUE": "3",
        "PART": "tests",
    },
}
SHOWN = commands()
SPANS = [span for path in DOCUMENTS for span in spans(path)]


def once(found: list[Shown]) -> list[Shown]:
    """The first place of each text: a program does the same with it wherever it stands."""
    return list({shown.text: shown for shown in reversed(found)}.values())


@dataclasses.dataclass(frozen=True)
class Called:
    """A program of this repository with its arguments, on `ranks` ranks."""

    program: str
    arguments: list[str]
    ranks: int = 1


def variants(text: str) -> list[list[str]]:
    """The words of a command: of a usage without and with what is in brackets, with the first and the last of a|b|c."""
    found = []
    for optional in ("", r"\1"):
        words = shlex.split(re.sub(r"(?<=\s)\[([^]']*)\](?=\s|$)", optional, text), comments=True)
        words = without_variables([STAND_INS.get(word, word) for word in words])
        words = [word for number, word in enumerate(words) if word != "..." or number == 0]
        for choice in (0, -1):
            chosen = [word.split("|")[choice] if re.fullmatch(r"\w+(\|\w+)+", word) else word for word in words]
            found += [chosen] if chosen not in found else []
    return found


def called(words: list[str]) -> Called | None:
    """What a command calls; None for what is not this repository's."""
    first, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if first == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert set(rest) <= set(targets), f"no such target of make; there are {targets}"
        return None
    if first in NOT_OURS or (first, rest) == ("sbatch", []):
        return None
    if first == "...":
        return Called("trainer/run.py", rest)
    if first in SUBCOMMANDS:  # prose may name an option of one, without its folders
        folders = [*["SRC"] * (first == "build"), "OUT"] if rest[0].startswith("--") else []
        return Called("tools/shard_imagenet.py", [first, *folders, *rest])
    if first == "torchrun":
        options = torchrun_parser().parse_args(rest)
        ranks = int(options.nnodes.rpartition(":")[2]) * int(options.nproc_per_node)
        return Called(options.training_script, options.training_script_args, ranks)
    if first == "sbatch":
        return of_sbatch(rest)
    if first == "python":
        return of_python(rest)
    return Called(first, rest)


def of_sbatch(words: list[str]) -> Called | None:
    """What a job of sbatch starts: the options in front of the script win over those in it."""
    lines = re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (REPOSITORY / SBATCH).read_text(), re.MULTILINE)
    options = dict(lines)
    while words[0].startswith("--"):
        (name, equals, value), words = words[0][2:].partition("="), words[1:]
        assert name in SBATCH_OPTIONS, name
        if not equals:
            value, words = words[0], words[1:]
        if name == "wrap":
            return called(shlex.split(value))
        options[name] = value
    assert words[0] == SBATCH and options["gpus-per-node"] == options["ntasks-per-node"]
    return Called("trainer/run.py", words[1:], int(options["nodes"]) * int(options["ntasks-per-node"]))


def of_python(words: list[str]) -> Called | None:
    """What Python starts: a script, or a module behind -m."""
    if words[0] == "tests/gpu_stub":  # pytest's, whose arguments it takes
        return None
    if words[0] != "-m":
        return Called(words[0], words[1:])
    assert words[1] in MODULES_NOT_OURS, f"what is the module {words[1]}?"
    assert all(Path(word).exists() for word in words[2:] if word.startswith("tests/"))
    return None


def parsed(call: Called) -> object:
    """What the program's own parser makes of the arguments, and what it refuses before it looks at data.

    Raises:
      UserError, SystemExit: they are refused.
    """
    if call.program == "tools/evaluate.py":
        return parse_settings(EvalConfig, call.arguments, prog=None, description="")
    if call.program == "trainer/run.py":
        config = parse(call.arguments)
        resolve_micro_batch(config, World(0, call.ranks, call.ranks, torch.device("cpu")))
        return config
    assert call.program in TOOLS, f"{call.program}: what is this? Add it to TOOLS, or to NOT_OURS"
    options = TOOLS[call.program]._parse(call.arguments)
    if call.program == "tools/record_teacher.py" and "settings" in options:
        return parse(options.settings)
    return options if call.program != "tools/doctor.py" else doctor.configuration(options[0].target, options[1])


def understand(text: str) -> None:
    """Raise an error if a command is not understood, or is refused by the program that it calls."""
    for words in variants(text):
        if (call := called(words)) is not None:
            with help_is_no_error():
                parsed(call)


@contextlib.contextmanager
def help_is_no_error():
    try:
        yield
    except SystemExit as ended:
        assert ended.code == 0, f"exit code {ended.code}; stderr says why"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The present folder with what the docs' commands name: the repository's own files, a run, a file of settings."""
    for name in ("configs", "tests", "tools", "trainer"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text(to_yaml(Config()))
    (tmp_path / "RUN-OR-CONFIG").symlink_to(REPOSITORY / "configs" / "usi.yaml")
    for name in ("mine.yaml", "A.yaml"):
        (tmp_path / name).write_text("schedule:\n  epochs: 100\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shown", once(SHOWN), ids=str)
def test_every_command_is_accepted_by_the_program_that_it_calls(shown: Shown, place):
    understand(shown.text)


def test_commands_are_found_in_each_kind_of_place():
    files = {shown.where.partition(":")[0] for shown in SHOWN}
    assert {"README.md", "docs/launching.md", "docs/sharding.md", SBATCH, "Makefile", "tools/demo.py"} <= files
    assert len(SHOWN) > 100
    assert {
        f"tools/{path.name}" for path in (REPOSITORY / "tools").glob("[a-z]*.py") if "_parse(" in path.read_text()
    } == {name for name in TOOLS if name.startswith("tools/")}


SIXTEEN = "torchrun --nnodes 2 --nproc-per-node 8 trainer/run.py --config configs/usi.yaml --run.global_batch 1024"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (f"{SIXTEEN} --run.global_batch 1500", UserError),  # no whole groups
        (f"sbatch --nodes 65 {SBATCH} --config configs/usi.yaml", UserError),
        ("... --schedule.epoch 100", UserError),
        ("... --config configs/none.yaml", UserError),
        (".venv/bin/python tools/doctor.py configs/usi.yaml --optim.lrr 1", UserError),
        (".venv/bin/python tools/shard_imagenet.py build SRC", SystemExit),
        ("python tools/report.py RUN [--output FOLDER]", SystemExit),
        ("python tools/average.py ema OUT.pt RUN --weights ema|none", SystemExit),
        ("python tools/evaluate.py --data.split", UserError),
        ("make tests", AssertionError),
        ("python tools/none.py", AssertionError),
        ("sudo reboot", AssertionError),
        ("uv run tools/report.py RUN", AssertionError),
        ("verify --encode", SystemExit),
        ("torchrun --nproc 8", SystemExit),
    ],
)
def test_a_command_that_does_not_work_or_is_not_understood_fails(text, error, place):
    with pytest.raises(error) if error is not SystemExit else pytest.raises((AssertionError, SystemExit)):
        understand(text)


# Options, settings and paths in prose


@functools.cache
def helps() -> str:
    """What --help says, of every program and each of its modes."""
    pages = []
    for tool in TOOLS.values():
        for mode in (*MODES.get(tool, ()), None):
            pages.append(printed(tool.main, [mode, "--help"] if mode else ["--help"]))
    return "\n".join([*pages, printed(run.main, ["--help"]), printed(evaluate.main, ["--help"])])


def printed(main: Callable, arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as page, help_is_no_error():
        main(arguments)
    return page.getvalue()


@pytest.mark.parametrize("path", [*DOCUMENTS, REPOSITORY / SBATCH], ids=lambda path: path.name)
def test_every_option_that_a_document_names_is_one_of_a_program(path: Path):
    """In prose, in comments and in commands."""
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*(?:\.[\w-]+)*)", path.read_text()))
    options = set(re.findall(r"--([\w-]+)", helps() + torchrun_parser().format_help()))
    settings = {key for key in named if "." in key and re.sub(r"(\.kwargs)\..*", r"\1", key) in {*KEYS, "section.key"}}
    assert named - options - settings - OPTIONS_NOT_OURS <= set(SBATCH_OPTIONS)


WITH_VALUES = [span for span in SPANS if re.match(r"--(\w+\.|config )\S+ ", span.text)]


@pytest.mark.parametrize("span", once(WITH_VALUES), ids=str)
def test_every_setting_on_a_command_line_in_prose_takes_the_value_that_stands_there(span: Shown, place):
    accepted(variants(span.text)[0])


def accepted(words: list[str]) -> None:
    """Raise the trainer's UserError if neither the trainer nor the evaluation takes these settings."""
    try:
        parse(words)
    except UserError:
        with contextlib.suppress(UserError):
            parse_settings(EvalConfig, words, prog=None, description="")
            return
        raise


KEYS = {
    f"{section.name}.{key.name}"
    for kind in (Config, EvalConfig)
    for section in dataclasses.fields(kind)
    for key in dataclasses.fields(section.default_factory)
}
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
SETTING = re.compile(rf"((?:{SECTIONS})\.(?!py\b)[\w*]+(?:\.\w+)*)(?:: (.+))?")


@pytest.mark.parametrize("span", once([span for span in SPANS if SETTING.fullmatch(span.text)]), ids=str)
def test_every_setting_in_prose_is_a_key_of_the_trainer_or_the_evaluation_and_takes_that_value(span: Shown, place):
    key, value = SETTING.fullmatch(span.text).groups()
    name = re.sub(r"(\.kwargs)\..*", r"\1", key)
    assert any(re.fullmatch(name.replace(".", r"\.").replace("*", ".*"), known) for known in KEYS)
    if value and "..." not in value:
        accepted(
            [f"--{key}", yaml.safe_dump(yaml.safe_load(value), default_flow_style=True).removesuffix("...\n").strip()]
        )


PATHS = [span for span in SPANS if re.fullmatch(r"(tools|trainer|pipelines|tests|configs|docs)/[\w./-]+", span.text)]


@pytest.mark.parametrize("span", once(PATHS), ids=str)
def test_every_path_of_the_repository_in_prose_is_there(span: Shown):
    assert (REPOSITORY / span.text).exists()


# Those that cost nothing


RUNS = {  # a documented command, and what it makes
    "python tools/shard_imagenet.py info OUT": None,
    "python tools/shard_imagenet.py verify OUT": None,
    "python tools/shard_imagenet.py index ROOT": "ROOT/manifest.json",
    ".venv/bin/python tools/shard_imagenet.py build my_images my_dataset": "my_dataset/manifest.json",
    ".venv/bin/python tools/evaluate.py --data.root OUT --student.checkpoint RUN": None,
    ".venv/bin/python tools/predict.py --checkpoint RUN photos/ --out predictions.csv": "predictions.csv",
    ".venv/bin/python tools/average.py uniform soup.pt RUN1 RUN2": "soup.pt",
    ".venv/bin/python tools/average.py ema slower.pt RUN --decay 0.9999": "slower.pt",
    ".venv/bin/python tools/report.py RUN [RUN ...] [--out FOLDER]": "FOLDER/index.html",
    ".venv/bin/python trainer/run.py --help": None,
}


def run_documented(text: str) -> None:
    call = called(variants(text)[-1])
    mains = {"tools/evaluate.py": evaluate.main, "trainer/run.py": run.main}
    with help_is_no_error():
        mains.get(call.program, getattr(TOOLS.get(call.program), "main", None))(call.arguments)


@pytest.fixture
def inputs(tmp_path, digits, digits_folder, tiny_run, monkeypatch) -> Path:
    """The present folder with a small dataset, images and a run under the names that the docs give them."""
    shutil.copytree(digits, tmp_path / "ROOT", ignore=shutil.ignore_patterns("*.json*", "*.npy", "*.idx"))
    shutil.copytree(tiny_run, tmp_path / "RUN2")
    for name, target in {"my_images": digits_folder, "photos": digits_folder / "val", "OUT": digits}.items():
        (tmp_path / name).symlink_to(target)
    for name in ("RUN", "RUN1"):
        (tmp_path / name).symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("text", "made"), RUNS.items(), ids=RUNS)
def test_a_command_that_costs_nothing_runs_as_documented(text, made, inputs):
    assert text in {shown.text for shown in SHOWN}, "the docs show it no more"
    run_documented(text)
    assert made is None or (inputs / made).exists()


def test_an_evaluation_goes_into_the_card_by_the_two_commands_that_the_docs_show(inputs):
    (inputs / "DATASET").symlink_to((inputs / "OUT").resolve())
    (inputs / "OUT").unlink()
    for text in (
        ".venv/bin/python tools/evaluate.py --data.root DATASET --student.checkpoint RUN --run.json evaluation.json",
        ".venv/bin/python tools/export.py RUN OUT --evaluation evaluation.json",
    ):
        assert text in {shown.text for shown in SHOWN}
        run_documented(text)
    assert "On the 96 images of split `val` of DATASET" in (inputs / "OUT" / "README.md").read_text()


def test_the_recipe_is_audited_and_printed_without_training(place, capsys):
    run.main(["--config", "configs/usi.yaml", "--run.out", "NEW", "--audit"])
    printed(run.main, ["--config", "configs/usi.yaml", "--run.out", "NEW", "--print_config"])
    assert not (place / "NEW").exists()


@pytest.mark.parametrize("document", ["field.md", "security.md"])
def test_every_test_that_a_promise_names_is_there(document):
    """FILE::TEST, and further tests of the same file after it."""
    text = (REPOSITORY / "docs" / document).read_text()
    promised, file = [], ""
    for found in re.finditer(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text):
        file = found[1] or file
        promised.append((file, found[2]))
    assert len(promised) > 25
    texts = {path.name: path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert not [(file, name) for file, name in promised if f"def {name}(" not in texts.get(file, "")]
