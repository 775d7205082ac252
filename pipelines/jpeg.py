"""This module reads the header of a JPEG without a decoder."""

import dataclasses

MAX_PIXELS = 1 << 27  # 134 megapixels; larger images are refused before they are decoded
# cjpeg takes no script of more than 100 scans. A decoder goes over all pixels for each, however few bytes it has:
# without a bound a file of three megabytes takes half an hour.
MOST_SCANS = 200
# Baseline, extended sequential and progressive Huffman coding; GPU decoders have no arithmetic or lossless coding.
_PLAIN_FRAMES = {0xC0, 0xC1, 0xC2}


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
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(content[position + i : position + i + 2], "big") for i in (5, 7))
            return JpegHeader(marker, height, width, content[position + 9], has_exif)
        else:
            has_exif |= marker == 0xE1 and content[position + 4 : position + 8] == b"Exif"
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return None


def has_too_many_scans(content: bytes) -> bool:
    """Whether a JPEG has more scans than any encoder writes. The marker cannot stand in a scan's own bytes."""
    return content[:2] == b"\xff\xd8" and content.count(b"\xff\xda") > MOST_SCANS


def is_plain(header: JpegHeader | None) -> bool:
    """Whether it is of a JPEG that every decoder reads alike: RGB or grayscale, baseline or progressive."""
    return header is not None and header.frame in _PLAIN_FRAMES and header.components in (1, 3)
