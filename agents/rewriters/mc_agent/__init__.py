"""MC-Agent: several personas write, a director chooses (after Emotion-Director, arXiv 2512.19479).

Published is that several agents simulate how differently people feel, against rewrites by template, and that a chain of
concepts makes rewrites that can be seen. Personas, director, prompts and checks are a reconstruction.
"""
