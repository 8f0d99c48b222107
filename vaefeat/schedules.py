"""Weights that change over a training run, each a factor for one step."""

from __future__ import annotations

import math

__all__ = ["kl_warmup_factor", "learning_rate_factor"]

_FINAL_LEARNING_RATE = 0.01


def kl_warmup_factor(step: int, total_steps: int, share: float) -> float:
    """Rise linearly from 0 to 1 over a share of all steps; the last step has 1 in a run of any length."""
    warmup_steps = min(round(share * total_steps), total_steps - 1)
    return 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)


def learning_rate_factor(step: int, total_steps: int, warmup_share: float, schedule: str = "cosine") -> float:
    """Rise linearly over a share of all steps, then fall along a cosine to a hundredth, or stay (``constant``).

    References
    ----------
    Loshchilov and Hutter 2016, SGDR, arXiv:1608.03983, equation 5.
    """
    warmup_steps = round(warmup_share * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return _FINAL_LEARNING_RATE + (1 - _FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
