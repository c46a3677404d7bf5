"""OpenTelemetry's GenAI client metrics: tokens and seconds of each call to a model, as its event is committed.

Unlike spans they cannot be made again: a metric is of the time at which it was recorded. The meter is ours alone; the
host program's global one is not touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..events import Event
from ..settings import TraceSettings
from . import genai

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader

#: Limits of the histograms' buckets, as the conventions give them.
_TOKENS = [4**power for power in range(14)]
_SECONDS = [0.01 * 2**power for power in range(14)]


class Metrics:
    """Records the calls among committed events.

    Args:
        reader: Where the histograms go.
    """

    def __init__(self, reader: MetricReader) -> None:
        from opentelemetry.sdk.metrics import MeterProvider

        self._provider = MeterProvider([reader], resource=genai.resource(), shutdown_on_exit=False)
        histogram = self._provider.get_meter("emoloop", schema_url=genai.SCHEMA_URL).create_histogram
        self._tokens = histogram(
            "gen_ai.client.token.usage", "{token}", explicit_bucket_boundaries_advisory=_TOKENS
        )
        self._seconds = histogram(
            "gen_ai.client.operation.duration", "s", explicit_bucket_boundaries_advisory=_SECONDS
        )

    def __call__(self, events: Sequence[Event]) -> None:
        """Take the events of a commit."""
        for event in events:
            name, attributes = genai.call(event)
            seconds = getattr(event, "seconds", None)
            if genai.operation(name) not in genai.CLIENT or seconds is None:
                continue
            about = {**genai.defaults(name), "gen_ai.request.model": attributes["gen_ai.request.model"]}
            error = attributes.get("error.type")
            self._seconds.record(seconds, about if error is None else {**about, "error.type": error})
            for kind in ("input", "output"):
                if (count := attributes.get(f"gen_ai.usage.{kind}_tokens")) is not None:
                    self._tokens.record(count, {**about, "gen_ai.token.type": kind})

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def open_metrics(settings: TraceSettings) -> Metrics | None:
    """Metrics, if an endpoint of their own is set: not every receiver of spans takes them."""
    url = settings.metrics_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    if not url:
        return None
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    return Metrics(PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=url)))
