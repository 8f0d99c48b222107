"""The TOML file of a run, and ``--set`` on top of it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.errors import ConfigError
from vaefeat.presets import EFFORTS, PRESETS, refuse_changes
from vaefeat.settings import (
    Settings,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_text,
    unknown_name,
    with_overrides,
)

__all__ = [
    "DataConfig",
    "FinetuneConfig",
    "ProbeConfig",
    "RunConfig",
    "ServeConfig",
    "TrackConfig",
    "WorkersConfig",
    "load_config",
    "with_workers",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Where rows and labels come from.

    Parameters
    ----------
    path : str
        ``digits`` for scikit-learn's embedded digits, or anything that :func:`vaefeat.data.load_rows` reads.
    pretrain_on : {"train", "all"}
        The rows that the encoder is trained on, without their labels. ``all`` includes the test rows' pixels.
    test_share : float
        Share of the rows that become test rows, where the data come without a test split.
    table : bool
        Read a Parquet file with text, categories, booleans or gaps as a table; CSV always is one.
    categorical : list of str
        Columns of a table that are categories although they hold numbers.
    image_size : int or list of int
        Height and width to which encoded images are resized, or one number for a square; where it is not given, images
        have to be of one size.
    labelled : bool
        Take labels that come with the rows. False leaves them out: of images whose sub-folders are no classes, or where
        only some rows have one.
    """

    path: str = "digits"
    pretrain_on: str = "train"
    test_share: float = 0.28
    table: bool = False
    categorical: Sequence[str] = ()
    image_size: int | Sequence[int] = ()
    labelled: bool = True

    def __post_init__(self) -> None:
        check_bool("data.table", self.table)
        check_bool("data.labelled", self.labelled)
        if self.image_size != () and self.size is None:
            raise ConfigError(
                f"got data.image_size={self.image_size!r}, wanted [height, width], or one number for a square, such as "
                "data.image_size=64"
            )
        if self.size and self.path == "digits":
            raise ConfigError("got data.image_size for the embedded digits; it resizes images in files, leave it out")
        if not _are_texts(self.categorical):
            raise ConfigError(f"got data.categorical={self.categorical!r}, wanted a list of columns")
        if self.pretrain_on not in {"train", "all"}:
            raise unknown_name("data.pretrain_on", str(self.pretrain_on), ("train", "all"))
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"got data.path={self.path!r}, wanted a text")
        if not isinstance(self.test_share, float) or not 0 < self.test_share < 1:
            raise ConfigError(f"got data.test_share={self.test_share!r}, wanted a number between 0 and 1")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width to resize images to; None where they stay as they are."""
        given = self.image_size
        sides = tuple(given) if isinstance(given, list | tuple) else (given, given)
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            return None
        return sides[0], sides[1]


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Settings):
    """The service that embeds the rows.

    Parameters
    ----------
    engine : {"ray", "local"}
    start_timeout_s : float
    """

    engine: str = "ray"
    start_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.engine not in {"ray", "local"}:
            raise unknown_name("serve.engine", str(self.engine), ("ray", "local"))
        if not isinstance(self.start_timeout_s, int | float) or not self.start_timeout_s > 0:
            raise ConfigError(f"got serve.start_timeout_s={self.start_timeout_s!r}, wanted a number of seconds over 0")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Settings):
    """How features are judged: a linear classifier on few labels, over several draws of them.

    Parameters
    ----------
    n_labels : int
        Labelled rows in a draw, balanced over the classes.
    n_draws : int
    seed : int
        Of the draws and the split.
    """

    n_labels: int = 50
    n_draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_labels", "n_draws"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"got probe.{name}={getattr(self, name)!r}, wanted a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(Settings):
    """The processes that the encoder is trained in.

    Parameters
    ----------
    count : int or str
        0 trains in the job's own process, a number in as many workers of Ray, and a text such as ``"1:4"`` in as many
        as there is room for, within these bounds, at any time.
    cpus : int
        Processors that Ray reserves for each worker. On a cluster this is what spreads workers over machines.
    rows : {"load", "share", "stream"}
        ``load``: each worker reads the data, whose path all machines must see. ``share``: the job reads them and puts
        them into Ray's object store, of which the workers of a machine share one copy. ``stream``: each worker reads
        only its part, block by block, while it trains.
    max_failures : int
        Workers that may be lost before the job gives up.
    address : str
        ``local`` starts a Ray of the job's own, on this machine and its loopback address; anything else is the address
        of a cluster, ``auto`` the one that this machine belongs to.
    timeout_s : float
        Seconds without a sign of life of any worker after which the job gives up.
    """

    count: int | str = 0
    cpus: int = 1
    rows: str = "load"
    max_failures: int = 3
    address: str = "local"
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        least, most = self.bounds
        if not 0 <= least <= most or (least == 0 and isinstance(self.count, str)):
            raise _impossible_count(self.count)
        check_int("workers.cpus", self.cpus, at_least=1)
        check_choice("workers.rows", self.rows, ("load", "share", "stream"))
        check_int("workers.max_failures", self.max_failures, at_least=0)
        check_text("workers.address", self.address)
        check_number("workers.timeout_s", self.timeout_s, above=0)

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest number of workers."""
        if isinstance(self.count, int) and not isinstance(self.count, bool):
            return self.count, self.count
        try:
            least, colon, most = str(self.count).partition(":")
            return int(least), int(most if colon else least)
        except ValueError:
            raise _impossible_count(self.count) from None

    @property
    def elastic(self) -> bool:
        """Whether the number may change while training."""
        return self.bounds[0] < self.bounds[1]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings):
    """The classifier that is shipped beside the encoder, where there are files of labels.

    Parameters
    ----------
    labels : str or list of str
        CSV or Parquet files of the labels there are, for rows of ``data.path``. Where none is named, no classifier is
        made.
    test_labels : str
        A file of labels of other rows, which the shipped classifier is asked for at the end; none where empty.
    id, label : str
        Columns of these files.
    id_column : str
        Of the data, where they are Parquet. Where it is empty, the path of an image below ``data.path``, or the row's
        number from 0 on.
    only : list of str
        Classifiers to try: ``logistic``, ``knn``, ``svc``, ``few_label_head``, ``finetune``; all when empty.
    n_draws : int
        How often labels are hidden, and every classifier is trained.
    max_steps : int
        Of a fine-tuning.
    name : str
        Of the classifier in the service; the encoder's with ``-pipeline`` behind it where empty.
    seed : int
        Of the draws and of every classifier.
    """

    labels: str | Sequence[str] = ()
    test_labels: str = ""
    id: str = "id"
    label: str = "label"
    id_column: str = ""
    only: Sequence[str] = ()
    n_draws: int = 5
    max_steps: int = 3000
    name: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.labels, str) and not _are_texts(self.labels):
            raise ConfigError(f"got finetune.labels={self.labels!r}, wanted the name of a file, or a list of them")
        if not _are_texts(self.only):
            raise ConfigError(f"got finetune.only={self.only!r}, wanted a list such as ['logistic', 'finetune']")
        for name in ("test_labels", "id", "label", "id_column", "name"):
            check_text(f"finetune.{name}", getattr(self, name))
        check_int("finetune.n_draws", self.n_draws, at_least=2)
        check_int("finetune.max_steps", self.max_steps, at_least=1)
        check_int("finetune.seed", self.seed, at_least=0)
        if self.test_labels and not self.files:
            raise ConfigError(
                "got finetune.test_labels without finetune.labels to learn from; name a file of them, too"
            )

    @property
    def files(self) -> tuple[str, ...]:
        """The files of labels to learn from; empty where no classifier is asked for."""
        return (self.labels,) * bool(self.labels) if isinstance(self.labels, str) else tuple(self.labels)

    def everywhere(self) -> Self:
        """Give the same with paths that mean the same in every working directory."""
        test = self.test_labels and str(Path(self.test_labels).resolve())
        return replace(self, labels=tuple(str(Path(file).resolve()) for file in self.files), test_labels=test)


@dataclass(frozen=True, kw_only=True)
class TrackConfig(Settings):
    """Where a job is logged besides its folder.

    Parameters
    ----------
    mlflow : bool
        Log settings, figures, learning curves and files to MLflow; it must be installed.
    uri : str
        Of MLflow's tracking: a server, or a folder as ``file:PATH``. Where it is empty, MLflow's own choice, which the
        environment variable ``MLFLOW_TRACKING_URI`` decides.
    experiment : str
    """

    mlflow: bool = False
    uri: str = ""
    experiment: str = "vaefeat"

    def __post_init__(self) -> None:
        check_bool("track.mlflow", self.mlflow)
        check_text("track.uri", self.uri)
        check_text("track.experiment", self.experiment)


def _refuse_unknown_keys(values: Mapping[str, Any], *, table: str, tables: Mapping[str, type[Settings]]) -> None:
    """Name the table, and the one that has such a key, where another has."""
    known = _fields_of_tables(tables)
    for key in values:
        if key in known[table]:
            continue
        if homes := [name for name, keys in known.items() if key in keys]:
            raise ConfigError(f"got {key} in [{table}]; did you mean [{homes[0]}], which has it?")
        raise unknown_name(f"key in [{table}]", key, known[table])


def _fields_of_tables(tables: Mapping[str, type[Settings]]) -> dict[str, set[str]]:
    every = {"train": TrainConfig, "model": ModelConfig, **tables}
    return {name: {f.name for f in fields(table)} for name, table in every.items()}


def _are_texts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) and value for value in values)


def _impossible_count(count: object) -> ConfigError:
    return ConfigError(f"got {count!r} workers, wanted a number such as 2, or bounds such as '1:4'")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run.

    Parameters
    ----------
    name : str
        Of the encoder.
    out : str
        Folder of the run, which is also the bundle's; in a file ``runs/NAME`` where it is not given.
    preset : {"features", "textbook"}
    effort : {"fast", "best"}
        See :func:`vaefeat.presets.choose_settings`.
    data, serve, probe, workers, finetune, track
        One TOML table each.
    model, train : mapping
        TOML tables of changes over the preset: fields of :class:`vaefeat.config.ModelConfig` and
        :class:`vaefeat.config.TrainConfig`.
    """

    name: str = "digits"
    out: str = "runs/digits"
    preset: str = "features"
    effort: str = "fast"
    data: DataConfig = field(default_factory=DataConfig)
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    serve: ServeConfig = field(default_factory=ServeConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        check_choice("effort", self.effort, EFFORTS)
        refuse_changes(self.model, self.train, preset=self.preset)

    @property
    def device(self) -> str:
        """That of training; no preset sets it."""
        return str(self.train.get("device", "auto"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from TOML's tables; raises ConfigError on unknown keys and impossible values."""
        known = [f.name for f in fields(cls)]
        tables: dict[str, type[Settings]] = {
            "data": DataConfig,
            "serve": ServeConfig,
            "probe": ProbeConfig,
            "workers": WorkersConfig,
            "finetune": FinetuneConfig,
            "track": TrackConfig,
        }
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                if homes := [name for name, keys in _fields_of_tables(tables).items() if key in keys]:
                    raise ConfigError(f"got configuration key {key!r}; did you mean {homes[0]}.{key}, in [{homes[0]}]?")
                raise unknown_name("configuration key", key, known)
            if key in {*tables, "model", "train"}:
                if not isinstance(value, Mapping):
                    raise ConfigError(f"got {key}={value!r}, wanted a table [{key}]")
            elif not (isinstance(value, str) and value):
                raise ConfigError(f"got {key}={value!r}, wanted a text")
            if isinstance(value, Mapping):
                _refuse_unknown_keys(value, table=key, tables=tables)
            made[key] = tables[key].from_dict(value) if key in tables else value
        # Two jobs without a folder must not share the demo's.
        made.setdefault("out", f"runs/{made.get('name', cls.name)}")
        return cls(**made)

    def everywhere(self) -> Self:
        """Give the same with paths that mean the same in every working directory."""
        source = self.data.path if self.data.path == "digits" else str(Path(self.data.path).resolve())
        return replace(
            self,
            out=str(Path(self.out).resolve()),
            data=replace(self.data, path=source),
            finetune=self.finetune.everywhere(),
        )

    def picked(self, *names: str) -> dict[str, Any]:
        """Give some values by dotted names; the name of a table stands for all that is in it."""
        found: dict[str, Any] = {}
        for name in names:
            value: Any = self.to_dict()
            for key in name.split("."):
                value = value[key]
            found |= (
                {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: value.to_dict() if isinstance(value, Settings) else value for key, value in values.items()}


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a TOML file and apply overrides.

    Parameters
    ----------
    path : Path
    overrides : iterable of str
        Each ``table.key=value``; the value as TOML writes it, a text also without quotes.

    Raises
    ------
    ConfigError
        The file cannot be read, or holds what is not known or not possible.
    """
    try:
        # Some editors begin UTF-8 with a mark, which TOML does not know.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"could not read the configuration {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"got {path}, which is not TOML: {error}") from error
    return RunConfig.from_dict(with_overrides(values, overrides))


def with_workers(config: RunConfig, count: str | None) -> RunConfig:
    """Set the number of workers, as ``--workers`` on a command line gives it; None leaves the file's."""
    if count is None:
        return config
    return replace(config, workers=replace(config.workers, count=int(count) if count.isdecimal() else count))
