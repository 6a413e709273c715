"""Has licq begun to compute other numbers? Hashes of small runs, and numbers.json, the list of changes."""

import datetime
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from benchmarks import stored
from licq.support.errors import InputError


def fingerprints(results: dict) -> dict[str, str]:
    """A hash of what benchmarks/same_numbers.py stored for each of its runs.

    Left out are times, and hashes of models' files, which hold times.
    """
    return {
        name: hashlib.sha256(json.dumps(_without_times(result), sort_keys=True).encode()).hexdigest()[:16]
        for name, result in sorted(results.items())
    }


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_times(part)
            for key, part in value.items()
            if "seconds" not in key and key != "models"
        }
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def machine() -> str:
    """What learned numbers depend on: PyTorch's version and the instruction set that it uses."""
    import torch

    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def read_fingerprints(path: Path) -> dict[str, str]:
    """`fingerprints` of a file that benchmarks/same_numbers.py has written.

    Raises:
        InputError: it is not such a file.
    """
    try:
        return fingerprints(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a file of benchmarks/same_numbers.py ({error})") from error


def compare_numbers(path: Path) -> list[str]:
    """The runs in a file of benchmarks/same_numbers.py that differ from the recorded ones.

    Raises:
        InputError: not such a file, or hashes were recorded on another kind of machine.
    """
    numbers = stored.load("numbers")
    if numbers["machine"] != machine():
        raise InputError(
            f"hashes were recorded with {numbers['machine']}, this is {machine()}; compare two checkouts by "
            "benchmarks/same_numbers.py --compare"
        )
    recorded = numbers["fingerprints"]
    return [name for name, value in read_fingerprints(path).items() if recorded.get(name) != value]


def record_change(path: Path, change: str, affects: list[str]) -> None:
    """Write a change of the numbers, and the hashes after it, to numbers.json."""
    numbers = stored.load("numbers")
    entry = {
        "number": numbers["changes"][-1]["number"] + 1,
        "date": datetime.date.today().isoformat(),
        "change": change,
        "affects": affects,
    }
    numbers["changes"].append(entry)
    numbers["machine"] = machine()
    numbers["fingerprints"] |= read_fingerprints(path)
    (stored.RESULTS / "numbers.json").write_text(stored.dump(numbers), encoding="utf-8")
