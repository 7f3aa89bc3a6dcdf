"""rarefy: transformer models made smaller and faster by sparsity and quantization, with the cost stated.

Importing registers rarefy with Transformers, at once if Transformers is loaded and otherwise the moment it loads, so
``AutoModel*.from_pretrained(folder)`` then works for compressed folders. The verbs load what they need when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rarefy.core.imports import when_imported
from rarefy.core.version import __version__ as __version__

if TYPE_CHECKING:
    from rarefy.api import (
        attention_maps,
        compare,
        compare_caches,
        compress,
        evaluate,
        evaluate_long,
        evaluate_tasks,
        kv_cache,
        load,
        load_tokenizer,
        merge_adapter,
        runner,
        save,
        set_attention,
        train,
    )

__all__ = [
    "attention_maps", "compare", "compare_caches", "compress", "evaluate", "evaluate_long", "evaluate_tasks",
    "kv_cache", "load", "load_tokenizer", "merge_adapter", "runner", "save", "set_attention", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rarefy' has no attribute '{name}'")
    from rarefy import api

    return getattr(api, name)


def _register() -> None:
    from rarefy.integrations.transformers import register

    register()


def _register_attention() -> None:
    from rarefy.integrations.transformers.attention import register_attention

    register_attention()


when_imported("transformers.quantizers.auto", _register)
when_imported("transformers.modeling_utils", _register_attention)
