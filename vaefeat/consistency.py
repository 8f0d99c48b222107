"""Learning from unlabelled rows: what a teacher says of a row is what a student must say of a changed view of it.

B unlabelled rows of a minibatch, K classes.

References
----------
Sohn et al. 2020, FixMatch, arXiv:2001.07685; Tarvainen and Valpola 2017, Mean Teacher, arXiv:1703.01780; Wang et al.
2023, FreeMatch, arXiv:2205.07246; Berthelot et al. 2020, ReMixMatch, arXiv:1911.09785.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AdaptiveThresholds", "Alignment", "PseudoLabels", "Teacher", "consistency_loss"]

#: Running means forget their minibatches by this factor a step: they look back over some hundred.
_MEMORY = 0.99
#: Power of the running confidence that is the threshold: 1 is FreeMatch's, 0 trusts certainty alone.
_STRICTNESS = 0.25
#: Alignment multiplies no probability by more than this, and divides none by more.
_LARGEST_CORRECTION = 10.0


class PseudoLabels(NamedTuple):
    """What a teacher makes of unlabelled rows.

    Attributes
    ----------
    label_B : Tensor
        The most probable class, int64.
    trusted_B : Tensor
        Whether it is probable enough to be learned from.
    """

    label_B: Tensor
    trusted_B: Tensor


class Teacher:
    """A model whose weights are the exponential moving average of a student's.

    Parameters
    ----------
    student : Module
    model : Module
        A copy of the student, which is changed in place and stays in evaluation mode: its answers are those that are
        served.
    decay : float
        What remains of the average after a step. Early on it is lower, (1 + t) / (10 + t) at step t, so that the
        average is not of weights from before training (as TensorFlow's ExponentialMovingAverage does).
    """

    def __init__(self, student: nn.Module, model: nn.Module, *, decay: float) -> None:
        self.model = model.eval().requires_grad_(False)
        self._decay, self._step = decay, 0
        self._pairs = list(zip(model.parameters(), student.parameters(), strict=True))
        self._buffers = list(zip(model.buffers(), student.buffers(), strict=True))

    @torch.no_grad()
    def follow(self) -> None:
        """Take a step towards the student."""
        self._step += 1
        share = 1 - min(self._decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_([own for own, _ in self._pairs], [other for _, other in self._pairs], share)
        for own, other in self._buffers:
            own.copy_(other)


class Alignment:
    """Keep the share of each class among a teacher's answers near what it should be.

    Probabilities are multiplied by target / running mean and normalised: ReMixMatch, section 3.1.

    Parameters
    ----------
    shares_K : Tensor
        What the share of each class should be; they sum to 1.
    """

    def __init__(self, shares_K: Tensor) -> None:
        self._target_K = shares_K
        # As if it had been right so far: the first minibatches, which say little about many classes, change little.
        self.running_K = shares_K.clone()

    def __call__(self, probability_BK: Tensor) -> Tensor:
        """Take note of a minibatch's probabilities (B, K), and give them aligned."""
        self.running_K = torch.lerp(probability_BK.mean(dim=0), self.running_K, _MEMORY)
        correction_K = self._target_K / self.running_K
        correction_K = correction_K.clamp(1 / _LARGEST_CORRECTION, _LARGEST_CORRECTION)
        aligned_BK = probability_BK * correction_K
        return aligned_BK / aligned_BK.sum(dim=1, keepdim=True)


class AdaptiveThresholds:
    """How probable a class must be to be trusted: FreeMatch, equations 5 to 8, but stricter.

    The fourth root of the running mean of the largest probability, for each class in proportion to its running mean
    probability: low while the teacher knows little, and for classes of which it is less sure. FreeMatch takes the mean
    itself; the root (0.94 for 0.77) lets fewer wrong labels in, which runs of some thousand steps do not get rid of
    again. The first minibatch starts both means, so there is no warm-up.
    """

    def __init__(self) -> None:
        self.confidence: Tensor | None = None
        self.mean_K: Tensor | None = None

    def __call__(self, probability_BK: Tensor) -> PseudoLabels:
        """Take note of a minibatch's probabilities (B, K), and choose."""
        largest_B, label_B = probability_BK.max(dim=1)
        confidence, mean_K = largest_B.mean(), probability_BK.mean(dim=0)
        if self.confidence is not None and self.mean_K is not None:
            confidence = torch.lerp(confidence, self.confidence, _MEMORY)
            mean_K = torch.lerp(mean_K, self.mean_K, _MEMORY)
        self.confidence, self.mean_K = confidence, mean_K
        return PseudoLabels(label_B, largest_B >= self.threshold_K[label_B])

    @property
    def threshold_K(self) -> Tensor:
        """Of each class, at the moment."""
        assert self.confidence is not None  # there was a minibatch
        assert self.mean_K is not None
        return self.confidence**_STRICTNESS * self.mean_K / self.mean_K.max()


def consistency_loss(logits_BK: Tensor, pseudo: PseudoLabels) -> Tensor:
    """Give the cross-entropy of trusted labels under logits, averaged over all rows: FixMatch, equation 4.

    Rows that are not trusted count as zero, so that few trusted ones weigh little.
    """
    loss_B = functional.cross_entropy(logits_BK, pseudo.label_B, reduction="none")
    return (loss_B * pseudo.trusted_B).mean()
