from __future__ import annotations

import asyncio
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

import shoal
from shoal import AsyncSandbox, errors
from shoal.errors import (
    ConflictError,
    DeadlineExceededError,
    ExecFailedError,
    ImageNotFoundError,
    InternalError,
    InvalidArgumentError,
    NodeUnavailableError,
    PathNotFoundError,
    SandboxGoneError,
    from_problem,
)
from shoal.sdk.tests.fake_node import FakeNode
from shoal.types import Outcome, Reason, SandboxSpec


async def _until(holds: Callable[[], object]) -> None:
    """Wait for something in the node's thread, which has no event for it."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)


async def test_run_returns_outcome_and_streams_apart(node: FakeNode) -> None:
    async with await AsyncSandbox.create(labels={"a": "b"}) as sb:
        result = await sb.run("echo out; echo err >&2; exit 7")
        assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7)
        assert result.outcome is Outcome.EXITED
        assert not result.ok
        assert [info.id for info in await AsyncSandbox.list(labels={"a": "b"})] == [sb.id]
        assert await AsyncSandbox.list(labels={"a": "c"}) == []
    assert node.sandboxes[sb.id].info.reason is Reason.TERMINATED
    assert (await sb.info()).reason is Reason.TERMINATED
    await sb.terminate()


async def test_three_ways_to_name_a_command(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        assert (await sb.run("echo $((1+1))")).stdout == "2\n"
        assert (await sb.run("printf", "%s", "$HOME")).stdout == "$HOME"
        assert (await sb.run(["printf", "%s", "a b"])).stdout == "a b"
        for bad in ([], [""], "a\0b"):
            with pytest.raises(InvalidArgumentError):
                await sb.run(bad)
        with pytest.raises(InvalidArgumentError):
            await sb.run(["a"], "b")


async def test_stdin_env_and_cwd_reach_the_command(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        big = os.urandom(3 << 20)
        assert (await sb.run("cat", stdin=big)).stdout_bytes == big
        assert (await sb.run("cat", stdin="")).stdout == ""
        assert (await sb.run("cat")).stdout == ""
        assert (await sb.run("echo $A; pwd", env={"A": "x"}, cwd="/tmp")).stdout == "x\n/tmp\n"
        assert (await sb.run("true", stdin=big)).ok  # it reads none of it


async def test_check_raises_with_the_result(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        with pytest.raises(ExecFailedError, match="exited with code 3") as caught:
            await sb.run("echo partly; exit 3", check=True)
        assert caught.value.result.stdout == "partly\n"


async def test_what_does_not_start_is_told_with_errno(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        result = await sb.run(["no-such-program"])
        assert (result.outcome, result.errno, result.stage) == (Outcome.NOT_STARTED, 2, "exec")
        process = await sb.exec(["no-such-program"])
        assert await process.wait() == 127


async def test_a_timeout_keeps_what_was_printed(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        result = await sb.run("echo early; sleep 60", timeout=0.3)
        assert result.outcome is Outcome.TIMED_OUT
        assert result.stdout == "early\n"


async def test_output_over_the_bound_keeps_head_and_tail(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        result = await sb.run("seq 1 100000; echo over >&2", max_output_bytes=1000)
        assert result.truncated
        assert result.stdout.startswith("1\n2\n")
        assert result.stdout.endswith("99999\n100000\n")
        assert "bytes left out" in result.stdout
        assert result.stderr == "over\n"
        exact = await sb.run("head -c 1000 /dev/zero", max_output_bytes=1000)
        assert not exact.truncated
        assert exact.stdout_bytes == bytes(1000)


@pytest.mark.parametrize("cut", [0, 3, 60, 200, 70_000, 500_000])
async def test_a_broken_connection_loses_and_repeats_nothing(node: FakeNode, cut: int) -> None:
    async with await AsyncSandbox.create() as sb:
        node.break_after = cut
        result = await sb.run("echo x >> ran; seq 1 200000; echo e >&2")
        assert node.break_after is None
        assert result.stdout_bytes == b"".join(b"%d\n" % number for number in range(1, 200001))
        assert result.stderr == "e\n"
        assert not result.truncated
        assert await sb.files.read("/ran") == b"x\n"


async def test_cancelling_a_run_kills_the_command(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        task = asyncio.create_task(sb.run("sleep 60"))
        await _until(lambda: node.sandboxes[sb.id].execs)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [(number, tree) for _, number, tree in node.signals] == [(9, True)]


async def test_a_process_streams_both_ways(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec(["cat"], stdin=True)
        assert process.pid > 0
        assert await process.poll() is None
        await process.stdin.write("one\n")
        assert await process.stdout.readline() == b"one\n"
        await process.stdin.write(b"two\nthree")
        await process.stdin.close()
        assert [line async for line in process.stdout] == [b"two\n", b"three"]
        assert await process.stderr.read() == b""
        assert await process.wait() == 0
        assert process.returncode == 0
        assert process.exit is not None
        await process.kill()


async def test_stdin_must_be_asked_for(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("true")
        with pytest.raises(InvalidArgumentError, match="no stdin"):
            _ = process.stdin


async def test_a_signal_ends_a_process_and_is_told(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec(["sleep", "60"])
        with pytest.raises(DeadlineExceededError):
            await process.wait(0.05)
        await process.signal("TERM")
        assert await process.wait() == -15
        with pytest.raises(InvalidArgumentError):
            await process.signal("NOPE")


async def test_a_process_is_found_again_by_its_id(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("echo a; sleep 0.2; echo b", exec_id="mine")
        again = await (await AsyncSandbox.connect(sb.id)).attach("mine")
        assert await again.stdout.read() == b"a\nb\n"
        with pytest.raises(errors.ConflictError):
            await process.stdout.read()
        assert [await process.wait(), await again.wait()] == [0, 0]
        with pytest.raises(errors.ExecNotFoundError):
            await sb.attach("nobody")
        assert [status.exec_id for status in await sb.execs()] == ["mine"]


@pytest.mark.parametrize("exec_id", ["", ".", "..", "a/b", "a b", "ü", "a\n", "x" * 129])
async def test_an_exec_id_that_is_none_is_refused_before_anything_is_sent(
    node: FakeNode, exec_id: str
) -> None:
    async with await AsyncSandbox.create() as sb:
        with pytest.raises(InvalidArgumentError, match="is none"):
            await sb.exec("true", exec_id=exec_id)
        with pytest.raises(InvalidArgumentError, match="is none"):
            await sb.attach(exec_id)
        assert await sb.execs() == []


async def test_waiting_for_one_stream_does_not_hang_on_the_other(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("head -c 30000000 /dev/zero; echo done >&2")
        assert await process.stderr.read() == b"done\n"
        assert await process.wait() == 0
        left = await process.stdout.read()
        assert len(left) + process.stdout.dropped_bytes == 30000000
        assert len(left) <= 10 << 20


async def test_a_slow_reader_gets_every_byte(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("head -c 30000000 /dev/zero")
        await asyncio.sleep(0.3)
        seen = 0
        while data := await process.stdout.read(1 << 20):
            seen += len(data)
        assert seen == 30000000
        assert process.stdout.dropped_bytes == 0


async def test_reading_both_streams_at_once_loses_nothing_however_slow_one_is(
    node: FakeNode,
) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("head -c 30000000 /dev/zero; echo done >&2")

        async def slowly() -> int:
            seen = 0
            while data := await process.stdout.read(1 << 20):
                seen += len(data)
                await asyncio.sleep(0.01)
            return seen

        seen, err, code = await asyncio.gather(slowly(), process.stderr.read(), process.wait())
        assert (seen, err, code) == (30000000, b"done\n", 0)


async def test_a_sandbox_that_ends_ends_its_execs_with_the_reason(node: FakeNode) -> None:
    sb = await AsyncSandbox.create()
    process = await sb.exec(["sleep", "60"])
    await sb.terminate()
    with pytest.raises(SandboxGoneError) as caught:
        await process.wait()
    assert caught.value.details["reason"] == "terminated"
    with pytest.raises(SandboxGoneError):
        await sb.run("true")
    with pytest.raises(SandboxGoneError):
        await AsyncSandbox.connect(sb.id)


async def test_files(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        assert (await sb.files.write("/app/a.txt", "hi", mode=0o600)).mode == 0o600
        assert await sb.files.read("/app/a.txt") == b"hi"
        assert await sb.files.read("/app/a.txt", offset=1, length=5) == b"i"
        assert await sb.files.read_text("/app/a.txt") == "hi"
        await sb.files.make_dir("/app/sub")
        assert [info.name for info in await sb.files.list("/app")] == ["a.txt", "sub"]
        await sb.files.rename("/app/a.txt", "/app/b.txt")
        assert not await sb.files.exists("/app/a.txt")
        await sb.files.remove("/app/b.txt")
        with pytest.raises(PathNotFoundError):
            await sb.files.read("/app/b.txt")
        with pytest.raises(errors.PathError):
            await sb.files.read("/app/sub")


async def test_a_tree_goes_up_and_comes_back_the_same(node: FakeNode, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / ("x" * 120) / ("y" * 120)).mkdir(parents=True)
    (tree / "deep" / ("x" * 120) / ("y" * 120) / "far").write_text("far")
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "run.sh").chmod(0o755)
    os.utime(tree / "run.sh", (1_000_000_000, 1_000_000_000))
    (tree / "link").symlink_to("run.sh")
    (tree / "gr\u00fc\u00df").write_bytes(os.urandom(1 << 21))
    (tree / "empty").mkdir()
    os.utime(tree / "empty", (1_100_000_000, 1_100_000_000))
    seen: list[int] = []
    async with await AsyncSandbox.create() as sb:
        await sb.files.upload(tree, "/app/tree", progress=seen.append)
        assert seen[-1] > 1 << 21
        back = tmp_path / "back"
        assert await sb.files.download("/app/tree", back) == []
        assert _census(back) == _census(tree)
        await sb.files.upload(tree / "run.sh", "/bin/go")
        await sb.files.upload(tree / "run.sh", "/bin/")
        await sb.files.download("/bin/go", tmp_path)
        await sb.files.download("/bin/run.sh", tmp_path / "renamed")
        await sb.files.download("/app/tree/link", tmp_path / "followed")
        for name in ("go", "renamed", "followed"):
            status = (tmp_path / name).lstat()
            assert (status.st_mode, status.st_mtime) == (
                (tree / "run.sh").stat().st_mode,
                1_000_000_000,
            )
        with pytest.raises(FileNotFoundError):
            await sb.files.upload(tmp_path / "nothing", "/x")
        with pytest.raises(PathNotFoundError):
            await sb.files.download("/nothing", tmp_path / "x")
        assert not (tmp_path / "x").exists()


def _census(top: Path) -> dict[str, tuple[int, str | bytes | int]]:
    found: dict[str, tuple[int, str | bytes | int]] = {}
    for path in top.rglob("*"):
        status = path.lstat()
        content = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else 0
        )
        found[str(path.relative_to(top))] = (status.st_mode, content)
    return found


async def test_errors_of_the_node_are_typed(node: FakeNode) -> None:
    with pytest.raises(ImageNotFoundError) as caught:
        await AsyncSandbox.create("nope")
    assert caught.value.hint
    with pytest.raises(errors.SandboxNotFoundError):
        await AsyncSandbox.connect("sb-x/../y?z")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (500, "<html>oops</html>", InternalError),
        (502, "", NodeUnavailableError),
        (503, "[]", NodeUnavailableError),
        (200, "not json", InternalError),
        (200, '{"sandboxes": 3}', InternalError),
        (302, "", InternalError),
    ],
)
async def test_an_answer_that_is_no_problem_document_is_an_error_still(
    node: FakeNode, status: int, body: str, kind: type[Exception]
) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    node.answer = answer
    with pytest.raises(kind):
        await AsyncSandbox.list()


async def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_URL", "unix:///nonexistent/shoal.sock")
    with pytest.raises(NodeUnavailableError) as caught:
        await AsyncSandbox.list()
    assert caught.value.is_infra
    assert "SHOAL_URL" in caught.value.hint


@pytest.mark.parametrize(
    "url", ["shoal", "unix://rel/path", "ftp://x", "http://", "unix:relative", "http://a/b"]
)
async def test_an_address_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("SHOAL_URL", url)
    with pytest.raises(InvalidArgumentError, match="not a node's address"):
        await AsyncSandbox.list()


async def test_a_node_that_dies_in_the_middle_is_unavailable(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.sdk._exec.RESUME_PATIENCE", 0.2)
    sb = await AsyncSandbox.create()
    call = asyncio.create_task(sb.run(["sleep", "60"]))
    await _until(lambda: node.sandboxes[sb.id].execs)
    node.sandboxes.clear()
    await asyncio.to_thread(node.stop)
    with pytest.raises((NodeUnavailableError, SandboxGoneError)):
        await call


async def test_a_create_that_takes_too_long_leaves_nothing(node: FakeNode) -> None:
    node.create_delay = 0.3
    with pytest.raises(DeadlineExceededError):
        await AsyncSandbox.create(start_timeout=0.05)
    task = asyncio.create_task(AsyncSandbox.create())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _until(
        lambda: len(node.sandboxes) == 2 and all(sb.info.reason for sb in node.sandboxes.values())
    )


async def test_only_what_was_asked_for_is_sent(node: FakeNode) -> None:
    await AsyncSandbox.create()
    await AsyncSandbox.create(cpu=1.0, env={"A": "b"})
    await AsyncSandbox.create_many([SandboxSpec(), SandboxSpec(pids=7)])
    assert sorted(node.specs, key=len) == [
        {"image": "base"},
        {"image": "base"},
        {"image": "base", "pids": 7},
        {"image": "base", "cpu": 1.0, "env": {"A": "b"}},
    ]
    with pytest.raises(InvalidArgumentError):
        await AsyncSandbox.create(cpu="many")  # type: ignore[arg-type]  # what it is about


async def test_many_at_once_each_with_its_own_outcome(node: FakeNode) -> None:
    specs = [
        SandboxSpec(labels={"n": str(n)}, image="base" if n % 10 else "nope") for n in range(50)
    ]
    made = await AsyncSandbox.create_many(specs)
    assert len(made) == 50
    for number, item in enumerate(made):
        if number % 10:
            assert isinstance(item, AsyncSandbox)
            assert node.sandboxes[item.id].info.labels == {"n": str(number)}
        else:
            assert isinstance(item, ImageNotFoundError)


async def test_many_long_runs_do_not_keep_a_short_call_waiting(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        runs = [asyncio.create_task(sb.run(["sleep", "60"])) for _ in range(150)]
        await _until(lambda: len(node.sandboxes[sb.id].execs) == 150)
        await sb.info()
        assert not any(run.done() for run in runs)
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
    assert len(node.signals) == 150


async def test_a_token_is_not_shown(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        token = node.sandboxes[sb.id].token
        assert token not in repr(sb) + repr(sb._access) + str(vars(sb))
        assert not any(token in request for request in node.requests)


async def test_leaving_the_block_ends_the_sandbox_even_when_cancelled(node: FakeNode) -> None:
    async def work() -> None:
        async with await AsyncSandbox.create():
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await _until(lambda: node.sandboxes)
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(sb.info.reason for sb in node.sandboxes.values())


def test_a_program_of_many_loops_ends_without_warnings(node: FakeNode) -> None:
    async def once() -> str:
        async with await AsyncSandbox.create() as sb:
            return (await sb.run("echo hi")).stdout

    assert [asyncio.run(once()) for _ in range(3)] == ["hi\n"] * 3


def test_the_door_has_what_it_says() -> None:
    for name in shoal.__all__:
        if name != "__version__":
            assert getattr(shoal, name) is not None
    with pytest.raises(AttributeError):
        _ = shoal.nothing


def test_a_traceback_shows_an_errors_hint_once() -> None:
    error = ConflictError("taken", hint="take another", which=1)
    for shown in (error, from_problem(error.to_problem()), pickle.loads(pickle.dumps(error))):
        lines = traceback.format_exception(shown)
        assert lines == ["shoal.errors.ConflictError: taken\n", "hint: take another\n"]
        assert str(shown) == "taken"
    assert traceback.format_exception(ConflictError("taken"))[1:] == []
