"""What the models see of a batch: the mixed images, each model under its own normalisation and in its own size."""

from typing import NamedTuple

import torch

from pipelines.batch import Batch
from trainer.models.normalize import Normalize
from trainer.models.teacher import Teacher, Teachers
from trainer.update.mixing import mixed_inputs


class ModelInputs(NamedTuple):
    """The normalised images of a batch.

    Attributes:
      student: [B, 3, S, S] in channels-last memory.
      teachers: for each teacher [B, 3, its size, its size], as trainer.models.teacher.Teachers takes them; [] without.
    """

    student: torch.Tensor
    teachers: list[torch.Tensor]


class Inputs:
    """Makes ModelInputs of a Batch: `inputs(batch)`.

    Args:
      normalize: the student's own.
      teachers: None without a teacher.
    """

    def __init__(self, normalize: Normalize, teachers: Teachers | None):
        self._normalize = normalize
        self._teachers = teachers

    def __call__(self, batch: Batch) -> ModelInputs:
        """Mix the raw pixels once, and normalise them for each model."""
        if self._teachers is None:
            return ModelInputs(mixed_inputs(batch, [self._normalize])[0], [])
        members = [teacher for teacher in self._teachers.members if isinstance(teacher, Teacher)]
        same_size = [teacher for teacher in members if teacher.image_size in (0, batch.images.shape[1])]
        wanted = [self._normalize, *(teacher.normalize for teacher in same_size)]
        if len(same_size) == len(members):
            student, *teachers = mixed_inputs(batch, wanted)
            return ModelInputs(student, teachers)
        student, *normalised, raw = mixed_inputs(batch, [*wanted, self._teachers.raw])
        pixels = raw.permute(0, 2, 3, 1)  # These are integers up to 255, which every type holds exactly.
        in_order = iter(normalised)
        return ModelInputs(
            student, [next(in_order) if teacher in same_size else teacher.inputs(pixels) for teacher in members]
        )
