"""Units quantized alone, ranges of channels and the landscape: against measurements by hand, and from the
command line."""

import json

import pytest
import torch
from PIL import Image

from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction import analysis
from licq.reconstruction.analysis import (
    SIDES,
    Probe,
    analyze,
    measure_channels,
    measure_landscape,
    measure_units,
)
from licq.reconstruction.objective import Objective
from licq.reconstruction.sensitivity import measure_sensitivities
from licq.support.errors import InputError
from tests.main_jobs import refused, run
from tests.tiny_codecs import images, tiny_codec

OBJECTIVE = Objective(0.01)
QUICK = {"set": ["balance=0", "split=0", "stress=false", "round_init=nearest"]}
FACTORS, COARSE = (0.4, 0.8, 1.0), (0.8, 1.0)


@pytest.fixture
def blank_figures():
    """Figures are drawn here: they are looked at."""


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(f"{analysis.measure_landscape.__module__}.FACTORS", FACTORS)
    monkeypatch.setattr(f"{analysis.measure_landscape.__module__}.COARSE", COARSE)


def probed(name: str = "balle2018", **config) -> Probe:
    batches = list(images(2).split(1))
    qmodel = QuantModel(tiny_codec(name), QuantConfig(**({"w_bits": 5, "a_bits": 5} | config)))
    qmodel.observe(batches)
    return Probe(qmodel, batches, OBJECTIVE)


def by_hand(probe: Probe, nodes: list[str], only: str | None = None) -> float:
    """The mean rise of J with these nodes quantized, by whole forwards."""

    def cost() -> float:
        with torch.no_grad():
            return float(
                torch.cat([OBJECTIVE(probe.qmodel(batch), batch) for batch in probe.batches]).double().mean()
            )

    probe.qmodel.quantize_nodes(False)
    real = cost()
    probe.qmodel.quantize_nodes(True, nodes)
    for name in nodes:
        if name in probe.qmodel.layers:
            probe.qmodel.nodes[name].only = only
    found = cost() - real
    for name in nodes:
        if name in probe.qmodel.layers:
            probe.qmodel.nodes[name].only = None
    probe.qmodel.quantize_nodes(False)
    return found


def directly(_, compute):
    return compute()


def test_a_unit_alone_is_what_whole_forwards_measure():
    probe = probed("minnen2018-mean")
    sensitivities = measure_sensitivities(probe.qmodel, probe.batches, OBJECTIVE, progress=False)
    layers = measure_units(probe, sensitivities, "layer", directly, progress=False)
    units = measure_units(probe, sensitivities, "stage", directly, progress=False)
    assert list(layers)[0] == "g_a.0" and list(units) == ["g_a", "h_a", "h_s", "g_s"]
    for unit in probe.units("layer"):  # also after a step back to the first unit
        found = layers[unit.name]
        assert found["both"]["j"] == pytest.approx(by_hand(probe, list(unit.nodes)), rel=1e-4, abs=2e-5)
        assert found["both"]["j"] == pytest.approx(
            found["both"]["bpp"] + found["both"]["weighted_distortion"]
        )
    assert layers["g_s.2"]["weights"]["j"] == pytest.approx(
        by_hand(probe, ["g_s.2"], "weights"), rel=1e-4, abs=2e-5
    )
    assert units["g_s"]["both"]["j"] == pytest.approx(
        by_hand(probe, [n for n in probe.qmodel.nodes if n.startswith("g_s")]), rel=1e-4, abs=2e-5
    )
    assert (
        layers["g_s.6"]["predicted"]["inputs"] > 0
        and units["g_s"]["predicted"]["weights"] > layers["g_s.6"]["predicted"]["weights"]
    )
    every = [node for node in probe.qmodel.nodes]
    assert probe.all_units().j == pytest.approx(by_hand(probe, every), rel=1e-4, abs=2e-5)


def test_channels_are_those_of_the_float_codec():
    probe = probed()
    found = measure_channels(probe, progress=False)
    assert set(found) == set(probe.qmodel.layers)
    seen: list = []
    layer = probe.qmodel.model.g_a[2]
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].real()))
    with torch.no_grad():
        for batch in probe.batches:
            probe.qmodel(batch)
    hook.remove()
    x = torch.cat(seen).transpose(0, 1).flatten(1)
    weight = layer.module.weight.detach().flatten(1)
    for facts, rows in ((found["g_a.2"]["inputs"], x), (found["g_a.2"]["weights"], weight)):
        assert facts["max"] == pytest.approx(rows.abs().amax(1).tolist())
        assert facts["rms"] == pytest.approx(rows.double().square().mean(1).sqrt().tolist(), rel=1e-5)
        assert facts["p999"] == pytest.approx(
            torch.quantile(rows.abs().double(), 0.999, dim=1).tolist(), rel=1e-5
        )


def test_the_landscape_passes_through_the_ranges_as_they_are_and_leaves_them_so():
    probe = probed()
    before = {name: value.clone() for name, value in probe.qmodel.state_dict().items()}
    found = measure_landscape(probe, "g_a.2", directly, progress=False)
    assert (
        [point["n"] for point in found["weights"]]
        == [point["n"] for point in found["inputs"]]
        == list(FACTORS)
    )
    for side in ("weights", "inputs"):
        at = found[side][FACTORS.index(1.0)]
        assert at["j"] == pytest.approx(by_hand(probe, ["g_a.2"], side), rel=1e-4, abs=2e-5)
        assert found[side][0]["output_error"] > at["output_error"] > 0  # N = 0.4 clips
    one = COARSE.index(1.0)
    assert found["plane"]["j"][one][one] == pytest.approx(by_hand(probe, ["g_a.2"]), rel=1e-4, abs=2e-5)
    assert found["weights"][0]["error"] > min(point["error"] for point in found["weights"]) > 0
    after = probe.qmodel.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_remembered_is_not_measured_again():
    kept: dict = {}

    def remember(name, compute):
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    def refuse(name, compute):
        return kept[name]

    probe = probed()
    sensitivities = measure_sensitivities(probe.qmodel, probe.batches, OBJECTIVE, progress=False)
    first = analyze(probe, sensitivities, "block", None, remember, progress=False)
    again = analyze(probed(), sensitivities, "block", None, refuse, progress=False)
    assert first == again
    assert first["landscape"]["layer"] == max(
        (n for n in first["layers"] if ".1" not in n and ".3" not in n and ".5" not in n),
        # the others are GDN and ReLU
        key=lambda n: first["layers"][n]["both"]["j"],
    )
    assert all(set(found) == {*SIDES, "predicted"} for found in first["units"].values())
    with pytest.raises(InputError, match="no layer 'g_x'"):
        analyze(probe, sensitivities, "block", "g_x", remember, progress=False)


# ----------------------------------------------------------------------------------------------- command line


def test_analysis_is_written_and_resumed(job, capsys, tmp_path, monkeypatch):
    calls = []

    def stop_at_fifth(self, unit, side, whole=Probe.change):
        calls.append(unit)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, unit, side)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "change", stop_at_fifth)
        assert run(job, analyze=True, **QUICK) == 130
    folder = tmp_path / "out" / "q1"
    assert not (folder / "analysis.json").exists()
    capsys.readouterr()
    assert run(job, analyze=True, resume=True, **QUICK) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "analysis.md" in printed.out and "g_a.0" in printed.out
    assert {path.name for path in folder.iterdir()} == {
        "analysis.json",
        "analysis.md",
        "delta_j.png",
        "ranges.png",
        "channels.png",
        "landscape.png",
        "result.json",
    }
    found = json.loads((folder / "analysis.json").read_text())
    assert (
        found["unit"] == "block"
        and found["float"]["j"] > 0
        and "![landscape](landscape.png)" in (folder / "analysis.md").read_text()
    )
    for name in ("delta_j", "ranges", "channels", "landscape"):
        assert min(Image.open(folder / f"{name}.png").size) > 300
    job["--out"] = tmp_path / "other"
    assert run(job, analyze=True, **QUICK) == 0  # not interrupted: the same
    assert json.loads((tmp_path / "other" / "q1" / "analysis.json").read_text()) == found


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"landscape": "g_a.0"}, ["--landscape belongs to --analyze"]),
        ({"analyze": True, "landscape": "g_x"}, ["--landscape", "no layer 'g_x'"]),
        ({"analyze": True, "budget_size": 6}, ["exclude each other"]),
    ],
)
def test_bad_flags_of_an_analysis_are_one_line(job, capsys, changes, expected):
    refused(capsys, job, *expected, **changes)
