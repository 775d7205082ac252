"""Checkpoints, exported folders and files of weights in which something is not as it should be, given to every command.

A run of two steps is made, its best weights are exported, and saved as timm saves them. Then one of these files is
changed, and a command is called that reads it.
"""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from chaos.attempts import Attempt, Ended, isolated
from chaos.changed_weights import byte_changed, change_file, words
from pipelines.common.errors import UserError, exit_on_user_error
from support.processes import without_workers
from tools import average, evaluate, export, predict
from tools.lib.compare import candidates
from tools.lib.shards.build import BuildOptions, build
from trainer import run as trainer
from trainer.config.sections import StudentConfig, TeacherConfig
from trainer.models.checkpoint_format import digest_of
from trainer.models.student import build_student
from trainer.models.teacher import build_teacher
from trainer.state.checkpoint import to_host

PROMISE = (
    "Checkpoints, best.pt, exported folders and plain files of weights are changed: a field is absent, of another "
    "type, of another shape, not finite or huge; the file is truncated, has changed bytes, or would exhaust the "
    "memory. Every command that reads such a file ends in one line, or the change does no harm: a resumed run ends "
    "bit-equal, and a model has the weights of the unchanged file."
)
NAME, SIZE, STEPS = "test_resnet", 32, 3
SETTINGS = [
    *("--student.name", NAME, "--teacher.name", "null", "--data.image_size", str(SIZE), "--augment.mix_group", "16"),
    *("--run.global_batch", "32", "--ema.decay", "0.9", "--run.device", "cpu", "--data.threads", "1"),
    *("--schedule.epochs", "5", "--schedule.warmup_epochs", "1", "--schedule.cooldown_epochs", "0"),
    *("--run.checkpoint_every", "1", "--run.keep_checkpoints", "5", "--run.log_every", "1"),
]
_CLASSIFIER = "fc."  # the part that the names of the classes may change
_COUNT = ".num_batches_tracked"  # which nothing depends on, and which torch lets old files lack


Command = Callable[["Place", Path], None]


class Place:
    """Where everything lies that an attempt needs, in a folder that is empty at first."""

    def __init__(self, folder: Path):
        self.data, self.run = folder / "dataset", folder / "run"
        self.exported, self.plain, self.tried = folder / "exported", folder / "plain.pth", folder / "tried"
        self.image = folder / "image.jpg"
        self._expected: dict[tuple[str, Command], str] = {}

    @property
    def files(self) -> dict[str, Path]:
        """What is changed, by its name in the report."""
        checkpoints = self.run / "checkpoints"
        files = {"checkpoint": checkpoints / f"step-{STEPS - 1:08d}.pt", "best.pt": checkpoints / "best.pt"}
        return {**files, "config.json": self.exported, "exported weights": self.exported, "plain weights": self.plain}

    def train(self, out: Path, steps: int) -> None:
        """Go on with a run up to a step."""
        trainer.main(
            [*SETTINGS, "--data.root", str(self.data), "--run.out", str(out), "--run.stop_after_steps", str(steps)]
        )

    def expected(self, name: str, command: Command) -> str:
        """The result of a command with an unchanged file."""
        if (name, command) not in self._expected:
            self._expected[name, command] = _result(_tried(self, name, command, lambda _: "")[1])
        return self._expected[name, command]

    def prepare(self) -> None:
        """Make all of it."""
        images = self.data.with_name("images")
        _write_images(images, {"train": 60, "val": 20})
        with without_workers():
            build(images, self.data, BuildOptions(samples_per_shard=100))
        shutil.copy(next((images / "val").rglob("*.png")), self.image)
        self.train(self.run, STEPS - 1)
        export.main([str(self.run), str(self.exported)])
        torch.save(torch.load(self.files["best.pt"], weights_only=True)["state_dict"], self.plain)


def _write_images(folder: Path, counts: dict[str, int]) -> None:
    """Small images of ten classes, which differ in brightness."""
    chance = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            path = folder / split / str(i % 10) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = chance.integers(20 * (i % 10), 20 * (i % 10) + 60, (8, 8, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)


# --- commands: each prints its result, which is compared with the result for the unchanged file ---


def resume(place: Place, _file: Path) -> None:
    """Go on with the run whose newest checkpoint was changed."""
    place.train(place.tried, STEPS)
    content = torch.load(place.tried / "checkpoints" / f"step-{STEPS:08d}.pt", weights_only=True)
    _print_result({part: content[part] for part in ("step", "student", "ema", "optimizer")})


def predict_image(place: Place, file: Path) -> None:
    """Predict an image."""
    named = ["--name", NAME] if file.name == place.plain.name else []
    predict.main([str(place.image), "--checkpoint", str(file), *named, "--out", str(place.tried / "rows.jsonl")])
    row = json.loads((place.tried / "rows.jsonl").read_text())
    assert row["error"] or all(0 <= each["probability"] <= 1 for each in row["top"]), row


def evaluate_split(place: Place, file: Path) -> None:
    """Evaluate the validation split."""
    named = ["--student.name", NAME] if file.name == place.plain.name else []
    settings = ["--data.root", str(place.data), "--run.device", "cpu", "--data.threads", "1", *named]
    evaluate.main([*settings, "--student.checkpoint", str(file), "--run.json", str(place.tried / "report.json")])
    assert 0 <= json.loads((place.tried / "report.json").read_text())["top1"] <= 100


def average_alone(place: Place, file: Path) -> None:
    """Average a single file."""
    average.main(["uniform", str(place.tried / "out.pt"), str(file)])
    _print_result(torch.load(place.tried / "out.pt", weights_only=True)["state_dict"])


def export_again(place: Place, file: Path) -> None:
    """Export it."""
    named = ["--name", NAME] if file.name == place.plain.name else []
    export.main([str(file), str(place.tried / "out"), *named])
    _print_result(load_file(place.tried / "out" / "model.safetensors"))


def compare(_place: Place, file: Path) -> None:
    """Take part in a comparison."""
    with exit_on_user_error():
        candidates.choose([str(file)], [])


def start_student(_place: Place, file: Path) -> None:
    """Start a student from it."""
    folder = {"name": f"local-dir:{file}", "pretrained": True}
    with exit_on_user_error():
        config = StudentConfig(**folder) if file.is_dir() else StudentConfig(NAME, file)
        _print_result(build_student(config, 10, SIZE, [str(digit) for digit in range(10)]).state_dict())


def have_teacher(_place: Place, file: Path) -> None:
    """Learn from it."""
    with exit_on_user_error():
        config = TeacherConfig(f"local-dir:{file}") if file.is_dir() else TeacherConfig(NAME, file)
        _print_result(build_teacher(config, 10, SIZE, names=[str(digit) for digit in range(10)]).model.state_dict())


def _print_result(values: dict) -> None:
    values = {name: value for name, value in to_host(values).items() if not name.startswith(_CLASSIFIER)}
    values = {name: value for name, value in values.items() if not name.endswith(_COUNT)}
    print(f"result {digest_of(values)}")


_EVERYWHERE = (predict_image, start_student, evaluate_split, have_teacher, export_again)
COMMANDS: dict[str, tuple[Command, ...]] = {
    "checkpoint": (
        *(each for command in _EVERYWHERE for each in (resume, command)),  # a run is what it matters to most
        *(resume, average_alone, compare),
    ),
    "best.pt": (*_EVERYWHERE, average_alone, compare),
    "config.json": (*_EVERYWHERE, compare),
    "exported weights": _EVERYWHERE,
    "plain weights": _EVERYWHERE,
}


# --- attempts ---


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Change one file after the other in `folder`, which is empty."""
    place = Place(folder)
    if complaint := (made := isolated(place.prepare, seconds=300, mib=8192)).complaint() or made.code:
        raise UserError(f"the files to change cannot be made: {complaint}: {made.text[-500:]}")
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        name = [*COMMANDS][number % len(COMMANDS)]
        attempt = number // len(COMMANDS)
        command = COMMANDS[name][attempt % len(COMMANDS[name])]
        fell, kind = _attempt(place, name, command, attempt, chance)
        yield Attempt(f"{name}: {kind}", fell and f"{words(command)} (seed {seed}, number {number}): {fell}")


def _attempt(place: Place, name: str, command: Command, attempt: int, chance: random.Random) -> tuple[str, str]:
    """Change a file and call a command. Returns how it broke the promise, and what was done."""
    kind, ended = _tried(place, name, command, lambda file: change_file(name, file, attempt, chance))
    fell = ended.complaint()
    if "ran" in ended.text.splitlines():
        fell = "what the file names was run"
    # a byte of a file without a digest may be one of a weight
    exact = kind != words(byte_changed) or name in ("checkpoint", "best.pt")
    if not fell and not ended.code and exact and _result(ended) != place.expected(name, command):
        fell = "it ended well, with other weights"
    return fell and f"{fell} [{ended.text[-300:]}]", kind


def _tried(place: Place, name: str, command: Command, change: Callable[[Path], str]) -> tuple[str, Ended]:
    """Call a command with a changed copy of a file, in a folder of its own. Returns what `change` does, and the end."""
    shutil.rmtree(place.tried, ignore_errors=True)
    place.tried.mkdir()
    source = place.files[name]
    if command is resume:
        shutil.copytree(place.run, place.tried, dirs_exist_ok=True)
        file = place.tried / "checkpoints" / source.name
    elif source.is_dir():
        file = shutil.copytree(source, place.tried / source.name)
    else:
        file = Path(shutil.copy(source, place.tried / source.name))
    kind = change(file)
    return kind, isolated(lambda: command(place, file), seconds=30)


def _result(ended: Ended) -> str:
    """The result that a command prints."""
    return next((line for line in ended.text.splitlines() if line.startswith("result ")), "")
