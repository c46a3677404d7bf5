"""The baseline of `bench workers`, in an environment that has DBOS: `python dbos_steps.py URL RUNS STEPS THREADS BODY`.

Workflows from a queue, whose steps each return the JSON of an event: a step's result is durable before the next begins,
as an event is. Prints CPU milliseconds of this process for a step. Stands alone: nothing of emoloop is installed there.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module


def main(url: str, body: str, runs: int, steps: int, threads: int) -> float:
    """CPU milliseconds for a step."""
    dbos = import_module("dbos")
    app = dbos.DBOS
    config = {"name": "steps", "system_database_url": url, "max_executor_threads": threads}
    app(config={**config, "log_level": "ERROR", "run_admin_server": False})

    @app.step()
    def step() -> dict[str, object]:
        return json.loads(body)

    @app.workflow()
    def work() -> None:
        for _ in range(steps):
            step()

    app.launch()
    queue = app.register_queue("runs")
    began = time.process_time()
    for handle in [queue.enqueue(work) for _ in range(runs)]:
        handle.get_result()
    spent = time.process_time() - began
    app.destroy()
    return 1000 * spent / (runs * steps)


if __name__ == "__main__":
    address, *counts, text = sys.argv[1:]
    print(main(address, text, *map(int, counts)))
