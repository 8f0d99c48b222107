"""Pretrain a variational auto-encoder on unlabelled rows and serve its posterior mean as features.

The public names are imported lazily: ``import vaefeat`` loads neither torch nor ONNX Runtime, so that the serving side
stays small and a missing extra is reported by the name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vaefeat.errors import requiring

if TYPE_CHECKING:
    from vaefeat.blocks import open_blocks
    from vaefeat.bundle import Bundle, load_bundle
    from vaefeat.config import ModelConfig, TrainConfig
    from vaefeat.encoder import OnnxEncoder
    from vaefeat.errors import VaefeatError
    from vaefeat.features import VAEFeatures
    from vaefeat.finetune import FineTuneClassifier
    from vaefeat.grid import GridRun, pretrain_grid
    from vaefeat.heads import FewLabelHead, few_label_head
    from vaefeat.onnx_pipeline import export_pipeline
    from vaefeat.predictor import OnnxPredictor
    from vaefeat.pretraining import pretrain
    from vaefeat.remote import AsyncRemoteEncoder, RemoteEncoder
    from vaefeat.transformer import VAETransformer
    from vaefeat.vae_classifier import VAEClassifier

__all__ = [
    "AsyncRemoteEncoder",
    "Bundle",
    "FewLabelHead",
    "FineTuneClassifier",
    "GridRun",
    "ModelConfig",
    "OnnxEncoder",
    "OnnxPredictor",
    "RemoteEncoder",
    "TrainConfig",
    "VAEClassifier",
    "VAEFeatures",
    "VAETransformer",
    "VaefeatError",
    "export_pipeline",
    "few_label_head",
    "load_bundle",
    "open_blocks",
    "pretrain",
    "pretrain_grid",
]

try:
    __version__ = version("vaefeat")
except PackageNotFoundError:  # a checkout that is on the path without being installed
    __version__ = "0+checkout"

_ROOMS = {
    "AsyncRemoteEncoder": "vaefeat.remote",
    "Bundle": "vaefeat.bundle",
    "FewLabelHead": "vaefeat.heads",
    "FineTuneClassifier": "vaefeat.finetune",
    "GridRun": "vaefeat.grid",
    "ModelConfig": "vaefeat.config",
    "OnnxEncoder": "vaefeat.encoder",
    "OnnxPredictor": "vaefeat.predictor",
    "RemoteEncoder": "vaefeat.remote",
    "TrainConfig": "vaefeat.config",
    "VAEClassifier": "vaefeat.vae_classifier",
    "VAEFeatures": "vaefeat.features",
    "VAETransformer": "vaefeat.transformer",
    "VaefeatError": "vaefeat.errors",
    "export_pipeline": "vaefeat.onnx_pipeline",
    "few_label_head": "vaefeat.heads",
    "load_bundle": "vaefeat.bundle",
    "open_blocks": "vaefeat.blocks",
    "pretrain": "vaefeat.pretraining",
    "pretrain_grid": "vaefeat.grid",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'vaefeat' has no attribute {name!r}")
    with requiring("train", what=f"vaefeat.{name}"):
        return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
