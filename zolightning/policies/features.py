"""What a policy sees of the blocks before a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zolightning.policies.layout import KINDS, BlockInfo, depths

_CHUNK = 1 << 24  # elements that are widened at once: 64 MiB

#: Columns of :meth:`Features.standard`.
STANDARD = (*(f"kind:{kind}" for kind in KINDS), "depth", "depth_squared", "size", "aspect", "rms", "offset", "loss", "progress")


class Features:
    r"""Everything that scales may depend on, as tensors that are written in place.

    The names and shapes give fixed columns; those of a block that stands beside a weight of the base model are that weight's. The
    weights give a mean and an unbiased variance per block, taken anew every so many steps. The probes of the previous step give two
    losses and the policy's own raw scales. Before the first step the losses are 0 and the raw scales 1, as in the paper.

    Args:
        blocks: The blocks.
        device: Where the tensors live.
        dtype: Their type: float32, or float64 for exact tests.

    Attributes:
        mean: Mean of each block's weights: shape ``[blocks]``.
        variance: Their unbiased variance (0 for one element): shape ``[blocks]``.
        losses: Losses of the previous step at the plus and the minus side: shape ``[2]``.
        sigma: Raw scales of the previous step: shape ``[blocks]``.
        step: Number of the step: 0-d.

    Example:
        >>> features = Features([BlockInfo("layers.0.mlp.up_proj.weight", (8, 4))])
        >>> features.standard().shape
        torch.Size([1, 21])
    """

    def __init__(self, blocks: Sequence[BlockInfo], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.blocks = tuple(blocks)
        seen = [block.origin or block for block in self.blocks]
        fixed = torch.tensor(_fixed(seen), dtype=dtype, device="cpu")
        self._fixed = fixed.to(device)  # [blocks, fixed columns]
        self.mean, self.variance = torch.zeros_like(self._fixed[:, 0]), torch.zeros_like(self._fixed[:, 0])
        self.losses = torch.zeros(2, dtype=dtype, device=device)
        self.sigma = torch.ones_like(self.mean)
        self.step = torch.zeros((), dtype=dtype, device=device)

    @classmethod
    def reference(cls, blocks: Sequence[BlockInfo], loss: float = 0.5, dtype: torch.dtype = torch.float32) -> Features:
        """Features of a typical model: matrices of mean 0 and variance 5e-4, norms that are 1, biases that are 0, both losses equal."""
        features = cls(blocks, dtype=dtype)
        kinds = [block.kind for block in features.blocks]
        features.mean.copy_(torch.tensor([float(kind == "norm") for kind in kinds]))
        features.variance.copy_(torch.tensor([0.0 if kind in ("norm", "bias") else 5e-4 for kind in kinds], dtype=dtype))
        features.losses.fill_(loss)
        return features

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs back, live."""
        return {"mean": self.mean, "variance": self.variance, "losses": self.losses, "sigma": self.sigma}

    def measure(self, tensors: Iterable[Tensor]) -> None:
        """Take the statistics of the weights.

        Args:
            tensors: The blocks' weights, in order; read in pieces, never widened as a whole.
        """
        pairs = [mean_variance(tensor, self.mean.dtype) for tensor in tensors]
        for target, values in zip((self.mean, self.variance), zip(*pairs, strict=True), strict=True):
            target.copy_(torch.stack([value.to(target.device) for value in values]))

    def observe(self, losses: Tensor, sigma: Tensor) -> None:
        """Take over what a step has shown; a step with a loss that is not finite leaves no trace.

        Args:
            losses: Probe losses, plus and minus side alternating: shape ``[probes]``.
            sigma: Raw scales of that step: shape ``[blocks]``.
        """
        losses = losses if losses.numel() > 1 else losses.expand(2)
        pair = torch.stack([losses[0::2].mean(), losses[1::2].mean()]).to(self.losses.dtype)
        valid = torch.isfinite(losses).all()
        self.losses.copy_(torch.where(valid, pair, self.losses))
        self.sigma.copy_(torch.where(valid, sigma.to(self.sigma.dtype), self.sigma))

    def standard(self) -> Tensor:
        r"""All features but the raw scales, each of order 1: shape ``[blocks, len(STANDARD)]``.

        ==================  ==========================================================================================
        ``kind:...``        1 for the block's kind, else 0
        ``depth``           -1 in the first layer to 1 in the last; 0 outside of the layers; and its square
        ``size``            (log10 of the number of elements - 6) / 2
        ``aspect``          log10 of rows / columns; 0 for vectors
        ``rms``             (log10 of the root mean square of the weights + 1.5) / 1.5, from 1e-6 up
        ``offset``          mean / root mean square: 1 for a norm's weights of 1, about 0 for matrices
        ``loss``            log(1 + mean of the two losses)
        ``progress``        log10(1 + step) / 4
        ==================  ==========================================================================================
        """
        rms = (self.variance + self.mean.square()).sqrt().clamp_min(1e-6)
        loss = self.losses.mean().clamp_min(0.0).log1p()
        progress = (1.0 + self.step).log10() / 4
        live = [(rms.log10() + 1.5) / 1.5, self.mean / rms, loss.expand_as(rms), progress.expand_as(rms)]
        return torch.cat([self._fixed, torch.stack(live, dim=1)], dim=1)


def _fixed(blocks: Sequence[BlockInfo]) -> list[list[float]]:
    """The columns of :data:`STANDARD` that follow from names and shapes."""
    rows = []
    for block, depth in zip(blocks, depths(blocks), strict=True):
        place = 0.0 if depth is None else 2 * depth - 1
        shape = block.shape or ()
        aspect = math.log10(max(shape[0], 1) / max(shape[1], 1)) if len(shape) == 2 else 0.0
        kinds = [float(block.kind == kind) for kind in KINDS]
        rows.append([*kinds, place, place**2, (math.log10(max(block.numel, 1)) - 6) / 2, aspect])
    return rows


def mean_variance(tensor: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all elements, in ``dtype``, without a copy of the whole tensor in that type.

    Pieces are combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Args:
        tensor: Any shape and floating-point type.
        dtype: Type of the computation.

    Returns:
        Two 0-d tensors on the same device; the variance of one element is 0.
    """
    pieces = tensor.detach().reshape(-1).split(_CHUNK)
    found = [torch.var_mean(piece.to(dtype), correction=0) for piece in pieces]
    count = tensor.numel()
    shares = [piece.numel() / count for piece in pieces]
    mean = sum((share * m for share, (_, m) in zip(shares, found, strict=True)), torch.zeros_like(found[0][1]))
    spread = [share * (v + (m - mean).square()) for share, (v, m) in zip(shares, found, strict=True)]
    return mean, torch.stack(spread).sum() * (count / max(count - 1, 1))
