"""Transformers: ``from_pretrained`` and ``save_pretrained`` of compressed models on every 5.x."""

from __future__ import annotations


def register() -> None:
    """Make Transformers' Auto classes know ``quant_method: rarefy``. Safe to call twice."""
    from transformers.quantizers import auto

    from rarefy.integrations.transformers.config import RarefyConfig
    from rarefy.integrations.transformers.quantizer import RarefyQuantizer

    # The decorators refuse a second registration, which a reloaded module would be.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["rarefy"] = RarefyConfig
    auto.AUTO_QUANTIZER_MAPPING["rarefy"] = RarefyQuantizer


# Loading it here calls ``register`` (see ``rarefy/__init__.py``) before any module of this package is half imported.
import transformers.quantizers.auto  # noqa: E402, F401
