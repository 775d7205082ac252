"""Checkpoints, exported folders and files of weights in which something is not as it should be, given to every command.

A run of two steps is made, its best weights are exported, and saved as timm saves them. Then one of these files is
changed, and a command is called that reads it.
"""

import collections
import copy
import io
import itertools
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from chaos.attempts import Attempt, Ended, isolated
from pipelines.errors import UserError, exit_on_user_error
from tools import average, export, predict
from tools.comparing import contenders
from tools.sharding.job import BuildOptions, build
from trainer import evaluate
from trainer import run as trainer
from trainer.checkpoint import digest_of, to_host
from trainer.config import StudentConfig, TeacherConfig
from trainer.models import build_student
from trainer.teachers import build_teacher

PROMISE = (
    "Checkpoints, best.pt, exported folders and plain files of weights in which a field is absent, of another type, of "
    "another shape, not finite or huge, which are cut off or changed, or made to exhaust the memory, end every command "
    "that reads them in one line, or do no harm: a run that goes on ends bit-equal, and a model has the weights of the "
    "unchanged file."
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
        self.data, self.run, self.peace = folder / "dataset", folder / "run", folder / "undisturbed"
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
        """What a command comes to with an unchanged file."""
        if (name, command) not in self._expected:
            self._expected[name, command] = _result(_tried(self, name, command, lambda _: "")[1])
        return self._expected[name, command]

    def prepare(self) -> None:
        """Make all of it."""
        images = self.data.with_name("images")
        _write_images(images, {"train": 60, "val": 20})
        with mock.patch("tools.sharding.job.run_jobs", _run_here):
            build(images, self.data, BuildOptions(samples_per_shard=100))
        shutil.copy(next((images / "val").rglob("*.png")), self.image)
        self.train(self.run, STEPS - 1)
        shutil.copytree(self.run, self.peace)
        self.train(self.peace, STEPS)
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


def _run_here(
    function: Callable, jobs: Iterable, _workers: int, *, start: Callable[[int], None], **_more
) -> Iterator[tuple[int, object]]:
    """As tools.sharding.workers.run_jobs, but in this process: a worker would import everything anew."""
    start(0)
    for number, job in enumerate(jobs):
        yield number, function(*job)


# --- commands: each prints what it came to, which is compared with what it comes to with the unchanged file ---


def resume(place: Place, _file: Path) -> None:
    """Go on with the run whose newest checkpoint was changed."""
    place.train(place.tried, STEPS)
    content = torch.load(place.tried / "checkpoints" / f"step-{STEPS:08d}.pt", weights_only=True)
    _came_to({part: content[part] for part in ("step", "student", "ema", "optimizer")})


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
    _came_to(torch.load(place.tried / "out.pt", weights_only=True)["state_dict"])


def export_again(place: Place, file: Path) -> None:
    """Export it."""
    named = ["--name", NAME] if file.name == place.plain.name else []
    export.main([str(file), str(place.tried / "out"), *named])
    _came_to(load_file(place.tried / "out" / "model.safetensors"))


def compare(_place: Place, file: Path) -> None:
    """Take part in a comparison."""
    with exit_on_user_error():
        contenders.choose([str(file)], [])


def start_student(_place: Place, file: Path) -> None:
    """Start a student from it."""
    folder = {"name": f"local-dir:{file}", "pretrained": True}
    with exit_on_user_error():
        config = StudentConfig(**folder) if file.is_dir() else StudentConfig(NAME, file)
        _came_to(build_student(config, 10, SIZE, [str(digit) for digit in range(10)]).state_dict())


def have_teacher(_place: Place, file: Path) -> None:
    """Learn from it."""
    with exit_on_user_error():
        config = TeacherConfig(f"local-dir:{file}") if file.is_dir() else TeacherConfig(NAME, file)
        _came_to(build_teacher(config, 10, SIZE, names=[str(digit) for digit in range(10)]).model.state_dict())


def _came_to(values: dict) -> None:
    values = {name: value for name, value in to_host(values).items() if not name.startswith(_CLASSIFIER)}
    values = {name: value for name, value in values.items() if not name.endswith(_COUNT)}
    print(f"came to {digest_of(values)}")


_EVERYWHERE = (predict_image, start_student, evaluate_split, have_teacher, export_again)
COMMANDS: dict[str, tuple[Command, ...]] = {
    "checkpoint": (resume, *_EVERYWHERE, average_alone, resume, compare),
    "best.pt": (*_EVERYWHERE, average_alone, compare),
    "config.json": (*_EVERYWHERE, compare),
    "exported weights": _EVERYWHERE,
    "plain weights": _EVERYWHERE,
}


# --- what is changed ---


def _place_in(content: object, chance: random.Random) -> tuple[object, object]:
    """Some dictionary or list in a file, and a key or an index of it."""
    inner = content
    while True:
        key = chance.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
        value = inner[key]
        if not isinstance(value, (dict, list)) or not value or chance.random() < 0.3:
            return inner, key
        inner = value


def absent(content: object, chance: random.Random) -> None:
    """A field that is absent."""
    inner, key = _place_in(content, chance)
    del inner[key]


def of_another_type(content: object, chance: random.Random) -> None:
    """A field of another type."""
    inner, key = _place_in(content, chance)
    others = [True, "text", -1, 2.5, [], {}, [[1]], {"a": 1}, None, "", 0]
    tensors = [] if _is_json(content) else [torch.zeros(2, 2), {1: 2}, (1, 2), torch.ones(3).int()]
    inner[key] = chance.choice([each for each in [*others, *tensors] if type(each) is not type(inner[key])])


def of_another_shape(content: object, chance: random.Random) -> None:
    """A tensor or a list of another shape."""

    def fits(value: object) -> bool:
        return torch.is_tensor(value) or (isinstance(value, list) and len(value) > 0)

    inner, key = _some(content, chance, fits)
    value = inner[key]
    if isinstance(value, list):
        inner[key] = chance.choice([value[:-1], [*value, value[0]], [value]])
    else:
        flat = value.reshape(-1)
        inner[key] = chance.choice([flat[:-1].clone(), value[None].clone(), torch.cat([flat, flat]), value[..., None]])


def not_finite(content: object, chance: random.Random) -> None:
    """A number, or one value of a tensor, that is not finite."""

    def fits(value: object) -> bool:
        return value.is_floating_point() if torch.is_tensor(value) else isinstance(value, (int, float))

    inner, key = _some(content, chance, fits)
    bad = chance.choice([float("nan"), float("inf"), float("-inf")])
    if torch.is_tensor(inner[key]) and inner[key].numel():
        flat = inner[key].flatten().clone()
        flat[chance.randrange(len(flat))] = bad
        inner[key] = flat.reshape(inner[key].shape)
    else:
        inner[key] = bad


def huge(content: object, chance: random.Random) -> None:
    """A huge number, text or list."""

    def fits(value: object) -> bool:
        return not torch.is_tensor(value) and value is not None

    inner, key = _some(content, chance, fits)
    numbers = [10**7, 10**30, -(10**9), 1e308, 10**400]
    inner[key] = chance.choice([*numbers, "x" * 10**6, [0] * 10**5, *numbers] if fits(inner[key]) else numbers)


def _some(content: object, chance: random.Random, fits: Callable[[object], bool]) -> tuple[object, object]:
    """A place in a file whose value fits, if one is found by trying."""
    for _ in range(200):
        inner, key = _place_in(content, chance)
        if fits(inner[key]):
            break
    return inner, key


def _is_json(content: object) -> bool:
    return "architecture" in content


Change = Callable[[object, random.Random], None]
CHANGES: tuple[Change, ...] = (absent, of_another_type, of_another_shape, not_finite, huge)


class _Asks:
    """Is pickled as a call."""

    def __init__(self, function: Callable, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def _doubled(times: int) -> list:
    values = [1.0]
    for _ in range(times):
        values = [values, values]
    return values


def _endless() -> list:
    values = []
    values.append(values)
    return values


# Values that no file should hold, in place of a tensor or beside the weights.
HARMFUL: dict[str, Callable[[], object]] = {
    "one value that is 10**10": lambda: torch.zeros(1).expand(10**10),
    "lists that double 60 times": lambda: _doubled(60),
    "a list that holds itself": _endless,
    "a call that asks for 10**11 bytes": lambda: _Asks(bytearray, 10**11),
    "a number of 2,000 bits": lambda: 1 << 2_000,
    "a sparse tensor": lambda: torch.ones(3).to_sparse(),
    "a tensor without values": lambda: torch.empty(10**12, device="meta"),
    "a call that prints": lambda: _Asks(print, "ran"),
}


def harmful(content: dict, chance: random.Random) -> str:
    """Put one of HARMFUL into a file; returns which."""
    what = chance.choice([*HARMFUL])
    if chance.random() < 0.5:
        content["more"] = HARMFUL[what]()
    else:
        inner, key = _some(content, chance, torch.is_tensor)
        inner[key] = HARMFUL[what]()
    return what


def cut_off(file: Path, chance: random.Random) -> None:
    """A file that is cut off."""
    os.truncate(file, chance.randrange(file.stat().st_size))


def byte_changed(file: Path, chance: random.Random) -> None:
    """A file with bytes that were changed, near its ends or somewhere."""
    content = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 4])):
        place = chance.choice([chance.randrange(len(content)), chance.randrange(500), -chance.randrange(1, 500)])
        content[place] ^= chance.randrange(1, 256)
    file.write_bytes(content)


def packed(file: Path, _chance: random.Random) -> None:
    """An archive whose records are compressed, and larger by far than they were."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in records.items():
            archive.writestr(name, content + bytes(1 << 22) if "/data/" in name else content)


def claiming(file: Path, _chance: random.Random) -> None:
    """A tensor that is said to have more values than its record holds."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, _claim(10**9) if name.endswith("data.pkl") else content)


class _Claim(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", len(value)) if isinstance(value, range) else None


def _claim(count: int) -> bytes:
    rebuilt = (range(count), 0, (count,), (1,), False, collections.OrderedDict())
    pickled = io.BytesIO()
    claimed = _Asks(torch._utils._rebuild_tensor_v2, *rebuilt)
    _Claim(pickled, protocol=2).dump({"fc.bias": claimed})
    return pickled.getvalue()


def deep(file: Path, _chance: random.Random) -> None:
    """Lists in lists, 5,000 of them."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            nested = b"\x80\x02" + b"]" * 5_000 + b"a" * 4_999 + b"."
            archive.writestr(name, nested if name.endswith("data.pkl") else content)


def another_file(file: Path, chance: random.Random) -> None:
    """Another file in its place: empty, text, a tar, a folder."""
    file.unlink()
    what = chance.choice(["empty", "text", "tar", "folder"])
    if what == "folder":
        file.mkdir()
    elif what == "tar":
        with tarfile.open(file, "w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
    else:
        file.write_bytes(b"" if what == "empty" else b"no weights\n" * 100)


# The last three are about archives of torch.save.
SPOILS = (cut_off, byte_changed, another_file, packed, claiming, deep)


# --- attempts ---


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Change one file after the other in `folder`, which is empty."""
    place = Place(folder)
    if complaint := (made := isolated(place.prepare, seconds=300, mib=8192)).complaint() or made.code:
        raise UserError(f"the files to change cannot be made: {complaint}: {made.text[-500:]}")
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        name = [*COMMANDS][number % len(COMMANDS)]
        turn = number // len(COMMANDS)
        command = COMMANDS[name][turn % len(COMMANDS[name])]
        fell, kind = _attempt(place, name, command, turn, chance)
        yield Attempt(f"{name}: {kind}", fell and f"{_words(command)} (seed {seed}, number {number}): {fell}")


def _attempt(place: Place, name: str, command: Command, turn: int, chance: random.Random) -> tuple[str, str]:
    """Change a file and call a command. Returns how it broke the promise, and what was done."""
    kind, ended = _tried(place, name, command, lambda file: _changed(name, file, turn, chance))
    fell = ended.complaint()
    if "ran" in ended.text.splitlines():
        fell = "what the file names was run"
    # a byte of a file without a digest may be one of a weight
    exact = kind != _words(byte_changed) or name in ("checkpoint", "best.pt")
    if not fell and not ended.code and exact and _result(ended) != place.expected(name, command):
        fell = "it ended well, with other weights"
    return fell and f"{fell} [{ended.text[-300:]}]", kind


def _words(function: Callable) -> str:
    return function.__doc__.rstrip(".")


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
    """What a command says that it came to."""
    return next((line for line in ended.text.splitlines() if line.startswith("came to ")), "")


def _changed(name: str, file: Path, turn: int, chance: random.Random) -> str:
    """Change a file. Returns what was done."""
    if name == "config.json":
        change = CHANGES[turn % len(CHANGES)]
        said = json.loads((file / "config.json").read_text())
        change(said, chance)
        (file / "config.json").write_text(json.dumps(said))
        return _words(change)
    file = file / "model.safetensors" if file.is_dir() else file
    is_archive = file.suffix != ".safetensors"
    spoils = SPOILS if is_archive else SPOILS[:3]
    which = turn % (len(CHANGES) + len(spoils) + is_archive)
    if which >= len(CHANGES) + is_archive:
        spoil = spoils[which - len(CHANGES) - is_archive]
        spoil(file, chance)
        return _words(spoil)
    content = load_file(file) if not is_archive else torch.load(file, weights_only=True)
    digest = content.pop("digest", None)
    content = copy.deepcopy(content)
    if which == len(CHANGES):
        kind = f"Holds {harmful(content, chance)}"
    else:
        CHANGES[which](content, chance)
        kind = _words(CHANGES[which])
    _save(content, file, chance, has_digest=digest is not None and which < len(CHANGES) and which != 0)
    return kind


def _save(content: dict, file: Path, chance: random.Random, *, has_digest: bool) -> None:
    if file.suffix == ".safetensors":
        tensors = {name: value.contiguous() for name, value in content.items() if torch.is_tensor(value)}
        save_file(tensors, file)
        return
    if has_digest and chance.random() < 0.5:
        content["digest"] = digest_of(content)
    torch.save(content, file, _use_new_zipfile_serialization=chance.random() < 0.8)
