"""From the log to training examples."""
