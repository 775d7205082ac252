"""STORE/store.json: what a store was recorded from. A run replays it only where a live teacher would say the same."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError, clipped
from pipelines.common.files import (
    instead_of_content,
    is_hidden,
    is_leftover,
    open_regular,
    parsed_json,
    write_once,
)
from pipelines.common.settings import misfit
from pipelines.plan.plan import BEFORE
from trainer.config.natures import settings_of_plan_field
from trainer.targets.codec import Codec, open_codec

FORMAT_VERSION = 2  # 1 lacked TeacherFacts.model.
HEADER_FILE = "store.json"
_LARGEST_HEADER = 1 << 20  # bytes; a header has about two thousand, and a larger file is none.
_LARGEST_GROUP = 1 << 30  # bytes of a mixing group, which is read at once
_MOST = 1 << 20  # classes and rows of a global batch: above any real ones
# The repeated epochs have the positions of the first ones, so the same store serves a plan with any number of them.
_NOT_STORED = ("augment.cycle_epochs",)
# These keys of `made_with` decide the pixels; messages call them so. All recorders of a store have the same values.
_PIXELS = {"pipeline": "data.pipeline", "pipelines": "this program's version of the pixels"}


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """What a teacher's logits depend on, besides the pixels.

    Attributes:
      name: its name in timm.
      kwargs: arguments of timm.create_model, plain values.
      image_size: side of the image it sees, pixels; 0 is the plan's size.
      weights: sha256 over its state dict.
      checkpoint: sha256 of the file that its weights come from; None for timm's own. A run that names a file must name
        this one, because it builds no teacher. Recorders compare the weights, which may lie in several files.
      order: sha256 over the order of its outputs in the dataset's classes; None where it is the dataset's.
      model: what else decides its outputs and is no weight: mean and std of its normalisation, and the architecture and
        arguments in the config.json of a model folder.
    """

    name: str
    kwargs: dict[str, Any]
    image_size: int
    weights: str
    checkpoint: str | None = None
    order: str | None = None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What a store was recorded from.

    Attributes:
      plan: TrainPlan.describe(), without what a store does not depend on.
      num_classes: length of a row of logits.
      codec: the codec's name; precision: fp32, fp16 or bf16, in which the teacher computed.
      made_with: plain values for information, such as the pipeline and versions, and no part of the identity. Two
        recorders may differ in all but those that decide the pixels.
      transcoded_from: the codecs that lose something from which the rows were transcoded, in their order; [] where they
        are what a recorder writes.
    Raises:
      UserError: an unknown codec, or the plan has no sizes of batches and groups that a store can have.
    """

    plan: dict[str, Any]
    num_classes: int
    teacher: TeacherFacts
    codec: str
    precision: str
    made_with: dict[str, Any]
    transcoded_from: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        object.__setattr__(self, "plan", _plan_as_stored(self.plan))
        object.__setattr__(self, "made_with", _as_stored(self.made_with))
        object.__setattr__(self, "teacher", TeacherFacts(**_as_stored(vars(self.teacher))))
        sizes = {name: self.plan.get(name) for name in ("global_batch", "augment.mix_group")}
        for name, size in {"num_classes": self.num_classes, **sizes}.items():
            if type(size) is not int or not 1 <= size <= _MOST:
                raise UserError(f"{name} is {clipped(size)}; a store needs a number from 1 to {_MOST}")
        group_bytes = self.mix_group * self.open_codec().row_bytes
        if self.global_batch % self.mix_group or group_bytes > _LARGEST_GROUP:
            raise UserError(
                f"augment.mix_group is {self.mix_group}; it must divide global_batch, {self.global_batch}, and its "
                f"{group_bytes} bytes of outputs must be at most {_LARGEST_GROUP}"
            )

    @property
    def global_batch(self) -> int:
        """Rows of a step."""
        return self.plan["global_batch"]

    @property
    def mix_group(self) -> int:
        """Rows that have one checksum: those that are mixed with each other."""
        return self.plan["augment.mix_group"]

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the rows beside the plan and the classes, by the names that messages have."""
        teacher = {f"teacher.{name}": value for name, value in vars(self.teacher).items() if name != "checkpoint"}
        codecs = " transcoded from ".join([self.codec, *reversed(self.transcoded_from)])
        return {**teacher, "codec": codecs, "precision": self.precision}

    @property
    def provenance(self) -> str:
        """How the rows were computed and stored, for people."""
        return f"{clipped(self.teacher.name)}, recorded in {clipped(self.precision)}, stored as {self.codec}"

    @functools.cached_property
    def identity(self) -> str:
        """Hash of all that decides the rows, in hex: sha256. Each piece names the identity of its store."""
        facts = dataclasses.asdict(self)
        del facts["made_with"], facts["teacher"]["checkpoint"]
        return _sha256({"format_version": FORMAT_VERSION, **facts})

    def made_otherwise(self, now: Mapping[str, Any]) -> str:
        """Name for a message the values of `made_with` that differ from those in `now`, and the effect; "" if none do.

        For example "was recorded with timm 0.9 instead of 1.0, so its outputs may differ in the last bits".
        """
        other = [name for name, value in now.items() if self.made_with.get(name, value) != value]
        if not other:
            return ""
        listed = "; ".join(f"{name} {clipped(self.made_with[name])} instead of {clipped(now[name])}" for name in other)
        changed = "pixels differ a little" if _PIXELS.keys() & other else "outputs may differ in the last bits"
        return f"was recorded with {listed}, so its {changed}"

    def transcoded_to(self, codec: str) -> "StoreHeader":
        """The header of its rows in another codec. What the present one has lost stays lost, so it is named."""
        lossy = self.transcoded_from if self.codec == "fp32" else [*self.transcoded_from, self.codec]
        return dataclasses.replace(self, codec=codec, transcoded_from=lossy)

    def how_to_add(self, steps: str) -> str:
        """The advice of a message where the store lacks steps, named as in "steps 64 to 127 again"."""
        if self.transcoded_from:
            return "transcode the store that this one was made from once more, which adds what is missing here"
        return f"record {steps} with tools/record_teacher.py"

    def open_codec(self) -> Codec:
        """The codec of its rows."""
        return open_codec(self.codec, self.num_classes)

    def content(self) -> bytes:
        """The bytes of store.json."""
        facts = {"format_version": FORMAT_VERSION, "identity": self.identity, **dataclasses.asdict(self)}
        return (json.dumps({**facts, "sha256": _sha256(facts)}, indent=1) + "\n").encode()


def read_header(store: Path) -> StoreHeader:
    """The header of a store.

    Raises:
      UserError: there is none, it is of another format version, or any byte of it has changed.
    """
    path = Path(store) / HEADER_FILE
    try:
        with open(open_regular(path), "rb") as file:
            content = file.read(_LARGEST_HEADER + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{store}: is no teacher store, because it has no {HEADER_FILE}. Name a store's folder, or record one with "
            "tools/record_teacher.py"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    parsed = parsed_json(content) if len(content) <= _LARGEST_HEADER else None
    version = parsed.get("format_version") if isinstance(parsed, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format version {clipped(version)}, and this program reads {FORMAT_VERSION}. Use the version "
            "of the program that recorded it, or record another store"
        )
    if header := _header_of(parsed, content):
        return header
    damaged = "damaged, or not written by this program. Restore it from a copy, or record another store"
    raise UserError(f"{path}: {instead_of_content(content[:1024]) or damaged}")


def check_store_folder(store: Path) -> None:
    """Raise a UserError if something else than a store lies there, such as a run, a dataset or a file."""
    if store.exists() and not store.is_dir():
        raise UserError(f"{store}: is no folder. Name a new one, or a store")
    # Another process may just be making the store: its header comes first, under a temporary name.
    names = sorted(each.name for each in store.iterdir()) if store.exists() else []
    others = [name for name in names if not (is_hidden(name) or is_leftover(name))]
    if others and not (store / HEADER_FILE).exists():
        raise UserError(
            f"{store}: holds {others[0]} and no {HEADER_FILE}, so it is no store. Name a new folder, or a store"
        )


def claim(store: Path, header: StoreHeader) -> StoreHeader:
    """Make a store, or check that the one that is there has the same plan, teacher, codec, precision and pixels.

    Of two processes that claim at once, the header of one becomes the store's, and both return that one.

    Raises:
      UserError: as `check_store_folder`, `check_same` and `read_header`.
    """
    store = Path(store)
    check_store_folder(store)
    if not (store / HEADER_FILE).exists():
        store.mkdir(parents=True, exist_ok=True)
        write_once(store / HEADER_FILE, [header.content()])
    stored = read_header(store)
    check_same(store, stored, header)
    return stored


def check_same(store: Path, stored: StoreHeader, wanted: StoreHeader) -> None:
    """Compare what a store was recorded from with what is wanted.

    Raises:
      UserError: it names the first field that differs, and both values.
    """
    check_plan(store, stored, wanted.plan, wanted.num_classes)
    for name, value in wanted.facts.items():
        _check(store, name, f"the wanted {name}", stored.facts[name], value)
    for name, called in _PIXELS.items():
        if name in stored.made_with and name in wanted.made_with:
            _check(store, name, called, stored.made_with[name], wanted.made_with[name])


def check_plan(store: Path, stored: StoreHeader, plan: dict[str, Any], num_classes: int) -> None:
    """Compare the plan, as TrainPlan.describe() has it, and the classes of a run with a store's, as `check_same`."""
    before, now = {**BEFORE, **stored.plan}, {**BEFORE, **_plan_as_stored(plan)}
    for name in {**now, **before}:
        _check(store, name, settings_of_plan_field(name), before.get(name), now.get(name))
    _check(store, "num_classes", "the number of the dataset's classes", stored.num_classes, num_classes)


def _check(store: Path, name: str, called: str, before: object, now: object) -> None:
    if before != now:
        raise UserError(
            f"{store}: was recorded with {name} {clipped(before, 150)}, and {called} is {clipped(now, 150)}. "
            "Use the same, or record another store with tools/record_teacher.py"
        )


def _header_of(parsed: object, content: bytes) -> StoreHeader | None:
    """The header that a file's JSON describes; None where its content is not exactly what this header would have."""
    if not isinstance(parsed, dict) or misfit(parsed, StoreHeader):
        return None
    fields = {name: value for name, value in parsed.items() if name not in ("format_version", "identity", "sha256")}
    # A UserError about its values is a ValueError. Lists in lists without end are a RecursionError.
    with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError, RecursionError):
        header = StoreHeader(**{**fields, "teacher": TeacherFacts(**fields["teacher"])})
        # The bytes are compared, and not only the hash, so no change of a space or of the hash itself can be missed.
        return header if header.content() == content else None
    return None


def _as_stored(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as JSON has them: tuples become lists."""
    return json.loads(json.dumps(dict(facts)))


def _plan_as_stored(plan: Mapping[str, Any]) -> dict[str, Any]:
    return _as_stored({name: value for name, value in plan.items() if name not in _NOT_STORED})


def _sha256(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
