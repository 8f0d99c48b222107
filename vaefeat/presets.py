"""Settings by what a model is for and how long it may take: what a newcomer gets without turning a knob.

``features`` makes a mean that few labels are enough for; ``textbook`` is the plain variational auto-encoder. Both come
``fast``, for a first look, and ``best``, for the model that stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.errors import ConfigError
from vaefeat.settings import check_choice, check_int, plain_value

__all__ = [
    "EFFORTS",
    "PRESETS",
    "backgrounds_differ",
    "choose_settings",
    "mirrored_rows_belong",
    "plain_changes",
    "refuse_changes",
]

PRESETS = ("features", "textbook")
EFFORTS = ("fast", "best")

Changes = Mapping[str, Any]

#: Minibatches of the features preset for images of this many values; of larger ones fewer are taken.
_STEPS = {"fast": 2500, "best": 5000}
#: However few rows there are.
_MOST_EPOCHS = {"fast": 500, "best": 1000}
#: Checkpoints of a whole run, at most about twice as many.
_CHECKPOINTS = 50
_PIXELS = 28 * 28
#: Of the textbook preset: epochs, the fewest steps, and what differs from the classes' defaults.
_TEXTBOOK: dict[str, tuple[int, int, dict[str, Any]]] = {
    "fast": (8, 1000, {"learning_rate": 4e-3}),
    "best": (100, 5000, {}),
}
#: The log-likelihood of an image grows with its values, and what must outweigh it grows along: it is 100 for that many.
_LEAST_CONTRAST, _MOST_CONTRAST = 20.0, 400.0
_TABLE_CONTRAST = 50.0
_BATCH, _SMALLEST_BATCH = 256, 32
#: Images are halved until their shorter side is at most this, or as often as there are widths.
_LAST_SIDE = 4
_CHANNELS = (32, 64, 128, 256, 256, 256)
_IMAGE_LATENTS, _TABLE_LATENTS = 144, 36
#: One latent in nine may say what differs between views.
_STYLE_SHARE = 9
#: Neighbours among so many views; of fewer rows, of which a class has fewer, fewer.
#: A longer run cuts classes into finer groups, unless it looks further.
_NEIGHBOURS, _REMEMBERED = {"fast": 50, "best": 200}, 16_384
#: Images looked at, and pixels of a side, for the choice of mirroring; how well mirrored ones may be told apart where
#: they belong.
_LOOKED_AT, _LOOKED_AT_SIDE = 2000, 32
_TOLD_APART = 0.6
#: Changes of light, and how far backgrounds must be spread to allow them, as a share of the range of values.
_LIGHT = ("brightness", "color")
#: Photographs in colour are cropped, and their colours changed: a part of one in another light shows the same thing.
_COLORS, _PHOTOGRAPHS_TEMPERATURE = 3, 0.2
_NOT_OF_PHOTOGRAPHS = ("affine", "erasing")
_LEAST_LIGHT = 0.05


def choose_settings(
    rows: NDArray[Any],
    *,
    n_rows: int,
    preset: str = "features",
    effort: str = "fast",
    model: ModelConfig | Changes | None = None,
    train: TrainConfig | Changes | None = None,
) -> tuple[ModelConfig, TrainConfig]:
    """Settle what is built and how it is trained, from a preset and what is asked for over it.

    Parameters
    ----------
    rows : ndarray of shape (n, F) or (n, C, H, W)
        Training rows, or a sample of them.
    n_rows : int
        Rows to train on.
    preset : {"features", "textbook"}
        ``features`` makes two views of each row agree (``objective="contrastive"``), with sizes by the kind and shape
        of the rows. ``textbook`` maximises the evidence lower bound.
    effort : {"fast", "best"}
        ``fast`` takes minutes on two processor cores for tens of thousands of small images, ``best`` twice as
        long (``textbook``: 100 epochs at most against 8).
    model, train : mapping or configuration, optional
        A mapping changes the preset field by field. A :class:`ModelConfig` or :class:`TrainConfig` is the whole answer:
        then no preset is used, and what is missing of the two has its class's defaults.

    Returns
    -------
    model : ModelConfig
    train : TrainConfig

    Raises
    ------
    ConfigError
        An unknown name or setting, or an impossible value.

    References
    ----------
    The lengths, sizes and weights were chosen on validation rows of MNIST, the digits, CIFAR-10 and generated tables;
    ``docs/features.md`` has the ablation.
    """
    check_choice("preset", preset, PRESETS)
    check_choice("effort", effort, EFFORTS)
    check_int("n_rows", n_rows, at_least=1)
    model, train = plain_changes(model, what="model"), plain_changes(train, what="train")
    if isinstance(model, ModelConfig) or isinstance(train, TrainConfig):
        if (preset, effort) != ("features", "fast"):
            raise ConfigError(
                f"got preset={preset!r} and effort={effort!r} with a whole configuration, which takes their place; "
                "give a mapping of the fields to change, such as {'latent_dim': 16}, or leave preset and effort out"
            )
        return (
            model if isinstance(model, ModelConfig) else ModelConfig.from_dict(model or {}),
            train if isinstance(train, TrainConfig) else TrainConfig.from_dict(train or {}),
        )
    model_changes, train_changes = dict(model or {}), dict(train or {})
    if preset == "textbook":
        return ModelConfig.from_dict(model_changes), _textbook(effort, n_rows, train_changes)
    return _features(rows, effort, n_rows, model_changes, train_changes)


def plain_changes(given: Any, *, what: str) -> Any:
    """Take a mapping with Python's numbers for NumPy's, or a configuration as it is; refuse anything else."""
    if given is None or isinstance(given, ModelConfig if what == "model" else TrainConfig):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"got {what}={given!r}, wanted a mapping of fields to values, or a whole configuration")
    return {key: plain_value(value) for key, value in given.items()}


def refuse_changes(model: Changes, train: Changes, *, preset: str = "features") -> None:
    """Refuse changes that the preset cannot be meant to have, before any row is read.

    Raises
    ------
    ConfigError
        An unknown setting, or an impossible value.
    """
    # Room for any style that the preset's own width would have room for.
    ModelConfig.from_dict({**({"latent_dim": _IMAGE_LATENTS} if preset == "features" else {}), **model})
    TrainConfig.from_dict(train)


def mirrored_rows_belong(images: NDArray[Any]) -> bool:
    """Tell whether images mirrored left to right look like images of the same set.

    A linear classifier learns on half of the images to tell mirrored from others. Where it does little better than
    chance on the other half (photographs: 52 % of CIFAR-10), nothing that it knows of sets them apart; digits, of which
    it tells 80 %, are not what they were.

    Parameters
    ----------
    images : ndarray of shape (n, C, H, W)
    """
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline

    if len(images) < 2 * _SMALLEST_BATCH:
        return False
    chosen = _looked_at(images)
    halves = chosen[::2], chosen[1::2]
    if not halves[0].reshape(len(halves[0]), -1).var(axis=0).any():
        return False
    rows, mirrored = zip(*(_with_mirrored(half) for half in halves), strict=True)
    n_components = min(30, len(rows[0]) // 4, rows[0].shape[1])
    judge = make_pipeline(PCA(n_components, random_state=0), LinearDiscriminantAnalysis())
    return float(judge.fit(rows[0], mirrored[0]).score(rows[1], mirrored[1])) < _TOLD_APART


def backgrounds_differ(images: NDArray[Any]) -> bool:
    """Tell whether the light of images changes: whether what lies along their borders differs between them.

    Of drawings and scans it is the same in all, and one with another background is not like any of them.

    Parameters
    ----------
    images : ndarray of shape (n, C, H, W)
    """
    chosen = _looked_at(images)
    border = np.concatenate([chosen[:, :, 0], chosen[:, :, -1], chosen[..., 0], chosen[..., -1]], axis=2)
    return bool(np.median(border, axis=2).std(axis=0).max() > _LEAST_LIGHT * np.ptp(chosen))


def _looked_at(images: NDArray[Any]) -> NDArray[np.float32]:
    """Give some of the images, with few enough of their pixels to be held several times."""
    step = max(1, len(images) // _LOOKED_AT)
    down, across = (math.ceil(side / _LOOKED_AT_SIDE) for side in images.shape[2:])
    return np.asarray(images[::step][:_LOOKED_AT, :, ::down, ::across], dtype=np.float32)


def _with_mirrored(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    both = np.concatenate([images, images[..., ::-1]])
    return both.reshape(len(both), -1), np.repeat([0, 1], len(images))


def _features(
    rows: NDArray[Any], effort: str, n_rows: int, model_changes: dict[str, Any], train_changes: dict[str, Any]
) -> tuple[ModelConfig, TrainConfig]:
    image = rows.ndim == 4
    contrastive = train_changes.get("objective", "contrastive") == "contrastive"
    sizes = _image_sizes(rows.shape[1:]) if image else {"latent_dim": _TABLE_LATENTS, "hidden_dims": (256, 256)}
    latent_dim = model_changes.get("latent_dim", sizes["latent_dim"])
    if image and contrastive and isinstance(latent_dim, int):
        sizes["style_dim"] = latent_dim // _STYLE_SHARE
    model = ModelConfig.from_dict({**sizes, **model_changes})

    n_steps = _STEPS[effort]
    if image:
        n_steps = round(n_steps / max(1.0, math.sqrt(math.prod(rows.shape[2:]) / _PIXELS)))
    own: dict[str, Any] = {"batch_size": max(_SMALLEST_BATCH, min(_BATCH, n_rows // 8)), "weight_decay": 1e-2}
    if contrastive:
        own |= {"objective": "contrastive", "contrastive_weight": _TABLE_CONTRAST}
        if image:
            own |= _image_contrast(rows, effort, n_rows, model, train_changes)
    given = TrainConfig.from_dict({**own, **train_changes})
    own["max_epochs"] = min(math.ceil(n_steps / _steps_per_epoch(given, n_rows)), _MOST_EPOCHS[effort])
    own["checkpoint_every"] = max(1, own["max_epochs"] // _CHECKPOINTS)
    return model, TrainConfig.from_dict({**own, **train_changes})


def _image_contrast(
    images: NDArray[Any], effort: str, n_rows: int, model: ModelConfig, train_changes: dict[str, Any]
) -> dict[str, Any]:
    weight = 100.0 * math.prod(images.shape[1:]) / _PIXELS
    own: dict[str, Any] = {"contrastive_weight": min(max(weight, _LEAST_CONTRAST), _MOST_CONTRAST)}
    # Ids, unlike pixels, have neither light nor values in between: `auto` leaves them alone.
    pixels = model.likelihood != "tokens"
    light_differs = pixels and backgrounds_differ(images)
    if not light_differs:
        # What is alike in photographs is their light and colours: their neighbours are mostly of other classes.
        remembered = min(_REMEMBERED, n_rows)
        share = train_changes.get("remembered", remembered) / _REMEMBERED
        own |= {"remembered": remembered, "neighbours": max(1, round(_NEIGHBOURS[effort] * share))}
    if light_differs and images.shape[1] == _COLORS:
        own["contrastive_temperature"] = _PHOTOGRAPHS_TEMPERATURE
    if "augmentations" not in train_changes and pixels:
        own["augmentations"] = _augmentations(images, light_differs=light_differs)
    return own


def _image_sizes(shape: tuple[int, ...]) -> dict[str, Any]:
    n_halvings = max(2, math.ceil(math.log2(max(1.0, min(shape[1:]) / _LAST_SIDE))))
    return {"latent_dim": _IMAGE_LATENTS, "hidden_dims": (256,), "channels": _CHANNELS[:n_halvings]}


def _augmentations(images: NDArray[Any], *, light_differs: bool) -> tuple[str, ...]:
    from vaefeat.model.augmentation import suitable

    names = suitable(images.shape[1:])
    if light_differs and images.shape[1] == _COLORS:
        names = tuple(name for name in names if name not in _NOT_OF_PHOTOGRAPHS)
    if not light_differs:
        names = tuple(name for name in names if name not in _LIGHT)
    return (*names, "flip") if mirrored_rows_belong(images) else names


def _textbook(effort: str, n_rows: int, changes: dict[str, Any]) -> TrainConfig:
    epochs, steps, own = _TEXTBOOK[effort]
    given = TrainConfig.from_dict({**own, **changes})
    max_epochs = max(epochs, math.ceil(steps / _steps_per_epoch(given, n_rows)))
    max_epochs = changes.get("max_epochs", max_epochs)
    patience = {"patience": math.ceil(max_epochs / 5)} if effort == "best" else {}
    return TrainConfig.from_dict({"max_epochs": max_epochs, **patience, **own, **changes})


def _steps_per_epoch(config: TrainConfig, n_rows: int) -> int:
    return max(1, math.ceil(n_rows * (1 - config.heldout) / config.batch_size))
