"""The files that the package ships: demo data, a digit classifier, a small diffusion model.

Credits and licences: README.md beside them.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """The path of the shipped file or folder `name`.

    Raises:
        ValueError: nothing of that name is shipped.
    """
    found = FOLDER / name
    if not name or found.parent != FOLDER or not found.exists():
        shipped = sorted(entry.name for entry in FOLDER.iterdir() if not entry.name.startswith(("_", ".")))
        raise ValueError(f"name: expected one of {', '.join(shipped)}, got {name!r}")
    return found
