"""Every error that Shoal raises, as one tree.

    ShoalError
    ├── InvalidArgumentError        the caller asked for something that makes no sense
    ├── AuthenticationError         no token, or a wrong one
    ├── ForbiddenError              whoever asks may not have it
    ├── NotFoundError
    │   ├── SandboxNotFoundError    never existed, or is not yours
    │   ├── ImageNotFoundError
    │   ├── ExecNotFoundError
    │   └── PathNotFoundError       no such path in the sandbox
    ├── SandboxGoneError            it existed and ended; `reason` tells how
    ├── ConflictError               the state of things forbids it now
    ├── PathError                   a path is there, but not what the call needs
    ├── PortUnreachableError        nothing listens on a port of the sandbox
    ├── ResourceExhaustedError      it does not fit now
    ├── ImageError                  an archive or layer cannot be used
    │   └── DigestMismatchError
    ├── HostUnsupportedError        this machine lacks something Shoal needs
    ├── NodeUnavailableError        no node answers                            (infra)
    ├── StartFailedError            the sandbox could not be brought up        (infra, or its main command)
    │   └── StartTimeoutError       it was not up, or not ready, in time       (infra, or its main command)
    ├── SandboxLostError            it ended through no fault of its own       (infra)
    ├── DeadlineExceededError       the caller's deadline passed
    ├── ExecFailedError             `check=True` and the command failed
    └── InternalError               a bug of ours                              (infra)

Over HTTP an error is problem+json (RFC 9457) with the same `code`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ShoalError(Exception):
    """The root: catches whatever Shoal raises.

    Attributes:
        code: Stable word for programs.
        status: HTTP status that carries it.
        is_infra: The infrastructure failed, not the caller and not the code in the sandbox; a retry may help.
        hint: What to do about it, for a person; may be empty.
        details: Facts by name, all of them JSON values.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    is_infra: bool = False

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details
        if hint:
            self.add_note(f"hint: {hint}")  # so that a traceback shows it too

    def to_problem(self) -> dict[str, Any]:
        """The error as a problem+json document."""
        problem: dict[str, Any] = {
            "type": f"urn:shoal:error:{self.code}",
            "title": self.code.replace("_", " "),
            "status": self.status,
            "code": self.code,
            "detail": self.message,
            "is_infra": self.is_infra,
        }
        if self.hint:
            problem["hint"] = self.hint
        if self.details:
            problem["details"] = self.details
        return problem


class InvalidArgumentError(ShoalError):
    """The caller asked for something that makes no sense; nothing was done."""

    code = "invalid_argument"
    status = 400


class AuthenticationError(ShoalError):
    """No token was sent, or a wrong one."""

    code = "unauthenticated"
    status = 401


class ForbiddenError(ShoalError):
    """Who asks is known, or does not matter: this may not be had from where they are, such as a page elsewhere."""

    code = "forbidden"
    status = 403


class NotFoundError(ShoalError):
    """What was named does not exist, or is not the caller's."""

    code = "not_found"
    status = 404


class SandboxNotFoundError(NotFoundError):
    """No sandbox has this id."""

    code = "sandbox_not_found"


class ImageNotFoundError(NotFoundError):
    """The node has no image of this name."""

    code = "image_not_found"


class ExecNotFoundError(NotFoundError):
    """The sandbox knows no exec of this id."""

    code = "exec_not_found"


class PathNotFoundError(NotFoundError):
    """The path does not exist in the sandbox."""

    code = "path_not_found"


class SandboxGoneError(ShoalError):
    """The sandbox existed and has ended.

    `details["reason"]` is a member of `types.Reason`.
    """

    code = "sandbox_gone"
    status = 410


class ConflictError(ShoalError):
    """The state of things forbids it now."""

    code = "conflict"
    status = 409


class PathError(ShoalError):
    """The path exists but is not what the call needs, or the sandbox's kernel refused.

    `details["errno"]` is the kernel's word.
    """

    code = "path_error"
    status = 422


class PortUnreachableError(ShoalError):
    """Nothing listens on this port of the sandbox, on its loopback."""

    code = "port_unreachable"
    status = 502


class ResourceExhaustedError(ShoalError):
    """No memory, CPU, disk or other resource is left for it; nothing was reserved."""

    code = "resource_exhausted"
    status = 429


class ImageError(ShoalError):
    """An archive, manifest or layer is malformed or refused; nothing of it was kept."""

    code = "invalid_image"
    status = 422


class DigestMismatchError(ImageError):
    """Content is not what its digest says; nothing of it was kept."""

    code = "digest_mismatch"


class HostUnsupportedError(ShoalError):
    """This machine lacks something that Shoal needs; `shoal doctor` lists everything."""

    code = "host_unsupported"
    status = 501


class NodeUnavailableError(ShoalError):
    """No node answers at the address, or it could not be started."""

    code = "node_unavailable"
    status = 503
    is_infra = True


class StartFailedError(ShoalError):
    """The sandbox could not be brought up; whatever it had acquired was given back.

    `details` has `stage`, `call` and `errno` where a system call failed. With stage `main` its main command did not
    start (`errno` and `exec_stage`, as an exec's) or ended before it was ready (`outcome`, `exit_code`, `signal`, and
    `stdout_tail` and `stderr_tail`, the last that it printed); then `is_infra` is False.
    """

    code = "start_failed"
    status = 500
    is_infra = True


class StartTimeoutError(StartFailedError):
    """The sandbox's guest agent stayed silent for too long; whatever it had acquired was given back.

    So too when the guest agent did answer and what `SandboxSpec.ready` asks for did not come true in time; then
    `is_infra` is False.
    """

    code = "start_timeout"
    status = 504


class SandboxLostError(ShoalError):
    """The sandbox ended through no fault of its own while the call was under way."""

    code = "sandbox_lost"
    status = 502
    is_infra = True


class DeadlineExceededError(ShoalError):
    """The caller's deadline passed before an answer came."""

    code = "deadline_exceeded"
    status = 504


class ExecFailedError(ShoalError):
    """A command that was run with `check=True` did not exit with 0; `result` has all of it."""

    code = "exec_failed"
    status = 422

    def __init__(self, message: str, *, hint: str = "", result: Any = None, **details: Any) -> None:
        super().__init__(message, hint=hint, **details)
        self.result = result


class InternalError(ShoalError):
    """A bug of ours."""

    code = "internal"
    status = 500
    is_infra = True


def _tree(root: type[ShoalError]) -> dict[str, type[ShoalError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE = _tree(ShoalError)


def from_problem(problem: dict[str, Any]) -> ShoalError:
    """The error behind a problem+json document; an unknown code becomes a plain `ShoalError`."""
    kind = _BY_CODE.get(str(problem.get("code", "")), ShoalError)
    message = str(problem.get("detail") or problem.get("title") or "unknown error")
    details = problem.get("details")
    error = kind(message, hint=str(problem.get("hint", "")))
    error.details = dict(details) if isinstance(details, dict) else {}
    if isinstance(infra := problem.get("is_infra"), bool):
        error.is_infra = infra  # one start that failed is not like another
    return error
