"""A create answers when the sandbox is ready, and leaves nothing behind when it never is."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.node import PrivateNode

SLOW_TO_LISTEN = ["sh", "-c", "sleep 0.5; exec python3 -m http.server 8000 --bind 127.0.0.1"]
LISTENS_ON_V6 = ["python3", "-m", "http.server", "8000", "--bind", "::1"]
UNWELL_AT_FIRST = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        with open("/tmp/asked", "w") as file:
            file.write(f"{Handler.asked} {self.path}")
        self.send_response(200 if Handler.asked > 3 else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""
PRINTS_WHAT_NOBODY_READS = """
import sys, time
for _ in range(512):
    sys.stdout.buffer.write(b"x" * 65536)
sys.stdout.flush()
open("/tmp/through", "w").close()
time.sleep(300)
"""


def _post(node: PrivateNode, timeout: float = 60, **spec: Any) -> tuple[int, Any]:
    answer = node.request("POST", "/v1/sandboxes", body=json.dumps(spec).encode(), timeout=timeout)
    return answer.status, answer.json()


@contextlib.contextmanager
def _ready(node: PrivateNode, **spec: Any) -> Iterator[str]:
    """A sandbox that came up, by its id; afterwards nothing of it is left."""
    with node.unchanged():
        status, made = _post(node, **spec)
        assert status == 201, made
        assert made["sandbox"]["status"] == "running"
        try:
            yield made["sandbox"]["id"]
        finally:
            node.request("DELETE", f"/v1/sandboxes/{made['sandbox']['id']}")


def _said(sandbox: str, *argv: str) -> str:
    """What a command in the sandbox prints."""
    import shoal

    return shoal.Sandbox.connect(sandbox).run(list(argv), check=True).stdout.strip()


def _creating(node: PrivateNode, label: str) -> str:
    """Id of the sandbox that is being created with a label, once it is there."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        page = node.request("GET", f"/v1/sandboxes?label=test={label}").json()
        if page["sandboxes"]:
            return str(page["sandboxes"][0]["id"])
        time.sleep(0.02)
    raise AssertionError("no create is under way")


def _ended(node: PrivateNode, sandbox: str) -> Any:
    """What is known of a sandbox that must be gone soon."""
    end = time.monotonic() + 20
    while (info := node.request("GET", f"/v1/sandboxes/{sandbox}").json())["status"] != "stopped":
        assert time.monotonic() < end, info
        time.sleep(0.05)
    return info


@pytest.mark.parametrize("command", [SLOW_TO_LISTEN, LISTENS_ON_V6], ids=["later", "v6"])
def test_a_port_is_ready_when_it_listens(node: PrivateNode, command: list[str]) -> None:
    with _ready(node, command=command, ready={"port": 8000}) as sandbox:
        page = "import urllib.request as u; print(u.urlopen('http://localhost:8000').status)"
        assert _said(sandbox, "python3", "-c", page) == "200"


def test_a_path_is_ready_when_it_answers_well(node: PrivateNode) -> None:
    spec = {
        "command": ["python3", "-c", UNWELL_AT_FIRST],
        "ready": {"port": 8000, "path": "/health?deep=1"},
    }
    with _ready(node, **spec) as sandbox:
        assert _said(sandbox, "cat", "/tmp/asked") == "4 /health?deep=1"


def test_a_command_is_ready_when_it_exits_with_0(node: PrivateNode) -> None:
    command = ["sh", "-c", "sleep 0.5; echo up > /tmp/up; exec sleep 300"]
    spec = {"command": command, "ready": {"command": ["grep", "-q", "up", "/tmp/up"]}}
    with _ready(node, **spec) as sandbox:
        assert _said(sandbox, "cat", "/tmp/up") == "up"


def test_the_main_command_is_an_exec_with_the_sandboxes_defaults(node: PrivateNode) -> None:
    command = ["sh", "-c", "echo $WORD $PWD $(id -u) > /tmp/seen; touch /tmp/done; exec sleep 300"]
    spec = {
        "command": command,
        "ready": {"command": ["test", "-e", "/tmp/done"]},
        "env": {"WORD": "hello"},
        "workdir": "/usr",
        "user": "65534",
    }
    with _ready(node, **spec) as sandbox:
        assert _said(sandbox, "cat", "/tmp/seen") == "hello /usr 65534"
        path = f"/v1/sandboxes/{sandbox}/execs"
        execs = node.request("GET", path, token=node.token(sandbox)).json()["execs"]
        [main] = [one for one in execs if one["exec_id"] == "main"]
        assert (main["argv"], main["outcome"]) == (command, "running")


def test_a_main_command_whose_output_nobody_reads_goes_on(node: PrivateNode) -> None:
    spec = {
        "command": ["python3", "-c", PRINTS_WHAT_NOBODY_READS],
        "ready": {"command": ["test", "-e", "/tmp/through"], "timeout": 30},
    }
    with _ready(node, **spec):
        pass


def test_a_main_command_that_dies_at_once_says_how(node: PrivateNode) -> None:
    with node.unchanged():
        status, problem = _post(
            node, command=["sh", "-c", "exit 7"], ready={"port": 8000, "timeout": 30}
        )
        assert (status, problem["code"], problem["is_infra"]) == (500, "start_failed", False)
        assert "exited with code 7" in problem["detail"]
        assert problem["details"] == {"stage": "main", "outcome": "exited", "exit_code": 7}
        assert problem["hint"]


def test_the_last_words_of_a_main_command_outlive_its_sandbox(node: PrivateNode) -> None:
    with node.unchanged():
        status, problem = _post(
            node,
            command=["sh", "-c", "seq 100000; echo 'no such table: users' >&2; exit 1"],
            ready={"port": 8000, "timeout": 30},
            labels={"test": "last-words"},
        )
        assert (status, problem["code"]) == (500, "start_failed")
        assert problem["hint"] == "it last said on stderr: no such table: users"
        assert problem["details"]["stderr_tail"] == "no such table: users\n"
        tail = problem["details"]["stdout_tail"]
        assert tail.endswith("99999\n100000\n")
        assert len(tail) == 2048
        page = node.request("GET", "/v1/sandboxes?all=true&label=test=last-words").json()
        [info] = page["sandboxes"]
        assert (info["reason"], info["message"]) == ("not_ready", problem["detail"])


def test_a_main_command_that_is_not_there_says_so(node: PrivateNode) -> None:
    with node.unchanged():
        status, problem = _post(node, command=["no-such-program"])
        assert (status, problem["code"], problem["is_infra"]) == (500, "start_failed", False)
        assert problem["details"] == {"stage": "main", "errno": 2, "exec_stage": "exec"}
        assert "PATH" in problem["hint"]


@pytest.mark.parametrize(
    "ready",
    [
        {"port": 8001},
        {"port": 8000, "path": "/not-there"},
        {"command": ["false"]},
        {"command": ["no-such-program"]},
        {"command": ["sleep", "300"]},
    ],
    ids=lambda ready: "-".join(str(value) for value in ready.values()),
)
def test_what_is_never_ready_is_given_up_in_time(node: PrivateNode, ready: dict[str, Any]) -> None:
    command = ["python3", "-m", "http.server", "8000", "--bind", "127.0.0.1"]
    with node.unchanged():
        start = time.monotonic()
        status, problem = _post(node, command=command, ready={**ready, "timeout": 2})
        assert (status, problem["code"], problem["is_infra"]) == (504, "start_timeout", False)
        assert problem["detail"].startswith("not ready within 2 s: ")
        assert problem["details"] == {"stage": "ready"}
        assert 2 <= time.monotonic() - start < 20


def test_a_creator_that_goes_away_while_it_waits_leaves_nothing(node: PrivateNode) -> None:
    with node.unchanged():
        with pytest.raises(TimeoutError):
            _post(
                node,
                timeout=3,
                command=["sleep", "300"],
                ready={"port": 8000},
                labels={"test": "goes-away"},
            )
        page = node.request("GET", "/v1/sandboxes?all=true&label=test=goes-away").json()
        [info] = page["sandboxes"]
        info = _ended(node, info["id"])
        assert (info["reason"], info["message"]) == (
            "failed_to_start",
            "its creator went away",
        )


def test_an_end_that_comes_while_it_waits_is_told_to_its_creator(node: PrivateNode) -> None:
    with node.unchanged():
        answers: list[tuple[int, Any]] = []
        spec: dict[str, Any] = {
            "command": ["sleep", "300"],
            "ready": {"port": 8000},
            "labels": {"test": "ended"},
        }
        creator = threading.Thread(target=lambda: answers.append(_post(node, **spec)))
        creator.start()
        sandbox = _creating(node, "ended")
        time.sleep(0.3)  # on to where it waits; earlier is right too, and tried elsewhere
        assert node.request("GET", f"/v1/sandboxes/{sandbox}").json()["status"] == "creating"
        info = node.request("DELETE", f"/v1/sandboxes/{sandbox}").json()
        assert (info["status"], info["reason"]) == ("stopped", "terminated")
        creator.join(20)
        [(status, problem)] = answers
        assert (status, problem["code"]) == (410, "sandbox_gone")
        assert problem["details"]["reason"] == "terminated"
