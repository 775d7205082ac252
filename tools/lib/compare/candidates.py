"""The models of a comparison: which they are, how accurate, how large, and as files that the backends read."""

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.common.errors import UserError, clipped
from tools.lib.common.attention import fused_or_plain, has_fused_attention
from tools.lib.common.onnx_file import export_onnx, in_one_line, onnx_runtime, quiet
from trainer.config.paper import paper_models
from trainer.evaluation import trained as inference
from trainer.models.factory import create_model, known_name
from trainer.models.fold_batch_norm import fold_batch_norms

ONNX, HALF_ONNX, OPENVINO = "model.onnx", "model-fp16.onnx", "model.xml"
REFERENCE = "reference.pt"
_NUM_CLASSES = 1000  # Models without weights have ImageNet's classes,
_IMAGE_SIZE = 224  # and this size if timm has none for them.
_TIMMS = "timm's "  # The source of an evaluation of timm's pretrained weights begins like this.


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A model's accuracy, and who says so.

    Attributes:
      model: timm's name, or a path; source: the file of weights that was evaluated, "" for timm's own weights and where
        none is named.
      top1: percent.
      image_size: pixels; None where it is not said.
      said_by: the file that says it, or where it was published.
      published: by the paper, not measured here.
      split, digest: of the dataset of an evaluation, "" where there was none.
      arguments: pairs of name and value with which timm builds the model that the paper means.
    """

    model: str
    top1: float
    image_size: int | None
    said_by: str
    source: str = ""
    published: bool = False
    split: str = ""
    digest: str = ""
    arguments: tuple[tuple[str, object], ...] = ()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
      label: what the user calls it.
      name: timm's name of it.
      path: of its weights; None stands for random ones.
      image_size: side of its images, pixels: that of its accuracy, otherwise its own.
    """

    label: str
    name: str
    path: Path | None
    image_size: int
    accuracy: Accuracy | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties of a model that do not depend on the machine.

    Attributes:
      parameters: as trained, before folding.
      gmacs: multiply-adds of matrix products and convolutions for an image, in 1e9.
      folded: BatchNorms folded into convolutions.
      plain_attention: files that hold timm's plain attention, because the model's fused one cannot be exported.
    """

    parameters: int
    gmacs: float
    folded: int
    plain_attention: frozenset[str] = frozenset()


def choose(words: Sequence[str], accuracies: Sequence[Path]) -> list[Candidate]:
    """The models that a user names, or the paper's, each with its accuracy if there is one.

    Args:
      words: timm's names, and paths of checkpoints, runs and exported folders; none is the paper's models.
      accuracies: files as for `read_accuracies`; they come before the paper.
    Raises:
      UserError: an unknown or damaged model or file, an accuracy that belongs to none of the models, or evaluations on
        different images.
    """
    paper = published()
    read = {path: read_accuracies(path) for path in accuracies}
    models = [_identified(word) for word in dict.fromkeys(words or (each.model for each in paper))]
    every = [accuracy for group in read.values() for accuracy in group]
    found = [_with_accuracy(model, source, every, paper) for model, source in models]
    used = {model.accuracy for model in found}
    for path, group in read.items():
        if not used & set(group):
            of = group[0].source or group[0].model
            others = f" and {len(group) - 1} more" if len(group) > 1 else ""
            raise UserError(f"{path}: is of {of}{others}, none of the models here. Name its model, or leave it out")
    _check_same_images([model.accuracy for model in found if model.accuracy is not None])
    return found


def _check_same_images(accuracies: Iterable[Accuracy]) -> None:
    """Evaluations share a front only if they were on the same images; for other accuracies that is not known."""
    evaluated = [accuracy for accuracy in accuracies if accuracy.digest]
    for other in evaluated[1:]:
        if (other.split, other.digest) != (evaluated[0].split, evaluated[0].digest):
            first, second = (f"split '{a.split}' with digest {a.digest[:12]}" for a in (evaluated[0], other))
            raise UserError(
                f"{other.said_by}: was evaluated on {second}, {evaluated[0].said_by} on {first}. "
                "Evaluate both on the same images, or leave one out"
            )


def published() -> list[Accuracy]:
    """The paper's accuracies of the models that timm has."""
    return [
        Accuracy(model.name, model.top1, model.image_size, model.source, published=True, arguments=model.arguments)
        for model in paper_models()
    ]


def read_accuracies(path: Path) -> list[Accuracy]:
    """What a file says: an evaluation (`python tools/evaluate.py --run.json FILE`), or a CSV of several models.

    The CSV has columns model (timm's name or a path), top1 (percent) and, if there is one, image_size (pixels).

    Raises:
      UserError: the file is missing, or is neither.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f"{clipped(path, 120)}: cannot be read ({reason}). Give an evaluation's JSON, or a CSV"
        ) from error
    if path.suffix == ".json":
        return [_of_evaluation(path, text)]
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or not {"model", "top1"} <= set(rows[0]):
        raise UserError(
            f"{path}: needs a line of titles with model and top1, image_size if you like, and a model a line"
        )
    return [_of_row(f"{path}: line {number}", row, path) for number, row in enumerate(rows, 2)]


def _of_evaluation(path: Path, text: str) -> Accuracy:
    try:
        report = json.loads(text)
        source = "" if report["source"].startswith(_TIMMS) else report["source"]
        size = int(report["view"]["image_size"])
        top1 = _percent(str(path), report["top1"])
        split, digest = str(report["split"]), str(report["digest"])
        return Accuracy(report["model"], top1, size, str(path), source, split=split, digest=digest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: not what python tools/evaluate.py --run.json writes ({error!r}). Evaluate the model again"
        ) from error


def _of_row(where: str, row: dict, path: Path) -> Accuracy:
    size = (row.get("image_size") or "").strip()
    if size and not size.isdigit():
        raise UserError(f"{where}: image_size is '{size}', not a number of pixels")
    return Accuracy((row["model"] or "").strip(), _percent(where, row["top1"]), int(size) if size else None, str(path))


def _percent(where: str, value: Any) -> float:
    try:
        top1 = float(value)
    except (ValueError, TypeError):
        top1 = -1.0
    if not 0 <= top1 <= 100:
        raise UserError(f"{where}: top1 is '{value}', not a percentage")
    return top1


def _identified(word: str) -> tuple[Candidate, str]:
    """A model without its accuracy, and the file that its weights come from, "" for random ones."""
    name = None
    if not os.path.exists(word):
        with contextlib.suppress(UserError):
            name = known_name(word)
    if name is None:
        trained = inference.load_model(word)  # Its error says what is wrong with the word.
        return Candidate(word, trained.name, Path(word), trained.transform.image_size), trained.source
    config = timm.get_pretrained_cfg(name)
    return Candidate(word, name, None, config.input_size[-1] if config is not None else _IMAGE_SIZE), ""


def _with_accuracy(model: Candidate, source: str, said: Iterable[Accuracy], paper: Iterable[Accuracy]) -> Candidate:
    found = [accuracy for accuracy in said if _is_of(accuracy, model, source)]
    if len(found) > 1:
        raise UserError(
            f"{model.label}: {found[0].said_by} says {found[0].top1:g} %, {found[1].said_by} {found[1].top1:g} %. "
            "Leave one out"
        )
    found += [accuracy for accuracy in paper if accuracy.model == model.name and not source]
    if not found:
        return model
    return dataclasses.replace(model, accuracy=found[0], image_size=found[0].image_size or model.image_size)


def _is_of(accuracy: Accuracy, model: Candidate, source: str) -> bool:
    """Trained models match by their file, timm's names by name, but not an evaluation of other weights."""
    if not source:
        return not accuracy.source and accuracy.model in (model.name, model.label)
    paths = {Path(path).resolve() for path in (accuracy.source, "" if accuracy.source else accuracy.model) if path}
    return bool(paths & {Path(source).resolve(), Path(model.label).resolve()})


def build(model: Candidate) -> tuple[nn.Module, int]:
    """The network in evaluation mode with its BatchNorms folded, as every backend runs it, and how many were folded.

    It is the same in every process.
    """
    network = _built(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network, fold_batch_norms(network, torch.randn(1, 3, model.image_size, model.image_size))


def _built(model: Candidate) -> nn.Module:
    if model.path is not None:
        return inference.load_model(str(model.path), image_size=model.image_size).module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arguments: Any = {} if model.accuracy is None else dict(model.accuracy.arguments)
        network = create_model(model.name, _NUM_CLASSES, model.image_size, arguments).eval().requires_grad_(False)
        _disturb(network)
    return network


@torch.no_grad()
def _disturb(network: nn.Module) -> None:
    """Make random weights as costly as trained ones: a runtime leaves out adding 0 and multiplying by 1."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
            tensor.add_(torch.randn_like(tensor), alpha=0.02)


def gmacs(network: nn.Module, image_size: int) -> float:
    """Multiply-adds of matrix products and convolutions for an image, in 1e9, those of attention included.

    Source: half of what torch.utils.flop_counter counts; attention is written out for it, as it has no formula for the
    fused one on CPUs.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() / 2e9


@torch.no_grad()
def prepare(model: Candidate, folder: Path, files: Sequence[str]) -> Facts:
    """Write what the backends read: the files asked for, of ONNX, HALF_ONNX and OPENVINO, and the reference.

    The reference holds images, float32 [2, 3, S, S], and the logits that PyTorch gives in float32.

    Raises:
      UserError: the model cannot be built for its images, or cannot be exported.
    """
    network = _built(model)
    parameters, cost = sum(p.numel() for p in network.parameters()), gmacs(network, model.image_size)
    network, folded = build(model)
    images = torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1))
    torch.save({"images": images, "logits": network(images)}, folder / REFERENCE)
    plain = set()
    if wanted := {ONNX, OPENVINO} & set(files):
        _, is_plain = fused_or_plain(network, lambda candidate: _write_single(candidate, images, folder, wanted))
        plain |= wanted if is_plain else set()
    if HALF_ONNX in files:
        half, path = images.half(), folder / HALF_ONNX
        _, is_plain = fused_or_plain(network.half(), lambda candidate: export_onnx(candidate, half, path))
        plain |= {HALF_ONNX} if is_plain else set()
    return Facts(parameters, cost, folded, frozenset(plain))


def _write_single(network: nn.Module, images: torch.Tensor, folder: Path, files: Collection[str]) -> None:
    """Write the files in single precision that are asked for: ONNX, and OPENVINO, which is made of it.

    Raises:
      UserError: the model cannot be exported, or onnxruntime does not run its fused attention.
    """
    export_onnx(network, images, folder / ONNX)
    if ONNX in files and has_fused_attention(network):  # Otherwise the backend reports it.
        with in_one_line(f"run from {ONNX}"):
            onnx_runtime(folder / ONNX)(images)
    if OPENVINO in files:
        with in_one_line("converted for OpenVINO"):
            _convert(folder)


def _convert(folder: Path) -> None:
    """Convert the ONNX file for OpenVINO, with weights in FP16."""
    import openvino

    with quiet():
        openvino.save_model(openvino.convert_model(folder / ONNX), folder / OPENVINO, compress_to_fp16=True)
