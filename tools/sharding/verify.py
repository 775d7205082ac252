"""Is a dataset still what was written, and what is in it."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from pipelines.files import sha256_of
from pipelines.index import INDEX, MANIFEST, read_manifest
from tools.sharding.images import ImageOptions, RejectedImageError, check_image
from tools.sharding.shards import BLOCK, dali_index, tar_header, tar_members


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that is not as it was written.

    Attributes:
      file: relative to the dataset folder.
      where: sample and bytes, as closely as they can be told.
      what: what was found.
    """

    file: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where + ': ' if self.where else ''}{self.what}"


def verify(
    root: Path, *, decode: bool = False, workers: int = 1, on_shard: Callable[[int, int], None] = lambda i, n: None
) -> list[Fault]:
    """Re-read everything and compare it with the manifest.

    Args:
      decode: also decode every image.
      on_shard: told how many shards are done, of how many.
    Returns:
      The faults, [] if there are none.
    Raises:
      UserError: there is no manifest, or it is damaged, so there is nothing to compare with.
    """
    manifest = read_manifest(root)
    faults, jobs = [], []
    known = {MANIFEST}
    for split, entry in manifest["splits"].items():
        rows, fault = _read_index(root, split, entry)
        faults += fault
        known.add(f"{split}/{INDEX}")
        for number, shard in enumerate(entry["shards"]):
            name = shard["name"]
            known |= {f"{split}/{name}", f"{split}/{Path(name).with_suffix('.idx')}"}
            mine = None if rows is None else rows[rows["shard"] == number]
            jobs.append((root, split, shard, mine, decode, manifest["source"]["kind"] != "webdataset"))
    faults += [
        Fault(str(path.relative_to(root)), "", "is not in the manifest; remove it, or verify the folder it came from")
        for path in sorted(root.rglob("*"))
        if path.is_file() and str(path.relative_to(root)) not in known
    ]
    with ProcessPoolExecutor(workers) as pool:
        for number, found in enumerate(pool.map(_verify_shard, *zip(*jobs, strict=True))):
            faults += found
            on_shard(number + 1, len(jobs))
    return faults


def _read_index(root: Path, split: str, entry: dict) -> tuple[np.ndarray | None, list[Fault]]:
    path = root / split / INDEX
    name = f"{split}/{INDEX}"
    if not path.is_file():
        return None, [Fault(name, "", "missing")]
    if sha256_of(path) == entry["index_sha256"]:
        return np.load(path, mmap_mode="r", allow_pickle=False), []
    return None, [Fault(name, "", f"{path.stat().st_size} bytes that are not those of the manifest: damaged or stale")]


def _verify_shard(
    root: Path, split: str, shard: dict, rows: np.ndarray | None, decode: bool, ours: bool
) -> list[Fault]:
    path = root / split / shard["name"]
    name = f"{split}/{shard['name']}"
    if not path.is_file():
        return [Fault(name, "", "missing")]
    faults = []
    if path.stat().st_size != shard["bytes"]:
        faults.append(Fault(name, "", f"{path.stat().st_size} bytes, the manifest says {shard['bytes']}"))
    if sha256_of(path) != shard["sha256"]:
        found = list(_locate(path, name, rows) if ours else _locate_images(path, name, rows))
        faults += found or [Fault(name, "", "its hash is not the manifest's: swapped for another shard, or rewritten")]
    else:
        faults += _verify_idx(path, name)
    if decode and rows is not None and not faults:
        faults += _decode(path, name, rows)
    return faults


def _verify_idx(path: Path, name: str) -> list[Fault]:
    idx = path.with_suffix(".idx")
    idx_name = str(Path(name).with_suffix(".idx"))
    if not idx.is_file():
        return [Fault(idx_name, "", "missing")]
    found, expected = idx.read_bytes(), dali_index(tar_members(path))
    if found == expected:
        return []
    first = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    line = expected[:first].count(b"\n") + 1
    return [Fault(idx_name, f"line {line}, byte {first}", "does not describe its shard: damaged or stale")]


def _locate(path: Path, name: str, rows: np.ndarray | None) -> Iterator[Fault]:
    """Where in a damaged shard the damage is: the samples, headers and padding that are not as they were."""
    if rows is None:
        return
    content = path.read_bytes()
    position = 0
    for row in rows:
        key, label = row["key"].decode(), str(int(row["label"])).encode()
        for member, size, intact in (
            (f"{key}.cls", len(label), lambda data, label=label: data == label),
            (f"{key}.jpg", int(row["nbytes"]), lambda data, crc32=row["crc32"]: zlib.crc32(data) == crc32),
        ):
            header = tar_header(member, size)
            start = position + len(header)
            stop = start + size
            position = stop + -size % BLOCK
            if len(content) < position:
                yield Fault(name, f"sample {key}, byte {len(content)}", "the shard ends here")
                return
            if content[start - len(header) : start] != header:
                where = f"sample {key}, bytes {start - len(header)} to {start}"
                yield Fault(name, where, f"the tar header of {member} is damaged")
            if not intact(content[start:stop]):
                yield Fault(name, f"sample {key}, bytes {start} to {stop}", f"the content of {member} is damaged")
            yield from _check_zeros(content, name, f"the padding after {member}", stop, position)
    yield from _check_zeros(content, name, "the end of the tar", position, len(content))


def _check_zeros(content: bytes, name: str, what: str, start: int, stop: int) -> Iterator[Fault]:
    rest = content[start:stop]
    if rest.strip(b"\0"):
        yield Fault(name, f"byte {start + len(rest) - len(rest.lstrip(bytes(1)))}", f"{what} is damaged")


def _locate_images(path: Path, name: str, rows: np.ndarray | None) -> Iterator[Fault]:
    """As `_locate` for tars of another writer, of which only the images' places are known."""
    content = path.read_bytes()
    for row in rows if rows is not None else ():
        start, stop = int(row["offset"]), int(row["offset"] + row["nbytes"])
        if zlib.crc32(content[start:stop]) != row["crc32"]:
            yield Fault(name, f"sample {row['key'].decode()}, bytes {start} to {stop}", "its image is damaged")


def _decode(path: Path, name: str, rows: np.ndarray) -> list[Fault]:
    content = np.memmap(path, dtype=np.uint8, mode="r")
    faults = []
    for row in rows:
        where = f"sample {row['key'].decode()}, bytes {row['offset']} to {row['offset'] + row['nbytes']}"
        try:
            image = check_image(content[row["offset"] : row["offset"] + row["nbytes"]].tobytes(), ImageOptions())
        except RejectedImageError as error:
            faults.append(Fault(name, where, str(error)))
            continue
        if (image.height, image.width) != (row["height"], row["width"]):
            size = f"{row['height']} x {row['width']}"
            faults.append(Fault(name, where, f"is {image.height} x {image.width}, the index says {size}"))
    return faults


def summarize(root: Path) -> dict[str, str]:
    """What a dataset folder holds, for people: label -> text, in the order to be shown."""
    manifest = read_manifest(root)
    audit = manifest["audit"]
    lines = {
        "dataset": str(root),
        "source": f"{manifest['source']['kind']}: {manifest['source']['name']}",
        "options": ", ".join(f"{key} {value}" for key, value in manifest["options"].items()),
        "classes": f"{len(manifest['classes']):,}",
    }
    for split, entry in manifest["splits"].items():
        counts = np.array(entry["class_counts"])
        lines[split] = (
            f"{entry['samples']:,} images in {len(entry['shards']):,} shards, {human_bytes(entry['bytes'])}; "
            f"{counts.min():,} to {counts.max():,} a class"
        )
        if empty := [manifest["classes"][i] for i in np.flatnonzero(counts == 0)]:
            lines[f"{split}: empty classes"] = ", ".join(empty[:10]) + (" ..." if len(empty) > 10 else "")
        lines[f"{split}: digest"] = entry["digest"][:16]
    leaks = [group for group in audit["duplicates"] if len({key.partition("/")[0] for key in group}) > 1]
    lines["repaired"] = _reasons(audit["repaired"])
    lines["rejected"] = _reasons(audit["rejected"])
    lines["duplicates"] = f"{len(audit['duplicates']):,} groups, {len(leaks):,} of them across splits"
    lines["tiny, oriented, resized"] = f"{audit['tiny']['count']:,}, {audit['oriented']:,}, {audit['resized']:,}"
    return lines


def _reasons(items: list[dict]) -> str:
    examples = "; ".join(f"{item['sample']} ({item['reason']})" for item in items[:3])
    return f"{len(items):,}" + (f": {examples}" if items else "") + (" ..." if len(items) > 3 else "")


def human_bytes(num: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:.3g} {unit}" if unit != "bytes" else f"{num:.0f} bytes"
        num /= 1000
    return f"{num:,.3g} TB"


def human_seconds(seconds: float) -> str:
    """4000 -> '1 h 07 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
