"""quarantine.jsonl: the damaged samples that a run or a teacher store shows in gray, a line each."""

from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import split_json_lines

QUARANTINE = "quarantine.jsonl"
_LARGEST = 1 << 26  # bytes; a line has about 150, and a run stops long before half a million.
_MOST_OFFSET = 1 << 53  # bytes; no shard is as large.

Location = tuple[str, str, int]  # The split, the name of the shard, and the sample's offset in it.


def location(line: dict) -> Location:
    """Where the sample of a line lies; lines of different processes about one sample have the same location."""
    return line["split"], line["shard"], line["offset"]


def is_quarantine_line(line: object) -> bool:
    """True for a line of quarantine.jsonl: {"split", "shard", "key", "offset", "error"}."""
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("split", "shard")):
        return False
    offset = line.get("offset")
    return type(offset) is int and 0 <= offset < _MOST_OFFSET


def read_quarantine(path: Path) -> dict[Location, dict]:
    """The first line about each sample, in their order; {} without a file. Damaged lines are left out.

    Raises:
      UserError: the file is too long to be such a list.
    """
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise UserError(f"{path}: has more than {_LARGEST} bytes, so it is no list of damaged images. Move it away")
    named: dict[Location, dict] = {}
    for line in split_json_lines(path, is_quarantine_line)[0]:
        named.setdefault(location(line), line)
    return named
