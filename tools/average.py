"""One model from several checkpoints of it: the mean of their weights, another moving average, or a greedy soup.

    python tools/average.py uniform OUT.pt CHECKPOINT-OR-RUN [...] [--weights ema|raw]
    python tools/average.py ema OUT.pt RUN --decay 0.9999
    python tools/average.py greedy OUT.pt CHECKPOINT-OR-RUN [...] --data DATASET [--weights ema|raw]

A run's folder stands for all its step-N.pt. OUT.pt is a checkpoint as a run's best.pt: whatever takes one takes it.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, TypedDict

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

from rich.text import Text

from pipelines.common.errors import ROOM, UserError, advice_against, clipped, exit_on_user_error
from pipelines.common.files import check_parent_folder, sha256_of
from pipelines.shards.index import read_index
from pipelines.shards.manifest import read_manifest
from tools.lib.average.ingredients import Ingredient, Weights, differing, read, read_alike
from tools.lib.common.arguments import path_argument
from tools.lib.common.evaluation import ForwardConfig, predict_split
from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from trainer.cluster.world import alone
from trainer.config.sections import ImagesConfig
from trainer.evaluation import metrics
from trainer.evaluation.trained import KINDS, Kind, TrainedModel, check_fits, load
from trainer.models.class_names import order_doubt
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints_folder


class Row(TypedDict):
    """A checkpoint that was considered, as OUT.pt records it.

    `fraction` is its weight in the mean. For the greedy soup `alone` and `together` are top-1 of the checkpoint and of
    the mean with it, in percent, and `kept` says whether it stayed in.
    """

    file: str
    sha256: str
    step: int
    weights: str
    fraction: float
    kept: bool
    alone: float | None
    together: float | None


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
        if mode == "ema":
            command.add_argument("checkpoints", type=path_argument, nargs=1, metavar="RUN", help="a run's folder")
            command.add_argument("--decay", type=float, required=True, help="decay of an update, in [0, 1)")
            continue
        what = "or a run's folder"
        command.add_argument("checkpoints", type=path_argument, nargs="+", metavar="CHECKPOINT", help=what)
        command.add_argument("--weights", choices=KINDS, default="auto", help="auto: the EMA if there is one")
        if mode == "greedy":
            what = "its split val decides"
            command.add_argument("--data", type=path_argument, required=True, metavar="DATASET", help=what)
    return parser.parse_args(arguments)


def average(options: argparse.Namespace) -> None:
    """Check, read, average, write, and print what was done."""
    paths = files_of(options.checkpoints)
    check_output(options.out, paths)
    if options.mode == "uniform":
        content = mean(paths, [1.0] * len(paths), options.weights)
    elif options.mode == "ema":
        content = ema(options.checkpoints[0], options.decay)
    else:
        content = greedy(paths, options.weights, options.data)
    content["average"]["how"] = options.mode
    check_fits(paths[0], content)  # All have the shapes of the first one.
    try:
        checkpoint.write(options.out, content)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError.
        reason, advice = clipped(error, 200), advice_against(error, ROOM)
        raise UserError(f"{options.out}: cannot be written ({reason}). {advice}") from error
    _show(content["average"]["of"])
    print(f"written to {options.out}: {content['weights']} weights, in the name of step {content['step']}")


def files_of(paths: list[Path]) -> list[Path]:
    """The checkpoints that files and folders of runs stand for.

    Raises:
      UserError: one is missing, or there twice.
    """
    files: list[Path] = []
    for path in paths:
        found = [path] if path.exists() else []
        if path.is_dir():
            found = checkpoint.checkpoints(checkpoints_folder(path))
        if not found:
            raise UserError(f"{path}: neither a checkpoint nor a run's folder with checkpoints/step-*.pt. Give others")
        files += found
    resolved = [file.resolve() for file in files]
    for file in resolved:
        if resolved.count(file) > 1:
            raise UserError(f"{file}: given twice, and would count twice. Give it once")
    return files


def check_output(out: Path, inputs: list[Path]) -> None:
    """Raise a UserError, before anything is read, if OUT.pt cannot or must not be written."""
    is_input = any(out.resolve() == path.resolve() for path in inputs)
    if is_input or out.name == checkpoint.BEST or out.match("step-*") or out.suffix not in (".pt", ".pth"):
        raise UserError(
            f"{out}: must be a new name that ends in .pt or .pth, neither one of the checkpoints to average nor a name "
            f"that runs give to their own, step-N.pt or {checkpoint.BEST}. Name another file"
        )
    check_parent_folder(out, str(out))


# --- averaging ---


def mean(paths: list[Path], factors: list[float], which: Kind) -> dict[str, Any]:
    """The weighted mean of checkpoints, as the content of OUT.pt but for its digest.

    Sums are in float64. BatchNorm's statistics are floating, and averaged like weights, as in the trainer's EMA. The
    last checkpoint stands for all: its tensors that are not floating, its step and settings are those of the mean.
    """
    sums: dict[str, Any] = {}
    rows: list[Row] = []
    seen: list[Ingredient] = []
    weights: Weights = {}
    total = sum(factors)
    for each, factor in zip(read_alike(paths, which), factors, strict=True):
        weights = each.weights
        for name, value in weights.items():
            if value.is_floating_point():
                sums[name] = sums.get(name, 0.0) + factor * value.double()
        rows.append(_row(each, factor / total))
        seen.append(dataclasses.replace(each, weights={}))
    made = {"weights": seen[-1].kind, "state_dict": _state(sums, total, weights)}
    return {**seen[-1].origin, **made, "average": {"differ": differing(seen), "of": rows}}


def _state(sums: Weights, total: float, weights: Weights) -> Weights:
    """The mean of which these are the sums; the types, and the tensors that have no sum, are those of `weights`."""
    return {name: (sums[name] / total).to(value.dtype) if name in sums else value for name, value in weights.items()}


def ema(run: Path, decay: float) -> dict[str, Any]:
    """The mean of a run's raw weights with the factors of `ema_weights`.

    Raises:
      UserError: the decay is out of its range, or a file is given instead of a run's folder.
    """
    if not 0 <= decay < 1:
        raise UserError(f"--decay is {decay}; it must lie in [0, 1)")
    if not run.is_dir():
        raise UserError(f"{run}: the average is over the steps of a run. Give its folder")
    paths = files_of([run])
    factors = ema_weights([checkpoint.step_of(path) for path in paths], decay)
    if len(paths) > 1 and factors[0] > 0.5:
        print(
            f"warning: {paths[0]}: gets {factors[0]:.0%}, as it stands for all steps before it, which --decay {decay} "
            "needs. Keep more checkpoints with run.keep_every, or give a lower --decay",
            file=sys.stderr,
        )
    content = mean(paths, factors, "raw")
    content["average"]["decay"] = decay
    return {**content, "weights": "ema"}


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


def greedy(paths: list[Path], which: Kind, data: Path) -> dict[str, Any]:
    """The greedy soup: from the best checkpoint on, each is kept whose mean with those before is not worse.

    The best one stands for all. Besides it, one checkpoint is in memory, and the sums of those that are kept.

    Raises:
      UserError: there is no validation split, or it has classes that the model does not know.
    Source: Wortsman et al. 2022, arXiv 2203.05482, recipe 1; held-out accuracy is top-1 on the split val.
    """
    scorer, rows, alone = Scorer(data), {}, {}
    for each in read_alike(paths, which):
        alone[each.path] = scorer.top1(load(None, each.path, weights=which))
        rows[each.path] = _row(each, 0.0)
        print(f"{each.path}: top-1 {alone[each.path]:.2f} %", file=sys.stderr)
    # The sort is stable: of equals, the one that was given first stays first.
    ordered = sorted(paths, key=lambda path: -alone[path])
    soup, best, top1 = load(None, ordered[0], weights=which), read(ordered[0], which), alone[ordered[0]]
    rows[best.path] |= {"alone": top1, "together": top1}
    sums = {name: value.double() for name, value in best.weights.items() if value.is_floating_point()}
    kept = [best]
    for path in ordered[1:]:
        each = read(path, which)
        tried = {name: value + each.weights[name].double() for name, value in sums.items()}
        soup.module.load_state_dict(_state(tried, len(kept) + 1, best.weights))
        together = scorer.top1(soup)
        rows[path] |= {"alone": alone[path], "together": together, "kept": together >= top1}
        if together >= top1:
            kept, sums, top1 = [*kept, dataclasses.replace(each, weights={})], tried, together
    for each in kept:
        rows[each.path]["fraction"] = 1 / len(kept)
    made = {"weights": best.kind, "state_dict": _state(sums, len(kept), best.weights)}
    about = {"differ": differing(kept), "dataset": scorer.digest, "top1": top1, "of": [rows[path] for path in ordered]}
    return {**best.origin, **made, "average": about}


class Scorer:
    """Top-1 on a dataset's validation split, as `python tools/evaluate.py` measures it.

    Attributes:
      digest: the split's.
    """

    def __init__(self, data: Path):
        self._data, self._index, self._names = data, read_index(data, "val"), list(read_manifest(data)["classes"])
        self._doubt = order_doubt(data)
        self.digest = self._index.digest

    def top1(self, trained: TrainedModel) -> float:
        """In percent; damaged images count, in gray, and are reported."""
        order, images = trained.order_of(self._names, self._doubt), ImagesConfig(root=self._data)
        predictions, damaged = predict_split(
            trained, self._index, order, images=images, forward=ForwardConfig(), world=alone()
        )
        for line in damaged:
            print(f"counted in gray: {line}", file=sys.stderr)
        return metrics.accuracy(predictions)["top1"]


# --- the table ---


def _row(each: Ingredient, fraction: float) -> Row:
    return {
        "file": str(each.path),
        "sha256": sha256_of(each.path),
        "step": each.origin["step"],
        "weights": each.kind,
        "fraction": fraction,
        "kept": True,
        "alone": None,
        "together": None,
    }


def _show(rows: list[Row]) -> None:
    headings = ["checkpoint", "step", "weights", "fraction"]
    if rows[0]["alone"] is not None:
        headings += ["top-1 % alone", "top-1 % with it"]
    cells = []
    for row in rows:
        scores = [f"{value:.2f}" for value in (row["alone"], row["together"]) if value is not None]
        cells.append([Text(row["file"]), f"{row['step']:,}", row["weights"], f"{row['fraction']:.4f}", *scores])
    console().print(terminal_table(headings, cells, text=(0, 2)))


if __name__ == "__main__":
    main()
