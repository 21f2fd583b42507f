"""``python -m zolightning``."""

from zolightning.cli import main

main()
