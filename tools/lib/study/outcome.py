"""Measures speed and writes the report when the other stages have ended."""

from tools.lib.study.graph import Graph, StudentStages
from tools.lib.study.report import write_report
from tools.lib.study.results import PaperPoint, StudentResult, StudyResults, TeacherResult
from tools.lib.study.running import run
from tools.lib.study.screen import Screen
from tools.lib.study.stage import LOG, Stage
from trainer.config.paper import paper_models


def finish(graph: Graph, screen: Screen) -> int:
    """Measure the speed of what is exported, if it has not been, and write the report of what is there.

    Returns:
      as for `run`.
    """
    graph.add_speed()
    screen.stages = graph.stages
    speed = [stage for stage in graph.stages if stage.kind == "speed"]
    stopped_by = run(speed, screen=screen)
    if not stopped_by:
        screen.say(f"report: {write_report(graph.out, results_of(graph))}")
    return stopped_by


def results_of(graph: Graph) -> StudyResults:
    """Collect what the stages have made, as the report reads it."""
    study, common = graph.study, graph.common
    done = {kind: stage.product for kind, stage in common.items() if stage.is_done}
    measured = common["speed"].needs if "speed" in common else ()
    names = {each.name for each in study.students}
    trained = common["teacher"].product if "teacher" in common else None
    return StudyResults(
        title=study.title,
        dataset=graph.dataset if graph.dataset.is_dir() else None,
        students=[_student(each) for each in graph.students],
        teacher=TeacherResult(study.teacher.name, trained) if study.teacher is not None else None,
        store=done.get("store"),
        speed=done.get("speed"),
        speed_models={s.student.label: str(s.export.product) for s in graph.students if s.export in measured},
        seconds={stage.name: stage.seconds for stage in graph.stages if stage.is_done},
        stages_failed={kind: stage.failure for kind, stage in common.items() if stage.failure},
        commands={kind: _command(stage) for kind, stage in common.items()},
        paper=[
            PaperPoint(model.name, model.top1, model.source)
            for model in paper_models()
            if study.paper == "usi" and model.name in names
        ],
    )


def _student(each: StudentStages) -> StudentResult:
    missing = next((stage for stage in each.stages if not stage.is_done), None)
    reason = missing and f"{missing.name}: {missing.failure or 'was not carried out'}"
    return StudentResult(
        title=each.student.label,
        name=each.student.name,
        kwargs=each.student.kwargs,
        seed=each.seed,
        overrides=each.student.overrides,
        run=each.train.product if each.train.product.is_dir() else None,
        evaluations={name: stage.product for name, stage in each.evaluations.items() if stage.is_done},
        exported=each.export.product if each.export.is_done else None,
        failed=reason or "",
        log=missing.folder / LOG if missing and missing.failure else None,
        commands=[_command(stage) for stage in each.stages],
    )


def _command(stage: Stage) -> list[str]:
    """The command that made its result, or that is going to."""
    return stage.noted.get("command", stage.command)
