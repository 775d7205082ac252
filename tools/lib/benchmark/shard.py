"""Writing a shard on one core: without the audit against tar, with it against decoding alone."""

import io
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from tools.lib.common.photos import write_common_photographs
from tools.lib.common.timing import interleaved, ratio, timed
from tools.lib.shards.images import ImageOptions
from tools.lib.shards.shard import write_shard
from tools.lib.shards.sources import open_source
from tools.lib.shards.sources.source import SourceOptions

COLUMNS = {
    "what": "what",
    "images_per_s": "images/s",
    "mb_per_s": "MB/s",
    "spread": "spread",
    "ratio": "ratio",
    "of": "of",
}


def shard(images: int, repeats: int) -> list[dict]:
    """The rows of the benchmark: one for each way to write or read `images` photographs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = write_common_photographs(folder / "src", images)
        source = open_source(folder / "src", SourceOptions("folder"), folder)
        entries = list(source.splits["train"]())
        names = folder / "names"
        names.write_text("".join(f"{path.relative_to(folder / 'src')}\n" for path in paths))

        def ours(audit: bool) -> None:
            (folder / "records").mkdir(exist_ok=True)
            write_shard(folder / "ours.tar", folder / "records", entries, source.read, ImageOptions(audit=audit))

        def tar() -> None:
            subprocess.run(["tar", "cf", folder / "tar.tar", "-C", folder / "src", "-T", names], check=True)
            descriptor = os.open(folder / "tar.tar", os.O_RDONLY)
            os.fsync(descriptor)  # a shard is on the disk before it counts
            os.close(descriptor)

        def decode() -> None:
            for path in paths:
                Image.open(io.BytesIO(path.read_bytes())).load()

        candidates = {
            "tar cf, then fsync": timed(tar),
            "ours, audit off": timed(lambda: ours(False)),
            "decoding alone (PIL)": timed(decode),
            "ours, audit on": timed(lambda: ours(True)),
        }
        seconds = interleaved(candidates, repeats)
        num_bytes = sum(path.stat().st_size for path in paths)
        shutil.rmtree(folder / "src")
    against = {"ours, audit off": "tar cf, then fsync", "ours, audit on": "decoding alone (PIL)"}
    return [
        {
            "what": name,
            "images_per_s": round(images / statistics.median(times)),
            "mb_per_s": round(num_bytes / statistics.median(times) / 1e6, 1),
            "spread": round((max(times) - min(times)) / statistics.median(times), 3),
            **({"ratio": ratio(seconds[against[name]], times), "of": against[name]} if name in against else {}),
        }
        for name, times in seconds.items()
    ]
