"""A version of the code gives the bits of the one before it, keeps its settings, and resumes from its checkpoints."""

import json

import pytest
import yaml

from golden import measure

BITS = next((found["sha256"] for found in measure.recorded() if found["where"] == measure.where()), None)
known_machine = pytest.mark.skipif(BITS is None, reason="not measured with this software and processor")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The run of the golden checkpoint, resumed by today's code: its folder and its summary."""
    out = tmp_path_factory.mktemp("golden") / "run"
    return out, measure.resume(out)


def test_an_older_checkpoint_is_gone_on_with(resumed):
    _, summary = resumed
    assert summary["session"]["start_step"] == measure.STOPPED and summary["step"] == measure.STEPS


@known_machine
def test_it_ends_with_the_weights_it_had(resumed):
    """On the processor that has made the checkpoint they are those of a run that was not stopped."""
    assert measure.weights_in(resumed[0]) == BITS["resumed"]


@known_machine
def test_weights_and_pixels_have_the_bits_they_had():
    assert measure.bits() == {name: found for name, found in BITS.items() if name != "resumed"}


def test_every_setting_is_there_with_its_default():
    golden, now = (
        yaml.safe_load(text) for text in ((measure.FOLDER / "settings.yaml").read_text(), measure.settings())
    )
    for section, values in golden.items():
        assert {key: now[section].get(key) for key in values} == values, section


def test_every_command_has_the_options_it_had():
    """More may have come."""
    golden, now = json.loads((measure.FOLDER / "options.json").read_text()), measure.options()
    gone = {command: set(listed) - set(now.get(command, ())) for command, listed in golden.items()}
    assert not {command: options for command, options in gone.items() if options}
