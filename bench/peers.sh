#!/usr/bin/env bash
# Installs what bench/exec.py compares with, on Debian or Ubuntu as root: podman, crun and Docker Engine from the
# distribution, runsc from gVisor's Go module (about two minutes to build; needs Go, as new as the module asks).
# No daemon is left running: the bench starts a dockerd of its own and ends it.
set -euo pipefail

runsc=gvisor.dev/gvisor/runsc@v0.0.0-20260905035102-160fafc42237

apt-get update -q=2
DEBIAN_FRONTEND=noninteractive apt-get install -q=2 --no-install-recommends -y podman crun docker.io \
  </dev/null >/dev/null
if command -v go >/dev/null; then
  GOBIN=/usr/local/bin GOFLAGS=-mod=mod CGO_ENABLED=0 go install "$runsc"
else
  echo "peers: go is not on PATH, so runsc is left out (https://go.dev/dl)" >&2
fi
for name in podman crun dockerd runsc; do
  printf 'peers: %s %s\n' "$name" "$(command -v "$name" || echo missing)" >&2
done
