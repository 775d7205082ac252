"""What the student learns from: a frozen teacher or the mean of several, in the dataset's order of classes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from pipelines.common.errors import UserError
from trainer.config.sections import Config, OtherTeacher, TeacherConfig
from trainer.models.checks import check_images
from trainer.models.class_names import check_order_stated, class_order
from trainer.models.factory import starting_weights
from trainer.models.fold_batch_norm import fold_batch_norms
from trainer.models.normalize import Normalize
from trainer.models.preprocessing import preprocessing


class Teacher(nn.Module):
    """A frozen model behind what is its own: image size, normalisation, order of classes.

    Args:
      model: in evaluation mode.
      image_size: side of the image it sees, pixels; 0 takes every image unchanged.
      order: for each class of the dataset, which output of the model it is; None where they are the same.
      note: a sentence about it for the log; "" is none.
    """

    order: torch.Tensor | None

    def __init__(self, model: nn.Module, image_size: int = 0, order: list[int] | None = None, note: str = ""):
        super().__init__()
        expects = preprocessing(model)
        self.model = model
        self.normalize = Normalize(expects.mean, expects.std)
        self.image_size = image_size
        self.note = note
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)

    def inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the model sees of mixed pixels, whole numbers [B, S, S, 3]: [B, 3, image_size, image_size]."""
        if self.image_size:
            pixels = resize_pixels(pixels, self.image_size)
        return self.normalize(pixels)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs -> logits [B, C] over the dataset's classes."""
        logits = self.model(inputs)
        return logits if self.order is None else logits.index_select(1, self.order)


class RecordedTeacher(nn.Module):
    """A teacher whose outputs were recorded: it decodes them.

    Args:
      decode: uint8 [B, row_bytes] -> float32 logits [B, C] over the dataset's classes.
      row_bytes: bytes of an encoded row.
      note: a sentence about it for the log; "" is none.
    """

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor], row_bytes: int, note: str = ""):
        super().__init__()
        self._decode = decode
        self.row_bytes = row_bytes
        self.note = note

    def blank(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """Rows for a batch that is at no position of the plan: uint8 [num_rows, row_bytes]."""
        return torch.zeros(num_rows, self.row_bytes, dtype=torch.uint8, device=device)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Encoded rows -> logits [B, C]."""
        return self._decode(rows)


class Teachers(nn.Module):
    """One or several teachers as one.

    Args:
      members: at least one.
      temperature: the probabilities are averaged at this temperature.
    """

    def __init__(self, members: Sequence[Teacher | RecordedTeacher], temperature: float):
        super().__init__()
        self._members = nn.ModuleList(members)
        self.raw = Normalize((0.0,) * 3, (1 / 255,) * 3)  # Gives unchanged pixels, for members that see another size.
        self._temperature = temperature
        self._precision = torch.float32

    @property
    def members(self) -> list[Teacher | RecordedTeacher]:
        """The teachers one by one."""
        return [member for member in self._members if isinstance(member, (Teacher, RecordedTeacher))]

    @property
    def live(self) -> list[Teacher]:
        """Those that see the images."""
        return [member for member in self.members if isinstance(member, Teacher)]

    @property
    def recorded(self) -> list[RecordedTeacher]:
        """Those whose outputs come with the batches."""
        return [member for member in self.members if isinstance(member, RecordedTeacher)]

    @property
    def notes(self) -> list[str]:
        """Sentences about them for the log."""
        return [teacher.note for teacher in self.members if teacher.note]

    def to_precision(self, precision: torch.dtype) -> "Teachers":
        """Compute in this type.

        bfloat16 is used throughout, because frozen weights need no float32 beside it; float16 by autocast, which keeps
        in float32 what might be too large for it.
        """
        self._precision = precision
        if precision == torch.bfloat16:
            for teacher in self.live:
                teacher.model.to(precision)
        for normalize in (self.raw, *(teacher.normalize for teacher in self.live)):
            normalize.dtype = precision
        return self

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Each teacher's images, or its encoded rows -> logits [B, C], as `mean_logits`."""
        with torch.autocast(inputs[0].device.type, torch.float16, enabled=self._precision == torch.float16):
            logits = [teacher(each) for teacher, each in zip(self.members, inputs, strict=True)]
        return mean_logits(logits, self._temperature)


def mean_logits(logits: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """Logits whose softmax at the temperature is the mean of the given ones' softmax at the temperature.

    Args:
      logits: [B, C] each; a single one is returned unchanged.
    Returns:
      [B, C]; T x log(mean of the probabilities), in float32, computed without leaving the logarithm.
    """
    if len(logits) == 1:
        return logits[0]
    log_probabilities = torch.stack([nn.functional.log_softmax(each.float() / temperature, dim=1) for each in logits])
    return temperature * (log_probabilities.logsumexp(0) - math.log(len(logits)))


def resize_pixels(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Square images in another size; untouched where they have it.

    Raw pixels, bicubic and antialiased, as Pillow does it: columns, then rows, each rounded (half up) and clipped to
    what a byte holds. So a model sees what it saw in training, where images were resized as bytes. (Normalised pixels
    would keep the filter's overshoot beyond black and white.) In float32, since torch resizes bytes on the CPU alone.

    Args:
      pixels: whole numbers from 0 to 255 in any type, [B, S, S, 3].
    Returns:
      [B, size, size, 3], whole numbers from 0 to 255.
    """
    if pixels.shape[1] == size:
        return pixels
    images = pixels.permute(0, 3, 1, 2).float()
    for shape in ((pixels.shape[1], size), (size, size)):
        images = nn.functional.interpolate(images, size=shape, mode="bicubic", antialias=True, align_corners=False)
        images = (images + 0.5).floor().clamp(0, 255)
    return images.permute(0, 2, 3, 1).contiguous()


def agreement(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    partner_labels: torch.Tensor,
    lam: torch.Tensor,
) -> torch.Tensor:
    """Count how often the best classes are the same.

    Args:
      student, teacher: logits [B, C].
      labels, partner_labels: int64 [B]; lam: float32 [B], the weight of `labels` in the mixed image.
    Returns:
      float32 [2], fractions of the images: where the teacher's best class is the label with the larger weight (the
      image's own, if both have a half), and where it is the student's best class.
    """
    best = teacher.argmax(1)
    label = torch.where(lam >= 0.5, labels, partner_labels)
    return torch.stack([best == label, best == student.argmax(1)]).float().mean(1)


class TeacherCheck:
    """Counts the images whose label the teachers find, and judges them once, by the first updates with enough images.

    Enough are ten images of each class on average, and at least 200.

    Args:
      is_recorded: as for `teacher_warning`.
    """

    def __init__(self, num_classes: int, *, is_recorded: bool = False):
        self.num_images, self._num_right = 0, 0.0
        self._num_classes, self._is_recorded = num_classes, is_recorded

    @property
    def top1(self) -> float:
        """The fraction of the images so far where the teachers' best class is the label with the larger weight."""
        return self._num_right / max(self.num_images, 1)

    def add(self, fractions: Iterable[float], images_per_update: int) -> str:
        """Count updates, each with the fraction of its images whose label the teachers find.

        Returns:
          the warning, if it is these updates that make the images enough; else "".
        """
        warning, needed = "", max(200, 10 * self._num_classes)
        for fraction in fractions:
            self.num_images += images_per_update
            self._num_right += fraction * images_per_update
            if self.num_images - images_per_update < needed <= self.num_images:
                warning = teacher_warning(self.top1, self._num_classes, is_recorded=self._is_recorded)
        return warning


def teacher_warning(found: float, num_classes: int, *, is_recorded: bool = False) -> str:
    """The warning about teachers that know the labels hardly better than chance; "" for others.

    The student would learn nonsense from them without any error. The limit is twice chance, but with few classes no
    more than a quarter of the way from chance to all.

    Args:
      found: the fraction of the mixed images where the teachers' best class is the label with the larger weight.
      is_recorded: whether a teacher's outputs come from a store, which its settings cannot change any more.
    """
    chance = 1 / num_classes
    if found >= chance + min(chance, (1 - chance) / 4):
        return ""
    advice = "Check teacher.checkpoint, teacher.classes, teacher.kwargs and teacher.image_size"
    if is_recorded:
        advice += " of the recording, and record another store with the right ones (tools/record_teacher.py)"
    return (
        f"warning: the teacher finds the label of {found:.2%} of the mixed images, chance is {chance:.2%}: it hardly "
        "knows these classes. It may be too little trained, or its outputs may be in another order. "
        f"{advice}"
    )


def build_teachers(
    config: Config,
    num_classes: int,
    names: list[str] | None,
    doubt: str = "",
    recorded: Mapping[str, RecordedTeacher] = MappingProxyType({}),
) -> Teachers | None:
    """All teachers of the configuration on the CPU, after `check_and_fold`.

    Args:
      recorded: the teachers that have a store, by their keys in TeacherConfig.members.
      num_classes, names: the dataset's classes; names in the order of the labels, None where it has no names.
      doubt: as trainer.models.class_names.order_doubt.
    Returns:
      None where the configuration names no teacher.
    Raises:
      UserError: as `build_teacher`; or a model that does not take a size, or gives no logits.
    """
    sizes, members = config.data.train_sizes, []
    for key, each in config.teacher.members:
        if key in recorded:
            members.append(recorded[key])
            continue
        teacher = build_teacher(each, num_classes, sizes[-1], names=names, doubt=doubt)
        check_and_fold(teacher, each, key, sizes)
        members.append(teacher)
    return Teachers(members, config.distill.temperature) if members else None


def check_and_fold(teacher: Teacher, config: OtherTeacher, key: str, sizes: Sequence[int]) -> None:
    """Check that a teacher takes images of all sizes, and fold its BatchNorms into convolutions, as the authors do.

    Args:
      key: what its settings are called in messages.
    """
    seen = [config.image_size] if config.image_size else sorted(set(sizes))
    advice = f"Change {key}.image_size, {key}.kwargs or {key}.name"
    for size in seen:
        check_images(teacher.model, str(config.name), size, advice)
    fold_batch_norms(teacher.model, torch.rand(2, 3, seen[0], seen[0], generator=torch.Generator().manual_seed(0)))


def build_teacher(
    config: TeacherConfig | OtherTeacher,
    num_classes: int,
    image_size: int,
    *,
    names: list[str] | None = None,
    doubt: str = "",
) -> Teacher:
    """One frozen teacher.

    Args:
      num_classes, names: the dataset's classes; names in the order of the labels, None where it has no names.
      doubt: as trainer.models.class_names.order_doubt.
      image_size: the student's, pixels.
    Raises:
      UserError: an unknown model, no weights, weights that do not fit, or classes that are not the dataset's.
    """
    assert config.name is not None
    start = starting_weights(config.name, config.checkpoint, config.classes)
    order, count, by, note = None, num_classes, "the dataset has", ""
    if start.classes is not None and names is not None:  # A synthetic dataset's classes have only numbers.
        count, by = len(start.classes), f"{start.namer} names"
        if start.classes != names:
            order = class_order(names, start.classes, start.namer)
            note = f"teacher '{config.name}': {len(order)} of its {count} classes are found by name ({start.namer})"
    if start.outputs not in (None, count):
        raise UserError(
            f"{start.source}: its weights have {start.outputs} classes, {by} {count}. Give weights of the same "
            "classes, or name every output in a file (option classes)"
        )
    if start.classes is None and names is not None:
        check_order_stated(doubt, start.source)
    model = start.build(count, config.image_size or image_size, config.kwargs).eval().requires_grad_(False)
    return Teacher(model, config.image_size, order, note)
