"""Stock transformers models made compressible."""

from omnisieve.backbones.adapter import Adapter, BackboneError, adapter_for, feature_name
from omnisieve.backbones.attach import Attachment, attach
from omnisieve.backbones.estimator import Estimator
from omnisieve.backbones.loading import load_backbone

__all__ = [
    "Adapter",
    "Attachment",
    "BackboneError",
    "Estimator",
    "adapter_for",
    "attach",
    "feature_name",
    "load_backbone",
]
