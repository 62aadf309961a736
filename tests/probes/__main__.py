"""`python3 -m probes ID`, facts as JSON on stdin, one line of JSON on stdout."""

from __future__ import annotations

import sys

from . import filesystem, kernel, lib, network, process, resources

assert all((filesystem, kernel, network, process, resources))
sys.exit(lib.main())
