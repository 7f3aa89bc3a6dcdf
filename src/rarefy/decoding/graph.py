"""The CUDA executor: a program's step as one CUDA graph, replayed for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding import interpreter
from rarefy.decoding.cache import FLOAT8, Kept, KeyValues, Sequences
from rarefy.decoding.fuse import AddNorm, Attention, Projects, fuse
from rarefy.decoding.link import After, Linked, Step, link
from rarefy.decoding.products import Together
from rarefy.decoding.program import Add, Cap, Embed, Gate, Norm, Program, Rotate
from rarefy.decoding.sampling import Sampling
from rarefy.kernels.cuda import attend_token, status
from rarefy.kernels.cuda.linear import Beside, can_end, product_with_ending
from rarefy.kernels.cuda.prepared import Prepared
from rarefy.kernels.cuda.program import Ending as EndOfProduct
from rarefy.kernels.triton import step
from rarefy.kernels.triton.pick import Picker

SQUARES = " squares"  # of what is to be divided, beside its name
WRITTEN = 1024  # tokens that are remembered on the GPU
KEPT = 8  # numbers of sequences whose steps stay captured
MOST_LINKED = 8  # sequences for which it pays to link products: an ending costs more the more tokens there are
# How a step ends: with its logits, or by picking tokens: (draw, of the top k, of the top p).
Ending: TypeAlias = tuple[bool, bool, bool] | None


@dataclass
class _Step:
    """One token of each of M sequences: what the graph reads and writes, and the graphs by how they end."""

    tokens: Tensor
    positions: Tensor
    attend: step.Attention | attend_token.Attention
    pick: Picker
    place: tuple[int, ...] = ()  # of the cache that the graphs read
    graphs: dict[Ending, tuple[Callable[[], None], Tensor]] = field(default_factory=dict)


class GraphExecutor:
    """Runs ``program`` on its model's GPU in the model's dtype.

    A step of one token for each sequence is captured once for each number of sequences and each place of the cache,
    and kept for the last place of the `KEPT` numbers that were last in use; longer chunks of one sequence run launch by
    launch. Projections of the same input become one where their weights can lie together, which moves the weights but
    neither copies nor changes them. On the CPU nothing is captured and Triton's interpreter executes. Raises
    UnsupportedError for a program or tensors that the kernels do not take.
    """

    name = "cuda graph"
    chunk = 2048

    def __init__(self, program: Program):
        self.program = program
        self._whole, self._body, self._head = (fuse(part) for part in (program.operations, program.step, program.head))
        embed = self._whole[0]
        if not isinstance(embed, Embed) or not embed.table.weight.is_contiguous():
            raise UnsupportedError("The GPU's runner needs an embedding whose rows lie together.")
        self.device, self.dtype = embed.table.weight.device, embed.table.weight.dtype
        with torch.inference_mode(False), torch.no_grad():  # what weights become is theirs to keep
            self._products = {
                operation.parts[0].name: Together([part.linear for part in operation.parts])
                for operation in (*self._whole, *self._head)
                if isinstance(operation, Projects)
            }
        self._turns: dict[tuple[int, float, int], Tensor] = {}
        self._steps: dict[int, _Step] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool: Any = None

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of keys and values for a model of ``dtype``."""
        return dtype

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: KeyValues, *, every: bool = False) -> Tensor:
        """As ``interpreter.run``."""
        end = cache.length + len(tokens)
        cache.reserve(end)
        tokens = tokens.to(self.device)
        if len(tokens) == 1:
            logits = self._replay(cache.kept[:, None], tokens, [cache.length], None).clone()
        else:
            logits = self._chunk(tokens, cache.kept, cache.length, every)
        cache.length = end
        return logits

    @torch.inference_mode()
    def read(self, tokens: Tensor, cache: Sequences, number: int) -> Tensor:
        """Logits ``[1, vocabulary]`` after ``tokens`` [T] more of sequence ``number``."""
        start = cache.lengths[number]
        cache.reserve(start + len(tokens))
        logits = tokens
        for part in tokens.to(self.device).split(self.chunk):
            logits = self._chunk(part, cache.kept[:, number], cache.lengths[number], False)
            cache.lengths[number] += len(part)
        return logits

    @torch.inference_mode()
    def advance(self, tokens: Tensor, cache: Sequences) -> Tensor:
        """Logits ``[M, vocabulary]`` after one of ``tokens`` [M] more of each sequence; the next call overwrites
        them."""
        cache.reserve(max(cache.lengths) + 1)
        logits = self._replay(cache.kept, tokens, cache.lengths, None)
        cache.lengths = [length + 1 for length in cache.lengths]
        return logits

    @torch.inference_mode()
    def write(self, tokens: Tensor, cache: KeyValues, count: int, sampling: Sampling | None = None) -> Tensor:
        """The ``count`` tokens ``[M, count]`` that follow ``tokens`` [M], the last ones of each sequence of ``cache``,
        which it does not hold yet. All but the last of them are in the cache afterwards. Without ``sampling`` the most
        likely. Nothing waits for the host. Raises OptionError for less than one."""
        if count < 1:
            raise OptionError(f"{count} tokens cannot be written; ask for some.")
        parts = [tokens[:, None]]
        for start in range(0, count, WRITTEN):
            parts.append(self._write(parts[-1][:, -1], cache, min(WRITTEN, count - start), sampling))
        return torch.cat(parts[1:], 1)

    def _write(self, tokens: Tensor, cache: KeyValues, count: int, sampling: Sampling | None) -> Tensor:
        """As `write`, up to `WRITTEN` tokens."""
        many = isinstance(cache, Sequences)
        lengths = cache.lengths if isinstance(cache, Sequences) else [cache.length]
        cache.reserve(max(lengths) + count)
        kept = cache.kept if many else cache.kept[:, None]
        pick = self._step(kept).pick
        ending = (False, False, False)
        if sampling is not None:
            pick.settings.copy_(torch.tensor([1 / sampling.temperature, sampling.top_k, sampling.top_p]))
            pick.seed.fill_(sampling.seed)
            ending = (True, sampling.top_k > 0, sampling.top_p < 1)
        self._replay(kept, tokens, lengths, ending, count)
        if isinstance(cache, Sequences):
            cache.lengths = [length + count for length in lengths]
        else:
            cache.length += count
        at = torch.tensor(lengths, device=self.device)[:, None] + torch.arange(1, count + 1, device=self.device)
        return pick.written.gather(1, at % WRITTEN)

    def _replay(
        self, kept: Kept, tokens: Tensor, lengths: Sequence[int], ending: Ending, count: int = 1
    ) -> Tensor:
        """The logits of the last of ``count`` steps, each after the first on the token that the one before picked."""
        at = self._step(kept)
        started = torch.tensor(lengths, dtype=torch.int32).to(self.device)

        def begin() -> None:
            at.tokens.copy_(tokens)
            at.positions.copy_(started)

        if ending not in at.graphs:
            begin()  # what warms up writes where the next token will stand, and nowhere else
            at.graphs[ending] = self._capture(at, kept, ending)
        replay, logits = at.graphs[ending]
        begin()
        for _ in range(count):
            replay()
        return logits

    def _step(self, kept: Kept) -> _Step:
        sequences, capacity = kept.keys.shape[1], kept.keys.shape[3]
        at = self._steps.pop(sequences, None)
        if at is None:
            if not self.keeps(kept.keys.dtype):
                raise UnsupportedError(f"No kernel here keeps keys and values of this model in {kept.keys.dtype}.")
            program, device = self.program, self.device
            at = _Step(
                torch.zeros(sequences, dtype=torch.int64, device=device),
                torch.zeros(sequences, dtype=torch.int32, device=device),
                self._attention()(sequences, program.heads, program.kv_heads, program.head_dim, device),
                Picker(sequences, program.vocabulary, WRITTEN, device),
            )
        self._steps[sequences] = at  # the last one
        for least in list(self._steps)[:-KEPT]:
            del self._steps[least]
        place = kept.keys.data_ptr(), kept.values.data_ptr(), capacity
        if at.place != place:
            at.place = place
            at.graphs.clear()
        return at

    def steps(self, sequences: int) -> tuple[Step, ...]:
        """What one more token of so many sequences launches, in this order."""

        def ends(product: Projects, after: After) -> bool:
            terms = self._terms(product)
            fits = not isinstance(after, AddNorm) or after.norm.weight.dtype == self.dtype
            return sequences <= MOST_LINKED and fits and terms is not None and can_end(terms, sequences, self.dtype)

        return link(self._whole, ends)

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether a step reads and writes a cache of ``dtype``."""
        fits = dtype == FLOAT8 and self._attention() is attend_token.Attention
        return dtype != FLOAT8 or (fits and attend_token.keeps_float8(self.device))

    def _attention(self) -> type[step.Attention] | type[attend_token.Attention]:
        """The kernel that reads heads like the program's."""
        program = self.program
        norms = [norm for each in self._whole if isinstance(each, Attention) for norm in (each.q_norm, each.k_norm)]
        fits = attend_token.fits(self.dtype, program.heads, program.kv_heads, program.head_dim)
        if fits and status() == "cuda" and all(norm is None or norm.weight.dtype == self.dtype for norm in norms):
            return attend_token.Attention
        return step.Attention

    def _capture(self, at: _Step, kept: Kept, ending: Ending) -> tuple[Callable[[], None], Tensor]:
        """What runs the step once more, and the logits that it leaves."""

        def attend(operation: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own, heads = kept[operation.attend.layer], self._heads(operation, kept.keys.shape[3])
            if isinstance(at.attend, step.Attention):
                return at.attend(q, k, v, own.keys, own.values, at.positions, heads)
            return at.attend(q, k, v, own.keys, own.values, at.positions, heads, own.steps)

        operations = self.steps(len(at.tokens))

        def run() -> Tensor:
            buffers = {"tokens": at.tokens}
            self._execute(operations, buffers, attend)
            logits = buffers["logits"]
            if ending is not None:
                draw, top_k, top_p = ending
                at.pick(logits, at.tokens, at.positions, draw=draw, top_k=top_k, top_p=top_p)
            return logits

        if self._stream is None:
            logits = kept.keys.new_empty(len(at.tokens), self.program.vocabulary, dtype=self.dtype)

            def again() -> None:
                logits.copy_(run())

            return again, logits
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = run()
        return graph.replay, logits

    def _chunk(self, tokens: Tensor, kept: Kept, start: int, every: bool) -> Tensor:
        """As ``interpreter.run`` over what is ``kept [layers, kv_heads, capacity, head_dim]``."""

        def attend(operation: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own, heads = kept[operation.attend.layer], self._heads(operation, kept.keys.shape[2])
            if own.steps is None:
                q = step.place(q, k, v, own.keys, own.values, start, heads)
            else:
                fresh = q.new_empty(2, heads.heads, len(tokens), heads.channels)
                q = step.place(q, k, v, fresh[0], fresh[1], 0, replace(heads, turns=heads.turns[start:]))
                own.store(start, fresh[0], fresh[1])
            q = q.unflatten(-1, (self.program.heads, -1)).transpose(0, 1)
            return _mix(operation, q, *own.load(start + len(tokens), q.dtype)).transpose(0, 1).flatten(-2)

        buffers = {"tokens": tokens}
        self._execute(self._body, buffers, attend)
        if not every:
            buffers = {name: buffer[-1:] for name, buffer in buffers.items()}
        self._execute(self._head, buffers, attend)
        return buffers["logits"]

    def _terms(self, operation: Projects) -> Sequence[Prepared] | None:
        """What the kernels multiply by for ``operation``, if they do."""
        return self._products[operation.parts[0].name].terms

    def _execute(
        self, operations: Sequence[Step], at: dict[str, Tensor],
        attend: Callable[[Attention, Tensor, Tensor, Tensor], Tensor],
    ) -> None:  # fmt: skip
        for operation in operations:
            match operation:
                case Embed(out, table, scale):
                    at[out] = step.embed(at["tokens"], table.weight, scale)
                case AddNorm(norm, add, branch):
                    added = None if add is None else at[add.y]
                    at[norm.out] = step.add_norm(at[norm.x], _gain(norm), added, _gain(branch))
                case Projects(parts):
                    for part, made in zip(parts, self._products[parts[0].name](at[parts[0].x]), strict=True):
                        at[part.out] = made
                case Linked():
                    self._link(operation, at)
                case Attention():
                    q, k, v = (at[name] for name in (operation.attend.q, operation.attend.k, operation.attend.v))
                    at[operation.attend.out] = attend(operation, q, k, v)
                case Gate(gate, up, out, activation):
                    at[out] = step.gated(at[gate], at[up], activation)
                case Add(x, y):
                    at[x] = at[x] + at[y]
                case Cap(x, cap):
                    at[x] = cap * torch.tanh(at[x] / cap)

    def _link(self, operation: Linked, at: dict[str, Tensor]) -> None:
        product, normed, after = operation.product, operation.normed, operation.after
        terms = self._terms(product)
        assert terms is not None  # as ``link`` was told
        name = product.parts[0].x
        x, beside = at[name], Beside() if normed is None else Beside(at[name + SQUARES], normed.eps)
        match after:
            case Gate(_, _, out, activation):
                ending = EndOfProduct(normed is not None, "gated", activation)
                at[out], _ = product_with_ending(x, terms, ending, beside)
            case AddNorm(norm, Add(hidden, _), _):
                ending = EndOfProduct(normed is not None, "added", centred=norm.centred)
                beside = replace(beside, hidden=at[hidden], gain=norm.weight)
                at[norm.out], at[norm.out + SQUARES] = product_with_ending(x, terms, ending, beside)
            case _:
                made, _ = product_with_ending(x, terms, EndOfProduct(normed is not None), beside)
                rows = [part.linear.out_features for part in product.parts]
                at.update(zip([part.out for part in product.parts], made.split(rows, -1), strict=True))

    def _heads(self, operation: Attention, capacity: int) -> step.Heads:
        attend, program = operation.attend, self.program
        return step.Heads(
            program.heads, program.kv_heads, program.head_dim, attend.scale,
            self._turned(operation.q_rotate, capacity), attend.window, attend.softcap,
            _gain(operation.q_norm), _gain(operation.k_norm),
        )  # fmt: skip

    def _turned(self, rotate: Rotate, capacity: int) -> Tensor:
        """Cosines and sines ``[capacity, 2, head_dim / 2]``, kept as long as a graph may read them."""
        key = rotate.inv_freq.data_ptr(), rotate.scaling, capacity
        if key not in self._turns:
            self._turns[key] = torch.stack(interpreter.turns(rotate, 0, capacity, self.dtype), 1)
        return self._turns[key]


def _mix(operation: Attention, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``interpreter.mix`` without a mask where Torch has a kernel that needs none."""
    attend = operation.attend
    if attend.softcap is not None or (attend.window is not None and attend.window < keys.shape[1]):
        return interpreter.mix(attend, q, keys, values)
    whole = q.shape[1] == keys.shape[1]
    return F.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=None if whole else causal_lower_right(q.shape[1], keys.shape[1]),
        is_causal=whole, scale=attend.scale, enable_gqa=True,
    )[0]  # fmt: skip


@overload
def _gain(norm: Norm) -> step.Gain: ...
@overload
def _gain(norm: None) -> None: ...
@overload
def _gain(norm: Norm | None) -> step.Gain | None: ...
def _gain(norm: Norm | None) -> step.Gain | None:
    if norm is None:
        return None
    return step.Gain(norm.weight, norm.eps, step.CENTRED if norm.centred else step.PLAIN)
