"""Lets vLLM's CPU wheel start; `install.py` copies this file into that environment and loads it by a
`.pth` line.

Why: torchvision from PyPI is built for CUDA. Beside a CPU torch its compiled operators do not load, and the
first registration of a fake kernel for `torchvision::nms` fails because nobody has declared that operator.
The image transforms are pure Python and need no operator, so declaring the two names is enough to import
them; calling `nms` would still fail, and no vision-language processor does.
"""

import sys
from importlib.abc import MetaPathFinder

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(MetaPathFinder):
    """Finds nothing itself: it acts when torchvision is first looked for, and then steps aside."""

    library = None  # torch drops the declarations with their library object, so the class keeps it

    def find_spec(self, fullname, path=None, target=None):
        """Declare torchvision's operators just before its import; always returns None."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                DeclareOperators.library = torch.library.Library(fullname, "DEF")
                for schema in SCHEMAS:
                    DeclareOperators.library.define(schema)
        return None


if __name__ != "__main__":
    sys.meta_path.insert(0, DeclareOperators())
