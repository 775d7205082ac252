"""The models of a comparison: which they are, how accurate, how large, and as files that the backends read."""

import contextlib
import csv
import dataclasses
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.common.errors import UserError, clipped, reason_of, with_escaped_bytes
from tools.lib.common.attention import fused_or_plain, has_fused_attention
from tools.lib.common.evaluation import Report, read_report
from tools.lib.common.onnx_file import export_onnx, in_one_line, onnx_runtime, quiet
from trainer.config.paper import paper_models
from trainer.evaluation.trained import load_model
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

    def __post_init__(self):
        if not 0 <= self.top1 <= 100:
            raise UserError(f"{self.said_by}: top1 of {self.model} is {self.top1:g}, not a percentage. Correct it")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
      label: what the user calls it, printable.
      name: timm's name of it.
      weights: the word that names them; "" stands for random ones.
      image_size: side of its images, pixels: that of its accuracy, otherwise its own.
    """

    label: str
    name: str
    weights: str
    image_size: int
    accuracy: Accuracy | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties of a model that do not depend on the machine.

    Attributes:
      parameters_m: parameters in millions, as trained, before folding.
      gmacs: multiply-adds of matrix products and convolutions for an image, in 1e9.
      plain_attention: files that hold timm's plain attention, because the model's fused one cannot be exported.
    """

    parameters_m: float
    gmacs: float
    plain_attention: frozenset[str] = frozenset()


def choose(words: Sequence[str], files: Sequence[Path]) -> list[Candidate]:
    """The models that a user names, or the paper's, each with its accuracy if there is one.

    Args:
      words: timm's names, and paths of checkpoints, runs and exported folders; none is the paper's models.
      files: as for `read_accuracies`; they come before the paper.
    Raises:
      UserError: an unknown or damaged model or file, an accuracy that belongs to none of the models, or evaluations on
        different images.
    """
    paper = [
        Accuracy(model.name, model.top1, model.image_size, model.source, published=True, arguments=model.arguments)
        for model in paper_models()
    ]
    said = [accuracy for path in files for accuracy in read_accuracies(path)]
    models = [_candidate(word, said, paper) for word in dict.fromkeys(words or (each.model for each in paper))]
    used = [model.accuracy for model in models if model.accuracy is not None]
    for path in files:
        if with_escaped_bytes(str(path)) not in {accuracy.said_by for accuracy in used}:
            raise UserError(f"{path}: is of none of the models here. Name its model, or leave it out")
    evaluated = [accuracy for accuracy in used if accuracy.digest]  # Other accuracies do not say what they are of.
    for other in evaluated[1:]:
        first, second = (f"split '{each.split}' with digest {each.digest[:12]}" for each in (evaluated[0], other))
        if first != second:
            raise UserError(
                f"{other.said_by}: was evaluated on {second}, {evaluated[0].said_by} on {first}. "
                "Evaluate both on the same images, or leave one out"
            )
    return models


def read_accuracies(path: Path) -> list[Accuracy]:
    """What a file says: an evaluation (`python tools/evaluate.py --run.json FILE`), or a CSV of several models.

    The CSV has columns model (timm's name or a path), top1 (percent) and, if there is one, image_size (pixels).

    Raises:
      UserError: the file is missing, or is neither.
    """
    said_by = with_escaped_bytes(str(path))
    if path.suffix == ".json":
        return [read_report(path, lambda report: _of_evaluation(report, said_by))]
    try:
        rows = csv.DictReader(path.read_text().splitlines())
        found = [
            Accuracy(row["model"].strip(), float(row["top1"]), int(row.get("image_size") or 0) or None, said_by)
            for row in rows
        ]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{clipped(path, 120)}: not a CSV with columns model, top1 and perhaps image_size ({reason_of(error)}). "
            "Give one, or an evaluation's JSON"
        ) from error
    return found


def _of_evaluation(report: Report, said_by: str) -> Accuracy:
    source = "" if report["source"].startswith(_TIMMS) else report["source"]
    size, split, digest = int(report["view"]["image_size"]), str(report["split"]), str(report["digest"])
    return Accuracy(report["model"], float(report["top1"]), size, said_by, source, split=split, digest=digest)


def _candidate(word: str, said: Iterable[Accuracy], paper: Iterable[Accuracy]) -> Candidate:
    """The model that a word names, with its accuracy: of a trained model by its file, of timm's by its name."""
    name = None
    if not os.path.exists(word):
        with contextlib.suppress(UserError):
            name = known_name(word)
    if name is not None:
        config = timm.get_pretrained_cfg(name)
        model = Candidate(word, name, "", config.input_size[-1] if config is not None else _IMAGE_SIZE)
        found = [each for each in said if not each.source and each.model in (name, word)]
        papers = [each for each in paper if each.model == name]
    else:
        trained = load_model(word)  # Its error says what is wrong with the word.
        model = Candidate(with_escaped_bytes(word), trained.name, word, trained.transform.image_size)
        files = {Path(word).resolve(), Path(trained.source).resolve()}
        found, papers = [each for each in said if Path(each.source or each.model).resolve() in files], []
    if len(found) > 1:
        raise UserError(f"{word}: {found[0].said_by} and {found[1].said_by} say its accuracy. Leave one out")
    for accuracy in (*found, *papers):
        return dataclasses.replace(model, accuracy=accuracy, image_size=accuracy.image_size or model.image_size)
    return model


def build(model: Candidate) -> nn.Module:
    """The network in evaluation mode with its BatchNorms folded, as every backend runs it; the same in each process."""
    network = unfolded(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fold_batch_norms(network, torch.randn(1, 3, model.image_size, model.image_size))
    return network


def unfolded(model: Candidate) -> nn.Module:
    """The network in evaluation mode as it was trained, or with random weights."""
    if model.weights:
        return load_model(model.weights, image_size=model.image_size).module
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
    network = unfolded(model)
    parameters, cost = sum(p.numel() for p in network.parameters()), gmacs(network, model.image_size)
    network = build(model)
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
    return Facts(parameters / 1e6, cost, frozenset(plain))


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
        with quiet(), in_one_line("converted for OpenVINO"):
            import openvino

            openvino.save_model(openvino.convert_model(folder / ONNX), folder / OPENVINO, compress_to_fp16=True)
