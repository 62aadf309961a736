"""The first three lines, and the same from the command line."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from tests.support.node import PrivateNode


def test_the_first_three_lines(node: PrivateNode, capsys: pytest.CaptureFixture[str]) -> None:
    import shoal

    with node.unchanged(), shoal.Sandbox.create() as sb:
        print(sb.run("python3 -c 'print(6*7)'").stdout)  # noqa: T201 - the lines as README has them
    assert capsys.readouterr().out == "42\n\n"


async def test_the_first_three_lines_in_async(node: PrivateNode) -> None:
    import shoal

    async with await shoal.AsyncSandbox.create() as sb:
        assert (await sb.run("python3 -c 'print(6*7)'")).stdout == "42\n"
        await sb.files.write("/app/a.txt", b"hi")
        assert await sb.files.read("/app/a.txt") == b"hi"


def test_run_prints_what_the_command_prints(node: PrivateNode) -> None:
    with node.unchanged():
        done = node.cli("run", "--", "python3", "-c", "print(6*7)")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"42\n", b"")


def test_run_keeps_the_streams_apart_and_exits_as_the_command(node: PrivateNode) -> None:
    with node.unchanged():
        done = node.cli("run", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_run_hands_stdin_over(node: PrivateNode) -> None:
    done = node.cli("run", "--", "cat", stdin=b"hi\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hi\n", b"")


def test_run_is_byte_exact_both_ways(node: PrivateNode) -> None:
    data = bytes(range(256)) * 8192
    done = node.cli("run", "--", "cat", stdin=data)
    assert done.returncode == 0
    assert done.stdout == data


def test_run_tells_a_signal_as_a_shell_does(node: PrivateNode) -> None:
    assert node.cli("run", "--", "sh", "-c", "kill -TERM $$").returncode == 143


def test_run_tells_json(node: PrivateNode) -> None:
    done = node.cli("run", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    told = json.loads(done.stdout)
    assert told["outcome"] == "exited"
    assert told["exit_code"] == 3
    assert told["stdout"] == "out\n"
    assert told["stderr"] == "err\n"


def test_run_hears_its_options(node: PrivateNode) -> None:
    done = node.cli(
        "run", "-e", "A=1", "-w", "/var", "-u", "1000", "--", "sh", "-c", "echo $A; pwd; id -u"
    )
    assert done.stdout == b"1\n/var\n1000\n"


def test_the_verbs_of_a_sandboxs_life(node: PrivateNode, tmp_path: pytest.TempPathFactory) -> None:
    with node.unchanged():
        made = node.cli("create", "--label", "job=7", "--timeout", "600").stdout.decode().strip()
        try:
            assert made.startswith("sb-")
            listed = node.cli("ps", "--label", "job=7", "-q").stdout.decode().split()
            assert listed == [made]
            assert made in [row["id"] for row in json.loads(node.cli("ps", "--json").stdout)]
            done = node.cli("exec", made, "--", "sh", "-c", "echo $((6*7)); exit 5")
            assert (done.returncode, done.stdout) == (5, b"42\n")
            told = json.loads(node.cli("inspect", made).stdout)
            assert (told["status"], told["labels"]) == ("running", {"job": "7"})
            here = os.path.join(str(tmp_path), "a.txt")
            with open(here, "w", encoding="utf-8") as handle:
                handle.write("hello")
            assert node.cli("cp", here, f"{made}:/srv/b.txt").returncode == 0
            assert node.cli("cp", f"{made}:/srv/b.txt", here + "2").returncode == 0
            with open(here + "2", encoding="utf-8") as handle:
                assert handle.read() == "hello"
        finally:
            assert node.cli("rm", made).returncode == 0
        assert json.loads(node.cli("inspect", made).stdout)["reason"] == "terminated"
        assert made not in node.cli("ps", "-q").stdout.decode()


def _talk(node: PrivateNode, arguments: list[str], lines: list[tuple[bytes, bytes]]) -> bytes:
    """Run a verb on a terminal: for each line wait for what is before it, then type it."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", *arguments],
        env={**node.env, "TERM": "xterm"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    heard = b""
    seen = 0
    end = time.monotonic() + 60
    waiting = list(lines)
    while time.monotonic() < end:
        if waiting and waiting[0][0] in heard[seen:]:
            seen = len(heard)
            os.write(master, waiting.pop(0)[1])
        if select.select([master], [], [], 0.2)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            heard += data
        elif process.poll() is not None:
            break
    else:
        process.kill()
        pytest.fail(f"the terminal is silent; it said {heard!r}")
    os.close(master)
    return heard + f"[{process.wait(20)}]".encode()


def test_shell_gives_a_terminal(node: PrivateNode) -> None:
    with node.unchanged():
        heard = _talk(
            node,
            ["shell"],
            [
                (b"# ", b"tty; test -t 0 && echo is-$((40+2))-tty; stty size\n"),
                (b"is-42-tty", b"sleep 100\n"),
                (b"sleep 100", b"\x03"),
                (b"# ", b"exit 3\n"),
            ],
        )
    assert b"/dev/pts/" in heard
    assert b"is-42-tty" in heard
    assert heard.endswith(b"[3]"), heard


def test_shell_of_a_sandbox_that_is_there(node: PrivateNode) -> None:
    import shoal

    with shoal.Sandbox.create() as sb:
        heard = _talk(node, ["shell", sb.id], [(b"# ", b"echo $((6*7)) > /note; exit\n")])
        assert heard.endswith(b"[0]"), heard
        assert sb.files.read("/note") == b"42\n"
        assert sb.run("true").ok


def test_a_request_without_the_token_is_refused(node: PrivateNode) -> None:
    import shoal

    with shoal.Sandbox.create() as sb:
        path = f"/v1/sandboxes/{sb.id}/execs"
        body = b'{"argv": ["true"]}'
        for token in (None, "", "0" * 64, node.token(sb.id)[:-1] + "x"):
            answer = node.request("POST", path, body=body, token=token)
            assert answer.status == 401
            assert answer.json()["code"] == "unauthenticated"
        assert node.request("POST", path, body=body, token=node.token(sb.id)).status == 200


def test_the_front_door_is_its_owners_only(node: PrivateNode) -> None:
    assert node.socket.stat().st_mode & 0o777 == 0o600
    assert node.data_dir.stat().st_mode & 0o077 == 0
