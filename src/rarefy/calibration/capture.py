"""Statistics of the inputs of a block's layers, gathered by hooks while the block runs.

Layers that read one tensor (q, k and v; gate and up) share one statistic, found by the tensor itself. Each stacked
expert is observed where the model's own loop multiplies its weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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

    @classmethod
    def of(cls, site: Site, needs: frozenset[str], device: torch.device) -> Group:
        """One site that nothing is known of yet."""
        members = site.shape[0] if site.kind == "experts" else None
        wanted = sorted(needs & INPUTS.keys())
        return cls([site], {name: INPUTS[name](site.shape[-1], members, device) for name in wanted})

    def statistics(self) -> Statistics:
        return Statistics(**self.inputs)  # type: ignore[arg-type]

    def finish(self) -> None:
        """No more data comes. Raises RecipeError, naming the layer, when its inputs were not finite."""
        for statistic in self.inputs.values():
            try:
                statistic.check()
            except FormatError as failure:
                raise RecipeError(f"Layer '{self.sites[0].name}': {failure}.") from None
            statistic.assume_uniform_()


def unseen_inputs(site: Site, needs: frozenset[str], device: torch.device) -> dict[str, InputStatistic]:
    """What is known of the inputs of a site that no data reached."""
    group = Group.of(site, needs, device)
    group.finish()
    return group.inputs


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
        self._batches, self._early = 0, False
        self._order: list[str] = []  # sites as the first batch reached them
        self._last: str | None = None

    @contextmanager
    def watching(self, early: bool = False) -> Iterator[None]:
        """Observe every layer while the context lasts; call ``batch`` before each run.

        With ``early`` the runs after the first end with EndOfBlock as soon as the last layer's input is known, if the
        first one reached every layer once: otherwise which one is the last may change with the data.
        """
        self._early = early
        with ExitStack() as stack:
            stack.callback(self._seen.clear)
            for site in self.sites:
                if site.kind == "experts":
                    stack.enter_context(self._experts(site))
                else:
                    module = self.root.get_submodule(self._local(site.name))
                    handle = module.register_forward_pre_hook(self._hook(site), with_kwargs=True)
                    stack.callback(handle.remove)
            for parent in {site.name.rpartition(".")[0] for site in self.sites if site.kind == "experts"}:
                stack.enter_context(self._without_padding(self.root.get_submodule(self._local(parent))))
            yield

    def batch(self, mask: Tensor | None) -> None:
        """A new batch begins; ``mask [samples, tokens]`` is zero where a token is padding."""
        self._seen.clear()
        if self._batches == 1 and self._early and Counter(self._order) == Counter(site.name for site in self.sites):
            self._last = self._order[-1]
        self._batches += 1
        self._mask = None if mask is None or bool(mask.all()) else mask.bool().to(self.device)

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
            group = self._new_group(names[members[0]]) if known is None else known
            if known is not None:
                self.groups.append(known)
            group.sites = [names[name] for name in members]
            self._group_of.update(dict.fromkeys(members, group))

    def unseen(self) -> list[Site]:
        """Sites that no input reached."""
        return [site for site in self.sites if site.name not in self._group_of]

    def _hook(self, site: Site) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._observe(site, first_input(args, kwargs))
            if self._batches == 1:
                self._order.append(site.name)
            elif site.name == self._last:
                raise EndOfBlock

        return observe

    def _observe(self, site: Site, x: Tensor) -> None:
        needs = self._wanted(site)
        key = (x.data_ptr(), x.numel(), x.shape[-1], x.dtype, needs)
        known = self._group_of.get(site.name)
        met = self._seen.get(key)
        if known is None:
            group = met[0] if met else self._new_group(site)
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
        flat = x.reshape(-1, x.shape[-1])
        # A mask of other positions (those of an image, a pooled token) says nothing of these.
        if self._mask is not None and x.shape[:-1] in (self._mask.shape, (self._mask.numel(),)):
            return flat[self._mask.flatten()]
        return flat

    def _new_group(self, site: Site) -> Group:
        group = Group.of(site, self._wanted(site), self.device)
        self.groups.append(group)
        return group

    @contextmanager
    def _without_padding(self, experts: nn.Module) -> Iterator[None]:
        """Let ``experts`` see no padding: which rows each one takes is known only inside its forward."""

        def drop(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._mask is None:
                return None
            keep = self._mask.flatten()
            first = first_input(args, kwargs)
            if first.shape[:-1] != keep.shape:
                raise UnsupportedError(
                    f"Experts of '{self.prefix}' take {list(first.shape)} for a padding mask of {list(keep.shape)}, so "
                    "padding cannot be told apart; give sequences of one length."
                )
            return tree_map(lambda part: part[keep] if _has_rows(part, keep) else part, (args, kwargs))

        def fill(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if self._mask is None:
                return None
            keep = self._mask.flatten()
            return output.new_zeros(keep.numel(), *output.shape[1:]).index_put((keep,), output)

        handles = [
            experts.register_forward_pre_hook(drop, with_kwargs=True),
            experts.register_forward_hook(fill, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _experts(self, site: Site) -> Iterator[None]:
        parent, _, label = self._local(site.name).rpartition(".")
        owner = self.root.get_submodule(parent)
        parameter = owner._parameters.pop(label)
        assert parameter is not None

        def observe(x: Tensor, expert: int) -> None:
            if site.name not in self._group_of:
                self._group_of[site.name] = self._new_group(site)
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


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module's forward is given first, by place or by name."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


def _has_rows(part: Any, keep: Tensor) -> bool:
    return isinstance(part, Tensor) and part.dim() > 0 and part.shape[0] == keep.numel()


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
