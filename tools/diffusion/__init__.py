"""What sampling and training share: pipeline families, noise processes, conditioners, adapters."""
