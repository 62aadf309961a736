"""Servers and other long commands from the command line, over a real node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request

from tests.support.node import PrivateNode


def test_a_server_is_started_reached_watched_and_ended(node: PrivateNode) -> None:
    with node.unchanged():
        made = node.cli(
            *("create", "--command", "cd /etc && exec python3 -um http.server 8000"),
            *("--ready", "http://:8000/os-release"),
        )
        assert made.returncode == 0, made.stderr.decode()
        sandbox = made.stdout.decode().strip()
        try:
            (main,) = json.loads(node.cli("execs", "--json", sandbox).stdout)
            assert (main["exec_id"], main["outcome"]) == ("main", "running")
            with subprocess.Popen(
                [sys.executable, "-m", "shoal", "port", sandbox, "8000"],
                env=node.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            ) as forward:
                try:
                    assert forward.stdout is not None
                    address = forward.stdout.readline().decode().strip()
                    with urllib.request.urlopen(f"http://{address}/os-release", timeout=20) as page:
                        assert b"Debian" in page.read()
                    forward.send_signal(signal.SIGINT)
                    assert forward.wait(20) == 130
                finally:
                    forward.kill()
            url = node.cli("port", sandbox, "8000", "--public").stdout.decode().strip()
            assert url.startswith(f"http://8000-{sandbox}.")
            assert node.cli("kill", sandbox, "main").returncode == 0
            shown = node.cli("attach", sandbox, "main")
            assert shown.returncode == 137
            assert b'"GET /os-release HTTP/1.1" 200' in shown.stdout + shown.stderr
        finally:
            assert node.cli("rm", sandbox).returncode == 0


def test_a_main_command_that_fails_leaves_no_sandbox(node: PrivateNode) -> None:
    with node.unchanged():
        made = node.cli("create", "--command", "exit 3", "--ready", "8000")
        assert (made.returncode, made.stdout) == (1, b"")
        assert made.stderr.startswith(b"error: ")
        assert node.cli("ps", "-q").stdout == b""


def test_a_detached_command_outlives_its_starter_unread(node: PrivateNode) -> None:
    sandbox = node.cli("create").stdout.decode().strip()
    try:
        script = "seq 2000000; echo over > /over; sleep 1000"
        started = node.cli("exec", "-d", sandbox, "--", "sh", "-c", script)
        assert started.returncode == 0, started.stderr.decode()
        end = time.monotonic() + 60
        while node.cli("exec", sandbox, "--", "cat", "/over").stdout != b"over\n":
            assert time.monotonic() < end, "its output held it back"
            time.sleep(0.2)
        name = started.stdout.decode().strip()
        assert node.cli("kill", "-s", "TERM", sandbox, name[:10]).returncode == 0
        shown = node.cli("attach", sandbox, name)
        assert shown.returncode == 143
        assert shown.stdout.endswith(b"\n2000000\n")
        assert len(shown.stdout) < 14_000_000
    finally:
        assert node.cli("rm", sandbox).returncode == 0


def test_a_detached_terminal_waits_for_one(node: PrivateNode) -> None:
    sandbox = node.cli("create").stdout.decode().strip()
    try:
        name = node.cli("exec", "-dt", sandbox, "--", "sh").stdout.decode().strip()
        (known,) = json.loads(node.cli("execs", "--json", sandbox).stdout)
        assert (known["exec_id"], known["pty"], known["outcome"]) == (name, True, "running")
        refused = node.cli("attach", sandbox, name)
        assert refused.returncode == 1
        assert refused.stderr.startswith(b"error: stdin is no terminal\nhint: ")
    finally:
        assert node.cli("rm", sandbox).returncode == 0
