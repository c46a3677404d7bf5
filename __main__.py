"""`python -m emoloop`."""

from .cli import main

main()
