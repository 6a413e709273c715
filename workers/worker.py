"""A worker process: reads one task from standard input, runs it, and prints how it ended.

    {"task": {fields of `Task`}, "resume": true}        one line in
    {"error": null}                                     one line out

Its standard input stays open as long as the process that started it lives and wants the task. When it closes,
the worker ends.
"""

import json
import os
import signal
import sys
import threading
import time

from licq.workers.task import Task, run_here

_GRACE = 8  # seconds between an interrupt and the end


def _watch() -> None:
    """Ends this process when its standard input closes."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE)
    os._exit(1)


def main() -> None:
    """Run the task that standard input names."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, daemon=True).start()
    task = Task(**order["task"])
    try:
        error = run_here(task, order["resume"], silent=True)
    except KeyboardInterrupt:
        os._exit(1)
    print(json.dumps({"error": error}), flush=True)
    os._exit(0)  # the watching thread holds standard input, on which an ordinary exit would wait


if __name__ == "__main__":
    main()
