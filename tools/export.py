"""A trained model as files that others load: for timm and Hugging Face's hub, as ONNX, as torch.export's program.

    python tools/export.py MODEL OUT [--onnx] [--torch-export] [--fold] [--evaluation FILE]

MODEL is a checkpoint, a run's folder, a folder exported before, or timm's name of a model with pretrained weights.
OUT is a new folder or an empty one. It is made in full or not at all, and what is in it has been loaded again and
compared with the model.
"""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

import torch
from torch import nn

from pipelines.common.errors import UserError, advice_against, clipped, exit_on_user_error, named
from pipelines.common.files import is_empty, making
from tools.lib.common.arguments import model_argument, path_argument
from tools.lib.common.attention import PLAIN_ATTENTION, fused_or_plain
from tools.lib.common.onnx_file import (
    OPSET,
    TOLERANCE,
    Difference,
    export_onnx,
    in_one_line,
    largest_difference,
    onnx_runtime,
    require_onnx,
)
from tools.lib.export.card import MODEL_CARD, ONNX, PROGRAM, card, read_evaluation
from tools.lib.export.timm_folder import noise, write_folder
from tools.lib.export.torch_file import export_program, torch_program
from trainer.evaluation.trained import CONFIG, KINDS, WEIGHTS, TrainedModel, load_model
from trainer.models.fold_batch_norm import fold_batch_norms

_CHECKED = 3  # Each export is checked on one image, and on a batch of this many.


@dataclasses.dataclass(frozen=True)
class Format:
    """A file that holds a model's computation beside its weights.

    Attributes:
      title: its name for people.
      write: the model as a file of this format, with images of its size.
      read: the model of a file, from images to logits.
    """

    title: str
    write: Callable[[nn.Module, torch.Tensor, Path], None]
    read: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]


FORMATS = {
    ONNX: Format(f"ONNX, opset {OPSET}", export_onnx, onnx_runtime),
    PROGRAM: Format("torch.export's program", export_program, torch_program),
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    try:
        with exit_on_user_error():
            check_options(options)
            wanted = [file for file, on in ((ONNX, options.onnx), (PROGRAM, options.torch_export)) if on]
            trained = load_model(options.model, options.name, weights=options.weights, classes=options.classes)
            files = export(trained, options.out, wanted, fold=options.fold, evaluation=options.evaluation)
            print(f"{trained.name} from {trained.source} is exported to {options.out}")
            for file, what in files.items():
                print(f"  {file}: {what}")
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "model", type=model_argument, metavar="MODEL", help="checkpoint, run folder, exported folder, or timm's name"
    )
    parser.add_argument("out", type=path_argument, metavar="OUT", help="folder to make, or an empty one")
    parser.add_argument("--name", help="timm's name, for a file that does not say which model it is of")
    parser.add_argument(
        "--weights",
        choices=KINDS,
        default="auto",
        help="the weights that are exported; by default a checkpoint's EMA, and a run's best weights",
    )
    parser.add_argument("--classes", type=path_argument, metavar="FILE", help="names of the outputs, one on a line")
    parser.add_argument("--onnx", action="store_true", help=f"write {ONNX}, for any batch")
    parser.add_argument("--torch-export", action="store_true", help=f"write {PROGRAM}, for any batch")
    parser.add_argument("--fold", action="store_true", help="fold BatchNorm into the convolutions of these two")
    parser.add_argument(
        "--evaluation",
        type=path_argument,
        metavar="FILE",
        help="a file that tools/evaluate.py --run.json wrote, for the card",
    )
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raise a UserError about what could only fail after the model is loaded."""
    try:
        check_new_folder(options.out)
    except OSError as error:
        raise UserError(f"OUT is {clipped(options.out)}: {error.strerror}. Name another folder") from error
    if options.fold and not (options.onnx or options.torch_export):
        raise UserError(f"--fold changes {ONNX} and {PROGRAM} alone. Add --onnx or --torch-export")
    if options.onnx:
        require_onnx()


def check_new_folder(out: Path) -> None:
    """Raise a UserError if no folder can be made at `out`, or if something is there that would have to give way."""
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out}: {out.parent} is not a folder. Make it, or name another")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is there already, and is not a folder. Name a new or an empty folder")
    if out.exists() and not is_empty(out):
        held = named(sorted(entry.name for entry in out.iterdir()), most=3)
        raise UserError(f"{out}: is there already and holds {held}. Name a new or an empty folder")


def export(
    trained: TrainedModel, out: Path, wanted: list[str], *, fold: bool = False, evaluation: Path | None = None
) -> dict[str, str]:
    """Make the folder `out`, all of it or nothing.

    Args:
      wanted: keys of FORMATS.
      fold: BatchNorm is folded into the convolutions before it, in these.
      evaluation: file with the accuracy, for the card.
    Returns:
      what each file is, by its name.
    Raises:
      UserError: a file cannot be made, or is not the model when it is loaded again.
    """
    report = read_evaluation(evaluation, trained) if evaluation else None
    try:
        with making(out.resolve(), last=CONFIG) as folder:
            write_folder(trained, folder)
            files = {
                WEIGHTS: "the weights, float32; timm gives the same logits with them, bit by bit",
                CONFIG: "architecture, names of the outputs, what the model sees of an image",
                **computations(trained, folder, wanted, fold=fold),
            }
            (folder / MODEL_CARD).write_text(card(trained, files, report), encoding="utf-8")
    except OSError as error:
        helps = advice_against(error, "Name another folder")
        raise UserError(f"{out}: cannot be written ({error.strerror or error}). {helps}") from error
    return {**files, MODEL_CARD: "the model card"}


def computations(trained: TrainedModel, folder: Path, wanted: list[str], *, fold: bool) -> dict[str, str]:
    """Write the formats of `export`, compare each with the model, and say what each file is."""
    if not wanted:
        return {}
    images = noise(trained, _CHECKED)
    model, folded = folded_copy(trained, images) if fold else (trained.module, "")
    files = {}
    for file in wanted:

        def attempt(candidate: nn.Module, file: str = file) -> Difference:
            return written_and_checked(candidate, trained.module, images, folder / file, fold=fold)

        difference, plain = fused_or_plain(model, attempt)
        attention = f", {PLAIN_ATTENTION}" if plain else ""
        files[file] = f"{FORMATS[file].title}{folded}{attention}; its logits are off by up to {difference}"
        if (folder / f"{file}.data").exists():
            files[f"{file}.data"] = f"the weights of {file}, which looks for them beside it"
    return files


def written_and_checked(
    model: nn.Module, reference: nn.Module, images: torch.Tensor, path: Path, *, fold: bool
) -> Difference:
    """Write a model in the format that the file's name stands for, load and run it, and compare it with the reference.

    Raises:
      UserError: the file cannot be written or run, or its logits are others than the reference's.
    """
    FORMATS[path.name].write(model, images, path)
    with in_one_line(f"run from {path.name}"):
        difference = largest_difference(reference, FORMATS[path.name].read(path), images)
    if not difference.is_small:
        raise UserError(
            f"{path.name}: its logits are off by up to {difference}, more than {TOLERANCE:g} of it. Leave this file "
            f"out{' or try without --fold' if fold else ''}"
        )
    return difference


def folded_copy(trained: TrainedModel, images: torch.Tensor) -> tuple[nn.Module, str]:
    """A copy of the model without the BatchNorms that can be folded, and words about it."""
    model = copy.deepcopy(trained.module)
    try:
        count = fold_batch_norms(model, images)
    except RuntimeError as error:
        raise UserError(f"{trained.source}: {error}. Export it without --fold") from error
    return model, f", {count} BatchNorms folded" if count else ", no BatchNorm that could be folded"


if __name__ == "__main__":
    main()
