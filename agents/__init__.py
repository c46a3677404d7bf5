"""The agents that talk to models: critic, rewriter, generator. Their prompts are files in `prompts/`."""
