"""`python -m shoal.node`: the server process, as the keeper starts it.

The one place where a room looks up: an entry point wires rooms together and belongs to none of them.
"""

from __future__ import annotations

import sys

from shoal.api.server import main

if __name__ == "__main__":
    sys.exit(main())
