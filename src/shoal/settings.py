"""Every knob of a node, with its default and its unit.

Read at the edges only (the CLI, the server's entry); the rooms below get plain values. Each field is also
an environment variable, `SHOAL_` and the field's name in capitals, and an option of the server's entry.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """A node's settings; environment variables begin with `SHOAL_`."""

    model_config = SettingsConfigDict(
        env_prefix="SHOAL_",
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    data_dir: Path = Path("/var/lib/shoal")
    """Directory of what survives a restart: state, images, the disk pool. Only its owner may enter it."""
    run_dir: Path = Path("/run/shoal")
    """Directory of the sockets; `shoal.sock` in it is the front door."""

    listen: str = "127.0.0.1:0"
    """Address of the front door's TCP listener, through which a browser, or any HTTP client, reaches the ports of
    sandboxes: a loopback IP address and a port, 0 for any that is free. Empty, or in the environment `none`: it
    listens on no TCP port."""
    port_domain: str = Field(
        default="localhost",
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$",
    )
    """Domain under which each port of a sandbox has a name of its own, `{port}-{id}.{port_domain}`. Every name under
    `localhost` is this machine, for browsers and most resolvers; those under another must lead to `listen`."""

    cache_dir: Path = Path("/var/cache/shoal")
    """Directory of the images that were built on this machine, each under the hash of its recipe."""
    debian_mirror: str = "http://deb.debian.org"
    """Debian mirror that `base` is built from: the address above its `debian` and `debian-security`, or that of
    its `debian`."""

    pool_mib: int = Field(default=65536, ge=256)
    """Size of the disk pool in MiB. The file is sparse: it takes what layers and sandboxes really write."""

    default_image: str = "base"
    """Image of a sandbox whose spec names none."""
    default_cpu: float = Field(default=1.0, gt=0)
    """CPUs of a sandbox whose spec names none."""
    default_memory_mib: int = Field(default=512, ge=16)
    """Memory limit in MiB of a sandbox whose spec names none."""
    default_disk_mib: int = Field(default=1024, ge=1)
    """Disk limit in MiB of a sandbox whose spec names none."""
    default_pids: int = Field(default=512, ge=1)
    """Process limit of a sandbox whose spec names none."""
    default_timeout: float = Field(default=300.0, gt=0)
    """Lifetime in seconds of a sandbox whose spec names none."""

    max_sandboxes: int = Field(default=10_000, ge=1, le=32_767)
    """Sandboxes alive at once. Each has 65,537 host ids of its own, of which 32,767 ranges exist."""
    max_timeout: float = Field(default=86_400.0, gt=0)
    """Longest lifetime in seconds that a sandbox may ask for."""

    overcommit_cpu: float = Field(default=1000.0, gt=0)
    """CPUs that may be promised for each CPU of the host. A sandbox idles nine tenths of its life, and a busy
    host slows sandboxes down but breaks none, so the factor is large."""
    overcommit_memory: float = Field(default=50.0, gt=0)
    """MiB of memory that may be promised for each MiB of the host (less `reserve_memory_mib`)."""
    overcommit_disk: float = Field(default=200.0, gt=0)
    """MiB of disk that may be promised for each MiB of the pool."""
    overcommit_pids: float = Field(default=200.0, gt=0)
    """Processes that may be promised for each that the host's kernel allows."""
    reserve_memory_mib: int = Field(default=256, ge=0)
    """MiB of memory that the host keeps: no sandbox is admitted while less than this is available."""
    reserve_disk_mib: int = Field(default=512, ge=0)
    """MiB of disk that stay free under `data_dir`: no sandbox is admitted while less than this is free. The disk pool
    grows as it is written to, and sandboxes get input and output errors when there is nothing left to grow into."""

    start_timeout: float = Field(default=10.0, gt=0)
    """Seconds within which a sandbox's guest agent must have said READY."""
    stop_timeout: float = Field(default=30.0, gt=0)
    """Seconds that a stopping node waits for its sandboxes to be gone."""
    create_concurrency: int = Field(default=4, ge=1)
    """Sandboxes that are being built at the same moment; further ones wait their turn in order."""
    keep_ended: float = Field(default=86_400.0, ge=0)
    """Seconds for which an ended sandbox can still be asked for its reason."""
    max_ended: int = Field(default=100_000, ge=0)
    """Ended sandboxes that are remembered at the most, whatever `keep_ended` says."""
    idle_exit: float = Field(default=0.0, ge=0)
    """Seconds without a sandbox and without a request after which the node leaves; 0: it stays, and one that was
    started in the background leaves after a minute."""

    max_image_mib: int = Field(default=65_536, ge=1)
    """Size in MiB at which the upload of an image is refused."""
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    """Least important event that is logged: debug, info, warning or error."""

    @field_validator("listen")
    @classmethod
    def _on_loopback(cls, value: str) -> str:
        # A variable that is empty counts as one that is not set; hence the word.
        if value in ("", "none"):
            return ""
        host, _, port = value.rpartition(":")
        try:
            address = ipaddress.ip_address(host.strip("[]"))
            number = int(port)
        except ValueError:
            address, number = ipaddress.IPv4Address(0), -1
        bare = f"[{address}]" if address.version == 6 else str(address)
        if value != f"{bare}:{number}" or not 0 <= number <= 65_535 or "%" in value:
            raise ValueError("must be an IP address and a port, such as 127.0.0.1:0 or [::1]:8080")
        if not address.is_loopback:
            raise ValueError("must be a loopback address for now, such as 127.0.0.1:0")
        return value

    @property
    def socket(self) -> Path:
        """The front door."""
        return self.run_dir / "shoal.sock"
