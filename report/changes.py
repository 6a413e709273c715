"""What quantization changes in each image, and by prediction in each layer, from the points of a report."""

from licq.evaluation.evaluate import ImageResult


def image_deltas(report: dict) -> list[dict]:
    """What quantization does to every image, by the estimated rates of both codecs: {quality, index, image,
    bpp [%], psnr [dB], j [%] or None}, largest rise of J first.

    Images without a rate or without an error, which have no such change, are left out.
    """
    deltas = []
    for point in report["points"]:
        pairs = zip(point["images_per"].get("fp32", ()), point["images_per"].get("quant", ()))
        for index, (before, after) in enumerate(pairs):
            if not (before["bpp_estimated"] and before["mse"] and after["mse"]):
                continue
            rise = None
            if point["lambda"] is not None:
                float_j, j = (
                    ImageResult(**image).cost(point["lambda"], report.get("metric", "mse"))
                    for image in (before, after)
                )
                rise = 100 * (j / float_j - 1)
            deltas.append(
                {
                    "quality": point["quality"],
                    "index": index,
                    "image": before["name"],
                    "bpp": 100 * (after["bpp_estimated"] / before["bpp_estimated"] - 1),
                    "psnr": after["psnr"] - before["psnr"],
                    "j": rise,
                }
            )
    return sorted(deltas, key=lambda change: -change["psnr"] if change["j"] is None else -change["j"])


def predicted_rises(point: dict) -> dict[str, tuple[float, float]]:
    """layer -> rise of J in percent that rounding noise of its inputs and of its weights makes, largest sum
    first.

    Empty where a point has no history, as main_eval.py's have not.
    """
    history = point.get("history") or {}
    parts = {
        name: (100 / history["j_float"] * both["inputs"], 100 / history["j_float"] * both["weights"])
        for name, both in history.get("predicted", {}).items()
    }
    return dict(sorted(parts.items(), key=lambda layer: -sum(layer[1])))
