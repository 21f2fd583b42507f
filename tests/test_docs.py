"""The examples of the documentation run."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def test_examples_of_extending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks after a file's name are files, and import; the blocks that put them through the common tests run."""
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before, ran = set(sys.modules), 0
    try:
        found = re.findall(r"(?:`(\w+\.py)`:\n\n)?```python\n(.*?)```", text, re.S)
        for name, code in found:
            if name:
                (tmp_path / name).write_text(code, encoding="utf-8")
        for name, code in found:
            if name:
                importlib.import_module(name.removesuffix(".py"))
            elif "zolightning.testing" in code:
                exec(compile(code, "docs/extending.md", "exec"), {"__name__": "example"})
                ran += 1
    finally:
        for module in set(sys.modules) - before:
            if (tmp_path / f"{module}.py").exists():
                del sys.modules[module]
    assert ran >= 4
    assert len(list(tmp_path.glob("*.py"))) >= 6
