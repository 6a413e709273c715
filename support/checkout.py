"""How a Python process that licq starts finds the same licq."""

import os
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent  # of quant/, models/ ...: a checkout, or licq/ of a wheel


def child_environment() -> dict[str, str]:
    """This process's environment for one that is to import this licq.

    An installed licq is found as it is. A checkout, which perhaps only this process knows of (`python
    .../main_ptq.py`), goes to the end of PYTHONPATH: further in front its models/ and data/ would hide a
    user's packages of these names.
    """
    if not (_FOLDER / "licq").is_dir():
        return dict(os.environ)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(_FOLDER)])}
