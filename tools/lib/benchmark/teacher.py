"""A teacher's forward pass in bf16 and in fp16: how fast it is, and how far its outputs are from those in fp32.

The images are photographs, augmented as in training and under the teacher's own normalisation, and each row's teacher
is built as a run builds it: BatchNorm folded, channels-last, not compiled. fp32 is computed without TF32.

Random weights would give every image the same class. So their BatchNorms are first given the statistics of the images,
and the classifier is scaled until logits spread as a trained model's do. Where a trained teacher's best class stands
out more, the formats agree more often than here: --checkpoint measures that.
"""

import functools
import itertools
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipelines import PipelineConfig, open_pipeline
from pipelines.batch import Batch
from pipelines.common.machine import expanded, num_cores
from tools.lib.benchmark.photographs import photograph_index, recipe_plan
from tools.lib.benchmark.results import SPEED_COLUMNS, Measured, Row
from tools.lib.benchmark.runs import CLASSES, updates_per_timed_run
from tools.lib.common.hardware import first_device
from tools.lib.common.timing import interleaved, ratio, speeds, timed_on_device
from trainer.config.sections import Config, parse
from trainer.feed import batches_of
from trainer.models.factory import create_model
from trainer.models.normalize import Normalize
from trainer.models.preprocessing import preprocessing
from trainer.models.teacher import Teachers, build_teachers
from trainer.update.inputs import model_inputs
from trainer.update.precision import PRECISIONS, allow_tf32

COLUMNS = SPEED_COLUMNS | {
    "kl": "KL from fp32, nats",
    "kl_max": "its largest",
    "agreement": "same best class",
}
RANDOM = "random"
_EXACT = "fp32"
_SPREAD = 2.5  # This is the standard deviation of an image's logits over the classes.


def teacher(
    teacher: str, checkpoint: str, images: int, batch: int, size: int, repeats: int, seconds: float
) -> list[Row]:
    """The rows: each number format in which a teacher may compute.

    Args:
      checkpoint: the teacher's weights; "random" needs none.
      seconds: about how long a timed run takes.
    Raises:
      UserError: an unknown model, or weights that do not fit it.
    """
    device = first_device()
    allow_tf32(False)
    torch.backends.cudnn.benchmark = True  # A run does the same.
    with tempfile.TemporaryDirectory() as scratch:
        batches = _photographs(Path(scratch), images, min(batch, images), size, device)
        weights = Path(scratch) / "weights.pt" if checkpoint == RANDOM else expanded(checkpoint)
        if checkpoint == RANDOM:
            torch.save(weights_that_differ(teacher, size, batches[0]), weights)
        settings = {"teacher.name": teacher, "teacher.checkpoint": weights, "data.image_size": size}
        config = parse([f"--{key}={value}" for key, value in settings.items()])
        passes = {name: _forward_pass(config, name, batches) for name in (_EXACT, "bf16", "fp16")}
    outputs = {name: torch.cat([each() for each in run]).float() for name, run in passes.items()}
    count = updates_per_timed_run(passes[_EXACT][0], seconds)
    candidates = {name: timed_on_device(functools.partial(_repeat, run, count)) for name, run in passes.items()}
    seconds_of = interleaved(candidates, repeats)
    return [
        {
            "what": name,
            **speeds(count * len(batches[0].images), times),
            "ratio": ratio(seconds_of[_EXACT], times),
            "of": _EXACT,
            **_distance(outputs[_EXACT], outputs[name]),
        }
        for name, times in seconds_of.items()
    ]


def _photographs(folder: Path, images: int, batch: int, size: int, device: torch.device) -> list[Batch]:
    """Augmented photographs on the device, in full batches. They are decoded on the CPU, which works everywhere."""
    index = photograph_index(folder, images)
    plan = recipe_plan(index, batch, size)
    pipeline = open_pipeline(index, PipelineConfig(pipeline="torchvision", threads=num_cores()), device=device)
    plans = (plan.rows(start, start + batch) for start in range(0, plan.steps_per_epoch * batch, batch))
    with closing(batches_of(pipeline, plans)) as batches:
        return list(batches)


@torch.no_grad()
def weights_that_differ(name: str, size: int, batch: Batch) -> dict[str, torch.Tensor]:
    """Random weights of a model whose outputs differ from image to image."""
    torch.manual_seed(0)
    model: Any = create_model(name, CLASSES, size, {}).to(batch.images.device)  # timm's methods have no types.
    expects = preprocessing(model)
    pixels = Normalize(expects.mean, expects.std).to(batch.images.device)(batch.images)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # The statistics are then those of this batch alone.
    model.train()(pixels)
    logits = model.eval()(pixels)
    classifier = model.get_classifier()
    classifier.weight.mul_(_SPREAD / logits.std(dim=1).mean())
    return {key: value.cpu() for key, value in model.state_dict().items()}


def _forward_pass(config: Config, precision: str, batches: list[Batch]) -> list[functools.partial]:
    """Functions that each give the teacher's logits of a batch."""
    device, dtype = batches[0].images.device, PRECISIONS[precision]
    teachers = build_teachers(config, CLASSES, None)
    assert teachers is not None  # The configuration names one.
    teachers = teachers.to(device).to(memory_format=torch.channels_last).to_precision(dtype)
    normalize = Normalize((0.5,) * 3, (0.5,) * 3, dtype).to(device)  # It stands for a student's, which is not used.
    return [
        functools.partial(_logits, teachers, model_inputs(normalize, teachers, batch).teachers) for batch in batches
    ]


@torch.no_grad()
def _logits(teachers: Teachers, inputs: list[torch.Tensor]) -> torch.Tensor:
    return teachers(inputs)


def _repeat(run: list[functools.partial], count: int) -> None:
    for forward in itertools.islice(itertools.cycle(run), count):
        forward()


def _distance(exact: torch.Tensor, found: torch.Tensor) -> Measured:
    """How far logits [N, C] are from the exact ones."""
    log_exact, log_found = functional.log_softmax(exact.double(), dim=1), functional.log_softmax(found.double(), dim=1)
    divergence = (log_exact.exp() * (log_exact - log_found)).sum(1)
    return {
        "kl": float(f"{divergence.mean().item():.3g}"),
        "kl_max": float(f"{divergence.max().item():.3g}"),
        "agreement": round((exact.argmax(1) == found.argmax(1)).float().mean().item(), 4),
    }
