"""The held-out figures of a run: measured by its first worker, and told to the others."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from vaefeat.config import TrainConfig
from vaefeat.errors import OutOfMemoryError
from vaefeat.memory import ran_out_of_memory
from vaefeat.model.evaluation import Evaluation, evaluate
from vaefeat.model.objectives import Objective
from vaefeat.model.vae import VAE
from vaefeat.world import World

__all__ = ["HeldOut"]

_EVALUATED = ("objective", "elbo", "log_likelihood", "kl")
_ROWS_AT_A_TIME = 512


class HeldOut:
    """Measures a model on the rows that it is not trained on.

    Parameters
    ----------
    objective : Objective
    config : TrainConfig
    batch_size : int
        Rows in a minibatch of training.
    world : World
        All of whose workers call together.
    device : torch.device
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        *,
        batch_size: int,
        world: World,
        device: torch.device,
    ) -> None:
        self._objective, self._config = objective, config
        self._world, self._device = world, device
        # Without gradients more rows fit than in a step.
        self._at_a_time = max(batch_size, _ROWS_AT_A_TIME)

    def evaluate(self, vae: VAE, rows: NDArray[Any]) -> Evaluation:
        """Measure a model on rows (m, ...).

        Raises
        ------
        OutOfMemoryError
            A single row does not fit.
        """
        if self._world.leads:
            evaluation = self._measured(vae, rows)
        if self._world.size == 1:
            return evaluation
        latent_dim = vae.config.latent_dim
        told = torch.zeros(len(_EVALUATED) + latent_dim, dtype=torch.float64, device=self._device)
        if self._world.leads:
            told[: len(_EVALUATED)] = told.new_tensor([getattr(evaluation, name) for name in _EVALUATED])
            told[[len(_EVALUATED) + unit for unit in evaluation.active]] = 1
        figures = self._world.agree(told).tolist()
        active = tuple(unit for unit in range(latent_dim) if figures[len(_EVALUATED) + unit])
        return Evaluation(**dict(zip(_EVALUATED, figures, strict=False)), active=active)

    def _measured(self, vae: VAE, rows: NDArray[Any]) -> Evaluation:
        """Measure, from the first shortage of memory on with fewer rows at a time; their noise is another then."""
        while True:
            try:
                return evaluate(
                    vae,
                    self._objective,
                    rows,
                    kl_weight=self._config.kl_weight,
                    batch_size=self._at_a_time,
                    seed=self._config.seed,
                )
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                problem = str(error).splitlines()[0]
            if self._at_a_time == 1:
                raise OutOfMemoryError(
                    f"a single held-out row does not fit into the memory of {self._device} ({problem}); make the "
                    "network smaller, or n_samples"
                )
            # Out of the handler: the error holds on to the tensors of the failed attempt.
            self._at_a_time //= 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
