"""Files and folders that belong to somebody else: each command ends with one line that names what cannot be read."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.attempts import Ended, isolated
from chaos.conversions import shard
from support.hand_made import put, samples, tar_of
from tools import predict
from tools.lib.common.photos import write_digits
from tools.lib.predict.image_files import decoded, items_of, survey
from trainer.evaluation.trained import EvalTransform

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """An image folder, tars and a dataset."""
    root = tmp_path_factory.mktemp("original")
    write_digits(root / "images", num_train=20, num_val=10)
    put(root / "tars" / "train" / "a.tar", tar_of(samples(3)))
    put(root / "made" / "train" / "a.tar", tar_of(samples(3)))
    assert isolated(shard("index", root / "made")).code == 0
    return root


@pytest.fixture
def place(original) -> Iterator[Path]:
    """A folder that another user may enter and write to, with a copy of them."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        root = shutil.copytree(original, Path(folder), dirs_exist_ok=True)
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        yield root


def by_nobody(command) -> Ended:
    """The command, by a user who is not root."""

    def call() -> None:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        command()

    return isolated(call)


COMMANDS = {
    "build": ("images", lambda at: shard("build", at / "images", at / "out", "--workers", 1)),
    "index": ("tars", lambda at: shard("index", at / "tars", "--workers", 1)),
    "index --out": ("tars", lambda at: shard("index", at / "tars", "--out", at / "out", "--workers", 1)),
    "verify": ("made", lambda at: shard("verify", at / "made", "--workers", 1)),
    "info": ("made", lambda at: shard("info", at / "made")),
    "predict": ("images", lambda at: lambda: predict.main([str(at / "images")])),
}
CLOSED = [
    *[("build", name) for name in ("images", "images/train", "images/train/0", "images/train/0/*")],
    *[("build", name) for name in ("images/val", "images/val/1/*")],
    *[("index", name) for name in ("tars", "tars/train", "tars/train/a.tar")],
    *[("index --out", name) for name in ("tars", "tars/train", "tars/train/a.tar")],
    *[
        ("verify", name)
        for name in ("made", "made/train", "made/train/a.tar", "made/train/index.npy", "made/manifest.json")
    ],
    *[("info", name) for name in ("made", "made/manifest.json")],
    *[("predict", name) for name in ("images", "images/train", "images/train/0")],
]


@pytest.mark.parametrize(("command", "name"), CLOSED)
def test_what_another_user_has_closed_is_named_in_one_line_and_nothing_is_left(place, command, name):
    (closed,) = sorted(place.glob(name))[:1]
    closed.chmod(0)
    os.chown(closed, 0, 0)
    ended = by_nobody(COMMANDS[command][1](place))
    assert ended.code == 1 and not ended.complaint(), ended.text
    below = closed.relative_to(place / name.partition("/")[0])
    assert (str(below) if below.parts else str(closed)) in ended.text and "ermission denied" in ended.text, ended.text
    assert not (place / "out").exists() and not (place / "tars" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [("build", "out"), ("build", "."), ("index", "tars/train"), ("index --out", "."), ("index", "tars/.index.lock")],
)
def test_a_place_of_another_user_to_write_to_is_named_in_one_line(place, command, name):
    closed = place / name
    if name == "out":
        closed.mkdir()
    if name.endswith(".lock"):
        closed.touch()
    os.chown(closed, 0, 0)
    closed.chmod(0o600 if closed.is_file() else 0o755)
    ended = by_nobody(COMMANDS[command][1](place))
    assert ended.code == 1 and not ended.complaint(), ended.text
    assert "ermission denied" in ended.text and str(closed) in ended.text, ended.text


def test_an_image_of_another_user_is_a_row_of_predict_that_says_so(place):
    first = sorted(place.glob("images/train/0/*"))[0]
    first.chmod(0)
    os.chown(first, 0, 0)

    def rows() -> None:
        survey([place / "images"])
        transform = EvalTransform(32, 1.0, "center", "bicubic")
        print([decoded(item, transform)[2] for item in items_of(place / "images" / "train" / "0")])

    ended = by_nobody(rows)
    assert ended.code == 0 and ended.text.count("cannot be read (Permission denied)") == 1, ended.text
