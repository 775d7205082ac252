"""The probe finds the decode path that works, whatever the other one does to its process."""

import io
import re
import sys

import numpy as np
import pytest

from pipelines import PipelineConfig, dali_probe
from pipelines.common.errors import UserError
from pipelines.dali_probe import probe_decode
from support.executors import jpeg_of
from trainer.config.sections import DataConfig


def test_the_probe_finds_region_decoding_where_it_works(photos):
    assert probe_decode("cpu", jpeg_of(photos), PipelineConfig()) == ("roi", "it works")


@pytest.fixture
def program(monkeypatch):
    """Puts a line of Python in the place of the program that tries a decode path."""
    return lambda line: monkeypatch.setattr(dali_probe, "_PROGRAM", (sys.executable, "-c", line))


def test_the_probe_survives_the_decoder_that_ends_the_process(photos, program):
    program("import os, sys; sys.argv[2] == 'roi' and os.kill(os.getpid(), 11)")
    assert probe_decode("cpu", jpeg_of(photos), PipelineConfig()) == (
        "full",
        "decoding regions failed: it ended by SIGSEGV",
    )


def test_what_helps_is_worded_as_the_options_are_given(photos, program):
    """As arguments in a notebook, as flags on the command line."""
    program("import sys; sys.exit('broken')")
    for config, advice in (
        (PipelineConfig(), "or use hw_decoder_load=0 or pipeline='torchvision'"),
        (DataConfig(), "or use --data.hw_decoder_load 0 or --data.pipeline torchvision"),
    ):
        with pytest.raises(UserError, match=f"{re.escape(advice)}$"):
            probe_decode("cpu", jpeg_of(photos), config)


def test_the_probe_says_that_nothing_works(photos, program):
    program("import sys; sys.exit(sys.argv[2] + ' is broken')")
    with pytest.raises(
        UserError, match=r"neither regions \(roi is broken\) nor whole images \(full is broken\) on cpu"
    ):
        probe_decode("cpu", jpeg_of(photos), PipelineConfig())


def test_the_probe_takes_whole_images_where_the_gpu_lets_in_no_second_process(photos, program):
    """In exclusive-process mode, in which the process that trains holds the GPU already."""
    program("import sys; sys.exit('Traceback:\\nRuntimeError: CUDA-capable device(s) is/are busy or unavailable')")
    decode_path, why = probe_decode("cpu", jpeg_of(photos), PipelineConfig())
    assert decode_path == "full" and why.startswith("untried, since the GPU lets in no second process (RuntimeError")


def test_the_probe_notices_wrong_pixels(photos, monkeypatch, tmp_path):
    """An image whose regions are another image's."""
    monkeypatch.setattr(
        "pipelines.dali.decoded_regions", lambda jpeg, crops, *_: [np.zeros((*c[2:], 3)) for c in crops]
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jpeg_of(photos).tobytes())))
    with pytest.raises(SystemExit, match="its pixels differ by"):
        dali_probe._main("cpu", "roi", "1.0")


@pytest.mark.gpu
def test_the_probe_finds_a_decode_path_on_the_gpu(photos):
    assert probe_decode("cuda:0", jpeg_of(photos), PipelineConfig())[0] in ("roi", "full")
