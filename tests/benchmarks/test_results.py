"""The results pages: what makes a table old, rows from runs, and hashes of numbers."""

import json

import pytest

from benchmarks import fingerprints, results, stored
from licq.support.errors import InputError

CHANGES = [
    {"number": 1, "date": "2026-01-01", "change": "first", "affects": ["calibration"]},
    {"number": 2, "date": "2026-01-02", "change": "second", "affects": ["attention"]},
]
MEASURED = {"date": "2026-01-01", "version": "0.1.0", "numbers": 1}


def table(**changed) -> dict:
    plain = {
        "title": "T",
        "text": [],
        "settings": {"Data": "Kodak"},
        "command": ["python x.py"],
        "measured": MEASURED,
        "depends": ["calibration"],
        "columns": ["codec", "delta J"],
        "rows": [["a", "+1 %"], {"cells": ["b", "+2 %"], "depends": ["attention"]}],
        "notes": [],
    }
    return plain | changed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    (tmp_path / "numbers.json").write_text(
        json.dumps({"changes": CHANGES, "machine": fingerprints.machine(), "fingerprints": {}})
    )
    return tmp_path


def test_a_row_is_old_where_a_later_change_affects_what_it_depends_on():
    text = results.section(table(), CHANGES)
    assert "| a | +1\u00a0% |" in text and "| b\u00a0† |" in text
    assert "b: measured 2026-01-01, version 0.1.0. Changed since: second (2026-01-02)." in text


def test_a_table_measured_after_the_changes_is_current():
    text = results.section(table(measured=MEASURED | {"numbers": 2}), CHANGES)
    assert "†" not in text and "nothing that it depends on has changed since" in text


def test_a_table_that_is_old_as_a_whole_has_no_marked_rows():
    text = results.section(table(measured=MEASURED | {"numbers": 0}), CHANGES)
    assert "**Old.**" in text and "b\u00a0†" not in text


def test_dump_is_json_with_one_line_for_each_row():
    data = table()
    text = stored.dump(data)
    assert json.loads(text) == data
    assert '    ["a", "+1 %"],\n' in text


def test_numbers_that_change_are_found_and_recorded(folder, tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps({"balle2018": {"j": 1.0, "seconds": 5}}))
    after.write_text(json.dumps({"balle2018": {"j": 1.1, "seconds": 5}}))
    fingerprints.record_change(before, "third", ["calibration"])
    before.write_text(json.dumps({"balle2018": {"j": 1.0, "seconds": 6}}))
    assert fingerprints.compare_numbers(before) == []  # times are no numbers
    assert fingerprints.compare_numbers(after) == ["balle2018"]
    fingerprints.record_change(after, "fourth", ["calibration"])
    assert fingerprints.compare_numbers(after) == []
    assert [change["number"] for change in stored.load("numbers")["changes"]] == [1, 2, 3, 4]


def test_hashes_of_another_machine_are_not_compared(folder, tmp_path):
    numbers = stored.load("numbers") | {"machine": "another"}
    (folder / "numbers.json").write_text(json.dumps(numbers))
    (tmp_path / "after.json").write_text("{}")
    with pytest.raises(InputError, match="recorded with another"):
        fingerprints.compare_numbers(tmp_path / "after.json")
