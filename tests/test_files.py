"""Files take the place of others whole or not at all; what is no file stays what it is."""

import os
import threading

import pytest

from pipelines.files import replacing, write_synced


def test_a_block_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="disk"), replacing(path) as file:
        file.write(b"half")
        raise OSError("disk")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    write_synced(path, b"after")
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_synced(pipe, b"content")
    reader.join(timeout=10)
    assert found == [b"content"] and pipe.is_fifo()
