"""A journal as a whole, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from zolightning.journal.file import START, Back, Frame, Look, Place, frames
from zolightning.journal.settings import Settings
from zolightning.optim.history import Row


class Entry(NamedTuple):
    """A step, and the settings that it was made with."""

    row: Row
    settings: Settings


@dataclass
class Journal:
    """Everything that a journal's file says.

    Args:
        path: The file.
        entries: All steps, in order, without a gap.
        backs: All returns to earlier weights, in order.
        looks: Steps at which somebody looked at the weights, so that deferred moves were brought into them.
        torn: Bytes at the end that were not written whole.
        forwards: Loss evaluations of the run.
        all_settings: Those that it begins with, and each that follows.
    """

    path: Path
    entries: list[Entry] = field(default_factory=list)
    backs: list[Back] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    torn: int = 0
    forwards: int = 0
    all_settings: list[Settings] = field(default_factory=list)
    _known: dict[Place, int] = field(default_factory=lambda: {START: 0})  # steps at each place
    _in_force: dict[Place, Settings] = field(default_factory=dict)  # the settings that hold from each place on

    @property
    def first(self) -> Settings:
        """The settings that it begins with."""
        return self.all_settings[0]

    @property
    def steps(self) -> int:
        """Where it ends."""
        return self.first.start + len(self.entries)

    @property
    def end(self) -> Place:
        """The end of its last whole frame."""
        return max(self._known)

    def knows(self, place: Place, step: int) -> bool:
        """Whether it is the journal that had a place when a run stood at a step.

        Args:
            place: End of the journal at that time.
            step: Steps that the run had taken; the journal may have had more.
        """
        return self.first.start <= step <= self._known.get(place, -1)

    def cut(self, step: int) -> tuple[Place, list[Row]]:
        """Where to cut the file to go on from a step.

        Args:
            step: Steps to keep.

        Returns:
            The last place before that step, and the rows between the two.
        """
        steps, place = max((steps, place) for place, steps in self._known.items() if steps <= step)
        return place, [entry.row for entry in self.entries[steps - self.first.start : step - self.first.start]]

    def settings_at(self, place: Place) -> Settings | None:
        """The settings that steps written at a place would be read with, perhaps those of no step so far; none at the start."""
        return self._in_force.get(place)

    def surviving(self, until: int | None = None) -> list[Entry]:
        """The steps that made the weights as they are after a step; those that were taken back are left out.

        Args:
            until: Steps; ``None``: all.
        """
        until = self.steps if until is None else until
        lost = {step for back in self.backs if back.step <= until for step in range(back.to, back.step)}
        return [entry for entry in self.entries if entry.row.step < until and entry.row.step not in lost]

    def surviving_looks(self, until: int | None = None) -> list[int]:
        """Those of :attr:`looks` that belong to :meth:`surviving`."""
        until = self.steps if until is None else until
        lost = [range(back.to + 1, back.step) for back in self.backs if back.step <= until]
        return [step for step in self.looks if step <= until and not any(step in part for part in lost)]

    def add(self, frame: Frame) -> None:
        """Take over the next frame.

        Raises:
            ValueError: It does not follow from those before.
        """
        content = frame.content
        if isinstance(content, Settings):
            if self.all_settings and (content.blocks, content.precision) != (self.first.blocks, self.first.precision):
                raise ValueError("it is of two sets of blocks")
            self.all_settings.append(content)
        elif isinstance(content, Back):
            if content.step != self.steps or content.to < self.first.start:
                raise ValueError(f"it goes back from step {content.step} to {content.to}, but stands at {self.steps}")
            self.backs.append(content)
        elif isinstance(content, Look):
            if content.step != self.steps:
                raise ValueError(f"it looks at the weights of step {content.step}, but stands at {self.steps}")
            self.looks.append(content.step)
        else:
            if content[0].step != self.steps:
                raise ValueError(f"step {content[0].step} follows on {self.steps} steps")
            self.entries += [Entry(row, self.all_settings[-1]) for row in content]
            self.forwards = frame.forwards + len(content) * self.all_settings[-1].probes
        self._known[frame.end], self._in_force[frame.end] = self.steps, self.all_settings[-1]


def read(path: str | Path) -> Journal:
    """Read a journal.

    Args:
        path: The file.

    Raises:
        ValueError: There is none, it is damaged before its end, or it does not hold together.
    """
    path = Path(path)
    journal = Journal(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            for frame in frames(file, size):
                journal.add(frame)
    except FileNotFoundError as error:
        raise ValueError(f"journal {str(path)!r} does not exist") from error
    except OSError as error:
        raise ValueError(f"journal {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        where = f", after {journal.steps} whole steps" if journal.all_settings else ""
        raise ValueError(f"journal {str(path)!r}: {error}{where}") from error
    journal.torn = max(size - journal.end.offset, 0)
    return journal


def whole(path: str | Path) -> Journal:
    """Read a journal that has at least its settings.

    Raises:
        ValueError: As for :func:`read`, or it has no whole record.
    """
    journal = read(path)
    if not journal.all_settings:
        raise ValueError(f"journal {str(path)!r} holds no whole record")
    return journal
