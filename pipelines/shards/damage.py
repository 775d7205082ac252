"""Encoded images that a decoder can be given without a second thought: damaged ones are noticed and replaced."""

import errno
import io
import threading
import time
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.shards.index import ShardIndex
from pipelines.shards.jpeg import check_scans, read_jpeg_header
from pipelines.shards.reader import ShardReader

MID_GRAY = 128
_PAUSES_S = (0.1, 1.0)  # before a read that failed is tried again


def raise_on_damage(index: ShardIndex) -> Callable[[int, str], None]:
    """For pipelines whose user wants no gray images: an `on_bad` that raises a UserError which names the sample."""

    def refuse(sample: int, error: str) -> None:
        raise UserError(f"{index.name(sample)}: {error}. Restore the shard: 'tools/shard_imagenet.py verify' checks it")

    return refuse


def open_with_pil(content: np.ndarray | bytes) -> Image.Image:
    """An encoded image of which PIL has read the header alone.

    Raises:
      Exception: nearly any, if the bytes are no image; a ValueError for a JPEG of absurdly many scans, and for EPS, a
        program that PIL has Ghostscript run.
    """
    content = bytes(content)
    check_scans(content)
    image = Image.open(io.BytesIO(content))
    if image.format == "EPS":
        raise ValueError("EPS is a program, not an image")
    return image


def decode_with_pil(encoded: np.ndarray | bytes) -> Image.Image:
    """RGB pixels as stored: EXIF orientation is not applied. What other decoders are held to."""
    return open_with_pil(encoded).convert("RGB")


def lossless(pixels: np.ndarray) -> np.ndarray:
    """Pixels, uint8 [height, width, 3], encoded so that every decoder gives them back: uint8 [nbytes]."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", compress_level=1)
    return np.frombuffer(encoded.getvalue(), dtype=np.uint8)


class CheckedReader:
    """The encoded image of each sample; mid-gray of the same size for a sample that is damaged.

    A sample is damaged if its bytes do not have the checksum of the index, if PIL cannot decode them (looked at where
    the dataset was made without an audit), if it has another size than the index says, or if the storage fails on it
    again and again. So it depends on what is stored, and neither on the crop nor on the batch or the run that first
    meets the sample. It is looked at when a sample is first read. Safe to call from several threads.

    Args:
      index: where the samples lie.
      on_bad: told (sample, what is wrong) once for each sample that is replaced.
    """

    def __init__(self, index: ShardIndex, on_bad: Callable[[int, str], None]):
        self._index = index
        self._on_bad = on_bad
        self._reader = ShardReader(index)
        self._intact = np.zeros(len(index), dtype=bool)
        self._replaced: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, samples: np.ndarray) -> list[np.ndarray]:
        """The encoded image of each sample: uint8 [nbytes].

        Raises:
          UserError: a shard is missing, or shorter than the index says.
        """
        return [self._read(sample) for sample in samples.tolist()]

    def will_need(self, samples: np.ndarray) -> None:
        """Start reading the samples from storage; returns at once."""
        self._reader.will_need(samples)

    def is_replaced(self, sample: int) -> bool:
        """Whether `read` gives something else than the stored bytes."""
        return sample in self._replaced

    def reject(self, sample: int, error: str, pixels: np.ndarray | None = None) -> None:
        """From now on `read` gives `pixels`, uint8 [height, width, 3], for the sample; mid-gray if there are none.
        A sample that was replaced before stays as it is.
        """
        if pixels is None:
            row = self._index.samples[sample]
            pixels = np.full((row["height"], row["width"], 3), MID_GRAY, dtype=np.uint8)
        encoded = lossless(pixels)
        with self._lock:
            if sample in self._replaced:
                return
            self._replaced[sample] = encoded
        self._on_bad(sample, error)

    def _read(self, sample: int) -> np.ndarray:
        if sample not in self._replaced and (content := self._stored(sample)) is not None:
            return content
        return self._replaced[sample]

    def _stored(self, sample: int) -> np.ndarray | None:
        """The stored bytes; None after they were found damaged."""
        for pause_s in (*_PAUSES_S, None):
            try:
                (content,) = self._reader.read(np.array([sample]))
                break
            except OSError as error:
                if error.errno != errno.EIO:
                    raise UserError(f"{self._index.name(sample)}: cannot be read ({error.strerror})") from error
                if pause_s is None:
                    return self.reject(sample, f"cannot be read ({error.strerror})")
                time.sleep(pause_s)
        if not self._intact[sample]:
            if damage := self._damage(sample, content):
                return self.reject(sample, damage)
            self._intact[sample] = True
        return content

    def _damage(self, sample: int, content: np.ndarray) -> str:
        """What is wrong with a sample's bytes, '' if nothing is."""
        row = self._index.samples[sample]
        if (found := zlib.crc32(content)) != (expected := int(row["crc32"])):
            return f"its bytes have changed (crc32 {found:08x}, the index has {expected:08x})"
        try:
            if self._index.audited:
                check_scans(bytes(content))
            else:
                decode_with_pil(content)  # which looks at the scans as well
            height, width = _size_of(content)
        except Exception as error:  # damaged bytes bring PIL to raise nearly anything
            return f"cannot be decoded ({error})"
        if (height, width) != (row["height"], row["width"]):  # the plan's crops are for the index's size
            return f"is {height} x {width}, the index says {row['height']} x {row['width']}"
        return ""


def _size_of(content: np.ndarray) -> tuple[int, int]:
    """Height and width of an encoded image, by its header. Raises nearly anything if the bytes are no image."""
    if header := read_jpeg_header(memoryview(content)):  # takes an eighth of PIL's time
        return header.height, header.width
    return open_with_pil(content).size[::-1]
