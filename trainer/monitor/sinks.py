"""TensorBoard and Weights & Biases, through their own libraries: they get what metrics.jsonl gets.

The first record of a session is of the kind "session".
"""

import importlib
import secrets
from collections.abc import Iterator
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.files import write_synced
from trainer.config.sections import Config, to_dict

WANDB_ID = "wandb-id.txt"


def scalars(record: dict) -> Iterator[tuple[str, float]]:
    """The numbers of a train or eval record: train/loss, eval/raw/top1 and so on."""
    if record["kind"] not in ("train", "eval"):
        return
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{record['kind']}/{name}/{part}", number) for part, number in value.items())
        elif name not in ("kind", "step", "time"):
            yield f"{record['kind']}/{name}", value


class TensorBoard:
    """Writes event files to RUN/tensorboard. After a rollback, TensorBoard drops the later steps."""

    def __init__(self, config: Config):
        self._library = _imported("torch.utils.tensorboard", package="tensorboard")
        self._folder = config.run.out / "tensorboard"
        self._writer: Any = None

    def __call__(self, record: dict) -> None:
        """Write the numbers of a record."""
        if record["kind"] in ("session", "rollback"):
            self.close()
            self._writer = self._library.SummaryWriter(str(self._folder), purge_step=record["step"] + 1)
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Sends to wandb.ai, or writes to RUN/wandb where WANDB_MODE is offline; one run there for all sessions.

    Its step only counts records, so that nothing is refused after the run went back; the axis of all curves is `step`.
    """

    def __init__(self, config: Config):
        self._library = _imported("wandb", package="wandb")
        self._config = config
        self._run: Any = None

    def __call__(self, record: dict) -> None:
        """Send the numbers of a record."""
        if record["kind"] == "session":
            self._open()
        if values := dict(scalars(record)):
            self._run.log({"step": record["step"], **values})

    def close(self) -> None:
        """Finish the session's part of the run."""
        if self._run is not None:
            self._run.finish()

    def _open(self) -> None:
        folder = self._config.run.out
        id_file = folder / WANDB_ID
        if not id_file.exists():
            write_synced(id_file, secrets.token_hex(8).encode())
        try:
            self._run = self._library.init(
                dir=folder,
                id=id_file.read_text(),
                resume="allow",
                name=folder.name,
                config=to_dict(self._config),
                settings=self._library.Settings(console="off"),  # The progress line is no log.
            )
        except self._library.errors.Error as error:
            advice = "Call 'wandb login' once, set WANDB_MODE=offline, or leave wandb out"
            raise UserError(f"run.loggers: wandb does not start ({error}). {advice}") from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")


Sink = TensorBoard | WandB
_SINKS = {"tensorboard": TensorBoard, "wandb": WandB}


def open_sinks(config: Config) -> list[Sink]:
    """The loggers in run.loggers. They write nothing before they get a record.

    Raises:
      UserError: a library is not installed.
    """
    return [_SINKS[name](config) for name in config.run.loggers]


def _imported(module: str, *, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        advice = f"Install it: pip install {package}; or leave it out"
        raise UserError(f"run.loggers: {package} cannot be imported ({error}). {advice}") from error
