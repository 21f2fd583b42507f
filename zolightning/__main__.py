"""``python -m zolightning``."""

from zolightning.cli import run

run()
