"""FS: nothing of the host's file system is visible, writable or reachable."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.security.conftest import Judge
from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal


def test_fs_01_a_command_starts_with_three_descriptors(judge: Judge) -> None:
    judge("FS-01")


def test_fs_02_everything_lies_in_the_root(judge: Judge) -> None:
    judge("FS-02")


def test_fs_03_kernel_settings_cannot_be_written(judge: Judge) -> None:
    judge("FS-03")


def test_fs_04_masked_paths_give_no_byte(judge: Judge) -> None:
    judge("FS-04")


def test_fs_05_helpers_of_the_kernel_cannot_be_named(judge: Judge) -> None:
    judge("FS-05")


def test_fs_06_sys_is_absent_or_read_only(judge: Judge) -> None:
    judge("FS-06")


def test_fs_07_dev_has_the_harmless_devices_only(judge: Judge) -> None:
    judge("FS-07")


def test_fs_08_devices_cannot_be_made(judge: Judge) -> None:
    judge("FS-08")


def test_fs_10_nothing_can_be_mounted(judge: Judge) -> None:
    judge("FS-10")


def test_fs_11_no_foreign_socket_or_path_is_reachable(judge: Judge) -> None:
    judge("FS-11")


def test_fs_12_nothing_tells_of_the_host(judge: Judge) -> None:
    judge("FS-12")


def test_fs_01_the_guest_agent_holds_no_directory_and_no_disk(
    walled: shoal.Sandbox, node: PrivateNode
) -> None:
    for pid in node.sandbox_pids(walled.id):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            kind = entry.stat().st_mode
            assert not stat.S_ISDIR(kind), os.readlink(entry)
            assert not stat.S_ISBLK(kind), os.readlink(entry)


@pytest.mark.parametrize("space", ["mnt", "net", "pid", "ipc", "uts", "cgroup", "user", "time"])
def test_fs_02_pr_01_net_01_ks_17_every_namespace_is_the_sandboxes_own(
    space: str, walled: shoal.Sandbox, sandbox: shoal.Sandbox, node: PrivateNode
) -> None:
    def spaces(pids: list[int]) -> set[str]:
        return {os.readlink(f"/proc/{pid}/ns/{space}") for pid in pids}

    assert node.sandbox_pids(walled.id)
    own = spaces(node.sandbox_pids(walled.id))
    assert len(own) == 1
    assert not own & spaces([os.getpid(), *node.daemons()])
    assert not own & spaces(node.sandbox_pids(sandbox.id))


def test_fs_09_a_set_id_file_changes_no_id(judge: Judge, walled: shoal.Sandbox) -> None:
    program = "/opt/set-id-python"
    walled.run(
        f"cp $(readlink -f /usr/bin/python3) {program} && chown 7:8 {program} && chmod 6755 {program}",
        user="0",
        check=True,
    )
    assert walled.files.stat(program).mode & 0o6000
    judge("FS-09", set_id_program=program)


def test_fs_10_no_mount_is_shared_with_the_host(walled: shoal.Sandbox, node: PrivateNode) -> None:
    for pid in node.sandbox_pids(walled.id):
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        assert lines
        assert not [line for line in lines if "shared:" in line.partition(" - ")[0]]


def test_fs_13_what_one_sandbox_does_to_a_base_file_another_never_sees(
    sandbox: shoal.Sandbox, walled: shoal.Sandbox
) -> None:
    import shoal

    digest = "sha256sum /usr/bin/env /etc/passwd /usr/lib/os-release /bin/sh /usr/bin/python3.11"
    before = walled.run(digest, check=True).stdout
    assert sandbox.run(digest, check=True).stdout == before
    in_place = """
import mmap, os
handle = os.open("/usr/bin/python3.11", os.O_RDWR)
page = mmap.mmap(handle, 4096)
page[16:20] = b"EVIL"
page.flush()
"""
    # By a copy: no program can open for writing what it runs from.
    sandbox.run("cp /usr/bin/python3.11 /opt/python", check=True)
    sandbox.run(["/opt/python", "-c", in_place], check=True)
    sandbox.run(
        "set -e; printf X | dd of=/usr/bin/env bs=1 conv=notrunc; echo evil::0:0::/:/bin/sh >> /etc/passwd;"
        " chmod 4777 /usr/lib/os-release; truncate -s 0 /usr/lib/os-release; rm /bin/sh",
        check=True,
    )
    assert sandbox.files.read("/usr/bin/python3.11")[16:20] == b"EVIL"
    assert sandbox.files.read("/usr/bin/env")[:4] == b"XELF"
    assert sandbox.files.read("/etc/passwd").endswith(b"evil::0:0::/:/bin/sh\n")
    assert sandbox.files.read("/usr/lib/os-release") == b""
    assert not sandbox.files.exists("/bin/sh")

    assert walled.run(digest, check=True).stdout == before
    assert walled.run(["python3.11", "-c", "print(6*7)"], check=True).stdout == "42\n"
    with shoal.Sandbox.create() as fresh:
        assert fresh.run(digest, check=True).stdout == before
        assert fresh.run(["python3.11", "-c", "print(6*7)"], check=True).stdout == "42\n"
