"""``config.quantization_config`` as Transformers wants it: the manifest behind its interface."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from rarefy.layers.manifest import Manifest, read_manifest


class RarefyConfig(QuantizationConfigMixin):
    """Holds a validated ``Manifest``. Raises CheckpointError for unknown versions, keys and values."""

    def __init__(self, **data: Any):
        self.manifest: Manifest = read_manifest(data)
        self.quant_method = self.manifest.quant_method  # type: ignore[assignment]

    @classmethod
    def of(cls, manifest: Manifest) -> RarefyConfig:
        return cls(**manifest.model_dump(mode="json"))

    def to_dict(self) -> dict[str, Any]:
        return self.manifest.model_dump(mode="json")

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"RarefyConfig(recipe='{self.manifest.recipe}', format_version={self.manifest.format_version})"
