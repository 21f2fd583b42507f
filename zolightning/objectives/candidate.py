"""Cross-entropy over a list of candidate continuations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch, size
from zolightning.objectives.forward import candidate_logits, scored_log_probs, wide


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    r"""Length-normalised log-probability of each candidate, up to a constant per example.

    .. math:: s_k = \frac{1}{|c_k|} \sum_{t \in c_k} \log p(t \mid \text{prompt}, c_{k, <t})

    A batch with ``candidates`` (``[B, K]``, token ids) needs one forward per example: every candidate is one token, and the
    normaliser of the log-probabilities, equal for all, is left out. Otherwise each candidate is a sequence of its own
    (``scored``, ``example``, ``choice``).

    Returns:
        ``[B, K]``, float32 or wider; minus infinity where an example has fewer candidates than ``K``.
    """
    if "candidates" in batch:
        return wide(candidate_logits(model, batch))
    log_prob, length = scored_log_probs(model, batch)
    return spread(log_prob / length, batch, float("-inf"))


def spread(values: Tensor, batch: Batch, missing: float) -> Tensor:
    """Values of the sequences, ``[R]``, as a table of examples and candidates, ``[B, K]``, with ``missing`` in the gaps."""
    width = int(batch["num_choices"]) if "num_choices" in batch else int(batch["choice"].max()) + 1
    table = torch.full((size(batch), width), missing, dtype=values.dtype, device=values.device)
    return table.index_put((batch["example"], batch["choice"]), values)


class CandidateCrossEntropy(Objective):
    r"""Cross-entropy of the right candidate among all, from length-normalised scores.

    .. math:: \ell_b = -\log \mathrm{softmax}(s_b + \beta)_{y_b}

    Args:
        calibrate: Fit additive candidate biases ``beta`` on training rows before training (the data module's
            ``calibration_rows``); they take out the model's preference for some answers, are used in validation and prediction
            and stored in the checkpoint. Without it ``beta`` is zero.

    Example:
        >>> loss = CandidateCrossEntropy().on(model, batch)()

    References:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023.
    """

    compares = True
    capturable = True

    def __init__(self, calibrate: bool = False) -> None:
        self.calibrate = calibrate
        #: Candidate biases, ``[K]``; ``None`` before they are fitted.
        self.biases: Tensor | None = None

    def rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        scores = candidate_scores(model, batch)
        if self.biases is not None:
            scores = scores + self.biases.to(scores)
        loss = F.cross_entropy(scores, batch["label"], reduction="none")
        return loss, torch.ones_like(loss)
