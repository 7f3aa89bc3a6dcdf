"""``rarefy bench``: how fast a model writes, beside others in the same process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rarefy.cli.common import Device, Json, Revision, command, print_record, print_table, say

if TYPE_CHECKING:
    from rarefy.evaluation.speed import SpeedComparison


@command
def bench(
    model: Annotated[str | None, typer.Argument(help="Folder, hub id, .gguf file, or 'demo'.")] = None,
    matrix: Annotated[
        Path | None, typer.Option(help="YAML of models, caches and loads to measure through Transformers instead.")
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="With --matrix: keep finished rows here, so that the same command goes on.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Peer to run beside it, as PEER or PEER=MODEL: hf-eager, hf-compiled, llama.cpp=FILE.gguf."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=4, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written after it.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; everybody has a turn.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every one of them.")] = 1,
    device: Device = "auto",
    executor: Annotated[str, typer.Option(help="exact, or fast (may quantize activations).")] = "fast",
    dtype: Annotated[str, typer.Option(help="Of dense tensors: auto, float32, bfloat16 or float16.")] = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode: tokens a second, time to the first, memory, share of its bandwidth."""
    from rarefy.core.errors import OptionError

    if (model is None) == (matrix is None):
        raise OptionError("Name a model, or a file of many with --matrix; one of the two.")
    if matrix is not None:
        from rarefy.cli.bench_matrix import bench_matrix

        bench_matrix(matrix, work_dir, as_json)
        return
    assert model is not None
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise OptionError(f"--dtype '{dtype}' is unknown; use auto, float32, bfloat16 or float16.")
    if executor not in ("exact", "fast"):
        raise OptionError(f"--executor '{executor}' is unknown; use exact or fast.")
    mode: Literal["exact", "fast"] = "fast" if executor == "fast" else "exact"
    import torch

    from rarefy import api
    from rarefy.core.devices import device_of
    from rarefy.evaluation.speed import gpu_read_bandwidth, measure
    from rarefy.integrations.peers import open_peer, open_runner, parse_peer
    from rarefy.layers.execution import in_torch

    peers = [parse_peer(text, model) for text in against or ()]
    torch.set_num_threads(threads)
    place = device_of(device)

    def load(name: str) -> Any:
        loaded: Any = api.load(name, dtype=dtype, revision=revision if name == model else None)
        _check(name, loaded, prompt_tokens + new_tokens)
        return loaded.to(place)

    own = open_runner(model, mode, load, place)
    if own.executor.startswith("transformers"):
        say(f"note: 'rarefy' is measured through {own.executor}")
    length = prompt_tokens + new_tokens
    decoders = [own, *(open_peer(peer, name, length, load, place) for peer, name in peers)]
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 90, (prompt_tokens,), generator=draw).tolist()
    read = gpu_read_bandwidth if place.type == "cuda" else None
    result = measure(decoders, prompt, new_tokens, rounds, read=read)
    if place.type == "cuda" and own.model.dtype == torch.float32:
        say("note: activations of 32 bits are multiplied by torch; kernels of codes take --dtype bfloat16")
    for reason, count in Counter(in_torch(own.model).values()).items():
        say(f"note: {count} terms of weights are computed by torch, since no kernel here reads {reason}")
    if as_json:
        print_record("speed", {"model": model, **result.model_dump()})
    else:
        print_speeds(result)


def print_speeds(result: SpeedComparison) -> None:
    """A row for each decoder, the measured one first."""
    rows = [
        (
            f"{row.name} ({row.executor})",
            f"{row.prefill_tokens_per_second:.1f}",
            f"{row.decode_tokens_per_second:.1f}",
            f"{row.first_token_seconds * 1e3:.0f}",
            f"{row.prefill_ratio:.2f}",
            f"{row.decode_ratio:.2f}",
            f"{row.step_bytes / 1e6:.1f}",
            f"{row.fraction_of_read:.0%}",
            "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f}",
        )
        for row in result.rows
    ]
    print_table(
        (
            "who", "prefill tokens/s", "decode tokens/s", "first token ms", "prefill ratio", "decode ratio",
            "MB a token", "of read", "memory MB",
        ),
        rows,
    )  # fmt: skip
    print(
        f"{result.prompt_tokens} tokens read, {result.new_tokens} written, median of {result.rounds} rounds, "
        f"{result.threads} thread(s); memory is read at {result.read_bytes_per_second / 1e9:.1f} GB/s; "
        "ratio = its time / time of the first row"
    )


def _check(name: str, model: Any, length: int) -> None:
    from rarefy.core.errors import OptionError, UnsupportedError

    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedError(f"'{name}' is a {type(model).__name__}, which writes no text; name one that does.")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise OptionError(f"{length} tokens do not fit the {limit} positions of '{name}'; lower --prompt-tokens.")
