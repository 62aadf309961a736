from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import tarfile
import termios
import time
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner

from shoal.cli import cli
from shoal.cli._group import VERBS
from shoal.cli._options import Mebibytes
from shoal.cli._streams import exit_code
from shoal.cli.ps import span
from shoal.sdk.tests.fake_node import FakeNode
from shoal.types import ExecExit, Outcome, Reason


def shoal(
    *argv: str, stdin: bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", *argv],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env={**environment(), **(env or {})},
        timeout=60,
        check=False,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_COLOR": "1"}


def _ended(node: FakeNode) -> bool:
    return all(sandbox.info.reason is Reason.TERMINATED for sandbox in node.sandboxes.values())


def test_run_keeps_the_streams_apart_and_passes_the_code_on(node: FakeNode) -> None:
    done = shoal("run", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)
    assert len(node.sandboxes) == 1
    assert _ended(node)


def test_run_forwards_stdin_and_every_byte(node: FakeNode) -> None:
    data = os.urandom(2_000_000)
    done = shoal("run", "--", "cat", stdin=data)
    assert (done.stdout, done.stderr, done.returncode) == (data, b"", 0)


def test_run_does_not_wait_for_stdin_that_nobody_reads(node: FakeNode) -> None:
    reader, writer = os.pipe()
    try:
        argv = [sys.executable, "-m", "shoal", "run", "--", "echo", "hi"]
        done = subprocess.run(
            argv, stdin=reader, capture_output=True, env=environment(), timeout=30, check=False
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.stdout, done.stderr, done.returncode) == (b"hi\n", b"", 0)


def test_json_does_not_wait_for_stdin_that_nobody_reads(node: FakeNode) -> None:
    sandbox = shoal("create").stdout.decode().strip()
    for verb in (["run", "--json"], ["exec", "-i", "--json", sandbox]):
        reader, writer = os.pipe()
        try:
            argv = [sys.executable, "-m", "shoal", *verb, "--", "echo", "hi"]
            done = subprocess.run(
                argv, stdin=reader, capture_output=True, env=environment(), timeout=30, check=False
            )
        finally:
            os.close(reader)
            os.close(writer)
        told = json.loads(done.stdout)
        assert (told["stdout"], told["outcome"], done.returncode) == ("hi\n", "exited", 0), verb


def test_exec_json_is_the_object_of_run(node: FakeNode) -> None:
    sandbox = shoal("create").stdout.decode().strip()
    script = "cat; echo err >&2; exit 3"
    done = shoal("exec", "-i", "--json", sandbox, "--", "sh", "-c", script, stdin=b"in")
    told = json.loads(done.stdout)
    assert (told["sandbox"], told["stdout"], told["stderr"]) == (sandbox, "in", "err\n")
    assert (told["outcome"], told["exit_code"], done.returncode) == ("exited", 3, 3)
    assert done.stderr == b""
    assert told.keys() == json.loads(shoal("run", "--json", "--", "true").stdout).keys()


def test_json_output_is_bounded_and_its_head_and_tail_kept(node: FakeNode) -> None:
    program = "echo head; head -c 12000000 /dev/zero | tr '\\0' x; echo; echo tail"
    told = json.loads(shoal("run", "--json", "--", "sh", "-c", program).stdout)
    assert told["truncated"]
    assert told["stdout"].startswith("head\nx")
    assert told["stdout"].endswith("x\ntail\n")
    assert " bytes left out " in told["stdout"]
    assert len(told["stdout"]) < (10 << 20) + 100


def test_the_beginning_of_an_id_will_do(node: FakeNode, tmp_path: Path) -> None:
    first = shoal("create").stdout.decode().strip()
    short = first[:8]
    assert shoal("exec", short, "--", "echo", "hi").stdout == b"hi\n"
    assert shoal("cp", __file__, f"{short}:/f").returncode == 0
    assert shoal("cp", f"{short}:/f", str(tmp_path / "f")).returncode == 0
    assert json.loads(shoal("inspect", short).stdout)["id"] == first
    second = shoal("create").stdout.decode().strip()
    for argv in (
        ["exec", short, "--", "true"],
        ["cp", __file__, f"{short}:/f"],
        ["inspect", short],
        ["rm", short],
    ):
        done = shoal(*argv)
        assert done.returncode == 1
        said = f"error: {short} is the beginning of 2 ids: {second}, {first}\nhint: ".encode()
        assert done.stderr.startswith(said), argv
    assert not _ended(node)
    del node.requests[:]
    assert shoal("rm", first).stdout.decode() == f"{first}\n"
    assert node.requests == [f"DELETE /v1/sandboxes/{first}"], "a whole id needs no list"
    assert shoal("rm", short, second).stdout.decode() == f"{second}\n"
    gone = shoal("exec", second[:-1] + "b", "--", "true")
    assert gone.stderr.startswith(f"error: sandbox {second} has ended".encode())


def test_of_many_paths_left_out_a_few_are_named_with_the_reason(
    node: FakeNode, tmp_path: Path
) -> None:
    sandbox = shoal("create").stdout.decode().strip()
    etc = node.sandboxes[sandbox].root / "etc"
    etc.mkdir()
    for number in range(30):
        (etc / f"link-{number:02}").symlink_to("/usr/bin/true")
    (etc / "file").touch()
    done = shoal("cp", f"{sandbox}:/etc/.", str(tmp_path / "etc"))
    lines = done.stderr.decode().splitlines()
    assert lines[0] == "left out: link-00 (a link that points outside)"
    assert lines[5:] == ["left out: … and 25 more (a link that points outside)"]
    assert os.listdir(tmp_path / "etc") == ["file"]


def test_cp_names_the_sandbox_that_is_none() -> None:
    for argv in (["nope:/a", "b"], ["b", "nope:/a"]):
        done = shoal("cp", *argv)
        assert done.returncode == 1
        assert done.stderr.startswith(b"error: no sandbox nope: nope:/a\nhint: "), argv


def test_a_directory_that_is_not_of_its_format_is_refused_before_it_is_sent(
    node: FakeNode, tmp_path: Path
) -> None:
    for format, name in (("oci", "OCI layout"), ("docker", "docker-archive")):
        done = shoal("image", "import", "--format", format, str(tmp_path), "x")
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: no {name} in {tmp_path}\nhint: ".encode())
    assert node.uploads == []


def test_a_directory_that_is_hardly_a_root_file_system_is_imported_with_a_warning(
    node: FakeNode, tmp_path: Path
) -> None:
    done = shoal("image", "import", str(tmp_path), "odd")
    assert done.returncode == 0
    assert done.stderr.startswith(b"warning: this does not look like a root file system: ")
    assert "odd" in node.images
    (tmp_path / "usr").mkdir()
    assert shoal("image", "import", str(tmp_path), "fine").stderr == b""
    (tmp_path / "usr").rmdir()
    (tmp_path / "oci-layout").touch()
    assert shoal("image", "import", str(tmp_path), "layout").stderr == b""


def test_of_a_root_file_system_all_is_kept_whatever_files_are_in_it(
    node: FakeNode, tmp_path: Path
) -> None:
    for name in ("bin", "oci-layout"):
        (tmp_path / name).touch()
    os.link(tmp_path / "bin", tmp_path / "twin")
    assert shoal("image", "import", "--format", "rootfs", str(tmp_path), "x").returncode == 0
    with tarfile.open(fileobj=BytesIO(node.uploads[0])) as tar:
        assert tar.getmember("twin").type == tarfile.LNKTYPE


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["no-such-program"], 127, b"error: no-such-program did not start: No such file"),
        (["/etc/passwd"], 126, b"error: /etc/passwd did not start: Permission denied"),
        (["sh", "-c", "kill -9 $$"], 137, b""),
        (["sh", "-c", "kill -15 $$"], 143, b""),
    ],
)
def test_run_tells_how_a_command_ended(
    node: FakeNode, argv: list[str], code: int, said: bytes
) -> None:
    done = shoal("run", "--", *argv)
    assert done.returncode == code
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert _ended(node)


def test_run_with_a_timeout_exits_as_timeout_does(node: FakeNode) -> None:
    done = shoal("run", "--timeout", "0.5", "--", "sh", "-c", "echo early; sleep 60")
    assert (done.stdout, done.returncode) == (b"early\n", 124)
    assert done.stderr.count(b"\n") == 1


def test_run_json_is_one_object(node: FakeNode) -> None:
    done = shoal("run", "--json", "--", "sh", "-c", "cat; exit 3", stdin=b"x")
    told = json.loads(done.stdout)
    assert (told["outcome"], told["exit_code"], told["stdout"], done.returncode) == (
        "exited",
        3,
        "x",
        3,
    )


def test_run_passes_options_on(node: FakeNode) -> None:
    options = (
        "--cpu 0.5 --memory 1g --disk 100 --pids 9 --label a=b -e A=1 -e FROM_HERE --workdir /tmp"
    )
    done = shoal(
        "run", *options.split(), "--", "sh", "-c", "echo $A $FROM_HERE; pwd", env={"FROM_HERE": "2"}
    )
    info = next(iter(node.sandboxes.values())).info
    assert (info.cpu, info.memory_mib, info.disk_mib, info.pids, info.labels) == (
        0.5,
        1024,
        100,
        9,
        {"a": "b"},
    )
    assert done.returncode == 0


def test_options_end_where_the_command_begins(node: FakeNode) -> None:
    sandbox = shoal("create").stdout.decode().strip()
    for argv in (["run"], ["exec", sandbox]):
        assert shoal(*argv, "printf", "%s", "--json").stdout == b"--json"
        assert shoal(*argv, "--", "printf", "%s", "-e").stdout == b"-e"
    assert shoal("exec", "-e", "A=1", sandbox, "sh", "-c", "echo $A").stdout == b"1\n"


def test_a_reader_that_has_enough_is_no_error(node: FakeNode) -> None:
    script = f"{sys.executable} -m shoal run -- seq 1 1000000 | head -n 1"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, env=environment(), timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == (b"1\n", b"")
    assert _ended(node)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(node: FakeNode, number: int, code: int) -> None:
    argv = [sys.executable, "-m", "shoal", "run", "--", "sh", "-c", "echo up; sleep 60"]
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\n"
        program.send_signal(number)
        _, err = program.communicate(timeout=20)
        assert program.returncode == code
        assert b"Traceback" not in err
    assert _ended(node)
    assert [entry[1:] for entry in node.signals] == [(9, True)]


def test_create_exec_inspect_ps_rm(node: FakeNode) -> None:
    sandbox = shoal("create", "--label", "job=7").stdout.decode().strip()
    assert sandbox in node.sandboxes
    done = shoal("exec", "-i", sandbox, "--", "sh", "-c", "cat; exit 5", stdin=b"in")
    assert (done.stdout, done.returncode) == (b"in", 5)
    assert shoal("exec", sandbox, "cat", stdin=b"not forwarded").stdout == b""
    assert json.loads(shoal("inspect", sandbox).stdout)["labels"] == {"job": "7"}
    table = shoal("ps").stdout.decode().splitlines()
    assert table[0].split()[:3] == ["ID", "IMAGE", "STATUS"]
    assert table[1].split()[:3] == [sandbox, "base", "running"]
    assert [info["id"] for info in json.loads(shoal("ps", "--json").stdout)] == [sandbox]
    assert shoal("ps", "-q", "--label", "job=8").stdout == b""
    assert shoal("rm", sandbox).stdout.decode().split() == [sandbox]
    assert json.loads(shoal("inspect", sandbox).stdout)["reason"] == "terminated"
    gone = shoal("exec", sandbox, "true")
    assert gone.returncode == 1
    assert gone.stderr.decode().startswith(f"error: sandbox {sandbox} has ended: terminated\n")
    assert "terminated" in shoal("ps", "--all").stdout.decode()


def test_rm_takes_all_and_goes_on_past_errors(node: FakeNode) -> None:
    one, two = (shoal("create").stdout.decode().strip() for _ in range(2))
    done = shoal("rm", "sb-nobody", one)
    assert (done.stdout.decode().split(), done.returncode) == ([one], 1)
    assert b"error: sb-nobody: no sandbox" in done.stderr
    assert shoal("rm", "--all").stdout.decode().split() == [two]
    assert shoal("rm").returncode == 2


def test_cp_both_ways(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "sub" / "a").write_text("a")
    sandbox = shoal("create").stdout.decode().strip()
    root = node.sandboxes[sandbox].root
    assert shoal("cp", str(tmp_path / "src"), f"{sandbox}:/app").returncode == 0
    assert (root / "app/sub/a").read_text() == "a"
    assert shoal("cp", str(tmp_path / "src"), f"{sandbox}:/app").returncode == 0
    assert (root / "app/src/sub/a").read_text() == "a"
    assert shoal("cp", f"{sandbox}:/app/sub", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert shoal("cp", f"{sandbox}:/app/sub/a", str(tmp_path)).returncode == 0
    assert (tmp_path / "a").read_text() == "a"
    assert shoal("cp", f"{tmp_path}/src/.", f"{sandbox}:/app").returncode == 0
    assert sorted(path.name for path in (root / "app").iterdir()) == ["src", "sub"]
    assert shoal("cp", f"{sandbox}:/app/sub/.", str(tmp_path / "src")).returncode == 0
    assert (tmp_path / "src" / "a").read_text() == "a"
    for bad in ((str(tmp_path), "/x"), (f"{sandbox}:/a", f"{sandbox}:/b"), (f"{sandbox}:rel", "x")):
        done = shoal("cp", *bad)
        assert done.returncode == 1
        assert done.stderr.startswith(b"error: ")
    missing = shoal("cp", str(tmp_path / "nothing"), f"{sandbox}:/x")
    assert (missing.returncode, missing.stderr.decode()) == (
        1,
        f"error: {tmp_path / 'nothing'}: No such file or directory\n",
    )


def test_images(node: FakeNode, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "tool").write_text("x")
    os.link(tree / "bin" / "tool", tree / "bin" / "twin")
    os.chown(tree / "bin" / "tool", os.getuid(), os.getgid())
    done = shoal("image", "import", str(tree), "tools:1")
    assert done.stdout.startswith(b"sha256:")
    with tarfile.open(fileobj=BytesIO(node.uploads[0])) as tar:
        members = {member.name: member for member in tar}
    assert members["bin/twin"].type == tarfile.LNKTYPE
    assert members["bin/tool"].uid == os.getuid()
    assert any("format=rootfs" in request for request in node.requests)
    packed = tmp_path / "thing.tar.gz"
    packed.write_bytes(b"\x1f\x8bnot looked at here")
    assert shoal("image", "import", str(packed)).returncode == 0
    assert "thing" in node.images
    assert shoal("image", "import", "-", "piped", stdin=b"tar").returncode == 0
    assert node.uploads[1:] == [packed.read_bytes(), b"tar"]
    listed = shoal("image", "ls").stdout.decode()
    assert [line.split()[0] for line in listed.splitlines()] == [
        "NAME",
        "base",
        "piped",
        "thing",
        "tools:1",
    ]
    assert shoal("image", "rm", "thing").stdout == b"thing\n"
    assert shoal("image", "rm", "thing").returncode == 1
    assert shoal("image", "gc").stdout == b"0" * 64 + b"\n"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (
            ["run", "--image", "nope", "--", "true"],
            1,
            "error: no image 'nope'\nhint: see `shoal image ls`\n",
        ),
        (["inspect", "sb-nobody"], 1, "error: no sandbox sb-nobody\n"),
        (
            ["image", "import", "/nonexistent.tar", "x"],
            1,
            "error: /nonexistent.tar: No such file or directory\n",
        ),
        (["shell"], 1, "error: stdin is no terminal\n"),
    ],
)
def test_an_error_is_one_line_and_a_hint(
    node: FakeNode, argv: list[str], code: int, said: str
) -> None:
    done = shoal(*argv)
    assert done.returncode == code
    assert done.stderr.decode().startswith(said)
    assert done.stdout == b""


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "--memory", "0", "--", "true"],
        ["run", "--memory", "lots", "--", "true"],
        ["run", "--cpu", "0", "--", "true"],
        ["run", "--timeout", "-1", "--", "true"],
        ["run", "--nonsense", "--", "true"],
        ["run", "-e", "=x", "--", "true"],
        ["run", "--network", "open", "--", "true"],
        ["run", "--json", "-t", "--", "true"],
        ["exec", "--json", "-t", "sb-x", "true"],
        ["nonsense"],
        ["image", "import", "-"],
    ],
)
def test_a_usage_error_exits_with_2(argv: list[str]) -> None:
    done = CliRunner().invoke(cli, argv)
    assert done.exit_code == 2
    assert "Error: " in done.output


def test_no_node_is_an_error_with_a_hint() -> None:
    done = shoal("ps", env={"SHOAL_URL": "unix:///nonexistent/shoal.sock"})
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: no node answers at unix:///nonexistent/shoal.sock")
    assert b"\nhint: " in done.stderr


def test_streams_that_the_parent_closed_are_no_error(node: FakeNode) -> None:
    for closed in ("<&-", ">&-", "<&- >&- 2>&-"):
        program = f"exec {shlex.quote(sys.executable)} -m shoal run -- sh -c 'cat; echo x' {closed}"
        done = subprocess.run(
            ["/bin/sh", "-c", program],
            check=False,
            env=environment(),
            capture_output=True,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, b""), closed
        assert done.stdout == (b"" if ">" in closed else b"x\n")


@pytest.mark.parametrize("code", [130, 143])
def test_run_json_can_be_stopped_while_it_waits_for_stdin(node: FakeNode, code: int) -> None:
    argv = [sys.executable, "-m", "shoal", "run", "--json", "--", "cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment()) as program:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not any(
            sandbox.execs for sandbox in node.sandboxes.values()
        ):
            time.sleep(0.02)
        program.send_signal(code - 128)
        assert program.wait(timeout=10) == code
    assert node.sandboxes
    assert _ended(node)


def test_what_is_not_utf8_is_refused_in_a_line(node: FakeNode) -> None:
    sandbox = shoal("create").stdout.decode().strip()
    for argv in (["run", "--", "\udcff"], ["exec", sandbox, "\udcff"], ["inspect", "\udcff"]):
        done = shoal(*argv)
        assert done.returncode == 1
        assert done.stderr == b"error: not UTF-8: '\\udcff'\n", argv
    copied = shoal("cp", __file__, f"{sandbox}:/x\udcff")
    assert (copied.returncode, copied.stderr[:17]) == (1, b"error: not UTF-8:")
    assert not (node.sandboxes[sandbox].root / "x").exists()


def test_an_empty_id_is_an_error_and_a_hint_and_nothing_else(node: FakeNode) -> None:
    done = shoal("exec", "", "--", "true")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 2)


def test_a_bad_setting_is_named() -> None:
    done = shoal("serve", env={"SHOAL_IDLE_EXIT": "soon"})
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: SHOAL_IDLE_EXIT: ")
    assert done.stderr.count(b"\n") == 1


def test_every_verb_teaches() -> None:
    for verb in VERBS:
        done = CliRunner().invoke(cli, [verb, "--help"])
        assert done.exit_code == 0, done.output
        assert verb == "doctor" or f"shoal {verb}" in done.output, (
            f"no example in the help of {verb}"
        )


def test_shell_passes_keys_on_and_gives_the_terminal_back(node: FakeNode) -> None:
    sandbox = shoal("create").stdout.decode().strip()
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    argv = [sys.executable, "-m", "shoal", "shell", sandbox]
    with subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), start_new_session=True
    ) as program:
        while not node.sandboxes[sandbox].execs:
            time.sleep(0.02)
        raw = False
        deadline = time.monotonic() + 10
        while not raw and time.monotonic() < deadline:
            raw = not termios.tcgetattr(theirs)[3] & termios.ICANON
            time.sleep(0.02)
        assert raw
        program.send_signal(signal.SIGWINCH)
        os.write(ours, b"echo $((6*7)); exit 9\n")
        assert program.wait(20) == 9
    assert termios.tcgetattr(theirs) == before
    shown = b""
    while select.select([ours], [], [], 0.2)[0]:
        shown += os.read(ours, 65536)
    assert b"42" in shown
    os.close(ours)
    os.close(theirs)
    assert any(request.endswith("/resize") for request in node.requests)


def test_exit_codes_follow_the_shells() -> None:
    def code(outcome: Outcome, **more: object) -> int:
        return exit_code(ExecExit(outcome=outcome, **more), "x")[0]  # type: ignore[arg-type]

    assert code(Outcome.EXITED, exit_code=0) == 0
    assert code(Outcome.OOM_KILLED, signal=9) == 137
    assert code(Outcome.KILLED, signal=2) == 130
    assert code(Outcome.NOT_STARTED, errno=2, stage="cwd") == 126
    assert code(Outcome.NOT_STARTED, errno=2, stage="exec") == 127


def test_sizes_and_spans_read_as_people_write_them() -> None:
    size = Mebibytes()
    told = [size.convert(text, None, None) for text in ("512", "512m", "2G", "1.5g", "1t", "3GiB")]
    assert told == [512, 512, 2048, 1536, 1 << 20, 3072]
    assert [span(seconds) for seconds in (0, 59, 61, 3600, 90_061)] == [
        "0s",
        "59s",
        "1m1s",
        "1h",
        "1d1h",
    ]
