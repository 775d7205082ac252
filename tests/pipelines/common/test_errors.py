"""pipelines/ says what is wrong in its own words, and commands add what can be typed."""

import ast

import pytest

import pipelines as P  # noqa: N812
from conftest import REPOSITORY, fake_index
from pipelines.common.errors import UserError, exit_on_user_error, naming_settings


def error_line(capsys, function, *arguments) -> str:
    with pytest.raises(SystemExit), exit_on_user_error():
        function(*arguments)
    return capsys.readouterr().err


def test_a_folder_that_is_no_dataset_is_named_and_a_command_adds_how_to_make_one(tmp_path, capsys):
    with pytest.raises(UserError, match="not a finished dataset$"):
        P.open_dataset(tmp_path)
    line = error_line(capsys, P.open_dataset, tmp_path)
    assert line.startswith(f"error: {tmp_path}/manifest.json: not found, so {tmp_path} is not a finished dataset. Make")
    assert line.endswith("'python tools/shard_imagenet.py build IMAGE_FOLDER OUT', and give OUT\n")


def test_damage_is_named_and_a_command_adds_how_to_check_a_dataset(digits, tmp_path, capsys):
    from pipelines.shards.damage import raise_on_damage

    report = raise_on_damage(P.open_dataset(digits).train)
    with pytest.raises(UserError, match=r"train-00000.tar: sample .*: broken. Restore the shard$"):
        report(0, "broken")
    assert error_line(capsys, report, 0, "broken").endswith("'tools/shard_imagenet.py verify' checks all shards\n")


def test_an_error_about_an_argument_names_the_setting_it_is_filled_from():
    def plan(**options):
        return P.TrainPlan(fake_index(100), **options)

    with pytest.raises(UserError, match=r"^global_batch is 1000; it must be a multiple of augment.mix_group, 128$"):
        plan(global_batch=1000)
    with (
        pytest.raises(UserError, match=r"^run.global_batch is 1000; it"),
        naming_settings(global_batch="run.global_batch"),
    ):
        plan(global_batch=1000)
    with pytest.raises(UserError, match=r"^image_size is 0;"), naming_settings(global_batch="run.global_batch"):
        plan(image_size=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline": "ffcv"}, "pipeline is 'ffcv'; it must be one of auto, dali, torchvision, synthetic"),
        ({"threads": -1}, r"threads is -1; it must lie in \[0, 4096\]"),
        ({"hw_decoder_load": "1"}, "hw_decoder_load is '1'; it must be float"),
    ],
)
def test_options_of_an_executor_are_checked_by_their_own_names(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        P.PipelineConfig(**options)


def test_no_text_of_pipelines_holds_a_flag_or_a_command_but_those_that_commands_add():
    for path in (REPOSITORY / "pipelines").rglob("*.py"):
        tree = ast.parse(path.read_text())
        added = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_COMMANDS"]
        allowed = {id(part) for node in added for part in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed:
                for word in ("--data", "--run", "data.pipeline", "data.image_size", "run.global", "tools/"):
                    assert word not in node.value, (path, node.lineno, word)
