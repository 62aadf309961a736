"""The stream of an exec (`application/vnd.shoal.stream`), taken apart into frames.

A frame is `u8 kind, 3 zero bytes, u32 big-endian length, payload`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

from shoal.errors import InternalError

_HEADER = struct.Struct(">B3sI")
MAX_PAYLOAD = 16 << 20
"""Bytes; a longer frame is no frame of ours."""


class Kind(enum.IntEnum):
    """What a frame carries."""

    STARTED = 0x01
    STDOUT = 0x02
    STDERR = 0x03
    EXIT = 0x04
    ERROR = 0x7F


class FrameParser:
    """Bytes in, frames out, however the bytes were cut."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The frames that are complete with `chunk`.

        Raises:
            InternalError: The stream is not one of ours; nothing after it can be read.
        """
        data: bytes | bytearray = chunk
        if self._rest:
            self._rest += chunk
            data = self._rest
        at, end = 0, len(data)
        frames: list[tuple[Kind, bytes]] = []
        view = memoryview(data)
        try:
            while end - at >= _HEADER.size:
                number, zeros, length = _HEADER.unpack_from(data, at)
                if (
                    zeros != b"\0\0\0"
                    or length > MAX_PAYLOAD
                    or number not in Kind._value2member_map_
                ):
                    raise InternalError("malformed exec stream", kind=number, length=length)
                start = at + _HEADER.size
                if end - start < length:
                    break
                at = start + length
                frames.append((Kind(number), bytes(view[start:at])))
            rest = None if at == 0 and data is self._rest else bytearray(view[at:])
        finally:
            view.release()
        if rest is not None:
            self._rest = rest
        return iter(frames)


def frame(kind: Kind, payload: bytes) -> bytes:
    """One frame's bytes."""
    return _HEADER.pack(kind, b"\0\0\0", len(payload)) + payload
