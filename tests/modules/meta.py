"""What the tests of meta-training share: batches, plain gradients by hand, and a scale on which memory is weighed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zolightning as zl


def token_batch(rows: int = 4, length: int = 8, scored: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Random token sequences, the last ones to be learnt; the first has a padding token among its tokens."""
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 1] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scored": torch.full((rows,), scored)}


def plain_loss(model: nn.Module, batch: dict[str, Tensor], weights: dict[str, Tensor], scored: int = 3) -> Tensor:
    """The loss of such a batch as a function of the weights, by functional_call."""
    ids = batch["input_ids"]
    logits = torch.func.functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False}, tie_weights=True).logits
    return F.cross_entropy(logits[:, -scored - 1 : -1].flatten(0, 1), ids[:, -scored:].flatten())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Detached leaves that need gradients, by canonical name."""
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def plain_gradients(model: nn.Module, batch: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Gradients of the loss of a batch."""
    weights = weights if weights is not None else weights_of(model)
    return dict(zip(weights, torch.autograd.grad(plain_loss(model, batch, weights), list(weights.values())), strict=True))


def bound(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The same loss as the product computes it."""
    return zl.TokenCrossEntropy().on(model, batch)


class Scale(TorchDispatchMode):
    """Bytes of tensors that operations have made and that are alive, the weights of a model left out: ``now`` and ``peak``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._seen and storage.nbytes():
                    self._seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
