from __future__ import annotations

import pytest

from shoal.errors import InvalidArgumentError
from shoal.images import Reference

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "domain", "path", "name"),
    [
        ("base", "docker.io", "library/base", "base:latest"),
        ("debian:12", "docker.io", "library/debian", "debian:12"),
        ("docker.io/library/debian", "docker.io", "library/debian", "debian:latest"),
        ("index.docker.io/debian", "docker.io", "library/debian", "debian:latest"),
        ("team/app:v1", "docker.io", "team/app", "team/app:v1"),
        ("localhost/app", "localhost", "app", "localhost/app:latest"),
        ("localhost:5000/app:x", "localhost:5000", "app", "localhost:5000/app:x"),
        (
            "reg.example:443/a/b/c:T_1.2-3",
            "reg.example:443",
            "a/b/c",
            "reg.example:443/a/b/c:T_1.2-3",
        ),
        ("[::1]:5000/app", "[::1]:5000", "app", "[::1]:5000/app:latest"),
        ("a__b/c-d.e", "docker.io", "a__b/c-d.e", "a__b/c-d.e:latest"),
    ],
)
def test_names_are_read_by_the_rules_of_docker(
    text: str, domain: str, path: str, name: str
) -> None:
    reference = Reference.parse(text)
    assert (reference.domain, reference.path, reference.name) == (domain, path, name)
    assert Reference.parse(reference.name) == reference


def test_a_digest_stands_beside_the_tag_or_instead_of_it() -> None:
    both = Reference.parse(f"debian:12@sha256:{HEX}")
    assert (both.tag, both.digest, both.name) == ("12", f"sha256:{HEX}", "debian:12")
    alone = Reference.parse(f"debian@sha256:{HEX}")
    assert (alone.tag, alone.name) == ("", "debian")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Debian",
        "debian:",
        "debian:-x",
        "debian:" + "x" * 129,
        "../../etc/passwd",
        "a/../b",
        "a//b",
        "/a",
        "a/",
        "a:b/c:d:e",
        "debian:a/b",
        "debian@sha256:../../x",
        "debian@sha256:" + HEX.upper(),
        "debian@sha256:" + HEX[:-1],
        "debian@md5:" + HEX[:32],
        "debian\n",
        "debian\0",
        "débian",
        "a" * 256,
        "a/" * 2000 + "b",
        HEX,
        "-debian",
        "a..b",
        "registry.example:port/app",
    ],
)
def test_cp_06_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Reference.parse(text)
