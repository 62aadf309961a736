"""What an extra brings is loaded by those who ask for it only."""

from __future__ import annotations

import subprocess
import sys


def test_importing_shoal_loads_no_framework() -> None:
    program = (
        "import sys, shoal; shoal.Sandbox, shoal.SandboxSpec; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'inspect_ai', 'deepagents', 'langchain_core', 'yaml'}), "
        "*[name for name in sys.modules if name.startswith('shoal.integrations')])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stdout.strip() == b""
