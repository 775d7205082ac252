"""Reads the header of a JPEG and counts its scans, without a decoder."""

import dataclasses
import re

MAX_PIXELS = 1 << 27  # 134 megapixels; larger images are refused before they are decoded
# cjpeg accepts at most 100 scans. A decoder passes over all pixels once for each scan, however few bytes it has:
# without a bound a file of three megabytes takes half an hour.
MAX_SCANS = 200
# Baseline, extended sequential and progressive Huffman coding; GPU decoders have no arithmetic or lossless coding.
_PLAIN_FRAMES = {0xC0, 0xC1, 0xC2}
_START_OF_SCAN = b"\xff\xda"
# The markers of segments and of the end, without those that stand alone.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


@dataclasses.dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG.

    Attributes:
      frame: the marker of the frame header, 0xC0 to 0xCF: how it is coded.
      height, width: pixels.
      components: 1 is grayscale, 3 colour, 4 CMYK.
      has_exif: whether there is an EXIF segment.
    """

    frame: int
    height: int
    width: int
    components: int
    has_exif: bool


def read_jpeg_header(content: bytes | memoryview) -> JpegHeader | None:
    """The header of a JPEG, or None where the content is none. Source: ITU-T T.81, tables B.1 and B.2."""
    if content[:2] != b"\xff\xd8":
        return None
    position, has_exif = 2, False
    while position + 10 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF:  # This is a fill byte.
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(content[position + i : position + i + 2], "big") for i in (5, 7))
            return JpegHeader(marker, height, width, content[position + 9], has_exif)
        else:
            has_exif |= marker == 0xE1 and content[position + 4 : position + 8] == b"Exif"
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return None


def check_scans(content: bytes) -> None:
    """Raise a ValueError about a JPEG with more scans than any encoder writes."""
    if content[:2] == b"\xff\xd8" and content.count(_START_OF_SCAN) > MAX_SCANS < _num_scans(content):
        raise ValueError(f"more than {MAX_SCANS} scans, which no encoder writes")


def _num_scans(content: bytes) -> int:
    """Count the scans that a decoder finds in a JPEG. It looks neither into segments nor behind the end."""
    scans, position = 0, 2
    while found := _MARKER.search(content, position):
        marker = found[0][1]
        if marker == 0xD9:  # The image ends here.
            break
        scans += marker == _START_OF_SCAN[1]
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return scans


def is_plain(header: JpegHeader | None) -> bool:
    """Return whether every decoder reads a JPEG with this header alike: RGB or grayscale, baseline or progressive."""
    return header is not None and header.frame in _PLAIN_FRAMES and header.components in (1, 3)
