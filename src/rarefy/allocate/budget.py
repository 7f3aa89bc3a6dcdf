"""The choices of least cost whose prices a budget allows."""

from __future__ import annotations

from collections.abc import Sequence


def within_budget(costs: Sequence[Sequence[float]], prices: Sequence[float], budget: float) -> list[int]:
    """Which of the choices each item gets, so that the sum of ``costs[item][choice]`` is small and that of ``prices``
    is at most ``budget``.

    Every item begins with the cheapest choice; what saves most per price is bought next, until nothing that saves
    anything can be paid. For costs that fall ever less this is the optimum for what was spent (Shoham and Gersho 1988).
    The cheapest choice is taken even where the budget does not allow it.
    """
    chosen = [min(range(len(prices)), key=prices.__getitem__)] * len(costs)
    left = budget - sum(prices[choice] for choice in chosen)
    while True:
        offers = [
            ((own[now] - own[choice]) / (price - prices[now]), item, choice)
            for item, (own, now) in enumerate(zip(costs, chosen, strict=True))
            for choice, price in enumerate(prices)
            if prices[now] < price <= prices[now] + left + 1e-9 and own[choice] < own[now]
        ]
        if not offers:
            return chosen
        _, item, choice = max(offers)
        left -= prices[choice] - prices[chosen[item]]
        chosen[item] = choice
