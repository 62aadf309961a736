# Every recipe runs the same on a laptop and in CI. `tools/setup dev` makes what they need.

venv := env("SHOAL_VENV", justfile_directory() / ".venv")
export PATH := venv / "bin" + ":" + env("PATH") + ":" + env("HOME", "/root") / ".cargo/bin"
root := if `id -u` == "0" { "yes" } else { "no" }

# List the recipes
default:
    @just --list

# Build the static binaries where they are out of date
build:
    @python hatch_build.py

# Write what is generated (the sync SDK)
gen:
    python tools/gen_sync.py

# Fail when something generated is stale
gen-check:
    python tools/gen_sync.py --check

# Format everything
fmt:
    ruff format
    ruff check --fix --select I
    cargo fmt --all

# Check form, types, imports between rooms, and Rust lints
lint:
    ruff format --check
    ruff check
    mypy
    MYPYPATH=tests mypy tests/probes/*.py
    lint-imports --no-logo
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked --quiet -- -D warnings

# Run the tests that need no root
test:
    cargo test --workspace --locked --quiet
    pytest -m "not root"

# Run the tests that need root on a Linux host: walls, end to end
test-root: build
    pytest -m root

# Run what CI runs (as root also the tests that need it)
ci: gen-check lint test
    @if [ {{root}} = yes ]; then just test-root; else echo "not root: the tests that need it did not run (just test-root)"; fi

# Print the numbers that README and SPECIFICATION.md quote (as root)
bench: build
    python bench/create_exec.py
    python bench/exec.py
    python bench/agent_size.py

# Ask public advisory databases about our dependencies
audit:
    pip install --quiet --editable '.[audit]'
    pip-audit --skip-editable
    @if cargo audit --version >/dev/null 2>&1; then cargo audit; else echo "cargo audit is not installed: cargo install cargo-audit"; exit 1; fi
