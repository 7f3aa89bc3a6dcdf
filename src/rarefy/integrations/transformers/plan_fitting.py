"""Parameters of an attention recipe: gates that are trained on a frozen model, thresholds that are calibrated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.attention.call import Call
from rarefy.attention.gate import BlockGate
from rarefy.attention.plan import AttentionShape
from rarefy.attention.policy import Phase
from rarefy.contracts import AttentionRecipe, GatedRecipe
from rarefy.core.errors import OptionError
from rarefy.core.progress import progress
from rarefy.integrations.transformers.kv_setup import Params, digest
from rarefy.integrations.transformers.listening import listen
from rarefy.integrations.transformers.plan_setup import AttentionSetup, prepared, shape_of
from rarefy.training.gates import gate_loss
from rarefy.training.loop import Schedule, train_


def calibrate(name: str, recipe: AttentionRecipe, model: Any, rows: Sequence[Tensor]) -> AttentionSetup:
    """The setup of ``recipe`` on ``model``, fitted on what its layers are given for ``rows``, token ids ``[T]`` each."""
    if not rows:
        raise OptionError("There is no calibration data; give at least one sequence.")
    shapes = _shapes(model)
    sums: dict[int, dict[str, Tensor]] = {}

    def hear(call: Call) -> None:
        own = sums.setdefault(call.layer, {})
        for label, tensor in recipe.measure(shapes[call.layer], call).items():
            own[label] = own[label] + tensor if label in own else tensor

    with progress("calibrate", len(rows)) as advance:
        for row in rows:
            listen(model, row[None], hear)
            advance()
    params = {
        layer: {label: tensor.cpu() for label, tensor in recipe.fit(shapes[layer], own).items()}
        for layer, own in sums.items()
    }
    return AttentionSetup(name, recipe, params, digest(model))


class GateTrainer:
    """Gates of every layer of ``model``, which learn from what its attention looks at on ``rows`` (token ids ``[N, T]``),
    ``batch`` of them a step, in an order drawn from ``seed`` that covers all rows again and again."""

    def __init__(self, name: str, recipe: GatedRecipe, model: Any, rows: Tensor, batch: int, seed: int):
        self.name, self.recipe, self.model, self.rows, self.batch, self.seed = name, recipe, model, rows, batch, seed
        generator = torch.Generator().manual_seed(seed)
        self.gates: dict[int, dict[Phase, BlockGate]] = {}
        self.weights: dict[str, nn.Parameter] = {}
        for layer, shape in _shapes(model).items():
            self.gates[layer] = {}
            for phase, gate in recipe.new_gates(shape, generator).items():
                own = {key: nn.Parameter(x.to(model.device)) for key, x in gate.tensors(phase).items()}
                self.weights |= {f"layers.{layer}.{key}": weight for key, weight in own.items()}
                self.gates[layer][phase] = BlockGate.of(own, phase, gate.pools, gate.normed)

    def train(self, schedule: Schedule, work: Path | None = None, keep_every: float | None = None) -> list[float]:
        """Losses of all steps, in nats a row, summed over phases and averaged over layers."""
        about = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()
        identity: Mapping[str, Any] = {
            "model": digest(self.model), "data": about, "recipe": [self.name, self.recipe.model_dump(mode="json")],
            "batch": self.batch, "seed": self.seed, "dtype": str(self.model.dtype), "device": self.model.device.type,
            "number of threads": torch.get_num_threads() if self.model.device.type == "cpu" else 0,
        }  # fmt: skip
        options = {} if keep_every is None else {"keep_every": keep_every}
        return train_(self.weights, self.step, schedule, work=work, identity=identity, label="train gates", **options)

    def step(self, number: int) -> float:
        """One step's gradients; its loss."""
        found: list[Tensor] = []
        share = 1 / (self.batch * len(self.gates))

        def hear(call: Call) -> None:
            with torch.enable_grad():
                loss = gate_loss(call, self.gates[call.layer], self.recipe.block_k) * share
                loss.backward()
            found.append(loss.detach())

        for index in range(number * self.batch, (number + 1) * self.batch):
            listen(self.model, self.rows[self._place(index)][None], hear)
        return float(torch.stack(found).sum())

    def setup(self) -> AttentionSetup:
        """The trained gates as parameters of the recipe, in bfloat16."""
        params: Params = {
            layer: {
                key: weight.detach().to("cpu", torch.bfloat16)
                for phase, gate in gates.items()
                for key, weight in gate.tensors(phase).items()
            }
            for layer, gates in self.gates.items()
        }
        return AttentionSetup(self.name, self.recipe, params, digest(self.model))

    def _place(self, index: int) -> int:
        """The row that comes at a place of the endless order."""
        round_, place = divmod(index, len(self.rows))
        generator = torch.Generator().manual_seed(self.seed + round_)
        return int(torch.randperm(len(self.rows), generator=generator)[place])


def _shapes(model: Any) -> dict[int, AttentionShape]:
    modules = prepared(model)
    return {layer: shape_of(module, model, len(modules)) for layer, module in modules.items()}
