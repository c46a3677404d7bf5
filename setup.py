"""The description of the package for its index: the README without the links that lead into the repository.

An index shows the README alone, where relative links and pictures would be dead. All else is in `pyproject.toml`.
"""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
pictures = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", readme)
setup(
    # By its name setuptools keeps this file out of the package, whose folder is this one.
    script_name="setup.py",
    long_description=re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", pictures),
    long_description_content_type="text/markdown",
)
