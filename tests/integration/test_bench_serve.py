"""The benchmark of the server runs, and its watchers miss and double nothing."""

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from emoloop.service.bench import main


async def test_it_measures_pages_and_watchers():
    found = await main(runs=6, rounds=2, images=2, requests=3, watchers=6, live=2)
    figures = found["figures"]
    assert figures["list_p95_ms"] > 0 and figures["run_p95_ms"] > 0 and figures["watchers"] == 6
    assert figures["events_told"] > 6 * 10 and figures["live_p95_ms"] > 0 and figures["server_mb"] > 10
    assert figures["events_lost"] == figures["events_doubled"] == 0
