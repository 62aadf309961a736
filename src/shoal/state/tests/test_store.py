from __future__ import annotations

import contextlib
import errno
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from shoal.errors import ConflictError, HostUnsupportedError, ResourceExhaustedError
from shoal.state import Record, StateStore
from shoal.state.store import MIGRATIONS
from shoal.types import Reason, SandboxSpec, Status


def record(name: str = "sb-a", **changes: object) -> Record:
    plain = Record(
        id=name,
        spec=SandboxSpec(env={"A": "ü"}, labels={"job": "1"}),
        image_digest="sha256:x",
        slot=3,
        generation=1,
        status=Status.RUNNING,
        created_at=10.0,
        expires_at=20.0,
    )
    return msgspec.structs.replace(plain, **changes)


def test_a_record_survives_a_restart(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state.db")
    store.save(record())
    ended = record("sb-b", status=Status.STOPPED, reason=Reason.OOM, message="m", ended_at=15.0)
    store.save(ended)
    store.close()
    store = StateStore.open(tmp_path / "state.db")
    assert store.get("sb-a") == record()
    assert store.get("sb-b") == ended
    assert store.get("sb-c") is None
    assert [one.id for one in store.unfinished()] == ["sb-a"]
    store.close()
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600


def test_a_killed_writer_loses_nothing_that_was_written(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from shoal.state.tests.test_store import record;"
        "from shoal.state import StateStore; s = StateStore.open(Path(sys.argv[1]));"
        "[s.save(record(f'sb-{n}')) for n in range(50)]; os.kill(os.getpid(), 9)"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "state.db")],
        env={"PYTHONPATH": ":".join(path)},
        check=False,
    )
    assert done.returncode == -9
    store = StateStore.open(tmp_path / "state.db")
    assert len(store.all()) == 50
    store.close()


def test_ended_ones_are_pruned_and_living_ones_never(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state.db")
    store.save(record("sb-old", status=Status.STOPPED, ended_at=100.0))
    store.save(record("sb-new", status=Status.STOPPED, ended_at=200.0))
    store.save(record("sb-live"))
    assert store.prune(ended_before=150.0, keep=10) == 1
    assert {one.id for one in store.all()} == {"sb-new", "sb-live"}
    for number in range(10):
        store.save(record(f"sb-{number}", status=Status.STOPPED, ended_at=300.0 + number))
    assert store.prune(ended_before=0.0, keep=3) == 8
    assert {one.id for one in store.all()} == {"sb-7", "sb-8", "sb-9", "sb-live"}
    assert store.prune(ended_before=0.0, keep=0) == 3
    store.close()


def test_ended_ones_are_listed_newest_first_and_not_without_end(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state.db")
    store.save(record("sb-live"))
    for number in range(10):
        labels = {"odd": str(number % 2)}
        spec = SandboxSpec(labels=labels)
        born = float(number)
        store.save(record(f"sb-{number}", status=Status.STOPPED, spec=spec, created_at=born))
    assert [one.id for one in store.ended(labels={}, limit=2)] == ["sb-9", "sb-8"]
    found = store.ended(labels={"odd": "0"}, limit=2)
    assert [one.id for one in found] == ["sb-8", "sb-6"]
    store.save(record("sb-later"))  # no read is left open
    store.close()


def test_a_checkpoint_folds_the_wal_while_the_store_is_in_use(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state.db")
    for number in range(200):
        store.save(record(f"sb-{number}"))
    before = (tmp_path / "state.db").stat().st_size
    store.checkpoint()
    assert (tmp_path / "state.db").stat().st_size > before
    store.save(record("sb-later"))
    assert len(store.all()) == 201
    store.close()


def test_one_writer(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "state.db")
    with pytest.raises(ConflictError, match="another node"):
        StateStore.open(tmp_path / "state.db")
    store.close()
    StateStore.open(tmp_path / "state.db").close()


def test_a_file_of_the_future_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.execute("CREATE TABLE wonders (x)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(HostUnsupportedError, match="99") as caught:
        StateStore.open(path)
    assert caught.value.hint
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.corrupt-*"))


@pytest.mark.parametrize("damage", ["garbage", "truncated", "holes"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.db"
    store = StateStore.open(path)
    for number in range(500):
        store.save(record(f"sb-{number}"))
    store.close()
    whole = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"not a database " * 1000)
    elif damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(whole[:4096] + b"\xff" * 8192 + whole[12288:])
    bad = path.read_bytes()
    store = StateStore.open(path)
    assert store.all() == []
    store.save(record())
    store.close()
    [aside] = tmp_path.glob("state.db.corrupt-*")
    assert aside.read_bytes()[4096:] == bad[4096:]


def test_migrations_run_once_each_and_keep_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = StateStore.open(path)
    store.save(record())
    store.close()
    ran: list[str] = []

    def add_column(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE sandboxes ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'")
        ran.append("second")

    for _ in range(2):
        store = StateStore.open(path, migrations=(*MIGRATIONS, add_column))
        assert store.get("sb-a") == record()
        store.close()
    assert ran == ["second"]
    with pytest.raises(HostUnsupportedError):
        StateStore.open(path)


def test_a_migration_that_fails_leaves_the_old_version(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    StateStore.open(path).close()

    def broken(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE half (x)")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        StateStore.open(path, migrations=(*MIGRATIONS, broken))
    store = StateStore.open(path)
    store.save(record())
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchall()


def test_one_unreadable_record_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = StateStore.open(path)
    store.save(record("sb-a"))
    store.save(record("sb-b"))
    store.close()
    db = sqlite3.connect(path)
    db.execute("UPDATE sandboxes SET spec = '{' WHERE id = 'sb-a'")
    db.commit()
    db.close()
    store = StateStore.open(path)
    assert [one.id for one in store.all()] == ["sb-b"]
    store.close()


def test_a_full_disk_is_a_coded_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore.open(tmp_path / "state.db")
    store._db.execute("PRAGMA max_page_count = 4")
    large = record("sb-large", spec=SandboxSpec(env={"A": "x" * 100_000}))
    with pytest.raises(ResourceExhaustedError) as caught:
        store.save(large)
    assert store.get("sb-large") is None
    assert caught.value.hint
    store._db.execute("PRAGMA max_page_count = 100000")
    store.save(record("sb-later"))
    store.close()

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("shoal.state.store._connect", no_room)
    with pytest.raises(ResourceExhaustedError):
        StateStore.open(tmp_path / "other.db")
