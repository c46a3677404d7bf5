"""`python -m emoloop.cli`."""

from . import main

main()
