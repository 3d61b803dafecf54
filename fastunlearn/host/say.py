"""What is said to the log once, however often it would be true."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("fastunlearn")


@functools.cache
def once(text: str, *values: object) -> None:
    """Warns with `text % values`, unless that has been said."""
    log.warning(text, *values)
