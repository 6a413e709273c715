"""Bits of single layers on the command line: budgets, a limit on the BD-rate, files."""

import dataclasses
import json

import pytest

from licq.evaluation import anchors
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.mixed_precision import Layer, totals
from licq.runs import bd_rate_limit, layer_search
from licq.support.files import write_json
from tests.main_jobs import contents, refused, report_of, run
from tests.runs.test_bit_search import drawn_layers

NARROW = {
    "set": ["joint_iters=0", "balance=0", "split=0", "stress=false", "round_init=nearest"],
    "bits_choices": "4,8",
    "no-baseline": True,
}


def test_a_budget_is_met_written_and_read_again(job, capsys, tmp_path):
    assert run(job, budget_size=6, bits_file=tmp_path / "bits.json", **NARROW) == 0
    capsys.readouterr()
    bits = json.loads((tmp_path / "bits.json").read_text())
    assert json.loads((tmp_path / "out" / "q1" / "bits.json").read_text()) == bits
    assert {side["w_bits"] for side in bits.values()} == {4, 8} and {
        side["a_bits"] for side in bits.values()
    } == {8}
    point = report_of(job)["points"][0]
    found = point["bits"]
    codec = QuantModel.load(tmp_path / "out" / "q1" / "model.safetensors")
    sizes = {name: (node.weight_int.numel(), node.config.w_bits) for name, node in codec.layers.items()}
    mean = sum(n * b for n, b in sizes.values()) / sum(n for n, _ in sizes.values())
    assert (
        found["mean_bits"] == pytest.approx(mean)
        and 5.5 < mean <= 6
        and found["layers"] == bits
        and found["loss"] > 0
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Bits of the layers" in text and "mean bits at most 6" in text and "mixed bits rd" in text
    before = contents(tmp_path / "out")
    assert run(job, budget_size=6, bits_file=tmp_path / "later" / "bits.json", resume=True, **NARROW) == 0
    assert (
        contents(tmp_path / "out") == before
        and json.loads((tmp_path / "later" / "bits.json").read_text()) == bits
    )
    capsys.readouterr()
    refused(
        capsys, job, "bits.budget_size", "--resume", untouched=False, resume=True, budget_size=5, **NARROW
    )
    job["--out"] = tmp_path / "again"
    assert run(job, bits_file=tmp_path / "bits.json", **{"set": NARROW["set"], "no-baseline": True}) == 0
    again = report_of(job)["points"][0]
    assert again["quant"] == point["quant"] and again["bits"]["layers"] == bits
    capsys.readouterr()
    bits["g_a.0"]["w_bits"] = 5
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    refused(
        capsys,
        job,
        "bits.1.g_a.0.w_bits",
        untouched=False,
        resume=True,
        bits_file=tmp_path / "bits.json",
        **{"set": NARROW["set"], "no-baseline": True},
    )


def test_a_tolerance_is_searched_for_a_size_and_for_nothing_else(job, capsys, tmp_path):
    fmpq = {"preset": "fmpq", "a_bits": 32, "bits_choices": "4,8", "no-baseline": True}
    refused(capsys, job, "allocation=threshold", "--budget_size alone", **fmpq, budget_bops=0.6)
    assert run(job, budget_size=6, **fmpq) == 0
    found = report_of(job)["points"][0]["bits"]
    assert found["mean_bits"] <= 6 and {sides["w_bits"] for sides in found["layers"].values()} == {4, 8}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "each layer alone loses at most" in text and "mean bits at most 6" in text


def test_a_budget_of_bit_operations_searches_the_inputs_too(job, tmp_path):
    assert run(job, budget_bops=0.6, **NARROW) == 0
    found = report_of(job)["points"][0]["bits"]
    assert 0.4 < found["relative_bops"] <= 0.6 and {
        sides["a_bits"] for sides in found["layers"].values()
    } == {4, 8}
    codec = QuantModel.load(tmp_path / "out" / "q1" / "model.safetensors")
    assert {name: node.config.a_bits for name, node in codec.layers.items()} == {
        name: sides["a_bits"] for name, sides in found["layers"].items()
    }


def test_the_bd_rate_is_kept_below_its_limit(job, tmp_path, monkeypatch, capsys):
    made, starts, curves = [], [], []
    monkeypatch.setattr(
        anchors,
        "classical_points",
        lambda *args, whole=anchors.classical_points: curves.append(1) or whole(*args),
    )
    monkeypatch.setattr(layer_search, "measure_layers", lambda model, *_, **__: drawn_for(model))
    monkeypatch.setattr(
        bd_rate_limit,
        "start_loss",
        lambda model, crops, config, objective, bits, *_: (
            starts.append(objective.lmbda)
            or {"bpp": 1.0, "j": 2.0, "loss": totals(drawn_for(model), bits).loss}
        ),
    )
    write_json(tmp_path / "out" / "round3" / "run.json", {"settings": {"bits": "another run's"}})
    monkeypatch.setattr(
        bd_rate_limit,
        "summarize",
        lambda attempt, points, whole=bd_rate_limit.summarize: (
            made.append(attempt) or {**whole(attempt, points), "bd_rate_psnr": mean_loss(attempt)}
        ),
    )
    assert run(job, quality="1,3", max_bd_rate=0.5, bits_file=tmp_path / "bits-{quality}.json", **NARROW) == 0
    assert len(curves) == 1 and not (tmp_path / "out" / "measured").exists()
    rounds = list(made)
    below = [attempt for attempt in rounds if mean_loss(attempt) <= 0.5]
    assert rounds and below
    report = report_of(job)
    for point in report["points"]:
        quality = point["quality"]
        bits = json.loads((tmp_path / f"bits-{quality}.json").read_text())
        assert point["bits"]["layers"] == bits and any(
            attempt.layer_bits[quality] == bits for attempt in below
        )
        codec = QuantModel.load(tmp_path / "out" / f"q{quality}" / "model.safetensors")
        assert {name: node.config.w_bits for name, node in codec.layers.items()} == {
            name: sides["w_bits"] for name, sides in bits.items()
        }
        assert "below a BD-rate of 0.5 %" in point["bits"]["how"]
    before = contents(tmp_path / "out")
    assert not (tmp_path / "out" / "round3" / "run.json").exists() or len(rounds) == 3
    starts.clear()
    assert (
        run(
            job,
            quality="1,3",
            max_bd_rate=0.5,
            bits_file=tmp_path / "bits-{quality}.json",
            resume=True,
            **NARROW,
        )
        == 0
    )
    assert contents(tmp_path / "out") == before and not starts
    # what was measured at another lambda, or of another checkpoint, is not taken over
    with monkeypatch.context() as patch:
        patch.setattr(bd_rate_limit, "BdRateSearch", stopping)
        assert (
            run(
                job,
                quality="1,3",
                max_bd_rate=0.5,
                bits_file=tmp_path / "bits-{quality}.json",
                resume=True,
                **{"lambda": "0.1,0.2"},
                **NARROW,
            )
            == 130
        )
    assert starts == [0.1, 0.2]


def stopping(*_) -> None:
    raise KeyboardInterrupt


def drawn_for(model) -> list[Layer]:
    names = list(QuantModel(model, QuantConfig()).layers)
    return [
        dataclasses.replace(
            layer, name=name, w_loss={4: 0.004 * (n % 5), 8: 0.0}, a_loss={8: 1e-6}, a_width={8: 8}
        )
        for n, (name, layer) in enumerate(zip(names, drawn_layers(len(names), 1)))
    ]


def mean_loss(attempt) -> float:
    losses = [
        100 * sum(0.004 * (n % 5) for n, sides in enumerate(bits.values()) if sides["w_bits"] == 4)
        for bits in attempt.layer_bits.values()
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"bits_file": "/nowhere.json"}, ["--bits_file", "cannot be read"]),
        ({"budget_size": 0}, ["--budget_size", "positive"]),
        ({"budget_size": "2GB"}, ["--budget_size"]),
        ({"budget_size": "1,5MB"}, ["--budget_size", "more than one number"]),
        ({"budget_bops": "0,5"}, ["--budget_bops", "more than one number"]),
        ({"max_bd_rate": "1,5"}, ["--max_bd_rate", "more than one number"]),
        ({"budget_bops": "x"}, ["--budget_bops"]),
        ({"max_bd_rate": 1}, ["two qualities"]),
        ({"max_bd_rate": 1, "budget_size": 5}, ["exclude each other"]),
        ({"bits_choices": "4,8"}, ["--bits_choices is for a search"]),
        ({"bits_choices": "1,8", "budget_size": 6}, ["--bits_choices", "2 to 16"]),
        ({"cost": "size", "budget_size": 6}, ["--cost belongs"]),
        ({"quality": "1,3", "budget_size": 6, "bits_file": "bits.json"}, ["{quality}"]),
        (
            {"budget_size": 6, "bits_file": "/dev/null/bits.json"},
            ["cannot write to /dev/null", "--bits_file"],
        ),
        ({"budget_size": 6, "bits_file": "/tmp"}, ["--bits_file /tmp is a folder"]),
    ],
)
def test_bad_flags_are_one_line(job, capsys, changes, expected):
    refused(capsys, job, *expected, **changes)


def test_an_unknown_layer_is_one_line(job, capsys, tmp_path):
    (tmp_path / "bits.json").write_text('{"g_q.0": {"w_bits": 4}}')
    refused(
        capsys, job, "--bits_file", "bits.json", "no layer 'g_q.0'", "g_a.0", bits_file=tmp_path / "bits.json"
    )
