"""Checks that a model can do what it is for, before a run begins."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from pipelines.common.errors import UserError, reason_of
from trainer.config.sections import Config


def check_student(student: nn.Module, config: Config) -> None:
    """Raise a UserError if a student cannot be trained and evaluated on its images, of every size.

    Some of timm's give features (encoders) or, asked for by their arguments, a second output in training.
    """
    sizes = config.data.train_sizes
    advice = (
        "Change data.image_size, data.eval_image_size or student.kwargs, or use another model; some of timm's take any "
        "size with dynamic_img_size true in student.kwargs"
    )
    student.eval()
    for size in sorted({*sizes, config.data.eval_size}):
        check_images(student, config.student.name, size, advice)
    check_images(student.train(), config.student.name, sizes[-1], advice)


@torch.no_grad()
def check_images(model: nn.Module, name: str, image_size: int, advice: str) -> None:
    """Raise a UserError if a model cannot take images of a size, or gives no logit for each class.

    It is called in its mode; in training a copy is, so that BatchNorm's statistics stay what they are.
    """
    mode = "training" if model.training else "evaluation"
    try:
        with torch.random.fork_rng(devices=[]):
            tried = copy.deepcopy(model) if model.training else model
            outputs = tried(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # every model checks its input in its own way
        raise UserError(
            f"model '{name}' cannot take images of {image_size} px in {mode} ({reason_of(error, 90)}). {advice}"
        ) from error
    expected = [2, model.num_classes]
    found = list(outputs.shape) if torch.is_tensor(outputs) else f"{len(outputs)} outputs"
    if model.num_classes and found != expected:
        raise UserError(
            f"model '{name}' gives {found} for 2 images in {mode}, not {expected}: it is no classifier. {advice}"
        )


@contextlib.contextmanager
def reporting_one_value_per_channel() -> Iterator[None]:
    """Inside, a normalisation over a single value of a channel is a UserError.

    With one image in a micro-batch that is so behind a pooling, or where the image has shrunk to one pixel.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1" not in str(error):
            raise
        raise UserError(
            "BatchNorm would see a single value of a channel, which has no variance. Set run.micro_batch, and "
            "augment.mix_group or run.global_batch where they are smaller, to 2 or more, or use larger images"
        ) from error
