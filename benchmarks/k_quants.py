"""llama.cpp's k-quants as an outside reference: perplexity and KL at the bits that they take.

llama.cpp itself quantizes the model (written as F16), and what it stored is put back into the model's linear layers as
float32 numbers. So the judge is that of weight_accuracy.py, and so are the text, the windows and what is compressed:
embeddings and head stay as they are. Bits are those of the linear layers' stored bytes; where a width is no multiple of
256 llama.cpp falls back to other types, and the bits and the note say so.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf_peer
import torch
from harness import Row, arguments, write
from subjects import about, evaluation_windows, open_subject

import rarefy
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.runner import evaluate
from rarefy.sources.gguf_header import read_gguf

KEY = ("model", "job", "seed", "protocol", "calibration")
KINDS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")


def quantized(model: Any, folder: Path, source: Path, kind: str, work: Path) -> tuple[float, str]:
    """Put what llama.cpp makes of the linear layers in ``source`` into ``model``; bits per weight, and the types."""
    out = work / f"{kind}.gguf"
    gguf_peer.quantize(source, out, kind)
    file = read_gguf(out)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    stored, weights, types = 0, 0, Counter[str]()
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            own = gguf_peer.stored_name(f"{name}.weight")
            values, count = file.read(own), heads.get(name.rpartition(".")[2])
            module.weight.data.copy_(values if count is None else gguf_peer.halved(values, count))
            stored += file.tensors[own].nbytes
            weights += values.numel()
            types[file.tensors[own].type] += 1
    out.unlink()
    return 8 * stored / weights, ", ".join(f"{count} {name}" for name, count in types.items())


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="demo", help="demo, or the folder of a Llama")
    parser.add_argument("--text", nargs="+", default=["demo"], help="text files to measure on, or 'demo'")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=0, help="of each text, from its start; 0: the whole text")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="llama.cpp's names of what to quantize to")
    options = parser.parse_args()
    folder, dense_bits = open_subject(options.model, 0)
    tokenizer = rarefy.load_tokenizer(str(folder))
    protocol = Protocol(context=options.context, windows=options.windows or None, dtype="float32")
    tokens, protocol = evaluation_windows(options.text, tokenizer, protocol)
    facts: dict[str, tuple[float, str | None]] = {"dense": (float(dense_bits), None)}
    with TemporaryDirectory() as scratch:
        work = Path(scratch)
        gguf_peer.write_f16_without_words(folder, work / "f16.gguf")

        def candidate(kind: str | None) -> Candidate:
            def open_it() -> Any:
                model: Any = rarefy.load(folder, dtype="float32")
                if kind is not None:
                    facts[f"llama.cpp {kind}"] = quantized(model, folder, work / "f16.gguf", kind, work)
                return model

            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            return Candidate("dense" if kind is None else f"llama.cpp {kind}", load=open_it, resident_bytes=size)

        kinds = options.kinds[:2] if options.quick else options.kinds
        result = evaluate([candidate(kind) for kind in kinds], tokens, protocol, reference=candidate(None))
    rows: list[Row] = []
    for evaluation in [result.reference, *result.candidates]:
        assert evaluation is not None
        bits, types = facts[evaluation.model]
        rows.append({
            "model": about(options.model), "seed": 0, "job": evaluation.model, "bits_per_weight": round(bits, 4),
            "relative_error": None, "perplexity": round(evaluation.perplexity, 4),
            "kl": None if evaluation.kl is None else round(evaluation.kl, 5),
            "top1_agreement": None if evaluation.top1_agreement is None else round(evaluation.top1_agreement, 5),
            "tokens": evaluation.tokens, "protocol": evaluation.protocol.describe(), "calibration": None,
            "note": types,
        })  # fmt: skip
        shown = ("job", "bits_per_weight", "perplexity", "kl")
        print(" ".join(f"{name}={rows[-1][name]}" for name in shown), file=sys.stderr)
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
