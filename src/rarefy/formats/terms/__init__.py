"""The terms whose sum is a weight.

What each kind stores (``R`` rows, ``C`` columns, ``G`` groups of a row, ``S`` stacked members leading every shape,
``w(n)`` = ceil(n / 32) words, ``b`` bits of a code). Integer tensors carry unsigned bit patterns.

==============  ============  =====================  ==================================================================
term            tensor        dtype                  shape
==============  ============  =====================  ==================================================================
quantized       codes         int32                  [R, w(C), b]; planes [b, R, w(C)]; kept only: [R, w(kept), b] (n_m,
                                                     groups/ids) or [w(kept), b] (bitmap, groups/csr, groups/bitmap)
                codes         uint8 / int64          ternary [R, ceil(C/5)] / five-level [R, ceil(C/27)]
                scale         float                  [R, G]; two signs [R, G, 2]; kept groups [R, kept] or [kept]
                scale         uint8                  bilevel: as above, codes of scale and zero in nibbles, or [R, G, 2]
                second_order  float                  bilevel: [ceil(R/tile rows), ceil(G/tile groups), 2 or 4]
                zero_point    int32 / float          integer: bit stream [w(R*G), b]; float: as scale
                lut           float                  [ceil(R/rows_per_lut), G, entries]
                multiplier    float32                []
any sparse      bitmap        int32                  [R, w(C)] (bitmap, n_m) or [R, w(G)] (groups)
                indices       int32                  [R, w(G), rank bits] (n_m ranks)
                indices       uint8                  [R, kept groups, 2] or [kept groups, 2] (group ids, two bytes each)
                row_ptr       int32                  [R + 1] (groups/csr)
sparse          values        float                  the kept shape of its pattern
residual        entries       int32                  [kept]: 16-bit value above a 16-bit column
                row_ptr       int32                  [ceil(C/65536), R + 1]
dense           values        float                  [R, C]
product         lowrank_b.*   of the left factor     weight [R, rank]
                lowrank_a.*   of the right factor    weight [rank, C]
partition       parts.N.*     of part N              weight [size, C], [R, size] or [size, R, C]
                indices       int32                  [R], [C] or [S]: original position of each, if reordered
shared          -             -                      nothing: the term named by ``ref`` stores it
input           permutation   int32                  [C]
                input_scale   float                  [C]
                signs         int32                  [w(C)] bitmap of minus signs before the Hadamard rotation
==============  ============  =====================  ==================================================================
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rarefy.core.config import explain
from rarefy.core.errors import FormatError
from rarefy.formats.terms.base import Shape, Term, TermSpec
from rarefy.formats.terms.composed import AnyTerm, Partition, Product, Shared, check_depth
from rarefy.formats.terms.plain import Dense, Residual, Sparse
from rarefy.formats.terms.quantized import Quantized
from rarefy.formats.terms.stack import stack

_adapter: TypeAdapter[TermSpec] = TypeAdapter(AnyTerm)


def parse_spec(data: Any) -> TermSpec:
    """A term's description from JSON data. Raises FormatError naming the first key that is wrong."""
    check_depth(data)
    try:
        # Through JSON, since only there does strict checking take a list for a tuple; "4" or 4.0 is no number of bits.
        return _adapter.validate_json(json.dumps(data), strict=True)
    except ValidationError as failure:
        raise FormatError(f"term description: {explain(failure)}") from None
    except (TypeError, ValueError) as failure:
        raise FormatError(f"term description: it is not JSON data ({failure})") from None


__all__ = [
    "Dense", "Partition", "Product", "Quantized", "Residual", "Shape", "Shared", "Sparse", "Term", "TermSpec",
    "parse_spec", "stack",
]  # fmt: skip
