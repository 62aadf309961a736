"""What must survive: one SQLite file, one writer."""

from shoal.state.store import Record, StateStore

__all__ = ["Record", "StateStore"]
