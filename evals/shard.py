"""`python -m emoloop.evals.shard OPTIONS-AS-JSON`: one process's share of an evaluation.

A child of `emoloop eval --processes N`; it fills the cache and says nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..domain import UserError
from .document import Options
from .evaluate import fill


def main() -> None:
    """Read the options from the command line and make this share."""
    given = json.loads(sys.argv[1])
    which, many = given.pop("shard")
    given["adapter"] = given["adapter"] and Path(given["adapter"])
    try:
        fill(Options(**given), (which, many))
    except UserError as error:
        raise SystemExit(f"emoloop: {error}") from None


if __name__ == "__main__":
    main()
