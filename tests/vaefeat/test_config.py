"""Settings: what is refused and how, and that plain values give the same settings back; errors, which travel."""

from __future__ import annotations

import json
import math
import pickle
import tomllib
from typing import Any

import numpy as np
import pytest

from vaefeat import ModelConfig, TrainConfig, VAETransformer
from vaefeat.errors import ConfigError, InputError, MissingExtraError, VaefeatError
from vaefeat.model.vae import VAE
from vaefeat.settings import Settings, plain_value, unknown_name, with_overrides

NOT_WHOLE = [0, -1, 1.0, 1.5, True, "1", None, math.nan]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", None, True, 1j]

BAD_MODEL: list[tuple[str, Any]] = [
    *(("latent_dim", value) for value in NOT_WHOLE),
    *(("hidden_dims", value) for value in [(), [16], 16, None, "16", (0,), (1,), (16, -1), (1.5,), (True,), ("16",)]),
    *(("channels", value) for value in [(), 8, (0,), (8, None)]),
    *(("network", value) for value in ["cnn", "", None, 3]),
    *(("gaussian_std", value) for value in [0, -1, math.nan, math.inf, "1", "learnt", True, None]),
    *((name, value) for name in ("activation", "initialization") for value in ["sillu", "", None, 3]),
    *((name, value) for name in ("normalization", "binarize") for value in [0, 1, "true", None]),
    *(("residual_blocks", value) for value in [-1, 1.0, True, None]),
    *(
        (name, value)
        for name in ("posterior_flows", "n_categorical", "prior_components", "prior_flows")
        for value in NOT_WHOLE
    ),
    *((name, value) for name in ("n_categories", "levels", "flow_hidden_dim") for value in [1, *NOT_WHOLE]),
]
BAD_TRAIN: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("max_epochs", "batch_size", "checkpoint_every", "n_samples", "n_projections")
        for value in NOT_WHOLE
    ),
    *((name, value) for name in ("patience", "threads") for value in NOT_WHOLE if value is not None),
    *(("seed", value) for value in [-1, 0.5, True, "0", None]),
    *(
        (name, value)
        for name in ("kl_weight", "weight_decay", "free_bits", "divergence_weight")
        for value in [-1e-9, *NOT_NUMBERS]
    ),
    *(
        (name, value)
        for name in ("learning_rate", "gradient_clip", "temperature_start", "temperature_end")
        for value in [0, -1, *NOT_NUMBERS]
    ),
    *(("weight_prior_std", value) for value in [0, -1, *NOT_NUMBERS] if value is not None),
    *(("corruption_level", value) for value in [0, -0.1, 1.1, *NOT_NUMBERS]),
    *(("momentum", value) for value in [-0.1, 1, *NOT_NUMBERS]),
    *(("straight_through", value) for value in [0, 1, "true", None]),
    *(
        (name, value)
        for name in ("kl_estimator", "gradient", "corruption", "optimizer", "lr_schedule", "precision")
        for value in ["nothing", "", None, 3]
    ),
    *((name, value) for name in ("kl_warmup", "lr_warmup") for value in [-0.1, 1.1, *NOT_NUMBERS]),
    *(("heldout", value) for value in [0, -0.1, 0.91, 1, *NOT_NUMBERS]),
    *(("device", value) for value in ["gpu", "cuda:0", None]),
]
MODEL = ModelConfig(latent_dim=5, network="mlp", hidden_dims=(7, 8), channels=(4,), prior="vamp", gaussian_std=0.5)
TRAIN = TrainConfig(objective="iwae", kl_weight=0.0, max_epochs=3, patience=2, heldout=0.5, device="cpu", seed=9)
OTHERS = [
    ModelConfig(gaussian_std="optimal", binarize=True, normalization=False, likelihood="bernoulli"),
    TrainConfig(weight_prior_std=2.0, straight_through=False, corruption="masking", precision="bfloat16"),
]


@pytest.mark.parametrize(("name", "value"), BAD_MODEL, ids=repr)
def test_model_setting_out_of_range_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{name: value})  # type: ignore[arg-type]
    assert name in str(caught.value)
    assert "wanted" in str(caught.value) or "known: " in str(caught.value)


@pytest.mark.parametrize(("name", "value"), BAD_TRAIN, ids=repr)
def test_training_setting_out_of_range_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})  # type: ignore[arg-type]
    assert name in str(caught.value)
    assert str(value) in str(caught.value)


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    TrainConfig(kl_weight=0, weight_decay=0, kl_warmup=0, lr_warmup=1, heldout=0.9, patience=1, max_epochs=1, seed=0)
    TrainConfig(n_samples=1, free_bits=0, divergence_weight=0, n_projections=1, corruption_level=1, momentum=0)
    ModelConfig(latent_dim=1, hidden_dims=(2,), channels=(1,), gaussian_std=1e-9, residual_blocks=0)
    ModelConfig(n_categories=2, levels=2, flow_hidden_dim=2, posterior_flows=1, prior_flows=1, prior_components=1)


@pytest.mark.parametrize(
    ("kind", "name", "value", "nearest"),
    [
        (ModelConfig, "activation", "rleu", "relu"),
        (ModelConfig, "initialization", "xaviar", "xavier"),
        (ModelConfig, "gaussian_std", "optimum", "optimal"),
        (TrainConfig, "optimizer", "adagard", "adagrad"),
        (TrainConfig, "corruption", "mask", "masking"),
        (TrainConfig, "gradient", "doubly_reparametrized", "doubly_reparameterized"),
        (TrainConfig, "precision", "bfloat", "bfloat16"),
        (TrainConfig, "lr_schedule", "cosin", "cosine"),
        (TrainConfig, "kl_estimator", "analytical", "analytic"),
    ],
)
def test_unknown_choice_names_the_nearest(kind: type[Settings], name: str, value: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"got {name} '{value}'; did you mean '{nearest}'\? known: "):
        kind(**{name: value})


def test_message_tells_the_bounds() -> None:
    with pytest.raises(ConfigError, match=r"got heldout=0, wanted a number with 0 < heldout <= 0\.9$"):
        TrainConfig(heldout=0)
    with pytest.raises(ConfigError, match=r"got kl_warmup=2, wanted a number with 0 <= kl_warmup <= 1$"):
        TrainConfig(kl_warmup=2)
    with pytest.raises(ConfigError, match=r"got latent_dim=0, wanted a whole number of at least 1$"):
        ModelConfig(latent_dim=0)


@pytest.mark.parametrize(
    ("kind", "key", "nearest"),
    [
        (ModelConfig, "latent_dims", "latent_dim"),
        (ModelConfig, "hiden_dims", "hidden_dims"),
        (TrainConfig, "epochs", "max_epochs"),
        (TrainConfig, "lerning_rate", "learning_rate"),
    ],
)
def test_unknown_key_names_the_nearest(kind: type[Settings], key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"got {kind.__name__} key '{key}'; did you mean '{nearest}'\?$"):
        kind.from_dict({key: 1})


def test_unknown_key_that_is_near_nothing_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"key 'zzz'; known: activation, .*, gaussian_std, hidden_dims"):
        ModelConfig.from_dict({"zzz": 1})


@pytest.mark.parametrize("setting", ["posterior", "prior", "likelihood"])
def test_unknown_distribution_lists_what_is_known(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"got {setting} 'gausian'; .*known: "):
        VAE(ModelConfig.from_dict({setting: "gausian"}), (6,))


@pytest.mark.parametrize("setting", ["posterior", "prior", "likelihood", "network"])
@pytest.mark.parametrize("value", [None, 3, {"x": 1}])
def test_name_that_is_no_text_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"got {setting}=.*, wanted a name in quotes"):
        ModelConfig(**{setting: value})


def test_unknown_name_is_an_input_error_and_so_a_value_error() -> None:
    error = unknown_name("prior", "vanp", ["vamp", "standard"])
    assert isinstance(error, InputError)
    assert isinstance(error, ValueError)
    assert str(error) == "got prior 'vanp'; did you mean 'vamp'? known: standard, vamp"


@pytest.mark.parametrize("settings", [ModelConfig(), TrainConfig(), MODEL, TRAIN, *OTHERS])
def test_settings_survive_json(settings: Settings) -> None:
    plain = settings.to_dict()
    assert type(settings).from_dict(json.loads(json.dumps(plain))) == settings
    assert not any(isinstance(value, tuple) for value in plain.values())


def test_settings_are_read_from_toml() -> None:
    text = 'latent_dim = 5\nnetwork = "mlp"\nhidden_dims = [7, 8]\nchannels = [4]\nprior = "vamp"\ngaussian_std = 0.5'
    assert ModelConfig.from_dict(tomllib.loads(text)) == MODEL


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        MODEL.latent_dim = 6  # type: ignore[misc]


def test_transformer_turns_numpys_numbers_into_settings() -> None:
    # Parameter grids and samplers hand out NumPy's numbers.
    transformer = VAETransformer(
        np.int64(3),  # type: ignore[arg-type]
        hidden_dims=np.array([16, 8]),  # type: ignore[arg-type]
        channels=[np.int32(4)],  # type: ignore[arg-type]
        gaussian_std=np.float32(0.5),  # type: ignore[arg-type]
        kl_weight=np.float64(0.25),
        max_epochs=np.int16(2),  # type: ignore[arg-type]
        network=np.str_("mlp"),
    )
    model, train = transformer._model_changes(), transformer._train_changes(7)
    assert ModelConfig.from_dict(model) == ModelConfig(
        latent_dim=3, hidden_dims=(16, 8), channels=(4,), gaussian_std=0.5, network="mlp"
    )
    assert TrainConfig.from_dict(train) == TrainConfig(kl_weight=0.25, max_epochs=2, seed=7)
    for settings in (model, train):
        assert {type(value) for value in settings.values()} <= {int, float, bool, str, list, tuple, type(None)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int16(2), 2),
        (np.bool_(True), True),
        (np.array(0.5), 0.5),
        (np.array([16, 8]), (16, 8)),
        ([np.int64(4), (np.float64(0.5), "a")], (4, (0.5, "a"))),
        ({"mean": 1}, {"mean": 1}),
    ],
)
def test_plain_value_has_nothing_of_numpy_left(value: Any, expected: Any) -> None:
    # NumPy's numbers equal Python's, but no JSON is made of them.
    plain = plain_value(value)
    assert (plain, json.dumps(plain)) == (expected, json.dumps(expected))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.max_epochs=5", {"train": {"max_epochs": 5, "seed": 1}}),
        ("train.heldout=0.2", {"train": {"heldout": 0.2, "seed": 1}}),
        ("model.hidden_dims=[8, 9]", {"train": {"seed": 1}, "model": {"hidden_dims": [8, 9]}}),
        ("model.prior=vamp", {"train": {"seed": 1}, "model": {"prior": "vamp"}}),
        ('name="1"', {"train": {"seed": 1}, "name": "1"}),
        ("name=a=b", {"train": {"seed": 1}, "name": "a=b"}),
        ("name=", {"train": {"seed": 1}, "name": ""}),
    ],
)
def test_override_is_read_as_toml_or_as_text(assignment: str, expected: dict[str, Any]) -> None:
    values = {"train": {"seed": 1}}
    assert with_overrides(values, [assignment]) == expected
    assert values == {"train": {"seed": 1}}


def test_later_override_wins() -> None:
    assert with_overrides({}, ["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [("train.seed", "wanted key=value"), ("=5", "wanted key=value"), ("train.seed.x=1", "'seed' is a value")],
)
def test_override_that_cannot_be_laid_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides({"train": {"seed": 1}}, [assignment])


@pytest.mark.parametrize(
    "image_shape",
    [(1, 8, 9), (8, 8), (1, 8, 8, 1), (1, 64, 0), (-1, -8, 8), (1, 8.0, 8), (1, 8, None), "188", 64],
    ids=str,
)
def test_bad_image_shape_of_a_transformer_is_refused(image_shape: Any) -> None:
    with pytest.raises(InputError, match=r"wanted \(channels, height, width\)|wanted 72 values for image_shape"):
        VAETransformer(image_shape=image_shape).fit(np.eye(64))


def test_images_of_another_shape_than_asked_are_refused() -> None:
    with pytest.raises(InputError, match=r"got rows of shape \(1, 4, 16\), wanted image_shape=\(1, 8, 8\)"):
        VAETransformer(image_shape=(1, 8, 8)).fit(np.zeros((5, 1, 4, 16)))


def subclasses(kind: type[VaefeatError]) -> list[type[VaefeatError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]


def test_every_error_survives_a_pickle() -> None:
    # Errors travel between processes: workers of joblib, Ray.
    errors = [kind("what, wanted") for kind in subclasses(VaefeatError) if not issubclass(kind, MissingExtraError)]
    assert len(errors) > 8
    for error in [*errors, MissingExtraError("Training", extra="train")]:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
