"""A recipe for KV caches on a model: its parameters, the hooks it needs, and ``generate`` that uses it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rarefy.contracts import AttentionRecipe, KvRecipe, kv_recipes
from rarefy.core.config import parse
from rarefy.core.errors import CheckpointError, OptionError, RecipeError, UnsupportedError
from rarefy.core.files import read_header, write_tensors
from rarefy.core.registry import Registry
from rarefy.evaluation.forward import cache_argument
from rarefy.integrations.transformers import attention
from rarefy.integrations.transformers.kv_cache import ROTARY, CodedCache, announce_tokens
from rarefy.kv.codecs import Exact
from rarefy.kv.later import Encoder
from rarefy.kv.plan import HeadShape, LayerCodecs
from rarefy.layers.manifest import KvEntry
from rarefy.recipes import discover

FORMAT = "rarefy-kv-1"
PARAMS_NAME = "kv.safetensors"  # in a checkpoint
SETUP = "_rarefy_kv"  # attribute of a model: the setup that its caches follow
Params = dict[int, dict[str, Tensor]]
R = TypeVar("R", AttentionRecipe, KvRecipe)


class KvSetup:
    """The recipe ``name`` with its options, and what it was fitted to: parameters of every layer by number, and the
    `digest` of the model they belong to. Called with a model it makes an empty cache for it."""

    def __init__(self, name: str, recipe: KvRecipe, params: Params | None = None, model: str | None = None):
        if recipe.needs and not params:
            raise OptionError(f"KV cache recipe '{name}' needs parameters; calibrate it or name a file that has them.")
        self.name, self.recipe, self.params, self.model = name, recipe, params or {}, model
        self._plans: dict[HeadShape, LayerCodecs] = {}
        found = hashlib.sha256()
        for tensor in (tensor for own in self.params.values() for tensor in own.values()):
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._fingerprint = found.hexdigest()

    def __call__(self, model: Any, *, exact_arrival: bool = True, aside: bool = False) -> CodedCache:
        """An empty cache for ``model``, which is prepared for it (`prepare_`). Unless ``exact_arrival``, whole blocks
        are read from their codes already in the pass that brings them. ``aside``: blocks are encoded by a thread (and
        stream) of their own and read exactly until they are; what is stored is the same. Raises OptionError for both.
        """
        if aside and not exact_arrival:
            raise OptionError("Blocks that are read from their codes at once cannot be encoded aside; choose one.")
        prepare_(model)
        about = {**self.describe(), "params": self._fingerprint}
        return CodedCache(model.config, self.plan, exact_arrival, about, Encoder() if aside else None)

    def plan(self, shape: HeadShape) -> LayerCodecs:
        """How a layer is stored."""
        if shape not in self._plans:
            count = shape.layers
            skipped = {layer % count for layer in self.recipe.skip_layers if -count <= layer < count}
            exact = Exact(shape.dtype)
            self._plans[shape] = (
                LayerCodecs(exact, exact)
                if shape.layer in skipped
                else self.recipe.codecs(shape, self.params.get(shape.layer, {}))
            )
        return self._plans[shape]

    def describe(self) -> dict[str, Any]:
        """The recipe and its options, as JSON."""
        options = self.recipe.model_dump(mode="json")
        return {"recipe": self.name, "version": self.recipe.recipe_version, "options": options}

    def save(self, path: str | Path) -> None:
        """Write recipe, options and parameters to a safetensors file."""
        write_setup(Path(path), FORMAT, self.params, {"model": self.model or "", **self.describe()})


def load_setup(path: Path, model: Any | None = None) -> KvSetup:
    """The setup in a file that `KvSetup.save` wrote. Raises CheckpointError when the file is damaged, of another
    version, or was calibrated on another model than ``model``."""
    found = read_setup(path, FORMAT, kv_recipes, model, ("KV cache", "was calibrated on", "calibrate anew"))
    return KvSetup(*found)


def write_setup(path: Path, form: str, params: Params, facts: Mapping[str, Any]) -> None:
    """Write what `read_setup` reads: parameters by layer, and ``facts`` (recipe, options, version, model)."""
    tensors = {
        f"layers.{layer}.{name}": tensor.contiguous().cpu()
        for layer, own in params.items()
        for name, tensor in own.items()
    }
    write_tensors(path, tensors, file_about(form, **facts))


def read_setup(
    path: Path, form: str, recipes: Registry[R], model: Any | None, words: tuple[str, str, str]
) -> tuple[str, R, Params, str | None]:
    """Name, recipe, parameters and model's digest in a file of ``form``. ``words``: what the parameters are of, what
    ties them to a model, and what to do when they do not serve. Raises CheckpointError when the file is damaged, of
    another version, or of another model than ``model``."""
    from safetensors.torch import load_file

    what, tied, remedy = words
    about = read_about(path, form)
    if about is None:
        raise CheckpointError(f"'{path.name}' holds no {what} parameters of this version; {remedy}.")
    try:
        discover()
        name, options, version = about["recipe"], about["options"], about["version"]
        cls = recipes.get(name)
    except (KeyError, TypeError, RecipeError) as failure:
        raise CheckpointError(f"'{path.name}' does not say how it was made ({failure}); {remedy}.") from None
    if version != cls.recipe_version:
        raise CheckpointError(
            f"'{path.name}' was made by version {version} of recipe '{name}', this rarefy has {cls.recipe_version}; "
            f"{remedy}."
        )
    if model is not None and about.get("model") and about["model"] != digest(model):
        raise CheckpointError(f"'{path.name}' {tied} another model than this {type(model).__name__}; {remedy}.")
    recipe = parse(cls, options, f"Options in '{path.name}'", CheckpointError)
    params: Params = {}
    for full, tensor in load_file(path).items():
        lead, _, rest = full.partition(".")
        number, _, own = rest.partition(".")
        if lead != "layers" or not number.isdecimal() or not own or not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"Tensor '{full}' of '{path.name}' is damaged; {remedy}.")
        params.setdefault(int(number), {})[own] = tensor
    return name, recipe, params, about.get("model") or None


def file_about(form: str, **facts: Any) -> dict[str, str]:
    """Metadata of a file of ours: one entry, since several would come in any order and the bytes with them."""
    return {"rarefy": json.dumps({"format": form, **facts}, sort_keys=True)}


def read_about(path: Path, form: str) -> dict[str, Any] | None:
    """What `file_about` wrote into a file; None where it is something else."""
    try:
        about = json.loads(read_header(path).metadata.get("rarefy", "null"))
    except ValueError:
        return None
    return about if isinstance(about, dict) and about.get("format") == form else None


def digest(model: nn.Module) -> str:
    """A hash of what a model's keys and values depend on: names and shapes of its tensors, and samples of each, in
    bfloat16 so that the dtype it was loaded in does not matter."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 16)
        sample = flat[::step][:16].to("cpu", torch.bfloat16).view(torch.int16)
        found.update(f"{name} {tuple(tensor.shape)} {sample.tolist()}\n".encode())
    return found.hexdigest()


def kv_recipe(name: str, options: Mapping[str, Any]) -> KvRecipe:
    """The recipe ``name`` with ``options``. Raises RecipeError."""
    return parse(kv_recipes.get(name), options, f"Options of KV cache recipe '{name}'", RecipeError)


def prepare_(model: Any) -> None:
    """Let coded caches be read by ``model``: the ``rarefy`` attention, and hooks that tell them of positions and
    padding. Safe to call twice; dense caches work as before. Raises UnsupportedError for models that cannot."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation") or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"A coded KV cache needs a decoder of Transformers, which this {type(model).__name__} is not; "
            "leave its cache dense."
        )
    if getattr(config, "_attn_implementation", None) != attention.NAME:
        attention.register_attention()
        model.set_attn_implementation(attention.NAME)
        if config.get_text_config(decoder=True)._attn_implementation != attention.NAME:
            raise UnsupportedError(f"{type(model).__name__} does not let its attention be chosen; use the dense cache.")
    holders = tuple(
        module
        for module in model.modules()
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    )
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and ROTARY not in vars(module):
            object.__setattr__(module, ROTARY, holders)  # not as submodules of it
            module.register_forward_pre_hook(announce_tokens, with_kwargs=True)


def store_setup(model: Any, folder: Path) -> KvEntry | None:
    """What a checkpoint in ``folder`` says of the model's KV cache, after its parameters were written there."""
    setup: KvSetup | None = getattr(model, SETUP, None)
    if setup is None:
        return None
    if setup.params:
        setup.save(folder / PARAMS_NAME)
    return KvEntry(**setup.describe(), params=PARAMS_NAME if setup.params else None)


def restore_setup_(model: Any, entry: KvEntry, folder: Path) -> None:
    """Make a loaded model use the KV cache that its checkpoint names. Raises CheckpointError."""
    discover()
    if entry.recipe not in kv_recipes:
        raise CheckpointError(f"This checkpoint's KV cache recipe '{entry.recipe}' is unknown; upgrade rarefy.")
    if entry.params is not None:
        setup = load_setup(folder / entry.params)
        if (setup.name, setup.describe()["options"]) != (entry.recipe, entry.options):
            raise CheckpointError(f"'{entry.params}' is not of this checkpoint; copy the whole folder again.")
    else:
        cls = kv_recipes.get(entry.recipe)
        recipe = parse(cls, entry.options, f"quantization_config: KV cache recipe '{entry.recipe}'", CheckpointError)
        if recipe.needs or entry.version != cls.recipe_version:
            raise CheckpointError(
                f"This checkpoint's KV cache recipe '{entry.recipe}' has no parameters or is of another version; set "
                "one with rarefy.kv_cache."
            )
        setup = KvSetup(entry.recipe, recipe)
    install_(model, setup)


def install_(model: Any, setup: KvSetup) -> KvSetup:
    """Make ``model`` use caches of ``setup``: in ``generate`` and in forward passes that are given none. Only this one
    model is touched."""
    if setup.model is not None and setup.model != digest(model):
        raise CheckpointError(
            f"These KV cache parameters are of another model than this {type(model).__name__}; fit them to this one."
        )
    prepare_(model)
    if not hasattr(model, SETUP):
        model.register_forward_pre_hook(_give_cache, with_kwargs=True)
        model.generate = MethodType(_generate, model)  # a method, so that a copy of the model has its own
    setattr(model, SETUP, setup)
    return setup


def uninstall_(model: Any) -> None:
    """Let ``model`` use dense caches again."""
    setattr(model, SETUP, None)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` with a cache of the model's setup unless the caller has something to say about the cache."""
    setup: KvSetup | None = getattr(self, SETUP, None)
    config = kwargs.get("generation_config") or self.generation_config
    own = ("past_key_values", "cache", "cache_implementation")
    if setup is not None and not any(kwargs.get(name) is not None for name in own):
        wanted = kwargs.get("use_cache")
        if (config.use_cache if wanted is None else wanted) and config.cache_implementation is None:
            kwargs[cache_argument(type(self).forward)] = setup(self)
    return type(self).generate(self, *args, **kwargs)


def _give_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a model: a fresh cache of its setup where it would make a dense one."""
    setup: KvSetup | None = getattr(module, SETUP, None)
    wanted = kwargs.get("use_cache")
    if setup is None or module.training or not (module.config.use_cache if wanted is None else wanted):
        return None
    if any(kwargs.get(name) is not None for name in ("past_key_values", "cache")):
        return None
    return args, {**kwargs, cache_argument(module.forward): setup(module)}
