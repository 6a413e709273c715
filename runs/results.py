"""The report of a run."""

from collections.abc import Sequence

from licq.evaluation.anchors import anchors_of
from licq.report.build import build_report, write_report
from licq.report.text import coverage_lines
from licq.runs.expected import planned_report
from licq.runs.quality import BASELINE, planned, run_all_qualities
from licq.runs.run import Run
from licq.runs.shared import shared
from licq.support.progress import progress
from licq.support.work import working


def finish_run(run: Run, argv: Sequence[str] = ()) -> dict:
    """Every quality, then the files of the report; returns what report.json holds.

    Args:
        argv: the command line, for qualities in other processes.
    """
    items = [*planned(run), *planned_report(run)] if run.progress else []
    with working(run.arch, items, run.progress, workers=run.workers) as work:
        points = run_all_qualities(run, argv)
        if work is not None:
            work.enter("")
        report = summarize(run, points)
        with progress(total=1, desc="report", enabled=run.progress, leave=False):
            write_report(run.folder.path, report)
    run.folder.forget_measured()
    return report


def summarize(run: Run, points: list[dict]) -> dict:
    """The dictionary of report.json from the points of `run_all_qualities`."""
    config, args = run.config, run.args
    what = {
        "result": "anchors",
        "arch": run.arch,
        **run.folder.settings["evaluation"],
        "metric": args.metric,
    }
    anchors = None
    if args.with_anchors:
        anchors = shared(
            run.shared_results,
            what,
            lambda: anchors_of(run.arch, run.dataset, args.metric, progress=run.progress),
        )
    coverage = points[0]["coverage"]
    return build_report(
        arch=run.arch,
        preset=config.preset,
        loss=config.reconstruction.loss,
        unit=config.reconstruction.unit,
        w_bits=config.quant.w_bits,
        a_bits=config.quant.a_bits,
        dataset=run.dataset.name,
        images=len(run.dataset),
        points=points,
        anchors=anchors,
        warnings=run.warnings,
        baseline=BASELINE if args.baseline else None,
        metric=args.metric,
        config={
            **config.quant.to_dict(),
            **config.reconstruction.to_dict(),
            "metric": args.metric,
            "calibration": run.folder.settings["calibration"],
            "device": str(run.device),
        },
        kept_in_float=coverage_lines(coverage),
        left_alone=coverage["left_alone"],
    )


def written_files(run: Run) -> str:
    """Where the report and the models are, two lines for a terminal."""
    models = dict.fromkeys(str(run.folder.model(model.quality, run.is_variable)) for model in run.models)
    return (
        f"report:  {run.folder.path / 'report.html'}, report.md, report.json, rd.png\n"
        f"models:  {', '.join(models)}"
    )
