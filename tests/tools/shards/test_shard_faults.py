"""A conversion survives whatever stops it, and verify finds whatever happens to a dataset afterwards."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from pipelines.common.files import replacing
from pipelines.shards.index import read_index
from support.processes import without_workers
from support.small_sources import TOOL, convert, tree
from tools.lib.common.photos import photographs
from tools.lib.common.process_pool import LostWorkerError, run_jobs
from tools.lib.shards.build import BuildOptions, build, merge
from tools.lib.shards.verify import verify
from tools.shard_imagenet import main

# The processes that convert start sooner without PyTorch, which they have no use for.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests" / "support" / "without_torch")}


NUM_SHARDS = 24


class Many(NamedTuple):
    """A folder of 240 photographs, the command that converts it into NUM_SHARDS, the clean result, how long it took."""

    src: Path
    command: list[str]
    clean: Path
    duration_s: float


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Many:
    root = tmp_path_factory.mktemp("many")
    for i in range(240):
        name, image, _ = photographs()[i % 10]
        path = root / "src" / ("train" if i % 6 else "val") / f"class{i % 3}" / f"{name}-{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.rotate(i).convert("RGB").save(path, quality=90)
    command = [*TOOL, "build", str(root / "src"), "--samples-per-shard", "10", "--workers", "2"]
    process = start(command, root / "clean")
    begun_s = time.perf_counter()
    assert not process.wait(120), process.stderr.read()
    return Many(root / "src", command, root / "clean", time.perf_counter() - begun_s)


def start(command: list[str], out: Path, **popen) -> subprocess.Popen:
    """The conversion in a session of its own, once it has begun to write."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([*command[:4], str(out), *command[4:]], env=ENVIRONMENT, **pipes, **popen)
    partial = out.with_name(f"{out.name}.partial")
    while not (partial / "records").exists() and not out.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    return process


def await_records(process: subprocess.Popen, out: Path, count: int) -> list[Path]:
    """The records of the shards that are finished, once there are `count` of them or the conversion has ended."""
    records = out.with_name(f"{out.name}.partial") / "records"
    while len(done := list(records.rglob("*.json"))) < count and process.poll() is None:
        time.sleep(0.005)
    return done


def complete(command: list[str], out: Path) -> None:
    """The same command again, in this process: nothing is imported twice."""
    main([*command[2:4], str(out), *command[4:]])


def assert_clean(out: Path, clean: Path) -> None:
    assert tree(out) == tree(clean)
    assert not out.with_name(f"{out.name}.partial").exists()


def kill_at_random_moments(many, folder: Path, count: int, seed: int) -> int:
    """Kill `count` conversions, each somewhere between its first shard and its end. Returns how many were cut short."""
    moments = random.Random(seed)
    cut_short = 0
    for i in range(count):
        out = folder / str(i)
        process = start(many.command, out)
        await_records(process, out, moments.randrange(NUM_SHARDS))
        time.sleep(moments.uniform(0, many.duration_s / NUM_SHARDS))
        # Either all of its processes are killed, or the first one alone, which its workers must notice.
        (os.killpg if i % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        cut_short += not out.exists()
        complete(many.command, out)
        assert_clean(out, many.clean)
        shutil.rmtree(out)
    return cut_short


def test_a_conversion_killed_at_any_moment_is_completed_byte_identically(many, tmp_path):
    """At first the first process is killed, then all of them."""
    assert kill_at_random_moments(many, tmp_path, count=2, seed=3) >= 1


@pytest.mark.long
def test_30_conversions_killed_at_random_moments_are_completed_byte_identically(many, tmp_path):
    cut_short = kill_at_random_moments(many, tmp_path, count=30, seed=1)
    print(f"30 killed, {cut_short} of them before they were done; 30 completed, byte-identical to the clean one")
    assert cut_short >= 20


def test_finished_shards_are_not_written_again(many, tmp_path):
    _, command, clean, _ = many
    out = tmp_path / "out"
    process = start(command, out)
    done = await_records(process, out, 4)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shards = [tmp_path / "out.partial" / path.parent.name / f"{path.stem}.tar" for path in done]
    written = {path.name: path.stat().st_mtime_ns for path in shards}
    complete(command, out)
    assert_clean(out, clean)
    assert {name: (out / name.split("-")[0] / name).stat().st_mtime_ns for name in written} == written


def test_ctrl_c_keeps_what_is_finished_and_says_so(many, tmp_path):
    _, command, clean, _ = many
    # If the tests were started in the background, the shell has made this process ignore Ctrl-C.
    process = start(command, tmp_path / "out", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted. Finished shards are kept, and the same command resumes" in error and "Traceback" not in error
    complete(command, tmp_path / "out")
    assert_clean(tmp_path / "out", clean)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes of its session that run no program of their own: children of the fork server."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != process.pid:
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[3]) == process.pid and "forkserver" in command and int(fields[1]) != process.pid:
                found.append(int(entry.name))
    return found


def test_workers_that_die_are_never_waited_for():
    for _ in range(5):
        with pytest.raises(LostWorkerError):
            list(run_jobs(signal.raise_signal, [(signal.SIGKILL,)] * 7, 3))


def test_when_a_worker_is_killed_the_others_finish_what_they_have_begun(tmp_path):
    jobs = [(f"sleep 1; touch {tmp_path / name}",) for name in "abc"]
    with pytest.raises(LostWorkerError):
        list(run_jobs(os.system, [*jobs, ("sleep 0.3; kill -9 $PPID",)], 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_an_error_of_a_job_arrives_with_its_place_in_the_worker():
    with pytest.raises(ZeroDivisionError) as error:
        list(run_jobs(divmod, [(7, 2), (1, 0)], 2))
    assert "Traceback" in str(error.value.__cause__)


def test_a_lost_worker_is_reported_and_nothing_is_lost(many, tmp_path):
    _, command, clean, _ = many
    process = start(command, tmp_path / "out")
    while len(workers := workers_of(process)) < 2:  # one may be a program that the server is about to run, importing
        assert process.poll() is None, process.stderr.read()
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: a worker was killed" in error and "Traceback" not in error
    assert "Finished shards are kept, and the same command resumes" in error
    complete(command, tmp_path / "out")
    assert_clean(tmp_path / "out", clean)


def test_damage_between_writing_and_reading_is_found(digits_folder, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def damaging(path):
        with replacing(path) as file:
            yield file
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)

    with without_workers(), monkeypatch.context() as here:
        here.setattr("tools.lib.shards.shard.replacing", damaging)
        build(digits_folder, tmp_path / "out", BuildOptions(samples_per_shard=400))
    damaged = {fault.split(":")[0] for fault in verify(tmp_path / "out")}
    assert damaged == {"train/train-00000.tar", "val/val-00000.tar"}


def test_a_full_disk_is_reported_and_nothing_is_lost(many, tmp_path):
    """A limit on the size of files stands for the full disk: write() fails in the same place."""
    _, command, clean, _ = many

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    out = tmp_path / "out"
    full = [*command[:4], str(out), *command[4:]]
    done = subprocess.run(full, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit, timeout=300)
    assert done.returncode == 1
    assert "File too large" in done.stderr and "raise the limit ('ulimit -f')" in done.stderr
    assert "the same command resumes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists() and not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("*.tar.*.partial"))
    complete(command, out)
    assert_clean(out, clean)


def test_two_at_once_do_not_get_into_each_others_way(many, tmp_path, capsys):
    _, command, clean, _ = many
    process = start(command, tmp_path / "out")
    try:
        complete(command, tmp_path / "out")
    except SystemExit:
        assert "another process is already working on" in capsys.readouterr().err
    process.wait()
    assert_clean(tmp_path / "out", clean)


def test_a_process_killed_between_its_last_actions_is_completed(many, tmp_path):
    src, command, clean, _ = many
    # It was killed after it wrote the manifest and before it renamed the folder.
    convert(src, tmp_path / "jobs", samples_per_shard=10, part=(0, 24))
    job = tmp_path / "jobs.partial" / "job.json"
    for finish in (lambda out: complete(command, out), merge):
        shutil.copytree(clean, tmp_path / "out.partial")
        shutil.copy(job, tmp_path / "out.partial" / "job.json")
        finish(tmp_path / "out")
        assert_clean(tmp_path / "out", clean)
        shutil.rmtree(tmp_path / "out")


# --- verify ---


@pytest.fixture
def dataset(many, tmp_path) -> Path:
    return shutil.copytree(many.clean, tmp_path / "dataset")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_an_untouched_dataset_has_no_faults(dataset, capsys):
    assert verify(dataset, decode=True, workers=2) == []
    main(["verify", str(dataset)])
    assert "everything is as it was written" in capsys.readouterr().out


@pytest.mark.usefixtures("jobs_in_this_process")
def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_located(dataset):
    index = read_index(dataset, "train")
    path = index.paths[1]
    row = index.samples[index.samples["shard"] == 1][3]
    key, offset, nbytes = row["key"].decode(), int(row["offset"]), int(row["nbytes"])
    end = -(-(offset + nbytes) // 512) * 512
    headers = f"sample {key}, bytes {offset - 1536} to {offset}: its label or a tar header"
    places = {
        offset - 512 * 3 + 5: headers,
        offset - 512 * 2: headers,
        offset - 512 - 3: headers,
        offset - 512 + 130: headers,
        offset: f"sample {key}, bytes {offset} to {offset + nbytes}: its image",
        offset + nbytes // 2: f"sample {key}, bytes {offset} to {offset + nbytes}: its image",
        end - 1: f"byte {end - 1}: the padding after sample {key}",
        path.stat().st_size - 100: f"byte {path.stat().st_size - 100}: the end of the tar",
    }
    assert end > offset + nbytes  # this sample has padding
    for position, expected in places.items():
        flip(path, position)
        _, fault = verify(dataset)
        assert fault == f"train/train-00001.tar: {expected} is damaged"
        flip(path, position)
    assert verify(dataset) == []


@pytest.mark.usefixtures("jobs_in_this_process")
@pytest.mark.parametrize(
    "name", ["manifest.json", "audit.jsonl", "train/index.npy", "train/train-00002.idx", "val/val-00000.tar"]
)
def test_a_flipped_bit_at_random_places_of_every_kind_of_file_is_found(dataset, name, capsys):
    path = dataset / name
    places = random.Random(name)
    for _ in range(4):
        position = places.randrange(path.stat().st_size)
        flip(path, position)
        with pytest.raises(SystemExit) as done:
            main(["verify", str(dataset)])
        said = "".join(capsys.readouterr())
        assert done.value.code == 1 and name in said, (position, said)
        flip(path, position)


@pytest.mark.usefixtures("jobs_in_this_process")
@pytest.mark.parametrize("keep", [0, 511, 20_000, -1])
def test_a_truncated_shard_is_found_with_the_sample_where_it_ends(dataset, keep):
    path = dataset / "train" / "train-00003.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    faults = verify(dataset)
    size = len(whole[:keep])
    assert faults[0].startswith(f"train/train-00003.tar: {size} bytes that are not those of the manifest")
    if keep >= 0:
        assert any(f"byte {size}: the shard ends here" in fault for fault in faults)


@pytest.mark.usefixtures("jobs_in_this_process")
def test_swapped_shards_and_indices_and_missing_and_foreign_files_are_found(dataset):
    train = dataset / "train"
    swapped = shutil.copytree(dataset, dataset.with_name("swapped"))
    shutil.copy(train / "train-00000.tar", swapped / "train" / "train-00001.tar")
    fault = verify(swapped)[0]
    assert fault.startswith("train/train-00001.tar: ") and fault.endswith("damaged, stale or swapped")
    shutil.copy(train / "train-00001.tar", swapped / "train" / "train-00001.tar")
    shutil.copy(train / "train-00000.idx", swapped / "train" / "train-00001.idx")
    (fault,) = verify(swapped)
    assert fault.startswith("train/train-00001.idx: ")
    shutil.copy(dataset / "val" / "index.npy", swapped / "train" / "index.npy")
    assert {fault.partition(":")[0] for fault in verify(swapped)} == {"train/train-00001.idx", "train/index.npy"}
    for name in ("train-00004.tar", "train-00005.idx", "index.npy"):
        (train / name).unlink()
    (train / "train-99999.tar").write_bytes(b"foreign")
    assert {fault[: fault.index(": ") + 9] for fault in verify(dataset)} == {
        "train/train-00004.tar: missing",
        "train/train-00005.idx: missing",
        "train/index.npy: missing",
        "train/train-99999.tar: is not ",
    }


def test_without_a_manifest_there_is_nothing_to_compare_with(dataset):
    (dataset / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json: not found"):
        verify(dataset)


def test_decoding_finds_what_hashes_cannot(tmp_path):
    """An image that was damaged before the conversion, which had the audit switched off."""
    src = tmp_path / "src" / "train" / "class"
    src.mkdir(parents=True)
    photographs()[0][1].save(src / "good.jpg")
    (src / "bad.jpg").write_bytes((src / "good.jpg").read_bytes()[:3000])
    convert(tmp_path / "src", tmp_path / "out", audit=False)
    assert verify(tmp_path / "out") == []
    (fault,) = verify(tmp_path / "out", decode=True)
    assert "sample class/bad, bytes" in fault and "truncated" in fault


def test_damage_in_indexed_foreign_tars_is_located_too(dataset, tmp_path):
    root = tmp_path / "wds"
    (root / "train").mkdir(parents=True)
    shutil.copy(dataset / "train" / "train-00000.tar", root / "train" / "a.tar")
    main(["index", str(root), "--workers", "1"])
    row = read_index(root, "train").samples[2]
    flip(root / "train" / "a.tar", int(row["offset"]) + 50)
    _, fault = verify(root)
    assert fault.startswith(f"train/a.tar: sample {row['key'].decode()}, bytes {row['offset']}")
