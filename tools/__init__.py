"""What agents act with: image generators, diffusion networks, chat models, servers, rewards and measures."""
