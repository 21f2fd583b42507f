"""The backward that hands over one block at a time: the same numbers as autograd's, one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from meta import Scale, bound, plain_gradients, token_batch, weights_of
from nets import hook_count, state_bits, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import zolightning as zl
from zolightning import kernels
from zolightning.modules.gradient import Gradient
from zolightning.modules.gradients import backward
from zolightning.modules.readers import ClippedStep, InnerProducts, SquaredNorms, Sum
from zolightning.modules.shift import Shift
from zolightning.samplers.base import Direction

FAMILIES = [("llama", False), ("llama", True), ("opt", True), ("gpt2", True), ("qwen2", False)]


class Collect:
    """A reader that keeps everything, put together from the pieces."""

    def __init__(self, space: zl.DenseSpace) -> None:
        self.space, self.seen = space, dict[str, Tensor]()

    def __call__(self, index: int, gradient: Gradient) -> None:
        block = self.space.blocks[index]
        assert block.name not in self.seen, "handed over twice"
        walks = [torch.cat([piece for _, _, piece in gradient.pieces()]) for _ in range(2)]
        assert torch.equal(*walks)
        edges = [(start, stop) for start, stop, _ in gradient.pieces()]
        assert [0, *(stop for _, stop in edges)] == [*(start for start, _ in edges), block.numel]
        self.seen[block.name] = walks[0].view_as(block.tensor)


def direction_of(space: zl.DenseSpace, seed: int = 5) -> Direction:
    scales = torch.linspace(0.2, 2.0, len(space.blocks))
    return Direction(zl.GaussianSampler(), seed, 3, 0, scales)


def moved(space: zl.DenseSpace, direction: Direction, distance: float) -> dict[str, Tensor]:
    """``theta + distance u`` with full-size noise."""
    out = {}
    for index, block in enumerate(space.blocks):
        z = direction.noise(block).draw(0, block.numel, torch.device("cpu")).double().view_as(block.tensor)
        out[block.name] = (block.tensor.detach() + distance * direction.scales[index].double() * z).requires_grad_()
    return out


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("large", [1 << 26, 1])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
class TestGradients:
    def test_at_the_weights(self, family: str, tied: bool, large: int, checkpoint: bool) -> None:
        model, batch = tiny(family, torch.float64, tied), token_batch()
        space = zl.DenseSpace(model)
        before, reader = state_bits(model), Collect(space)
        loss = backward(space, bound(model, batch), reader, checkpoint=checkpoint, large=large)
        torch.testing.assert_close(reader.seen, plain_gradients(model, batch), rtol=1e-10, atol=1e-13)
        with torch.no_grad():
            assert float(loss) == pytest.approx(float(bound(model, batch)()), abs=1e-12)
        assert not loss.requires_grad
        assert state_bits(model) == before
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def test_at_a_shifted_point(self, family: str, tied: bool, large: int, checkpoint: bool) -> None:
        model, batch = tiny(family, torch.float64, tied), token_batch()
        space = zl.DenseSpace(model)
        direction, before, reader = direction_of(space), state_bits(model), Collect(space)
        loss = backward(space, bound(model, batch), reader, shift=Shift(space, direction, 0.03), checkpoint=checkpoint, large=large)
        expected = plain_gradients(model, batch, moved(space, direction, 0.03))
        torch.testing.assert_close(reader.seen, expected, rtol=1e-9, atol=1e-12)
        with torch.no_grad(), space.probe(direction, 0.03):
            assert float(loss) == pytest.approx(float(bound(model, batch)()), abs=1e-12)
        assert state_bits(model) == before
        assert hook_count(model) == 0
        assert "forward" not in {name for module in model.modules() for name in module.__dict__}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("large", [1 << 26, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_candidates_read_rows_of_the_head(tied: bool, large: int, checkpoint: bool) -> None:
    """The objective looks rows of the head up instead of multiplying with all of it."""
    model, other = tiny("gpt2", torch.float64, tied), tiny("gpt2", torch.float64, tied)
    batch = {key: value for key, value in token_batch().items() if key != "scored"}
    batch |= {"candidates": torch.tensor([[5, 9]]).repeat(4, 1), "label": torch.tensor([0, 1, 1, 0])}
    space, objective = zl.DenseSpace(model), zl.CandidateCrossEntropy()
    direction, reader = direction_of(space), Collect(space)
    loss = objective.on(model, batch)
    value = backward(space, loss, reader, shift=Shift(space, direction, 0.03), checkpoint=checkpoint, large=large)
    with torch.no_grad():
        for name, tensor in moved(space, direction, 0.03).items():
            other.get_parameter(name).copy_(tensor)
        with space.probe(direction, 0.03):
            assert float(value) == pytest.approx(float(loss()), abs=1e-12)
    objective.on(other, batch)().backward()
    torch.testing.assert_close(reader.seen, {name: p.grad for name, p in other.named_parameters()}, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Near the float32 gradients of the same weights; small float16 ones do not vanish."""
    model, batch = tiny("llama", dtype), token_batch()
    space = zl.DenseSpace(model)
    reader = Collect(space)
    backward(space, bound(model, batch), reader)
    expected = plain_gradients(model.float(), batch)
    for name, gradient in reader.seen.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.99
        assert float(gradient.norm() / expected[name].norm()) == pytest.approx(1, abs=0.05)


class TestReaders:
    def test_scalars(self) -> None:
        model, batch = tiny("llama", torch.float64, True), token_batch()
        space = zl.DenseSpace(model)
        direction = direction_of(space)
        norms, products, total = SquaredNorms(space), InnerProducts(space, direction), Sum(space)
        for seed in (1, 2):
            backward(space, bound(model, token_batch(seed=seed)), norms, products, total)
        gradients = [plain_gradients(model, token_batch(seed=seed)) for seed in (1, 2)]
        for index, block in enumerate(space.blocks):
            z = direction.noise(block).draw(0, block.numel, torch.device("cpu")).double()
            a, b = (g[block.name].flatten() for g in gradients)
            assert float(norms.values[index]) == pytest.approx(float(a @ a + b @ b), rel=1e-10)
            assert float(products.values[index]) == pytest.approx(float(z @ (a + b)), rel=1e-8, abs=1e-12)
            assert float(total.squared_norms()[index]) == pytest.approx(float((a + b) @ (a + b)), rel=1e-10)
        del batch

    @pytest.mark.parametrize("checkpoint", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("large", [1 << 26, 1])
    def test_clipped_step_is_plain_sgd(self, tied: bool, checkpoint: bool, large: int) -> None:
        """Three steps inside the backward equal three textbook steps with per-block clipping."""
        model = tiny("llama", torch.float64, tied)
        space, weights, clip, lr = zl.DenseSpace(model), weights_of(model), 0.05, 0.3
        for step in range(3):
            batch = token_batch(seed=step)
            backward(space, bound(model, batch), ClippedStep(space, lr, clip, step=step), checkpoint=checkpoint, large=large)
            gradients = plain_gradients(model, batch, weights)
            weights = {
                name: (w - lr * gradients[name] * min(1.0, clip / float(gradients[name].norm()))).detach().requires_grad_()
                for name, w in weights.items()
            }
        for block in space.blocks:
            torch.testing.assert_close(block.tensor.detach(), weights[block.name].detach(), rtol=1e-10, atol=1e-12)

    def test_small_steps_arrive_in_bfloat16(self) -> None:
        """Far below the resolution of the weights, the mean of the rounded steps is the step."""
        layer = nn.Linear(64, 64, bias=False).bfloat16()
        nn.init.constant_(layer.weight, 1.0)
        space, x = zl.DenseSpace(layer), torch.ones(1, 64, dtype=torch.bfloat16)
        for step in range(64):
            backward(space, lambda: layer(x).float().sum(), ClippedStep(space, 1e-4, 1e9, step=step))
        assert float(layer.weight.detach().float().mean()) == pytest.approx(1 - 64 * 1e-4, abs=5e-4)

    def test_a_gradient_that_is_not_finite_changes_nothing(self) -> None:
        layer = nn.Linear(3, 2)
        before, space = state_bits(layer), zl.DenseSpace(layer)
        backward(space, lambda: (layer(torch.ones(1, 3)) * float("inf")).sum(), ClippedStep(space, 0.1, 1.0))
        assert state_bits(layer) == before


class TestScope:
    def test_only_blocks_get_gradients(self) -> None:
        model = tiny("llama", torch.float64)
        space = zl.DenseSpace(model, include=["model.layers.1.*"])
        reader = Collect(space)
        backward(space, bound(model, token_batch()), reader, shift=Shift(space, direction_of(space), 0.01))
        assert reader.seen.keys() == {block.name for block in space.blocks}
        assert all(p.requires_grad and p.grad is None for p in model.parameters())

    def test_an_error_leaves_everything_as_it_was(self) -> None:
        model = tiny("llama", torch.float64)
        space, before = zl.DenseSpace(model), state_bits(model)

        def fail(index: int, gradient: Gradient) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            backward(space, bound(model, token_batch()), fail, shift=Shift(space, direction_of(space), 0.01), checkpoint=True)
        assert state_bits(model) == before
        assert hook_count(model) == 0
        assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())

    def test_checkpoint_needs_decoder_layers(self) -> None:
        layer = nn.Linear(3, 2)
        with pytest.raises(ValueError, match="Linear has no layers that transformers can checkpoint"):
            backward(zl.DenseSpace(layer), lambda: layer(torch.ones(1, 3)).sum(), checkpoint=True)

    @pytest.mark.parametrize("large", [1 << 26, 1])
    def test_a_layer_that_is_used_twice(self, large: int) -> None:
        layer = nn.Linear(3, 3)
        space, x = zl.DenseSpace(layer), torch.randn(2, 3)
        reader = Collect(space)
        backward(space, lambda: layer(layer(x)).square().sum(), reader, large=large)
        expected = torch.autograd.grad(layer(layer(x)).square().sum(), list(layer.parameters()))
        for block, gradient in zip(space.blocks, expected, strict=True):
            torch.testing.assert_close(reader.seen[block.name], gradient)

    def test_arguments_by_name(self) -> None:
        """However a module calls the linear map and the lookup, a large matrix goes by rows."""

        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table, self.map = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 4)
                self.table.forward = lambda ids: F.embedding(weight=self.table.weight, input=ids, padding_idx=0)  # type: ignore[method-assign]
                self.map.forward = lambda x: F.linear(x, bias=self.map.bias, weight=self.map.weight)  # type: ignore[method-assign]

            def forward(self, ids: Tensor) -> Tensor:
                return self.map(self.table(ids)).square().sum()

        model, ids = Named(), torch.tensor([[0, 2, 4]])
        space = zl.DenseSpace(model)
        reader = Collect(space)
        backward(space, lambda: model(ids), reader, large=1)
        expected = torch.autograd.grad(model(ids), [block.tensor for block in space.blocks])
        for block, gradient in zip(space.blocks, expected, strict=True):
            torch.testing.assert_close(reader.seen[block.name], gradient)

    def test_other_uses_of_a_large_matrix_are_refused(self) -> None:
        class Odd(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight.exp()

        layer = Odd(3, 3)
        with pytest.raises(NotImplementedError, match="exp of a large matrix: only linear maps and lookups go by rows"):
            backward(zl.DenseSpace(layer), lambda: layer(torch.ones(1, 3)).sum(), large=1)


class TestOnTheGPU:
    """What the GPU does in another way gives the same numbers."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_of_a_shifted_matrix(self, dtype: torch.dtype) -> None:
        layer = nn.Linear(24, 10, bias=False).to(dtype)
        space = zl.DenseSpace(layer)
        shift = Shift(space, direction_of(space), 0.03)
        whole = shift.block(0)
        assert torch.equal(shift.rows(0, 3, 9), whole[3:9])
        assert torch.equal(shift.take(0, torch.arange(3, 9)), whole[3:9])

    def test_rows_of_a_matrix_beside_wider_ones(self) -> None:
        """A float32 matrix is perturbed in float32, whatever the space's compute type."""
        model = nn.Sequential(nn.Linear(24, 10, bias=False), nn.Linear(10, 2).double())
        space = zl.DenseSpace(model)
        shift = Shift(space, direction_of(space), 0.03)
        assert space.compute_dtype == torch.float64
        assert torch.equal(shift.rows(0, 3, 9), shift.block(0)[3:9])

    @pytest.mark.parametrize("sampler", [zl.GaussianSampler(), zl.RademacherSampler()])
    def test_noise_by_a_kernel(self, sampler: zl.Sampler) -> None:
        space = zl.DenseSpace(nn.Linear(24, 10, bias=False))
        noise = Direction(sampler, 5, 3, 0, torch.ones(1)).noise(space.blocks[0])
        assert torch.equal(kernels.drawn(noise, 240, torch.device("cpu")), noise.draw(0, 240, torch.device("cpu")))


class TestMemory:
    """Bytes of everything that operations make, on a model whose weights outweigh its activations."""

    @staticmethod
    def model() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=4,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    @staticmethod
    def peak(model: nn.Module, run: Callable[[], Any]) -> int:
        with Scale(model) as scale:
            run()
        return scale.peak

    def test_no_second_copy(self) -> None:
        model, batch = self.model(), token_batch(rows=1, length=4)
        space = zl.DenseSpace(model)
        weights = 4 * space.numel
        layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
        plain = self.peak(model, lambda: bound(model, batch)().backward())
        assert plain > weights  # what autograd alone does: all gradients at once
        model.zero_grad(set_to_none=True)
        direction = direction_of(space)
        products, shift = InnerProducts(space, direction), Shift(space, direction, 0.01)

        def peaks(**options: Any) -> list[int]:
            teacher = self.peak(model, lambda: backward(space, bound(model, batch), ClippedStep(space, 0.0, 1.0), **options))
            return [teacher, self.peak(model, lambda: backward(space, bound(model, batch), products, shift=shift, **options))]

        noise = 9 << 20  # drawing a chunk of noise on a CPU
        # By rows: a piece of a matrix at a time.
        teacher, shifted = peaks(checkpoint=True, large=1 << 16)
        assert teacher < layer
        assert shifted < layer / 4 + noise
        # Whole matrices: one layer's perturbed weights, a gradient or two, a part of the embedding.
        teacher, shifted = peaks(checkpoint=False, large=1 << 20)
        assert teacher < 3 * layer
        assert shifted < 3 * layer + noise
        assert weights > 2 * (3 * layer + noise)
