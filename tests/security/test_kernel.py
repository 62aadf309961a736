"""KS: the parts of the kernel that break out of sandboxes are not on offer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.security.conftest import Judge

if TYPE_CHECKING:
    import shoal


def test_ks_01_io_uring_is_off(judge: Judge) -> None:
    judge("KS-01")


def test_ks_02_bpf_perf_and_userfaultfd_are_off(judge: Judge) -> None:
    judge("KS-02")


def test_ks_03_namespaces_cannot_be_made_or_joined(judge: Judge) -> None:
    judge("KS-03")


def test_ks_04_the_new_mount_calls_are_off(judge: Judge) -> None:
    judge("KS-04")


def test_ks_05_keyrings_are_off(judge: Judge) -> None:
    judge("KS-05")


def test_ks_06_machine_wide_calls_are_off(judge: Judge) -> None:
    judge("KS-06")


def test_ks_07_no_clock_can_be_set(judge: Judge) -> None:
    judge("KS-07")


def test_ks_09_four_socket_families_exist(judge: Judge) -> None:
    judge("KS-09")


def test_ks_10_netlink_is_route_only(judge: Judge) -> None:
    judge("KS-10")


def test_ks_11_raw_and_packet_sockets_fail(judge: Judge) -> None:
    judge("KS-11")


def test_ks_12_protocols_with_a_history_fail(judge: Judge) -> None:
    judge("KS-12")


def test_ks_13_requeueing_to_pi_futexes_fails(judge: Judge) -> None:
    judge("KS-13")


def test_ks_14_foreign_entries_into_the_kernel_are_shut(judge: Judge) -> None:
    judge("KS-14")


def test_ks_15_unknown_numbers_do_not_exist(judge: Judge) -> None:
    judge("KS-15")


def test_ks_16_the_kernels_log_and_addresses_are_hidden(judge: Judge) -> None:
    judge("KS-16")


def test_ks_17_no_foreign_ipc_object_is_visible(judge: Judge) -> None:
    judge("KS-17")


def test_ks_18_page_zero_and_old_personalities_are_refused(judge: Judge) -> None:
    judge("KS-18")


def test_ks_09_ordinary_programs_do_not_notice(walled: shoal.Sandbox) -> None:
    program = """
import asyncio, multiprocessing, os, pty, select, signal, socket, subprocess, threading, tempfile
a, b = socket.socketpair()
os.memfd_create("x"); os.eventfd(0); select.epoll(); os.pidfd_open(os.getpid())
pty.openpty(); signal.set_wakeup_fd(-1); os.sched_getaffinity(0); os.getrandom(8)
os.mkfifo(tempfile.mktemp()); os.posix_spawn("/bin/true", ["true"], {}); os.wait()
t = threading.Thread(target=print, args=("thread",)); t.start(); t.join()
asyncio.run(asyncio.sleep(0)); subprocess.run(["true"], check=True)
"""
    assert walled.run(["python3", "-c", program], check=True).stdout == "thread\n"
