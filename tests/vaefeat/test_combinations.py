"""Combinations that make no sense: each is refused by name, and the nearest that its message names really works."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vaefeat import ModelConfig, TrainConfig
from vaefeat.combinations import refuse_pair
from vaefeat.errors import ConfigError
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.posteriors import POSTERIORS
from vaefeat.model.priors import PRIORS
from vaefeat.model.vae import VAE
from vaefeat.training import Trainer

Changes = dict[str, Any]
#: Words of the message, and the change that they ask for.
Remedy = tuple[str, Changes]


def case(settings: Changes, *remedies: Remedy) -> tuple[Changes, tuple[Remedy, ...]]:
    """Name settings that are refused, and what the message says to take instead."""
    return settings, remedies


def pair(of_model: Changes, of_training: Changes, *remedies: Remedy) -> tuple[Changes, Changes, tuple[Remedy, ...]]:
    """Name a model and a training that do not go together, and what the message says to take instead."""
    return of_model, of_training, remedies


TRAINED_PRIORS = ("learned", "mixture", "vamp", "flow")
STANDARD = ("prior='standard'", {"prior": "standard"})
MIXTURE_OR_FLOW = (("prior='mixture' or 'flow'", {"prior": "mixture"}), ("'flow'", {"prior": "flow"}))
NO_FREE_BITS = ("free_bits=0", {"free_bits": 0.0})

REFUSED_MODELS = [
    *(
        case({"posterior": posterior, "latent_dim": 12, "prior": prior}, STANDARD)
        for posterior, prior in itertools.product(("categorical", "joint"), TRAINED_PRIORS)
    ),
    *(
        case({"posterior": "categorical", "latent_dim": wrong}, (f"latent_dim={right}", {"latent_dim": right}))
        for wrong, right in ((1, 4), (7, 8), (9, 8), (15, 16))
    ),
    *(
        case(
            {"posterior": "joint", "latent_dim": wrong, "n_categorical": 2},
            ("latent_dim=9 or more", {"latent_dim": 9}),
            ("posterior='categorical'", {"posterior": "categorical", "latent_dim": 8}),
        )
        for wrong in (1, 8)
    ),
    case({"posterior": "full", "latent_dim": 1}, ("posterior='diagonal'", {"posterior": "diagonal"})),
    *(
        case(
            {"prior": "vamp", "posterior": posterior},
            ("posterior='full' or 'diagonal'", {"posterior": "full"}),
            ("'diagonal'", {"posterior": "diagonal"}),
            *MIXTURE_OR_FLOW,
        )
        for posterior in ("planar", "iaf", "deterministic")
    ),
    case({"prior": "vamp", "likelihood": "tokens"}, *MIXTURE_OR_FLOW),
    *(
        case(
            {"binarize": True, "likelihood": likelihood},
            ("likelihood='bernoulli'", {"likelihood": "bernoulli"}),
            ("binarize=False", {"binarize": False}),
        )
        for likelihood in ("gaussian", "categorical", "tokens", "continuous_bernoulli")
    ),
    case({"likelihood": "tokens", "network": "conv"}, ("network='mlp'", {"network": "mlp"})),
]

REFUSED_TRAININGS = [
    case(
        {"objective": "iwae", "kl_estimator": "analytic"},
        ("kl_estimator='auto'", {"kl_estimator": "auto"}),
        ("objective='elbo'", {"objective": "elbo"}),
    ),
    *(
        case(
            {"gradient": "doubly_reparameterized", "objective": objective},
            ("gradient='auto'", {"gradient": "auto"}),
            ("objective='iwae' with n_samples above 1", {"objective": "iwae", "n_samples": 2}),
        )
        for objective in OBJECTIVES
        if objective != "iwae"
    ),
    *(
        case(
            {"free_bits": 0.5, **others},
            ("objective='elbo' and kl_estimator='auto'", {"objective": "elbo", "kl_estimator": "auto"}),
            NO_FREE_BITS,
        )
        for others in (
            {"kl_estimator": "sampled"},
            *({"objective": objective} for objective in OBJECTIVES if objective != "elbo"),
        )
    ),
]

WITHOUT_CLOSED_FORM = [
    ("planar", "standard"),
    ("iaf", "learned"),
    ("full", "flow"),
    *(("diagonal", prior) for prior in ("mixture", "vamp", "flow")),
]
REFUSED_PAIRS = [
    *(
        pair(
            {"posterior": "deterministic"},
            {"objective": objective},
            ("objective='reconstruction'", {"objective": "reconstruction"}),
            ("'mmd'", {"objective": "mmd"}),
            ("'sliced_wasserstein'", {"objective": "sliced_wasserstein"}),
            ("posterior='diagonal'", {"posterior": "diagonal"}),
        )
        for objective in ("elbo", "iwae", "infovae")
    ),
    *(
        pair(
            {"posterior": posterior, "prior": prior},
            {"kl_estimator": "analytic"},
            ("kl_estimator='auto' or 'sampled'", {"kl_estimator": "auto"}),
            ("'sampled'", {"kl_estimator": "sampled"}),
        )
        for posterior, prior in WITHOUT_CLOSED_FORM
    ),
    *(
        pair(
            {"posterior": posterior, "prior": prior},
            {"free_bits": 0.5},
            ("posterior='diagonal' with prior='standard'", {"posterior": "diagonal", "prior": "standard"}),
            ("or 'learned'", {"posterior": "diagonal", "prior": "learned"}),
            NO_FREE_BITS,
        )
        for posterior, prior in [*WITHOUT_CLOSED_FORM, ("full", "standard")]
    ),
    *(
        pair(
            {"posterior": posterior, "latent_dim": 12},
            {"objective": "iwae", "n_samples": 2, "gradient": "doubly_reparameterized"},
            ("gradient='auto'", {"gradient": "auto"}),
            ("posterior='diagonal' or 'full'", {"posterior": "diagonal"}),
            ("'full'", {"posterior": "full"}),
        )
        for posterior in ("planar", "iaf", "categorical", "joint")
    ),
    *(
        pair({"likelihood": "tokens"}, {"corruption": corruption}, ("corruption='masking'", {"corruption": "masking"}))
        for corruption in ("gaussian", "salt_and_pepper")
    ),
    *(
        pair({"prior": prior}, {"objective": objective}, STANDARD, ("objective='infovae'", {"objective": "infovae"}))
        for prior, objective in itertools.product(TRAINED_PRIORS, ("mmd", "sliced_wasserstein", "reconstruction"))
    ),
    *(
        pair(
            {"style_dim": 2} if name == "style_dim" else {},
            {"objective": objective, **({"neighbours": 3} if name == "neighbours" else {})},
            ("objective='contrastive'", {"objective": "contrastive"}),
            (f"{name}=0", {name: 0}),
        )
        for name, objective in itertools.product(("style_dim", "neighbours"), OBJECTIVES)
        if objective != "contrastive"
    ),
]


def model(**changes: Any) -> ModelConfig:
    small = {"latent_dim": 6, "hidden_dims": (4,), "n_categories": 4, "prior_components": 2, "flow_hidden_dim": 4}
    return ModelConfig(**{**small, **changes})


def rows_for() -> NDArray[np.uint8]:
    """Give rows that any likelihood takes: values of 0 and 1."""
    return np.random.default_rng(0).integers(0, 2, size=(8, 5)).astype(np.uint8)


def name_of(settings: Any) -> str:
    """Name a case by its settings alone."""
    return "-".join(f"{key}={value}" for key, value in settings.items()) if isinstance(settings, dict) else ""


def text_of(settings: Changes) -> list[str]:
    """Tell how a message shows these settings, as a caller would type them."""
    return [f"{key}={value!r}" for key, value in settings.items()]


@pytest.mark.parametrize(("settings", "remedies"), REFUSED_MODELS, ids=name_of)
def test_model_that_cannot_be_is_refused_and_the_nearest_one_works(
    settings: Changes, remedies: tuple[Remedy, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        model(**settings)
    message = str(caught.value)
    named = {key: value for key, value in settings.items() if key not in {"latent_dim", "n_categorical"}}
    assert message.startswith("got ")
    assert all(text in message for text in text_of(named))
    for words, change in remedies:
        assert words in message.partition("take")[2]
        config = model(**{**settings, **change})
        assert len(VAE.for_rows(config, rows_for()).row_shape) == 1


@pytest.mark.parametrize(("settings", "remedies"), REFUSED_TRAININGS, ids=name_of)
def test_training_that_cannot_be_is_refused_and_the_nearest_one_is_taken(
    settings: Changes, remedies: tuple[Remedy, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    message = str(caught.value)
    assert all(text in message for text in text_of(settings))
    for words, change in remedies:
        assert words in message.partition("take")[2]
        TrainConfig(**{**settings, **change})


@pytest.mark.parametrize(("of_model", "of_training", "remedies"), REFUSED_PAIRS, ids=name_of)
def test_objective_that_a_model_has_no_terms_for_is_refused_and_the_nearest_pair_trains(
    of_model: Changes, of_training: Changes, remedies: tuple[Remedy, ...]
) -> None:
    config = model(**of_model)
    rows = rows_for()
    vae, refused = VAE.for_rows(config, rows), TrainConfig(**of_training, device="cpu")
    with pytest.raises(ConfigError) as caught:
        Trainer(vae, rows, refused)
    message = str(caught.value)
    named = {key: value for key, value in {**of_model, **of_training}.items() if key not in {"latent_dim", "n_samples"}}
    if "gradient" in named:
        del named["objective"]  # the only one that has this gradient
    assert all(text in message for text in text_of(named))
    for words, change in remedies:
        assert words in message.partition("take")[2]
        fields = ModelConfig.__dataclass_fields__
        mended = model(**{**of_model, **{key: value for key, value in change.items() if key in fields}})
        train = TrainConfig(
            **{**of_training, **{key: value for key, value in change.items() if key not in fields}},
            device="cpu",
            max_epochs=1,
            threads=1,
        )
        result = Trainer(VAE.for_rows(mended, rows), rows, train).run()
        assert np.isfinite(result.evaluation.objective)


@pytest.mark.parametrize(
    ("posterior", "prior", "objective"), list(itertools.product(POSTERIORS, PRIORS, OBJECTIVES)), ids="-".join
)
def test_every_combination_either_trains_a_step_or_is_refused_before_one(
    posterior: str, prior: str, objective: str
) -> None:
    rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    train = TrainConfig(objective=objective, n_samples=2, max_epochs=1, device="cpu", threads=1)
    try:
        config = model(posterior=posterior, prior=prior, latent_dim=8 if posterior == "categorical" else 6)
        refuse_pair(config, train)
    except ConfigError:
        return  # by name: the tests above
    result = Trainer(VAE.for_rows(config, rows), rows, train).run()
    assert np.isfinite(result.evaluation.objective)


def test_latents_of_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"got latent_dim=0, wanted a whole number of at least 1"):
        ModelConfig(latent_dim=0)


def test_names_that_others_register_are_theirs_to_combine() -> None:
    ModelConfig(posterior="mine", prior="vamp", latent_dim=1)
    refuse_pair(ModelConfig(posterior="mine", prior="theirs"), TrainConfig(free_bits=1.0, kl_estimator="analytic"))
    refuse_pair(ModelConfig(style_dim=2), TrainConfig(objective="mine", neighbours=3))
