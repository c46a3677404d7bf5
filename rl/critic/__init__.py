"""Stage A of EmoFeedback²: the critic learns to read pictures, by GRPO (TRL) after an optional supervised start."""
