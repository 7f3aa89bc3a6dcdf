"""Whole-model decoding on one GPU: a model shaped like Llama 3 8B, random weights in code, by the CUDA-graph runner.

Each sequence holds some tokens already; a row is the time of one more token for all of them, greedy, chosen on the GPU.
``fraction_of_limit`` is the time to move the step's weights and caches at the bandwidth of a copy over the time taken,
``fraction_of_read`` at that of a sum, which writes nothing.
Peers run the same shape in the same process and in turn: the model in bfloat16 by the same runner; Transformers eager,
and compiled with a static cache; torchao's int4 and bfloat16 as torch.compile likes them best (``compiled_llama.py``);
and other people's 4-bit products inside our graph, which gives them everything but the products. Random weights: no
quality is claimed here.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import compiled_llama
import torch
from graphs import bandwidth, graph_of, microseconds
from harness import Row, arguments, write
from step_tuning import Choices, tune
from torch import Tensor, nn

from rarefy import packing
from rarefy.decoding import interpreter
from rarefy.decoding.build import build
from rarefy.decoding.cache import FLOAT8, KeyValues, Sequences
from rarefy.decoding.fuse import Projects
from rarefy.decoding.graph import GraphExecutor
from rarefy.decoding.program import Add, Attend, Program, Project
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LutGrid
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms.base import Term
from rarefy.formats.terms.plain import ResidualSpec
from rarefy.formats.terms.quantized import QuantizedSpec
from rarefy.integrations.peers import step_bytes
from rarefy.kernels.cuda.linear import MOST_TOKENS_OF_OUTLIERS
from rarefy.kernels.cuda.measure import takes_wide
from rarefy.layers.linear import CompressedLinear

KEY = ("job", "batch", "peer")
DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, Grid] = {
    "W4 g128": IntegerGrid(num_bits=4, group_size=128),
    "W4 zero g128": IntegerGrid(num_bits=4, group_size=128, zero="integer"),
    "W3 g128": IntegerGrid(num_bits=3, group_size=128), "W2 g128": IntegerGrid(num_bits=2, group_size=128),
    "W8 g128": IntegerGrid(num_bits=8, group_size=128),
    "binary g128": BinaryGrid(group_size=128), "fp8": FloatGrid(format="fp8_e4m3"),
    "LUT4": LutGrid(num_bits=4, rows_per_lut=None), "NF4 g64": FloatGrid(format="nf4", group_size=64),
    "SpQR 3": IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale(rows=16)),
    "SqueezeLLM 3": LutGrid(num_bits=3),
}  # fmt: skip
WITH_OUTLIERS, OUTLIERS = ("SpQR 3", "SqueezeLLM 3"), 0.0045
PROMPT, NEW, TRIAL = 128, 64, 16
CHECKED = 2  # layers: random ones magnify every rounding
TRIED = 16  # tokens of a peer's product that is checked: GemLite brings forms of so many along
SPREAD = 0.02  # of weights


def random_term(rows: int, columns: int, kind: str) -> list[Term]:
    """Random codes with scales that make a weight of ordinary size and without a mean: with one every product would
    follow the sum of its input, queries would grow until one token has all the attention, and one rounding would decide
    which."""
    terms: list[Term] = [_codes(rows, columns, KINDS[kind], _step(kind))]
    if kind in WITH_OUTLIERS:
        terms.append(_outliers(rows, columns))
    return terms


@functools.cache
def _step(kind: str) -> float:
    """The mean scale with which random codes spread as weights do."""
    return SPREAD / float(_codes(256, 4096, KINDS[kind], 1.0).decode().std())


def _codes(rows: int, columns: int, grid: Grid, step: float) -> Term:
    spec = QuantizedSpec(grid=grid)  # type: ignore[arg-type]
    tensors = {}
    for name, entry in spec.layout((rows, columns)).items():
        shape = [int(size) for size in entry.shape]
        if name in ("codes", "zero_point"):
            made = torch.randint(-(2**31), 2**31, shape, device=DEVICE)
            made &= ~0x08080808 if grid.code_bits == 8 and isinstance(grid, FloatGrid) else -1  # all numbers of E4M3
        elif name == "scale" and entry.dtype == torch.uint8:
            made = torch.randint(0, 8, shape, device=DEVICE) | (torch.randint(2, 6, shape, device=DEVICE) << 4)
        elif name == "second_order":  # scales from 1 to 8 steps, zeros as coded
            made = torch.tensor([step, -1.0, 1.0, 0.0], device=DEVICE).expand(shape)
        elif name == "lut":
            made = torch.randn(shape, device=DEVICE) * step
            made -= made.mean(-1, keepdim=True)
        else:
            made = (0.5 + torch.rand(shape, device=DEVICE)) * step
            made *= torch.randint(0, 2, shape, device=DEVICE) * 2 - 1
        tensors[name] = made.to(entry.dtype).contiguous()
    return spec.build((rows, columns), tensors)


def _outliers(rows: int, columns: int) -> Term:
    """As many in each row, spread over its columns."""
    count = max(1, round(OUTLIERS * columns))
    place = (torch.arange(count, device=DEVICE) + torch.rand(rows, count, device=DEVICE)) * columns / count
    values = torch.randn(rows * count, device=DEVICE, dtype=torch.float16) * 5 * SPREAD
    entries = packing.pack_entries(values, place.long().clamp(max=columns - 1).flatten())
    pointers = torch.arange(0, rows * count + 1, count, device=DEVICE, dtype=torch.int32)[None]
    return ResidualSpec().build((rows, columns), {"entries": entries, "row_ptr": pointers})


def random_model(kind: str | None, shape: dict[str, Any]) -> Any:
    """The model with every linear layer, the head too, in code of a kind (None: in bfloat16), made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = LlamaConfig(**shape, dtype=DTYPE)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(DEVICE)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and kind is not None:
            terms = random_term(module.out_features, module.in_features, kind)
            model.set_submodule(name, CompressedLinear(terms, None, DTYPE))
            continue
        for label, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, device=DEVICE, dtype=DTYPE)
            made = made.normal_(0, SPREAD) if parameter.dim() > 1 else made.fill_(1.0)
            setattr(module, label, nn.Parameter(made, requires_grad=False))
    return model


Other: TypeAlias = Callable[[int, int], Callable[[Tensor], Tensor] | None]


@dataclass
class Decoder:
    """``run()`` writes some tokens for all sequences, ``count`` each; ``nbytes`` is what a step reads."""

    name: str
    run: Callable[[], Any]
    count: int
    nbytes: int
    error: float = 0.0


@dataclass(frozen=True)
class Held:
    """What each sequence holds: random keys and values of so many tokens, in a cache of a dtype."""

    tokens: int = PROMPT
    dtype: torch.dtype = DTYPE

    def nbytes(self, program: Program) -> int:
        """Bytes of a sequence that a step reads, in the middle of those that are written."""
        bits = 8 * self.dtype.itemsize * program.head_dim + 16 * (self.dtype == FLOAT8)
        return 2 * program.layers * program.kv_heads * bits // 8 * (self.tokens + NEW // 2)


HELD = Held()


class Ours:
    """The runner's executor with ``batch`` sequences that hold something.

    ``other(rows, columns)`` makes a product that takes the place of ours, projections of the same input being one;
    where it makes none ours stays. Then nothing is checked."""

    def __init__(self, program: Program, batch: int, other: Other | None = None, held: Held = HELD):
        self.execute, self.held = GraphExecutor(program), held
        self.cache = _random_cache(program, batch, held)
        self.tokens = torch.full((batch,), 17, device=DEVICE)
        self.error = 0.0 if other is not None else error_of_first_layers(program, batch, held=held)
        if other is not None:
            self._replace(other)

    def _replace(self, other: Other) -> None:
        for operation in self.execute._whole:
            if isinstance(operation, Projects):
                rows = [part.linear.out_features for part in operation.parts]
                made = other(sum(rows), operation.parts[0].linear.in_features)
                if made is not None:
                    self.execute._products[operation.parts[0].name] = Theirs(made, rows)  # type: ignore[assignment]

    def __call__(self, count: int) -> Tensor:
        self.cache.lengths = [self.held.tokens] * len(self.tokens)
        return self.execute.write(self.tokens, self.cache, count)


@dataclass
class Theirs:
    """Projections of the same input by other people's product, which nothing can be linked to."""

    product: Callable[[Tensor], Tensor]
    rows: Sequence[int]
    terms: None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.product(x).split(self.rows, -1)


def _random_cache(program: Program, batch: int, held: Held) -> Sequences:
    sizes = (program.layers, program.kv_heads, program.head_dim, held.dtype, program.positions, DEVICE)
    cache = Sequences(batch, *sizes)
    cache.reserve(held.tokens + NEW + 1)
    cache.lengths = [held.tokens] * batch
    shape = program.kv_heads, cache.capacity, program.head_dim
    for layer in range(program.layers):
        for number in range(batch):
            keys, values = torch.randn(2, *shape, device=DEVICE, dtype=DTYPE)
            cache.kept[layer, number].store(0, keys, values)
    return cache


def error_of_first_layers(program: Program, batch: int, token: int = 17, held: Held = HELD) -> float:
    """The largest relative error of the logits of a sequence after one more token and the first `CHECKED` layers,
    against operations one by one with decoded weights in float32. No two sequences are alike."""
    last = [number for number, each in enumerate(program.step) if isinstance(each, Attend)][CHECKED]
    start = max(number for number, each in enumerate(program.step[:last]) if isinstance(each, Add)) + 1
    short = replace(program, step=program.step[:start], layers=CHECKED)
    ours, tokens = _random_cache(short, batch, held), token + torch.arange(batch, device=DEVICE)
    oracle = KeyValues(short.layers, short.kv_heads, short.head_dim, held.dtype, short.positions, DEVICE)
    kept = copy.deepcopy(ours.kept)
    made = GraphExecutor(short).advance(tokens, ours).double()
    decoded = _decoded(short)
    errors = []
    for number in range(batch):
        own = kept[:, number]
        oracle.keys, oracle.values, oracle.steps, oracle.length = own.keys, own.values, own.steps, held.tokens
        wanted = interpreter.run(decoded, tokens[number : number + 1], oracle)[0].double()
        errors.append(float((made[number] - wanted).norm() / wanted.norm()))
    return max(errors)


def _decoded(program: Program) -> Program:
    """``program`` with coded weights in float32."""

    def product(weight: Tensor, x: Tensor) -> Tensor:
        return (x.float() @ weight.T).to(x.dtype)

    def changed(operations: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            replace(each, linear=partial(product, each.linear.decode()))
            if isinstance(each, Project) and isinstance(each.linear, CompressedLinear)
            else each
            for each in operations
        )

    return replace(program, step=changed(program.step), head=changed(program.head))


def ours(name: str, model: Any, program: Program, batch: int, **options: Any) -> Decoder:
    made = Ours(program, batch, **options)
    nbytes = step_bytes(model) + batch * made.held.nbytes(program)
    return Decoder(name, partial(made, NEW), NEW, nbytes, made.error)


def captured_anew(decoder: Decoder) -> float:
    """Milliseconds of a step that is captured once more."""
    made = decoder.run.func  # type: ignore[attr-defined]
    made.execute._steps.clear()
    times = []
    for number in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        made(1)
        begin.record()
        made(TRIAL)
        end.record()
        torch.cuda.synchronize()
        if number:
            times.append(begin.elapsed_time(end) / TRIAL)
    return statistics.median(times)


def gemlite(rows: int, columns: int) -> Callable[[Tensor], Tensor] | None:
    """None for the head, for which GemLite brings no measured form along and would look for one for too long."""
    return None if rows == SHAPE["vocab_size"] else copy.deepcopy(_gemlite(rows, columns))


@functools.cache
def _gemlite(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    import gemlite
    from gemlite.helper import A16Wn

    gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"), overwrite=True)
    codes = torch.randint(0, 16, (rows, columns), device=DEVICE, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 128, device=DEVICE, dtype=DTYPE) * SPREAD / 4
    zero = torch.full_like(scale, 8)
    made = A16Wn(device="cuda:0", dtype=DTYPE).from_weights(codes, scale, zero, 4, 128)
    _check("GemLite", made, (codes.float() - 8).unflatten(1, (-1, 128)) * scale.float().unsqueeze(2))
    return made  # type: ignore[no-any-return]


def tinygemm(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    codes = torch.randint(0, 256, (rows, columns // 2), device=DEVICE, dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, device=DEVICE, dtype=DTYPE) * SPREAD / 4

    def product(x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x, packed, 128, scales)

    if (rows, columns) not in CHECKED_SHAPES:
        CHECKED_SHAPES.add((rows, columns))
        numbers = torch.stack([codes >> 4, codes & 15], 2).flatten(1).float() - 8
        scale, zero = scales.float().transpose(0, 1).unsqueeze(-1).unbind(2)
        _check("tinygemm", product, numbers.unflatten(1, (-1, 128)) * scale + zero)
    return product


CHECKED_SHAPES: set[tuple[int, int]] = set()  # of tinygemm


def _check(name: str, product: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    """Say so if a peer's product is not one with ``weight [rows, groups, columns of a group]``: it is not what it is
    taken for."""
    dense = weight.flatten(1)
    x = torch.randn(TRIED, dense.shape[1], device=DEVICE, dtype=DTYPE)
    wanted = x.double() @ dense.double().T
    error = float((product(x).double() - wanted).norm() / wanted.norm())
    print(f"{name} {list(dense.shape)}: error {error:.1e}", flush=True)


def transformers(name: str, model: Any, batch: int, compiled: bool, count: int) -> Decoder:
    """The model's own forward, token by token, the likeliest one fed back; a static cache where it is compiled."""
    from transformers import DynamicCache, StaticCache

    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward
    ids = torch.randint(3, SHAPE["vocab_size"], (batch, PROMPT), device=DEVICE)
    static = StaticCache(config=model.config, max_cache_len=PROMPT + NEW) if compiled else None

    @torch.inference_mode()
    def run() -> None:
        cache: Any = DynamicCache(config=model.config) if static is None else static
        if static is not None:
            static.reset()
        token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        run.after_prompt.record()  # type: ignore[attr-defined]
        for number in range(count):
            at = torch.tensor([PROMPT + number], device=DEVICE)
            made = forward(input_ids=token, past_key_values=cache, position_ids=at[None].expand(batch, 1))
            token = made.logits[:, -1:].argmax(-1).clone()

    run.after_prompt = torch.cuda.Event(enable_timing=True)  # type: ignore[attr-defined]
    return Decoder(name, run, count, 0)


def compiled(name: str, shape: dict[str, Any], batch: int, quantize: Callable[[nn.Module], None] | None) -> Decoder:
    """See ``compiled_llama.py``."""
    write = compiled_llama.decoder(compiled_llama.Shape.of(shape), batch, PROMPT + NEW, quantize)
    return Decoder(name, partial(write, NEW, PROMPT), NEW, 0)


def read_bandwidth() -> float:
    """Bytes per microsecond that a sum reads."""
    source = torch.zeros(1 << 30, dtype=torch.float32, device=DEVICE)
    return source.numel() * 4 / microseconds({"read": (graph_of([source.sum]), 1)}, 10)["read"]


def milliseconds(decoders: Sequence[Decoder], rounds: int) -> dict[str, float]:
    """Median time of a step, all in turn. Where the prompt is read too, from its end on."""
    times: dict[str, list[float]] = {decoder.name: [] for decoder in decoders}
    for number in range(rounds + 1):
        for decoder in decoders:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            decoder.run()
            end.record()
            torch.cuda.synchronize()
            begin = getattr(decoder.run, "after_prompt", begin)
            if number:
                times[decoder.name].append(begin.elapsed_time(end) / decoder.count)
    return {name: statistics.median(each) for name, each in times.items()}


def attempt(name: str, make: Callable[[], Decoder]) -> list[Decoder]:
    """What ``make`` makes and has run once, or nothing, having said why."""
    begin = time.monotonic()
    try:
        made = make()
        made.run()
        torch.cuda.synchronize()
    except (Exception, KeyboardInterrupt) as failure:  # a peer that does not run, or not in time, loses no other
        print(f"{name}: {type(failure).__name__}: {str(failure).partition(chr(10))[0][:200]}", flush=True)
        return []
    error = f", error {made.error:.1e}" if made.error else ""
    print(f"{name}: ready in {time.monotonic() - begin:.0f} s{error}", flush=True)
    return [made]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, to try things out")
    parser.add_argument("--batch", default="1,32", help="sequences, by commas")
    parser.add_argument("--kinds", default="W4 g128,SpQR 3,SqueezeLLM 3", help="codes, by commas")
    parser.add_argument(
        "--peers", default="eager,tinygemm,gemlite,torchao,compiled,hf", help="by commas"
    )
    parser.add_argument("--caches", default="1:8000,16:4096", help="sequences and tokens that each holds, by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tune", default="0", help="for each batch, seconds to try ways to cut the first kind's products up, by commas"
    )
    parser.add_argument("--entries", type=Path, help="write what was chosen then here")
    options = parser.parse_args()
    shape = {**SHAPE, "num_hidden_layers": options.layers}
    limit = bandwidth(), read_bandwidth()
    print(f"copy {limit[0] / 1e6:.2f} TB/s, read {limit[1] / 1e6:.2f} TB/s", flush=True)
    coded = {kind: random_model(kind, shape) for kind in options.kinds.split(",") if kind}
    programs = {kind: build(model) for kind, model in coded.items()}
    dense = random_model(None, shape)
    batches, seconds = options.batch.split(","), options.tune.split(",")
    for batch, tuned in zip_longest(map(int, batches), map(float, seconds), fillvalue=0):
        measured(int(batch), coded, programs, dense, shape, options, limit, tuned)
        torch.cuda.empty_cache()
    for batch, tokens in (map(int, each.split(":")) for each in options.caches.split(",") if each):
        for kind, model in list(coded.items())[:1]:
            caches(kind, model, programs[kind], batch, tokens, options, limit)


def caches(
    kind: str, model: Any, program: Program, batch: int, tokens: int, options: Namespace, limit: tuple[float, float]
) -> None:
    """Write the row of a cache in 8 bits against one in 16."""
    found: list[Decoder] = []
    for name, dtype in (("cache in E4M3", FLOAT8), ("cache in bfloat16", DTYPE)):
        found += attempt(name, partial(ours, name, model, program, batch, held=Held(tokens, dtype)))
    if len(found) < 2:
        return
    times = milliseconds(found, options.rounds)
    small, large = found
    took = times[small.name]
    row: Row = {
        "goal": "cache", "job": f"{kind}, {small.name}, {tokens:,} tokens before", "batch": batch, "peer": large.name,
        "milliseconds": round(took, 4), "tokens_per_second": round(batch / took * 1e3, 1),
        "peer_milliseconds": round(times[large.name], 4), "ratio": round(times[large.name] / took, 3),
        "fraction_of_limit": round(small.nbytes / limit[0] / took / 1e3, 3),
        "fraction_of_read": round(small.nbytes / limit[1] / took / 1e3, 3), "max_rel_error": small.error,
        "bits_per_weight": _bits(model),
        "note": f"{program.layers} layers, {NEW} tokens written; the peer reads at "
        f"{large.nbytes / limit[0] / times[large.name] / 1e3:.3f} of the limit",
    }  # fmt: skip
    print(row, flush=True)
    write(options, [row], KEY)


def measured(
    batch: int, coded: dict[str, Any], programs: dict[str, Program], dense: Any, shape: dict[str, Any],
    options: Namespace, limit: tuple[float, float], seconds: float,
) -> None:  # fmt: skip
    """Write the rows of one number of sequences, those of peers that take long to get ready after the others."""
    wanted = options.peers.split(",")
    mine: list[Decoder] = []
    choices = Choices()
    with choices.instead():
        for number, (kind, model) in enumerate(coded.items()):
            if batch > MOST_TOKENS_OF_OUTLIERS and kind in WITH_OUTLIERS and not takes_wide(DEVICE):
                print(f"{kind}: weights with outliers are dequantized for {batch} tokens; not measured", flush=True)
                continue
            mine += attempt(kind, partial(ours, kind, model, programs[kind], batch))
            if number == 0 and mine and seconds:
                print("\n".join(tune(choices, partial(captured_anew, mine[0]), batch, seconds)), flush=True)
                print(f"then {captured_anew(mine[0]):.4f} ms", flush=True)
                mine[0].error = max(mine[0].error, error_of_first_layers(programs[kind], batch, token=99))
    if options.entries:
        with options.entries.open("a", encoding="utf-8") as file:
            file.write(json.dumps(choices.entries(batch)) + "\n")
    mine += attempt("bf16", partial(ours, "bf16, same runner", dense, build(dense), batch))
    kind, model = next(iter(coded.items()), ("bf16", dense))
    program = programs.get(kind) or build(dense)
    makers: dict[str, tuple[str, Callable[[str], Decoder]]] = {
        "tinygemm": (
            "tinygemm W4, same runner", lambda name: ours(name, model, program, batch, other=tinygemm)
        ),
        "eager": ("HF eager bf16", lambda name: transformers(name, dense, batch, False, 8)),
        "gemlite": (
            "GemLite W4, same runner and head",
            lambda name: ours(name, model, program, batch, other=gemlite),
        ),
        "torchao": ("torchao int4, compiled", lambda name: compiled(name, shape, batch, compiled_llama.int4)),
        "compiled": ("bf16, compiled", lambda name: compiled(name, shape, batch, None)),
        "hf": ("HF compiled bf16", lambda name: transformers(name, dense, batch, True, NEW)),
    }
    soon: list[Decoder] = []
    for peer, (name, maker) in makers.items():
        if peer not in wanted:
            continue
        found = attempt(name, partial(maker, name))
        if peer in ("tinygemm", "eager"):
            soon += found
        else:
            _write(batch, mine, [*soon, *found], coded, dense, shape, options, limit)
            soon = []
    if soon:
        _write(batch, mine, soon, coded, dense, shape, options, limit)


def _write(
    batch: int, mine: Sequence[Decoder], peers: Sequence[Decoder], coded: dict[str, Any], dense: Any,
    shape: dict[str, Any], options: Namespace, limit: tuple[float, float],
) -> None:  # fmt: skip
    times = milliseconds([*mine, *peers], options.rounds)
    rows: list[Row] = []
    for each in mine:
        took = times[each.name]
        print(f"batch {batch}, {each.name}: {took:.3f} ms, {batch / took * 1e3:.0f} tokens/s", flush=True)
        for peer in (*peers, *mine[-1:]):
            rows.append({
                "goal": "3 bits" if each.name in WITH_OUTLIERS else "G14" if batch == 1 else "G15",
                "job": each.name, "batch": batch, "peer": peer.name,
                "milliseconds": round(took, 4), "tokens_per_second": round(batch / took * 1e3, 1),
                "peer_milliseconds": round(times[peer.name], 4), "ratio": round(times[peer.name] / took, 3),
                "fraction_of_limit": round(each.nbytes / limit[0] / took / 1e3, 3),
                "fraction_of_read": round(each.nbytes / limit[1] / took / 1e3, 3), "max_rel_error": each.error,
                "bits_per_weight": _bits(coded.get(each.name, dense)),
                "note": f"{shape['num_hidden_layers']} layers, {PROMPT} tokens before, {NEW} written; "
                f"copy {limit[0] / 1e6:.2f} TB/s, read {limit[1] / 1e6:.2f} TB/s",
            })  # fmt: skip
            print(f"  {rows[-1]['ratio']}x {peer.name}, {rows[-1]['fraction_of_limit']} of limit", flush=True)
    write(options, rows, KEY)


def _bits(model: Any) -> float:
    """Stored bits of a weight of the linear layers."""
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    total = sum(
        each.byte_count().total if isinstance(each, CompressedLinear) else each.weight.numel() * each.weight.itemsize
        for each in linears
    )
    return round(8 * total / sum(each.out_features * each.in_features for each in linears), 3)


if __name__ == "__main__":
    main()
