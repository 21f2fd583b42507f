"""The published files: read as data, and with the numbers that they are known to give."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zolightning.policies import BlockInfo, Features, PertNN, controls, import_published, settled

FILE = Path(os.environ.get("ZOLIGHTNING_PUBLISHED", "/work/shared/data/published_policies/llama1B_finetuner.pth"))
needs_file = pytest.mark.skipif(not FILE.is_file(), reason="the authors' file states no licence, so it does not come along")


def llama_1b(names: list[str]) -> list[BlockInfo]:
    """Blocks of Llama-3.2-1B."""
    hidden, inner, key = 2048, 8192, 512
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (128256, hidden), "q": (hidden, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, hidden),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner), "norm": (hidden,),
    }  # fmt: skip
    return [BlockInfo(name, shapes[BlockInfo(name).kind]) for name in names]


@needs_file
def test_known_numbers() -> None:
    loaded = import_published(FILE)
    assert (len(loaded.blocks), loaded.n_params) == (146, 65554)
    policy = loaded.bind(llama_1b([block.name for block in loaded.blocks]))
    raw = settled(policy, Features.reference(policy.blocks, loss=0.5))
    assert torch.allclose(policy(Features.reference(policy.blocks, loss=0.5)), raw, atol=0.2), "one step is near the fixed point"
    assert float((policy.normalise(raw) / raw)[0]) == pytest.approx(4.389, abs=1e-3)
    found = {block.name: float(value) for block, value in zip(policy.blocks, raw, strict=True)}
    assert found["model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.543, abs=5e-4)
    assert found["model.embed_tokens.weight"] == pytest.approx(0.147, abs=5e-4)


@needs_file
def test_they_have_hardly_left_their_initial_values() -> None:
    """Which shows at once that ours are the paper's: it drew them on four GPUs, each from the start."""
    policy = import_published(FILE)
    changes = []
    for first, last in ((None, -1), (0, 5), (6, 11), (12, 15)):
        there = [
            i
            for i, block in enumerate(policy.blocks)
            if (block.kind == "embedding" if first is None else block.layer is not None and first <= block.layer <= last)
        ]
        fresh = controls.untrained().bind([policy.blocks[i] for i in there])
        a, b = (
            torch.cat([getattr(p, name).detach()[index].reshape(len(there), -1) for name in policy.per_block], dim=1)
            for p, index in ((policy, there), (fresh, slice(None)))
        )
        changes += ((a - b).norm(dim=1) / b.norm(dim=1)).tolist()
    assert len(changes) == 145
    assert sorted(changes)[72] < 1e-3
    assert max(changes) < 0.05


def nets(dtype: torch.dtype = torch.float32, count: int = 3, **sizes: int) -> dict[str, nn.Sequential]:
    hidden = sizes.get("hidden", 64)
    return {
        f"layers.{i}.weight": nn.Sequential(nn.Linear(sizes.get("inputs", 5), hidden), nn.Tanh(), nn.Linear(hidden, 1)).to(dtype)
        for i in range(count)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [64, 7])
def test_what_torch_saves_comes_back(dtype: torch.dtype, hidden: int, tmp_path: Path) -> None:
    saved = nets(dtype, hidden=hidden)
    torch.save(saved, tmp_path / "p.pth")
    policy = import_published(tmp_path / "p.pth")
    assert isinstance(policy, PertNN)
    assert [block.name for block in policy.blocks] == list(saved)
    assert (policy.hidden, policy.normaliser.rule, policy.weight_in.dtype) == (hidden, "published", torch.float32)
    for i, net in enumerate(saved.values()):
        for parameter, name in zip(net.parameters(), policy.per_block, strict=True):
            assert torch.equal(parameter.detach().float().flatten(), getattr(policy, name)[i].detach().flatten())


class Runs:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / 'ran'}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", data)
        for name, content in members.items():
            file.writestr(f"x/{name.replace('__', '/')}", content)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        import_published(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"policy {str(path)!r}")
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_commands_are_refused(protocol: int, tmp_path: Path) -> None:
    nested = {"layers.0.weight": OrderedDict([("a", [1, (2, Runs(tmp_path))])])}
    for content in (Runs(tmp_path), {"a": Runs(tmp_path)}, nested):
        path = archive(tmp_path / "p.pth", pickle.dumps(content, protocol=protocol))
        refused(path, "which a policy does not need")
    assert not (tmp_path / "ran").exists()


def test_what_torch_saves_with_a_command_inside(tmp_path: Path) -> None:
    path = tmp_path / "p.pth"
    saved = nets()
    saved["layers.0.weight"].extra = Runs(tmp_path)  # type: ignore[assignment]
    torch.save(saved, path)
    refused(path, "wants 'posix.system'")
    net: Any = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    torch.save({"a": net}, path)
    refused(path, "wants 'torch.nn.modules.activation.ReLU'")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "its pickle has the instruction APPENDS, which a policy does not need"),
        (1, "its pickle is no dictionary of networks"),
        ({}, "its pickle is no dictionary of networks"),
        ({1: 2}, "its pickle is not that of a policy"),
        ({"a": 2}, "one of its networks is not Linear, Tanh, Linear"),
        ({"a": OrderedDict()}, "one of its networks is not Linear, Tanh, Linear"),
    ],
)
def test_other_pickles(content: Any, message: str, tmp_path: Path) -> None:
    refused(archive(tmp_path / "p.pth", pickle.dumps(content, protocol=2)), message)


def test_other_networks(tmp_path: Path) -> None:
    path = tmp_path / "p.pth"
    for saved, message in (
        ({"a": nn.Sequential(nn.Linear(5, 4), nn.Tanh())}, "one of its networks is not Linear, Tanh, Linear"),
        ({"a": nn.Linear(5, 4)}, "one of its networks is not Linear, Tanh, Linear"),
        (nets(inputs=6), "the network of 'layers.0.weight' has tensors of shapes [(64, 6), (64,), (1, 64), (1,)]"),
        ({**nets(count=1), "b": nets(count=1, hidden=3)["layers.0.weight"]}, "the network of 'b' has tensors of shapes [(3, 5)"),
        (nets(torch.float64), "wants 'torch.DoubleStorage'"),
        (nets(torch.bfloat16), "wants 'torch.BFloat16Storage'"),
        ({"a": torch.zeros(3)}, "one of its networks is not Linear, Tanh, Linear"),
    ):
        torch.save(saved, path)
        refused(path, message)
    saved = nets()
    saved["layers.1.weight"][0].weight.data[3, 2] = float("nan")  # type: ignore[union-attr,index,operator]
    torch.save(saved, path)
    refused(path, "one of its tensors is not finite")
    saved = nets()
    saved["layers.1.weight"][0].weight.data = torch.zeros(5, 64).t()  # type: ignore[union-attr]
    torch.save(saved, path)
    refused(path, "one of its tensors is a view of another")


def rewritten(path: Path, **replaced: bytes | None) -> Path:
    """A real archive with some members replaced or left out."""
    torch.save(nets(count=1), path)
    with zipfile.ZipFile(path) as file:
        members = {info.filename.partition("/")[2]: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {**members, **{key.replace("__", "/"): value for key, value in replaced.items()}}.items():
            if content is not None:
                file.writestr(f"x/{name}", content)
    return path


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "p.pth"
    assert import_published(rewritten(path)).n_params == 449
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[: len(whole) // 2], whole[100:-30]):
        path.write_bytes(content)
        refused(path, "is no torch archive, or damaged")
    refused(tmp_path / "missing.pth", "does not exist")
    refused(rewritten(path, data__0=b"1234"), "has 320 elements, but 4 bytes")
    refused(rewritten(path, data__0=None), "its pickle is not that of a policy")
    refused(rewritten(path, byteorder=b"big"), "its numbers are not little-endian")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/version", b"3")
    refused(path, "it holds 0 pickles instead of one")
    for cut in (1, 10, 200):
        with zipfile.ZipFile(rewritten(path)) as file:
            data = file.read("x/data.pkl")[:-cut]
        refused(rewritten(path, **{"data.pkl": data}), f"policy {str(path)!r}: ")


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "p.pth"
    refused(archive(path, b"0" * (1 << 20), zipfile.ZIP_DEFLATED), "it holds compressed members, which torch does not write")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zolightning.policies.published._LARGEST", 1 << 16)
        refused(archive(path, b"0" * (1 << 20)), "it unpacks to 1,048,576 bytes; more than 65,536 is no policy")
    # A memo index of four thousand million, which Python's own unpickler makes room for.
    refused(archive(path, b"\x80\x02}r\xff\xff\xff\xff."), "its pickle is no dictionary of networks")
    # Text said to be longer than the file.
    refused(archive(path, b"\x80\x02X\xff\xff\xff\x7fabc."), "expected 2147483647 bytes in a unicodestring4")
    # Tuples inside tuples: to hash or to print them would take for ever.
    nested = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))
    refused(archive(path, b"\x80\x02}" + nested[2:] + b"K\x01s."), "its pickle is not that of a policy")
