"""Who ``rarefy bench`` runs against: the decode runner, Transformers eager and compiled, llama.cpp; all greedy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from rarefy.core.errors import OptionError, SourceError, UnsupportedError
from rarefy.core.memory import peak_bytes, reset_peak
from rarefy.decoding.native import Mode
from rarefy.decoding.runner import Runner
from rarefy.evaluation.forward import cache_argument
from rarefy.evaluation.speed import Decoder
from rarefy.layers.linear import CompressedLinear

D = TypeVar("D", bound=Decoder)

PEERS = ("hf-eager", "hf-compiled", "llama.cpp")


class RunnerDecoder:
    """The decode runner; every prompt is read anew."""

    def __init__(self, model: Any, mode: Mode):
        self.model, self.runner = model, Runner(model, mode=mode)
        self.name, self.executor = "rarefy", self.runner.name
        self.step_bytes = step_bytes(model)
        self.memory_bytes: int | None = None

    @torch.inference_mode()
    def start(self, tokens: Sequence[int]) -> int:
        self.runner.crop(0)
        return int(self.runner.start(torch.tensor(tokens)).argmax())

    @torch.inference_mode()
    def write(self, token: int, count: int) -> list[int]:
        if self.runner.writes:
            return self.runner.write(token, count)
        return _one_by_one(lambda last: int(self.runner.extend(torch.tensor([last])).argmax()), token, count)


class TransformersDecoder:
    """The model's own forward with a cache: growing when ``eager``, of fixed size when compiled."""

    def __init__(self, model: Any, compiled: bool, length: int):
        self.name = "hf-compiled" if compiled else "hf-eager"
        self.executor = f"torch {str(model.dtype).removeprefix('torch.')}"
        self.step_bytes = step_bytes(model)
        self.memory_bytes: int | None = None
        self.model, self.length, self.compiled = model, length, compiled
        self.forward = torch.compile(model.forward) if compiled else model.forward
        self.cache_name = cache_argument(model.forward)
        self.cache: Any = None

    @torch.inference_mode()
    def start(self, tokens: Sequence[int]) -> int:
        from transformers import DynamicCache, StaticCache

        if self.compiled:
            self.cache = self.cache or StaticCache(config=self.model.config, max_cache_len=self.length)
            self.cache.reset()
        else:
            self.cache = DynamicCache(config=self.model.config)
        return self._next(self.model.forward, list(tokens))

    @torch.inference_mode()
    def write(self, token: int, count: int) -> list[int]:
        return _one_by_one(lambda last: self._next(self.forward, [last]), token, count)

    def _next(self, forward: Callable[..., Any], tokens: list[int]) -> int:
        given = {self.cache_name: self.cache, "logits_to_keep": 1}
        ids = torch.tensor([tokens], device=self.model.device)
        return int(forward(input_ids=ids, use_cache=True, **given).logits[0, -1].argmax())


class LlamaCppDecoder:
    """A GGUF file through llama-cpp-python. Raises OptionError, SourceError."""

    def __init__(self, path: Path, length: int):
        try:
            import llama_cpp
        except ImportError:
            raise OptionError("--against llama.cpp needs llama-cpp-python; run: pip install llama-cpp-python") from None
        from rarefy.sources.gguf_header import read_gguf

        tensors = read_gguf(path).tensors
        if "output.weight" in tensors:  # else the embedding is the head
            tensors = {name: tensor for name, tensor in tensors.items() if name != "token_embd.weight"}
        self.name, self.executor = "llama.cpp", path.stem
        self.step_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.memory_bytes: int | None = None
        self.library = llama_cpp
        threads = torch.get_num_threads()
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=length, n_threads=threads, n_threads_batch=threads, n_batch=length, verbose=False
        )

    def start(self, tokens: Sequence[int]) -> int:
        self.llama.reset()
        self.llama.eval(list(tokens))
        return self._best()

    def write(self, token: int, count: int) -> list[int]:
        return _one_by_one(self._next, token, count)

    def _next(self, token: int) -> int:
        self.llama.eval([token])
        return self._best()

    def _best(self) -> int:
        import numpy as np

        logits = self.library.llama_get_logits_ith(self.llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).argmax())


def parse_peer(text: str, own: str) -> tuple[str, str]:
    """Peer and model that ``--against`` names, ``PEER`` or ``PEER=MODEL``; without a model it is ``own``.

    Raises OptionError for a peer that is unknown or cannot read the model, SourceError when a GGUF file is not there.
    """
    peer, _, model = text.partition("=")
    if peer not in PEERS:
        raise OptionError(f"--against '{text}' is unknown; use {', '.join(PEERS)}, each as PEER or PEER=MODEL.")
    model = model or own
    if peer == "llama.cpp" and not model.endswith(".gguf"):
        raise OptionError("--against llama.cpp needs a GGUF file; write --against llama.cpp=FILE.gguf.")
    if peer == "llama.cpp" and not Path(model).is_file():
        raise SourceError(f"'{model}' is not there; name a GGUF file.")
    return peer, model


def open_peer(peer: str, model: str, length: int, load: Callable[[str], Any], device: torch.device) -> Decoder:
    """A ``peer`` with a ``model`` that ``load`` puts on ``device``, for sequences of ``length`` tokens (llama.cpp: on
    the CPU). Raises OptionError."""
    if peer == "llama.cpp":
        return _with_memory(lambda: LlamaCppDecoder(Path(model), length), torch.device("cpu"))
    return _with_memory(lambda: TransformersDecoder(load(model), peer == "hf-compiled", length), device)


def open_runner(
    model: str, mode: Mode, load: Callable[[str], Any], device: torch.device
) -> RunnerDecoder | TransformersDecoder:
    """The decode runner of ``model``; where it has none, Transformers under the name rarefy, which says so."""

    def build() -> RunnerDecoder | TransformersDecoder:
        loaded = load(model)
        try:
            return RunnerDecoder(loaded, mode)
        except UnsupportedError as reason:
            peer = TransformersDecoder(loaded, False, 0)
            peer.name, peer.executor = "rarefy", f"transformers ({reason})"
            return peer

    return _with_memory(build, device)


def step_bytes(model: Any) -> int:
    """Bytes of weights that a token reads: everything but embeddings, of which it takes one row, unless tied to the
    head."""
    head = model.get_output_embeddings()
    total = 0
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            total += module.byte_count().total
        elif not isinstance(module, torch.nn.Embedding) or (head is not None and head.weight is module.weight):
            total += sum(own.numel() * own.element_size() for own in module.parameters(recurse=False))
    if head is not None and model.get_input_embeddings().weight is head.weight:
        total -= head.weight.numel() * head.weight.element_size()  # counted for both
    return total


def _one_by_one(following: Callable[[int], int], token: int, count: int) -> list[int]:
    """``count`` tokens, each ``following`` the one before."""
    written: list[int] = []
    for _ in range(count):
        token = following(token)
        written.append(token)
    return written


def _with_memory(build: Callable[[], D], device: torch.device) -> D:
    """What ``build`` makes, having read a few tokens, with how far that took this process's resident size, or its
    memory on a GPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()
    before = torch.cuda.memory_allocated(device) if on_gpu else _resident_bytes()
    decoder = build()
    token = decoder.start([1, 2, 3, 4])
    decoder.write(token, 1)
    if before is not None:
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_bytes()
        decoder.memory_bytes = max(peak - before, 0)
    return decoder


def _resident_bytes() -> int | None:
    """Resident size of this process, or None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
