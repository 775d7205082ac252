"""The names of shards and parquet files state a split, as in train-00000-of-00002, and how many files it has."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from tools.lib.shards.sources.contents import printable
from tools.lib.shards.sources.source import MISPLACED, Unused

# These words in a name mean a split.
SPLIT_WORDS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_NUMBER = re.compile(r"\d{1,6}([-_]of[-_]\d{1,6})(?!\d)")


def missing_files(paths: Iterable[str]) -> Iterator[Unused]:
    """Yield a pattern for the files that are missing where names count them, as train-00000-of-00002 does."""
    there: Counter[str] = Counter()
    for path in paths:
        if match := _NUMBER.search(path, path.rfind("/") + 1):
            there[f"{path[: match.start()]}*{match[1]}*"] += 1
    for pattern, count in there.items():
        total = int(re.findall(r"\d+", pattern)[-1])
        if count < total:
            yield Unused(MISPLACED, printable(pattern), f"{count} of {total} files are there: download the others")


def of_other_splits(names: list[str], split: str) -> list[str]:
    """The names that state another split than that of their folder.

    Where all of the folder do, the word is taken for the dataset's own name.
    """
    stated = {name: {SPLIT_WORDS.get(word) for word in re.findall("[a-z]+", name.lower())} - {None} for name in names}
    others = [name for name, splits in stated.items() if len(splits) == 1 and split not in splits]
    return others if len(others) < len(names) else []
