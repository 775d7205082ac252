"""What the models see of a batch: the mixed images, each model under its own normalisation and in its own size."""

from typing import NamedTuple

import torch

from pipelines.batch import Batch
from trainer.models.normalize import Normalize
from trainer.models.teacher import Teachers
from trainer.update.mixing import mixed_inputs


class ModelInputs(NamedTuple):
    """The normalised images of a batch.

    Attributes:
      student: [B, 3, S, S] in channels-last memory.
      teachers: for each teacher [B, 3, its size, its size], as trainer.models.teacher.Teachers takes them; [] without.
    """

    student: torch.Tensor
    teachers: list[torch.Tensor]


def model_inputs(normalize: Normalize, teachers: Teachers | None, batch: Batch) -> ModelInputs:
    """Mix the raw pixels once, and normalise them for each model.

    Args:
      normalize: the student's own.
      teachers: None without a teacher.
    """
    if teachers is None:
        return ModelInputs(mixed_inputs(batch, [normalize])[0], [])
    members = [(teacher, teacher.image_size in (0, batch.images.shape[1])) for teacher in teachers.members]
    wanted = [teacher.normalize for teacher, has_size in members if has_size]
    if len(wanted) < len(members):
        wanted.append(teachers.raw)  # Integers up to 255, which every type holds exactly; last, for all other sizes.
    student, *seen = mixed_inputs(batch, [normalize, *wanted])
    own = iter(seen)
    inputs = [next(own) if has_size else teacher.inputs(seen[-1].permute(0, 2, 3, 1)) for teacher, has_size in members]
    return ModelInputs(student, inputs)
