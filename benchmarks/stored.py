"""docs/results: where it is, and its JSON files."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from licq.support.errors import InputError

RESULTS = ROOT / "docs" / "results"


def load(name: str) -> Any:
    """The content of docs/results/<name>.json.

    Raises:
        InputError: no such file, or one that is not JSON.
    """
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error


def dump(data: dict) -> str:
    """JSON with one line for each row of a table, so that a changed row is one changed line."""
    text = json.dumps(data | {"rows": []} if "rows" in data else data, indent=2, ensure_ascii=False)
    if data.get("rows"):
        rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in data["rows"])
        text = text.replace('"rows": []', f'"rows": [\n{rows}\n  ]')
    return text + "\n"
