"""What is made of the finished stages: the measurement of speed, and the report."""

from pathlib import Path

from pipelines.common.files import read_json
from tools.lib.study.graph import Graph, StudentStages, build_graph, speed_stage
from tools.lib.study.report import write_report
from tools.lib.study.results import PaperPoint, StudentResult, StudyResults, TeacherResult
from tools.lib.study.running import run
from tools.lib.study.screen import Screen
from tools.lib.study.settings import Study
from tools.lib.study.stage import FAILED, Stage
from trainer.config.paper import paper_models


def finish(study: Study, out: Path, screen: Screen | None = None) -> int:
    """Measure the speed of what is exported, if it has not been, and write the report of what is there.

    Returns:
      as for `run`.
    """
    graph = build_graph(study, out)
    speed = speed_stage(study, graph)
    stages = [] if speed is None else [speed]
    screen = screen or Screen([])
    for stage in stages:
        screen.add(stage)
    stopped_by = run(stages, slots=1, together=1, screen=screen)
    if not stopped_by:
        screen.say(f"report: {write_report(out, results_of(study, graph, speed))}")
    return stopped_by


def results_of(study: Study, graph: Graph, speed: Stage | None) -> StudyResults:
    """What the stages have made, as the report reads it."""
    common = {**graph.common, **({} if speed is None else {"speed": speed})}
    stages = [*graph.stages, *([] if speed is None else [speed])]
    names = {each.student.name for each in graph.students}
    measured = speed.needs if speed is not None else ()
    return StudyResults(
        title=study.title,
        dataset=graph.dataset if graph.dataset.is_dir() else None,
        students=[_student(each) for each in graph.students],
        teacher=_teacher(study, graph),
        store=graph.common["store"].product if "store" in graph.common and graph.common["store"].is_done else None,
        speed=speed.product if speed is not None and speed.is_done else None,
        speed_models={
            each.student.label: str(each.export.product) for each in graph.students if each.export in measured
        },
        seconds={stage.name: stage.seconds for stage in stages if stage.is_done},
        stages_failed={stage.name: stage.failure for stage in common.values() if stage.failure},
        commands={stage.name: stage.command_run for stage in common.values()},
        paper=[
            PaperPoint(model.name, model.top1, model.source)
            for model in paper_models()
            if study.paper == "usi" and model.name in names
        ],
    )


def _teacher(study: Study, graph: Graph) -> TeacherResult | None:
    if study.teacher is None:
        return None
    trained = graph.common.get("teacher")
    return TeacherResult(study.teacher.name, trained.product if trained is not None else None)


def _student(each: StudentStages) -> StudentResult:
    failed = next((stage for stage in each.stages if not stage.is_done), None)
    reason, log = "", None
    if failed is not None:
        # A stage that was left out has no failure of its own.
        reason = f"{failed.name}: {failed.failure or 'was not carried out'}"
        log = read_json(failed.folder / FAILED).get("log")
    return StudentResult(
        title=each.student.label,
        name=each.student.name,
        kwargs=each.student.kwargs,
        seed=each.seed,
        overrides=each.student.overrides,
        run=each.train.product if each.train.product.is_dir() else None,
        evaluations={name: stage.product for name, stage in each.evaluations.items() if stage.is_done},
        exported=each.export.product if each.export.is_done else None,
        failed=reason,
        log=Path(log) if log else None,
        commands=[stage.command_run for stage in each.stages],
    )
