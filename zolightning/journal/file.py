"""The journal's file: frames with chained checksums, only ever appended to. Data only; nothing in it is ever run.

``ZOJOURN1``, then frames. A frame is a head ``kind u8, length u32, checksum u32``, ``length`` bytes, and a checksum u32, all
little-endian. A checksum is the CRC-32 of everything before it in its frame, continued from the last checksum of the frame before, so
that frames cannot be lost, repeated or exchanged unnoticed. Kinds:

* ``S`` settings (JSON): at the beginning, and again where a resumed run has others;
* ``R`` rows: step u32, number of rows u32, forwards before them u64; then for each row flags u8 (1: valid, 2: scales follow), the scales
  as float32 where they changed, learning rate, coefficients and losses, each in the run's own float32 or float64;
* ``B`` back: the weights become those after an earlier step: step u32, to u32, factor of the learning rate f64;
* ``L`` look: somebody looked at the weights after a step, so that deferred moves were brought into them: step u32.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from zolightning.journal.settings import Settings
from zolightning.optim.history import Row

FILE_NAME = "journal.zo"
MAGIC = b"ZOJOURN1"
_HEAD, _SUM = struct.Struct("<BII"), struct.Struct("<I")
_ROWS, _BACK, _LOOK = struct.Struct("<IIQ"), struct.Struct("<IId"), struct.Struct("<I")
_VALID, _SCALES = 1, 2
_LARGEST = 1 << 30  # bytes of a frame


class Place(NamedTuple):
    """A place between two frames.

    Args:
        offset: Bytes before it.
        checksum: Of everything before it.
    """

    offset: int
    checksum: int


def set_aside(path: Path) -> Path | None:
    """Give the file of an earlier run a name that is free: ``previous.zo``, ``previous-2.zo``, ...

    Args:
        path: The file, if it is there.

    Returns:
        Its new path.
    """
    if not path.exists():
        return None
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    places = (path.with_name(f"previous{number}{path.suffix}") for number in numbers)
    return path.replace(next(place for place in places if not place.exists()))


START = Place(len(MAGIC), zlib.crc32(MAGIC))


class Back(NamedTuple):
    """A return to earlier weights.

    Args:
        step: Steps that had been taken.
        to: The weights become those after so many steps.
        factor: Factor of the learning rate from then on.
    """

    step: int
    to: int
    factor: float


class Look(NamedTuple):
    """Somebody looked at the weights, so that deferred moves were brought into them.

    Args:
        step: Steps that had been taken.
    """

    step: int


class Frame(NamedTuple):
    """What one frame says, and the place behind it; ``forwards`` before its rows."""

    content: Settings | tuple[Row, ...] | Back | Look
    end: Place
    forwards: int = 0


def pack(kind: bytes, payload: bytes, before: int) -> tuple[bytes, int]:
    """A frame, and the checksum that it ends with."""
    head = struct.pack("<BI", kind[0], len(payload))
    first = zlib.crc32(head, before)
    last = zlib.crc32(payload, first)
    return head + _SUM.pack(first) + payload + _SUM.pack(last), last


def pack_rows(rows: Sequence[Row], settings: Settings, scales: Tensor | None, forwards: int) -> bytes:
    """The content of a frame of rows.

    Args:
        rows: At least one, in order.
        settings: Of the run.
        scales: Those of the row before; ``None``: the first row must state its own.
        forwards: Loss evaluations of the run before the first row.
    """
    figure = _figures(settings)
    out = [_ROWS.pack(rows[0].step, len(rows), forwards)]
    for row in rows:
        fresh = scales is None or not same_bits(row.scales, scales)
        out.append(bytes([row.valid * _VALID | fresh * _SCALES]))
        if fresh:
            scales = row.scales
            out.append(scales.contiguous().numpy().astype("<f4").tobytes())
        out.append(figure.pack(row.lr, *row.coefficients, *row.losses))
    return b"".join(out)


def _figures(settings: Settings) -> struct.Struct:
    """Learning rate, coefficients and losses of a row."""
    return struct.Struct(f"<{1 + settings.queries + settings.probes}{'f' if settings.precision == 'float32' else 'd'}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors have the same bits."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def frames(file: BinaryIO, size: int) -> Iterator[Frame]:
    """The whole frames of a file, in order. A frame that was not written to its end, at the end of the file, is left out.

    Args:
        file: Opened at its beginning.
        size: Its size; nothing larger than it is ever allocated.

    Raises:
        ValueError: It is no journal, or there is damage before its end.
    """
    if (magic := file.read(len(MAGIC))) != MAGIC:
        if MAGIC.startswith(magic) or (not any(magic) and _only_zeros(file)):
            return
        raise ValueError("it is no journal")
    at, before, settings, scales = START.offset, START.checksum, None, None
    while True:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return
        kind, length, first = _HEAD.unpack(head)
        if zlib.crc32(head[:5], before) != first or length > _LARGEST:
            if _only_zeros(file):  # a file system that knew the size, but not the content, when the power went
                return
            raise ValueError(f"it is damaged at byte {at:,}")
        if length + _SUM.size > size - file.tell():
            return
        payload, last = file.read(length), file.read(_SUM.size)
        if len(payload) < length or len(last) < _SUM.size:  # it shrank meanwhile
            return
        checksum = zlib.crc32(payload, first)
        if _SUM.pack(checksum) != last:
            if _only_zeros(file):
                return
            raise ValueError(f"it is damaged at byte {at:,}")
        at, before, forwards = file.tell(), checksum, 0
        content: Settings | tuple[Row, ...] | Back | Look
        if kind == ord("S"):
            content = settings = Settings.from_bytes(payload)
            scales = None
        elif settings is None:
            raise ValueError("it does not begin with settings")
        elif kind == ord("R"):
            content, forwards = _unpack_rows(payload, settings, scales)
            scales = content[-1].scales
        elif kind == ord("B") and len(payload) == _BACK.size:
            content = Back(*_BACK.unpack(payload))
            if not (content.to <= content.step and 0 < content.factor < math.inf):
                raise ValueError("it goes back to a later step")
        elif kind == ord("L") and len(payload) == _LOOK.size:
            content = Look(*_LOOK.unpack(payload))
        else:
            raise ValueError(f"it holds a frame of kind {kind}, which this version does not know")
        yield Frame(content, Place(at, checksum), forwards)


def _only_zeros(file: BinaryIO) -> bool:
    return all(not any(chunk) for chunk in iter(lambda: file.read(1 << 20), b""))


def _unpack_rows(payload: bytes, settings: Settings, scales: Tensor | None) -> tuple[tuple[Row, ...], int]:
    figure = _figures(settings)
    if len(payload) < _ROWS.size:
        raise ValueError("a frame of rows is too short")
    first, count, forwards = _ROWS.unpack_from(payload)
    if not count or count * (1 + figure.size) > len(payload) - _ROWS.size:
        raise ValueError("a frame of rows is too short")
    rows, at, width = [], _ROWS.size, 4 * len(settings.blocks)
    for step in range(first, first + count):
        flags = payload[at] if at < len(payload) else 0
        at += 1
        if flags & _SCALES:
            if at + width > len(payload):
                raise ValueError("a frame of rows is too short")
            scales = torch.frombuffer(bytearray(payload[at : at + width]), dtype=torch.float32)
            at += width
        if scales is None or at + figure.size > len(payload) or flags > _VALID | _SCALES:
            raise ValueError("a frame of rows does not hold together")
        lr, *values = figure.unpack_from(payload, at)
        at += figure.size
        rows.append(Row(step, bool(flags & _VALID), lr, tuple(values[: settings.queries]), tuple(values[settings.queries :]), scales))
    if at != len(payload):
        raise ValueError("a frame of rows is too long")
    return tuple(rows), forwards


class Appender:
    """Appends frames to a journal; the file holds whole frames at any time, or a last one that readers leave out.

    What :meth:`append` writes survives the death of the process; :meth:`sync` makes it survive that of the machine.

    Args:
        path: The file.
        place: Where to go on, of :func:`frames`; what is behind it is cut off. ``None``: a new file.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, place: Place | None = None) -> None:
        self.path = path
        flags = os.O_RDWR if place is not None else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o644)
        self.place = place if place is not None else START
        if place is None:
            self._write(MAGIC, 0)
        else:
            os.ftruncate(self._file, place.offset)

    def append(self, *parts: tuple[bytes, bytes]) -> None:
        """Write frames, all of them at once.

        Args:
            parts: Kind and content of each.

        Raises:
            OSError: The disk is full, or gone; the file then ends where it ended before.
        """
        out, checksum = b"", self.place.checksum
        for kind, payload in parts:
            data, checksum = pack(kind, payload, checksum)
            out += data
        self._write(out, self.place.offset)
        self.place = Place(self.place.offset + len(out), checksum)

    def _write(self, data: bytes, offset: int) -> None:
        try:
            os.lseek(self._file, offset, os.SEEK_SET)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, offset)
            raise

    def sync(self) -> None:
        """Wait until the disk has everything, the file's name too."""
        os.fsync(self._file)
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def sync_file(path: Path) -> None:
    """Wait until the disk has a file's content."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names of a folder's files."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def pack_back(back: Back) -> bytes:
    """The content of a frame that goes back."""
    return _BACK.pack(*back)


def pack_look(step: int) -> bytes:
    """The content of a frame that looks."""
    return _LOOK.pack(step)
