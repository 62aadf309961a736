"""Programs that try to break out, run inside a sandbox by the tests: `python3 -m probes FS-01`.

They need Python's standard library and nothing else, because they travel into the sandbox. A probe
looks at its property from the place where an attacker stands and reports each violation that it
saw. One that could look at nothing fails as well.
"""
