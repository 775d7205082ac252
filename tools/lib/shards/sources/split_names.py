"""The names of shards and parquet files state a split, as in train-00000-of-00002, and how many files it has."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from tools.lib.shards.sources.contents import printable
from tools.lib.shards.sources.source import MISPLACED, VAL_NAMES, Unused

SPLIT_WORDS = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(VAL_NAMES, "val"),
}  # These words in a name mean a split.
_NUMBER = re.compile(r"(\d{1,6})([-_]of[-_])(\d{1,6})(?!\d)")
_MISSING = "not there, though the names of the others count it: download it"


def split_words(name: str) -> list[str]:
    """The words of a name that mean a split, as spelled; words are separated by anything but letters."""
    return [word for word in re.findall(r"[A-Za-z]+", name) if word.lower() in SPLIT_WORDS]


def named_split(name: str) -> str:
    """The split that a file's name states; "" where it states none, or more than one."""
    splits = {SPLIT_WORDS[word.lower()] for word in split_words(name)}
    return splits.pop() if len(splits) == 1 else ""


def of_other_splits(names: list[str], split: str) -> dict[str, str]:
    """The names that state another split than that of their folder, and which one.

    Where all of the folder do, the word is taken for the dataset's own name.
    """
    others = {name: stated for name in names if (stated := named_split(name)) not in ("", split)}
    return others if len(others) < len(names) else {}


def sorting_commands(names: list[str]) -> str:
    """Commands of the shell that move files into train/ and val/ by the split of their names; "" if no pattern fits."""
    commands = []
    for split in ("train", "val"):
        ours = [name for name in names if named_split(name) == split]
        patterns = sorted({f"*{word}*.tar" for name in ours for word in split_words(name)})
        if {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)} != set(ours):
            return ""
        if ours:
            commands.append(f"mkdir -p {split}; mv {' '.join(patterns)} {split}/")
    return "; ".join(commands)


def missing_files(taken: Iterable[str], there: Iterable[str]) -> Iterator[Unused]:
    """Yields the files that the names of others count, as train-00000-of-00002 does, and that are not there.

    Numbers begin at 0; at 1, if that makes the set complete at its end.

    Args:
      taken: paths of the files that are read.
      there: paths of all files, of which some may be compressed or half downloaded.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    for path in there:
        if match := _NUMBER.search(path, path.rfind("/") + 1):
            numbers.setdefault((path[: match.start()], match[3]), set()).add(int(match[1]))
    done = set()
    for path in taken:
        match = _NUMBER.search(path, path.rfind("/") + 1)
        if match is None or (group := (path[: match.start()], match[3])) in done:
            continue
        done.add(group)
        found, count, end = numbers[group], int(match[3]), path.rpartition(".")[2]
        first = int(count in found and 0 not in found)
        for number in range(first, count + first):
            if number not in found:
                name = f"{group[0]}{number:0{len(match[1])}d}{match[2]}{match[3]}.{end}"
                yield Unused(MISPLACED, printable(name), _MISSING)
