"""``rarefy tune``: kernels of a compressed model, fitted to the GPU at hand."""

from __future__ import annotations

from typing import Annotated

import typer

from rarefy.cli.common import Json, Revision, command, print_json, print_table


@command
def tune(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a compressed model.")],
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to tune for.")] = "1,8,16,32,64,128",
    most: Annotated[int, typer.Option(min=1, help="Ways to cut the work up that are tried for each.")] = 64,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Try ways to cut the work up on this GPU and keep the fastest in rarefy's cache, where kernels find them."""
    import torch

    from rarefy.core.errors import OptionError
    from rarefy.integrations.transformers.models import load_folder
    from rarefy.kernels.cuda import tuning
    from rarefy.layers.tuning import tune as tune_layers
    from rarefy.sources.models import open_model

    if not torch.cuda.is_available():
        raise OptionError("rarefy tune needs a CUDA GPU, and torch finds none.")
    try:
        counts = sorted({int(each) for each in tokens.split(",")})
    except ValueError:
        raise OptionError(f"--tokens is '{tokens}'; give whole numbers with commas between them.") from None
    if counts[0] < 1 or counts[-1] > tuning.BUCKETS[-1]:
        raise OptionError(f"--tokens go from 1 to {tuning.BUCKETS[-1]}; beyond, weights are dequantized.")
    loaded = load_folder(open_model(model, revision).folder, dtype=torch.bfloat16)
    torch.nn.Module.cuda(loaded)
    entries = tune_layers(loaded, counts, torch.bfloat16, most)
    path = tuning.keep(entries, torch.device("cuda", 0))
    if as_json:
        print_json({"path": str(path), "entries": entries})
        return
    rows = [
        (str(each["bits"]), f"{each['rows']}x{each['columns']}", str(each["tokens"]), f"{each['microseconds']:.1f}")
        for each in entries
    ]
    print_table(("bits", "shape", "tokens", "us"), rows)
    print(f"kept in {path}")
