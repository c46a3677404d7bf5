"""Chat models that see: the embedded engine, the client of a vLLM server, scores from log-probabilities."""
