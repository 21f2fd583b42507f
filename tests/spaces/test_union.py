"""UnionSpace, and the rest of a quantised model that is not packed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, bits, lm_closure, net_closure, tiny
from quantised import KINDS, packed_bits, quantised, scale_bits
from test_adapters import awake

import zolightning as zl
from zolightning.testing import check_space

NORMS = partial(zl.DenseSpace, include=["*norm*"])
UNIONS: dict[str, list[Callable[..., zl.Space]]] = {
    "scales and rest": [zl.QuantScaleSpace, zl.DenseSpace],
    "adapters and norms": [zl.AdapterSpace, NORMS],
    "scales, prefix and norms": [zl.QuantScaleSpace, partial(zl.AdapterSpace, kind="prefix"), NORMS],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest(tiny_folder: str, kind: str) -> None:
    """DenseSpace on a quantised model moves norms and embeddings; packed weights and scales keep their bits."""
    model = quantised(tiny_folder, kind)
    before = packed_bits(model), scale_bits(model)
    space = zl.DenseSpace(model)
    assert {block.name.split(".")[-2] for block in space.blocks} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    check_space(space, lm_closure(model))
    zl.ZOOptimizer(space, lr=1e-3, eps=1e-3).step(lm_closure(model))
    assert (packed_bits(model), scale_bits(model)) == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("spaces", UNIONS)
def test_common(tiny_folder: str, kind: str, spaces: str) -> None:
    model = quantised(tiny_folder, kind)
    packed = packed_bits(model)
    space = awake(zl.UnionSpace(model, UNIONS[spaces]))
    check_space(space, lm_closure(space.model), 2e-2)
    old = [bits(block.tensor) for block in space.blocks]
    zl.ZOOptimizer(space, lr=1e-3, eps=1e-3).step(lm_closure(space.model))
    assert all(bits(block.tensor) != before for block, before in zip(space.blocks, old, strict=True))
    assert packed_bits(model) == packed


def test_parts_are_the_whole() -> None:
    """A network cut in two moves as it does in one piece, under any scales."""

    class Uneven(zl.GaussianSampler):
        def scales(self) -> torch.Tensor:
            return torch.tensor([0.5 + sum(map(ord, block.name)) % 7 for block in self.blocks])

    ends = []
    for make in (
        zl.DenseSpace,
        partial(zl.UnionSpace, spaces=[partial(zl.DenseSpace, include=["last.*"]), partial(zl.DenseSpace, exclude=["last.*"])]),
    ):
        model = Net().eval()
        optimizer = zl.ZOOptimizer(make(model), Uneven(), zl.TwoPoint(2), lr=1e-2, eps=1e-3, rule=zl.SGD(weight_decay=0.1))
        for step in range(3):
            optimizer.step(net_closure(model, step))
        ends.append({name: bits(parameter) for name, parameter in model.named_parameters()})
    assert ends[0] == ends[1]


def test_both_signs_in_one_forward() -> None:
    """Weights and biases of the same modules lie in different spaces; packed weights cannot do it."""
    model, other = Net().eval(), Net().eval()
    whole = zl.DenseSpace(other, exclude=["scale"])
    assert not zl.UnionSpace(other, [partial(zl.DenseSpace, include=["scale"])]).pairable  # on the root, with modules inside
    union = zl.UnionSpace(model, [partial(zl.DenseSpace, include=["*.bias"]), partial(zl.DenseSpace, include=["*.weight"])])
    outputs = []
    for net, space in ((model, union), (other, whole)):
        assert space.pairable
        sampler = zl.GaussianSampler()
        sampler.bind(space)
        with torch.no_grad(), space.pair(sampler.directions(0, 0, 1)[0], 0.1):
            outputs.append(net(torch.ones(2, 5)))
        assert type(net.first) is torch.nn.Linear
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0][0], outputs[0][1])


def test_the_report_is_of_all_parts() -> None:
    model = Net().eval()
    model.spare = torch.nn.Linear(2, 2)
    space = zl.UnionSpace(model, [partial(zl.DenseSpace, include=["spare.*"]), partial(zl.DenseSpace, exclude=["spare.*"])])
    sampler = zl.GaussianSampler()
    sampler.bind(space)
    along = sampler.directions(0, 0, 1)[0]
    with torch.no_grad():
        report = space.verify(net_closure(model), along, 1e-2)
        with space.probe(along, 1e-2):
            assert report.loss == float(net_closure(model)())
    assert report.unread == ["spare.weight", "spare.bias"]
    assert report.resolved == 1


@pytest.mark.parametrize(
    ("spaces", "text"),
    [
        ([], "nothing to move: a UnionSpace needs at least one space"),
        (
            [zl.DenseSpace, partial(zl.DenseSpace, include=["norm.*"])],
            "two spaces move 'norm.weight'; leave it out of one of them with exclude",
        ),
    ],
)
def test_refusals(spaces: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        zl.UnionSpace(Net(), spaces)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_biases_of_packed_modules(tmp_path: Path, kind: str) -> None:
    """They move beside packed weights that do not; such a module cannot show both signs in one forward."""
    tiny("qwen2").save_pretrained(tmp_path)
    model = quantised(str(tmp_path), kind)
    packed = packed_bits(model)
    space = zl.DenseSpace(model, include=["*.bias"])
    assert len(space.blocks) == 6
    with torch.no_grad():
        for block in space.blocks:
            block.tensor.normal_()
    check_space(space, lm_closure(model), 0.1)
    assert packed_bits(model) == packed
    assert not space.pairable
