r"""What a closed form or a policy needs to know of the blocks: signal, noise and curvature, one number each per block.

For rows with gradients :math:`h_b` (of the row's share in the batch loss, so that their mean is the batch's gradient
:math:`g_B`) and block ``i``:

.. math:: G_i = \|\mathbb E\, h_{b,i}\|^2, \qquad M_i = \mathbb E\,\|g_{B,i}\|^2, \qquad F_i = \mathbb E\,\|h_{b,i}\|^2 .

``G`` is the signal, ``M`` what a step of one batch sees, ``F`` the trace of the per-row Fisher matrix, the stand-in for the trace of
the Hessian.

**The bias of G.** The squared norm of a mean of ``N`` rows carries ``(F - G) / N`` of noise, often more than ``G`` itself. The inner
product of the means of two independent halves has no such bias; so has the mean of :math:`\langle h_a, h_b\rangle` over *all* pairs
of different rows, of which halves use every second one,

.. math:: \hat G_i = \frac{\|\sum_b h_{b,i}\|^2 - \sum_b \|h_{b,i}\|^2}{N (N - 1)},

and it needs the same memory, one sum of gradients (``hold``, on either device). Random projections of the gradients would need no
such sum, but for an error of 10 % about 500 of them, each drawn anew for every weight and batch. Without a sum there is the same
estimate from pairs within each batch; it costs nothing and is noisier by the root of the number of batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from zolightning.modules.gradients import backward
from zolightning.modules.per_row import RowNorms
from zolightning.modules.readers import InnerProducts, SquaredNorms, Sum
from zolightning.modules.shift import Shift
from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch, size
from zolightning.samplers.base import Sampler
from zolightning.spaces import Space

_FIELDS = ("gradient", "batch", "fisher")


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    r"""Signal, noise and curvature of each block.

    Args:
        names: Names of the blocks.
        gradient: ``G``, without bias and so perhaps negative: shape ``[blocks]``.
        batch: ``M``, for batches of ``batch_size`` rows: shape ``[blocks]``.
        fisher: ``F``: shape ``[blocks]``.
        rows: Rows that were seen.
        batch_size: Rows a batch.
        loss: Mean loss of the rows; NaN if it is not known.

    Example:
        >>> statistics = collect_statistics(space, objective, batches)
        >>> table = controls.closed_form(blocks, statistics.by_name("gradient"), statistics.by_name("fisher"))
    """

    names: tuple[str, ...]
    gradient: Tensor
    batch: Tensor
    fisher: Tensor
    rows: int
    batch_size: int
    loss: float = math.nan

    @property
    def finite(self) -> bool:
        """Whether all of them are finite."""
        return all(bool(getattr(self, name).isfinite().all()) for name in _FIELDS)

    def by_name(self, field: str) -> dict[str, float]:
        """One of the statistics by name of the block, as :func:`zolightning.policies.controls.closed_form` takes it.

        Args:
            field: ``gradient``, ``batch`` or ``fisher``.
        """
        return dict(zip(self.names, getattr(self, field).tolist(), strict=True))

    def decrease_scales(self, alignment: float = 0.1, sweeps: int = 200) -> Tensor:
        r"""The scales with the largest expected decrease of one step, :func:`expected_decrease`, by coordinate ascent.

        With the other blocks fixed, block ``i`` enters as a parabola, so each move is exact and the decrease never falls. Blocks whose
        ``G`` does not pay for the noise that they add get zero (water-filling).

        Args:
            alignment: See :func:`expected_decrease`.
            sweeps: Passes over all blocks at most.

        Returns:
            Raw scales: float64, shape ``[blocks]``.

        Raises:
            ValueError: ``alignment`` is not positive, or the statistics show no signal at all.
        """
        if not alignment > 0:
            raise ValueError(f"alignment={alignment} must be positive")
        unit = float(self._signal().sum())
        own = zip(*((getattr(self, name).double() / unit).tolist() for name in _FIELDS), strict=True)
        blocks = [(g, m, f, 0.5 * m * f + alignment * max(g, 0.0) * f) for g, m, f in own]
        p = [0.0] * len(blocks)
        noise = curvature = 0.0  # sum of p M and of p F
        for _ in range(sweeps):
            change = 0.0
            for i, (g, m, f, bend) in enumerate(blocks):
                m_others, f_others = noise - p[i] * m, curvature - p[i] * f
                slope = g - 0.5 * (m * f_others + f * m_others)
                new = max(slope, 0.0) / (2 * bend) if bend > 0 else 0.0
                change += abs(new - p[i]) * (g if g > 0 else 0.0)
                noise, curvature, p[i] = m_others + new * m, f_others + new * f, new
            if change < 1e-12:
                break
        return torch.tensor(p, dtype=torch.float64).sqrt()

    def _signal(self) -> Tensor:
        signal = self.gradient.double().clamp_min(0.0)
        if not float(signal.sum()) > 0:
            raise ValueError(f"no signal: the squared gradient is not above its noise in any block ({self.rows} rows)")
        return signal

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file."""
        from safetensors.torch import save_file

        about = {"names": json.dumps(self.names), "rows": str(self.rows), "batch_size": str(self.batch_size), "loss": str(self.loss)}
        save_file({name: getattr(self, name).cpu().clone() for name in _FIELDS}, str(path), metadata=about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> BlockStatistics:
        """Read from a file that :meth:`save` wrote.

        Raises:
            ValueError: It is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in _FIELDS}
            rows, batch_size, loss = int(about["rows"]), int(about["batch_size"]), float(about.get("loss", "nan"))
            return cls(tuple(json.loads(about["names"])), **tensors, rows=rows, batch_size=batch_size, loss=loss)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"statistics {str(path)!r} cannot be read: {error}") from error


def mean_statistics(several: Sequence[BlockStatistics], normalise: bool = False) -> BlockStatistics:
    """The mean of several: points of a trajectory, or tasks.

    Args:
        several: Of the same blocks.
        normalise: Divide each by the sum of its ``F`` first, so that no task counts more because its loss is larger.

    Raises:
        ValueError: There are none, or their blocks differ.
    """
    if not several or any(s.names != several[0].names for s in several):
        raise ValueError(f"cannot average {len(several)} statistics" + (" of different blocks" if several else ""))
    units = [float(s.fisher.sum()) if normalise else 1.0 for s in several]
    if not all(unit > 0 for unit in units):
        raise ValueError("statistics without curvature: all gradients are zero")

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(s, name).double() / unit for s, unit in zip(several, units, strict=True)]).mean(0)

    rows, loss = sum(s.rows for s in several), math.fsum(s.loss for s in several) / len(several)
    return replace(several[0], gradient=mean("gradient"), batch=mean("batch"), fisher=mean("fisher"), rows=rows, loss=loss)


def expected_decrease(scales: Tensor, statistics: BlockStatistics, lr: float | None = None, alignment: float = 0.1) -> Tensor:
    r"""How far one step is expected to lower the loss, to second order and with independent blocks.

    With :math:`p_i = \eta \sigma_i^2`,

    .. math:: \Delta = \sum_i p_i G_i - \tfrac12 \Bigl(\sum_i p_i M_i\Bigr)\Bigl(\sum_i p_i F_i\Bigr) - \sum_i p_i^2 Q_i,
              \qquad Q_i = \rho\, G_i F_i ,

    where ``F`` stands in for the trace of each block's Hessian and ``Q`` for :math:`g_i^\top H_i g_i`.

    Args:
        scales: The scales :math:`\sigma`: shape ``[blocks]``.
        statistics: Of the same blocks.
        lr: The step size; without it: the best one, so that the result does not depend on the scales' size.
        alignment: How far the curvature lies along the gradient, :math:`\rho`: 1 if all of it does, 0 if none does.

    Returns:
        0-d, differentiable in ``scales``.

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419, whose own objective is the first sum alone.
    """
    g, m, f = (getattr(statistics, name).to(scales) for name in _FIELDS)
    s = scales.square()
    gain = (s * g).sum()
    cost = 0.5 * (s * m).sum() * (s * f).sum() + alignment * (s.square() * g.clamp_min(0.0) * f).sum()
    if lr is None:
        return gain.clamp_min(0.0).square() / (4 * cost)
    return lr * gain - lr**2 * cost


def collect_statistics(
    space: Space,
    objective: Objective,
    batches: Iterable[Batch],
    hold: torch.device | str | bool = True,
    checkpoint: bool = False,
    row_norms_of: RowNorms | None = None,
) -> BlockStatistics:
    """Statistics of the blocks at the present weights.

    Args:
        space: The blocks; its model computes.
        objective: The loss; with fitted ``biases`` where the prior is to be taken out.
        batches: On the weights' device, of at least two rows each.
        hold: Keep the sum of the gradients, on that device (true: the weights'), for pairs across batches; false: pairs within.
        checkpoint: Checkpoint the decoder layers.
        row_norms_of: How the rows' own norms are taken; without it: eight rows at a time.

    Raises:
        ValueError: There is no batch, or one of a single row.
    """
    norms_of = row_norms_of if row_norms_of is not None else RowNorms(space, checkpoint=checkpoint)
    total = Sum(space, None if hold is True else hold) if hold is not False else None
    own = torch.zeros(len(space.blocks), dtype=torch.float64, device=space.device)
    squares, means, within, rows, pairs, count, losses = own.clone(), own.clone(), own.clone(), 0, 0, 0, 0.0
    for batch in batches:
        examples = size(batch)
        if examples < 2:
            raise ValueError("a batch of one row has no pairs: set batch_size to 2 or more")
        norms, weights = SquaredNorms(space), list[Tensor]()
        readers = [norms] if total is None else [norms, total]
        if total is not None:
            total.weight = float(examples)
        loss = backward(space, lambda: _loss(objective, space, batch, weights), *readers, checkpoint=checkpoint)  # noqa: B023
        of_rows = norms_of(objective, batch, examples / float(weights[0])).double()
        squares += of_rows
        means += norms.values.double()
        within += examples**2 * norms.values.double() - of_rows
        rows, pairs, count, losses = rows + examples, pairs + examples * (examples - 1), count + 1, losses + examples * float(loss)
    if not count:
        raise ValueError("no batch to collect statistics from")
    gradient = within / pairs if total is None else (total.squared_norms().to(squares) - squares) / (rows * (rows - 1))
    names = tuple(block.name for block in space.blocks)
    return BlockStatistics(names, gradient.cpu(), (means / count).cpu(), (squares / rows).cpu(), rows, rows // count, losses / rows)


def _loss(objective: Objective, space: Space, batch: Batch, weights: list[Tensor]) -> Tensor:
    """The loss of a batch; keeps the sum of its weights."""
    loss, weight = objective.rows(space.model, batch)
    weights[:] = [weight.detach().sum()]
    return loss.sum() / weight.sum()


def curvature_traces(
    space: Space, objective: Objective, batch: Batch, sampler: Sampler, samples: int = 8, eps: float = 1e-3, seed: int = 0
) -> Tensor:
    r"""Traces of the diagonal blocks of the Hessian, from differences of gradients along random directions (Hutchinson).

    .. math:: T_i \approx \frac{1}{2 \epsilon K} \sum_k
              \langle z_{k,i},\ \nabla_i L(\theta + \epsilon z_k) - \nabla_i L(\theta - \epsilon z_k) \rangle

    Two backward passes a sample, one copy of the weights.

    Args:
        space: The blocks.
        objective: The loss.
        batch: Its rows.
        sampler: Of the directions, bound to the space; Rademacher has the least variance.
        samples: The number ``K``.
        eps: Distance.
        seed: Seed of the directions.

    Returns:
        Shape ``[blocks]``, the space's compute type.
    """
    traces = torch.zeros(len(space.blocks), dtype=space.compute_dtype, device=space.device)
    loss = objective.on(space.model, batch)
    for step in range(samples):
        (direction,) = sampler.directions(seed, step, 1)
        for sign in (1, -1):
            products = InnerProducts(space, direction)
            backward(space, loss, products, shift=Shift(space, direction, sign * eps))
            traces += sign * products.values
    return traces / (2 * eps * samples)
