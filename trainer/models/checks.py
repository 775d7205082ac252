"""Checks that a model can do what it is for, before a run begins: each raises a UserError that says what to do."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pipelines.common.errors import UserError, reason_of
from trainer.cluster.world import World
from trainer.config.sections import Config

_STUDENT_SIZE = (
    "Change data.image_size or data.eval_image_size, or use another model; some of timm's take any size with "
    "--student.kwargs.dynamic_img_size true"
)


def check_student(student: nn.Module, config: Config, num_classes: int, micro_batch: int, world: World) -> None:
    """Raise a UserError if a student cannot be trained and evaluated on its images, of every size.

    Args:
      micro_batch: images of a forward pass on one rank; with run.micro_batch auto the smallest that is tried.
    """
    sizes, name = config.data.train_sizes, config.student.name
    for size in sorted({*sizes, config.data.eval_size}):
        check_size(student, name, size)
    check_outputs(student, name, num_classes, sizes[-1])
    if config.run.batch_norm == "sync" and world.size > 1:  # its layers see the images of all ranks
        return
    is_tried = config.run.micro_batch == "auto" and world.device.type == "cuda"  # the largest one first
    check_batch_norm(student, config.run.global_batch // world.size if is_tried else micro_batch, sizes)


@torch.no_grad()
def check_size(model: nn.Module, name: str, image_size: int, advice: str = _STUDENT_SIZE) -> None:
    """Raise a UserError if a model cannot take images of this size; `advice` says what to do about it."""
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # every model checks its input in its own way
        raise UserError(
            f"model '{name}' cannot take images of {image_size} px ({reason_of(error, 90)}). {advice}"
        ) from error
    finally:
        model.train(training)


@torch.no_grad()
def check_outputs(student: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Raise a UserError if a student does not give one logit for each class in training.

    Some of timm's give features (encoders) or, asked for by their arguments, a second output beside the logits.
    """
    images = torch.zeros(2, 3, image_size, image_size)
    try:
        with torch.random.fork_rng(devices=[]):  # a copy: BatchNorm's statistics stay what they are
            found = _shape_in_words(copy.deepcopy(student).train()(images))
    except Exception as error:  # every model fails in its own way
        raise UserError(
            f"model '{name}' cannot be trained on images of {image_size} px ({reason_of(error)}). Change "
            "data.image_size or student.kwargs, or use another model"
        ) from error
    if found != f"{[2, num_classes]}":
        raise UserError(
            f"model '{name}' gives {found} for 2 images in training, not [2, {num_classes}]: it cannot be trained as a "
            "classifier. Change student.kwargs, or use another model"
        )


@torch.no_grad()
def check_logits(model: nn.Module, name: str, image_size: int, advice: str) -> None:
    """Raise a UserError if a model in evaluation mode does not give one logit for each class."""
    found, expected = _shape_in_words(model(torch.zeros(1, 3, image_size, image_size))), f"{[1, model.num_classes]}"
    if found != expected:
        raise UserError(f"model '{name}' gives {found} for an image, not {expected}: it is no classifier. {advice}")


def _shape_in_words(outputs: Any) -> str:
    return f"{list(outputs.shape)}" if torch.is_tensor(outputs) else f"{len(outputs)} outputs"


@torch.no_grad()
def check_batch_norm(student: nn.Module, micro_batch: int, image_sizes: list[int]) -> None:
    """Raise a UserError if BatchNorm would see a single value of a channel in training.

    With one image in a micro-batch that is so behind a pooling, or where the image has shrunk to one pixel.
    """
    if micro_batch > 1:
        return
    with torch.random.fork_rng(devices=[]):  # a copy: BatchNorm's statistics stay what they are
        for size in sorted({*image_sizes}):
            with reporting_one_value_per_channel(size):
                copy.deepcopy(student).train()(torch.zeros(1, 3, size, size))


@contextlib.contextmanager
def reporting_one_value_per_channel(image_size: int | None = None) -> Iterator[None]:
    """Inside, a normalisation over a single value is a UserError."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1" not in str(error):
            raise
        size = f" of {image_size} px" if image_size else ""
        raise UserError(
            f"BatchNorm would see a single value of a channel (images{size}, run.micro_batch too small), which has no "
            "variance. Set run.micro_batch, and augment.mix_group or run.global_batch where they are smaller, to 2 or "
            "more, or use larger images"
        ) from error
