"""One image on its way into a shard: it is checked, repaired or rejected, and shrunk if asked for."""

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.common.errors import UserError
from pipelines.common.files import instead_of_content
from pipelines.shards.damage import open_with_pil
from pipelines.shards.jpeg import MAX_PIXELS, JpegHeader, check_scans, is_plain, read_jpeg_header

TINY_PX = 32  # Images with a shorter side than this are reported.
MAX_BYTES = 4 * MAX_PIXELS  # No encoded image has more; larger files are not read into memory.
_EXIF_ORIENTATION = 0x0112


class RejectedImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What is done to each image. Another choice is another conversion.

    Attributes:
      audit: decode every image in full; without it only headers are read, and damage behind them stays unnoticed.
      resize_short: images with a longer short side are shrunk to this many pixels; 0 leaves all sizes alone.
      quality: JPEG quality of shrunk images.
    """

    audit: bool = True
    resize_short: int = 0
    quality: int = 90

    def __post_init__(self):
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality is {self.quality}; JPEG's runs from 1 to 100")


@dataclasses.dataclass(frozen=True)
class CheckedImage:
    """A JPEG that every pipeline decodes alike.

    Attributes:
      jpeg: RGB or grayscale, baseline or progressive.
      height, width: pixels as stored.
      repaired: what was wrong with the source, or None where nothing was: its bytes are unchanged, or only shrunk.
      resized: whether it was shrunk.
      orientation: EXIF orientation of the source, 1 where it has none; recorded, never applied (0 to 255).
    """

    jpeg: bytes
    height: int
    width: int
    repaired: str | None
    resized: bool
    orientation: int


def check_image(content: bytes, options: ImageOptions) -> CheckedImage:
    """Check an image file's content and make a plain JPEG of it.

    RGB and grayscale JPEGs in baseline or progressive coding keep their bytes. Anything else that PIL decodes becomes
    an RGB JPEG of quality 95 without chroma subsampling, as `Image.convert("RGB")` gives it: what a loader of the image
    folder would have shown the model.

    Raises:
      RejectedImageError: empty, not an image, truncated, damaged, or of absurd dimensions.
    """
    if not content:
        raise RejectedImageError("empty file")
    if found := instead_of_content(content[:200]):
        raise RejectedImageError(found)
    header = read_jpeg_header(content)
    with warnings.catch_warnings(), rejecting():
        warnings.simplefilter("ignore")  # PIL warns of large images and unusual EXIF. Both are handled here.
        if header is not None and is_plain(header) and not options.audit and not _is_shrunk(header, options):
            check_dimensions(header.width, header.height)
            check_scans(content)
            orientation = _orientation(open_with_pil(content)) if header.has_exif else 1
            return CheckedImage(content, header.height, header.width, None, False, orientation)
        return _decode(content, header, options)


@contextlib.contextmanager
def rejecting() -> Iterator[None]:
    """Inside, whatever a decoder raises is a RejectedImageError."""
    try:
        yield
    except (RejectedImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise RejectedImageError("not an image") from error
    except Image.DecompressionBombError as error:
        raise RejectedImageError(f"absurd dimensions: {error}") from error
    except Exception as error:  # PIL's plugins raise errors of nearly any type about damaged files.
        raise RejectedImageError(f"cannot be decoded: {error}") from error


def opened(content: bytes) -> Image.Image:
    """An image file's content in PIL, which has read the header alone. Raises RejectedImageError if it is absurd."""
    image = open_with_pil(content)
    check_dimensions(*image.size)
    return image


def _is_shrunk(image: JpegHeader | Image.Image, options: ImageOptions) -> bool:
    return 0 < options.resize_short < min(image.height, image.width)


def _decode(content: bytes, header: JpegHeader | None, options: ImageOptions) -> CheckedImage:
    image = opened(content)
    orientation = _orientation(image) if header is None or header.has_exif else 1
    image.load()
    repaired = None if is_plain(header) and image.mode in ("RGB", "L") else _misfit(image, header)
    shrink = _is_shrunk(image, options)
    if not repaired and not shrink:
        return CheckedImage(content, image.height, image.width, None, False, orientation)
    pixels = plain_image(image)
    quality, subsampling = 95, "4:4:4"
    if shrink:
        pixels = _shrink(pixels, options.resize_short)
        quality, subsampling = options.quality, "4:2:0"
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return CheckedImage(buffer.getvalue(), pixels.height, pixels.width, repaired, shrink, orientation)


def check_dimensions(width: int, height: int) -> None:
    """Raise a RejectedImageError for more pixels than any photograph has, and for none."""
    if not 0 < width * height <= MAX_PIXELS:
        raise RejectedImageError(f"absurd dimensions: {width} x {height}")


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and 0 <= value < 256 else 1


def _misfit(image: Image.Image, header: JpegHeader | None) -> str:
    """Say what keeps an image's bytes from being used unchanged."""
    if header is None or image.format not in ("JPEG", "MPO"):
        return f"{image.format} image, mode {image.mode}"
    if image.mode not in ("RGB", "L"):
        return f"JPEG of mode {image.mode}"
    return f"JPEG coding SOF{header.frame - 0xC0}"


def plain_image(image: Image.Image) -> Image.Image:
    """RGB in 8 bits; grayscale JPEGs stay grayscale."""
    if image.mode.startswith("I"):
        # These have 16 bits a pixel. PIL would clip at 255 where everybody expects the upper eight bits.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "L" and image.format == "JPEG":
        return image
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def _shrink(image: Image.Image, short: int) -> Image.Image:
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
