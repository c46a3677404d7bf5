"""The benches of the log and the loop, small: they measure what their documents say."""

from emoloop.evals.bench import concurrency, log, open_runs, overhead
from emoloop.evals.bench.postgres import missing


def test_log_loses_and_doubles_nothing():
    figures = log.main(writers=4, events=20, repeats=1)["figures"]
    assert (figures["lost"], figures["doubled"]) == (0, 0)
    assert figures["events_per_second"] > 0 and figures["ratio_hand_written"] > 0
    assert missing() or figures["postgres_events_per_second"] > 0


async def test_so_many_runs_are_open_at_a_time():
    figures = (await open_runs.main(runs=12, finish=True))["figures"]
    assert (figures["open"], figures["completed"]) == (12, 12) and figures["mb"] > 0


def test_runs_share_the_models():
    document = concurrency.main(runs=3, rounds=2, images=2, batch_seconds=0.01, answer_seconds=0.01, slots=2)
    figures = document["figures"]
    # 2 rounds × 2 critiques and one rewrite in 3 runs, two at a time.
    assert figures["optimum_seconds"] == 3 * 5 * 0.01 / 2
    assert figures["optimum_ratio"] >= 1


def test_overhead_is_measured_beside_programs_by_hand():
    figures = overhead.main(rounds=2, images=2, runs=1, long=10, repeats=1)["figures"]
    wanted = {f"time_ratio_{name}" for name in ("bare", "saver_refs", "saver_bytes")}
    assert wanted | {"bytes_ratio_saver_refs", "growth"} <= set(figures)
    assert all(value > 0 for name, value in figures.items() if name != "kilobytes_bare")
