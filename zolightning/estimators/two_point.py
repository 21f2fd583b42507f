"""The central difference along each direction."""

from __future__ import annotations

from torch import Tensor

from zolightning.estimators.base import Estimator, Probe


class TwoPoint(Estimator):
    r"""Central difference (SPSA), averaged over directions.

    .. math:: c_q = \frac{\ell(\theta + \epsilon u_q) - \ell(\theta - \epsilon u_q)}{2 \epsilon Q}

    Args:
        queries: Directions ``Q`` per step; a step costs ``2 Q`` forwards.
        clip: Largest size of a derivative along one direction (that is, of ``Q c_q``); larger ones are cut to it. ``None``: as they
            are. QZO takes 100 for quantisation scales.

    Raises:
        ValueError: ``clip`` is not positive.

    Example:
        >>> TwoPoint(queries=2).coefficients(torch.tensor([1.0, 0.5, 0.2, 0.2]), eps=0.5)
        tensor([0.2500, 0.0000])

    References:
        Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", 1992.
        Shang et al., "Fine-tuning Quantized Neural Networks with Zeroth-order Optimization", 2025 (QZO: the clipping).
    """

    def __init__(self, queries: int = 1, clip: float | None = None) -> None:
        super().__init__(queries)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip} must be positive")
        self.clip = clip

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(Probe(query, sign) for query in range(self.queries) for sign in (1, -1))

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        plus, minus = losses[0::2], losses[1::2]
        derivatives = (plus - minus) / (2 * eps)
        if self.clip is not None:
            derivatives = derivatives.clamp(-self.clip, self.clip)
        return derivatives / self.queries
