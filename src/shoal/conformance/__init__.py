"""What every runtime must do, as a suite that anyone can run on their own machine: `shoal conformance`.

Each check is a few lines over the public SDK and holds one sentence of the contract
(docs/exec-contract.md): it knows nothing of how a runtime is built, so that a new one is right when all of
them pass. The image needs `sh`, coreutils and `python3` with its standard library; `base` has them.
"""

from __future__ import annotations

from shoal.conformance._suite import UNSUPPORTED, Check, Report, Trial, load, run, select

__all__ = ["UNSUPPORTED", "Check", "Report", "Trial", "load", "run", "select"]
