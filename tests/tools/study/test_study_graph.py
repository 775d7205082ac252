"""The graph of a study: which commands it has, and which of them a changed setting does again."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from support.model_folder import write_folder
from support.studies import DEMO, changed, graph_of
from tools import compare, export, record_teacher, shard_imagenet
from tools.lib.common.hardware import BACKEND_PACKAGES
from tools.lib.study import dry_run
from tools.lib.study.graph import Graph, read_graph
from tools.lib.study.running import jobs_of
from tools.lib.study.settings import read_study
from tools.lib.study.stage import STATE, TRAININGS, Stage
from trainer.config.natures import plan_settings
from trainer.config.sections import TeacherConfig, parse, to_yaml
from trainer.sharing import check_configs

pytest_plugins = ["support.model_folder"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, Graph]:
    """The graph of DEMO, which tests do not carry out, and the folder of its study."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, graph_of(folder)


def redone(demo: tuple[Path, Graph], content: dict) -> set[str]:
    """The stages that have another folder than in DEMO, or are in one of both alone."""
    folder, graph = demo
    before, after = ({stage.name: stage.folder for stage in each.stages} for each in (graph, graph_of(folder, content)))
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


def carry_out(stage: Stage) -> None:
    """Write what a stage that is done leaves behind."""
    stage.product.parent.mkdir(parents=True, exist_ok=True)
    if not stage.product.exists():
        stage.product.mkdir()
    if stage.kind in TRAININGS:
        (stage.product / "summary.json").write_text('{"finished": true}')
    stage.note(command=stage.command, done=True, seconds=1.0)


LONGER = {"name": "test_vit", "title": "longer", "overrides": {"schedule.epochs": 20}}
OTHER_PLAN = {"augment.flip": 0.0}
STUDENTS = ("test_byobnet-s0", "ViT-s0", "ViT-s1")
OF_STUDENTS = {
    f"{kind} {name}"
    for name in STUDENTS
    for kind in ("train", "evaluate ema", "evaluate raw", "evaluate small", "export")
}


def test_every_stage_stands_behind_what_it_needs_and_has_a_name_and_a_folder_of_its_own(demo):
    stages = demo[1].stages
    assert {stage.name for stage in stages} == {"shards", "teacher", "store"} | OF_STUDENTS
    seen = set()
    for stage in stages:
        assert {need.folder for need in stage.needs} <= seen
        seen.add(stage.folder)
    assert len(seen) == len(stages)
    needs = {stage.name: [need.name for need in stage.needs] for stage in stages}
    assert needs["teacher"] == ["shards"] and needs["store"] == ["shards", "teacher"]
    assert needs["train ViT-s1"] == ["store"]
    assert needs["export ViT-s1"] == ["train ViT-s1", "evaluate ema ViT-s1"]


def test_the_program_of_each_stage_takes_its_command(tmp_path):
    graph = graph_of(tmp_path)
    parsers = {"export": export._parse, "shard_imagenet": shard_imagenet._parse}
    for stage in graph.stages:
        stage.folder.mkdir(parents=True)
        if stage.config is not None:
            (stage.folder / "settings.yaml").write_text(to_yaml(stage.config))
        python, program, *words = stage.command
        assert python == sys.executable and Path(program).is_file()
        if program.endswith("trainer/run.py"):
            assert parse(words).run.out == stage.product
        elif program.endswith("tools/record_teacher.py"):
            options = record_teacher._parse(words)
            assert options.store == stage.product and parse(options.settings).teacher.name == "test_resnet"
        elif not program.endswith("tools/evaluate.py"):
            parsers[Path(program).stem](words)
    for each in graph.students:
        carry_out(each.export)
    for stage in graph.stages:
        carry_out(stage)
    graph = graph.with_speed()
    speed = graph.stages[-1]
    options = compare._parse(speed.command[2:])
    assert options.models == [str(graph.students[n].export.product) for n in (0, 1)] and options.repeats == 3


def test_all_students_learn_from_the_store_by_one_plan_and_differ_in_model_and_seed_alone(demo):
    graph = demo[1]
    configs = [each.config for each in graph.students]
    assert {(c.student.name, c.student.seed) for c in configs} == {
        ("test_byobnet", 0),
        ("test_vit", 0),
        ("test_vit", 1),
    }
    assert {c.teacher.store for c in configs} == {graph.common["store"].product}
    assert {json.dumps([c.augment.fill, c.run.seed]) for c in configs} == {"[[124, 116, 104], 0]"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed("recipe", "overrides", "optim.lr", 0.001), {"teacher", "store"} | OF_STUDENTS),
        (changed("recipe", "overrides", "schedule.epochs", 8), OF_STUDENTS),
        (changed("recipe", "overrides", "distill.weight", 3), OF_STUDENTS),
        (changed("teacher", "train", "run.eval_every", 3), {"teacher", "store"} | OF_STUDENTS),
        (changed("teacher", "epochs", 2), OF_STUDENTS),
        (changed("students", 2, LONGER), "longer-s0"),
        (changed("teacher", "codec", "fp16"), {"store"} | OF_STUDENTS),
        (changed("students", 0, {"name": "test_byobnet", "overrides": {"optim.lr": 0.001}}), "test_byobnet-s0"),
        (changed("students", 1, {"name": "test_vit", "seeds": [0, 1, 2], "title": "ViT"}), "ViT-s2"),
        (changed("evaluate", "suites", "small", "data.image_size", 40), {f"evaluate small {s}" for s in STUDENTS}),
    ],
    ids=range(10),
)
def test_a_changed_setting_does_again_what_depends_on_it_and_nothing_else(demo, content, expected):
    found = redone(demo, content)
    if isinstance(expected, str):
        expected = {name for name in found | OF_STUDENTS if name.endswith(expected)}
    assert found == expected


def test_what_is_not_meant_to_change_a_result_does_nothing_again(demo):
    content = {**copy.deepcopy(DEMO), "together": 2, "title": "another title"}
    content["students"][0] = {"name": "test_byobnet", "overrides": {"run.eval_every": 3}}
    content["recipe"]["overrides"] |= {"run.log_every": 7, "data.threads": 1, "run.device": "cpu"}
    content["recipe"]["overrides"] |= {"data.window_shards": 3}  # The order is of all images.
    assert redone(demo, content) == set()


def test_the_settings_of_a_teacher_are_none_of_its_own_training(demo):
    precise = redone(demo, changed("recipe", "overrides", "teacher.precision", "fp32"))
    assert precise == {"store"} | OF_STUDENTS


def test_a_student_whose_teacher_has_other_settings_learns_from_the_teacher_itself(tmp_path):
    other = {"name": "test_vit", "title": "other", "overrides": {"teacher.image_size": 48}}
    graph = graph_of(tmp_path, changed("students", 2, other))
    assert graph.learning_live == ["other-s0"]
    live = graph.students[-1].config.teacher
    assert live.store is None and live.name == "test_resnet" and live.image_size == 48


def test_speed_is_measured_again_for_its_own_settings_and_on_another_device_alone(tmp_path):
    carry_out(graph_of(tmp_path).students[0].export)

    def folder(content: dict) -> Path:
        return graph_of(tmp_path, content).with_speed().common["speed"].folder

    contents = [DEMO, changed("speed", "repeats", 4)]
    contents += [changed("recipe", "overrides", "run.device", device) for device in ("cpu", "cuda")]
    assert len({folder(content) for content in contents}) == 4
    assert folder(changed("together", 3)) == folder(DEMO)


def test_files_count_by_their_content(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    content = changed("recipe", "config", str(recipe)) | {"students": ["test_byobnet"], "evaluate": {}}
    recipe.write_text("augment: {mix_group: 32}\nrun: {global_batch: 64}\n")
    first = [stage.folder for stage in graph_of(tmp_path, content).stages]
    recipe.write_text("# A comment changes nothing.\naugment: {mix_group: 32}\nrun: {global_batch: 64}\n")
    assert [stage.folder for stage in graph_of(tmp_path, content).stages] == first
    recipe.write_text("augment: {mix_group: 16}\nrun: {global_batch: 64}\n")
    assert not {stage.folder for stage in graph_of(tmp_path, content).stages[1:]} & {*first}
    weights = tmp_path / "teacher.pth"
    content |= {"teacher": {"name": "test_resnet", "checkpoint": str(weights)}}
    weights.write_bytes(b"one")
    before = graph_of(tmp_path, content).common["store"].fingerprint
    weights.write_bytes(b"two!")
    assert graph_of(tmp_path, content).common["store"].fingerprint != before


def test_model_folders_count_by_their_content(tmp_path, model):
    teacher, student = (write_folder(tmp_path / name, model) for name in ("teacher", "student"))
    content = {
        **copy.deepcopy(DEMO),
        "teacher": {"name": f"local-dir:{teacher}"},
        "students": ["test_vit", {"name": f"local-dir:{student}", "title": "own"}],
        "evaluate": {"weights": ["ema"]},
    }

    def redone_after(file: Path, content: dict) -> set[str]:
        before = {stage.name: stage.folder for stage in graph_of(tmp_path, content).stages}
        file.write_bytes(file.read_bytes() + b" ")
        return {stage.name for stage in graph_of(tmp_path, content).stages if before[stage.name] != stage.folder}

    of_own = {"train own-s0", "evaluate ema own-s0", "export own-s0"}
    of_vit = {name.replace("own", "test_vit") for name in of_own}
    assert redone_after(teacher / "model.safetensors", content) == {"store"} | of_own | of_vit
    assert redone_after(student / "model.safetensors", content) == set()  # It begins at random.
    content["recipe"]["overrides"]["student.pretrained"] = True
    assert redone_after(student / "model.safetensors", content) == of_own
    (student / "config.json").unlink()
    with pytest.raises(UserError, match=r"study.yaml: students\[1\]: local-dir:.*: there is no config.json"):
        graph_of(tmp_path, content)


def test_a_changed_setting_names_the_stages_that_are_done_again_for_it_and_no_new_ones(tmp_path, monkeypatch):
    for stage in graph_of(tmp_path).stages:
        carry_out(stage)

    def done_again(content: dict) -> dict[str, set[str]]:
        found = [line.partition(": does ") for line in dry_run.redone(graph_of(tmp_path, content))]
        return {cause: {*rest.partition(" again: ")[2].split(", ")} for cause, _, rest in found}

    monkeypatch.setattr(dry_run, "named", lambda names, _: ", ".join(names))

    longer = changed("recipe", "overrides", "schedule.epochs", 8)
    assert done_again(longer) == {"schedule.epochs 6 -> 8": OF_STUDENTS}  # The recording is lengthened.
    longer["teacher"]["codec"] = "fp16"
    expected = {"codec int8 -> fp16": {"store"} | OF_STUDENTS, "schedule.epochs 6 -> 8": OF_STUDENTS}
    assert done_again(longer) == expected
    faster = {"name": "test_vit", "seeds": [0, 1, 2], "title": "ViT", "overrides": {"optim.lr": 0.001}}
    again = {name for name in OF_STUDENTS if "ViT" in name}
    assert done_again(changed("students", 1, faster)) == {"optim.lr 0.002 -> 0.001": again}
    assert done_again(DEMO) == done_again(changed("students", 2, LONGER)) == {}


def test_a_result_counts_only_with_its_product_and_its_own_fingerprint(tmp_path):
    stage = graph_of(tmp_path).common["shards"]
    carry_out(stage)
    assert stage.is_done
    stage.product.rmdir()
    assert not stage.is_done
    stage.product.mkdir()
    (stage.folder / STATE).write_text('{"fingerprint": "another", "done": true}')
    assert not stage.is_done


def test_a_training_goes_to_its_end_whatever_the_recipes_own_file_says_and_is_done_only_there(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {stop_after_steps: 25}\n")
    graph = graph_of(tmp_path, changed("recipe", "config", str(recipe)))
    stage = graph.students[0].train
    assert {each.config.run.stop_after_steps for each in graph.stages if each.config is not None} == {0}
    carry_out(stage)
    assert stage.is_done
    (stage.product / "summary.json").write_text('{"finished": false}')
    assert not stage.is_done


def test_a_student_of_another_plan_gets_the_teacher_itself_because_no_store_fits(tmp_path):
    content = changed("students", 0, {"name": "test_byobnet", "overrides": OTHER_PLAN})
    graph = graph_of(tmp_path, content)
    first, others = graph.students[0], graph.students[1:]
    assert [need.name for need in first.train.needs] == ["teacher"]
    assert first.config.teacher.store is None and first.config.teacher.name == "test_resnet"
    assert first.config.teacher.checkpoint == graph.common["teacher"].product / "checkpoints" / "best.pt"
    assert all(each.config.teacher.store is not None for each in others)
    trained = [[stage.name for stage in job] for job in jobs_of(graph.stages, 3) if job[0].kind == "train"]
    assert trained == [["train test_byobnet-s0"], ["train ViT-s0", "train ViT-s1"]]


@pytest.mark.parametrize(
    ("overrides", "is_alone"),
    [
        ({"optim.lr": 0.01}, False),
        ({"run.log_every": 7}, False),
        ({"data.prefetch": 5}, True),
        ({"data.threads": 1}, True),
        ({"data.max_bad_fraction": 0.5}, True),
        ({"run.device": "cpu"}, True),
        ({"run.channels_last": False}, True),
        ({"run.micro_batch": 16}, True),
        ({"augment.fill": [1, 2, 3]}, True),
    ],
)
def test_students_are_trained_together_if_the_trainer_takes_them_together(tmp_path, overrides, is_alone):
    graph = graph_of(tmp_path, changed("students", 0, {"name": "test_byobnet", "overrides": overrides}))
    jobs = [job for job in jobs_of(graph.stages, 3) if job[0].kind == "train"]
    assert len(jobs[0]) == (1 if is_alone else 3)
    if not is_alone:
        configs = [stage.config for stage in jobs[0] if stage.config is not None]  # As long as there is no store:
        check_configs([dataclasses.replace(config, teacher=TeacherConfig(name=None)) for config in configs])


@pytest.mark.parametrize("overrides", [{"run.loggers": ["wandb"]}, {"run.micro_batch": "auto"}, {"augment.fill": None}])
def test_students_that_fit_no_others_are_trained_alone(tmp_path, overrides):
    graph = graph_of(tmp_path, changed("students", 1, {"name": "test_vit", "seeds": [0, 1], "overrides": overrides}))
    assert [len(job) for job in jobs_of(graph.stages, 3) if job[0].kind == "train"] == [1, 1, 1]


def test_a_study_without_a_teacher_and_one_with_repeated_views(tmp_path):
    graph = graph_of(tmp_path, {key: value for key, value in DEMO.items() if key != "teacher"})
    assert [*graph.common] == ["shards"] and graph.students[0].config.teacher.members == []
    graph = graph_of(tmp_path, changed("teacher", "epochs", 2))
    assert graph.common["store"].epochs == 2 and {each.config.augment.cycle_epochs for each in graph.students} == {2}
    teacher = graph.common["teacher"].config
    assert teacher is not None and teacher.augment.cycle_epochs == 0


def test_a_longer_student_lengthens_the_store_and_does_no_other_training_again(tmp_path):
    for stage in graph_of(tmp_path).stages:
        carry_out(stage)
    graph = graph_of(tmp_path, changed("students", 2, LONGER))
    to_do = {"store", *(stage.name for stage in graph.students[-1].stages)}
    assert {stage.name for stage in graph.stages if not stage.is_done} == to_do
    assert graph.common["store"].command[-2:] == ["--epochs", "22"]
    assert graph.common["store"].state == "to be lengthened to 22 epochs"
    carry_out(graph.common["store"])
    assert graph.common["store"].is_done and graph_of(tmp_path).common["store"].is_done


@pytest.mark.parametrize(
    ("content", "epochs"),
    [
        (DEMO, 8),  # 6 and the recipe's cool-down of 2
        (changed("teacher", "epochs", 100), 8),
        (changed("students", 2, LONGER), 22),
        (changed("students", 2, {**LONGER, "overrides": {"schedule.epochs": 20, **OTHER_PLAN}}), 8),
    ],
    ids=["the longest training", "more than that", "a longer student", "a longer student of another plan"],
)
def test_the_store_holds_the_epochs_that_its_longest_student_reads(tmp_path, content, epochs):
    store = graph_of(tmp_path, content).common["store"]
    assert store.epochs == epochs and store.command[-2:] == ["--epochs", str(epochs)]


def test_a_store_that_no_student_reads_is_no_stage(tmp_path):
    content = changed("students", [{"name": "test_vit", "overrides": OTHER_PLAN}])
    graph = graph_of(tmp_path, content)
    assert [*graph.common] == ["shards", "teacher"]
    assert [need.name for need in graph.students[0].train.needs] == ["teacher"]


def test_a_recipe_without_an_ema_evaluates_and_exports_the_raw_weights(tmp_path):
    content = changed("recipe", "overrides", "ema.decay", 0)
    content["evaluate"]["weights"] = ["raw"]
    graph = graph_of(tmp_path, content)
    assert [*graph.students[0].evaluations] == ["raw", "small"]
    assert "raw" in graph.students[0].export.command


_BOTH_VIT = "students: two are called 'ViT'. Give one of them a title of its own$"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**DEMO, "studens": []}, "unknown key 'studens'; did you mean 'students'?"),
        (changed("teacher", "nam", "x"), "teacher: unknown key 'nam'; did you mean 'name'?"),
        (changed("students", 0, {"name": "test_vit", "seed": [1]}), r"students\[0\]: unknown key 'seed'; did you mean"),
        (changed("students", 0, {"seeds": [1]}), r"students\[0\]: 'name' is missing"),
        (
            changed("students", 0, {"name": "a", "seeds": [1, 1]}),
            r"students\[0\]: seeds is \[1, 1\]: name at least one",
        ),
        (changed("students", []), "must name at least one"),
        (changed("evaluate", None), "evaluate is None; it must be keys with values"),
        (changed("evaluate", "suites", 3), "evaluate: suites is 3; it must be keys with values"),
        (changed("students", 0, 3), r"students\[0\]: is 3, not keys with values"),
        ({**DEMO, "dataset": "OUT"}, "give either dataset, a folder of shards, or source"),
        (changed("together", 0), "together is 0; it must lie in"),
        (
            changed("evaluate", "weights", ["best"]),
            r"weights is \['best'\]; it must be a list, .....,? each one of ema",
        ),
        (changed("students", "test_vit"), r"study.yaml: students is 'test_vit'; it must be a list, \[...\]$"),
        (changed("teacher", "checkpoint", "x.pth"), "teacher: checkpoint and train are both given"),
        (changed("recipe", "overrides", "run.out", "x"), "recipe.overrides: the study decides run.out. Leave it out$"),
        (changed("evaluate", "suites", "small", {"data.image_siz": 3}), "evaluate: suites.small: unknown key 'data"),
        (changed("evaluate", "suites", "small", {"data.image_size": -3}), "suites.small: data.image_size is -3"),
        (changed("evaluate", "suites", "small", {"data.real_labels": "no.json"}), "no.json: not found"),
        (changed("evaluate", "suites", "small", {"run.json": "x"}), "suites.small: the study decides run.json. Leave"),
        (changed("evaluate", "suites", "raw", {}), "evaluate: suites.raw: a suite is called by letters"),
        (changed("evaluate", "suites", "ema", {}), "evaluate: suites.ema: a suite is called by letters"),
        (changed("evaluate", "suites", "a b", {}), "evaluate: suites.a b: a suite is called by letters"),
        (changed("evaluate", "suites", "small", {"run.device": "cpu"}), "suites.small: the study decides run.device"),
        (changed("recipe", "overrides", "config", "x.yaml"), "recipe.overrides: 'config' is no setting. Give SECTION"),
        (
            changed("students", 0, {"name": "test_vit", "overrides": {"ema.decay": 0}}),
            r"students\[0\]: ema.decay is 0: ",
        ),
        (changed("speed", "backends", ["eagr"]), "speed: backends: 'eagr' is no backend. Name some of openvino, "),
        (
            changed("recipe", "overrides", "schedule.epoch", 3),
            "recipe.overrides: unknown key 'schedule.epoch'; did you mean 'schedule.epochs'",
        ),
        (changed("teacher", "train", "optim.lr", -1), "teacher.train: optim.lr is -1"),
        (changed("students", 0, {"name": "a", "overrides": {"optim.lr": "x"}}), r"students\[0\]: .*optim.lr"),
        (changed("students", 0, "test_vit"), "students: 'ViT-s0' and 'test_vit-s0' are the same"),
        (changed("students", 0, {"name": "test_resnet", "title": "ViT"}), _BOTH_VIT),
        (changed("students", 0, {"name": "test_resnet", "title": "ViT", "seeds": [2]}), _BOTH_VIT),
        (changed("paper", "somebody"), "paper is 'somebody'; it must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_in_the_file_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        graph_of(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'study.yaml'}: ") and "demo.yaml" not in str(error.value)


def test_a_backend_that_is_not_installed_is_named_with_what_helps(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKEND_PACKAGES, "eager", ("no_such_package", "pip install it"))
    with pytest.raises(UserError, match="speed: backends: eager is not installed. Run: pip install it$"):
        graph_of(tmp_path)


def test_a_mistake_in_the_recipes_own_file_names_that_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("schedule: {epoch: 3}\n")
    with pytest.raises(UserError, match=r"recipe.config: .*recipe.yaml: unknown key 'schedule.epoch'"):
        graph_of(tmp_path, changed("recipe", "config", str(tmp_path / "recipe.yaml")))


@pytest.mark.parametrize(
    "settings",
    [{"store": "STORE"}, {"checkpoint": "x.pth"}, {"kwargs": {"a": 1}}, {"others": [{"name": "test_vit"}]}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_recipes_own_file_does_not_choose_the_teacher(tmp_path, settings):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"teacher": settings}))
    message = rf"recipe.config: .*recipe.yaml: the study decides teacher.{next(iter(settings))}. Leave it out$"
    with pytest.raises(UserError, match=message):
        graph_of(tmp_path, changed("recipe", "config", str(recipe)))


def test_the_teacher_of_the_recipes_own_file_gives_way_to_that_of_the_study(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: {name: test_vit, store: null, precision: fp16}\n")
    graph = graph_of(tmp_path, changed("recipe", "config", str(recipe)))
    assert {(c.teacher.name, c.teacher.precision) for c in (s.config for s in graph.students)} == {
        ("test_resnet", "fp16")
    }


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("title: a\nstudents: [b\npaper: usi\n")
    with pytest.raises(UserError, match=r"bad.yaml: not YAML: .* in line 3, column 6$"):
        read_study(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match=r"none.yaml: No such file"):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["study-demo", "study-imagenet"])
def test_the_studies_of_the_repository_are_graphs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    graph = read_graph(REPOSITORY / "configs" / f"{name}.yaml", tmp_path)
    assert len(graph.students) == sum(len(each.seeds) for each in graph.study.students) >= 10
    assert all(plan_settings(each.config) == plan_settings(graph.students[0].config) for each in graph.students)
