"""Making pictures: diffusers pipelines in this process, images APIs elsewhere, one batching door to both."""
