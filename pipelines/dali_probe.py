"""Finds the DALI decode path that works on this machine's GPU. A process of its own tries it, because it may crash."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.common.errors import UserError
from pipelines.config import PipelineConfig
from pipelines.shards.damage import CheckedReader, decode_with_pil
from pipelines.shards.index import ShardIndex

DECODE = "decode.json"  # In the folder of a run or a teacher store: what was found on a GPU, so it is tried once.
_TIMEOUT_S = 180
_TOLERANCE = 1.0  # mean difference of the two paths, in levels of 255
_TAKEN = "busy or unavailable"  # CUDA's words for a second process on a GPU in exclusive-process mode
# It is called with DEVICE PATH LOAD and an image on its standard input; exit status 0 says that the path works.
_PROGRAM = (sys.executable, "-m", "pipelines.dali_probe")


def probe_dataset(index: ShardIndex, device: str, config: PipelineConfig) -> tuple[Literal["roi", "full"], str]:
    """As `probe_decode`, with the first undamaged one of a dataset's first hundred images."""
    reader = CheckedReader(index, lambda sample, error: None)
    for sample in range(min(100, len(index))):
        (encoded,) = reader.read(np.array([sample]))
        if not reader.is_replaced(sample):
            return probe_decode(device, encoded, config)
    raise UserError(f"{index.paths[0]}: the first images are all damaged. Restore the shards")


def probe_decode(device: str, jpeg: np.ndarray, config: PipelineConfig) -> tuple[Literal["roi", "full"], str]:
    """The faster decode path that works, and why it was chosen.

    Region decoding has been seen to end the process with a segmentation fault (nvImageCodec 0.9 on H100), so another
    process tries it. A GPU in exclusive-process mode lets in no second process: there 'full' is chosen, untried.

    Args:
      device: as torch.device understands it.
      jpeg: the bytes of an image of the dataset, uint8 [nbytes].
      config: its `hw_decoder_load` is tried.
    Returns:
      'roi' or 'full', and a sentence.
    Raises:
      UserError: neither works.
    """
    regions = decode_failure(device, jpeg, "roi", config.hw_decoder_load)
    if not regions:
        return "roi", "it works"
    whole = decode_failure(device, jpeg, "full", config.hw_decoder_load)
    if not whole:
        return "full", f"decoding regions failed: {regions}"
    if _TAKEN in regions and _TAKEN in whole:
        return "full", f"untried, since the GPU lets in no second process ({whole})"
    raise UserError(
        f"DALI can decode neither regions ({regions}) nor whole images ({whole}) on {device}: look at the driver and "
        f"DALI's version, or use {config.option('hw_decoder_load', 0)} or {config.option('pipeline', 'torchvision')}"
    )


def decode_failure(device: str, jpeg: np.ndarray, path: str, hw_decoder_load: float) -> str:
    """Why a decode path, 'roi' or 'full', does not work, '' if it does. For the arguments see `probe_decode`."""
    command = [*_PROGRAM, device, path, str(hw_decoder_load)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, input=jpeg.tobytes(), capture_output=True, env=environment, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT_S} s"
    if done.returncode < 0:
        return f"it ended by {signal.Signals(-done.returncode).name}"
    last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return last_line or f"exit status {done.returncode}" if done.returncode else ""


def _main(device: str, path: str, hw_decoder_load: str) -> None:
    """Decode the same regions of the image on standard input here and with PIL. Exit with what is wrong, if it is."""
    import torch

    from pipelines.dali import decoded_regions

    jpeg = np.frombuffer(sys.stdin.buffer.read(), dtype=np.uint8)
    whole = np.asarray(decode_with_pil(jpeg))
    height, width = whole.shape[:2]
    crops = np.array(
        [[0, 0, height, width], [height // 3, width // 4, -(-height // 2), -(-width // 2)]], dtype=np.int32
    )
    regions = decoded_regions(jpeg, crops, torch.device(device), path, float(hw_decoder_load))
    for crop, ours in zip(crops, regions, strict=True):
        top, left, rows, columns = crop
        expected = whole[top : top + rows, left : left + columns]
        difference = abs(ours.astype(int) - expected).mean() if ours.shape == expected.shape else np.inf
        if difference > _TOLERANCE:
            sys.exit(f"its pixels differ by {difference:.1f} from PIL's")


if __name__ == "__main__":
    _main(*sys.argv[1:])
