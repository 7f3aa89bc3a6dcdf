"""Parameters of a KV cache recipe from a model's own keys and values on calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.calibration.samples import Batch, open_samples
from rarefy.contracts import KvRecipe
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.core.progress import progress
from rarefy.evaluation.forward import cache_argument
from rarefy.integrations.transformers.kv_cache import CodedCache, CodedLayer
from rarefy.integrations.transformers.kv_setup import KvSetup, Params, digest, kv_recipe, load_setup, prepare_
from rarefy.integrations.transformers.subjects import shared_tokenizer
from rarefy.kv.plan import HeadShape, KvSamples, LayerCodecs
from rarefy.kv.rotary import unrotate
from rarefy.recipes import discover


class _Recorder(CodedLayer):
    """A layer that keeps the keys and values of one pass as they come, RoPE undone if asked; attention is exact."""

    def __init__(self, layer: int, layers: int, gradients: bool, pre_rope: bool):
        super().__init__(_no_plan, layer, layers, True)
        self.name, self.gradients, self.undo = f"layer {layer}", gradients, pre_rope
        self.pair: tuple[Tensor, Tensor] | None = None
        self.angles: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        arrival, self._arrival = self._arrival, None
        if self.undo:
            if arrival is None or arrival.cos is None or arrival.sin is None or arrival.rotary is None:
                raise UnsupportedError(
                    f"The rotary embedding of {self.name} is not one that can be undone; code rotated keys "
                    "(rotated_keys=true)."
                )
            self.angles = arrival.cos.unsqueeze(1), arrival.sin.unsqueeze(1)
        self.pair = key_states, value_states
        if self.gradients:
            key_states.retain_grad()
            value_states.retain_grad()
        return key_states, value_states

    def take(self) -> tuple[Tensor, ...]:
        """Keys and values, then their squared gradients if asked, each ``[B * tokens, H, D]`` on the host."""
        assert self.pair is not None
        pair = list(self.pair)
        found = [pair[0] if self.angles is None else unrotate(pair[0], *self.angles), pair[1]]
        if self.gradients:
            grads = [tensor.grad if tensor.grad is not None else torch.zeros_like(tensor) for tensor in pair]
            # A gradient turns as its key does; its length is that of the key times the square of RoPE's factor.
            turned = grads[0].float() if self.angles is None else _gradient_back(grads[0], *self.angles)
            found += [turned.square(), grads[1].float().square()]
        self.pair = self.angles = None
        return tuple(tensor.detach().transpose(1, 2).flatten(0, 1).cpu() for tensor in found)


def _gradient_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient by keys before RoPE, from that by keys after it: the transpose of the rotation."""
    width = cos.shape[-1]
    factor = (cos.float().square() + sin.float().square()).expand(*gradient.shape[:-1], width)
    back = unrotate(gradient, cos, sin)
    return torch.cat([back[..., :width] * factor, back[..., width:]], -1)


def _no_plan(shape: HeadShape) -> LayerCodecs:
    raise AssertionError("a recorder stores nothing in code")


def open_kv(
    model: Any,
    name: str,
    *,
    options: Mapping[str, Any],
    params: str | Path | None = None,
    data: Any = "demo",
    samples: int = 16,
    seq_len: int = 2048,
    tokenizer: Any = None,
    seed: int = 0,
) -> KvSetup:
    """The setup of recipe ``name`` for ``model``, read from ``params`` or fitted on ``data`` if it has parameters."""
    discover()
    if params is not None:
        setup = load_setup(Path(params), model)
        if setup.name != name or options:
            raise OptionError(
                f"'{params}' holds recipe '{setup.name}' with options of its own; name that recipe and no options."
            )
        return setup
    recipe = kv_recipe(name, options)
    if not recipe.needs:
        return KvSetup(name, recipe)
    known = tokenizer or (lambda: shared_tokenizer([model], [None]))
    return calibrate(name, recipe, model, open_samples(data, known, model.config, samples, seq_len, seed).batches)


def calibrate(name: str, recipe: KvRecipe, model: Any, batches: Sequence[Batch]) -> KvSetup:
    """The setup of ``recipe`` on ``model``, fitted on ``batches``, one sequence at a time.

    Memory: all keys and values of the calibration tokens on the host, in the model's dtype, and as many numbers of
    float32 where the recipe wants gradients. Raises UnsupportedError for a RoPE that cannot be undone.
    """
    prepare_(model)
    wants_gradients = "fisher" in recipe.needs
    rows = [row for batch in batches for row in batch["input_ids"].split(1)]
    if not rows:
        raise OptionError("There is no calibration data; give at least one sequence.")
    found: list[list[tuple[Tensor, ...]]] = []
    with progress("calibrate", len(rows)) as advance, _gradients(model, wants_gradients):
        for row in rows:
            layers = _pass(model, row.to(model.device), recipe, wants_gradients)
            found.append([layer.take() for layer in layers])
            advance()
    places = torch.cat([torch.arange(row.shape[1], device=model.device) for row in rows])
    params: Params = {}
    with progress("fit", len(found[0])) as advance:
        for number in range(len(found[0])):
            pieces = zip(*(sample[number] for sample in found), strict=True)
            parts = [torch.cat(tensors).to(model.device) for tensors in pieces]
            for sample in found:
                sample[number] = ()  # one layer in two copies at a time
            key_weight, value_weight = parts[2:] if wants_gradients else (None, None)
            seen = KvSamples(parts[0], parts[1], places, key_weight, value_weight, recipe.pre_rope)
            params[number] = {name: tensor.cpu() for name, tensor in recipe.fit(seen).items()}
            advance()
    kept = {number: dict(own) for number, own in recipe.settle(params).items()}
    return KvSetup(name, recipe, kept, digest(model))


def _pass(model: Any, tokens: Tensor, recipe: KvRecipe, gradients: bool) -> list[_Recorder]:
    cache = CodedCache(model.config, _no_plan)
    recorders: list[_Recorder] = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CodedLayer):
            recorders.append(_Recorder(len(recorders), len(cache.coded_layers), gradients, recipe.pre_rope))
            cache.layers[index] = recorders[-1]
    given = {cache_argument(model.forward): cache}
    with torch.set_grad_enabled(gradients):
        logits = model(input_ids=tokens, use_cache=True, **given).logits
        if gradients:
            # The sum, not the mean: squares of tiny gradients would vanish in 16 bits.
            flat = logits[0, :-1].float()
            torch.nn.functional.cross_entropy(flat, tokens[0, 1:], reduction="sum").backward()
    return recorders


@contextmanager
def _gradients(model: Any, wanted: bool) -> Iterator[None]:
    """Gradients by what the embeddings put out and what follows, none by weights; as before afterwards."""
    training = model.training
    model.eval()
    if not wanted:
        yield
        model.train(training)
        return
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        for parameter, needed in before:
            parameter.requires_grad_(needed)
        model.train(training)
