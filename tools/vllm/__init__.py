"""Running a vLLM server: its environment, its flags, its life as a child process."""
