from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from shoal.cli import cli
from shoal.cli.tests.test_cli import environment, shoal
from shoal.sdk.tests.fake_node import FakeNode


def _sandbox() -> str:
    return shoal("create").stdout.decode().strip()


def test_a_detached_command_prints_its_id_and_runs_on(node: FakeNode) -> None:
    sandbox = _sandbox()
    done = shoal("exec", "-d", sandbox, "--", "sh", "-c", "echo out; echo err >&2; sleep 60")
    assert (done.returncode, done.stderr) == (0, b"")
    name = done.stdout.decode().strip()
    assert list(node.sandboxes[sandbox].execs) == [name]
    told = json.loads(shoal("exec", "-d", "--json", sandbox, "--", "sleep", "60").stdout)
    assert told.keys() == {"sandbox", "exec_id", "pid"}
    assert told["exec_id"] in node.sandboxes[sandbox].execs
    missing = shoal("exec", "-d", sandbox, "--", "no-such-program")
    assert (missing.returncode, missing.stdout) == (127, b"")
    assert missing.stderr.startswith(b"error: no-such-program did not start: ")


def test_attach_shows_what_was_printed_and_exits_as_the_command(node: FakeNode) -> None:
    sandbox = _sandbox()
    script = "read line; echo got $line; echo err >&2; exit 5"
    name = shoal("exec", "-d", "-i", sandbox, "--", "sh", "-c", script).stdout.decode().strip()
    done = shoal("attach", "-i", sandbox, name[:8], stdin=b"this\n")
    assert (done.stdout, done.stderr, done.returncode) == (b"got this\n", b"err\n", 5)
    again = shoal("attach", sandbox, name)
    assert again.returncode == 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_watching_leaves_the_command_running(
    node: FakeNode, number: int, code: int
) -> None:
    sandbox = _sandbox()
    name = shoal("exec", "-d", sandbox, "--", "sh", "-c", "echo up; sleep 60").stdout.decode()
    with subprocess.Popen(
        [sys.executable, "-m", "shoal", "attach", sandbox, name.strip()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\n"
        program.send_signal(number)
        _, said = program.communicate(timeout=20)
    assert program.returncode == code
    assert b"it goes on" in said
    assert node.signals == []


def test_execs_lists_and_kill_ends(node: FakeNode) -> None:
    sandbox = _sandbox()
    first = shoal("exec", "-d", sandbox, "--", "sleep", "60").stdout.decode().strip()
    shoal("exec", sandbox, "--", "sh", "-c", "exit 3")
    lines = shoal("execs", sandbox).stdout.decode().splitlines()
    assert lines[0].split() == ["EXEC", "PID", "STATUS", "TTY", "COMMAND"]
    assert re.match(rf"{first}  \d+ +running +no ", lines[1])
    assert shoal("execs", "-q", sandbox).stdout.decode().split()[0] == first
    told = json.loads(shoal("execs", "--json", sandbox).stdout)
    assert [known["outcome"] for known in told] == ["running", "exited"]
    assert shoal("kill", "-s", "usr1", sandbox, first).returncode == 0
    assert shoal("kill", sandbox, first[:8]).returncode == 0
    assert node.signals == [(first, signal.SIGUSR1, False), (first, signal.SIGKILL, True)]
    for verb in ("kill", "attach"):
        done = shoal(verb, sandbox, "nobody")
        assert done.returncode == 1
        said = f"error: no exec 'nobody' in {sandbox}\nhint: see `shoal execs {sandbox}`\n"
        assert done.stderr.decode() == said
    vague = shoal("kill", sandbox, "ex-")
    assert vague.stderr.startswith(b"error: ex- is the beginning of 2 ids: ")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("8000", {"port": 8000}),
        ("http://:8000", {"port": 8000, "path": "/"}),
        ("http://:8000/health?x=1", {"port": 8000, "path": "/health?x=1"}),
        ("http://localhost:8000/", {"port": 8000, "path": "/"}),
        ("pg_isready -q", {"command": ["/bin/sh", "-c", "pg_isready -q"]}),
        ("curl http://:8000/", {"command": ["/bin/sh", "-c", "curl http://:8000/"]}),
    ],
)
def test_create_says_what_to_start_and_what_to_wait_for(
    node: FakeNode, given: str, meant: dict[str, object]
) -> None:
    done = shoal("create", "--command", "exec server --port 8000", "--ready", given)
    assert done.returncode == 0, done.stderr
    spec = node.specs[0]
    assert spec["command"] == ["/bin/sh", "-c", "exec server --port 8000"]
    ready = spec["ready"]
    assert isinstance(ready, dict)
    assert {key: ready[key] for key in meant} == meant
    assert not any(ready.get(key) for key in {"port", "path", "command"} - meant.keys())


@pytest.mark.parametrize(
    "argv",
    [
        ["create", "--ready", "0"],
        ["create", "--ready", "70000"],
        ["create", "--ready", "https://:8000/"],
        ["create", "--ready", "http://example.org:8000/"],
        ["create", "--ready", " "],
        ["kill", "-s", "NOSUCH", "sb-x", "main"],
        ["kill", "-s", "65", "sb-x", "main"],
        ["port", "sb-x", "0"],
        ["port", "sb-x", "web"],
        ["port", "sb-x", "80", "--url", "--local", "8080"],
    ],
)
def test_what_makes_no_sense_is_a_usage_error(argv: list[str]) -> None:
    done = CliRunner().invoke(cli, argv)
    assert done.exit_code == 2
    assert "Error: " in done.output


def test_port_tells_urls_and_publishes(node: FakeNode) -> None:
    sandbox = _sandbox()
    url = f"http://8000-{sandbox}.localhost:1234"
    assert shoal("port", sandbox, "8000", "--url").stdout.decode() == f"{url}\n"
    browser = shoal("port", sandbox, "8000", "--browser").stdout.decode()
    assert browser.startswith(f"{url}/.shoal/enter#token=")
    assert shoal("port", sandbox, "8000", "--public").stdout.decode() == f"{url}\n"
    assert node.sandboxes[sandbox].info.public_ports == [8000]
    assert shoal("port", sandbox, "8000", "--private").returncode == 0
    assert node.sandboxes[sandbox].info.public_ports == []
    node.url_template = None
    done = shoal("port", sandbox, "8000", "--url")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the node listens on no TCP port")


def test_port_forwards_until_it_is_interrupted(node: FakeNode) -> None:
    sandbox = _sandbox()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(connection.recv(100).upper())

        threading.Thread(target=echo, daemon=True).start()
        argv = ["port", sandbox, str(server.getsockname()[1])]
        with subprocess.Popen(
            [sys.executable, "-m", "shoal", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        ) as program:
            assert program.stdout is not None
            host, _, port = program.stdout.readline().decode().strip().partition(":")
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(b"hi")
                assert connection.recv(100) == b"HI"
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 130


def test_port_says_why_nobody_answers_and_ends_with_the_sandbox(node: FakeNode) -> None:
    sandbox = _sandbox()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens, and nobody else will
        port = taken.getsockname()[1]
        with subprocess.Popen(
            [sys.executable, "-m", "shoal", "port", sandbox, str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        ) as program:
            assert program.stdout is not None
            assert program.stderr is not None
            local = int(program.stdout.readline().rpartition(b":")[2])
            assert b"^C ends it" in program.stderr.readline()
            with socket.create_connection(("127.0.0.1", local), timeout=20) as connection:
                connection.settimeout(20)
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
            assert program.stderr.readline().startswith(b"a connection was not made: nothing")
            assert shoal("rm", sandbox).returncode == 0
            _, said = program.communicate(timeout=20)
            assert program.returncode == 1
            assert said.startswith(f"error: sandbox {sandbox} has ended".encode())
