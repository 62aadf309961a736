"""Inspect's own checks of a sandbox provider, and what they do not look at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from inspect_ai.util import (
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxUnavailableError,
)
from inspect_ai.util._sandbox.limits import override_max_exec_output_size
from inspect_ai.util._sandbox.self_check import *  # each name is a test

import shoal
from shoal.integrations.inspect_ai import ShoalConfig, ShoalSandboxEnvironment


@asynccontextmanager
async def sample(config: ShoalConfig | str | None) -> AsyncIterator[SandboxEnvironment]:
    """A sample's sandbox, from its beginning to its end."""
    environments = await ShoalSandboxEnvironment.sample_init("task", config, {})
    try:
        yield environments["default"]
    finally:
        await ShoalSandboxEnvironment.sample_cleanup("task", config, environments, False)


@pytest.fixture
async def sandbox_env(agents: str) -> AsyncIterator[SandboxEnvironment]:
    # Not root: the checks ask for refusals, and root is refused nothing.
    config = ShoalConfig(image=agents, user="nobody", workdir="/work")
    async with sample(config) as environment:
        yield environment


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import solver
from inspect_ai.util import sandbox

@solver
def look():
    async def solve(state, generate):
        done = await sandbox().exec(["sh", "-c", "cat given; pwd; echo $PROBE"])
        state.output.completion = done.stdout
        return state
    return solve

@task
def where():
    sample = Sample(input="-", target="given bytes\\n/srv\\nfrom settings\\n", files={"given": "given bytes\\n"})
    return Task(dataset=[sample], epochs=3, solver=look(), scorer=includes())
"""


def test_an_evaluation_runs_in_shoal_and_leaves_nothing(agents: str, tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(TASK)
    (tmp_path / "settings.yaml").write_text(
        f"image: {agents}\nworkdir: /srv\nenv:\n  PROBE: from settings\n"
    )
    inspect = Path(sys.executable).with_name("inspect")
    log = tmp_path / "logs"
    done = subprocess.run(
        [
            *(str(inspect), "eval", "where.py", "--model", "mockllm/model"),
            *("--sandbox", "shoal:settings.yaml", "--display", "plain"),
            *("--log-dir", str(log), "--log-format", "json"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [written] = [json.loads(path.read_text()) for path in log.glob("*.json")]
    assert written["status"] == "success", written.get("error")
    scores = [sample["scores"]["includes"]["value"] for sample in written["samples"]]
    assert scores == ["C", "C", "C"], [sample["output"] for sample in written["samples"]]
    assert not shoal.Sandbox.list(labels={"made-by": "inspect_ai"})


async def test_settings_reach_the_sandbox(agents: str) -> None:
    config = ShoalConfig(image=agents, memory_mib=200, pids=50, timeout=77, labels={"a": "b"})
    async with sample(config) as environment:
        info = await environment.as_type(ShoalSandboxEnvironment).sandbox.info()
        assert (info.memory_mib, info.pids) == (200, 50)
        assert info.expires_at - info.created_at == pytest.approx(77)
        assert info.labels["a"] == "b"


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="memory"):
        ShoalSandboxEnvironment.config_deserialize({"memory": 5})


async def test_a_sample_that_cannot_start_leaves_nothing(agents: str) -> None:
    config = ShoalConfig(image=agents, workdir="/proc/1/nothing")
    with pytest.raises(shoal.ShoalError):
        await ShoalSandboxEnvironment.sample_init("task", config, {})
    assert not await shoal.AsyncSandbox.list(labels={"made-by": "inspect_ai"})


async def test_too_much_output_is_an_error_that_shows_some_of_it(
    sandbox_env: SandboxEnvironment,
) -> None:
    with (
        override_max_exec_output_size(1024),
        pytest.raises(OutputLimitExceededError) as caught,
    ):
        await sandbox_env.exec(["sh", "-c", "echo first; yes | head -c 5000; echo last"])
    shown = caught.value.truncated_output or ""
    assert shown.startswith("first\n")
    assert shown.endswith("last\n")
    assert len(shown) < 2000


async def test_a_command_that_is_not_there_is_an_ordinary_failure(
    sandbox_env: SandboxEnvironment,
) -> None:
    result = await sandbox_env.exec(["no-such-program"])
    assert (result.success, result.returncode) == (False, 127)
    assert "no-such-program" in result.stderr


async def test_running_out_of_memory_is_told(agents: str) -> None:
    async with sample(ShoalConfig(image=agents, memory_mib=64)) as environment:
        result = await environment.exec(["python3", "-c", "x = b'x' * (1 << 30)"])
    assert result.returncode == 137
    assert "memory limit" in result.stderr


async def test_a_sandbox_that_has_ended_is_unavailable_and_has_no_connection(agents: str) -> None:
    async with sample(ShoalConfig(image=agents)) as environment:
        await environment.as_type(ShoalSandboxEnvironment).sandbox.terminate()
        with pytest.raises(SandboxUnavailableError):
            await environment.exec(["true"])
        with pytest.raises(SandboxUnavailableError):
            await environment.read_file("/etc/hostname")
        with pytest.raises(SandboxUnavailableError):
            await environment.write_file("/tmp/x", "")
        with pytest.raises(ConnectionError):
            await environment.connection()


async def test_the_connection_names_a_shell_of_this_sandbox(agents: str) -> None:
    async with sample(ShoalConfig(image=agents)) as environment:
        sandbox = environment.as_type(ShoalSandboxEnvironment).sandbox
        connection = await environment.connection(user="nobody")
        assert connection.command == f"shoal shell --user nobody {sandbox.id}"


async def test_cleaning_up_by_hand_ends_what_inspect_left_and_nothing_else(agents: str) -> None:
    async with await shoal.AsyncSandbox.create(agents) as other:
        await ShoalSandboxEnvironment.sample_init("task", ShoalConfig(image=agents), {})
        assert await shoal.AsyncSandbox.list(labels={"made-by": "inspect_ai"})
        await ShoalSandboxEnvironment.cli_cleanup(None)
        assert not await shoal.AsyncSandbox.list(labels={"made-by": "inspect_ai"})
        assert (await other.run(["true"])).ok
        await ShoalSandboxEnvironment.cli_cleanup(other.id)
        assert (await other.info()).status == "stopped"
