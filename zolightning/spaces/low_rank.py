"""A bank of fixed bases beside a base that never moves: directions of low rank, gathered in one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.blocks import check_ids
from zolightning.noise import Key, RademacherNoise, block_id
from zolightning.spaces.dense import DenseSpace
from zolightning.spaces.origins import canonical
from zolightning.spaces.paired import LinearMap
from zolightning.spaces.wrapping import linear_maps, one_line, require_peft, wrap

_ADAPTER = "default"  # peft's name for it


class LowRankSpace(DenseSpace):
    r"""Directions in the span of fixed random bases; the base model, quantised or not, is read-only.

    Each linear map :math:`W \in R^{m \times n}` has ``slots`` bases :math:`U_j \in R^{r \times n}` of random signs
    :math:`\pm 1/\sqrt r`, and computes with :math:`W + \sum_j V_j U_j`. The :math:`V_j \in R^{m \times r}` are the blocks, 0 at the
    start. In step ``t`` only slot

    .. math:: j = \lfloor t / \text{refresh} \rfloor \bmod \text{slots}

    is probed and moved, by :math:`z = V U_j` with the sampler's noise as :math:`V`. Each element of ``z`` has variance 1 whatever the
    bank, and over all banks :math:`E[z z^\top] = I`: learning rates, probe distances and a policy's scales mean what they mean for
    the weights themselves. Weight decay alone acts on all slots in every step.

    All slots together are one LoRA adapter of rank ``slots`` times ``r`` and factor 1. :attr:`model` is a peft model that holds it,
    and saves it as such. The bank is a pure function of ``seed`` and the names of the linear maps.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        rank: Rank ``r`` of a direction.
        slots: Number of bases of each linear map.
        refresh: Steps after which the next slot moves.
        targets: Shell patterns over the names of linear maps that get a bank. Empty: peft's choice for the architecture (often
            queries and values).
        seed: Seed of the bank.

    Raises:
        ValueError: peft is missing, an argument is out of range, a pattern matches nothing, the adapter's rank is larger than a side
            of a linear map, or peft does not know the architecture.

    Example:
        >>> space = LowRankSpace(load_model("demo", quantization="nf4"), rank=4, targets=["*_proj"])  # doctest: +SKIP
        >>> optimizer = ZOOptimizer(space, lr=1e-5, eps=1e-3)  # doctest: +SKIP

    References:
        Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures", ICLR 2025 (LOZO: a basis that
        stays for some steps).
        Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023 (one basis).
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 4,
        slots: int = 4,
        refresh: int = 100,
        targets: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        for name, value in (("rank", rank), ("slots", slots), ("refresh", refresh)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be between 0 and 2**64 - 1")
        peft, whole = require_peft("LowRankSpace"), rank * slots
        chosen = linear_maps(model, targets)
        with one_line("a low-rank bank", model):
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=whole, lora_alpha=whole, target_modules=chosen)
            wrapped, _ = wrap(model, config, seed)
        layers = {canonical(wrapped, path): layer for path, layer in wrapped.named_modules() if hasattr(layer, "lora_A")}
        for path, layer in layers.items():
            if whole > min(layer.in_features, layer.out_features):
                wrapped.unload()
                raise ValueError(
                    f"rank={rank} times slots={slots} is larger than a side of {path!r} ({layer.out_features} x {layer.in_features})"
                )
        for path, layer in layers.items():
            fixed, moved = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            fixed.data.copy_(bank(path, rank, slots, layer.in_features, seed, fixed.device))
            fixed.requires_grad_(False)
            layer.lora_B[_ADAPTER] = Slots([torch.zeros_like(part) for part in moved.detach().split(rank, dim=1)])
        super().__init__(wrapped, include=[f"*.lora_B.{_ADAPTER}.slot*"])
        check_ids([*(block.name for block in self.blocks), *(f"{path}.bank" for path in layers)])
        self.refresh, self.slots = refresh, slots
        numbers = [int(block.name.rpartition("slot")[2]) for block in self.blocks]
        self._slot_of = torch.tensor(numbers, device=self.device)
        self._settings = {"refresh": refresh, "seed": seed}

    @property
    def settings(self) -> dict[str, Any]:
        return self._settings

    def active(self, clock: Tensor) -> Tensor:
        return (self._slot_of == clock // self.refresh % self.slots).to(torch.float32)


def bank(name: str, rank: int, slots: int, width: int, seed: int, device: torch.device) -> Tensor:
    r"""The bases of a linear map, one below the other; they do not change with the number of slots.

    Args:
        name: Name of the linear map in the base model.
        rank: Rows of a basis.
        slots: Number of bases.
        width: Inputs of the linear map.
        seed: Seed of the bank.
        device: Where to make it; the values are the same everywhere.

    Returns:
        Signs times :math:`1/\sqrt{\text{rank}}`: float32, shape ``[slots * rank, width]``.
    """
    signs = RademacherNoise(Key(seed, block_id(f"{name}.bank"), step=0)).draw(0, slots * rank * width, device)
    return signs.view(slots * rank, width) * rank**-0.5


class Slots(LinearMap):
    """The matrix ``B`` of an adapter, kept as tensors of some columns each; outwards it is one matrix.

    Args:
        parts: The columns, in order: each ``[m, rank]``.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            self.register_parameter(f"slot{number}", nn.Parameter(part.contiguous()))

    @property
    def weight(self) -> Tensor:
        """All columns: ``[m, slots * rank]``."""
        return torch.cat([part for part in self._parameters.values() if part is not None], dim=-1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        parts, whole = [part for part in self._parameters.values() if part is not None], state_dict.get(f"{prefix}weight")
        if whole is None:
            missing.append(f"{prefix}weight")
        elif whole.shape != self.weight.shape:
            errors.append(f"size mismatch for {prefix}weight: {tuple(whole.shape)}, expected {tuple(self.weight.shape)}")
        else:
            for part, columns in zip(parts, whole.split([part.shape[1] for part in parts], dim=1), strict=True):
                part.copy_(columns)
