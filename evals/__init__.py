"""Whether it works: suites of requests, arms of equal budget, judges that give no reward, and reports."""
