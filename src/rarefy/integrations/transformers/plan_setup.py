"""A recipe for attention on a model: a plan for every layer, its parameters, and where a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.attention.executors import executors
from rarefy.attention.plan import AttentionPlan, AttentionShape
from rarefy.attention.report import PlanReport
from rarefy.contracts import AttentionRecipe, attention_recipes
from rarefy.core.config import parse
from rarefy.core.errors import CheckpointError, OptionError, RecipeError, UnsupportedError
from rarefy.core.logs import logger
from rarefy.integrations.transformers import attention, kv_setup
from rarefy.integrations.transformers.kv_setup import Params, digest, kv_recipe, read_setup, write_setup
from rarefy.layers.manifest import AttentionEntry
from rarefy.recipes import discover

FORMAT = "rarefy-attention-1"
PARAMS_NAME = "attention.safetensors"  # in a checkpoint
SETUP = "_rarefy_attention"  # attribute of a model: the setup that its layers follow
log = logger(__name__)


class AttentionSetup:
    """The recipe ``name`` with its options and parameters, by layer, and the `digest` of the model they belong to. What
    its plans do is counted in ``report``."""

    def __init__(self, name: str, recipe: AttentionRecipe, params: Params | None = None, model: str | None = None):
        if recipe.needs and not params:
            raise OptionError(
                f"Attention recipe '{name}' has parameters, found by {' and '.join(sorted(recipe.needs))}; name a file "
                f"that has them, such as params=FOLDER/{PARAMS_NAME}."
            )
        self.name, self.recipe, self.params, self.model = name, recipe, params or {}, model
        self.report = PlanReport()

    def plan(self, shape: AttentionShape, device: torch.device) -> AttentionPlan:
        """How a layer attends."""
        own = self.params.get(shape.layer, {})
        return self.recipe.plan(shape, {name: tensor.to(device) for name, tensor in own.items()})

    def describe(self) -> dict[str, Any]:
        """The recipe and its options, as JSON."""
        options = self.recipe.model_dump(mode="json")
        return {"recipe": self.name, "version": self.recipe.recipe_version, "options": options}

    def save(self, path: str | Path) -> None:
        """Write recipe, options and parameters to a safetensors file."""
        write_setup(Path(path), FORMAT, self.params, {"model": self.model or "", **self.describe()})


def share_read(model: Any) -> float | None:
    """The share of blocks that was read, None where the model has no plan; a warning where a plan let every pass stay
    dense, since that measures nothing of it."""
    setup: AttentionSetup | None = getattr(model, SETUP, None)
    if setup is None:
        return None
    dense = setup.report.dense()
    if dense and all(not layer.counts for layer in setup.report.layers.values()):
        log.warning(
            "'%s' stayed dense in every pass (%s), so that this measures dense attention: give longer contexts, or "
            "set what keeps it dense (such as %s:dense_below=0).", setup.name, ", ".join(dense), setup.name,
        )  # fmt: skip
    return setup.report.density()


def attention_recipe(name: str, options: Mapping[str, Any]) -> AttentionRecipe:
    """The recipe ``name`` with ``options``. Raises RecipeError, and OptionError for an unknown executor."""
    discover()
    recipe = parse(attention_recipes.get(name), options, f"Options of attention recipe '{name}'", RecipeError)
    if recipe.executor != "auto":
        executors.get(recipe.executor)
    return recipe


def open_attention(
    model: Any, name: str, *, params: str | Path | Params | None = None, options: Mapping[str, Any]
) -> AttentionSetup:
    """The setup of recipe ``name``: with ``options``, or those in the file ``params`` beneath them."""
    if isinstance(params, str | Path):
        found = load_setup(Path(params), model)
        if found.name != name:
            raise OptionError(f"'{params}' holds parameters of recipe '{found.name}'; name that recipe.")
        given = {**found.recipe.model_dump(), **options}
        return AttentionSetup(name, attention_recipe(name, given), found.params, found.model)
    return AttentionSetup(name, attention_recipe(name, options), params, digest(model) if params else None)


def load_setup(path: Path, model: Any | None = None) -> AttentionSetup:
    """The setup in a file that `AttentionSetup.save` wrote. Raises CheckpointError when the file is damaged, of another
    version, or belongs to another model than ``model``."""
    found = read_setup(path, FORMAT, attention_recipes, model, ("attention", "belongs to", "make them anew"))
    return AttentionSetup(*found)


def attention_modules(model: Any) -> dict[int, nn.Module]:
    """Layer number -> attention module, in the order of layers."""
    found = {
        module.layer_idx: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and (hasattr(module, "scaling") or type(module).__name__.endswith("Attention"))
    }
    return dict(sorted(found.items()))


def shape_of(module: Any, model: Any, layers: int) -> AttentionShape:
    """Heads and channels of an attention module."""
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    channels = int(getattr(module, "head_dim", None) or config.hidden_size // heads)
    return AttentionShape(heads, kv_heads, channels, module.layer_idx, layers)


def prepared(model: Any) -> dict[int, nn.Module]:
    """The attention modules of ``model`` by layer, made ready for plans: the ``rarefy`` attention, and hooks that tell
    it of rotary embedding. Raises UnsupportedError for models that cannot have one."""
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"An attention plan needs a model of Transformers with one stack of layers, not {type(model).__name__}; "
            "leave it dense."
        )
    modules = attention_modules(model)
    if not modules:
        raise UnsupportedError(f"The attention of {type(model).__name__} is not known; leave it dense.")
    kv_setup.prepare_(model)
    for module in modules.values():
        if not hasattr(module, attention.HOOK) and attention.takes_more(type(module).forward):
            hook = module.register_forward_pre_hook(attention.pass_angles, with_kwargs=True)
            object.__setattr__(module, attention.HOOK, hook)
    return modules


def install_(model: Any, setup: AttentionSetup) -> AttentionSetup:
    """Let every layer of ``model`` attend by a plan of ``setup``. A plan that decodes gets a cache that keeps its
    state: the 16-bit one of rarefy unless the model has another."""
    if setup.model is not None and setup.model != digest(model):
        raise CheckpointError(
            f"These attention parameters belong to another model than this {type(model).__name__}; make them anew for "
            "this one."
        )
    modules = prepared(model)
    for module in modules.values():
        shape = shape_of(module, model, len(modules))
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        object.__setattr__(module, attention.PLAN, (setup.plan(shape, device), setup.report))
    setattr(model, SETUP, setup)
    if setup.recipe.phases != "prefill" and getattr(model, kv_setup.SETUP, None) is None and model.can_generate():
        cache = kv_setup.KvSetup("identity", kv_recipe("identity", {}))
        with suppress(UnsupportedError):  # of a model that keeps few tokens or none; plans then have no state
            cache(model)
            kv_setup.install_(model, cache)
    return setup


def uninstall_(model: Any) -> None:
    """Let ``model`` attend densely again."""
    for module in attention_modules(model).values():
        if hasattr(module, attention.PLAN):
            delattr(module, attention.PLAN)
    setattr(model, SETUP, None)
    own: Any = getattr(model, kv_setup.SETUP, None)
    if own is not None and own.name == "identity":
        kv_setup.uninstall_(model)


def store_setup(model: Any, folder: Path) -> AttentionEntry | None:
    """What a checkpoint in ``folder`` says of the model's attention, after its parameters were written there."""
    setup: AttentionSetup | None = getattr(model, SETUP, None)
    if setup is None:
        return None
    if setup.params:
        setup.save(folder / PARAMS_NAME)
    return AttentionEntry(**setup.describe(), params=PARAMS_NAME if setup.params else None)


def restore_setup_(model: Any, entry: AttentionEntry, folder: Path) -> None:
    """Make a loaded model attend as its checkpoint says. Raises CheckpointError."""
    discover()
    if entry.recipe not in attention_recipes:
        raise CheckpointError(f"This checkpoint's attention recipe '{entry.recipe}' is unknown; upgrade rarefy.")
    cls = attention_recipes.get(entry.recipe)
    recipe = parse(cls, entry.options, f"quantization_config: attention recipe '{entry.recipe}'", CheckpointError)
    if entry.version != cls.recipe_version or (recipe.needs and entry.params is None):
        raise CheckpointError(
            f"This checkpoint's attention recipe '{entry.recipe}' has no parameters or is of another version; set one "
            "with rarefy.set_attention."
        )
    params: Params = {}
    if entry.params is not None:
        found = load_setup(folder / entry.params)
        if found.name != entry.recipe or found.describe()["options"] != entry.options:
            raise CheckpointError(f"'{entry.params}' is not of this checkpoint; copy the whole folder again.")
        params = found.params
    install_(model, AttentionSetup(entry.recipe, recipe, params))
