"""Evaluation: suites, arms and judges, and the reports and benchmarks that are made with them."""
