"""The log by Python, by pandas and by SQL."""

import json
import sqlite3

import pandas as pd
from emoloop import Critiqued, EmotionTarget, RunFilter, open_log, open_loop

if __name__ == "__main__":
    with open_loop(home="log", loop={"rounds": 2, "images": 3}) as loop:
        for seed, prompt in enumerate(["a dog by the sea", "a cat in the city"]):
            loop.run_sync(prompt, EmotionTarget(valence=2, arousal=-1), seed=seed)

    # Rows are pydantic models; a filter is what `--where` is on the command line.
    with open_log("log") as log:
        runs = pd.DataFrame([row.model_dump() for row in log.runs(RunFilter(status="completed"))])
        candidates = pd.DataFrame([row.model_dump() for run in runs["run_id"] for row in log.candidates(run)])
        print(runs[["run_id", "prompt", "best_reward", "gain"]])
        print(candidates.groupby(["run_id", "round"])["reward"].agg(["mean", "max", "count"]))
        # Events hold all there is, typed.
        events = log.events(runs["run_id"][0])
        print(next(event.critique for event in events if isinstance(event, Critiqued)))

    # The same tables in SQL: SQLite here, PostgreSQL where `traces.database_url` says so.
    with sqlite3.connect("file:log/events.db?mode=ro", uri=True) as database:
        query = """
            SELECT c.round, avg(c.reward) AS reward, sum(c.missing IS NOT NULL) AS missing
            FROM candidates AS c JOIN runs AS r USING (run_id)
            WHERE r.status = 'completed' GROUP BY c.round ORDER BY c.round
        """
        print(pd.read_sql_query(query, database))
        kinds = database.execute("SELECT type, count(*) FROM events GROUP BY type").fetchall()
        print(json.dumps(dict(kinds)))
    database.close()
