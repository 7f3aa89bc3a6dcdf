"""Statistics of the inputs of a block's layers, gathered by hooks while the block runs.

Layers that read one tensor (q, k and v; gate and up) share one statistic, found by the tensor itself. Each stacked
expert is observed where the model's own loop multiplies its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import FormatError, RecipeError, UnsupportedError
from rarefy.layers.swap import Site
from rarefy.layers.view import CompressedWeight
from rarefy.statistics import ColumnMoments, Gram, InputStatistic, Statistics

INPUTS: dict[str, type[InputStatistic]] = {"gram": Gram, "columns": ColumnMoments}


class EndOfBlock(Exception):
    """Ends a block's forward once its last observed layer has its input."""


@dataclass
class Group:
    """Sites that read one input, and what is known of it."""

    sites: list[Site]
    inputs: dict[str, InputStatistic]

    def statistics(self) -> Statistics:
        return Statistics(**self.inputs)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise RecipeError, naming the layer, when its inputs were not finite."""
        for statistic in self.inputs.values():
            try:
                statistic.check()
            except FormatError as failure:
                raise RecipeError(f"Layer '{self.sites[0].name}': {failure}.") from None


@dataclass
class Capture:
    """Gathers the statistics that ``needs`` names for ``sites`` of ``root`` (site names include ``prefix``)."""

    root: nn.Module
    sites: Sequence[Site]
    needs: Callable[[Site], frozenset[str]]
    device: torch.device
    groups: list[Group] = field(default_factory=list)
    prefix: str = ""

    def __post_init__(self) -> None:
        self._group_of: dict[str, Group] = {}
        self._leaders: set[str] = set()
        self._seen: dict[tuple[Any, ...], tuple[Group, Tensor]] = {}  # keeps inputs alive while a batch runs
        self._mask: Tensor | None = None
        self._batches, self._last, self._early = 0, "", False

    @contextmanager
    def watching(self, early: bool = False) -> Iterator[None]:
        """Observe every layer while the context lasts; call ``batch`` before each run.

        With ``early`` the runs after the first end with EndOfBlock as soon as the last layer's input is known.
        """
        self._early = early and all(site.kind != "experts" for site in self.sites)
        with ExitStack() as stack:
            for site in self.sites:
                if site.kind == "experts":
                    stack.enter_context(self._experts(site))
                else:
                    module = self.root.get_submodule(self._local(site.name))
                    handle = module.register_forward_pre_hook(self._hook(site), with_kwargs=True)
                    stack.callback(handle.remove)
            yield
        self._seen.clear()

    def batch(self, mask: Tensor | None) -> None:
        """A new batch begins; ``mask [samples, tokens]`` is zero where a token is padding."""
        self._seen.clear()
        self._batches += 1
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()

    def structure(self) -> list[list[str]]:
        """Names of the sites that read one input, by group."""
        return [[site.name for site in group.sites] for group in self.groups]

    def adopt(self, structures: Sequence[list[list[str]]]) -> None:
        """Bring the groups into one order and composition for all processes; ``structures`` are those of each.

        A process whose share of the data did not reach a layer gets a statistic without tokens for it.
        """
        names = {site.name: site for site in self.sites}
        grouping: dict[str, list[str]] = {}
        for structure in structures:
            for members in structure:
                fresh = [name for name in members if name not in grouping]
                grouping.update(dict.fromkeys(fresh, fresh))
        ordered: dict[int, list[str]] = {id(members): members for members in grouping.values()}
        old, self.groups = self._group_of, []
        self._group_of = {}
        for members in ordered.values():
            known = next((old[name] for name in members if name in old), None)
            group = self._new_group(names[members[0]], self._wanted(names[members[0]]))
            if known is not None:
                group.inputs = known.inputs
            group.sites = [names[name] for name in members]
            self._group_of.update(dict.fromkeys(members, group))

    def unseen(self) -> list[Site]:
        """Sites that no input reached."""
        return [site for site in self.sites if site.name not in self._group_of]

    def _hook(self, site: Site) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._observe(site, x)
            if self._batches == 1:
                self._last = site.name
            elif self._early and site.name == self._last:
                raise EndOfBlock

        return observe

    def _observe(self, site: Site, x: Tensor) -> None:
        needs = self._wanted(site)
        key = (x.data_ptr(), x.numel(), x.shape[-1], x.dtype, needs)
        known = self._group_of.get(site.name)
        met = self._seen.get(key)
        if known is None:
            group = met[0] if met else self._new_group(site, needs)
            if met:
                group.sites.append(site)
            else:
                self._leaders.add(site.name)
            self._group_of[site.name] = known = group
        elif site.name not in self._leaders and (met is None or met[0] is not known):
            raise UnsupportedError(
                f"Layer '{site.name}' reads the input of '{known.sites[0].name}' for some samples and not for others; "
                "leave one of them dense."
            )
        if site.name in self._leaders:
            self._seen[key] = (known, x)
            for statistic in known.inputs.values():
                statistic.update(self._flat(x))

    def _flat(self, x: Tensor) -> Tensor:
        if self._mask is not None and x.shape[:-1] == self._mask.shape:
            return x[self._mask.to(x.device)]
        return x.reshape(-1, x.shape[-1])

    def _new_group(self, site: Site, needs: frozenset[str]) -> Group:
        members = site.shape[0] if site.kind == "experts" else None
        group = Group([site], {name: INPUTS[name](site.shape[-1], members, self.device) for name in sorted(needs)})
        self.groups.append(group)
        return group

    @contextmanager
    def _experts(self, site: Site) -> Iterator[None]:
        parent, _, label = self._local(site.name).rpartition(".")
        owner = self.root.get_submodule(parent)
        parameter = owner._parameters.pop(label)
        assert parameter is not None

        def observe(x: Tensor, expert: int) -> None:
            if site.name not in self._group_of:
                self._group_of[site.name] = self._new_group(site, self._wanted(site))
            for statistic in self._group_of[site.name].inputs.values():
                statistic.update(x.reshape(-1, x.shape[-1]), expert)

        object.__setattr__(owner, label, _Watched(parameter, observe))
        try:
            yield
        finally:
            object.__delattr__(owner, label)
            owner._parameters[label] = parameter

    def _wanted(self, site: Site) -> frozenset[str]:
        return frozenset(self.needs(site) & INPUTS.keys())

    def _local(self, name: str) -> str:
        return name[len(self.prefix) :].removeprefix(".") if self.prefix else name


class _Watched:
    """Stands where a stacked parameter stood; the product of expert ``e``'s weight tells its input."""

    def __init__(self, weight: Tensor, observe: Callable[[Tensor, int], None]):
        self._weight, self._observe = weight, observe

    def __getitem__(self, index: int | Tensor) -> Tensor:
        expert = int(index)
        weight = self._weight[expert]

        def product(x: Tensor) -> Tensor:
            self._observe(x, expert)
            return nn.functional.linear(x, weight)

        return CompressedWeight(tuple(weight.shape), weight.dtype, weight.device, product, lambda: weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)
