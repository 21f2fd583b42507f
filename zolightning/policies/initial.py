"""Initial values as a pure function of a seed, equal to what the paper's code draws on one GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.noise import philox


def philox_uniform(seed: int, streams: Sequence[int], shape: Sequence[int], bound: float) -> Tensor:
    """Numbers uniform in ``[-bound, bound)``, as ``torch.nn.init.uniform_`` gives them on a CUDA device.

    That generator is Philox 4x32-10 with the seed as its key, one subsequence per element, and one counter per tensor drawn so far.

    Args:
        seed: Seed.
        streams: How many tensors were drawn before each of these.
        shape: Shape of one tensor; at most 512 elements or the order is not PyTorch's.
        bound: Half width.

    Returns:
        float32, shape ``[streams, *shape]``.
    """
    count = int(torch.Size(shape).numel())
    counter = torch.tensor(streams, dtype=torch.int64)[:, None].expand(-1, count)
    element = torch.arange(count).expand_as(counter)
    word = philox(seed, (counter, 0, element, 0))[0]  # type: ignore[arg-type]
    unit = word.to(torch.float32) * 2.0**-32 + 2.0**-33
    values = unit * (2 * bound) - bound
    return torch.where(values == bound, -bound, values).reshape(-1, *shape)
