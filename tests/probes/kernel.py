"""KS: the parts of the kernel that break out of sandboxes are not on offer."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import struct

from .lib import (
    DENIED,
    NOT_WRITABLE,
    Report,
    describe,
    in_child,
    killed_by,
    machine_code,
    probe,
    read,
    syscall,
    try_open,
)

UNKNOWN_OR_DENIED = frozenset({errno.EPERM, errno.ENOSYS})

NAMESPACES = {
    "CLONE_NEWTIME": 0x80,
    "CLONE_NEWNS": 0x20000,
    "CLONE_NEWCGROUP": 0x2000000,
    "CLONE_NEWUTS": 0x4000000,
    "CLONE_NEWIPC": 0x8000000,
    "CLONE_NEWUSER": 0x10000000,
    "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
}
SIGCHLD = int(signal.SIGCHLD)


@probe("KS-01")
def io_uring_is_off(report: Report) -> None:
    parameters = ctypes.create_string_buffer(120)
    report.refused("io_uring_setup", syscall(425, 1, parameters), UNKNOWN_OR_DENIED)
    report.refused("io_uring_enter", syscall(426, 0, 0, 0, 0, 0, 0), UNKNOWN_OR_DENIED)
    report.refused("io_uring_register", syscall(427, 0, 0, 0, 0), UNKNOWN_OR_DENIED)


@probe("KS-02")
def bpf_perf_and_userfaultfd_are_off(report: Report) -> None:
    report.refused("bpf", syscall(321, 9999, 0, 0), UNKNOWN_OR_DENIED)
    attributes = ctypes.create_string_buffer(bytes(112), 112)
    report.refused("bpf MAP_CREATE", syscall(321, 0, attributes, 72), UNKNOWN_OR_DENIED)
    # A software counter on oneself, the least that can be asked for.
    struct.pack_into("=II", attributes, 0, 1, 112)
    report.refused("perf_event_open", syscall(298, attributes, 0, -1, -1, 0), UNKNOWN_OR_DENIED)
    report.refused(
        "perf_event_open of nothing", syscall(298, None, 0, -1, -1, 0), UNKNOWN_OR_DENIED
    )
    for flags in (0, 1):
        report.refused(f"userfaultfd({flags})", syscall(323, flags), UNKNOWN_OR_DENIED)
    result = try_open("/dev/userfaultfd", os.O_RDWR)
    report.refused("open of /dev/userfaultfd", result, NOT_WRITABLE)


def _clone(flags: int) -> int:
    result = syscall(56, flags | SIGCHLD, 0, 0, 0, 0)
    if result == 0:
        os._exit(0)
    if result > 0:
        os.waitpid(result, 0)
    return result


@probe("KS-03")
def namespaces_cannot_be_made_or_joined(report: Report) -> None:
    refused = frozenset({errno.EPERM})
    for name, flag in NAMESPACES.items():
        result = in_child(lambda flag=flag: syscall(272, flag))  # type: ignore[misc]
        report.refused(f"unshare({name})", result, refused)
        if name != "CLONE_NEWTIME":  # there, the bit is a part of the exit signal
            result = in_child(lambda flag=flag: _clone(flag))  # type: ignore[misc]
            report.refused(f"clone({name})", result, refused)
    every = sum(NAMESPACES.values()) & ~0x80
    report.refused("unshare of everything", in_child(lambda: syscall(272, every)), refused)
    # The upper half of the register is not part of the argument, and hides nothing.
    result = in_child(lambda: syscall(272, 1 << 32 | 0x10000000))
    report.refused("unshare with high bits", result, frozenset({errno.EPERM, errno.EINVAL}))
    result = in_child(lambda: _clone(1 << 32 | 0x10000000))
    report.refused("clone with high bits", result, frozenset({errno.EPERM, errno.EINVAL}))
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, SIGCHLD)

    def clone3(flags: int) -> int:
        arguments[0] = flags
        result = syscall(435, arguments, 88)
        if result == 0:
            os._exit(0)
        if result > 0:
            os.waitpid(result, 0)
        return result

    for flags in (0, 0x10000000, 0x20000):
        result = in_child(lambda flags=flags: clone3(flags))  # type: ignore[misc]
        report.refused(f"clone3({flags:#x})", result, frozenset({errno.ENOSYS}))
    for kind in ("mnt", "net", "pid", "user", "ipc", "uts", "cgroup"):
        for who in ("self", "1"):
            try:
                handle = os.open(f"/proc/{who}/ns/{kind}", os.O_RDONLY)
            except OSError as error:
                report.expect(error.errno in {*DENIED, errno.ENOENT}, f"ns/{kind}: {error}")
                continue
            result = in_child(lambda handle=handle: syscall(308, handle, 0))  # type: ignore[misc]
            report.refused(f"setns to {kind} of {who}", result, refused)
            os.close(handle)


@probe("KS-04")
def the_new_mount_calls_are_off(report: Report) -> None:
    path = ctypes.create_string_buffer(b"/tmp")
    attributes = (ctypes.c_uint64 * 4)()
    calls: dict[str, int] = {
        "fsopen": syscall(430, b"tmpfs", 0),
        "fsconfig": syscall(431, 0, 6, None, None, 0),
        "fsmount": syscall(432, 0, 0, 0),
        "fspick": syscall(433, -100, path, 0),
        "open_tree": syscall(428, -100, path, 1),
        "move_mount": syscall(429, -100, path, -100, path, 0),
        "mount_setattr": syscall(442, -100, path, 0, attributes, 32),
        "open_tree_attr": syscall(467, -100, path, 1, attributes, 32),
        "pivot_root": syscall(155, b".", b"."),
    }
    for name, result in calls.items():
        report.refused(name, result, UNKNOWN_OR_DENIED)


@probe("KS-05")
def keyrings_are_off(report: Report) -> None:
    report.refused("add_key", syscall(248, b"user", b"probe", b"x", 1, -2), DENIED)
    report.refused("request_key", syscall(249, b"user", b"probe", None, 0), DENIED)
    for operation in (0, 1, 6, 11):
        report.refused(f"keyctl({operation})", syscall(250, operation, -3, 1, 0, 0), DENIED)


@probe("KS-06")
def machine_wide_calls_are_off(report: Report) -> None:
    nowhere = ctypes.create_string_buffer(b"/nowhere-at-all")
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 8, 1) + bytes(8))
    calls: dict[str, int] = {
        "init_module": syscall(175, None, 0, b""),
        "finit_module": syscall(313, -1, b"", 0),
        "delete_module": syscall(176, b"no_such_module", 0o4000),
        "kexec_load": syscall(246, 0, 0, None, 0xFFFF),
        "kexec_file_load": syscall(320, -1, -1, 0, b"", 0xFFFF),
        "reboot": syscall(169, 0, 0, 0, 0),
        "swapon": syscall(167, nowhere, 0),
        "swapoff": syscall(168, nowhere),
        "acct": syscall(163, nowhere),
        "ioperm": syscall(173, 0x80, 1, 1),
        "iopl": syscall(172, 3),
        "open_by_handle_at": syscall(304, -100, handle, 0),
        "quotactl": syscall(179, 0xFFFFFF00, nowhere, 0, 0),
        "lookup_dcookie": syscall(212, 0, handle, 1),
        "vhangup": syscall(153) if report.facts.get("bold", True) else -errno.EPERM,
        "sethostname": syscall(170, b"probe", 5) if report.facts.get("bold", True) else -1,
    }
    for name, result in calls.items():
        report.refused(name, result, UNKNOWN_OR_DENIED)


@probe("KS-07")
def no_clock_can_be_set(report: Report) -> None:
    now = (ctypes.c_int64 * 2)()
    if syscall(228, 0, now) < 0:
        report.expect(False, "clock_gettime fails")
    micro = (ctypes.c_int64 * 2)(now[0], now[1] // 1000)
    zone = (ctypes.c_int32 * 2)(0, 0)
    timex = ctypes.create_string_buffer(bytes(208), 208)
    struct.pack_into("=I", timex, 0, 0x0001)  # ADJ_OFFSET of 0
    refused = frozenset({errno.EPERM})
    report.refused("clock_settime", syscall(227, 0, now), refused)
    report.refused("settimeofday", syscall(164, micro, None), refused)
    report.refused("settimeofday of the zone", syscall(164, None, zone), refused)
    report.refused("adjtimex", syscall(159, timex), refused)
    report.refused("clock_adjtime", syscall(305, 0, timex), refused)


def _socket(family: int, kind: int, protocol: int = 0) -> int:
    result = syscall(41, family, kind, protocol)
    if result >= 0:
        os.close(result)
    return result


@probe("KS-09")
def four_socket_families_exist(report: Report) -> None:
    allowed = {socket.AF_UNIX: "UNIX", socket.AF_INET: "INET", socket.AF_INET6: "INET6"}
    for family, name in allowed.items():
        result = _socket(family, socket.SOCK_DGRAM)
        report.expect(result >= 0, f"AF_{name} gave {describe(result)}")
    refused = frozenset({errno.EAFNOSUPPORT})
    for family in [*range(64), 255, 1 << 16]:
        if family in {*allowed, socket.AF_NETLINK}:
            continue
        for kind in (1, 2, 3, 4, 5, 10):
            result = _socket(family, kind)
            report.refused(f"socket({family}, {kind})", result, refused)
        pair = (ctypes.c_int * 2)()
        result = syscall(53, family, 1, 0, pair)
        report.refused(f"socketpair({family})", result, frozenset({*refused, *DENIED, 95}))
    result = _socket(1 << 32 | 40, 1)
    report.refused("socket with high bits in the family", result, frozenset({*refused, *DENIED}))


@probe("KS-10")
def netlink_is_route_only(report: Report) -> None:
    allowed = frozenset({*DENIED, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL})
    for name, protocol in (
        ("SOCK_DIAG", 4),
        ("XFRM", 6),
        ("ISCSI", 8),
        ("AUDIT", 9),
        ("CONNECTOR", 11),
        ("NETFILTER", 12),
        ("KOBJECT_UEVENT", 15),
        ("GENERIC", 16),
        ("SCSITRANSPORT", 18),
        ("RDMA", 20),
        ("CRYPTO", 21),
    ):
        for kind in (2, 3, 2 | 0x80000, 3 | 0x800):
            result = _socket(16, kind, protocol)
            report.refused(f"NETLINK_{name} of type {kind:#x}", result, allowed)
    result = _socket(16, 3)
    report.expect(result >= 0, f"NETLINK_ROUTE gave {describe(result)}")


@probe("KS-11")
def raw_and_packet_sockets_fail(report: Report) -> None:
    allowed = frozenset({*DENIED, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, 94})
    for family in (2, 10):
        for protocol in (0, 1, 6, 17, 58, 255):
            for flags in (0, 0x80000, 0x800):
                result = _socket(family, 3 | flags, protocol)
                if protocol == 0 and result == -errno.EPROTONOSUPPORT:
                    continue
                report.refused(f"socket({family}, RAW|{flags:#x}, {protocol})", result, allowed)
    for family in (2, 17):
        for kind in (2, 3, 10):
            if (family, kind) != (2, 2):
                result = _socket(family, kind, 0x0300)
                report.refused(f"socket({family}, {kind}, ETH_P_ALL)", result, allowed)
    result = _socket(2, 1 << 32 | 3, 255)
    report.refused("raw socket with high bits in the type", result, allowed)


@probe("KS-12")
def protocols_with_a_history_fail(report: Report) -> None:
    denied = frozenset({*DENIED, errno.ENOPROTOOPT, errno.EOPNOTSUPP})
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=3) as client,
    ):
        for ulp in (b"tls", b"espintcp", b"mptcp", b"nosuch"):
            text = ctypes.create_string_buffer(ulp)
            result = syscall(54, client.fileno(), 6, 31, text, len(ulp))
            report.refused(f"TCP_ULP {ulp.decode()}", result, denied)
        text = ctypes.create_string_buffer(b"tls")
        high = syscall(54, client.fileno(), 6, 1 << 32 | 31, text, 3)
        report.refused("TCP_ULP with high bits", high, denied)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for kind in (1, 2, 3):
            value = (ctypes.c_int * 1)(kind)
            result = syscall(54, client.fileno(), 17, 100, value, 4)
            report.refused(f"UDP_ENCAP {kind}", result, denied)
    for name, family, kind, protocol in (
        ("SCTP", 2, 1, 132),
        ("SCTP one to many", 2, 5, 132),
        ("SCTP over IPv6", 10, 1, 132),
        ("DCCP", 2, 6, 33),
        ("DCCP over IPv6", 10, 6, 33),
        ("UDPLITE", 2, 2, 136),
        ("UDPLITE over IPv6", 10, 2, 136),
        ("MPTCP", 2, 1, 262),
        ("MPTCP over IPv6", 10, 1, 262),
        ("L2TP", 2, 2, 115),
        ("SMC", 43, 1, 0),
        ("SMC as a protocol", 2, 1, 256),
    ):
        result = _socket(family, kind, protocol)
        report.expect(result < 0, f"a socket of {name} is granted")


@probe("KS-13")
def requeueing_to_pi_futexes_fails(report: Report) -> None:
    word = (ctypes.c_uint32 * 2)()
    second = ctypes.addressof(word) + 4
    for name, operation in (("WAIT_REQUEUE_PI", 11), ("CMP_REQUEUE_PI", 12)):
        for flags in (0, 128, 256, 384):
            result = syscall(202, word, operation | flags, 1, 0, second, 0)
            report.refused(f"FUTEX_{name}|{flags}", result, UNKNOWN_OR_DENIED)
    high = syscall(202, word, 1 << 32 | 12, 1, 0, second, 0)
    report.refused("FUTEX_CMP_REQUEUE_PI with high bits", high, UNKNOWN_OR_DENIED)
    report.refused("futex_requeue", syscall(456, None, 0, 1, 1), UNKNOWN_OR_DENIED)


@probe("KS-14")
def foreign_entries_into_the_kernel_are_shut(report: Report) -> None:
    def legacy(number: int) -> int:
        # mov eax, number; int 0x80; movsxd rax, eax; ret
        code = b"\xb8" + struct.pack("<I", number) + b"\xcd\x80\x48\x63\xc0\xc3"
        return machine_code(code)

    # rax = rdi; syscall; ret
    def x32(number: int) -> int:
        return machine_code(b"\x48\x89\xf8\x0f\x05\xc3", number)

    harmless = in_child(lambda: x32(39))
    report.expect(harmless > 0, f"machine code cannot be run to judge with: {describe(harmless)}")
    for what, call in (("int 0x80", legacy), ("x32", lambda number: x32(0x40000000 | number))):
        for number in (20, 39, 5, 102, 0):
            result = in_child(lambda number=number, call=call: call(number))  # type: ignore[misc]
            killed = killed_by(result)
            fine = killed in {signal.SIGSYS, signal.SIGSEGV, signal.SIGKILL}
            report.expect(fine or result == -errno.ENOSYS, f"{what} {number}: {describe(result)}")


@probe("KS-15")
def unknown_numbers_do_not_exist(report: Report) -> None:
    for number in (340, 400, 423, 480, 511, 547, 600, 1023, 4095, 99_999, 0x3FFFFFFF):
        result = in_child(lambda number=number: syscall(number, 0, 0, 0, 0, 0, 0))  # type: ignore[misc]
        report.refused(f"system call {number}", result, frozenset({errno.ENOSYS}))


@probe("KS-16")
def the_kernels_log_and_addresses_are_hidden(report: Report) -> None:
    buffer = ctypes.create_string_buffer(4096)
    for action in (2, 3, 9, 10):
        size = len(buffer) if action in {2, 3} else 0
        if action == 2:
            continue  # it would wait
        report.refused(f"syslog({action})", syscall(103, action, buffer, size), UNKNOWN_OR_DENIED)
    report.refused("open of /dev/kmsg", try_open("/dev/kmsg", os.O_RDONLY), NOT_WRITABLE)
    for path in ("/proc/kmsg", "/proc/kcore"):
        report.expect(not read(path, 64), f"{path} can be read")
    for path in ("/proc/kallsyms", "/proc/modules"):
        text = (read(path, 65536) or b"").decode("utf-8", "replace")
        for line in text.splitlines()[:400]:
            fields = line.split()
            address = fields[0] if path.endswith("kallsyms") else fields[-1]
            hidden = address.removeprefix("0x").strip("0") == "" or not address.startswith("0x")
            if path.endswith("kallsyms"):
                hidden = address.strip("0") == ""
            report.expect(hidden, f"{path} tells {line}")


@probe("KS-17")
def no_foreign_ipc_object_is_visible(report: Report) -> None:
    for name in ("shm", "sem", "msg"):
        lines = (read(f"/proc/sysvipc/{name}") or b"\n").decode().splitlines()[1:]
        report.expect(not lines, f"/proc/sysvipc/{name}: {lines[:2]}")
    for key in report.facts.get("shm_keys", []):
        result = syscall(29, key, 0, 0)
        report.refused(f"shmget({key})", result, frozenset({*DENIED, errno.ENOENT}))
    for name in report.facts.get("queues", []):
        result = syscall(240, name.encode(), 0, 0, None)
        report.refused(f"mq_open({name})", result, frozenset({*DENIED, errno.ENOENT}))
    for name in report.facts.get("abstract_sockets", []):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            result = -client.connect_ex("\0" + name)
        report.refused(f"connect to @{name}", result, frozenset({errno.ECONNREFUSED}))
    for name in report.facts.get("shared_files", []):
        report.expect(not os.path.exists(name), f"{name} is visible")


@probe("KS-18")
def page_zero_and_old_personalities_are_refused(report: Report) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    result = in_child(lambda: syscall(9, 0, 4096, 3, flags, -1, 0))
    report.refused("mmap of page 0", result, frozenset({errno.EPERM, errno.EACCES}))
    for name, value in (("READ_IMPLIES_EXEC", 0x0400000), ("MMAP_PAGE_ZERO", 0x0100000)):
        result = in_child(lambda value=value: syscall(135, value))  # type: ignore[misc]
        report.refused(f"personality({name})", result, frozenset({*DENIED, errno.EINVAL}))
