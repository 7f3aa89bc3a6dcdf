"""A model's repeated blocks, found by structure and not by name, and loaded one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rarefy.calibration.weights import Weights, named_tensors
from rarefy.core.errors import UnsupportedError
from rarefy.layers.swap import Site, is_conv1d, is_experts


def find_blocks(model: nn.Module, chosen: Collection[Site]) -> list[str]:
    """Names of the blocks that hold the ``chosen`` sites, in the order in which the model runs them.

    Blocks are the members of the outermost module lists whose every member multiplies weights. Raises
    UnsupportedError when the chosen sites lie in several such lists (an encoder and a decoder), or there is none.
    """
    lists: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested and all(map(_multiplies, module)):
            lists.append(name)
    used = [name for name in lists if any(site.name.startswith(f"{name}.") for site in chosen)]
    if len(used) > 1:
        raise UnsupportedError(
            f"The layers to compress lie in several stacks of blocks ({', '.join(used)}); calibrate one at a time: "
            "name those of the others under 'ignore'."
        )
    if not used:
        raise UnsupportedError(
            f"No layer to compress lies in a list of blocks of this {type(model).__name__}; use a data-free recipe."
        )
    return [f"{used[0]}.{index}" for index in range(len(model.get_submodule(used[0])))]  # type: ignore[arg-type]


def _multiplies(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) or is_conv1d(part) or is_experts(part) for part in module.modules())


def parameter_of(block: nn.Module, prefix: str, site: Site) -> nn.Parameter:
    """The parameter of ``site`` in a block whose name is ``prefix``."""
    owner, _, label = site.parameter[len(prefix) + 1 :].rpartition(".")
    parameter = block.get_submodule(owner)._parameters[label]
    assert parameter is not None
    return parameter


class Resident:
    """Puts a skeleton's parts on a device with their real tensors, and takes them off again.

    ``held``: by name the tensors that are on the device now and have not changed their dtype, as they are stored.
    """

    def __init__(self, model: nn.Module, weights: Weights, device: torch.device, dtype: torch.dtype):
        self.model, self.weights, self.device, self.dtype = model, weights, device, dtype
        self.held: dict[str, Tensor] = {}
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[str, Future[Tensor]] = {}

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """The block ``name`` with its tensors on the device, floating ones in the compute dtype."""
        module = self.model.get_submodule(name)
        with self._loaded(module, name):
            yield module

    def read_ahead(self, name: str) -> None:
        """Have the tensors of the block ``name`` read while something else is computed."""
        self._ahead.clear()
        for _, _, full, _ in named_tensors(self.model.get_submodule(name), name):
            if full in self.weights:
                self._ahead[full] = self._reader.submit(self._read, full)

    def _read(self, name: str) -> Tensor:
        """In memory that a GPU copies from at once."""
        tensor = self.weights.read(name)
        return tensor.pin_memory() if self.device.type == "cuda" and not tensor.is_cuda else tensor

    @contextmanager
    def outside(self, blocks: Collection[str]) -> Iterator[None]:
        """Everything but ``blocks``, which must not be entered: stand-ins have to be in their place."""
        with self._loaded(self.model, "", tuple(f"{name}." for name in blocks)):
            yield

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str, without: tuple[str, ...] = ()) -> Iterator[None]:
        before: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        known: dict[int, Tensor] = {}  # tied parameters stay one
        try:
            for owner, label, name, is_parameter in list(named_tensors(module, prefix)):
                if name.startswith(without):
                    continue
                table: dict[str, Tensor | None] = owner._parameters if is_parameter else owner._buffers  # type: ignore[assignment]
                old = table[label]
                if not is_parameter and name not in self.weights:
                    continue  # a buffer that older checkpoints lack is as its class made it
                before.append((table, label, old))
                if id(old) not in known:
                    known[id(old)] = self._fetch(name, is_parameter)
                table[label] = known[id(old)]
            moved = [(part, label) for part in _inside(module, prefix, without) for label in part._buffers]
            for part, label in moved:
                buffer = part._buffers[label]
                if buffer is not None and buffer.device != self.device:
                    before.append((part._buffers, label, buffer))
                    part._buffers[label] = buffer.to(self.device)
            yield
        finally:
            for table, label, old in reversed(before):
                table[label] = old
            self.held.clear()

    def _fetch(self, name: str, is_parameter: bool) -> Tensor:
        ahead = self._ahead.pop(name, None)
        tensor = self.weights.read(name) if ahead is None else ahead.result()
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        stored, tensor = tensor, tensor.to(device=self.device, dtype=dtype, non_blocking=ahead is not None)
        if tensor.dtype == stored.dtype:
            self.held[name] = tensor
        return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _inside(module: nn.Module, prefix: str, without: tuple[str, ...]) -> Iterator[nn.Module]:
    for name, part in module.named_modules(prefix=prefix):
        if not (without and f"{name}.".startswith(without)):
            yield part
