"""Parameters of an attention recipe: gates that are trained on a frozen model, thresholds that are calibrated."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.attention.call import Call
from rarefy.attention.gate import BlockGate
from rarefy.attention.plan import AttentionShape
from rarefy.attention.policy import Phase
from rarefy.calibration.samples import open_samples
from rarefy.contracts import AttentionRecipe, GatedRecipe
from rarefy.core.devices import Device, compute_dtype, device_of
from rarefy.core.errors import OptionError, RecipeError
from rarefy.core.files import check_out
from rarefy.core.progress import progress
from rarefy.integrations.transformers import models as folders
from rarefy.integrations.transformers.kv_setup import Params, digest
from rarefy.integrations.transformers.listening import listen
from rarefy.integrations.transformers.plan_setup import (
    AttentionSetup,
    attention_recipe,
    install_,
    open_attention,
    prepared,
    shape_of,
)
from rarefy.integrations.transformers.subjects import name_of, shared_tokenizer
from rarefy.sources.models import open_model
from rarefy.training.gates import Lesson, lessons
from rarefy.training.loop import Schedule, train_
from rarefy.training.report import TrainingReport, first_and_last

# Bytes of lessons that a trainer keeps, so that a text is read once however often it is learned from; and of those of
# one text up to which all layers learn from it together, which takes a GPU little longer than one of them.
LESSONS, TOGETHER = 4 << 30, 1 << 30

# Options of `find_attention` that are no recipe's, with their usual values.
CALIBRATION: dict[str, Any] = {
    "params": None, "data": "demo", "samples": 8, "seq_len": 2048, "tokenizer": None, "seed": 0,
}  # fmt: skip


def find_attention(
    model: Any,
    name: str,
    *,
    params: str | Path | None,
    options: Mapping[str, Any],
    data: Any,
    samples: int,
    seq_len: int,
    tokenizer: Any,
    seed: int,
) -> AttentionSetup:
    """The setup of recipe ``name`` for ``model``: read from ``params``, or calibrated on ``data`` if it has to be."""
    if params is None:
        recipe = attention_recipe(name, options)
        if recipe.needs == {"samples"}:
            known = tokenizer or (lambda: shared_tokenizer([model], [None]))
            given = open_samples(data, known, model.config, samples, seq_len, seed)
            rows = [row for batch in given.batches for row in batch["input_ids"]]
            return calibrate(name, recipe, model, rows)
    return open_attention(model, name, params=params, options=options)


def calibrate(name: str, recipe: AttentionRecipe, model: Any, rows: Sequence[Tensor]) -> AttentionSetup:
    """The setup of ``recipe`` on ``model``, fitted on what its layers are given for ``rows``, token ids ``[T]``
    each."""
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
    """Gates of every layer of ``model``, which learn from what its attention looks at on ``rows`` (token ids ``[N,
    T]``), ``batch`` of them a step, in an order drawn from ``seed`` that covers all rows again and again. What a row
    teaches is kept while there is room, and the model does not run for it again."""

    def __init__(self, name: str, recipe: GatedRecipe, model: Any, rows: Tensor, batch: int, seed: int):
        self.name, self.recipe, self.model, self.rows, self.batch, self.seed = name, recipe, model, rows, batch, seed
        self.lessons: dict[int, list[tuple[tuple[int, ...], Phase, Lesson]]] = {}
        self.room = LESSONS
        self.gates: dict[int, dict[Phase, BlockGate]] = {}
        self.weights: dict[str, nn.Parameter] = {}
        for layer, shape in _shapes(model).items():
            self.gates[layer] = {}
            for phase, gate in recipe.new_gates(shape).items():
                own = {key: nn.Parameter(x.to(model.device)) for key, x in gate.tensors(phase).items()}
                self.weights |= {f"layers.{layer}.{key}": weight for key, weight in own.items()}
                self.gates[layer][phase] = BlockGate.of(own, phase, gate.pools)

    def train(self, schedule: Schedule, work: Path | None = None) -> list[float]:
        """Losses of all steps, in nats a row, summed over phases and averaged over layers."""
        if schedule.steps * self.batch <= len(self.rows):
            self.room = 0  # no row comes twice
        about = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()
        identity: Mapping[str, Any] = {
            "model": digest(self.model), "data": about, "recipe": [self.name, self.recipe.model_dump(mode="json")],
            "batch": self.batch, "seed": self.seed, "dtype": str(self.model.dtype), "device": self.model.device.type,
            "number of threads": torch.get_num_threads() if self.model.device.type == "cpu" else 0,
        }  # fmt: skip
        return train_(self.weights, self.step, schedule, work=work, identity=identity, label="train gates")

    def step(self, number: int) -> float:
        """One step's gradients; its loss."""
        found: list[Tensor] = []
        share = 1 / (self.batch * len(self.gates))

        def learn(layers: tuple[int, ...], phase: Phase, lesson: Lesson) -> None:
            with torch.enable_grad():
                gate = BlockGate.join([self.gates[layer][phase] for layer in layers])
                loss = lesson.loss(gate) * len(layers) * share
                loss.backward()
            found.append(loss.detach())

        for index in range(number * self.batch, (number + 1) * self.batch):
            self.read(self._place(index), learn)
        return float(torch.stack(found).sum())

    def read(
        self, place: int, learn: Callable[[tuple[int, ...], Phase, Lesson], None] = lambda layers, phase, lesson: None
    ) -> None:
        """Call ``learn`` with what the row at ``place`` teaches gates of one phase in some layers."""
        kept = self.lessons.get(place)
        if kept is None:
            found: dict[Hashable, list[tuple[int, Phase, Lesson]]] = {}

            def hear(call: Call) -> None:
                own = lessons(call, self.gates[call.layer], self.recipe, self.recipe.block_k, self.recipe.truth)
                together = sum(lesson.nbytes for lesson in own.values()) * len(self.gates) <= TOGETHER
                for phase, lesson in own.items():
                    if together:
                        found.setdefault((phase, lesson.kind), []).append((call.layer, phase, lesson))
                    else:
                        learn((call.layer,), phase, lesson)

            listen(self.model, self.rows[place][None], hear)
            kept = [
                (tuple(layer for layer, _, _ in group), group[0][1], Lesson.join([lesson for _, _, lesson in group]))
                for group in found.values()
            ]
            size = sum(lesson.nbytes for _, _, lesson in kept)
            if kept and size <= self.room:
                self.room -= size
                self.lessons[place] = kept
        for layers, phase, lesson in kept:
            learn(layers, phase, lesson)

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


def train(
    model: Any,
    name: str,
    options: Mapping[str, Any],
    *,
    out: Path | None,
    data: Any,
    steps: int,
    batch: int,
    seq_len: int,
    samples: int | None,
    rate: float,
    tokenizer: Any,
    work: Path | None,
    device: Device,
    seed: int,
    overwrite: bool,
    revision: str | None,
    save: Callable[..., None],
) -> TrainingReport:
    """``rarefy.train``."""
    start = time.monotonic()
    recipe = attention_recipe(name, options)
    if not isinstance(recipe, GatedRecipe):
        raise RecipeError(f"Recipe '{name}' has nothing to train; use it with rarefy.set_attention.")
    if out is not None:
        check_out(out, overwrite)
    label, given = name_of(model) if not isinstance(model, str | Path) else str(model), None
    if isinstance(model, str | Path):
        if out is None:
            raise OptionError("Say where to write the model and its gates: out=FOLDER (--out on the command line).")
        source, place = open_model(model, revision), device_of(device)
        label, given = source.name, folders.load_folder(source.folder, dtype="auto")
        tokenizer = tokenizer or (lambda: folders.load_tokenizer(source.folder))
    trained: Any = given if given is not None else model
    stored = trained.dtype
    if given is not None:
        trained.to(place, compute_dtype(stored, place))
    known = tokenizer or (lambda: shared_tokenizer([model], [None]))
    texts = open_samples(data, known, trained.config, samples or steps * batch, seq_len, seed)
    rows = torch.cat([piece["input_ids"] for piece in texts.batches])
    trainer = GateTrainer(name, recipe, trained.eval(), rows, batch, seed)
    losses = trainer.train(Schedule(steps=steps, rate=rate), work)
    if given is not None:
        trained.to(stored)
    setup = install_(trained, trainer.setup())
    if out is not None:
        save(trained, out, overwrite=overwrite)
    tensors = [tensor for own in setup.params.values() for tensor in own.values()]
    return TrainingReport(
        model=label, recipe=name, out=None if out is None else str(out), data=texts.describe(), steps=steps,
        tokens=steps * batch * rows.shape[1], loss=first_and_last(losses),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        seconds=time.monotonic() - start, notes=texts.notes,
    )  # fmt: skip


def _shapes(model: Any) -> dict[int, AttentionShape]:
    modules = prepared(model)
    return {layer: shape_of(module, model, len(modules)) for layer, module in modules.items()}
