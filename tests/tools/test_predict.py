"""tools/predict.py: what it says of images is what evaluation says, and a bad image is a row with an error."""

import csv
import dataclasses
import io
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import REPOSITORY
from pipelines.shards.index import read_index
from support.forked_python import executable
from support.hand_made import put
from tools.lib.common.evaluation import ForwardConfig, predict_split
from tools.lib.predict.image_files import Item, decoded_batches, items_of, pixels_of, shown, survey
from tools.predict import main
from trainer.cluster.world import World
from trainer.config.sections import ImagesConfig
from trainer.evaluation import trained as inference
from trainer.evaluation.trained import EvalTransform

VIEW = EvalTransform(32, 0.95, "center", "bicubic")


def predicted(run: Path, *arguments) -> list[dict]:
    """The rows that the tool writes, as JSON has them."""
    out = run.parent / "predicted.jsonl"
    main(["--checkpoint", str(run), "--out", str(out), *map(str, arguments)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    out.unlink()
    return rows


def refused(capsys, *arguments) -> str:
    """The line that the tool ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def evaluated(tiny_run, digits) -> dict[str, tuple[list[str], float, str]]:
    """The predictions of an evaluation, by key: names of the best five classes, probability of the first, and label."""
    index, images = read_index(digits, "val"), ImagesConfig(root=digits)
    trained, world = inference.load(None, tiny_run), World(0, 1, 1, torch.device("cpu"))
    found, _ = predict_split(trained, index, None, images=images, forward=ForwardConfig(), world=world)
    keys = [key.decode() for key in index.samples["key"].tolist()]
    top = [[trained.classes[output] for output in row] for row in found.top.tolist()]
    labels = [trained.classes[label] for label in found.label.tolist()]
    return dict(zip(keys, zip(top, found.confidence.tolist(), labels, strict=True), strict=True))


def test_shards_get_the_classes_and_probabilities_of_evaluation(tiny_run, digits, evaluated):
    rows = predicted(tiny_run, digits / "val")
    shard = digits / "val" / "val-00000.tar"
    assert [row["file"] for row in rows] == [f"{shard}/{key}" for key in evaluated]
    assert len({row["top"][0]["class"] for row in rows}) > 1  # not the same for all
    for row, (top, confidence, _) in zip(rows, evaluated.values(), strict=True):
        assert row["error"] == "" and [each["class"] for each in row["top"]] == top
        assert row["top"][0]["probability"] == pytest.approx(confidence, rel=1e-4)


def test_the_files_of_a_dataset_get_what_evaluation_says_of_them(tiny_run, digits_folder, evaluated):
    rows = predicted(tiny_run, digits_folder / "val", "--batch", 7)
    assert [row["file"] for row in rows] == sorted(map(str, (digits_folder / "val").rglob("*.jpg")))
    right = 0
    for row in rows:
        top, confidence, label = evaluated["/".join(Path(row["file"]).with_suffix("").parts[-2:])]
        right += row["top"][0]["class"] == label
        assert [each["class"] for each in row["top"]] == top
        assert row["top"][0]["probability"] == pytest.approx(confidence, rel=1e-4)
    assert right == sum(top[0] == label for top, _, label in evaluated.values()) > 0


def jpeg(side: int = 40, **options) -> bytes:
    """A gradient."""
    pixels = np.add.outer(np.arange(side), np.arange(2 * side))[..., None] * np.array([1, 2, 3])
    file = io.BytesIO()
    Image.fromarray((pixels % 256).astype(np.uint8)).save(file, "JPEG", **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that claims to have this many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_of_a_very_long_image_the_middle_is_shown_and_all_of_it_where_it_is_squashed():
    pixels = np.full((200_000, 1, 3), 7, np.uint8)
    for crop_mode in ("center", "squash"):
        assert (shown(pixels, dataclasses.replace(VIEW, crop_mode=crop_mode)) == np.full((32, 32, 3), 7)).all()


def write_bad(folder: Path) -> dict[str, str]:
    """Files that are no images of ordinary size: name -> what their row says."""
    frame = jpeg().index(b"\xff\xc0") + 5
    huge = jpeg()[:frame] + struct.pack(">HH", 65500, 65500) + jpeg()[frame + 4 :]
    contents = {
        "bomb.png": (bomb(60_000, 60_000), "absurd dimensions"),
        "empty.jpg": (b"", "empty file"),
        "huge.jpg": (huge, "absurd dimensions: 65500 x 65500"),
        "text.jpg": (b"<html>404</html>", "not an image"),
        "truncated.jpg": (jpeg(400)[:3000], "cannot be decoded"),
        "truncated.png": (bomb(20, 20), "cannot be decoded"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe.tar")
    with open(folder / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    others = {"dangling.jpg": "nowhere.jpg, which is not there", "sparse.jpg": "bytes; no image has more"}
    others |= dict.fromkeys(("pipe.jpg", "pipe.tar"), "neither a file nor a folder")
    return {**{name: error for name, (_, error) in contents.items()}, **others}


def test_a_bad_image_is_a_row_with_an_error_and_the_others_go_on(tiny_run, tmp_path, capsys):
    bad = write_bad(tmp_path)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "z.jpg").write_bytes(jpeg())
    rows = predicted(tiny_run, tmp_path, "--batch", 4)
    assert [Path(row["file"]).name for row in rows] == ["a.jpg", *sorted(bad), "z.jpg"]
    assert rows[0]["top"] and rows[0]["top"][0]["class"] == rows[-1]["top"][0]["class"]
    for row in rows[1:-1]:
        assert bad[Path(row["file"]).name] in row["error"] and "\n" not in row["error"] and row["top"] == []
    assert f"images: {len(rows)}, not usable (the column error says why): {len(bad)}, in " in capsys.readouterr().err


def test_only_bad_images_are_rows_too(tiny_run, tmp_path):
    (tmp_path / "empty.jpg").touch()
    (row,) = predicted(tiny_run, tmp_path / "empty.jpg")
    assert row == {"file": str(tmp_path / "empty.jpg"), "error": "empty file", "top": []}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_a_shard_are_read_where_they_lie_whatever_they_are_called(tiny_run, tmp_path):
    inside = {"../../out.jpg": jpeg(), "/a/b.cls": b"3", "/a/b.JPEG": jpeg(), "c.png": b"no", "d.seg.jpg": jpeg()}
    shard = write_tar(tmp_path / "shard.tar", inside)
    before = sorted(tmp_path.rglob("*"))
    rows = predicted(tiny_run, shard)
    assert [row["file"] for row in rows] == [f"{shard}/{key}" for key in ("../../out", "/a/b", "c", "d.seg")]
    assert [row["error"] for row in rows] == ["", "", "not an image", ""]
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent.parent / "out.jpg").exists()


def test_of_a_damaged_shard_the_images_before_the_damage_count(tiny_run, tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.jpg": jpeg() for i in range(3)}).read_bytes()
    cut, no_tar = tmp_path / "a-cut.tar", tmp_path / "b-none.tar"
    cut.write_bytes(whole[: whole.index(b"1.jpg") + 700])
    no_tar.write_bytes(b"<html>404</html>" * 100)
    rows = predicted(tiny_run, tmp_path)
    names = [f"{cut}/0", f"{cut}/1", f"{cut}", f"{no_tar}", *(f"{tmp_path}/whole.tar/{i}" for i in range(3))]
    assert [row["file"] for row in rows] == names
    assert [bool(row["error"]) for row in rows] == [False, True, True, True, False, False, False]
    assert "cut off" in rows[1]["error"] and "cannot be read" in rows[2]["error"]


def test_rows_come_in_the_order_of_the_paths_though_the_first_image_takes_longest(tiny_run, tmp_path):
    for i, side in enumerate((1500, 8, 8, 8, 8)):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(side))
    paths = [tmp_path / f"{i}.jpg" for i in (0, 3, 1, 2, 4)]
    assert [row["file"] for row in predicted(tiny_run, *paths, "--batch", 2)] == list(map(str, paths))


def test_folders_are_gone_through_in_order_without_hidden_files_and_circles_are_named(tiny_run, tmp_path, capsys):
    for name in ("b/2.jpg", "a-c/1.jpg", "a/1.JPG", "b/.hidden.jpg", ".cache/0.jpg", "b/notes.txt", "__MACOSX/0.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    rows = predicted(tiny_run, tmp_path)
    names = [str(Path(row["file"]).relative_to(tmp_path)) for row in rows]
    assert names == ["a/1.JPG", "a/up", "a-c/1.jpg", "b/2.jpg", "link/2.jpg"]
    assert [row["error"] for row in rows if row["error"]] == ["a link to a folder above it: remove the link"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"not images by their names: {tmp_path}/b/notes.txt, {tmp_path}/link/notes.txt"


def test_folders_for_predict_are_used_or_named(tmp_path):
    for name in ("a.jpg", "b/c.PNG", "b/.d.jpg", "__MACOSX/e.jpg", "b/@eaDir/f.jpg", "Thumbs.db"):
        put(tmp_path / name, jpeg())
    for name in ("README", "b/labels.txt", "b/shard.tar.gz"):
        put(tmp_path / name, b"text")
    (tmp_path / "gone").symlink_to("/not/there")
    (tmp_path / "gone.tar").symlink_to("/not/there.tar")
    os.mkfifo(tmp_path / "pipe")
    _, no_images = survey([tmp_path])
    assert [str(Path(name).relative_to(tmp_path)) for name in no_images] == [
        "README",
        "b/labels.txt",
        "b/shard.tar.gz",
    ]
    names = [str(Path(item.name).relative_to(tmp_path)) for item in items_of(tmp_path)]
    assert names == ["a.jpg", "b/c.PNG", "gone", "gone.tar", "pipe"]


@pytest.mark.parametrize(
    "links", [{"up": "."}, {"a/l": "b", "b/l": "a"}, {"loop.jpg": "loop.jpg"}, {"x": "y", "y": "x"}]
)
def test_links_in_a_circle_get_a_row_for_predict(tmp_path, links):
    for name in ("a/1.jpg", "b/2.jpg"):
        put(tmp_path / name, jpeg())
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    items = list(items_of(tmp_path))
    assert {str(tmp_path / "a/1.jpg"), str(tmp_path / "b/2.jpg")} <= {item.name for item in items if not item.error}
    errors = [item.error for item in items if item.error]
    assert len(errors) == len(links) and all("link" in error for error in errors)
    assert survey([tmp_path])[0] == len(items)


def test_a_name_that_is_not_utf_8_is_shown_escaped(tiny_run, tmp_path):
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(jpeg())
    (row,) = predicted(tiny_run, tmp_path)
    assert row["file"] == f"{tmp_path}/caf\\xe9.jpg" and row["top"]


def test_decoding_does_not_run_ahead_of_the_model_by_more_than_two_batches(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    begun = itertools.count()
    endless = (Item(f"{next(begun)}", str(tmp_path / "a.jpg")) for _ in itertools.repeat(None))
    batches = decoded_batches(endless, VIEW, 8)
    for _ in range(3):
        assert len(next(batches)) == 8
    batches.close()
    assert next(begun) <= 4 * 8 + 1


FORMATS = {"PNG": "RGBA", "WEBP": "RGB", "BMP": "L", "GIF": "P", "TIFF": "CMYK", "JPEG": "CMYK", "PPM": "1"}


@pytest.mark.parametrize("kind", FORMATS)
def test_other_formats_and_modes_become_rgb_as_pil_converts_them(kind):
    image, file = Image.open(io.BytesIO(jpeg())), io.BytesIO()
    image.putalpha(100) if FORMATS[kind] == "RGBA" else None
    image.convert(FORMATS[kind]).save(file, kind)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(pixels_of(file.getvalue()), expected) and expected.shape == (40, 80, 3)


def test_palettes_with_transparency_and_16_bits_become_rgb_as_in_a_dataset():
    palette, file = Image.open(io.BytesIO(jpeg())).convert("P"), io.BytesIO()
    palette.save(file, "PNG", transparency=bytes(range(256)))
    assert np.array_equal(pixels_of(file.getvalue()), np.asarray(palette.convert("RGB")))
    deep, file = np.arange(0, 60_000, 24, dtype=np.uint16).reshape(50, 50), io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    assert np.array_equal(pixels_of(file.getvalue()), np.repeat((deep >> 8)[..., None], 3, axis=2))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(pixels_of(jpeg(exif=exif)), pixels_of(jpeg())) and pixels_of(jpeg()).shape == (40, 80, 3)


@pytest.mark.parametrize(("mode", "sees"), [("center", 255), ("squash", 0)])
def test_an_image_is_cropped_as_the_transform_says(mode, sees):
    pixels = np.full((64, 256, 3), 255, dtype=np.uint8)
    pixels[:, :64] = pixels[:, -64:] = 0  # beside the centre
    found = shown(pixels, EvalTransform(32, 1.0, mode, "bilinear"))
    assert found.shape == (32, 32, 3) and found[16, 0, 0] == sees


def test_csv_jsonl_and_parquet_hold_the_same_rows(tiny_run, tmp_path, capsysbinary):
    import pyarrow.parquet

    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b, c.jpg").touch()
    rows = predicted(tiny_run, tmp_path, "--top-k", 2)
    expected = [{"file": row["file"], "error": row["error"], **flat(row["top"])} for row in rows]
    common = ["--checkpoint", str(tiny_run), str(tmp_path), "--top-k", "2"]
    main([*common, "--out", str(tmp_path / "out.parquet")])
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [list(row) for row in table] == [list(expected[0])] * 2
    for row, other in zip(table, expected, strict=True):
        assert {name: value for name, value in row.items() if value is not None} == {
            name: float(np.float32(value)) if isinstance(value, float) else value for name, value in other.items()
        }
    main([*common, "--out", str(tmp_path / "out.csv")])
    text = (tmp_path / "out.csv").read_text()
    for row, other in zip(csv.DictReader(io.StringIO(text)), expected, strict=True):
        assert {name: value for name, value in row.items() if value} == {k: str(v) for k, v in other.items() if v}
    capsysbinary.readouterr()
    main(common)
    assert capsysbinary.readouterr().out.decode() == text


def flat(top: list[dict]) -> dict:
    """As the columns of a table."""
    return {f"{name}_{i + 1}": value for i, each in enumerate(top) for name, value in each.items()}


def test_outputs_are_numbers_until_a_file_names_them_and_synsets_have_words(tiny_run, digits_folder, tmp_path, capsys):
    image, weights = next((digits_folder / "val").rglob("*.jpg")), tmp_path / "weights.pth"
    content = torch.load(tiny_run / "checkpoints" / "best.pt", weights_only=True)
    torch.save(content["state_dict"], weights)
    assert "does not say which model it is of. Name it (option name)" in refused(capsys, "--checkpoint", weights, image)
    (plain,) = predicted(weights, image, "--name", "tiny_cnn", "--top-k", 20)
    assert "outputs without names" in capsys.readouterr().err
    assert sorted(each["class"] for each in plain["top"]) == sorted(map(str, range(10)))
    names = ["n01440764", *(f"class {i}" for i in range(1, 10))]
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    named = ("--name", "tiny_cnn", "--classes", tmp_path / "classes.txt", "--top-k", 20)
    (row,) = predicted(weights, image, *named)
    assert [each["class"] for each in row["top"]] == [names[int(each["class"])] for each in plain["top"]]
    words = {each["class"]: each["words"] for each in row["top"]}
    assert words["n01440764"].startswith("tench") and words["class 4"] == "class 4"


def test_a_model_that_gives_no_numbers_is_an_error_in_each_row(tiny_run, digits_folder, tmp_path):
    """Finite weights whose products are not."""
    weights = torch.load(tiny_run / "checkpoints" / "best.pt", weights_only=True)["state_dict"]
    torch.save({**weights, "head.fc.weight": torch.full_like(weights["head.fc.weight"], 1e38)}, tmp_path / "broken.pth")
    image = next((digits_folder / "val").rglob("*.jpg"))
    (row,) = predicted(tmp_path / "broken.pth", image, "--name", "tiny_cnn")
    assert row == {"file": str(image), "error": "the model's outputs are not finite", "top": []}


def test_what_cannot_be_done_is_one_line_and_no_output_is_touched(tiny_run, digits_folder, tmp_path, capsys):
    image, out = next((digits_folder / "val").rglob("*.jpg")), tmp_path / "out.csv"
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    (tmp_path / "empty").mkdir()
    out.write_text("of an earlier call")
    write_tar(tmp_path / "no-images.tar", {"a.txt": b"a"})
    known = ("--checkpoint", tiny_run, "--out", out)
    for arguments, says in (
        ((*known, image, tmp_path / "nothing.jpg"), f"{tmp_path}/nothing.jpg: not found. Give images"),
        ((*known, tmp_path / "empty"), f"{tmp_path}/empty: no images in it"),
        ((*known, tmp_path / "no-images.tar"), f"{tmp_path}/no-images.tar: no images in it"),
        ((*known, image, "--classes", tmp_path / "classes.txt"), "names 2 classes"),
        ((*known, image, "--name", "test_vit"), "is of model 'tiny_cnn', not of 'test_vit'. Leave the name out"),
        ((*known, image, "--top-k", 0), "--top-k is 0; it must be positive"),
        ((*known, image, "--out", tmp_path / "out.xlsx"), "ends in none of .csv, .jsonl, .parquet"),
        ((*known, image, "--out", tmp_path / "no" / "out.csv"), "not a file in a folder that is there"),
        (("--out", out, image), "no model is named. Give a checkpoint or run folder (option checkpoint)"),
        ((*known, image, "--checkpoint", tmp_path / "nope"), f"{tmp_path}/nope: cannot be read"),
    ):
        assert says in refused(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.txt", "empty", "no-images.tar", "out.csv"]
    assert out.read_text() == "of an earlier call"


def test_without_pyarrow_parquet_is_refused_at_once_with_the_command_that_helps(
    tiny_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    line = refused(capsys, "--checkpoint", tiny_run, tmp_path, "--out", tmp_path / "out.parquet")
    assert "pip install -e '.[parquet]'" in line


def command(run: Path, *arguments) -> list[str]:
    """The tool in a process of its own."""
    return [executable(), str(REPOSITORY / "tools" / "predict.py"), "--checkpoint", str(run), *map(str, arguments)]


def test_head_may_stop_reading_the_rows(tiny_run, digits_folder):
    tool = command(tiny_run, digits_folder, "--batch", 4)
    with subprocess.Popen(tool, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"file,error,class_1")
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(tiny_run, digits_folder):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(tiny_run, digits_folder), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: standard output: cannot be written (No space left on device)" in done.stderr


def test_ctrl_c_leaves_no_output(tiny_run, digits_folder, tmp_path):
    paths = [digits_folder] * 500
    tool = command(tiny_run, *paths, "--out", tmp_path / "out.csv")
    with subprocess.Popen(tool, stderr=subprocess.PIPE, preexec_fn=catch_interrupts) as process:
        while not list(tmp_path.iterdir()) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 130 and not list(tmp_path.iterdir())


def catch_interrupts() -> None:
    """As in a terminal; a shell starts what is in the background without."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
