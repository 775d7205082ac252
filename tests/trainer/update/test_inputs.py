"""Each model sees the mixed images in its own size, under its own normalisation."""

import timm
import torch

from support.mixed_batches import mixed_batch
from trainer.models.normalize import Normalize
from trainer.models.teacher import Teacher, Teachers
from trainer.update import inputs
from trainer.update.mixing import mix_pixels


def test_raw_pixels_are_made_once_for_all_teachers_of_other_sizes(monkeypatch):
    made, mixed_inputs = [], inputs.mixed_inputs
    monkeypatch.setattr(
        inputs, "mixed_inputs", lambda batch, models: made.extend(models) or mixed_inputs(batch, models)
    )
    members = [Teacher(timm.create_model("test_resnet"), image_size=size) for size in (16, 0, 24, 32, 24)]
    teachers, student, batch = Teachers(members, 1.0), Normalize((0.5,) * 3, (0.5,) * 3), mixed_batch(32, 8)

    found = inputs.model_inputs(student, teachers, batch)
    pixels = mix_pixels(batch)
    assert torch.equal(found.student, student(pixels))
    for teacher, seen in zip(members, found.teachers, strict=True):
        assert torch.equal(seen, teacher.inputs(pixels))
    assert made == [student, members[1].normalize, members[3].normalize, teachers.raw]

    alone = inputs.teacher_inputs(teachers, batch)  # No student is there when a teacher is recorded.
    assert all(torch.equal(*pair) for pair in zip(alone, found.teachers, strict=True))
    assert made[4:] == made[1:4]
