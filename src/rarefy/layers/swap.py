"""Finding the weights of a model that can be compressed, and putting compressed modules in their place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rarefy.core.errors import FormatError
from rarefy.formats.bytes import ByteCount, total
from rarefy.formats.terms import Shape, Shared, Term
from rarefy.layers.experts import CompressedStack
from rarefy.layers.linear import CompressedLinear

Kind = Literal["linear", "conv1d", "experts"]


@dataclass(frozen=True)
class Site:
    """A place in a model where a weight can be compressed.

    ``name`` is the module's name (the parameter's for experts); ``shape`` is ``[out, in]`` or ``[experts, out, in]``
    whatever the orientation in which the model keeps its parameter.
    """

    name: str
    kind: Kind
    shape: Shape
    parameter: str

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def members(self) -> int:
        """Number of stacked experts; 1 for a plain layer."""
        return self.shape[0] if len(self.shape) == 3 else 1


def sites(model: nn.Module) -> Iterator[Site]:
    """All linear layers, ``Conv1D`` layers and stacked expert parameters of ``model``, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear | CompressedStack):
            continue
        if isinstance(module, nn.Linear):
            yield Site(name, "linear", (module.out_features, module.in_features), f"{name}.weight")
        elif is_conv1d(module):
            columns, rows = module.weight.shape  # type: ignore[union-attr]
            yield Site(name, "conv1d", (int(rows), int(columns)), f"{name}.weight")
        elif is_experts(module):
            for label, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and label.endswith("proj"):
                    yield Site(f"{name}.{label}", "experts", tuple(parameter.shape), f"{name}.{label}")


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is Transformers' ``Conv1D``: a linear layer that keeps its weight as ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds stacked experts ``[experts, out, in]`` that its own forward can index one by one.

    Transformers marks those with ``is_transposed = False``; classes without that (Llama 4) multiply the whole stack.
    """
    known = hasattr(module, "num_experts") and getattr(module, "is_transposed", True) is False
    return known and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def dense_weight(model: nn.Module, site: Site) -> Tensor:
    """The site's weight as ``[out, in]`` or ``[experts, out, in]``, not copied."""
    weight = model.get_parameter(site.parameter).detach()
    return weight.T if site.kind == "conv1d" else weight


def swap_(model: nn.Module, site: Site, terms: Sequence[Term], dtype: torch.dtype | None = None) -> None:
    """Replace the weight at ``site`` by ``terms``; the bias parameter stays, and ``dtype`` is the old weight's."""
    if any(term.shape != site.shape for term in terms):
        raise FormatError(f"The terms of '{site.name}' do not have its shape {list(site.shape)}.")
    parent_name, _, label = site.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    dtype = dtype or model.get_parameter(site.parameter).dtype
    if site.kind == "experts":
        delattr(parent, label)
        replacement: nn.Module = CompressedStack(terms, dtype)
    else:
        old = model.get_submodule(site.name)
        replacement = CompressedLinear(terms, None, dtype, type(old) if site.kind == "conv1d" else nn.Linear)
        replacement.register_parameter(
            "bias", getattr(old, "bias", None)
        )  # the parameter itself, which may be tied or in an optimizer
        replacement.train(old.training)
    setattr(parent, label, replacement)


def restore_(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Put a dense layer (or expert parameter) with the decoded weight in place of the compressed module ``name``."""
    parent_name, _, label = name.rpartition(".")
    parent, module = model.get_submodule(parent_name), model.get_submodule(name)
    if isinstance(module, CompressedStack):
        delattr(parent, label)
        setattr(parent, label, nn.Parameter(module.decode().to(dtype or module.dtype)))
        return
    if not isinstance(module, CompressedLinear):
        raise FormatError(f"'{name}' is not a compressed module.")
    weight = module.decode().to(dtype or module.dtype)
    with torch.device("meta"):
        if module.replaces is nn.Linear:
            dense: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False)
        else:  # Conv1D(out, in), which keeps its weight as [in, out]
            dense, weight = module.replaces(module.out_features, module.in_features), weight.T.contiguous()
    dense.weight = nn.Parameter(weight)
    dense.bias = module.bias
    setattr(parent, label, dense.train(module.training))


def compressed(model: nn.Module) -> Iterator[tuple[str, CompressedLinear | CompressedStack]]:
    """All compressed modules by name."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear | CompressedStack):
            yield name, module


def resolve_shared(model: nn.Module) -> None:
    """Connect every shared term to its owner. Raises FormatError naming a reference that cannot be followed."""
    for module in model.modules():
        if isinstance(module, Shared):
            module.resolve(model)


def weight_bytes(model: nn.Module) -> tuple[ByteCount, int]:
    """Stored bytes and number of weights of all compressed modules."""
    modules = [module for _, module in compressed(model)]
    count = 0
    for module in modules:
        size = 1
        for extent in module.terms[0].shape:  # type: ignore[union-attr]
            size *= extent
        count += size
    return total([module.byte_count() for module in modules]), count


def exact_bytes(model: nn.Module) -> ByteCount:
    """Bytes of everything that was left in 16 or 32 bits, each tied tensor once."""
    everything = model.state_dict(keep_vars=True)
    inside = {id(buffer) for _, module in compressed(model) for buffer in module.terms.buffers()}
    seen: Mapping[int, Tensor] = {id(tensor): tensor for tensor in everything.values() if id(tensor) not in inside}
    return ByteCount(exact=sum(tensor.numel() * tensor.element_size() for tensor in seen.values()))
