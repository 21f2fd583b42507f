"""Cross-entropy of the answer's tokens."""

from __future__ import annotations

from torch import Tensor, nn

from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch
from zolightning.objectives.forward import scored_log_probs


class TokenCrossEntropy(Objective):
    r"""Mean negative log-probability over all answer tokens of the batch.

    .. math:: \ell = -\frac{\sum_b \sum_{t \in a_b} \log p(t \mid \cdot)}{\sum_b |a_b|}

    Example:
        >>> loss = TokenCrossEntropy().on(model, batch)()
    """

    capturable = True

    def rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        log_prob, length = scored_log_probs(model, batch)
        return -log_prob, length
