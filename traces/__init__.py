"""The event log and what is read from it.

The log is the truth: typed events in SQLite or PostgreSQL, images as content-addressed files beside it.
Tables for lists and statistics, OpenTelemetry spans and exports are projections that can be made again.
"""
