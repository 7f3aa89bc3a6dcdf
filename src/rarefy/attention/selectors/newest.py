"""The blocks of one query in one launch: what a token that is decoded costs is mostly what launches cost."""

from __future__ import annotations

from rarefy.attention.block_map import BlockMap
from rarefy.attention.call import Call
from rarefy.attention.estimators.base import Products
from rarefy.attention.policy import Policy
from rarefy.attention.selectors.base import Selector, TopK
from rarefy.attention.selectors.fused import WIDEST
from rarefy.kernels.triton import usable


def serves(selector: Selector, policy: Policy, call: Call, block_k: int) -> bool:
    """Whether the kernel knows the rule, what is forced, and which keys are hidden."""
    one = call.query.shape[2] == 1 and call.reach.padded_causal and call.layer not in dict(policy.dense_heads)
    return one and isinstance(selector, TopK) and call.reach.keys <= WIDEST * block_k and usable(call.query.device)


def fits(products: Products) -> bool:
    """Whether the kernel's tiles hold these channels."""
    return products.high.shape[3] >= 16 and products.high.shape[3].bit_count() == 1


def newest_map(selector: Selector, products: Products, policy: Policy, call: Call, block_k: int) -> BlockMap:
    """The map that `select_map` would make of the same scores, where `serves` and `fits` say so."""
    from rarefy.kernels.triton.block_decode import choose_blocks

    reach, rule = call.reach, selector.rule()
    assert rule is not None
    own = {name: value for name, value in rule.items() if name != "rule"}
    lists = choose_blocks(
        products.query, products.high, reach.ends(call.query.shape[0], call.query.device), -(-reach.keys // block_k),
        tokens=block_k, scaling=products.scaling, low=products.low, first=reach.first, sink=policy.sink,
        local=policy.local, **own,
    )  # fmt: skip
    return BlockMap(1, block_k, *lists, reach)
