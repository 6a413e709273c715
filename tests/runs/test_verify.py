"""The same images under changed conditions."""

import json
from pathlib import Path

import pytest

from licq.runs import verify
from licq.support.errors import InputError
from tests.runs.test_coding import command


@pytest.mark.slow
def test_verify_finds_no_difference(saved, tmp_path, capsys):
    out = tmp_path / "table.md"
    status = command(
        "verify",
        "--model",
        saved,
        "--quality",
        1,
        "--data",
        tmp_path / "eval",
        "--images",
        1,
        "--out",
        out,
        "--quiet",
    )
    assert status == 0 and "reference kernels" in out.read_text()
    assert json.loads(out.with_suffix(".json").read_text())["1 thread"]["float"]


def test_conditions_that_can_share_a_process_do():
    """Each process imports torch and CompressAI, which takes longer than the work for a small image."""
    tried = verify.conditions(["/other/python"], cuda=True)
    first = [condition.name for condition in tried if condition.process == tried[0].process]
    assert first == ["1 thread", "2 threads", "batch of 4", "in tiles", "reference kernels"]
    assert len({condition.process for condition in tried}) < 0.7 * len(tried)
    assert all("LICQ_KERNELS" not in condition.environment for condition in tried)
    assert {condition.device for condition in tried if condition.process == tried[-1].process} == {"cuda"}


def test_verify_finds_the_model_or_the_rate_of_a_quality(monkeypatch):
    files = [Path(f"run/q{quality}/model.safetensors") for quality in (1, 3)]
    monkeypatch.setattr(verify, "_extra", lambda file: {})
    assert verify.model_at(files, None) == (files[0], None) and verify.model_at(files, 3) == (files[1], None)
    monkeypatch.setattr(verify, "_extra", lambda file: {"rates": {"2": 0.01, "5": 0.02}})
    assert verify.model_at(files[:1], None) == (files[0], 2) and verify.model_at(files[:1], 5) == (
        files[0],
        5,
    )
    for extra, quality in (({}, 2), ({"rates": {"2": 0.01}}, 3)):
        monkeypatch.setattr(verify, "_extra", lambda file, extra=extra: extra)
        with pytest.raises(InputError, match="--quality"):
            verify.model_at(files, quality)


def test_verify_counts_images_that_differ():
    def result(**hashes):
        return {"integer": [hashes], "float": []}

    base = result(symbols="a", indexes="b", pixels="c", decoded="c")
    same, other, failed = (
        dict(base),
        result(symbols="a", indexes="b", pixels="x", decoded="c"),
        result(symbols="a", indexes="b", pixels="c", decoded="the file is damaged"),
    )
    found = verify.compared(
        [base, same, other, failed, result(symbols="a", indexes="b", pixels="c")], "integer"
    )
    assert [sum(part.values()) for part in found] == [0, 0, 1, 1, 0] and found[2]["pixels"] == found[3][
        "decoded"
    ] == 1
    assert verify.compared([base, same], "float") == [None, None]
    inconsistent = result(symbols="a", indexes="b", pixels="c", decoded="d")
    assert verify.compared([inconsistent], "integer")[0]["decoded"] == 1
