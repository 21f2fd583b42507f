"""The record of a run, and how to rebuild its weights from it."""

from zolightning.journal.contents import Entry, Journal, read
from zolightning.journal.file import FILE_NAME, Back, Place
from zolightning.journal.rebuild import replay
from zolightning.journal.recorder import Recorder
from zolightning.journal.settings import Settings, fingerprint

__all__ = ["FILE_NAME", "Back", "Entry", "Journal", "Place", "Recorder", "Settings", "fingerprint", "read", "replay"]
