"""Images made by other tools, built once a machine and kept in a cache.

The trees come from the Debian archive (`mmdebstrap`), the archives around them from `umoci` and
`skopeo`, so that nothing of Shoal has a hand in what Shoal is asked to import.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

AGENTS = ("python3", "python-is-python3", "adduser", "procps")
TOOLS = ("gcc", "libc6-dev", "make", "git", "python3", "python3-pytest", "strace")
SCREENS = ("bash", "less", "procps", "vim")
"""Programs that draw on a whole terminal, and the shell they are started from."""


class MissingToolError(RuntimeError):
    """A program that makes a test image is not installed."""


def cache_dir() -> Path:
    """The directory that keeps test images between runs."""
    chosen = os.environ.get("SHOAL_TEST_CACHE")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "shoal-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def need(*programs: str) -> None:
    """Refuse to go on without these programs.

    Raises:
        MissingToolError: Names what is missing.
    """
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        raise MissingToolError(
            f"missing programs: {' '.join(missing)}; install them with apt-get install"
        )


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    with (cache_dir() / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached file or directory `name`; `make` fills it when it is not there yet."""
    final = cache_dir() / name
    if final.exists():
        return final
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".making-") as scratch:
        part = Path(scratch) / name
        make(part)
        part.rename(final)
    return final


def _debian(packages: tuple[str, ...]) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        need("mmdebstrap")
        command = ["mmdebstrap", "--quiet", "--format=tar", "--variant=essential"]
        command += [f"--include={','.join(packages)}", '--aptopt=Acquire::Retries "3"']
        command += ["--dpkgopt=path-exclude=/usr/share/doc/*"]
        command += ["--dpkgopt=path-exclude=/usr/share/locale/*"]
        command += ["bookworm", str(target), "http://deb.debian.org/debian"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"mmdebstrap failed: {done.stderr[-2000:]}")

    return make


def base_tar() -> Path:
    """A small Debian with Python as a plain tar of its root file system."""
    with _locked():
        return _once("base.tar", _debian(("python3",)))


def agents_tar() -> Path:
    """Debian with what other frameworks' tests call, as a plain tar: `python`, `adduser`, `ps`."""
    with _locked():
        return _once("agents.tar", _debian(AGENTS))


def tools_tar() -> Path:
    """Debian with gcc, git and pytest as a plain tar."""
    with _locked():
        return _once("tools.tar", _debian(TOOLS))


def screens_tar() -> Path:
    """Debian with vim, less and top as a plain tar."""
    with _locked():
        return _once("screens.tar", _debian(SCREENS))


def _layout(source: Path, tag: str) -> Callable[[Path], None]:
    """An OCI layout of two layers by `umoci`: the tree, and a file and a deletion on top of it."""

    def umoci(*arguments: str) -> None:
        subprocess.run(["umoci", *arguments], check=True, capture_output=True, timeout=600)

    def make(target: Path) -> None:
        need("umoci", "tar")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".making-") as scratch:
            bundle = Path(scratch) / "bundle"
            umoci("init", "--layout", str(target))
            umoci("new", "--image", f"{target}:{tag}")
            umoci("unpack", "--image", f"{target}:{tag}", str(bundle))
            rootfs = bundle / "rootfs"
            subprocess.run(
                ["tar", "-xpf", str(source), "-C", str(rootfs), "--numeric-owner"],
                check=True,
                timeout=600,
            )
            (rootfs / "etc" / "goes-away").write_text("below")
            umoci("repack", "--refresh-bundle", "--image", f"{target}:{tag}", str(bundle))
            (rootfs / "etc" / "goes-away").unlink()
            (rootfs / "etc" / "made-by").write_text("umoci\n")
            umoci("repack", "--image", f"{target}:{tag}", str(bundle))
            umoci(
                "config",
                *("--image", f"{target}:{tag}"),
                *("--config.env", "GREETING=hello from the image"),
                *(
                    "--config.env",
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                ),
                *("--config.workingdir", "/srv"),
                *("--config.label", "maker=umoci"),
            )
            umoci("gc", "--layout", str(target))

    return make


def base_layout() -> Path:
    """The base tree as an OCI layout directory, tag `small`."""
    source = base_tar()
    with _locked():
        return _once("base-oci", _layout(source, "small"))


def tools_layout() -> Path:
    """The tools tree as an OCI layout directory, tag `tools`."""
    source = tools_tar()
    with _locked():
        return _once("tools-oci", _layout(source, "tools"))


def base_layout_tar() -> Path:
    """The base OCI layout packed into one tar."""
    source = base_layout()

    def make(target: Path) -> None:
        with tarfile.open(target, "w") as archive:
            for entry in sorted(source.iterdir()):
                archive.add(entry, arcname=entry.name)

    with _locked():
        return _once("base-oci.tar", make)


def base_docker_archive() -> Path:
    """The base image as `docker save` writes it, by `skopeo`."""
    source = base_layout()

    def make(target: Path) -> None:
        need("skopeo")
        subprocess.run(
            [
                *("skopeo", "copy", "--insecure-policy"),
                *(f"oci:{source}:small", f"docker-archive:{target}:small:latest"),
            ],
            check=True,
            capture_output=True,
            timeout=600,
        )

    with _locked():
        return _once("base-docker.tar", make)


_HELLO = r"""
#include <stdio.h>
int main(int argc, char **argv) {
    printf("hello %d\n", argc);
    return argc - 1;
}
"""


def static_program(name: str, source: str) -> Path:
    """A static program from C source; `name` must change when the source does."""

    def make(target: Path) -> None:
        need("gcc")
        code = target.with_suffix(".c")
        code.write_text(source)
        subprocess.run(
            ["gcc", "-static", "-O1", "-o", str(target), str(code)], check=True, timeout=120
        )

    with _locked():
        return _once(name, make)


def tiny_rootfs(where: Path) -> Path:
    """A root file system that holds one static program, `/bin/hello`, and nothing else."""
    (where / "bin").mkdir(parents=True)
    shutil.copy2(static_program("hello-1", _HELLO), where / "bin" / "hello")
    return where
