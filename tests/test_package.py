"""The package as a whole: what imports what, and what it can do without."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "zolightning"
#: Each part imports only from parts before it (and from itself).
HOUSE = (
    "noise", "blocks", "kernels", "policies", "samplers", "spaces", "objectives", "estimators", "optim", "models", "journal", "tasks",
    "modules", "callbacks", "strategies", "export", "testing", "messages", "replaying", "command", "cli", "__main__",
)  # fmt: skip
LIGHTNING_FROM = HOUSE.index("tasks")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, type-checking blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["zolightning", *path.relative_to(PACKAGE).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *([node.module] if node.module else [])]))
            names |= {".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_house(path: Path) -> None:
    """A file imports only from parts above its own, and lightning from the tasks on."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    at = HOUSE.index(part)
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "zolightning" and (target := rest.split(".")[0]) in HOUSE:
            assert HOUSE.index(target) <= at, f"{path} imports {name}"
        if head == "lightning":
            assert at >= LIGHTNING_FROM, f"{path} imports {name}"


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)


def test_runs_without_the_extras() -> None:
    """A step in bfloat16 without triton, bitsandbytes and peft."""
    done = python(
        "import sys\n"
        "for name in ('triton', 'bitsandbytes', 'peft'): sys.modules[name] = None\n"
        "import torch, zolightning as zl\n"
        "names = [getattr(zl, name) for name in zl.__all__]\n"
        "net = torch.nn.Linear(40, 3).bfloat16().eval()\n"
        "x, before = torch.randn(8, 40).bfloat16(), net.weight.clone()\n"
        "zl.ZOOptimizer(zl.DenseSpace(net), lr=1e-3, eps=1e-2).step(lambda: net(x).float().square().mean())\n"
        "assert not torch.equal(before, net.weight)\n"
    )
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    """The step alone needs neither Lightning nor transformers."""
    done = python(
        "import sys, zolightning as zl\n"
        "zl.ZOOptimizer, zl.DenseSpace, zl.GaussianSampler, zl.TwoPoint, zl.SGD\n"
        "assert not {'lightning', 'transformers', 'datasets', 'torchmetrics'} & set(sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr
