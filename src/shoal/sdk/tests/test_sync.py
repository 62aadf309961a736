from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from shoal import Node, Sandbox, errors
from shoal.sdk import _portal
from shoal.sdk.tests.fake_node import FakeNode
from shoal.types import SandboxSpec


def test_the_first_three_lines(node: FakeNode) -> None:
    with Sandbox.create() as sb:
        assert sb.run("echo $((6*7))").stdout == "42\n"
        assert repr(sb) == f"<Sandbox {sb.id}>"
    assert node.sandboxes[sb.id].info.reason == "terminated"


def test_process_files_and_lists(node: FakeNode, tmp_path: Path) -> None:
    with Sandbox.create(labels={"a": "1"}) as sb:
        process = sb.exec(["cat"], stdin=True)
        process.stdin.write("a\nb\n")
        process.stdin.write_eof()
        assert list(process.stdout) == [b"a\n", b"b\n"]
        assert process.wait() == 0
        assert process.poll() == 0
        sb.files.write("/x", b"1")
        sb.files.download("/x", tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == b"1"
        assert [info.id for info in Sandbox.list()] == [sb.id]
        assert Sandbox.connect(sb.id).id == sb.id
        assert [image.name for image in Node().images()] == ["base"]


def test_create_many_wraps_what_came_up(node: FakeNode) -> None:
    made = Sandbox.create_many([SandboxSpec(), SandboxSpec(image="nope")])
    assert isinstance(made[0], Sandbox)
    assert isinstance(made[1], errors.ImageNotFoundError)


def test_threads_share_the_one_loop(node: FakeNode) -> None:
    with Sandbox.create() as sb:
        seen: list[str] = []
        threads = [
            threading.Thread(target=lambda: seen.append(sb.run("echo hi").stdout))
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == ["hi\n"] * 20
    assert sum(thread.name == "shoal-portal" for thread in threading.enumerate()) == 1


def test_a_sync_call_from_a_callback_is_refused_rather_than_hung(
    node: FakeNode, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("a")
    with Sandbox.create() as sb, pytest.raises(RuntimeError, match="callback"):
        sb.files.upload(tmp_path / "a", "/a", progress=lambda done: sb.terminate())


def test_interrupt_cancels_the_task_and_waits_for_its_cleanup(node: FakeNode) -> None:
    code = """
        import shoal, sys
        with shoal.Sandbox.create() as sb:
            try:
                print("ready", flush=True)
                sb.run("sleep 60")
            except KeyboardInterrupt:
                print("interrupted", flush=True)
                raise SystemExit(3)
    """
    with _program(code) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        while not any(sandbox.execs for sandbox in node.sandboxes.values()):
            time.sleep(0.01)
        program.send_signal(signal.SIGINT)
        assert program.stdout.read() == "interrupted\n"
        assert program.wait(10) == 3
    assert [(number, tree) for _, number, tree in node.signals] == [(9, True)]
    assert all(sandbox.info.reason for sandbox in node.sandboxes.values())


def test_exit_does_not_wait_for_what_is_pending(node: FakeNode) -> None:
    code = """
        import shoal, threading, time
        sb = shoal.Sandbox.create()
        threading.Thread(target=lambda: sb.run("sleep 60"), daemon=True).start()
        process = sb.exec("sleep 60")
        time.sleep(0.2)
        print("leaving", flush=True)
    """
    with _program(code) as program:
        started = time.monotonic()
        out, err = program.communicate(timeout=20)
        assert (out, err, program.returncode) == ("leaving\n", "", 0)
        assert time.monotonic() - started < 10


def test_a_forked_child_has_a_loop_of_its_own_and_leaves_the_parents_alone(node: FakeNode) -> None:
    code = """
        import os, shoal, sys
        sb = shoal.Sandbox.create()
        assert sb.run("echo before").stdout == "before\\n"
        process = sb.exec("echo one; sleep 0.5; echo two")
        assert process.stdout.readline() == b"one\\n"
        child = os.fork()
        if child == 0:
            assert sb.run("echo child").stdout == "child\\n"
            assert process.stdout.read() == b"two\\n", "the handle works here too"
            assert process.wait() == 0
            sys.exit(0)   # the ordinary way out, with all its finalizers
        assert os.waitpid(child, 0)[1] == 0
        for _ in range(3):
            assert sb.run("echo after").stdout == "after\\n"
        assert process.wait() == 0
        sb.terminate()
        print("fine")
    """
    with _program(code) as program:
        out, err = program.communicate(timeout=30)
        assert (out, err, program.returncode) == ("fine\n", "", 0)


def test_a_forked_child_that_leaves_the_block_ends_nothing(node: FakeNode) -> None:
    code = """
        import os, shoal, sys
        with shoal.Sandbox.create() as sb:
            child = os.fork()
            if child == 0:
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            print(sb.run("echo alive").stdout, end="")
    """
    with _program(code) as program:
        assert program.communicate(timeout=30) == ("alive\n", "")
    assert all(sandbox.info.reason for sandbox in node.sandboxes.values())


def test_multiprocessing_fork_works(node: FakeNode) -> None:
    code = """
        import multiprocessing, shoal
        sb = shoal.Sandbox.create()
        def work(n):
            return sb.run(f"echo {n}").stdout
        with multiprocessing.get_context("fork").Pool(3) as pool:
            print(sorted(pool.map(work, range(5))))
        sb.terminate()
    """
    with _program(code) as program:
        out, err = program.communicate(timeout=30)
        assert (out, err) == ("['0\\n', '1\\n', '2\\n', '3\\n', '4\\n']\n", "")


def test_the_portal_works_beside_a_running_loop(node: FakeNode) -> None:
    code = """
        import asyncio, shoal
        async def main():
            with shoal.Sandbox.create() as sb:   # as in a notebook
                return sb.run("echo hi").stdout
        print(asyncio.run(main()), end="")
    """
    with _program(code) as program:
        assert program.communicate(timeout=30) == ("hi\n", "")


def test_an_error_keeps_its_type_across_the_portal() -> None:
    async def fail() -> None:
        raise errors.ConflictError("no")

    with pytest.raises(errors.ConflictError):
        _portal.run(fail)


def _program(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # From Python 3.12 on, os.fork warns wherever there are threads; that it works here is what we show.
    quiet = "ignore:This process:DeprecationWarning"
    argv = [sys.executable, "-W", "error", "-W", quiet, "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_importing_the_package_is_quick_and_needs_no_server() -> None:
    code = """
        import sys, shoal
        assert "aiohttp" not in sys.modules
        shoal.Sandbox
        assert not {"click", "rich", "structlog", "pydantic", "pydantic_settings"} & set(sys.modules)
    """
    with _program(code) as program:
        assert program.communicate(timeout=30) == ("", "")


def test_the_sync_half_is_not_stale() -> None:
    tool = Path(__file__).resolve().parents[4] / "tools" / "gen_sync.py"
    if not tool.exists():
        pytest.skip("not in a checkout")
    pytest.importorskip("ruff")
    spec = importlib.util.spec_from_file_location("gen_sync", tool)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.stale(module.generate()) == [], "run tools/gen_sync.py"


def test_every_public_async_name_has_a_sync_twin() -> None:
    from shoal import sdk

    for name in (name for name in sdk.__all__ if name.startswith("Async")):
        ours, twin = getattr(sdk, name), getattr(sdk, name.removeprefix("Async"))
        for member in vars(ours):
            if not member.startswith("_"):
                assert hasattr(twin, member), f"{twin.__name__}.{member}"
                doc = getattr(twin, member).__doc__ or ""
                assert not re.search(r"\bawait\b|\bAsync", doc), f"{twin.__name__}.{member}: {doc}"
