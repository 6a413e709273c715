"""What the tests of the command lines share: tiny trained-looking codecs, a job of a second or two, ways to
run it."""

import json
from pathlib import Path

import main_ptq
from licq.support.cli import main_guard

ARCH = "minnen2018-mean"
TIMES = {
    "seconds",
    "calibration_seconds",
    "resumed_seconds",
    "seconds_by_step",
    "peak_memory_mb",
    "model_bytes",
}  # the file tells the calibration time, in so many digits


def words(job: dict, **changes) -> list[str]:
    """The command line; a change of value None drops the flag, a list repeats it."""
    flags = job | {f"--{name}": value for name, value in changes.items()}
    given = []
    for flag, value in flags.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            given += [flag] if one is True else [flag, str(one)]
    return given


def run(job: dict, **changes) -> int:
    """The exit status of main_ptq.py."""
    return main_guard(lambda: main_ptq.main(words(job, **changes)))


def refused(capsys, job: dict, *expected: str, untouched: bool = True, **changes) -> None:
    """The run ends with status 2, one line on standard error with these words, and no trace of results."""
    assert run(job, **changes) == 2
    one_line(capsys, *expected)
    assert not untouched or not Path(job["--out"]).exists()


def one_line(capsys, *expected: str) -> None:
    """All that was said is one line `error: ...` on standard error, with these words."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    for text in expected:
        assert text in captured.err


def report_of(job: dict) -> dict:
    return json.loads((Path(job["--out"]) / "report.json").read_text())


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
