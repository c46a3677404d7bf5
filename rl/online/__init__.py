"""Training on pictures that are made meanwhile: Flow-GRPO, the second stage of EmoFeedback²."""
