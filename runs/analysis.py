"""`--analyze`: what each layer and each unit of a codec would cost, measured, in tables and pictures."""

from collections.abc import Iterator

from licq.reconstruction.analysis import Probe, analyze
from licq.reconstruction.api import prepare_calibration
from licq.reconstruction.objective import Objective
from licq.report.analysis import stored_table, unit_table, write_analysis
from licq.runs.float_models import FloatModel
from licq.runs.quality import quality_settings
from licq.runs.run import Run

_ROWS = 12  # of the table on a terminal


def analyze_run(run: Run) -> Iterator[str]:
    """OUT/q<quality>/analysis.{json,md} and pictures of every codec; yields of each what a terminal shows.

    A variable-rate codec is one, for all rates.
    """
    for source in run.codecs:
        run.say(f"{source.arch} quality {source.quality}")
        yield _analyze_codec(run, source)


def _analyze_codec(run: Run, source: FloatModel) -> str:
    args, config = run.args, run.config
    folder = run.folder.quality(source.quality, quality_settings(source))
    objective = Objective(source.lmbda, args.metric)
    start = prepare_calibration(
        source.load(),
        run.crops,
        config,
        objective,
        device=run.device,
        whole=run.whole,
        progress=run.progress,
    )
    batches = start.measured_batches
    analysis = analyze(
        Probe(start.qmodel, batches, objective),
        start.sensitivities,
        config.reconstruction.unit,
        args.landscape,
        folder.part,
        progress=run.progress,
    )
    bits = f"W{config.quant.w_bits}A{config.quant.a_bits}"
    title = f"{source.arch} quality {source.quality}, {bits}, preset {config.preset}"
    analysis |= {"title": title, "crops": sum(map(len, batches)), "settings": folder.settings}
    write_analysis(folder.path, analysis)
    folder.finish()
    j = analysis["float"]["j"]
    return (
        f"{title}: J {j:.4f}, with everything quantized {100 * analysis['all']['j'] / j:+.3f} %\n\n"
        f"{unit_table(analysis, most=_ROWS)}\n\n"
        f"{stored_table(analysis, most=_ROWS)}\n\n"
        f"report:  {folder.path / 'analysis.md'}, analysis.json, delta_j.png, ranges.png, channels.png, "
        "landscape.png\n"
    )
