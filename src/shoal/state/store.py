"""Records of sandboxes, alive and ended, in one SQLite file.

Calls are plain functions and run inline: a write to the WAL costs some tens of microseconds and no fsync, which
is less than a hop to a thread. What a crash of the machine can lose are the last few records; SQLite keeps the
file whole, and after such a crash no sandbox of theirs is alive either.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import structlog

from shoal.errors import (
    ConflictError,
    HostUnsupportedError,
    InternalError,
    ResourceExhaustedError,
    ShoalError,
)
from shoal.types import Reason, SandboxInfo, SandboxSpec, Status

log = structlog.get_logger(__name__)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox as it is written down."""

    id: str
    spec: SandboxSpec
    image_digest: str
    slot: int
    """Number of its range of host ids; free again once it is stopped."""
    generation: int
    """Number that its guest agent must say in READY."""
    status: Status
    created_at: float
    """Seconds since 1970."""
    expires_at: float
    """Seconds since 1970; for people."""
    deadline: float = 0.0
    """The same moment on the machine's monotonic clock, on which its timer runs; no sandbox outlives that clock."""
    reason: Reason | None = None
    message: str = ""
    ended_at: float | None = None

    def to_info(self) -> SandboxInfo:
        """The record as a client sees it."""
        spec = self.spec
        return SandboxInfo(
            id=self.id,
            status=self.status,
            image=spec.image,
            image_digest=self.image_digest,
            runtime=spec.runtime,
            network=spec.network,
            cpu=spec.cpu,
            memory_mib=spec.memory_mib,
            disk_mib=spec.disk_mib,
            pids=spec.pids,
            labels=spec.labels,
            created_at=self.created_at,
            expires_at=self.expires_at,
            ended_at=self.ended_at,
            reason=self.reason,
            message=self.message,
            public_ports=spec.public_ports,
        )


Migration = Callable[[sqlite3.Connection], object]


def _first_tables(db: sqlite3.Connection) -> None:
    db.execute(
        """
        CREATE TABLE sandboxes (
            id TEXT PRIMARY KEY,
            spec BLOB NOT NULL,
            image_digest TEXT NOT NULL,
            slot INTEGER NOT NULL,
            generation INTEGER NOT NULL,
            status TEXT NOT NULL,
            reason TEXT,
            message TEXT NOT NULL,
            created_at REAL NOT NULL,
            expires_at REAL NOT NULL,
            ended_at REAL
        ) WITHOUT ROWID
        """
    )
    db.execute("CREATE INDEX sandboxes_by_birth ON sandboxes (created_at)")
    db.execute("CREATE INDEX sandboxes_by_end ON sandboxes (ended_at)")


def _monotonic_deadline(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE sandboxes ADD COLUMN deadline REAL NOT NULL DEFAULT 0")


MIGRATIONS: tuple[Migration, ...] = (_first_tables, _monotonic_deadline)
"""Step n brings a file from version n to n + 1. Steps are added, never changed."""

_COLUMNS = (
    "id, spec, image_digest, slot, generation, status, reason, message,"
    " created_at, expires_at, ended_at, deadline"
)
_REPLACE = f"REPLACE INTO sandboxes ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"  # noqa: S608 - a constant
_SELECT = f"SELECT {_COLUMNS} FROM sandboxes "  # noqa: S608 - a constant
_WAL_PAGES = 16_384
"""Pages at which a write folds the WAL itself, should nobody call `checkpoint`."""
_SET_ASIDE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class StateStore:
    """The records; nothing else writes the file.

    `open` returns it ready; `close` ends it.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, lock: IO[bytes]) -> None:
        self._db = db
        self._path = path
        self._lock = lock
        self._encode = msgspec.json.Encoder().encode
        self._decode_spec = msgspec.json.Decoder(SandboxSpec).decode

    @classmethod
    def open(cls, path: Path, *, migrations: tuple[Migration, ...] = MIGRATIONS) -> StateStore:
        """Open the records at `path`, making or migrating the file.

        A file that is no database, or a damaged one, is renamed to `<name>.corrupt-<seconds since 1970>` and an
        empty one takes its place.

        Raises:
            ConflictError: Another process has the file open.
            HostUnsupportedError: A newer Shoal wrote it. It was not touched.
            ResourceExhaustedError: The disk is full.
        """
        with _coded(path, "open"):
            lock = _take_lock(path)
        try:
            with _coded(path, "open"):
                try:
                    db = _connect(path, migrations)
                except sqlite3.DatabaseError as error:
                    if (getattr(error, "sqlite_errorcode", 0) & 0xFF) not in _SET_ASIDE:
                        raise
                    aside = _set_aside(path)
                    log.warning(
                        "state_set_aside", path=str(path), kept_as=str(aside), error=str(error)
                    )
                    db = _connect(path, migrations)
        except BaseException:
            lock.close()
            raise
        return cls(db, path, lock)

    def close(self) -> None:
        """Fold the WAL into the file and let it go."""
        self._db.close()
        self._lock.close()

    def save(self, record: Record) -> None:
        """Write a record, replacing what was known under its id.

        Raises:
            ResourceExhaustedError: The disk is full; the record is as it was.
        """
        row = (
            record.id,
            self._encode(record.spec),
            record.image_digest,
            record.slot,
            record.generation,
            record.status.value,
            None if record.reason is None else record.reason.value,
            record.message,
            record.created_at,
            record.expires_at,
            record.ended_at,
            record.deadline,
        )
        with _coded(self._path, "write"):
            self._db.execute(_REPLACE, row)

    def get(self, sandbox: str) -> Record | None:
        """The record of an id, alive or ended."""
        found = self._select("WHERE id = ?", (sandbox,))
        return found[0] if found else None

    def all(self) -> list[Record]:
        """Every record, newest first."""
        return self._select("ORDER BY created_at DESC, id", ())

    def unfinished(self) -> list[Record]:
        """Records that do not say `stopped`, oldest first."""
        return self._select("WHERE status != ? ORDER BY created_at", (Status.STOPPED.value,))

    def ended(self, *, labels: Mapping[str, str], limit: int) -> list[Record]:
        """Stopped sandboxes that carry all the labels, newest first, `limit` at the most."""
        found: list[Record] = []
        wanted = labels.items()
        with _coded(self._path, "read"):
            rows = self._db.execute(
                _SELECT + "WHERE status = ? ORDER BY created_at DESC, id", (Status.STOPPED.value,)
            )
            for row in rows:
                if len(found) == limit:
                    break
                record = self._readable(row)
                if record is not None and wanted <= record.spec.labels.items():
                    found.append(record)
        return found

    def prune(self, *, ended_before: float, keep: int) -> int:
        """Forget old sandboxes; returns how many.

        Args:
            ended_before: Those that ended before this time, in seconds since 1970, go.
            keep: Of the others this many stay, the last to end.
        """
        stopped = Status.STOPPED.value
        with _coded(self._path, "write"):
            last = self._db.execute(
                "SELECT ended_at FROM sandboxes WHERE status = ?"
                " ORDER BY ended_at DESC LIMIT 1 OFFSET ?",
                (stopped, keep),
            ).fetchone()
            if last is not None:
                ended_before = max(ended_before, math.nextafter(last[0], math.inf))
            return self._db.execute(
                "DELETE FROM sandboxes WHERE status = ? AND ended_at < ?", (stopped, ended_before)
            ).rowcount

    def checkpoint(self) -> None:
        """Fold the WAL into the file, on a connection of its own: call it in a thread.

        It waits for the disk, which a create shall not; hence not as part of some write.
        """
        with (
            _coded(self._path, "write"),
            contextlib.closing(sqlite3.connect(self._path, isolation_level=None)) as db,
        ):
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _select(self, where: str, values: Iterable[Any]) -> list[Record]:
        with _coded(self._path, "read"):
            rows = self._db.execute(_SELECT + where, tuple(values)).fetchall()
        return [record for row in rows if (record := self._readable(row)) is not None]

    def _readable(self, row: tuple[Any, ...]) -> Record | None:
        try:
            return self._record(row)
        except (ValueError, TypeError) as error:  # msgspec's errors are ValueErrors
            # One bad record must not hide the others, nor stop the node from starting.
            log.warning("record_unreadable", sandbox=row[0], error=str(error))
            return None

    def _record(self, row: tuple[Any, ...]) -> Record:
        return Record(
            id=row[0],
            spec=self._decode_spec(row[1]),
            image_digest=row[2],
            slot=row[3],
            generation=row[4],
            status=Status(row[5]),
            reason=None if row[6] is None else Reason(row[6]),
            message=row[7],
            created_at=row[8],
            expires_at=row[9],
            ended_at=row[10],
            deadline=row[11],
        )


def _take_lock(path: Path) -> IO[bytes]:
    lock = path.with_name(path.name + ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConflictError(
            f"another node uses {path.parent}", hint="give each node a data directory of its own"
        ) from error
    return lock


def _connect(path: Path, migrations: tuple[Migration, ...]) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(migrations):
            raise HostUnsupportedError(
                f"{path} has state version {version}, this Shoal knows up to {len(migrations)}",
                hint="start the newer Shoal again, or move the file away to begin with an empty one",
                version=version,
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        if version:
            damage = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
            if damage != "ok":
                raise _damaged(damage)
        for number, migrate in enumerate(migrations[version:], start=version + 1):
            db.execute("BEGIN IMMEDIATE")
            try:
                migrate(db)
                db.execute(f"PRAGMA user_version = {number}")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        path.chmod(0o600)
    except BaseException:
        db.close()
        raise
    return db


def _damaged(what: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(what)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _set_aside(path: Path) -> Path:
    """Rename a damaged file and what belongs to it; a name that is taken gets a number."""
    base = f".corrupt-{int(time.time())}"
    suffix, attempt = base, 1
    while path.with_name(path.name + suffix).exists():
        suffix, attempt = f"{base}-{attempt}", attempt + 1
    for part in ("", "-wal", "-shm"):
        source = path.with_name(path.name + part)
        if source.exists():
            source.rename(path.with_name(path.name + suffix + part))
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def _coded(path: Path, verb: str) -> Iterator[None]:
    """Turn SQLite's and the system's errors into ours."""
    try:
        yield
    except ShoalError:
        raise
    except sqlite3.Error as error:
        if (getattr(error, "sqlite_errorcode", 0) & 0xFF) == sqlite3.SQLITE_FULL:
            raise _full(path) from error
        raise InternalError(
            f"cannot {verb} {path}: {error}", hint="see the node's log and the disk"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from error
        raise HostUnsupportedError(
            f"cannot {verb} {path}: {os.strerror(error.errno or 0)}",
            hint="see who owns the data directory",
        ) from error


def _full(path: Path) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"no space is left for {path}", hint=f"free some space on the file system of {path.parent}"
    )
