"""Names of images, by the rules that Docker users know.

`debian`, `debian:latest` and `docker.io/library/debian:latest` are one name; its short form
`debian:latest` is what we store and show. A name never becomes a path: files are named by digest.

Source: github.com/distribution/reference, the grammar in `reference.go`.
"""

from __future__ import annotations

import re

import msgspec

from shoal.errors import InvalidArgumentError

_DOMAIN_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(
    rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[(?:[a-fA-F0-9:]+)\])(?::[0-9]{{1,5}})?"
)
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")

_HINT = "a name looks like debian, debian:12 or registry.example/team/app:v1"
_DEFAULT_DOMAIN = "docker.io"
_OFFICIAL = "library/"
_MAX_NAME = 255
_MAX_REFERENCE = 1024


def is_digest(text: str) -> bool:
    """Whether this is `sha256:` and 64 small hex digits, and nothing else."""
    return _DIGEST.fullmatch(text) is not None


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed name."""

    domain: str
    """Registry host, `docker.io` when none was given."""
    path: str
    """Repository below the host, with `library/` for Docker's official ones."""
    tag: str
    """`latest` when neither tag nor digest was given; empty with a digest alone."""
    digest: str = ""
    """`sha256:` digest, or empty."""

    @property
    def name(self) -> str:
        """Short form with its tag and without a digest: what an image is stored under."""
        path = self.path
        if self.domain == _DEFAULT_DOMAIN:
            path = path.removeprefix(_OFFICIAL) if path.count("/") == 1 else path
        else:
            path = f"{self.domain}/{path}"
        return f"{path}:{self.tag}" if self.tag else path

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read `[domain/]path[:tag][@digest]`.

        Raises:
            InvalidArgumentError: It is no such thing.
        """
        if len(text) > _MAX_REFERENCE:
            raise InvalidArgumentError("image name is too long", hint=_HINT, length=len(text))
        rest, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise InvalidArgumentError(f"not a sha256 digest: {digest!r}", hint=_HINT)
        slash = rest.rfind("/")
        colon = rest.find(":", slash + 1)
        tag = ""
        if colon >= 0:
            rest, tag = rest[:colon], rest[colon + 1 :]
            if not _TAG.fullmatch(tag):
                raise InvalidArgumentError(f"not an image tag: {tag!r}", hint=_HINT)
        elif not digest:
            tag = "latest"
        first, separator, remainder = rest.partition("/")
        if separator and (
            "." in first or ":" in first or first == "localhost" or first.lower() != first
        ):
            domain, path = first, remainder
        else:
            domain, path = _DEFAULT_DOMAIN, rest
        if domain == "index.docker.io":
            domain = _DEFAULT_DOMAIN
        if domain == _DEFAULT_DOMAIN and "/" not in path:
            path = _OFFICIAL + path
        if not _DOMAIN.fullmatch(domain) or not _PATH.fullmatch(path):
            raise InvalidArgumentError(f"not an image name: {text!r}", hint=_HINT)
        if len(domain) + 1 + len(path) > _MAX_NAME:
            raise InvalidArgumentError("image name is too long", hint=_HINT, length=len(text))
        if is_digest(f"sha256:{path.removeprefix(_OFFICIAL)}"):
            raise InvalidArgumentError(
                f"64 hex digits are a digest, not a name: {text!r}", hint="put sha256: before it"
            )
        return cls(domain=domain, path=path, tag=tag, digest=digest)
