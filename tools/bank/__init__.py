"""Visual prompts: per emotion, what its pictures look like, found again by the words of a prompt."""
