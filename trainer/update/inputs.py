"""What the models see of a batch: the mixed images, each model under its own normalisation and in its own size."""

from typing import NamedTuple

import torch

from pipelines.batch import Batch
from trainer.models.normalize import Normalize
from trainer.models.teacher import RecordedTeacher, Teacher, Teachers
from trainer.update.mixing import mixed_inputs


class ModelInputs(NamedTuple):
    """The normalised images of a batch.

    Attributes:
      student: [B, 3, S, S] in channels-last memory.
      teachers: for each teacher [B, 3, its size, its size], or uint8 [B, row_bytes] where it was recorded, as
        trainer.models.teacher.Teachers takes them; [] without.
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
        return ModelInputs(student_input(normalize, batch), [])
    student, *seen = mixed_inputs(batch, [normalize, *_normalizations(teachers, batch)])
    return ModelInputs(student, _of_members(teachers, batch, seen))


def student_input(normalize: Normalize, batch: Batch) -> torch.Tensor:
    """What the student sees of a batch where no teacher is asked, as ModelInputs.student and with the same bits."""
    return mixed_inputs(batch, [normalize])[0]


def teacher_inputs(teachers: Teachers, batch: Batch) -> list[torch.Tensor]:
    """What the teachers see of a batch where no student is there, as ModelInputs.teachers and with the same bits."""
    return _of_members(teachers, batch, mixed_inputs(batch, _normalizations(teachers, batch)))


def _normalizations(teachers: Teachers, batch: Batch) -> list[Normalize]:
    """Those of the teachers that see images of the batch's size; for all others `raw`, once and last.

    Raw pixels are integers up to 255, which every type holds exactly.
    """
    wanted = [teacher.normalize for teacher in teachers.live if _has_size(teacher, batch)]
    return wanted if len(wanted) == len(teachers.live) else [*wanted, teachers.raw]


def _of_members(teachers: Teachers, batch: Batch, seen: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each teacher's images, in its own size, from the images under `_normalizations`; a recorded one's targets."""
    assert len(batch.targets) == len(teachers.recorded), "a batch without its targets: take batches from run.feed()"
    own, targets = iter(seen), iter(batch.targets)

    def inputs(teacher: Teacher | RecordedTeacher) -> torch.Tensor:
        if isinstance(teacher, RecordedTeacher):
            return next(targets)
        return next(own) if _has_size(teacher, batch) else teacher.inputs(seen[-1].permute(0, 2, 3, 1))

    return list(map(inputs, teachers.members))


def _has_size(teacher: Teacher, batch: Batch) -> bool:
    return teacher.image_size in (0, batch.images.shape[1])
