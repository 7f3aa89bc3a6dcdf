"""What the driver should see, from the whole model with plain hooks, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.samples import Batch
from rarefy.calibration.skeleton import use_expert_loop_
from tests.zoo import VOCABULARY, Family


@dataclass
class Moments:
    """Sums over tokens, float64: of ``x xT``, of ``|x|`` and of ``1``. Those of experts by ``name[expert]``."""

    gram: Tensor
    absolute: Tensor
    tokens: int

    @classmethod
    def none(cls, columns: int) -> Moments:
        return cls(torch.zeros(columns, columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64), 0)

    def add(self, x: Tensor) -> None:
        wide = x.double()
        self.gram += wide.T @ wide
        self.absolute += wide.abs().sum(0)
        self.tokens += len(x)


def batches_for(family: Family, padded: bool = True) -> list[Batch]:
    """Batches of several lengths, the last with padding if the model knows masks."""
    generator = torch.Generator().manual_seed(7)
    if family.eats == "pixels":
        return [{"pixel_values": torch.randn(n, 3, 16, 16, generator=generator)} for n in (3, 2)]
    batches = [
        {"input_ids": torch.randint(3, VOCABULARY, shape, generator=generator)} for shape in ((3, 14), (2, 9), (2, 12))
    ]
    if padded:
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[1, 7:] = 0
        batches[-1] = {"input_ids": batches[-1]["input_ids"].masked_fill(mask == 0, 0), "attention_mask": mask}
    return batches


def run(model: Any, batch: Batch) -> Any:
    """The whole model; of an encoder-decoder the encoder."""
    model = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    return model(**batch)


@torch.no_grad()
def input_moments(model: Any, batches: Sequence[Batch], inside: str = "") -> dict[str, Moments]:
    """Moments of the inputs of every linear layer (and expert) whose name starts with ``inside``."""
    found: dict[str, Moments] = {}
    with hooked(model, inside, lambda name, x: found.setdefault(name, Moments.none(x.shape[-1])).add(x)) as masked:
        for batch in batches:
            masked(batch)
            run(model, batch)
    return found


@contextmanager
def hooked(model: Any, inside: str, see: Callable[[str, Tensor], None]) -> Iterator[Callable[[Batch], None]]:
    use_expert_loop_(model)
    mask: list[Tensor | None] = [None]
    handles = []

    def real(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        known = mask[0] is not None and flat.shape[0] == mask[0].numel()
        return flat[mask[0].flatten().bool()] if known else flat  # type: ignore[union-attr]

    def linear(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, real(args[0]))

    def experts(name: str) -> Callable[..., None]:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            hidden, chosen = (*args, *kwargs.values())[:2]
            rows, chosen = real(hidden), real(chosen)
            for expert in range(module.num_experts):
                own = rows[(chosen == expert).any(-1)]
                if len(own):
                    gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                    see(f"{name}.gate_up_proj[{expert}]", own)
                    see(f"{name}.down_proj[{expert}]", module.act_fn(gate) * up)

        return before

    for name, module in model.named_modules():
        if not name.startswith(inside):
            continue
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_pre_hook(linear(name)))
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            handles.append(module.register_forward_pre_hook(experts(name), with_kwargs=True))

    def masked(batch: Batch) -> None:
        mask[0] = batch.get("attention_mask")

    try:
        yield masked
    finally:
        for handle in handles:
            handle.remove()


def wide(model: Any) -> Any:
    return copy.deepcopy(model).double()


def wide_batches(batches: Sequence[Batch]) -> list[Batch]:
    return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]


def close(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_inputs(seen: Mapping[str, Any], expected: Mapping[str, Moments], tolerance: float) -> None:
    """Statistics of all ``seen`` layers are those ``expected``; experts that nothing reached say nothing."""
    for name, layer in seen.items():
        gram, columns, tokens = layer.statistics.gram, layer.statistics.columns, layer.statistics.tokens
        stacked = layer.weight.dim() == 3
        for member in range(layer.weight.shape[0]) if stacked else (None,):
            key = name if member is None else f"{name}[{member}]"
            at = (lambda t: t) if member is None else (lambda t, m=member: t[m])
            if key not in expected:
                assert int(at(tokens)) == 0, key
                if gram is not None:
                    assert torch.equal(at(gram.mean()), torch.eye(gram.columns))
                continue
            assert int(at(tokens)) == expected[key].tokens, key
            if gram is not None:
                assert close(at(gram.sum), expected[key].gram) < tolerance, key
            if columns is not None:
                assert close(at(columns.absolute), expected[key].absolute) < tolerance, key
                assert close(at(columns.square), expected[key].gram.diagonal()) < tolerance, key
