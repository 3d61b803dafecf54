"""Makes installed packages absent from a process and its children, for tests of what is left.

    PYTHONPATH=tests/absent FASTUNLEARN_ABSENT=diffusers,nvtx python -m pytest

Python imports this module at its start where it finds it. From then on the packages are found neither by
`import` nor by `importlib.util.find_spec` nor by `importlib.metadata`.
"""

import os
import sys
from importlib.machinery import PathFinder

ABSENT = frozenset(filter(None, os.environ.get("FASTUNLEARN_ABSENT", "").split(",")))


class Remaining(PathFinder):
    """Python's own finder of what is installed, without the absent packages."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *arguments, **options):
        for found in super().find_distributions(*arguments, **options):
            if found.metadata["Name"].lower().partition("-")[0] not in ABSENT:  # faiss comes as faiss-cpu
                yield found


sys.meta_path = [Remaining if finder is PathFinder else finder for finder in sys.meta_path]
