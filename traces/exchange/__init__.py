"""What leaves the log and comes into it: JSON lines, pick-a-pic, reflection examples, outside ratings."""
