"""What newer Pythons have in `typing`; `typing_extensions` comes with our dependencies on older ones."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 12):
    from typing import override
else:
    from typing_extensions import override

__all__ = ["override"]
