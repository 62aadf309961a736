"""The exec contract, through the SDK."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import shoal


def test_stdout_and_stderr_stay_apart_and_byte_exact(sandbox: shoal.Sandbox) -> None:
    program = """
import os
for number in range(2000):
    os.write(1, bytes([number % 256]) * 100)
    os.write(2, bytes([255 - number % 256]) * 100)
"""
    result = sandbox.run(["python3", "-c", program])
    assert result.stdout_bytes == b"".join(bytes([n % 256]) * 100 for n in range(2000))
    assert result.stderr_bytes == b"".join(bytes([255 - n % 256]) * 100 for n in range(2000))
    assert not result.truncated


@pytest.mark.parametrize("code", [0, 1, 7, 127, 255])
def test_the_exit_code_is_the_commands(code: int, sandbox: shoal.Sandbox) -> None:
    result = sandbox.run(f"exit {code}")
    assert (result.outcome, result.exit_code, result.ok) == ("exited", code, code == 0)


def test_arguments_are_untouched(sandbox: shoal.Sandbox) -> None:
    words = ["", " ", "a b", "'", '"', "$HOME", "*", "\n", "-n", "ü", "\\"]
    program = "import sys; print(ascii(sys.argv[1:]))"
    assert sandbox.run(["python3", "-c", program, *words]).stdout == ascii(words) + "\n"


def test_a_signal_is_told(sandbox: shoal.Sandbox) -> None:
    result = sandbox.run("kill -SEGV $$")
    assert (result.outcome, result.signal, result.exit_code) == ("signaled", 11, None)


def test_stdin_streams(sandbox: shoal.Sandbox) -> None:
    process = sandbox.exec(["cat"], stdin=True)
    for word in (b"one\n", b"two\n"):
        process.stdin.write(word)
        assert process.stdout.readline() == word
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    assert process.returncode == 0


def test_large_stdin_and_a_reader_that_leaves(sandbox: shoal.Sandbox) -> None:
    data = b"x" * (8 << 20)
    assert sandbox.run(["wc", "-c"], stdin=data).stdout.split() == [str(len(data))]
    assert sandbox.run("head -c 5", stdin=data).stdout == "xxxxx"
    assert sandbox.run(["cat"]).stdout == ""


def test_output_arrives_as_it_is_written(sandbox: shoal.Sandbox) -> None:
    process = sandbox.exec("echo first; read line; echo second", stdin=True)
    assert next(iter(process.stdout)).startswith(b"first")
    process.stdin.write("go\n")
    assert b"second\n" in b"".join(process.stdout)


def test_a_deadline_kills_the_whole_tree_and_keeps_the_output(sandbox: shoal.Sandbox) -> None:
    start = time.monotonic()
    result = sandbox.run("echo before; sleep 61 & sleep 62", timeout=1)
    assert result.outcome == "timed_out"
    assert result.stdout == "before\n"
    assert 0.9 < time.monotonic() - start < 6
    left = sandbox.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    assert "sleep 6" not in left.replace("cmdline", "")


def test_kill_ends_a_process(sandbox: shoal.Sandbox) -> None:
    process = sandbox.exec("echo up; sleep 100")
    assert process.stdout.readline() == b"up\n"
    process.kill()
    assert process.wait(timeout=10) != 0
    assert process.exit is not None
    assert process.exit.outcome in {"killed", "signaled"}


def test_an_exec_id_runs_once(sandbox: shoal.Sandbox) -> None:
    for _ in range(3):
        process = sandbox.exec("echo x >> /count; echo done", exec_id="only-once")
        assert process.exec_id == "only-once"
        process.wait(timeout=10)
    assert sandbox.files.read("/count") == b"x\n"


def test_the_newest_handle_gets_the_output_and_every_one_the_end(sandbox: shoal.Sandbox) -> None:
    import shoal

    first = sandbox.exec("seq 1 200000; read line; kill -TERM $$", stdin=True)
    seen = first.stdout.read(1000)
    second = sandbox.attach(first.exec_id)
    second.stdin.write("go\n")
    rest = second.stdout.read()
    assert seen + rest == b"".join(b"%d\n" % number for number in range(1, 200_001))
    assert [first.wait(timeout=20), second.wait(timeout=20)] == [-15, -15]
    assert first.exit == second.exit
    with pytest.raises(shoal.errors.ConflictError):
        first.stdout.read(1)


def test_an_exec_can_be_found_again(sandbox: shoal.Sandbox) -> None:
    process = sandbox.exec("echo a; read line; echo b", stdin=True)
    assert process.stdout.readline() == b"a\n"
    again = sandbox.attach(process.exec_id)
    again.stdin.write("go\n")
    assert again.wait(timeout=10) == 0
    known = {status.exec_id: status.outcome for status in sandbox.execs()}
    assert known[process.exec_id] == "exited"


def test_a_process_that_is_waited_for_goes_on_though_its_output_is_not_read_on(
    sandbox: shoal.Sandbox,
) -> None:
    process = sandbox.exec("echo first; head -c 5000000 /dev/zero; exit 3")
    assert process.stdout.readline() == b"first\n"
    assert process.wait(timeout=20) == 3
    assert len(process.stdout.read()) == 5_000_000
    assert process.stdout.dropped_bytes == 0


def test_output_beyond_the_bound_keeps_head_and_tail(sandbox: shoal.Sandbox) -> None:
    result = sandbox.run(
        "echo head; yes x | head -c 3000000; echo tail", max_output_bytes=100_000, timeout=60
    )
    assert result.truncated
    assert result.ok
    assert result.stdout_bytes.startswith(b"head\n")
    assert result.stdout_bytes.endswith(b"tail\n")
    assert len(result.stdout_bytes) <= 110_000


def test_environment_user_and_directory(sandbox: shoal.Sandbox) -> None:
    result = sandbox.run(
        "echo $A; pwd; id -u; id -g", env={"A": "x y"}, cwd="/usr/lib", user="1000"
    )
    assert result.stdout.split("\n")[:3] == ["x y", "/usr/lib", "1000"]
    assert sandbox.run("id -u", user="nobody").stdout == "65534\n"
    assert sandbox.run("id -u; id -g", user="1234:4321").stdout == "1234\n4321\n"


def test_defaults_of_the_sandbox_hold_for_execs(node: object) -> None:
    import shoal

    with shoal.Sandbox.create(env={"A": "1", "B": "2"}, user="1000", workdir="/srv/new") as sb:
        assert sb.run("echo $A$B; pwd; id -u", env={"B": "3"}).stdout == "13\n/srv/new\n1000\n"
        assert sb.run("id -u", user="0").stdout == "0\n"


def test_many_at_once_do_not_mix(sandbox: shoal.Sandbox) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = sandbox.run(f"for i in 1 2 3; do echo {number}; done").stdout

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {number: f"{number}\n" * 3 for number in range(40)}


def test_usage_is_told(sandbox: shoal.Sandbox) -> None:
    program = "x = bytearray(64 << 20)\nfor i in range(3_000_000): pass"
    usage = sandbox.run(["python3", "-c", program], check=True).usage
    assert usage.wall_s > 0.02
    assert usage.cpu_s > 0.02
    assert usage.max_rss_bytes > 64 << 20


def test_a_terminal(sandbox: shoal.Sandbox) -> None:
    process = sandbox.exec("stty size; test -t 0 && test -t 1 && test -t 2 && echo yes", pty=True)
    text = process.stdout.read_text()
    assert process.wait(timeout=10) == 0
    assert text.split() == ["24", "80", "yes"]
