"""The table and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zolightning.policies import BlockInfo, Features, PertNN, Table, Uniform, multipliers, picture, settled, text_table
from zolightning.policies.__main__ import main

BLOCKS = [
    BlockInfo("model.embed_tokens.weight", (2, 4)), BlockInfo("model.layers.0.q_proj.weight", (2, 4)),
    BlockInfo("model.layers.0.in_norm.weight", (4,)), BlockInfo("model.layers.0.out_norm.weight", (4,)),
    BlockInfo("model.layers.1.q_proj.weight", (2, 4)),
]  # fmt: skip


def example() -> Table:
    table = Table.of(BLOCKS, torch.tensor([0.0, 1.0, 1.0, 3.0, 2.0]))
    table.base_model = "me/model"
    return table


def test_settled_is_a_fixed_point() -> None:
    policy = PertNN().bind(BLOCKS)
    features = Features.reference(BLOCKS)
    raw = settled(policy, features).clone()
    assert torch.allclose(policy(features), raw, atol=1e-6)


def test_multipliers_have_mean_one() -> None:
    values = multipliers(example())
    sizes = torch.tensor([8.0, 8.0, 4.0, 4.0, 8.0])
    assert float((sizes * values).sum() / sizes.sum()) == pytest.approx(1)


def test_table() -> None:
    """The factors are 32 / (8*1 + 4*1 + 4*9 + 8*4) = .4 times the squares."""
    assert text_table(example()).splitlines() == [
        "Table, 5 parameters, 5 blocks, for me/model",
        "factor on the learning rate at loss 0.5",
        "",
        "layer         q      norm",
        "    0       0.4         2",
        "    1       1.6          ",
        f"{'model.embed_tokens.weight':<40}{0:>10}",
    ]
    assert "shapes not recorded" in text_table(Uniform().bind([BlockInfo("a")]))
    with pytest.raises(ValueError, match="has nothing to show"):
        text_table(Uniform())


@pytest.mark.parametrize("policy", [example(), Uniform().bind(BLOCKS[:1]), Uniform().bind(BLOCKS[1:])], ids=["all", "outside", "inside"])
def test_picture(policy: Table | Uniform, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(policy, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(example().save_pretrained(tmp_path / "p.safetensors"))
    assert main([path, "--png", str(tmp_path / "p.png"), "--save", str(tmp_path / "q.safetensors")]) == 0
    assert capsys.readouterr().out.startswith("Table, 5 parameters")
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    assert (tmp_path / "p.png").exists()
    assert main(["missing.safetensors"]) == 2
    assert capsys.readouterr().err == "error: policy 'missing.safetensors' is neither a file nor a shipped policy (smollm2-135m-instruct)\n"
