"""How a classifier is fine-tuned: one frozen group of settings."""

from __future__ import annotations

from dataclasses import dataclass

from vaefeat.settings import Settings, check_choice, check_int, check_number

__all__ = ["FineTuneConfig"]


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(Settings):
    """How a classifier is fine-tuned.

    Parameters
    ----------
    max_steps : int
        Steps at most. The learning rate is constant for three quarters of them and then falls to zero; where answers
        have settled (see `patience`) it falls earlier.
    batch_size : int
        Labelled rows in a step, drawn again as often as needed.
    unlabelled_ratio : float
        Unlabelled rows in a step for each labelled one.
    learning_rate : float
        Of the head.
    layer_decay : float
        Each layer below learns at this share of the rate of the one above it, in (0, 1].
    weight_decay : float
        Decoupled, of AdamW.
    unfreezing : float
        Share of `max_steps` in which the layers join, one after the other from the head down; in a run of any length
        all of them have joined at the last step.
    unlabelled_weight : float
        Weight of the unlabelled rows' cross-entropy; 0 leaves unlabelled rows out.
    elbo_weight : float
        Weight of the loss that the encoder was pretrained with, in nats per value of a row.
    teacher_decay : float
        Of the moving average of the weights, which labels the unlabelled rows and is what is served.
    augmentations : tuple of str
        Keys of :data:`vaefeat.model.augmentation.IMAGE_AUGMENTATIONS` or, for tables, of
        :data:`~vaefeat.model.augmentation.TABLE_AUGMENTATIONS`; ``auto`` has been resolved.
    strength : float
        Of the strong augmentation, that of the unlabelled rows that the student sees and of the labelled rows.
    patience : int or None
        How often in a row, every 50 steps, the teacher's answers must have stayed the same before training ends; None
        takes all steps.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes CUDA where there is a device.
    threads : int or None
        Processor threads within an operation; None chooses by the work in a step, as in pretraining. On a busy machine
        1 is faster, since threads wait for each other.
    precision : {"auto", "float32", "bfloat16"}
        Of the arithmetic of the networks that learn; weights, losses and the teacher are float32. ``auto`` takes
        bfloat16 where a short measurement finds it faster, and float32 in runs of a few seconds.
    seed : int
    """

    max_steps: int = 3000
    batch_size: int = 64
    unlabelled_ratio: float = 4.0
    learning_rate: float = 2e-3
    layer_decay: float = 0.8
    weight_decay: float = 1e-2
    unfreezing: float = 0.05
    unlabelled_weight: float = 1.0
    elbo_weight: float = 0.0
    teacher_decay: float = 0.99
    augmentations: tuple[str, ...] = ()
    strength: float = 1.0
    patience: int | None = 3
    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("patience", "threads"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), at_least=1)
        check_int("seed", self.seed, at_least=0)
        for name in ("learning_rate", "unlabelled_ratio"):
            check_number(name, getattr(self, name), above=0)
        for name in ("weight_decay", "unlabelled_weight", "elbo_weight", "strength"):
            check_number(name, getattr(self, name), at_least=0)
        check_number("layer_decay", self.layer_decay, above=0, at_most=1)
        check_number("unfreezing", self.unfreezing, at_least=0, at_most=1)
        check_number("teacher_decay", self.teacher_decay, at_least=0, below=1)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
