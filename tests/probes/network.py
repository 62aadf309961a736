"""NET: with no network declared, there is none."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time

from .lib import DENIED, Report, probe, read, syscall

UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL})

PUBLIC = ("1.1.1.1", "8.8.8.8", "192.0.2.1", "224.0.0.1", "239.255.255.250", "255.255.255.255")
PUBLIC_6 = ("2001:4860:4860::8888", "2606:4700:4700::1111", "ff02::1", "ff0e::1")
METADATA = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192")
METADATA_6 = ("fd00:ec2::254", "fd20:ce::254", "fe80::a9fe:a9fe")
PRIVATE = (
    *("10.0.0.1", "172.16.0.1", "172.17.0.1", "192.168.0.1", "192.168.122.1"),
    *("100.64.0.1", "169.254.1.1", "198.18.0.1", "240.0.0.1"),
)
PRIVATE_6 = ("fd00::1", "fc00::1", "fe80::1", "64:ff9b::a00:1", "::ffff:10.0.0.1", "2002:a00:1::1")


def _attempt(address: str, kind: int, port: int) -> tuple[int, float]:
    """Try to reach `address`: minus errno, or what was sent; and the seconds that it took."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    start = time.monotonic()
    try:
        with socket.socket(family, kind) as client:
            client.settimeout(3)
            if kind == socket.SOCK_DGRAM:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                result = client.sendto(b"probe", (address, port))
            else:
                client.connect((address, port))
                result = 0
    except TimeoutError:
        result = -errno.ETIMEDOUT
    except OSError as error:
        result = -(error.errno or errno.EIO)
    return result, time.monotonic() - start


def _unreachable(report: Report, addresses: tuple[str, ...], ports: tuple[int, ...]) -> None:
    for address in addresses:
        for kind, word in ((socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")):
            for port in ports:
                result, seconds = _attempt(address, kind, port)
                allowed = UNREACHABLE
                if address.startswith(("ff02:", "fe80:")):
                    allowed = frozenset({*UNREACHABLE, errno.EINVAL})  # link-local needs a scope
                report.refused(f"{word} to {address}:{port}", result, allowed)
                report.expect(seconds < 0.5, f"{word} to {address}:{port} took {seconds:.1f} s")


@probe("NET-01")
def there_is_only_loopback(report: Report) -> None:
    lines = (read("/proc/net/dev") or b"").decode().splitlines()[2:]
    names = [line.split(":")[0].strip() for line in lines]
    report.expect(names == ["lo"], f"interfaces are {names}")
    report.expect([name for _, name in socket.if_nameindex()] == ["lo"], "if_nameindex differs")
    routes = (read("/proc/net/route") or b"").decode().splitlines()[1:]
    report.expect(not routes, f"routes: {routes[:2]}")
    for line in (read("/proc/net/ipv6_route") or b"").decode().splitlines():
        report.expect(line.split()[-1] == "lo", f"route: {line}")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=3),
    ):
        report.expect(True, "")


@probe("NET-02")
def no_destination_is_reachable(report: Report) -> None:
    _unreachable(report, PUBLIC, (53, 80, 443))
    _unreachable(report, PUBLIC_6, (53, 443))


@probe("NET-03")
def metadata_is_unreachable(report: Report) -> None:
    _unreachable(report, METADATA, (80, 443))
    _unreachable(report, METADATA_6, (80,))
    for name in ("metadata.google.internal", "metadata", "instance-data"):
        try:
            found = socket.getaddrinfo(name, 80)
        except OSError:
            report.expect(True, "")
        else:
            report.expect(False, f"{name} resolves to {found[0][4]}")


@probe("NET-04")
def neither_host_nor_private_networks(report: Report) -> None:
    _unreachable(report, PRIVATE, (22, 80))
    _unreachable(report, PRIVATE_6, (80,))
    for address in report.facts.get("host_addresses", []):
        _unreachable(report, (address,), tuple(report.facts.get("host_ports", [22])))
    for port in report.facts.get("host_ports", []):
        for address in ("127.0.0.1", "::1"):
            result, _ = _attempt(address, socket.SOCK_STREAM, port)
            refused = frozenset({errno.ECONNREFUSED, *UNREACHABLE})
            report.refused(f"tcp to the host's {address}:{port}", result, refused)


@probe("NET-05")
def no_name_is_answered(report: Report) -> None:
    for name in ("example.com", "deb.debian.org", "localhost.example.com"):
        start = time.monotonic()
        try:
            found = socket.getaddrinfo(name, 443)
        except OSError:
            report.expect(True, "")
        else:
            report.expect(False, f"{name} resolves to {found[0][4]}")
        seconds = time.monotonic() - start
        report.expect(seconds < 5, f"asking for {name} took {seconds:.1f} s")
    query = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\7example\3com\0\0\1\0\1"
    resolvers = ["127.0.0.53", "127.0.0.1", "8.8.8.8", "1.1.1.1"]
    lines = (read("/etc/resolv.conf") or b"").decode().splitlines()
    resolvers += [line.split()[1] for line in lines if line.startswith("nameserver")]
    for resolver in resolvers:
        family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(0.5)
            try:
                client.connect((resolver, 53))
                client.send(query)
                answer = client.recv(512)
            except OSError:
                report.expect(True, "")
            else:
                report.expect(False, f"{resolver} answered {len(answer)} bytes")


def _netlink(protocol: int, kind: int, flags: int, body: bytes) -> int:
    """Send one request and give the kernel's answer: 0, or minus errno."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as client:
            client.settimeout(2)
            client.bind((0, 0))
            header = struct.pack("=IHHII", 16 + len(body), kind, flags | 1 | 4, 1, 0)
            client.send(header + body)
            answer = client.recv(4096)
    except OSError as error:
        return -(error.errno or errno.ETIMEDOUT)
    _, answer_kind = struct.unpack("=IH", answer[:6])
    return int(struct.unpack("=i", answer[16:20])[0]) if answer_kind == 2 else 0


@probe("NET-06")
def the_network_cannot_be_changed(report: Report) -> None:
    allowed = frozenset({*DENIED, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT})
    create = 0x400 | 0x200  # NLM_F_CREATE | NLM_F_EXCL
    name = b"probe0\0\0"
    attributes = struct.pack("=HH", 12, 3) + name
    kind = struct.pack("=HH", 9, 1) + b"dummy\0\0\0"
    attributes += struct.pack("=HH", 4 + len(kind), 18) + kind
    link = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
    report.refused("making a link", _netlink(0, 16, create, link + attributes), allowed)
    down = struct.pack("=BxHiII", 0, 0, 1, 0, 1)
    if report.facts.get("bold", True):
        report.refused("taking lo down", _netlink(0, 16, 0, down), allowed)
    address = struct.pack("=BBBBI", 2, 32, 0, 0, 1) + struct.pack("=HH4B", 8, 2, 10, 9, 8, 7)
    report.refused("adding an address", _netlink(0, 20, create, address), allowed)
    route = struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 254, 4, 253, 1, 0)
    route += struct.pack("=HH4B", 8, 1, 10, 9, 8, 7) + struct.pack("=HHI", 8, 4, 1)
    report.refused("adding a route", _netlink(0, 24, create, route), allowed)
    report.refused(
        "asking nft", _netlink(12, 0x0A00 | 16, 0, struct.pack("=BBH", 0, 0, 0)), allowed
    )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        for what, level, option in (
            ("IP_TRANSPARENT", socket.IPPROTO_IP, 19),
            ("SO_MARK", socket.SOL_SOCKET, 36),
            ("SO_RCVBUFFORCE", socket.SOL_SOCKET, 33),
        ):
            try:
                client.setsockopt(level, option, 1)
            except OSError as error:
                report.expect(error.errno in {errno.EPERM, errno.ENOPROTOOPT}, f"{what}: {error}")
            else:
                report.expect(False, f"{what} is granted")
        request = struct.pack("=16sH14x", b"lo", 0x49)
        try:
            if report.facts.get("bold", True):
                fcntl.ioctl(client, 0x8914, request)  # SIOCSIFFLAGS
                report.expect(False, "SIOCSIFFLAGS is granted")
        except OSError as error:
            report.expect(error.errno in DENIED, f"SIOCSIFFLAGS: {error}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        result = -client.connect_ex(("192.0.2.7", 9))
        report.refused("connect from a spoofed place", result, UNREACHABLE)
        try:
            client.bind(("192.0.2.8", 0))
        except OSError as error:
            report.expect(error.errno in {errno.EADDRNOTAVAIL, errno.EPERM}, f"bind: {error}")
        else:
            report.expect(False, "a foreign source address can be bound")


@probe("NET-07")
def nothing_listens(report: Report) -> None:
    for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "udplite", "udplite6"):
        lines = (read(f"/proc/net/{name}") or b"\n").decode().splitlines()[1:]
        report.expect(not lines, f"/proc/net/{name}: {lines[:2]}")
    lines = (read("/proc/net/unix") or b"\n").decode().splitlines()[1:]
    listening = [line for line in lines if line.split()[3] == "00010000"]
    report.expect(not listening, f"unix sockets listen: {listening[:2]}")
    for port in (1, 22, 80, 443, 1024, 2375, 5000, 8000, 8080, 9000, 44772, 49983):
        result, _ = _attempt("127.0.0.1", socket.SOCK_STREAM, port)
        report.refused(f"tcp to own port {port}", result, frozenset({errno.ECONNREFUSED}))


@probe("NET-13")
def there_is_no_vsock(report: Report) -> None:
    for kind in (1, 2, 5):
        result = syscall(41, 40, kind, 0)
        report.refused(f"AF_VSOCK of type {kind}", result, frozenset({errno.EAFNOSUPPORT}))
        if result >= 0:
            os.close(result)
    report.expect(not os.path.exists("/dev/vsock"), "/dev/vsock is there")
