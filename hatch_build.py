"""The wheel carries Shoal's two static Linux programs; this hook builds and packs them.

Anywhere else, or with `SHOAL_SDK_ONLY=1`, there is the pure Python client.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAMS: Final = {"shoal-agent": "agent", "shoal-noded": "release"}
"""Each with its Cargo profile."""
SOURCES: Final = (".cargo", "Cargo.lock", "Cargo.toml", "crates")
SDK_ONLY_HINT: Final = "for the client alone (it talks to a node elsewhere) set SHOAL_SDK_ONLY=1"
_PT_INTERP: Final = 3


class BuildError(Exception):
    """The programs cannot be built here; the message says why, and on a second line what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"error: {message}\nhint: {hint}")


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the programs to a wheel; an editable install finds them in the source tree."""

    def initialize(  # type: ignore[explicit-override]  # typing.override came with 3.12
        self, version: str, build_data: dict[str, Any]
    ) -> None:
        """Build what is out of date and say what belongs in the wheel."""
        if os.environ.get("SHOAL_SDK_ONLY", "") not in {"", "0"}:
            return
        try:
            programs = ensure_programs(Path(self.root))
        except BuildError as error:
            self.app.abort(str(error))
            return
        if version == "editable":
            return
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag(os.uname().machine)
        build_data["force_include"] |= {
            str(program): f"shoal/_bin/{program.name}" for program in programs
        }


def ensure_programs(root: Path) -> list[Path]:
    """Both programs under `src/shoal/_bin`, built unless they are newer than all of their sources.

    Raises:
        BuildError: Not on Linux, no usable cargo, or the build failed; earlier programs stay.
    """
    if sys.platform != "linux":
        raise BuildError(f"a node runs on Linux only, and this is {sys.platform}", SDK_ONLY_HINT)
    bin_dir = root / "src" / "shoal" / "_bin"
    programs = [bin_dir / name for name in PROGRAMS]
    if not _up_to_date(programs, root):
        built = _cargo_build(root)
        bin_dir.mkdir(exist_ok=True)
        for program in programs:
            # Beside, then renamed: a node that runs from this tree keeps the file it started from.
            beside = program.with_suffix(".new")
            shutil.copyfile(built[program.name], beside)
            beside.chmod(0o755)
            beside.replace(program)
    return programs


def wheel_tag(machine: str) -> str:
    """The tag for static programs: they need a kernel and no C library, so any of them will do."""
    return f"py3-none-manylinux_2_17_{machine}.manylinux2014_{machine}.musllinux_1_1_{machine}"


def _up_to_date(programs: list[Path], root: Path) -> bool:
    if not all(program.is_file() for program in programs):
        return False
    built_at = min(program.stat().st_mtime_ns for program in programs)
    # Directories count as well: theirs is the only time that changes when a file is removed.
    sources = [root / name for name in SOURCES]
    everything = [*sources, *(path for source in sources for path in source.rglob("*"))]
    return all(path.stat().st_mtime_ns < built_at for path in everything)


def _cargo_build(root: Path) -> dict[str, Path]:
    host = _cargo_host(root)
    return {name: _cargo_build_one(root, host, name) for name in PROGRAMS}


def _cargo_build_one(root: Path, host: str, name: str) -> Path:
    command = ["cargo", "build", f"--profile={PROGRAMS[name]}", "--locked", f"--target={host}"]
    command += ["-p", name, "--message-format=json-render-diagnostics"]
    # Either variable would silently replace .cargo/config.toml's flags, which make the programs static.
    flags = {"RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"}
    env = {key: value for key, value in os.environ.items() if key not in flags}
    build = subprocess.run(
        command, cwd=root, env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    if build.returncode != 0:
        raise BuildError(
            f"cargo build ended with {build.returncode}, its words are above",
            f"a C linker and a static C library are needed too (Debian: build-essential); "
            f"{SDK_ONLY_HINT}",
        )
    messages = [json.loads(line) for line in build.stdout.splitlines()]
    [built] = [
        Path(message["executable"])
        for message in messages
        if message.get("executable") and message["target"]["name"] == name
    ]
    if _interpreter_needed(built):
        raise BuildError(
            f"{name} came out dynamically linked",
            f"build with a toolchain whose target can be static (this one: {host})",
        )
    return built


def _cargo_host(root: Path) -> str:
    wanted = _rust_version(root)
    install_hint = f"install Rust {wanted} or newer (https://rustup.rs); {SDK_ONLY_HINT}"
    try:
        answer = subprocess.run(
            ["cargo", "-vV"],  # noqa: S607 - whichever cargo the user has
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except FileNotFoundError:
        raise BuildError("cargo is not on PATH", install_hint) from None
    except subprocess.CalledProcessError as error:
        reason = str(error.stderr).strip()
        raise BuildError(f"cargo does not run: {reason}", install_hint) from None
    facts = dict(line.split(": ", 1) for line in answer.splitlines() if ": " in line)
    release = facts.get("release", "0").partition("-")[0]
    if _numbers(release) < _numbers(wanted):
        raise BuildError(f"cargo {release} is too old", install_hint)
    return facts["host"]


def _rust_version(root: Path) -> str:
    found = re.search(
        r'^rust-version = "([\d.]+)"', (root / "Cargo.toml").read_text(), re.MULTILINE
    )
    if found is None:
        raise BuildError("Cargo.toml names no rust-version", "restore it from the repository")
    return found[1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _interpreter_needed(program: Path) -> bool:
    """Whether a 64-bit little-endian ELF file asks for a dynamic loader. Source: elf(5)."""
    with program.open("rb") as file:
        header = file.read(64)
        (offset,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        file.seek(offset)
        table = file.read(size * count)
    return any(
        struct.unpack_from("<I", table, index * size)[0] == _PT_INTERP for index in range(count)
    )


if __name__ == "__main__":
    try:
        ensure_programs(Path(__file__).resolve().parent)
    except BuildError as failure:
        sys.exit(str(failure))
