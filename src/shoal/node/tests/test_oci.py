from __future__ import annotations

import msgspec
import pytest

from shoal.errors import ImageError
from shoal.node.oci import DEFAULT_PATH, exec_defaults, runtime_spec
from shoal.node.tests.fakes import IMAGE
from shoal.types import SandboxSpec


def test_limits_in_the_terms_of_oci() -> None:
    spec = runtime_spec(
        "sb-" + "a" * 26,
        SandboxSpec(cpu=0.5, memory_mib=64, disk_mib=2, pids=7),
        layers=["c" * 64],
        slot=2,
    )
    resources = spec["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20}
    assert resources["pids"] == {"limit": 7}
    assert resources["cpu"] == {"quota": 50_000, "period": 100_000, "shares": 512}
    assert spec["disk"] == {"limit": 2 << 20}
    assert spec["shm"]["limit"] <= 64 << 20
    assert spec["root"] == {"layers": ["c" * 64]}
    ids = {"containerID": 0, "hostID": 2_147_483_648 + 2 * 65_537, "size": 65_537}
    assert spec["linux"]["uidMappings"] == spec["linux"]["gidMappings"] == [ids]
    assert spec["hostname"] == "sb-aaaaaaaa"
    limits = {one["type"]: (one["soft"], one["hard"]) for one in spec["process"]["rlimits"]}
    assert limits["RLIMIT_CORE"] == (0, 0)
    assert limits["RLIMIT_RTPRIO"] == (0, 0)
    assert {
        "RLIMIT_NOFILE",
        "RLIMIT_MEMLOCK",
        "RLIMIT_MSGQUEUE",
        "RLIMIT_SIGPENDING",
    } <= limits.keys()


def test_a_small_share_of_a_cpu_stays_within_the_kernels_bounds() -> None:
    cpu = runtime_spec("sb-x", SandboxSpec(cpu=0.01), layers=[], slot=0)["linux"]["resources"][
        "cpu"
    ]
    assert cpu["quota"] >= 1000
    assert cpu["shares"] >= 2


def test_the_spec_lies_on_top_of_the_image() -> None:
    process = exec_defaults(SandboxSpec(env={"LANG": "C", "A": "b=c"}), IMAGE)
    assert process.env == [f"PATH={DEFAULT_PATH}", "LANG=C", "A=b=c"]
    assert (process.cwd, process.user) == ("/srv", "app")
    process = exec_defaults(SandboxSpec(user="0", workdir="/w"), IMAGE)
    assert (process.cwd, process.user) == ("/w", "0")


def test_an_image_without_words_gives_root_in_the_root_directory() -> None:
    bare = msgspec.structs.replace(IMAGE, env=["PATH=/bin"], workdir="", user="")
    process = exec_defaults(SandboxSpec(), bare)
    assert (process.env, process.cwd, process.user) == (["PATH=/bin"], "/", "")


@pytest.mark.parametrize("user", ["4294967296", "00", "a\nroot", "a:b:c"])
def test_an_image_with_a_hostile_user_is_refused_unless_the_spec_names_one(user: str) -> None:
    image = msgspec.structs.replace(IMAGE, user=user)
    with pytest.raises(ImageError, match="user"):
        exec_defaults(SandboxSpec(), image)
    assert exec_defaults(SandboxSpec(user="root"), image).user == "root"


def test_an_image_with_a_hostile_working_directory_is_refused() -> None:
    with pytest.raises(ImageError, match="working directory"):
        exec_defaults(SandboxSpec(), msgspec.structs.replace(IMAGE, workdir="a\0b"))
    process = exec_defaults(SandboxSpec(), msgspec.structs.replace(IMAGE, workdir="rel/dir"))
    assert process.cwd == "/rel/dir"
