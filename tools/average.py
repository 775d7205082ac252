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
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from pipelines.common.errors import ROOM, UserError, advice_against, exit_on_user_error
from pipelines.common.files import check_parent_folder, sha256_of
from pipelines.shards.index import read_index
from pipelines.shards.manifest import read_manifest
from tools.evaluate import EvalConfig, EvalDataConfig, outputs_of, predict_split
from tools.lib.common.arguments import path_argument
from trainer.cluster.world import alone
from trainer.evaluation import metrics
from trainer.evaluation import trained as inference
from trainer.evaluation.trained import KINDS, Trained
from trainer.models.checkpoint_format import is_of_trainer, not_finite
from trainer.models.class_names import order_doubt
from trainer.models.weights import read_file, select_weights
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints_folder
from trainer.state.checkpoint_settings import with_defaults

Weights = dict[str, torch.Tensor]
# What OUT.pt takes over from one of the checkpoints: what they say of their run.
_OF_THE_RUN = ("step", "format_version", "plan", "config", "audit", "classes", "software")
_SUFFIXES = (".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """A checkpoint's weights.

    Attributes:
      path: of the file.
      weights: by name; `kind` says which ones of the file: ema or raw.
      origin: what the file says of its run (_OF_THE_RUN).
      differ: settings in which the files differ that it is an average of; [] for a run's own checkpoint.
    """

    path: Path
    weights: Weights
    kind: str
    origin: dict
    differ: list[str]


@dataclasses.dataclass(frozen=True)
class Average:
    """Averaged weights.

    Attributes:
      weights: by name, of the types that the checkpoints have.
      kind: ema or raw.
      origin: as an Ingredient's, of the checkpoint that stands for all.
      table: for each checkpoint that was looked at what is to be told of it, the share that it has among them.
      found: what else OUT.pt says of how it came about.
    """

    weights: Weights
    kind: str
    origin: dict
    table: list[dict]
    found: dict = dataclasses.field(default_factory=dict)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    try:
        with exit_on_user_error():
            average(options)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    helps = {
        "uniform": "all of them count alike",
        "ema": "a run's raw weights, as a moving average with another decay would have weighted them",
        "greedy": "the best on the validation split, and each next that does not make the mean worse",
    }
    for mode, says in helps.items():
        command = modes.add_parser(mode, help=says, description=says)
        command.add_argument("out", type=path_argument, metavar="OUT.pt", help="checkpoint to write")
        command.add_argument(
            "checkpoints", type=path_argument, nargs="+", metavar="CHECKPOINT", help="or a run's folder"
        )
        if mode == "ema":
            command.add_argument("--decay", type=float, required=True, help="of an update; in [0, 1)")
        else:
            command.add_argument("--weights", choices=KINDS, default="auto", help="auto: the averaged, if there are")
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
    inference.check_fits(paths[0], content)  # all have the shapes of the first one
    try:
        checkpoint.write(options.out, content)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
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


def content_of(mode: str, found: Average) -> dict:
    """What OUT.pt holds but its digest: as best.pt, and how it came about."""
    how = {"how": mode, **found.found, "of": found.table}
    return {**found.origin, "weights": found.kind, "state_dict": found.weights, "average": how}


# --- reading ---


def read(path: Path, which: str) -> Ingredient:
    """One checkpoint's weights.

    Raises:
      UserError: it cannot be read, is damaged or not of this trainer, or its weights are not finite.
    """
    content = read_file(path)
    if not is_of_trainer(content):
        raise UserError(f"{path}: not a checkpoint of this trainer. Give step-N.pt, best.pt or a run's folder")
    weights, kind = select_weights(path, content, which)
    if name := not_finite(weights.items()):
        raise UserError(f"{path}: '{name}' is not finite, and no average with it would be. Leave the file out")
    differ = content.get("average", {}).get("differ", [])
    return Ingredient(path, weights, kind, {key: content[key] for key in _OF_THE_RUN if key in content}, differ)


def read_alike(paths: list[Path], which: str) -> Iterator[Ingredient]:
    """The checkpoints one after the other, only one of them and the first in the memory.

    Raises:
      UserError: as `read`, or one of them is not of the first one's model, or its weights not of the same kind.
    """
    first, console = None, Console(stderr=True)
    for path in track(paths, "reading", console=console, transient=True, disable=not console.is_terminal):
        each = read(path, which)
        first = first or each
        check_same_model(each, first)
        if each.kind != first.kind:
            raise UserError(
                f"{each.path}: gives {each.kind} weights, {first.path} {first.kind} ones. Choose with --weights ema or "
                "--weights raw, or leave one of them out"
            )
        yield each


def check_same_model(other: Ingredient, first: Ingredient) -> None:
    """Raise a UserError that names the first thing in which two checkpoints' models differ."""
    names = [f"{each.path}" for each in (other, first)]
    for key in ("name", "kwargs"):
        ours, theirs = (each.origin["config"]["student"].get(key) for each in (other, first))
        _check_equal(f"student.{key}", ours, theirs, *names)
    ours, theirs = (each.origin.get("classes") or [] for each in (other, first))
    _check_equal("the number of classes", len(ours), len(theirs), *names)
    for output, pair in enumerate(zip(ours, theirs, strict=True)):
        _check_equal(f"the class of output {output}", *pair, *names)
    ours, theirs = ({name: list(value.shape) for name, value in each.weights.items()} for each in (other, first))
    for name in [*theirs, *ours]:
        _check_equal(f"the shape of '{name}'", ours.get(name), theirs.get(name), *names)


def _check_equal(what: str, ours: object, theirs: object, path: str, other: str) -> None:
    if ours != theirs:
        raise UserError(
            f"{path}: of another model than {other}: {what} is {ours}, there it is {theirs}. Average checkpoints of "
            "one model"
        )


def differing(parts: list[Ingredient]) -> list[str]:
    """In what the runs of checkpoints differ: run.seed, optim.lr, ...; plan.dataset is the dataset's digest.

    Runs that differ in nothing else have another run.out; [] says that the checkpoints are of one run.
    """
    found = {name for each in parts for name in each.differ}
    first, *others = map(_settings, parts)
    for other in others:
        found |= {name for name in {**first, **other} if first.get(name) != other.get(name)}
    return sorted(found)


def _settings(each: Ingredient) -> dict[str, object]:
    config = with_defaults(each.origin["config"])
    settings = {f"{section}.{name}": value for section, values in config.items() for name, value in values.items()}
    return {**settings, "plan.dataset": each.origin.get("plan", {}).get("dataset")}


# --- averaging ---


def plus(sums: Weights, weights: Weights, share: float) -> Weights:
    """Sums + share x weights in float64; tensors that are not floating are those of the weights.

    BatchNorm's statistics are floating, and averaged like weights, as in the trainer's own moving average.
    """
    return {
        name: sums.get(name, 0.0) + share * value.double() if value.is_floating_point() else value
        for name, value in weights.items()
    }


def divided(sums: Weights, total: float, like: Weights) -> Weights:
    """What `plus` made, divided by the sum of the shares, in the types of `like`."""
    return {
        name: (value / total).to(like[name].dtype) if like[name].is_floating_point() else value
        for name, value in sums.items()
    }


def mean(paths: list[Path], shares: list[float], which: str) -> Average:
    """The weighted mean; the last checkpoint stands for all."""
    sums, table, seen = {}, [], []
    for each, share in zip(read_alike(paths, which), shares, strict=True):
        sums = plus(sums, each.weights, share)
        table.append({**_row(each), "share": share / sum(shares)})
        seen.append(dataclasses.replace(each, weights={}))
    return Average(divided(sums, sum(shares), each.weights), each.kind, each.origin, table, {"differ": differing(seen)})


def uniform(paths: list[Path], which: str) -> Average:
    """All checkpoints count alike."""
    return mean(paths, [1.0] * len(paths), which)


def ema(paths: list[Path], decay: float) -> Average:
    """A run's raw weights, as `ema_weights` weights them.

    Raises:
      UserError: the decay is none, or the files are not all of one run.
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
    shares = ema_weights(steps, decay)
    if len(steps) > 1 and shares[0] > 0.5:
        print(
            f"warning: {paths[0]}: gets {shares[0]:.0%}, as it stands for all steps before it, which --decay {decay} "
            "needs. Keep more checkpoints with run.keep_every, or give a lower --decay",
            file=sys.stderr,
        )
    found = mean(paths, shares, "raw")
    for row, step in zip(found.table, steps, strict=True):
        if row["step"] != step:
            raise UserError(f"{row['file']}: holds step {row['step']}. Give it the name that the run gave it")
    return dataclasses.replace(found, kind="ema", found={"decay": decay, **found.found})


def ema_weights(steps: list[int], decay: float) -> list[float]:
    """How much each checkpoint of a run counts in place of all the weights that an average with this decay saw.

    The average after step T holds the weights of step t with the share (1 - d) d^(T - t), and d^T of the initial ones.
    A checkpoint stands for the steps after the one before it, (s_before, s], the first for all up to its own:

        the sum of (1 - d) d^(T - t) over t in (s_before, s] = d^(T - s) - d^(T - s_before),

    and d^(T - s) for the first. They sum to 1.

    Args:
      steps: increasing; T is the last.
    """
    upto = [decay ** (steps[-1] - step) for step in steps]
    return [share - before for share, before in zip(upto, [0.0, *upto[:-1]], strict=True)]


def greedy(paths: list[Path], which: str, data: Path) -> Average:
    """The greedy soup: from the best checkpoint on, each is kept whose mean with those before is not worse.

    The best one stands for all.

    Raises:
      UserError: there is no validation split, or it has classes that the model does not know.
    Source: Wortsman et al. 2022, arXiv 2203.05482, recipe 1; held-out accuracy is top-1 on the split val.
    """
    scorer = Scorer(data)
    rows, seen = [], {}
    for each in read_alike(paths, which):
        scorer.check_classes_are_known(each)
        alone = scorer.top1(inference.load(None, each.path, weights=which))
        rows.append({**_row(each), "alone": alone})
        seen[str(each.path)] = dataclasses.replace(each, weights={})
        print(f"{each.path}: top-1 {alone:.2f} %", file=sys.stderr)
    rows.sort(key=lambda row: -row["alone"])  # stable: of equals the one that was given first
    by_name = {str(path): path for path in paths}
    best = read(by_name[rows[0]["file"]], which)
    soup = inference.load(None, best.path, weights=which)
    sums, kept, top1 = plus({}, best.weights, 1.0), 1, rows[0]["alone"]
    rows[0].update(together=top1, kept=True)
    for row in rows[1:]:
        tried = plus(sums, read(by_name[row["file"]], which).weights, 1.0)
        soup.model.load_state_dict(divided(tried, kept + 1, best.weights))
        together = scorer.top1(soup)
        row.update(together=together, kept=together >= top1)
        if row["kept"]:
            sums, kept, top1 = tried, kept + 1, together
    table = [{**row, "share": row["kept"] / kept} for row in rows]
    weights = divided(sums, kept, best.weights)
    differ = differing([seen[row["file"]] for row in table if row["kept"]])
    found = {"dataset": scorer.digest, "top1": top1, "differ": differ}
    return Average(weights, best.kind, best.origin, table, found)


class Scorer:
    """Top-1 on a dataset's validation split, as `python tools/evaluate.py` finds it.

    Attributes:
      digest: of the split.
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

    def top1(self, trained: Trained) -> float:
        """In percent; damaged images count, in gray, and are told."""
        damaged: dict[int, str] = {}
        world = alone()
        config = EvalConfig(data=EvalDataConfig(root=self._data))
        order = outputs_of(self._names, trained, self._doubt, option="")
        found = metrics.summary(predict_split(trained, self._index, order, config, world, damaged))
        for sample, error in sorted(damaged.items()):
            print(f"counted in gray: {self._index.name(sample)}: {error}", file=sys.stderr)
        return found["top1"]


# --- telling ---


def _row(each: Ingredient) -> dict:
    digest = sha256_of(each.path)
    return {"file": str(each.path), "sha256": digest, "step": each.origin["step"], "weights": each.kind}


def _show(found: Average) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    scored = "alone" in found.table[0]
    for name in ("checkpoint", "step", "weights", "share %", *(("top-1 % alone", "top-1 % with it") if scored else ())):
        table.add_column(name, justify="left" if name in ("checkpoint", "weights") else "right", overflow="fold")
    for row in found.table:
        share = f"{100 * row['share']:.2f}" if row["share"] else "-"
        scores = [f"{row[name]:.2f}" for name in ("alone", "together")] if scored else []
        table.add_row(escape(row["file"]), f"{row['step']:,}", row["weights"], share, *scores)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    main()
