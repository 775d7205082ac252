"""Reads encoded images, verifies them, and replaces damaged ones by mid-gray."""

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
_PAUSES_S = (0.1, 1.0)  # A read that failed is tried again after each of these pauses.
OnDamage = Callable[[int, str], None]  # It is called with a sample that is replaced, and what is wrong with it.


def raise_on_damage(index: ShardIndex) -> OnDamage:
    """For pipelines whose user wants no gray images: an `on_damage` that raises a UserError which names the sample."""

    def raise_error(sample: int, error: str) -> None:
        raise UserError(f"{index.name(sample)}: {error}. Restore the shard", help_with="checking")

    return raise_error


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
    """RGB pixels as stored: EXIF orientation is not applied. Other decoders are compared with these."""
    return open_with_pil(encoded).convert("RGB")


def lossless(pixels: np.ndarray) -> np.ndarray:
    """Pixels, uint8 [height, width, 3], encoded so that every decoder gives them back: uint8 [nbytes]."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", compress_level=1)
    return np.frombuffer(encoded.getvalue(), dtype=np.uint8)


class CheckedReader:
    """The encoded image of each sample; mid-gray of the same size for a sample that is damaged.

    A sample is damaged if its bytes do not have the checksum of the index, if PIL cannot decode them (this is tried
    where the dataset was made without an audit), if it has another size than the index says, or if the storage fails
    on it again and again. So damage depends on what is stored, and neither on the crop nor on the batch or the run
    that first meets the sample. A sample is checked when it is first read. Safe to call from several threads.

    Args:
      index: where the samples lie.
      on_damage: called with (sample, what is wrong) once for each sample that is replaced.
    """

    def __init__(self, index: ShardIndex, on_damage: OnDamage):
        self._index = index
        self._on_damage = on_damage
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
        """Return whether `read` gives something else than the stored bytes."""
        return sample in self._replaced

    def reject(self, sample: int, error: str, pixels: np.ndarray | None = None) -> None:
        """Let `read` give `pixels`, uint8 [height, width, 3], for the sample from now on; mid-gray if there are none.

        A sample that was replaced before keeps its replacement.
        """
        if pixels is None:
            row = self._index.samples[sample]
            pixels = np.full((row["height"], row["width"], 3), MID_GRAY, dtype=np.uint8)
        encoded = lossless(pixels)
        with self._lock:
            if sample in self._replaced:
                return
            self._replaced[sample] = encoded
        self._on_damage(sample, error)

    def _read(self, sample: int) -> np.ndarray:
        if sample not in self._replaced and (content := self._content(sample)) is not None:
            damage = "" if self._intact[sample] else self._damage(sample, content)
            if not damage:
                self._intact[sample] = True
                return content
            self.reject(sample, damage)
        return self._replaced[sample]

    def _content(self, sample: int) -> np.ndarray | None:
        """The stored bytes, not checked; None after the storage has failed on them again and again."""
        for pause_s in (*_PAUSES_S, None):
            try:
                return self._reader.read(np.array([sample]))[0]
            except OSError as error:
                if error.errno != errno.EIO:
                    raise UserError(f"{self._index.name(sample)}: cannot be read ({error.strerror})") from error
                if pause_s is None:
                    return self.reject(sample, f"cannot be read ({error.strerror})")
                time.sleep(pause_s)

    def _damage(self, sample: int, content: np.ndarray) -> str:
        """What is wrong with a sample's bytes, '' if nothing is."""
        row = self._index.samples[sample]
        if (found := zlib.crc32(content.data)) != (expected := int(row["crc32"])):
            return f"its bytes have changed (crc32 {found:08x}, the index has {expected:08x})"
        try:
            if self._index.audited and (header := read_jpeg_header(content.data)):  # An eighth of PIL's time.
                check_scans(bytes(content))
                height, width = header.height, header.width
            else:
                width, height = decode_with_pil(content).size
        except Exception as error:  # Damaged bytes bring PIL to raise nearly anything.
            return f"cannot be decoded ({error})"
        if (height, width) != (row["height"], row["width"]):  # The plan's crops are for the index's size.
            return f"is {height} x {width}, the index says {row['height']} x {row['width']}"
        return ""
