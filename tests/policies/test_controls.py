"""What a learned policy must beat."""

from __future__ import annotations

import pytest
import torch

from zolightning.policies import BlockInfo, Features, controls

NAMES = ("model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)), "model.norm.weight", "lm_head.weight")
BLOCKS = [BlockInfo(name, (4, 3)) for name in NAMES]


def test_upper_half() -> None:
    """Of five layers the last two and the final norm."""
    values = controls.upper_half(BLOCKS).values.tolist()
    assert dict(zip(NAMES, values, strict=True)) == {
        "model.embed_tokens.weight": 0, "model.layers.0.mlp.up_proj.weight": 0, "model.layers.1.mlp.up_proj.weight": 0,
        "model.layers.2.mlp.up_proj.weight": 0, "model.layers.3.mlp.up_proj.weight": 1, "model.layers.4.mlp.up_proj.weight": 1,
        "model.norm.weight": 1, "lm_head.weight": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no block is in a layer, so there is no upper half"):
        controls.upper_half(BLOCKS[-2:])


def test_uniform_and_untrained() -> None:
    features = Features.reference(BLOCKS)
    assert torch.equal(controls.uniform().bind(BLOCKS)(features), torch.ones(8))
    assert controls.untrained().seed == 42
    assert float(controls.untrained().bind(BLOCKS)(features).detach().std()) > 0.05


def test_closed_form() -> None:
    blocks = [BlockInfo("a", (2,)), BlockInfo("b", (3,)), BlockInfo("c", (5,))]
    gradient, fisher = {"a": 1.0, "b": 4.0, "c": -0.1}, {"a": 2.0, "b": 2.0, "c": 6.0}
    values = controls.closed_form(blocks, gradient, fisher).values
    assert values.square().tolist() == pytest.approx([0.25, 1.0, 0.0])
    values = controls.closed_form(blocks, gradient, fisher, floor=0.1).values
    assert values.square().tolist() == pytest.approx([0.25, 1.0, 0.1])
    ratios = [1 / (2 + 0.5 * 2), 4 / (2 + 0.5 * 3), 0]  # an average element has F = 1
    values = controls.closed_form(blocks, gradient, fisher, damping=0.5).values
    assert values.square().tolist() == pytest.approx([ratio / ratios[1] for ratio in ratios])
    values = controls.closed_form(blocks, {"a": 0.0, "b": 1.0, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 1.0}).values
    assert values.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("gradient", "fisher", "options", "message"),
    [
        ({"a": 1.0}, {}, {}, "block 'a' has no statistics"),
        ({"a": float("nan")}, {"a": 1.0}, {}, "block 'a' has G=nan and F=1.0"),
        ({"a": 1.0}, {"a": -1.0}, {}, r"block 'a' has G=1.0 and F=-1.0"),
        ({"a": -1.0}, {"a": 1.0}, {}, "no block has a positive gradient statistic"),
        ({"a": 1.0}, {"a": 1.0}, {"damping": -1}, "damping=-1 must be finite and not negative"),
        ({"a": 1.0}, {"a": 1.0}, {"floor": 2}, "floor=2 must be between 0 and 1"),
    ],
)
def test_bad_statistics(gradient: dict[str, float], fisher: dict[str, float], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controls.closed_form([BlockInfo("a", (2,))], gradient, fisher, **options)
