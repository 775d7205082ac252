"""One model from several checkpoints of it: the mean of their weights, another moving average, or a greedy soup.

    python tools/average.py uniform OUT.pt CHECKPOINT-OR-RUN [...] [--weights ema|raw]
    python tools/average.py ema OUT.pt RUN --decay 0.9999
    python tools/average.py greedy OUT.pt CHECKPOINT-OR-RUN [...] --data DATASET [--weights ema|raw]

A run's folder stands for all its step-N.pt. OUT.pt is a checkpoint as a run's best.pt: whatever takes one takes it.
"""

import argparse
import collections
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.common.errors import ROOM, UserError, advice_against, exit_on_user_error
from pipelines.common.files import check_parent_folder, sha256_of
from pipelines.shards.index import read_index
from pipelines.shards.manifest import read_manifest
from tools.lib.average.ingredients import Ingredient, Weights, differing, read, read_alike
from tools.lib.common.arguments import path_argument
from tools.lib.common.evaluation import ForwardConfig, predict_split
from trainer.cluster.world import alone
from trainer.config.sections import ImagesConfig
from trainer.evaluation import metrics
from trainer.evaluation.trained import KINDS, Kind, TrainedModel, check_fits, load
from trainer.models.class_names import order_doubt
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints_folder

_SUFFIXES = (".pt", ".pth")


class Row(TypedDict("_Share", {"share": float})):
    """A checkpoint that was considered, as OUT.pt records it; `share` is its weight in the mean."""

    file: str
    sha256: str
    step: int
    weights: str


class ScoredRow(Row):
    """A row of the greedy soup: top-1 of the checkpoint alone and of the mean with it, in percent."""

    alone: float
    together: float
    kept: bool


@dataclasses.dataclass(frozen=True)
class Average:
    """Averaged weights.

    Attributes:
      weights: by name, with the types that the checkpoints have.
      kind: ema or raw.
      origin: the Ingredient's of the checkpoint that stands for all.
      table: a row for each checkpoint that was considered.
      found: what else OUT.pt records about the average.
    """

    weights: Weights
    kind: str
    origin: dict[str, Any]
    table: Sequence[Row]
    found: dict[str, Any] = dataclasses.field(default_factory=dict)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    try:
        with exit_on_user_error():
            average(options)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    helps = {
        "uniform": "all of them count alike",
        "ema": "a run's raw weights, as an EMA with another decay would have weighted them",
        "greedy": "the best on the validation split, and each next that does not make the mean worse",
    }
    for mode, says in helps.items():
        command = modes.add_parser(mode, help=says, description=says)
        command.add_argument("out", type=path_argument, metavar="OUT.pt", help="checkpoint to write")
        command.add_argument(
            "checkpoints", type=path_argument, nargs="+", metavar="CHECKPOINT", help="or a run's folder"
        )
        if mode == "ema":
            command.add_argument("--decay", type=float, required=True, help="decay of an update, in [0, 1)")
        else:
            command.add_argument("--weights", choices=KINDS, default="auto", help="auto: the EMA if there is one")
        if mode == "greedy":
            command.add_argument(
                "--data", type=path_argument, required=True, metavar="DATASET", help="its split val decides"
            )
    return parser.parse_args(arguments)


def average(options: argparse.Namespace) -> None:
    """Check, read, average, write, and print what was done."""
    paths = files_of(options.checkpoints)
    check_output(options.out, paths)
    if options.mode == "uniform":
        found = uniform(paths, options.weights)
    elif options.mode == "ema":
        found = ema(paths, options.decay)
    else:
        found = greedy(paths, options.weights, options.data)
    content = content_of(options.mode, found)
    check_fits(paths[0], content)  # All have the shapes of the first one.
    try:
        checkpoint.write(options.out, content)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{options.out}: cannot be written ({reason}). {advice_against(error, ROOM)}") from error
    _show(found)
    print(f"written to {options.out}: {found.kind} weights, in the name of step {found.origin['step']}")


def files_of(paths: list[Path]) -> list[Path]:
    """The checkpoints that files and folders of runs stand for.

    Raises:
      UserError: one is missing, or there twice.
    """
    files = []
    for path in paths:
        steps = checkpoint.checkpoints(checkpoints_folder(path)) if path.is_dir() else [path]
        if not steps or not path.exists():
            raise UserError(f"{path}: {'has no checkpoints/step-*.pt' if path.is_dir() else 'not found'}. Give others")
        files += steps
    twice = [path for path, count in collections.Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice, and would count twice. Give it once")
    return files


def check_output(out: Path, inputs: list[Path]) -> None:
    """Raise a UserError, before anything is read, if OUT.pt cannot or must not be written."""
    if any(out.resolve() == path.resolve() for path in inputs):
        raise UserError(f"{out}: is one of the checkpoints to average. Name another file")
    if out.name == checkpoint.BEST or out.match("step-*"):
        raise UserError(f"{out}: a name that runs give to their own checkpoints. Name another file")
    if out.suffix not in _SUFFIXES:
        raise UserError(f"{out}: a checkpoint's name ends in {' or '.join(_SUFFIXES)}. Name it so")
    check_parent_folder(out, str(out))


def content_of(mode: str, found: Average) -> dict[str, Any]:
    """The content of OUT.pt without its digest: that of a best.pt, and how the average was made."""
    how = {"how": mode, **found.found, "of": found.table}
    return {**found.origin, "weights": found.kind, "state_dict": found.weights, "average": how}


# --- averaging ---


def plus(sums: Weights, weights: Weights, factor: float) -> Weights:
    """Sums + factor x weights in float64; tensors that are not floating are those of the weights.

    BatchNorm's statistics are floating, and averaged like weights, as in the trainer's EMA.
    """
    return {
        name: sums.get(name, 0.0) + factor * value.double() if value.is_floating_point() else value
        for name, value in weights.items()
    }


def divided(sums: Weights, total: float, like: Weights) -> Weights:
    """Sums of `plus`, divided by the sum of the factors, in the types of `like`."""
    return {
        name: (value / total).to(like[name].dtype) if like[name].is_floating_point() else value
        for name, value in sums.items()
    }


def mean(paths: list[Path], factors: list[float], which: Kind) -> Average:
    """The weighted mean; the last checkpoint stands for all."""
    sums: Weights = {}
    table: list[Row] = []
    seen: list[Ingredient] = []
    weights: Weights = {}
    for each, factor in zip(read_alike(paths, which), factors, strict=True):
        weights = each.weights
        sums = plus(sums, weights, factor)
        table.append(_row(each, factor / sum(factors)))
        seen.append(dataclasses.replace(each, weights={}))
    last = seen[-1]
    return Average(divided(sums, sum(factors), weights), last.kind, last.origin, table, {"differ": differing(seen)})


def uniform(paths: list[Path], which: Kind) -> Average:
    """All checkpoints have the same weight."""
    return mean(paths, [1.0] * len(paths), which)


def ema(paths: list[Path], decay: float) -> Average:
    """A run's raw weights with the factors of `ema_weights`.

    Raises:
      UserError: the decay is out of its range, or the files are not all of one run.
    """
    if not 0 <= decay < 1:
        raise UserError(f"--decay is {decay}; it must lie in [0, 1)")
    for path in paths:
        if not re.fullmatch(r"step-\d+", path.stem) or path.absolute().parent != paths[0].absolute().parent:
            raise UserError(
                f"{path}: the average is over the steps of one run. Give its folder, or its step-N.pt alone"
            )
    paths = sorted(paths, key=checkpoint.step_of)
    steps = [checkpoint.step_of(path) for path in paths]
    factors = ema_weights(steps, decay)
    if len(steps) > 1 and factors[0] > 0.5:
        print(
            f"warning: {paths[0]}: gets {factors[0]:.0%}, as it stands for all steps before it, which --decay {decay} "
            "needs. Keep more checkpoints with run.keep_every, or give a lower --decay",
            file=sys.stderr,
        )
    found = mean(paths, factors, "raw")
    for row, step in zip(found.table, steps, strict=True):
        if row["step"] != step:
            raise UserError(f"{row['file']}: holds step {row['step']}. Give it the name that the run gave it")
    return dataclasses.replace(found, kind="ema", found={"decay": decay, **found.found})


def ema_weights(steps: list[int], decay: float) -> list[float]:
    """The weight of each checkpoint of a run in place of all the weights that an EMA with this decay saw.

    The EMA after step T holds the weights of step t with the factor (1 - d) d^(T - t), and d^T of the initial ones.
    A checkpoint stands for the steps after the previous one, (s_before, s], the first for all up to its own:

        the sum of (1 - d) d^(T - t) over t in (s_before, s] = d^(T - s) - d^(T - s_before),

    and d^(T - s) for the first. They sum to 1.

    Args:
      steps: increasing; T is the last.
    """
    upto = [decay ** (steps[-1] - step) for step in steps]
    return [factor - before for factor, before in zip(upto, [0.0, *upto[:-1]], strict=True)]


def greedy(paths: list[Path], which: Kind, data: Path) -> Average:
    """The greedy soup: from the best checkpoint on, each is kept whose mean with those before is not worse.

    The best one stands for all.

    Raises:
      UserError: there is no validation split, or it has classes that the model does not know.
    Source: Wortsman et al. 2022, arXiv 2203.05482, recipe 1; held-out accuracy is top-1 on the split val.
    """
    scorer = Scorer(data)
    scored, seen = _scored_alone(paths, which, scorer)
    best_row, *other_rows = scored
    best = read(Path(best_row["file"]), which)
    soup = load(None, best.path, weights=which)
    sums, kept, top1 = plus({}, best.weights, 1.0), 1, best_row["alone"]
    table: list[ScoredRow] = [{**best_row, "kept": True}]
    for row in other_rows:
        tried = plus(sums, read(Path(row["file"]), which).weights, 1.0)
        soup.module.load_state_dict(divided(tried, kept + 1, best.weights))
        together = scorer.top1(soup)
        is_kept = together >= top1
        table.append({**row, "together": together, "kept": is_kept})
        if is_kept:
            sums, kept, top1 = tried, kept + 1, together
    table = [{**row, "share": 1 / kept if row["kept"] else 0.0} for row in table]
    differ = differing([seen[row["file"]] for row in table if row["kept"]])
    found = {"dataset": scorer.digest, "top1": top1, "differ": differ}
    return Average(divided(sums, kept, best.weights), best.kind, best.origin, table, found)


def _scored_alone(paths: list[Path], which: Kind, scorer: "Scorer") -> tuple[list[ScoredRow], dict[str, Ingredient]]:
    """A row for each checkpoint with its own top-1, best first, and the checkpoints without weights by file."""
    rows: list[ScoredRow] = []
    seen: dict[str, Ingredient] = {}
    for each in read_alike(paths, which):
        scorer.check_classes_are_known(each)
        alone = scorer.top1(load(None, each.path, weights=which))
        rows.append({**_row(each, 0.0), "alone": alone, "together": alone, "kept": False})
        seen[str(each.path)] = dataclasses.replace(each, weights={})
        print(f"{each.path}: top-1 {alone:.2f} %", file=sys.stderr)
    # The sort is stable: of equals, the one that was given first stays first.
    return sorted(rows, key=lambda row: -row["alone"]), seen


class Scorer:
    """Top-1 on a dataset's validation split, as `python tools/evaluate.py` measures it.

    Attributes:
      digest: the split's.
    """

    def __init__(self, data: Path):
        self._data, self._index, self._names = data, read_index(data, "val"), list(read_manifest(data)["classes"])
        self._doubt = order_doubt(data)
        self.digest = self._index.digest

    def check_classes_are_known(self, each: Ingredient) -> None:
        """Raise a UserError if the dataset has a class that a checkpoint does not know."""
        unknown = sorted(set(self._names) - set(each.origin.get("classes") or self._names))
        if unknown:
            raise UserError(
                f"{each.path}: does not know class '{unknown[0]}' of {self._data}. Give a dataset of its own"
            )

    def top1(self, trained: TrainedModel) -> float:
        """In percent; damaged images count, in gray, and are reported."""
        order = trained.order_of(self._names, self._doubt)
        images = ImagesConfig(root=self._data)
        predictions, damaged = predict_split(
            trained, self._index, order, images=images, forward=ForwardConfig(), world=alone()
        )
        for sample, error in sorted(damaged.items()):
            print(f"counted in gray: {self._index.name(sample)}: {error}", file=sys.stderr)
        return metrics.accuracy(predictions)["top1"]


# --- the table ---


def _row(each: Ingredient, weight: float) -> Row:
    digest = sha256_of(each.path)
    step = each.origin["step"]
    return {"file": str(each.path), "sha256": digest, "step": step, "weights": each.kind, "share": weight}


def _show(found: Average) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    scored = ("top-1 % alone", "top-1 % with it") if "alone" in found.table[0] else ()
    for name in ("checkpoint", "step", "weights", "share %", *scored):
        table.add_column(name, justify="left" if name in ("checkpoint", "weights") else "right", overflow="fold")
    for row in found.table:
        percent = f"{100 * row['share']:.2f}" if row["share"] else "-"
        scores = [f"{value:.2f}" for name, value in row.items() if name in ("alone", "together")]
        table.add_row(escape(row["file"]), f"{row['step']:,}", row["weights"], percent, *scores)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    main()
