"""LangChain's standard tests of a sandbox backend, and what they do not look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from deepagents.backends.protocol import SandboxBackendProtocol
from langchain_tests.integration_tests import SandboxIntegrationTests

import shoal
from shoal._compat import override
from shoal.integrations.langchain import ShoalSandbox


@pytest.fixture(scope="module")
def backend(agents: str) -> Iterator[ShoalSandbox]:
    # Not root: a test asks for a refusal, and root is refused nothing.
    with shoal.Sandbox.create(agents, user="nobody", workdir="/tmp", timeout=600) as sandbox:
        yield ShoalSandbox(sandbox)


# The suite's own fixture `sandbox_backend` is of the kind that pytest 10 will refuse.
@pytest.mark.filterwarnings("ignore:Class-scoped fixtures defined as instance methods")
class TestStandard(SandboxIntegrationTests):
    @pytest.fixture(scope="class")
    @classmethod
    @override
    def sandbox(cls, backend: ShoalSandbox) -> SandboxBackendProtocol:
        return backend


def test_output_comes_in_the_order_in_which_it_was_written(backend: ShoalSandbox) -> None:
    done = backend.execute("echo 1; echo 2 >&2; echo 3; exit 9")
    assert (done.output, done.exit_code, done.truncated) == ("1\n2\n3\n", 9, False)


def test_a_syntax_error_is_output(backend: ShoalSandbox) -> None:
    done = backend.execute("if")
    assert done.exit_code == 2
    assert "yntax error" in done.output


def test_a_command_whose_time_is_up_keeps_its_output(backend: ShoalSandbox) -> None:
    done = backend.execute("echo before; sleep 60", timeout=1)
    assert done.exit_code == 124
    assert done.output.startswith("before\n")
    assert "time was up" in done.output


def test_files_belong_to_the_sandboxs_user(backend: ShoalSandbox) -> None:
    [answer] = backend.upload_files([("/tmp/owned/file", b"x")])
    assert answer.error is None
    assert backend.execute("stat -c %U /tmp/owned /tmp/owned/file").output == "nobody\nnobody\n"
    [refused] = backend.upload_files([("/etc/passwd", b"x")])
    assert refused.error == "permission_denied"


async def test_async_calls_go_the_same_way(backend: ShoalSandbox) -> None:
    assert (await backend.aexecute("echo $((6 * 7))")).output == "42\n"
