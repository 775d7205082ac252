import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from chaos.settings import VALUES
from conftest import REPOSITORY
from pipelines.common.errors import UserError
from tools.lib.common.evaluation import EvalConfig
from tools.lib.study.settings import read_study
from trainer.config.cli import read_yaml
from trainer.config.sections import Config, OptimConfig, parse, to_dict, to_yaml


def write(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    path = write(tmp_path, "optim: {lr: 0.5, weight_decay: 0.25}\naugment:\n  crop_area: [0.2, 0.9]\n")
    config = parse(["--config", path, "--optim.lr", "1e-3", "--data.root", "/data", "--teacher.name=null"])
    assert (config.optim.lr, config.optim.weight_decay, config.optim.eps) == (1e-3, 0.25, 1e-8)
    assert config.augment.crop_area == (0.2, 0.9)
    assert config.data.root == Path("/data") and config.teacher.name is None


def test_a_later_file_overrides_an_earlier_one(tmp_path):
    usi = str(REPOSITORY / "configs" / "usi.yaml")
    config = parse(["--config", usi, "--config", write(tmp_path, "schedule: {epochs: 100}")])
    assert config.schedule.epochs == 100 and config.schedule.warmup_epochs == 5


def test_models_take_arguments_of_their_own():
    config = parse(["--student.kwargs.drop_path_rate", "0.1", "--student.kwargs.img_size", "64"])
    assert config.student.kwargs == {"drop_path_rate": 0.1, "img_size": 64}


def test_the_resolved_configuration_reads_back_to_an_equal_one(tmp_path):
    config = parse(["--data.root", "/data", "--student.kwargs.drop_path_rate", "0.1", "--optim.lr", "0.123"])
    path = write(tmp_path, to_yaml(config))
    assert parse(["--config", path]) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


@pytest.mark.parametrize("sizes", ["[[0,128],[100,160],[200,224]]", "[[0, 192]]", "96"])
def test_image_sizes_are_given_on_the_command_line_and_in_a_file(tmp_path, sizes):
    config = parse(["--data.image_size", sizes])
    assert parse(["--config", write(tmp_path, f"data: {{image_size: {sizes}}}")]) == config
    assert parse(["--config", write(tmp_path, to_yaml(config))]) == config
    expected = yaml.safe_load(sizes)
    assert config.data.train_sizes == ([expected] if isinstance(expected, int) else [size for _, size in expected])
    assert config.data.eval_size == config.data.train_sizes[-1]
    assert parse(["--data.image_size", sizes, "--data.eval_image_size", "288"]).data.eval_size == 288


@pytest.mark.parametrize("text", ["optim: {<<: {lr: 1, eps: 0.1}, lr: 0.5}", "optim: {<<: {eps: 0.1}, <<: {lr: 0.5}}"])
def test_a_section_takes_what_is_merged_into_it_and_its_own_value_wins(tmp_path, text):
    assert parse(["--config", write(tmp_path, text)]).optim == OptimConfig(lr=0.5, eps=0.1)


@pytest.mark.parametrize("merged", ["*a", "*b", "[*a, *b]"])
def test_a_section_may_merge_what_has_merged_something_itself(tmp_path, merged):
    path = write(tmp_path, f"base: {{a: &a {{<<: &b {{lr: 2, eps: 0.1}}, lr: 1}}}}\noptim: {{<<: {merged}, lr: 0.5}}")
    assert read_yaml(path)["optim"] == {"lr": 0.5, "eps": 0.1} and read_yaml(path)["base"]["a"]["lr"] == 1


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.lr = 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {weigth_decay: 1}", "my.yaml: unknown key 'optim.weigth_decay'; did you mean 'optim.weight_decay'?"),
        ("optimizer: {lr: 1}", "my.yaml: unknown key 'optimizer.lr'; did you mean 'optim.lr'?"),
        ("lr: 1", "my.yaml: unknown key 'lr'; did you mean 'optim.lr'?"),
        ("run: {lr: 1}", "my.yaml: unknown key 'run.lr'; did you mean 'optim.lr'?"),
        ("optim: 3", "my.yaml: section 'optim' holds 3, not keys with values"),
        ("- 1", "my.yaml: holds list, not sections with keys"),
        ("optim: {lr: [", "my.yaml: not YAML"),
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {lr: -1}", "optim.lr is -1.0; it must lie in [0, 2147483647]"),
        (
            "run: {precision: int8}",
            "my.yaml: run.precision: Expected one of ['auto', 'bf16', 'fp16', 'fp32']. Got value: int8",
        ),
        ("data: {image_size: 0}", "data.image_size is 0; it must be a size from 1 to 4096"),
        ("data: {image_size: [[0, 128], [0, 160]]}", "data.image_size is [[0, 128], [0, 160]]; it must be"),
        ("data: {image_size: [[5, 128]]}", "data.image_size is [[5, 128]]; it must be a size"),
        ("data: {image_size: [128, 160]}", "data.image_size: Expected one of [int, list[tuple[int, int]]]. Got"),
        ("data: {shuffle: local}", "data.shuffle: Expected one of ['global', 'window']. Got value: local"),
        ("data: {shuffle: window, window_shards: 0}", "data.window_shards is 0; it must lie in [1, 2147483647]"),
        ("distill: {label_smoothing: 1}", "distill.label_smoothing is 1.0; it must lie in [0, 1)"),
        ("schedule: {epochs: 3}", "schedule.warmup_epochs is 5; it must be shorter than schedule.epochs, 3"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse(["--config", path])
    assert message in str(error.value)


def test_a_configuration_that_was_asked_for_in_vain_is_not_printed_later(capsys):
    with pytest.raises(UserError, match="optim.lr: Expected a float. Got value: fast"):
        parse(["--print_config", "--optim.lr", "fast"])
    assert parse(["--optim.lr", "0.5"]).optim.lr == 0.5 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.weigth_decay", "1"], "unknown key 'optim.weigth_decay'; did you mean 'optim.weight_decay'?"),
        (["--optim.weigth_decay=1"], "unknown key 'optim.weigth_decay'; did you mean 'optim.weight_decay'?"),
        (["--schedule.epoch", "100"], "unknown key 'schedule.epoch'; did you mean 'schedule.epochs'?"),
        (["--lr", "1"], "unknown key 'lr'; did you mean 'optim.lr'?"),
        (["--xyzzy", "1"], "unknown key 'xyzzy'; --help lists all keys"),
        (["--run.global_batch", "many"], "run.global_batch"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file or directory. Name a file of settings"),
        (["leftover"], "leftover"),
        (["--student", "resnet50"], "resnet50: No such file or directory. Name a file of settings"),
        (["--config"], "Name a file of settings"),
        (["--optim.lr", "fast"], "optim.lr: Expected a float. Got value: fast"),
        (["--run.global_batch", "1.5"], "run.global_batch: Expected a int. Got value: 1.5"),
        (["--ema.warmup", "maybe"], "ema.warmup: Expected a bool. Got value: maybe"),
        (["--optim.betas", "[1]"], "optim.betas: Expected a tuple with 2 elements. Got value: [1]"),
        (["--data.image_size", "[1]"], "data.image_size: Expected one of [int, list[tuple[int, int]]]. Got"),
        (["--run.compile", "maybe"], "run.compile: Expected one of [bool, Literal['auto']]. Got value: maybe"),
        (["--run.micro_batch", "many"], "run.micro_batch: Expected one of [int, Literal['auto']]. Got value: many"),
        (["--teacher.others", "[a]"], "teacher.others: Expected a dot import path string: a"),
        (["--student.kwargs", "5"], "student.kwargs: Expected a dict. Got value: 5"),
        (["--optim.betas", "0.9,0.99"], "optim.betas: Expected a tuple. Got value: 0.9,0.99"),
        (["--run.out", ""], "run.out is empty"),
        (["--run.out", os.fsdecode(b"caf\xe9")], "--run.out caf\\udce9: not UTF-8, so no file can hold it. Rename"),
        (
            ["--run.out=" + os.fsdecode(b"caf\xe9")],
            "--run.out=caf\\udce9: not UTF-8, so no file can hold it. Rename it, or make a link to it",
        ),
        (["--teacher.name", "null", "--teacher.checkpoint", "x"], "teacher.checkpoint is x, but teacher.name is null"),
        (
            ["--student.kwargs.num_classes", "7"],
            "student.kwargs.num_classes: decided by the dataset",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert message in str(error.value)


SECTIONS = {
    (kind, field.name): field.default_factory for kind in (Config, EvalConfig) for field in dataclasses.fields(kind)
}


@pytest.mark.parametrize(("kind", "section"), SECTIONS, ids=lambda part: getattr(part, "__name__", part))
def test_any_value_of_any_setting_is_of_its_type_and_range_or_is_refused_with_its_key(kind, section):
    """All values for all keys; tests/chaos/settings.py gives some of them to the command line and in files."""
    make = SECTIONS[kind, section]
    for field in dataclasses.fields(make):
        for value in [*VALUES, Path("a\0b"), (1, 2), ("x",)]:
            try:
                found = getattr(make(**{field.name: value}), field.name)
            except UserError as error:
                assert f"{section}.{field.name}" in str(error) and "\n" not in str(error), (field.name, value)
                continue
            assert found == value and value not in (10**30, -(10**30), 1e300, "a\0b"), (field.name, value)
            assert value != "" or field.default == "", field.name
            assert value is not None or "None" in str(field.type), field.name
            assert not isinstance(value, bool) or "bool" in str(field.type), field.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {global_batch: null}", "run.global_batch is None; it must be int"),
        ("run: {eval_batch: }", "run.eval_batch is None; it must be int"),
        ("optim: {lr: .nan}", "optim.lr is nan; it must lie in [0, 2147483647]"),
        ("optim: {betas: [0.9, 1]}", "optim.betas is (0.9, 1.0); it must lie in [0, 1)"),
        ("run: {seed: 1000000000000000000000000}", "run.seed is 1000000000000000000000000; it must lie in [0, 92233"),
        ("data: {image_size: 100000}", "data.image_size is 100000; it must be a size from 1 to 4096"),
        ("student: {kwargs: {a: .inf}}", "student.kwargs is {'a': inf}; it must lie in [-2147"),
        ("teacher: {others: [{name: ''}]}", "teacher.others[0].name is ''; it must not be empty"),
        ("run: {watchdog_s: 0.5}", "run.watchdog_s is 0.5; it is 0 or at least 1"),
        ("optim: {lr: 1}\noptim: {eps: 1}", "my.yaml: not YAML: 'optim' stands twice, again in line 2"),
        ("run: {seed: " + "9" * 5000 + "}", "my.yaml: not YAML: larger or deeper than settings in line 1"),
        ("student: {kwargs: {a: &a [*a]}}", "my.yaml: not YAML: larger or deeper than settings"),
        ("student: {kwargs: {a: " + "[" * 30 + "]" * 30 + "}}", "my.yaml: not YAML: larger or deeper than settings"),
        ("optim: {<<: {lr: 1}, lr: 2, lr: 3}", "my.yaml: not YAML: 'lr' stands twice"),
        (
            f"a: &a {dict.fromkeys(range(110), 0)}\nb: {{<<: [{'*a, ' * 110}]}}",
            "my.yaml: not YAML: larger or deeper than settings",
        ),
        ("# " + "x" * 300_000, "my.yaml: larger than 256 KiB, so not a file of settings"),
        ("student: !!python/object/apply:os.system ['true']", "my.yaml: not YAML: could not determine a constructor"),
    ],
)
def test_values_and_files_that_no_run_can_use_are_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse(["--config", write(tmp_path, text)])
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["optim: {lr: fast}", "optim: {lr: -1}"])
def test_a_value_of_a_file_is_refused_with_the_file_and_one_of_the_command_line_without(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=f"^{path}: (--)?optim.lr"):
        parse(["--config", path, "--optim.eps", "0.1"])
    with pytest.raises(UserError, match="^(--)?optim.lr"):
        parse(["--config", path, "--optim.lr", "-2"])
    with pytest.raises(UserError, match=f"^{path}: (--)?optim.lr"):
        parse(["--optim.lr", "-2", "--config", path])


@pytest.mark.parametrize("text", ["", "# optim: {lr: 1}", "null", "optim:\n  # lr: 1\nrun:\n", "optim: ~"])
def test_files_and_sections_whose_keys_are_commented_out_change_nothing(tmp_path, text):
    assert parse(["--config", write(tmp_path, text)]) == parse([])


def test_epochs_of_image_sizes_may_be_larger_than_any_size():
    config = parse(["--schedule.epochs", "6000", "--data.image_size", "[[0,128],[5000,224]]"])
    assert config.data.train_sizes == [128, 224]
    with pytest.raises(UserError, match="a size from 1 to 4096"):
        parse(["--data.image_size", "[[0,128],[100,5000]]"])


def test_sizes_that_begin_after_the_repeated_epochs_are_refused_by_their_settings():
    sizes = ["--data.image_size", "[[0,128],[100,160]]"]
    assert parse([*sizes, "--augment.cycle_epochs", "101"]).augment.cycle_epochs == 101
    message = (
        "^data.image_size: 160 px begin with epoch 100, but augment.cycle_epochs is 50, so epoch 100 repeats epoch 0: "
        "let all sizes begin earlier, or raise augment.cycle_epochs$"
    )
    with pytest.raises(UserError, match=message):
        parse([*sizes, "--augment.cycle_epochs", "50"])


@pytest.mark.parametrize(
    ("colour", "message"),
    [
        ("[0,0,256]", r"augment.fill is .*\(0, 0, 256\).*; it must lie in \[0, 255\]"),
        ("[1,2]", "augment.fill: Expected one of"),
        ("gray", "augment.fill: Expected one of"),
    ],
)
def test_a_fill_colour_is_three_bytes_or_null(colour, message):
    assert parse(["--augment.fill", "[0,128,255]"]).augment.fill == (0, 128, 255)
    assert parse(["--augment.fill", "null"]).augment.fill is None
    with pytest.raises(UserError, match=message):
        parse(["--augment.fill", colour])


def test_a_pipe_is_read_as_a_file():
    read, write_end = os.pipe()
    os.write(write_end, b"\xef\xbb\xbfoptim: {lr: 0.5}")  # with a byte order mark
    os.close(write_end)
    assert parse(["--config", f"/dev/fd/{read}", "--optim.eps", "0.1"]).optim == OptimConfig(lr=0.5, eps=0.1)
    os.close(read)


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optim.weight_decay WEIGHT_DECAY decoupled; none on 1-D parameters" in text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_that_ships_is_valid_and_opens_with_its_story(path):
    if path.name.startswith("study-"):
        read_study(path)
    else:
        parse(["--config", str(path)])
    assert path.read_text().startswith("# ")
