"""A trained model as files that others load: for timm and Hugging Face's hub, as ONNX, as torch.export's program.

    python tools/export.py MODEL OUT [--onnx] [--torch-export] [--fold] [--evaluation FILE]

MODEL is a checkpoint, a run's folder, a folder exported before, or timm's name of a model with pretrained weights.
OUT is a new folder or an empty one. It is made in full or not at all, and what is in it has been loaded again and
compared with the model.
"""

import argparse
import copy
import sys
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

import torch
from torch import nn

from pipelines.common.errors import UserError, advice_against, exit_on_user_error, named
from pipelines.common.files import is_empty, making
from tools.lib.common.arguments import model_argument, path_argument
from tools.lib.common.attention import PLAIN_ATTENTION, fused_or_plain
from tools.lib.common.onnx_file import TOLERANCE, Difference, in_one_line, largest_difference
from tools.lib.export.card import MODEL_CARD, card, read_measured
from tools.lib.export.formats import FORMATS, Format
from tools.lib.export.timm_folder import noise, write_folder
from trainer.evaluation.trained import CONFIG, KINDS, WEIGHTS, TrainedModel, load_model
from trainer.models.fold_batch_norm import fold_batch_norms

_CHECKED = 3  # Each export is checked on one image, and on a batch of this many.


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    try:
        with exit_on_user_error():
            check_new_folder(options.out)
            if options.fold and not options.formats:
                raise UserError(f"--fold changes {' and '.join(FORMATS)} alone. Add one of them")
            trained = load_model(options.model, options.name, weights=options.weights, classes=options.classes)
            formats = [FORMATS[file] for file in options.formats]
            files = export(trained, options.out, formats, fold=options.fold, evaluation=options.evaluation)
            print(f"{trained.name} from {trained.source} is exported to {options.out}")
            for file, what in files.items():
                print(f"  {file}: {what}")
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    what = "checkpoint, run folder, exported folder, or timm's name"
    add("model", type=model_argument, metavar="MODEL", help=what)
    add("out", type=path_argument, metavar="OUT", help="folder to make, or an empty one")
    add("--name", help="timm's name, for a file that does not say which model it is of")
    what = "the weights that are exported; by default a checkpoint's EMA, and a run's best weights"
    add("--weights", choices=KINDS, default="auto", help=what)
    add("--classes", type=path_argument, metavar="FILE", help="names of the outputs, one on a line")
    for file, each in FORMATS.items():
        what = f"write {file}, for any batch"
        add(each.option, action="append_const", dest="formats", const=file, default=[], help=what)
    add("--fold", action="store_true", help="fold BatchNorm into the convolutions of these")
    what = "a file that tools/evaluate.py --run.json wrote, for the card"
    add("--evaluation", type=path_argument, metavar="FILE", help=what)
    return parser.parse_args(arguments)


def check_new_folder(out: Path) -> None:
    """Raise an error if no folder can be made at `out`, or if something is there that would have to give way."""
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out}: {out.parent} is not a folder. Make it, or name another")
    if out.exists() and not (out.is_dir() and is_empty(out)):
        held = f" and holds {named(sorted(entry.name for entry in out.iterdir()), most=3)}" if out.is_dir() else ""
        raise UserError(f"{out}: is there already{held}. Name a new or an empty folder")


def export(
    trained: TrainedModel, out: Path, formats: list[Format], *, fold: bool = False, evaluation: Path | None = None
) -> dict[str, str]:
    """Make the folder `out`, all of it or nothing.

    Args:
      fold: BatchNorm is folded into the convolutions before it, in the formats.
      evaluation: file with the accuracy, for the card.
    Returns:
      what each file is, by its name.
    Raises:
      UserError: a file cannot be made, or is not the model when it is loaded again.
    """
    measured = read_measured(trained, evaluation)
    try:
        with making(out.resolve(), last=CONFIG) as folder:
            write_folder(trained, folder)
            files = {
                WEIGHTS: "the weights, float32; timm makes the same model of them",
                CONFIG: "architecture, names of the outputs, what the model sees of an image",
                **computations(trained, folder, formats, fold=fold),
            }
            (folder / MODEL_CARD).write_text(card(trained, files, measured), encoding="utf-8")
    except OSError as error:
        helps = advice_against(error, "Name another folder")
        raise UserError(f"{out}: cannot be written ({error.strerror or error}). {helps}") from error
    return {**files, MODEL_CARD: "the model card"}


def computations(trained: TrainedModel, folder: Path, formats: list[Format], *, fold: bool) -> dict[str, str]:
    """Write the formats of `export`, compare each with the model, and say what each file is."""
    images = noise(trained, _CHECKED)
    model, folded = folded_copy(trained, images) if fold else (trained.module, "")
    files = {}
    for each in formats:

        def attempt(candidate: nn.Module, each: Format = each) -> Difference:
            return written_and_checked(candidate, trained.module, images, each, folder)

        difference, plain = fused_or_plain(model, attempt)
        attention = f", {PLAIN_ATTENTION}" if plain else ""
        files[each.file] = f"{each.title}{folded}{attention}; its logits are off by up to {difference}"
        if (folder / f"{each.file}.data").exists():
            files[f"{each.file}.data"] = f"the weights of {each.file}, which looks for them beside it"
    return files


def written_and_checked(
    model: nn.Module, reference: nn.Module, images: torch.Tensor, kind: Format, folder: Path
) -> Difference:
    """Write a model in a format, load and run it, and compare it with the reference.

    Raises:
      UserError: the file cannot be written or run, or its logits are others than the reference's.
    """
    path = folder / kind.file
    kind.write(model, images, path)
    with in_one_line(f"run from {path.name}"):
        difference = largest_difference(reference, kind.read(path), images)
    if not difference.is_small:
        raise UserError(
            f"{path.name}: its logits are off by up to {difference}, more than {TOLERANCE:g} of it. Leave this file "
            "out, or try without --fold"
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
