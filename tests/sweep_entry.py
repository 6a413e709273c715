"""A command for the tests of the engine: three units, each a file, and ways to end badly. It knows no torch,
so it starts at once."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from licq.support.errors import InputError
from licq.support.files import write_json, write_text


def main(words: list[str]) -> int:
    """words: WHAT --out FOLDER [--resume]; WHAT is good, refused, defect, slow, gpu, killed (once, in unit 2)
    or mortal (always)."""
    what, out = words[0], Path(words[words.index("--out") + 1])
    if what == "refused":
        raise InputError("this run is bad; mend it")
    if what == "defect":
        raise KeyError("oops")
    if what == "gpu":  # waits for another one beside it
        write_text(out / "gpu.txt", os.environ["CUDA_VISIBLE_DEVICES"])
        time.sleep(3)
        return 0
    if "--resume" not in words:
        for path in out.glob("units/*"):
            path.unlink()
    write_json(out / "run.json", {})
    computed = []
    for unit in range(3):
        path = out / "units" / f"{unit}.json"
        if not path.exists():
            if what == "mortal" or what == "killed" and unit == 2 and "--resume" not in words:
                time.sleep(1.25 * unit)  # what is finished has arrived
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "slow":
                time.sleep(60)
            computed.append(unit)
            write_json(path, {"unit": unit})
    print(f"unit 2 of 3 [00:01<00:02] {what}", file=sys.stderr)
    units = [json.loads(path.read_text()) for path in sorted(out.glob("units/*.json"))]
    for path in out.glob("units/*.json"):
        path.unlink()
    write_json(out / "report.json", {"units": units})
    write_text(out / "computed.txt", f"{computed}")
    return 0
