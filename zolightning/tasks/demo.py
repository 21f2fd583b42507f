"""The task of the quickstart: its rows come with the package."""

from __future__ import annotations

from pathlib import Path

from .template import TemplateTask

_ROWS = Path(__file__).parents[1] / "demo" / "data"


class Demo(TemplateTask):
    """What is a sentence about: sports, history, science or film? Rows and model are shipped; see ``zolightning/demo/README.md``."""

    files = (str(_ROWS / "train.jsonl.gz"), str(_ROWS / "validation.jsonl.gz"))

    def __init__(self) -> None:
        super().__init__(prompt="{text}. this is about", candidates=[" sports", " history", " science", " film"], label="label")
