"""What the student learns from: a frozen teacher or the mean of several, in the dataset's order of classes."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.config.sections import Config, OtherTeacher, TeacherConfig
from trainer.config.setting_names import SettingError, Spelling, prefix_of, spelling_settings
from trainer.models.checks import check_logits, check_size
from trainer.models.class_names import check_order_stated, class_order, listed_outputs
from trainer.models.factory import (
    create_model,
    download,
    num_outputs,
    pretrained_outputs,
    starting_weights,
)
from trainer.models.files.model_folders import named_folder
from trainer.models.files.weights import Checkpoint
from trainer.models.fold_batch_norm import fold_batch_norms
from trainer.models.normalize import Normalize
from trainer.models.order_warning import order_warning
from trainer.models.preprocessing import preprocessing


class Teacher(nn.Module):
    """A frozen model behind what is its own: image size, normalisation, order of classes.

    Args:
      model: in evaluation mode.
      image_size: side of the image it sees, pixels; 0 takes every image unchanged.
      order: for each class of the dataset, which output of the model it is; None where they are the same.
      note: a sentence about it for the log; "" is none.
      num_outputs: how many logits the model gives.
      has_names: whether something names its outputs; without names they are taken to be in the dataset's order.
    """

    order: torch.Tensor | None

    def __init__(
        self,
        model: nn.Module,
        image_size: int = 0,
        order: list[int] | None = None,
        note: str = "",
        num_outputs: int = 0,
        has_names: bool = True,
    ):
        super().__init__()
        expects = preprocessing(model)
        self.model = model
        self.normalize = Normalize(expects.mean, expects.std)
        self.image_size = image_size
        self.note = note
        self.num_outputs = num_outputs
        self.has_names = has_names
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


class Teachers(nn.Module):
    """One or several teachers as one.

    Args:
      members: at least one.
      temperature: the probabilities are averaged at this temperature.
      unnamed: the settings that would name the outputs of those members whose outputs have no names.
    """

    def __init__(self, members: list[Teacher], temperature: float, unnamed: Sequence[str] = ()):
        super().__init__()
        self._members = nn.ModuleList(members)
        self.raw = Normalize((0.0,) * 3, (1 / 255,) * 3)  # Gives unchanged pixels, for members that see another size.
        self.unnamed = list(unnamed)
        self._temperature = temperature
        self._precision = torch.float32

    @property
    def members(self) -> list[Teacher]:
        """The teachers one by one."""
        return [member for member in self._members if isinstance(member, Teacher)]

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
            for teacher in self.members:
                teacher.model.to(precision)
        for normalize in (self.raw, *(teacher.normalize for teacher in self.members)):
            normalize.dtype = precision
        return self

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Each teacher's inputs -> logits [B, C], as `mean_logits`."""
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count how often the best classes are the same, and say which ones they are.

    Args:
      student, teacher: logits [B, C].
      labels, partner_labels: int64 [B]; lam: float32 [B], the weight of `labels` in the mixed image.
    Returns:
      float32 [2], fractions of the images: where the teacher's best class is the label with the larger weight (the
      image's own, if both have a half), and where it is the student's best class.
      int32 [2, B]: these labels, and the teacher's best classes.
    """
    best = teacher.argmax(1)
    label = torch.where(lam >= 0.5, labels, partner_labels)
    fractions = torch.stack([best == label, best == student.argmax(1)]).float().mean(1)
    return fractions, torch.stack([label, best]).int()


def teacher_warning(
    pairs: list[np.ndarray], num_classes: int, names: list[str] | None, unnamed: Sequence[str] = ()
) -> str:
    """The warning about teachers from which the student would learn nonsense without any error; "" for others.

    Args:
      pairs: each rank's int32 [2, N], for N mixed images: the label with the larger weight, the teachers' best class.
      names: as for trainer.models.order_warning.order_warning.
      unnamed: as Teachers.unnamed: the order of these teachers' outputs may be another one.
    """
    labels, best = np.concatenate(pairs, axis=1)
    option = " or ".join(unnamed) or "--teacher.classes"
    order = order_warning(labels, best, num_classes, names, "the teacher", option)
    return order or chance_warning(int((labels == best).sum()), len(labels), num_classes)


def chance_warning(hits: int, images: int, num_classes: int) -> str:
    """The warning about a teacher that knows the labels hardly better than chance; "" for others.

    The limit is twice chance, but with few classes no more than a quarter of the way from chance to all.

    Args:
      hits: how many of `images` mixed images had the label with the larger weight as the teacher's best class.
    """
    chance = 1 / num_classes
    if hits / images >= chance + min(chance, (1 - chance) / 4):
        return ""
    return (
        f"the teacher finds the label of {hits / images:.2%} of the mixed images, chance is {chance:.2%}: it hardly "
        "knows these classes. Check teacher.checkpoint, teacher.kwargs and teacher.image_size"
    )


def build_teachers(config: Config, num_classes: int, names: list[str] | None, doubt: str = "") -> Teachers | None:
    """All teachers of the configuration on the CPU, after checking that they take the images they will get.

    Their BatchNorms are folded into the convolutions, as the authors do.

    Args:
      num_classes, names: the dataset's classes; names in the order of the labels, None where it has no names.
      doubt: as trainer.models.class_names.order_doubt.
    Returns:
      None where the configuration names no teacher.
    Raises:
      UserError: as `build_teacher`; or a model that does not take a size.
    """
    sizes = config.data.train_sizes
    members, unnamed = [], []
    for key, each in config.teacher.members:
        with spelling_settings(prefix_of(key)):
            teacher = build_teacher(each, num_classes, sizes[-1], names=names, doubt=doubt)
        seen = [each.image_size] if each.image_size else sorted(set(sizes))
        _check_images(teacher, model_name(each), key, seen)
        fold_batch_norms(teacher.model, torch.rand(2, 3, seen[0], seen[0], generator=torch.Generator().manual_seed(0)))
        members.append(teacher)
        unnamed += [] if teacher.has_names else [f"{prefix_of(key)}classes"]
    return Teachers(members, config.distill.temperature, unnamed) if members else None


def _check_images(teacher: Teacher, name: str, key: str, sizes: list[int]) -> None:
    """Raise a UserError if a teacher does not take images of these sizes, or gives no logits for them."""
    advice = (
        f"Give it a size of its own with {key}.image_size, or use another model; some of timm's take any size with "
        f"dynamic_img_size true in {key}.kwargs"
    )
    for size in sizes:
        check_size(teacher.model, name, size, advice)
    check_logits(teacher.model, name, teacher.num_outputs, sizes[0], f"Change {key}.kwargs or {key}.name")


def model_name(config: TeacherConfig | OtherTeacher) -> str:
    """The name of a teacher's model, which a member of the configuration's teachers has."""
    assert config.name is not None
    return config.name


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
    given = model_name(config)
    name = named_folder(given) or given
    saved = starting_weights(name, config.checkpoint)
    outputs = match_outputs(config, saved, num_classes, names)
    if saved is None:
        found, owner = pretrained_outputs(given), f"teacher '{given}': timm's weights"
    else:
        found, owner = num_outputs(name, saved.weights), f"{saved.source}: its weights"
    if found not in (None, outputs.count):
        raise SettingError(f"{owner} have {found} classes, {outputs.expectation}", outputs.advice)
    if outputs.source is None and names is not None:
        check_order_stated(doubt, saved.source if saved else owner)
    size = config.image_size or image_size
    if saved is None:
        model = download(given, outputs.count, size, config.kwargs)
    else:
        model = create_model(name, outputs.count, size, config.kwargs, saved.weights, saved.source)
    model.eval().requires_grad_(False)
    has_names = outputs.source is not None
    return Teacher(model, config.image_size, outputs.order, outputs.note(given), outputs.count, has_names)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a teacher's outputs must be.

    Attributes:
      count: how many.
      order: for each class of the dataset, which output it is; None where they are the same.
      source: the file that names them; None where nothing does, and they are taken to be the dataset's classes.
    """

    count: int
    order: list[int] | None = None
    source: Path | str | None = None

    @property
    def expectation(self) -> str:
        """The end of the error about a teacher with another number of outputs."""
        return f"the dataset has {self.count}" if self.source is None else f"{self.source} names {self.count}"

    def advice(self, spelled: Spelling) -> str:
        """The advice about a teacher with another number of outputs."""
        if self.source is not None:
            return "Name every output, one on a line, in their order"
        return (
            f"Give weights trained on the same classes with {spelled('checkpoint')} FILE, or name all their classes "
            f"with {spelled('classes')} FILE"
        )

    def note(self, name: str) -> str:
        """A sentence about the order for the log; "" where it is the dataset's."""
        if self.order is None:
            return ""
        return f"teacher '{name}': {len(self.order)} of its {self.count} classes are found by name ({self.source})"


def match_outputs(
    config: TeacherConfig | OtherTeacher, saved: Checkpoint | None, num_classes: int, names: list[str] | None
) -> Outputs:
    """Match a teacher's outputs to the dataset's classes: by teacher.classes, or as its checkpoint names them.

    Raises:
      SettingError: a class of the dataset is not among the outputs, or twice.
    """
    own, file = (saved.classes, saved.source) if saved else (None, "")
    listed, source = listed_outputs(config.classes, own, file)
    if listed is None or names is None:  # A synthetic dataset's classes have only numbers.
        return Outputs(num_classes)
    order = class_order(names, listed, source)
    return Outputs(len(listed), None if listed == names else order, source)
