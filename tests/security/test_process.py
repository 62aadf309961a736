"""PR: processes see nobody else, hold nothing, and cannot touch the guest agent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.security.conftest import Judge
from tests.support.node import CANARY, PrivateNode

if TYPE_CHECKING:
    import shoal


def test_pr_01_only_own_processes_exist(judge: Judge) -> None:
    judge("PR-01")


def test_pr_02_the_guest_agent_cannot_be_touched(judge: Judge) -> None:
    judge("PR-02")


def test_pr_03_no_new_privileges_on_every_thread(judge: Judge) -> None:
    judge("PR-03")


def test_pr_04_capabilities_are_few(judge: Judge) -> None:
    judge("PR-04")


def test_pr_05_no_id_maps_to_a_host_user(judge: Judge) -> None:
    judge("PR-05")


def test_pr_06_seccomp_filters_every_thread(judge: Judge) -> None:
    judge("PR-06")


def test_pr_07_the_guest_agents_program_is_out_of_reach(judge: Judge) -> None:
    judge("PR-07")


def test_pr_08_no_keystroke_can_be_pushed_into_a_terminal(judge: Judge) -> None:
    judge("PR-08")


def test_pr_10_orphans_are_reaped(judge: Judge) -> None:
    judge("PR-10")


ALLOWED = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31))


def _tasks(pids: list[int]) -> list[dict[str, str]]:
    found = []
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            pairs = (line.partition(":") for line in lines)
            found.append({key: value.strip() for key, _, value in pairs})
    assert found
    return found


@pytest.fixture
def busy(sandbox: shoal.Sandbox) -> shoal.Sandbox:
    """A sandbox in which root and an ordinary user have processes with threads."""
    program = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()"
    for user in ("0", "1000"):
        process = sandbox.exec(["python3", "-c", program + "; print('up', flush=True)"], user=user)
        assert process.stdout.readline() == b"up\n"
    return sandbox


def test_pr_01_another_sandboxes_processes_are_out_of_reach(
    busy: shoal.Sandbox, walled: shoal.Sandbox, node: PrivateNode, judge: Judge
) -> None:
    judge("PR-01", foreign_pids=node.sandbox_pids(busy.id))


def test_pr_03_pr_06_every_thread_is_filtered_and_gains_nothing(
    busy: shoal.Sandbox, node: PrivateNode
) -> None:
    tasks = _tasks(node.sandbox_pids(busy.id))
    assert len(tasks) >= 5
    for task in tasks:
        assert task["NoNewPrivs"] == "1", task["Name"]
        assert task["Seccomp"] == "2", task["Name"]


def test_pr_04_capabilities_seen_from_the_host_are_few(
    busy: shoal.Sandbox, node: PrivateNode
) -> None:
    pids = node.sandbox_pids(busy.id)
    base = int(Path(f"/proc/{pids[0]}/uid_map").read_text().split()[1])
    users = set()
    for task in _tasks(pids):
        user = int(task["Uid"].split()[0]) - base
        users.add(user)
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            held = int(task[kind], 16)
            assert not held & ~ALLOWED, f"{task['Name']} {kind} {held:#x}"
            if user == 1000 and kind != "CapBnd":
                assert not held, f"{task['Name']} {kind} {held:#x}"
    assert {0, 1000} <= users


def test_pr_05_two_sandboxes_share_no_host_id(
    walled: shoal.Sandbox, sandbox: shoal.Sandbox, node: PrivateNode
) -> None:
    for name in ("uid_map", "gid_map"):
        ranges = []
        for one in (walled, sandbox):
            for pid in node.sandbox_pids(one.id):
                lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
                ranges.append((one.id, [tuple(map(int, line.split())) for line in lines]))
        spans = {
            (owner, start, start + length) for owner, rows in ranges for _, start, length in rows
        }
        assert len({owner for owner, _, _ in spans}) == 2
        for owner, start, end in spans:
            assert start >= 1000
            clashes = [
                other for other, low, high in spans if other != owner and low < end and start < high
            ]
            assert not clashes


def test_pr_08_a_terminal_of_its_own_cannot_be_fed(walled: shoal.Sandbox) -> None:
    process = walled.exec(
        ["sh", "-c", "echo '{\"on_a_pty\": true}' | python3 -B -m probes PR-08"],
        cwd="/opt",
        pty=True,
    )
    output = process.stdout.read_text()
    assert process.wait(timeout=60) == 0, output
    assert '"violations": []' in output


def test_pr_09_no_secret_of_the_platform_is_visible(
    judge: Judge, walled: shoal.Sandbox, node: PrivateNode
) -> None:
    secret = (node.data_dir / "secret").read_bytes()
    words = [CANARY, node.token(walled.id)]
    judge("PR-09", secrets=words, secrets_hex=[secret.hex()])
    environment = walled.run("env; cat /proc/1/environ 2>/dev/null; true", check=True).stdout
    assert CANARY not in environment
    names = set(re.findall(r"^([A-Za-z_]+)=", environment, re.MULTILINE))
    assert names <= {
        *(
            "PATH",
            "HOME",
            "USER",
            "LOGNAME",
            "SHELL",
            "LANG",
            "TERM",
            "PWD",
            "SHLVL",
            "OLDPWD",
            "_",
        ),
        *("HOSTNAME", "LC_ALL"),
    }
