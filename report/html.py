"""report.html: the report in one file that needs no other, no network and no script. Every number is one of
report.json."""

import base64
import io
import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from licq.report import tables, text
from licq.report.changes import image_deltas, predicted_rises
from licq.report.crops import split_panels
from licq.report.figures import rd_measures, rd_svg, rises_svg, scatter_svg
from licq.report.labels import percent, title
from licq.report.tables import Table

_LAYERS_SHOWN = 20
_IMAGES_SHOWN = 10
_MEASURES = {"psnr": "PSNR", "ms_ssim": "MS-SSIM"}


def render_html(report: dict, folder: Path) -> str:
    """The page. Crops are read from the files below `folder` that the report's points name; one that is not
    there is left out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["marked"] = _marked
    scatter = scatter_svg(report)
    return (
        environment.get_template("report.html.j2").render(
            title=title(report),
            finding=text.finding(report),
            facts=_facts(report),
            curves=[
                (_MEASURES[measure], _uri("svg+xml", rd_svg(report, measure)))
                for measure in rd_measures(report)
            ],
            bd_table=tables.bd_table(report),
            bd_notes=text.bd_notes(report),
            points=tables.points_table(report),
            explanation=text.explanation(report),
            scatter=scatter and _uri("svg+xml", scatter),
            deltas=_deltas_table(report),
            rises=_rises(report),
            remaining=tables.REMAINING,
            clipped=tables.clipped_table(report),
            clipped_note=tables.CLIPPED,
            crops=_crops(report, folder),
            cost=tables.cost_table(report),
            bits=tables.layer_bits_tables(report),
            left=text.left_in_float(report),
            warnings=report["warnings"],
            settings=tables.settings_table(report),
        )
        + "\n"
    )


def _facts(report: dict) -> dict[str, str]:
    """What was quantized, how and on what, a line each."""
    config = report.get("config") or {}
    facts = {
        "Codec": f"{report['arch']}, quality {', '.join(str(point['quality']) for point in report['points'])}"
    }
    if report["w_bits"] is not None:
        mixed = ", of single layers below" if any(point.get("bits") for point in report["points"]) else ""
        facts["Bits"] = f"weights {report['w_bits']}, activations {report['a_bits']}{mixed}"
        facts["Method"] = ", ".join(
            f"{key} {report[key]}" for key in ("preset", "loss", "unit") if report[key] is not None
        )
    if calibration := config.get("calibration"):
        facts["Calibrated on"] = (
            f"{calibration['dataset']}, {_counted(calibration['images'], 'image')}, "
            f"{_counted(calibration['crops_per_image'], 'crop')} of {calibration['crop']} pixels from each"
        )
    facts["Evaluated on"] = f"{report['dataset']}, {_counted(report['images'], 'image')}"
    if device := config.get("device"):
        facts["Device"] = device
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return facts


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"


def _deltas_table(report: dict) -> Table:
    """The images that quantization costs most."""
    rows = [
        [
            change["quality"],
            change["image"],
            percent(change["bpp"]),
            f"{change['psnr']:+.3f}",
            percent(change["j"]),
        ]
        for change in image_deltas(report)[:_IMAGES_SHOWN]
    ]
    return Table(["quality", "image", "delta bpp", "delta PSNR [dB]", "delta J"], rows, text=(1,))


def _rises(report: dict) -> list[tuple[str, str]]:
    """(caption, picture) of the bars of each quality; once where all share a codec."""
    qualities_of: dict[tuple, list] = {}
    for point in report["points"]:
        if rises := predicted_rises(point):
            qualities_of.setdefault(tuple(rises.items()), []).append(point["quality"])
    pictures = []
    for rises, qualities in qualities_of.items():
        name = f"quality {', '.join(map(str, qualities))}"
        shown = (
            f"{_LAYERS_SHOWN} of {len(rises)} layers"
            if len(rises) > _LAYERS_SHOWN
            else _counted(len(rises), "layer")
        )
        pictures.append(
            (f"{name[0].upper()}{name[1:]}: {shown}", _uri("svg+xml", rises_svg(dict(rises[:_LAYERS_SHOWN]))))
        )
    return pictures


def _crops(report: dict, folder: Path) -> list[dict]:
    """For each point with crops: what they are of, what quantization did to that image, and four (caption,
    picture)."""
    deltas = {(change["quality"], change["index"]): change for change in image_deltas(report)}
    shown = []
    for point in report["points"]:
        crops = point.get("crops")
        if not crops or not (folder / crops["file"]).is_file():
            continue
        captions = [
            "Original",
            "Float",
            "Quantized",
            f"Difference \N{MULTIPLICATION SIGN} {crops['amplified']}",
        ]
        pictures = [_png(panel) for panel in split_panels(folder / crops["file"])]
        shown.append(
            {
                "quality": point["quality"],
                "delta": deltas.get((point["quality"], crops["index"])),
                **crops,
                "pictures": list(zip(captions, pictures)),
            }
        )
    return shown


def _png(picture) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return _uri("png", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _marked(sentence: str) -> Markup:
    """The bold and the code of report.md's sentences."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(sentence)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))
