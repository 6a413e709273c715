"""A folder of results with a small plan, and a stand-in for worker processes."""

import json

import pytest

from benchmarks import records, stored, tables
from tests.benchmarks.trial import CHANGE, PLAN, STAMP, Runner


@pytest.fixture
def trial_folder(tmp_path, monkeypatch):
    """A folder with a plan, numbers.json of one change, and no records."""
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "stamp", lambda: STAMP)
    monkeypatch.setattr(tables, "stamp", lambda: STAMP)
    (tmp_path / "numbers.json").write_text(json.dumps({"changes": [CHANGE]}))
    (tmp_path / "pages.json").write_text(
        json.dumps([{"file": "a.md", "title": "A", "text": [], "tables": ["other"]}])
    )
    other = {"title": "O", "command": ["python x.py"], "measured": STAMP, "depends": [], "rows": [["a"]]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path


@pytest.fixture
def runner(monkeypatch):
    fake = Runner()
    monkeypatch.setattr(tables, "in_processes", fake)
    return fake
