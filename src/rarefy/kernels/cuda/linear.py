"""The ops over execution layouts (``kernels/prepared.py``) on GPUs, with activations in 16 bits.

Up to some number of tokens (``most_tokens``) a kernel multiplies by codes; beyond, the weight is dequantized for the
library's product. The kernel is ``linear.cu``, ``gemm.cu`` or ``prompt.cu`` where PyTorch's CUDA compiler is at hand,
otherwise its portable form in Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from rarefy import packing
from rarefy.core.errors import FormatError, UnsupportedError
from rarefy.kernels import activations, prepared
from rarefy.kernels.cuda import driver, kept, layout, program, tuning
from rarefy.kernels.cuda.measure import Problem, takes_wide
from rarefy.kernels.cuda.prepared import (
    BILEVEL,
    CODES,
    ENTRIES,
    GROUPS,
    LEVEL,
    MASKED,
    PAIRS,
    Prepared,
    code_of,
    entries_of,
    sparse_code_of,
)
from rarefy.kernels.prepared import flat, library
from rarefy.kernels.reference import decode

ACTIVATIONS = (torch.float16, torch.bfloat16)
MOST_TOKENS = 128  # beyond, a dequantized weight and the library's product take less time
MOST_TOKENS_WIDE = 768  # where four warps can multiply together
MOST_TOKENS_OF_PROMPTS = 1024  # there, of one term of few rows, which other warps unpack
MOST_TOKENS_OF_SMALL_GROUPS = 64  # there, since every 16 or 32 columns are scaled apart
MOST_APART = 1 << 22  # numbers from a token to the next, so that 32 bits count them
MOST_TOKENS_OF_16_BITS = 64  # up to which reading the weight is all that counts, so that activations stay exact
MOST_TOKENS_OF_16_BITS_BY_CODES = 384  # likewise of codes, which would have to become bytes first
MOST_TOKENS_OF_SPARSE = 4
MOST_TOKENS_OF_OUTLIERS = 16  # beyond, their gathered activations cost more than a dense weight, except in gemm.cu

Term = tuple[dict[str, Tensor], dict[str, int], float]  # tensors, numbers, multiplier


@functools.cache
def available() -> bool:
    """Whether kernels can be run here."""
    return status() in ("cuda", "triton")


@functools.cache
def status() -> str:
    """Which kernels there are for GPUs: ``cuda``, else ``triton``, else why there are none."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA GPU"
    try:
        driver.check()
    except UnsupportedError as failure:
        return "triton" if find_spec("triton") is not None else str(failure)
    return "cuda"


def _compiles() -> bool:
    return status() == "cuda"


def terms_of(tensors: Sequence[Tensor], numbers: Sequence[int], factors: Sequence[float]) -> list[Term]:
    count = len(factors) // 2
    slots, names = Prepared.SLOTS, Prepared.NUMBERS
    if len(tensors) != count * len(slots) or len(numbers) != count * len(names):
        raise FormatError(f"{len(tensors)} tensors and {len(numbers)} numbers do not describe {count} terms.")
    return [
        (
            dict(zip(slots, tensors[index * len(slots) : (index + 1) * len(slots)], strict=True)),
            dict(zip(names, numbers[index * len(names) : (index + 1) * len(names)], strict=True)),
            factors[2 * index + 1],
        )
        for index in range(count)
    ]


def _linear(
    x: Tensor, tensors: list[Tensor], numbers: list[int], factors: list[float], rows: int, columns: int, fast: bool
) -> Tensor:
    if x.shape[-1] != columns:
        raise FormatError(f"The input has {x.shape[-1]} channels, but the weight has {columns} columns.")
    if x.dtype not in ACTIVATIONS:
        raise FormatError(f"The input is {x.dtype}; these kernels take float16 or bfloat16.")
    terms = terms_of(tensors, numbers, factors)
    flat = x.reshape(-1, columns)
    y = _multiplied(flat, terms, rows, fast) if flat.shape[0] else x.new_empty(0, rows)
    return y.reshape(*x.shape[:-1], rows)


def _multiplied(x: Tensor, terms: list[Term], rows: int, fast: bool) -> Tensor:
    """``x [tokens, columns]`` by the first kernel that fits, else by a dense weight."""
    tokens, kinds = x.shape[0], sorted(term[1]["kind"] for term in terms)
    if fast and len(terms) == 1 and tokens > MOST_TOKENS_OF_16_BITS and (weight := _in_bytes(terms[0], x)) is not None:
        return _product_of_bytes(x, *weight, terms[0][2])
    if _compiles():
        x = aligned(x)
        most = most_tokens(terms, x.device)
        if kinds == [CODES, ENTRIES] and tokens <= (most if takes_wide(x.device) else MOST_TOKENS_OF_OUTLIERS):
            codes, outliers = sorted(terms, key=lambda term: term[1]["kind"])
            return _product(x, codes, outliers)
        if set(kinds) == {CODES} and tokens <= most:
            parts = [_product(x, term) for term in terms]
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        if kinds in ([GROUPS], [MASKED]) and tokens <= MOST_TOKENS_OF_SPARSE and _fits(terms[0], x):
            return _sparse_product(x, terms[0])
    elif kinds == [CODES] and tokens <= MOST_TOKENS and (y := _portable(aligned(x), terms[0])) is not None:
        return y
    columns = terms[0][1]["columns"]
    return torch.nn.functional.linear(x[:, :columns], _dense(terms, rows, columns, x.dtype))


def most_tokens(terms: Sequence[Term], device: torch.device) -> int:
    """Up to how many tokens are multiplied by codes."""
    if not takes_wide(device):
        return MOST_TOKENS
    if any(numbers["kind"] == CODES and 0 < numbers["group_size"] <= 32 for _, numbers, _ in terms):
        return MOST_TOKENS_OF_SMALL_GROUPS
    few = len(terms) == 1 and terms[0][1]["rows"] <= tuning.NARROW
    return MOST_TOKENS_OF_PROMPTS if few else MOST_TOKENS_WIDE


def _in_bytes(term: Term, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weight in E4M3 and what its rows are multiplied by, where the library has a product for that: stored so, or
    for more tokens made of codes, which rounds them once more."""
    tensors, numbers, _ = term
    rows, columns = numbers["rows"], numbers["columns"]
    if rows % 16 or columns % 32 or torch.cuda.get_device_capability(x.device) < (8, 9):
        return None
    if tensors["row_scale"].numel() > 0:
        return tensors["codes"].view(torch.float8_e4m3fn), tensors["row_scale"]
    if numbers["kind"] != CODES or x.shape[0] <= MOST_TOKENS_OF_16_BITS_BY_CODES or not _compiles():
        return None
    code, half = code_of(tensors, numbers), x.dtype == torch.float16
    if not code.plain_numbers:
        return None
    weight = tensors["codes"].new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    step = weight.new_empty(rows, dtype=torch.float32)
    given = program.arguments(
        {**pointed(term, half), "y": weight, "partial": step}, rows=rows, columns=columns,
        second_rows=numbers["second_rows"],
    )  # fmt: skip
    program.dequantize(code, given, half, x.device, to_bytes=True)
    return weight, step


def _product_of_bytes(x: Tensor, weight: Tensor, row_scale: Tensor, multiplier: float) -> Tensor:
    """With activations in E4M3, a step for each token."""
    codes, step = activations.quantize_tokens(x)
    y = torch._scaled_mm(
        codes, weight.t(), step.unsqueeze(1), row_scale.unsqueeze(0), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return (y if multiplier == 1.0 else y * multiplier).to(x.dtype)


def _fits(term: Term, x: Tensor) -> bool:
    """Whether a block of a kernel of kept weights has room for the tokens ``x``."""
    code = sparse_code_of(term[0], term[1])
    return code.shared_memory(kept.at_once(x.shape[0]), x.shape[1]) <= tuning.MOST_SHARED


def _sparse_product(x: Tensor, term: Term) -> Tensor:
    tensors, numbers, multiplier = term
    y = x.new_empty(x.shape[0], numbers["rows"])
    given = kept.arguments(pointed_sparse(term), x, y, multiplier)
    half = x.dtype == torch.float16
    kept.product(sparse_code_of(tensors, numbers), given, half, x.device, overlap=tuning.overlaps(x.device))
    return y


def pointed_sparse(term: Term) -> dict[str, Tensor | None]:
    """The tensors that kernels of kept weights read, by their names."""
    present = {name: tensor if tensor.numel() else None for name, tensor in term[0].items()}
    return {
        **{name: present[name] for name in ("codes", "scale", "bitmap", "places", "bases")},
        "zero": present["zero_point"],
        "row_ptr": present["row_ptr" if term[1]["kind"] == GROUPS else "starts"],
    }  # fmt: skip


def _quantize_tokens(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    fits = x.dim() == 2 and x.shape[1] % 8 == 0 and x.dtype in ACTIVATIONS and x.numel() > 0 and _compiles()
    if not fits or (gain is not None and gain.dtype != x.dtype) or torch.cuda.get_device_capability(x.device) < (8, 9):
        return activations.reference(x, gain, eps)
    x = aligned(x)
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    step = x.new_empty(x.shape[0], dtype=torch.float32)
    program.quantize(x, None if gain is None else aligned(gain.unsqueeze(0))[0], eps, codes, step)
    return codes, step


def aligned(x: Tensor) -> Tensor:
    """``x [tokens, columns]`` so that eight columns are one load; columns that are added hold zeros."""
    missing = -x.shape[1] % 8
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    apart = x.stride(0)
    if x.stride(1) == 1 and apart % 8 == 0 and x.shape[1] <= apart < MOST_APART and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Beside:
    """What a product with an ending reads beside its tokens: ``squares`` float32 ``[tokens, parts]``, sums of squares
    of what a norm with ``eps`` divides them by; ``hidden [tokens, rows]``, which it adds to in place, and the next
    norm's ``gain [rows]``."""

    squares: Tensor | None = None
    eps: float = 0.0
    hidden: Tensor | None = None
    gain: Tensor | None = None


def can_end(terms: Sequence[prepared.Prepared], tokens: int, dtype: torch.dtype) -> bool:
    """Whether ``product_with_ending`` takes ``terms`` for so many tokens. Not in float16, which cannot hold every
    residual stream times a gain before it is divided."""
    kinds = sorted(term.numbers["kind"] for term in terms)
    few = tokens <= MOST_TOKENS_OF_OUTLIERS and dtype == torch.bfloat16
    return few and kinds in ([CODES], [CODES, ENTRIES]) and terms[0].rows % (2 * layout.TILE) == 0 and _compiles()


def product_with_ending(
    x: Tensor, terms: Sequence[prepared.Prepared], ending: program.Ending, beside: Beside
) -> tuple[Tensor, Tensor]:
    """What ``ending`` makes of ``x @ weight.T``: ``[tokens, rows]``, or ``[tokens, rows / 2]`` where it is gated. With
    what is added to, also its sums of squares, float32 ``[tokens, rows / 16]``."""
    codes, *outliers = sorted(terms_of(*flat(terms)[:3]), key=lambda term: term[1]["kind"])
    rows = codes[1]["rows"]
    y = x.new_empty(len(x), rows // 2 if ending.kind == "gated" else rows)
    parts = rows // layout.TILE if ending.kind == "added" else 0
    squared = x.new_empty(len(x), parts, dtype=torch.float32)
    more = {"squares": beside.squares, "hidden": beside.hidden, "gain": beside.gain, "squared": squared}
    _product(aligned(x), codes, next(iter(outliers), None), y=y, ending=ending, more=more, eps=beside.eps)
    return y, squared


def _product(
    x: Tensor, term: Term, outliers: Term | None = None, *, y: Tensor | None = None,
    ending: program.Ending = program.PLAIN, more: Mapping[str, Tensor | None] | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    tensors, numbers, multiplier = term
    code, tokens, rows = code_of(tensors, numbers), x.shape[0], numbers["rows"]
    half = x.dtype == torch.float16
    entries: dict[str, Tensor | None] = {}
    if outliers is not None:
        dtype = torch.float16 if outliers[1]["half"] else torch.bfloat16
        code = code.with_outliers(dtype, x.shape[1], outliers[0]["entries"].shape[1])
        entries = pointed_entries(outliers[0])
    chosen = tuning.choose_with(ending, code, rows, x.shape[1], tokens, x.device)
    y = x.new_empty(tokens, rows) if y is None else y
    work = program.workspace(code, chosen, rows, x.shape[1], tokens, x.device)
    given = program.arguments(
        {**pointed(term, half), **entries, **work, **(more or {}), "x": x, "y": y},
        rows=rows, columns=x.shape[1], tokens=tokens, stride=x.stride(0),
        second_rows=numbers["second_rows"], multiplier=multiplier, eps=eps,
    )  # fmt: skip
    program.linear(code, chosen, given, half, x.device, ending)
    return y


def pointed(term: Term, half: bool) -> dict[str, Tensor | None]:
    tensors = term[0]
    present = {name: tensor if tensor.numel() else None for name, tensor in tensors.items()}
    return {
        "codes": tensors["codes"], "scale": present["scale"], "zero": present["zero_point"],
        "second": present["second_order"], "table": present["pairs_half" if half else "pairs_bfloat16"],
    }  # fmt: skip


def pointed_entries(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The tensors of outliers that kernels read, by their names."""
    some = tensors["rest"].numel() > 0
    return {"entries": tensors["entries"], **{name: tensors[name] if some else None for name in ("rest", "rest_ptr")}}


def problem_of(made: prepared.Prepared) -> Problem | None:
    """What is measured of a term; None for one that is no codes."""
    (term,) = terms_of(*flat([made])[:3])
    tensors, numbers, _ = term
    if numbers["kind"] != CODES:
        return None
    own = {name: tensor for name, tensor in pointed(term, False).items() if tensor is not None}
    return Problem(code_of(tensors, numbers), own, numbers["rows"], numbers["columns"], numbers["second_rows"])


def _portable(x: Tensor, term: Term) -> Tensor | None:
    """The product by Triton; None where it does not read these codes."""
    from rarefy.kernels.triton import linear as portable

    tensors, numbers, multiplier = term
    code = code_of(tensors, numbers)
    if not portable.fits(code):
        return None
    zero = tensors["zero_point"] if tensors["zero_point"].numel() else None
    chosen = portable.Tuning(tokens=max(16, min(128, 1 << (x.shape[0] - 1).bit_length())))
    return portable.linear(
        code, chosen, x, tensors["codes"], tensors["scale"], zero, numbers["rows"], multiplier
    )


def _dense(terms: Sequence[Term], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``: codes by the kernel where one reads them, outliers added to it, all else in torch."""
    codes = [term for term in terms if term[1]["kind"] == CODES]
    lists = [term for term in terms if term[1]["kind"] == ENTRIES]
    if len(codes) != 1 or len(codes) + len(lists) < len(terms) or columns % 4 or not _compiles():
        return dense_sum(terms).to(dtype)
    tensors, numbers, multiplier = codes[0]
    weight = tensors["codes"].new_empty(rows, columns, dtype=dtype)
    half = dtype == torch.float16
    given = program.arguments(
        {**pointed(codes[0], half), "y": weight}, rows=rows, columns=columns,
        second_rows=numbers["second_rows"], multiplier=multiplier,
    )  # fmt: skip
    program.dequantize(code_of(tensors, numbers), given, half, weight.device)
    for own, more, _ in lists:
        values, column = packing.unpack_entries(entries_of(own), torch.float16 if more["half"] else torch.bfloat16)
        counts = own["row_ptr"][0].diff()
        row = torch.repeat_interleave(
            torch.arange(rows, device=column.device), counts, output_size=column.numel()
        )
        place = row * columns + column  # each but once
        flat_weight = weight.view(-1)
        flat_weight[place] = (flat_weight[place].float() + values.float()).to(dtype)
    return weight


def _decode(tensors: list[Tensor], numbers: list[int], factors: list[float], rows: int, columns: int) -> Tensor:
    return dense_sum(terms_of(tensors, numbers, factors))


def dense_sum(terms: Sequence[Term]) -> Tensor:
    weights = [_values(*term) for term in terms]
    return torch.stack(weights).sum(0) if len(weights) > 1 else weights[0]


def _values(tensors: dict[str, Tensor], numbers: dict[str, int], multiplier: float) -> Tensor:
    """The dense weight of one term, float32, with the operations of the reference in their order."""
    rows, columns = numbers["rows"], numbers["columns"]
    if numbers["kind"] == GROUPS:
        return _values_of_groups(tensors, numbers, multiplier)
    if numbers["kind"] == MASKED:
        return _values_of_masked(tensors, numbers, multiplier)
    if numbers["kind"] != CODES:
        return decode.decode_csr(entries_of(tensors), tensors["row_ptr"], bool(numbers["half"]), rows, columns)
    size = numbers["group_size"] or columns
    code = code_of(tensors, numbers)

    def spread(numbers_of_groups: Tensor) -> Tensor:
        return numbers_of_groups.float().repeat_interleave(size, dim=1)[:, :columns]

    if code.span == 16:
        codes = tensors["codes"][:, :columns]
        codes = codes.view(torch.float8_e4m3fn).float() if code.float8 else codes
    else:
        codes = layout.unpack_codes(tensors["codes"], code.bits, code.span, code.order, rows, columns)
    if code.table == "rows":
        lut = layout.unpack_tables(tensors["pairs_half"], rows, torch.float16)
        other = layout.unpack_tables(tensors["pairs_bfloat16"], rows, torch.bfloat16)
        exact = lut.float() if numbers["half"] else other.float()
        group = torch.arange(columns, device=codes.device) // size
        return exact[torch.arange(rows, device=codes.device)[:, None], group, codes.long()]
    together = code.table == "shared"
    values = tensors["table"][codes.long()] if together else codes.float()
    kind = numbers["scale_layout"]
    scale = layout.unpack_pairs(tensors["scale"], rows) if tensors["scale"].numel() else None
    if kind == PAIRS:
        assert scale is not None
        first, second = (spread(part) for part in scale.unsqueeze(-1).view(torch.float16).unbind(-1))
        weight = torch.where(codes > 0, second, first)
    else:
        zero: Tensor | float = float(numbers["center"])
        if kind in (BILEVEL, LEVEL):
            assert scale is not None
            tile = [layout.TILE * numbers["second_rows"], numbers["second_groups"]]
            order = tensors["second_order"]
            scale, zeros = decode.group_scales(scale, order if kind == BILEVEL else order[..., :2], tile)
            zero = zero if zeros is None else spread(zeros)
        elif tensors["zero_point"].numel():
            zero = spread(layout.unpack_pairs(tensors["zero_point"], rows))
        weight = values if together else values - zero
        weight = weight if scale is None else weight * spread(scale)
    return weight if multiplier == 1.0 else weight * multiplier


def _values_of_groups(tensors: dict[str, Tensor], numbers: dict[str, int], multiplier: float) -> Tensor:
    chosen, groups, scale, zero = kept.kept_of(tensors, numbers)
    values = groups.float() - (numbers["center"] if zero is None else zero.float().unsqueeze(1))
    weight = torch.zeros(*chosen.shape, groups.shape[1], device=groups.device)
    weight[chosen] = values * scale.float().unsqueeze(1) * multiplier
    return weight.flatten(1)


def _values_of_masked(tensors: dict[str, Tensor], numbers: dict[str, int], multiplier: float) -> Tensor:
    bits, columns, stored = numbers["bits"], numbers["columns"], tensors["codes"]
    mask = packing.unpack_bitmap(tensors["bitmap"], columns)
    if bits == 16:
        kept = stored.flatten()
    else:
        kept = packing.unpack_bits(stored, bits, stored.shape[-2] * packing.WORD).flatten()
    place = mask.cumsum(1) - 1 + tensors["starts"][:-1, None]
    values = kept[place.clamp(0, max(kept.numel() - 1, 0))].float() if kept.numel() else mask.float()
    if tensors["scale"].numel():
        size = numbers["group_size"] or columns
        spread = {
            name: tensors[name].float().repeat_interleave(size, dim=1)[:, :columns] for name in ("scale", "zero_point")
            if tensors[name].numel()
        }  # fmt: skip
        values = (values - spread.get("zero_point", numbers["center"])) * spread["scale"]
    return torch.where(mask, values if multiplier == 1.0 else values * multiplier, 0.0)


library.impl("linear_prepared", _linear, "CUDA")
library.impl("decode_prepared", _decode, "CUDA")
activations.library.impl("quantize_tokens", _quantize_tokens, "CUDA")
