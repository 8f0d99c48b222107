"""The stage that writes ``report.html``, one self-contained page about a job, and ``overview.png`` for other pages."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from pipelines.environment import ENVIRONMENT_FILE
from pipelines.evaluate import EVALUATE, METRICS_FILE, OURS
from pipelines.features import CHECK_FILE, FEATURES_FILE, read_features
from pipelines.finetuning.stage import CLASSIFIER_FOLDER, COMPARISON, COMPARISON_PICTURE, FINETUNE
from pipelines.job import Job
from pipelines.pretrain import HISTORY
from pipelines.probes import HEADS
from pipelines.report_pictures import CHART_SCALE, draw_pictures, neighbourhoods
from pipelines.stages import Outcome, Record, Stage
from vaefeat.atomic import replace_file
from vaefeat.bundle import MANIFEST_FILE, load_bundle

__all__ = ["REPORT", "REPORT_FILE"]

REPORT_FILE = "report.html"
_OVERVIEW_FILE = "overview.png"
#: What came before, in its order: the cost of each is shown.
_STAGES = ("pretrain", "export", "embed", "check", "evaluate")


def _write(job: Job, attempt: str) -> Outcome:
    del attempt
    bundle = load_bundle(job.folder)
    history, check, environment = (
        json.loads((job.folder / name).read_text()) for name in (HISTORY, CHECK_FILE, ENVIRONMENT_FILE)
    )
    # Where rows come without labels, there may be figures of a time when they had some.
    metrics = json.loads((job.folder / METRICS_FILE).read_text()) if job.is_labelled else None
    features = read_features(job.folder)
    pictures = draw_pictures(job, bundle, history=history, metrics=metrics, features=features)
    replace_file(job.folder / _OVERVIEW_FILE, pictures["overview"])
    stages, comparison = [name for name in _STAGES if metrics is not None or name != EVALUATE.name], None
    if job.config.finetune.files:
        stages.append(FINETUNE.name)
        comparison = json.loads((job.folder / COMPARISON).read_text())
        pictures["comparison"] = (job.folder / COMPARISON_PICTURE).read_bytes()
    page = _template().render(
        config=job.config,
        manifest=bundle.manifest,
        digest=bundle.digest,
        history=history,
        rows_per_s=float(np.median([record["rows_per_s"] for record in history])),
        metrics=metrics,
        judged=None if metrics is None else _judged(metrics["test_error_percent"]),
        check=check,
        costs=[record for name in stages if (record := Record.read(job, name))],
        comparison=comparison,
        shipped=None if comparison is None else _shipped(comparison),
        classifier_folder=CLASSIFIER_FOLDER,
        environment=environment,
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        widths={name: round(_width(content) / CHART_SCALE) for name, content in pictures.items()},
        neighbourhoods=neighbourhoods(job.parts, features.train["mean"], features.test["mean"], bundle),
        kind_shown="Test" if job.parts.has_test else "Training",
        is_image=bundle.manifest.input.kind == "image",
    )
    replace_file(job.folder / REPORT_FILE, page.encode())
    return Outcome((REPORT_FILE, _OVERVIEW_FILE), f"{REPORT_FILE}, {len(page) / 2**20:.1f} MiB")


def _judged(probes: list[dict[str, Any]]) -> dict[str, Any]:
    """Sort errors for the page: by features, and the least of ours, of baselines and behind each head."""
    return {
        "heads": list(HEADS),
        "probes": _by_features(probes),
        "best": _least(found for found in probes if found["features"] in OURS.values()),
        "rival": _least(found for found in probes if found["features"] not in OURS.values()),
        "least": {head: _least(found for found in probes if found["head"] == head) for head in HEADS},
    }


def _shipped(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Find the classifier that was chosen."""
    found: dict[str, Any] = next(one for one in comparison["classifiers"] if one["name"] == comparison["shipped"])
    return found


def _width(picture: bytes) -> int:
    with Image.open(io.BytesIO(picture)) as opened:
        return opened.width


def _by_features(probes: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Group what was found by features, the least error first."""
    names = dict.fromkeys(found["features"] for found in probes)
    lines = [(name, [found for found in probes if found["features"] == name]) for name in names]
    return sorted(lines, key=lambda line: float(line[1][0]["mean"]))


def _least(probes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return min(probes, key=lambda found: float(found["mean"]))


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


REPORT = Stage(
    name="report",
    does="draw and write the report",
    settings=lambda config: config.picked("name", "probe", "serve.engine", "data.pretrain_on"),
    rows="parts",
    reads=(HISTORY, MANIFEST_FILE, FEATURES_FILE, CHECK_FILE, METRICS_FILE, *FINETUNE.writes),
    writes=(REPORT_FILE, _OVERVIEW_FILE),
    work=_write,
)
