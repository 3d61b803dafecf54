"""`python -m fastunlearn` is the command `fastunlearn`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
