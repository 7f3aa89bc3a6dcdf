"""``rarefy demo``: the whole job on a real model and real text, in a few minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.common import Json, bits_line, command, print_json, say, shell_line

if TYPE_CHECKING:
    from rarefy.calibration.report import CompressionReport
    from rarefy.evaluation.results import Comparison

PROMPT = "Explain in two sentences why the sky is blue."
PLANS: dict[str, dict[str, Any]] = {
    "int4": {"num_bits": 4, "group_size": 64},
    "int3": {"num_bits": 3, "group_size": 64},
}


@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the compressed models.")] = Path("rarefy-demo"),
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the sample.")] = 32,
    as_json: Json = False,
) -> None:
    """Compress SmolLM2-135M-Instruct to 4 and 3 bits, measure both against the dense model, and let one speak."""
    import torch

    from rarefy import api
    from rarefy.cli.chat import answer
    from rarefy.cli.evaluate import print_comparison
    from rarefy.sources.texts import open_text

    start = time.monotonic()
    source = api.open_model("demo")
    open_text("demo", "evaluation")  # what is absent is said now, not when the models are made
    reports = {}
    for label, options in PLANS.items():
        _refuse_foreign(out / label)
        say(f"compressing to {label} ...")
        reports[label] = api.compress("demo", "rtn", options=options, out=out / label, overwrite=True)
    result = api.compare([str(out / label) for label in PLANS], reference="demo", context=context, windows=windows)

    say("compressing in memory, to compare with what was stored and loaded ...")
    tokenizer = api.load_tokenizer(str(out / "int4"))
    loaded: Any = api.load(str(out / "int4"))
    fresh: Any = api.load("demo")
    api.compress(fresh, "rtn", options=PLANS["int4"])
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        same = torch.equal(loaded(tokens).logits, fresh(tokens).logits)
    del fresh
    page = _write_report(result, list(reports.values()), source.note, out)
    reply, count, seconds = answer(loaded, tokenizer, [{"role": "user", "content": PROMPT}], max_new_tokens, True)

    if as_json:
        print_json(
            {
                "model": source.name,
                "note": source.note,
                **result.model_dump(),
                "compressions": {label: report.model_dump(exclude={"layers"}) for label, report in reports.items()},
                "reloaded_logits_identical": same,
                "prompt": PROMPT,
                "reply": reply,
                "report": None if page is None else str(page),
                "seconds": time.monotonic() - start,
            }
        )
    else:
        print_comparison(result)
        for label, report in reports.items():
            print(f"{label}: bits/weight {bits_line(report.bits_per_weight)}, compressed in {report.seconds:.1f} s")
        print(f"{source.note}")
        print(f"stored, loaded and in-memory int4 models give {'identical' if same else 'DIFFERENT'} logits")
        print(f"\n> {PROMPT}\n{reply} ...")
        print(f"\n({count} tokens in {seconds:.1f} s; the whole demo took {time.monotonic() - start:.0f} s)")
        print(f"Try: {shell_line('chat', str(out / 'int4'))}")
        if page is not None:
            print(f"All of this, with pictures: {page} (open it in a browser)")
    if not same:
        raise typer.Exit(1)


def _write_report(result: Comparison, reports: list[CompressionReport], note: str, out: Path) -> Path | None:
    """The page on what was measured; None, and a line that says why, where nothing can draw it."""
    from rarefy.core.environment import this_run
    from rarefy.core.errors import UnsupportedError
    from rarefy.reporting.findings import Findings

    run = this_run(shell_line(*sys.argv[1:]))
    findings = Findings(comparisons=(result,), compressions=tuple(reports), runs=(run,), notes=(note,))
    try:
        from rarefy.reporting.page import write_report
    except UnsupportedError as failure:
        say(f"no report: {failure}")
        return None
    return write_report(findings, out / "report.html")[0]


def _refuse_foreign(folder: Path) -> None:
    """The demo overwrites its own folders and nobody else's."""
    from rarefy.core.errors import OptionError
    from rarefy.integrations.transformers.models import is_compressed

    if folder.is_dir() and any(folder.iterdir()) and not ((folder / "config.json").is_file() and is_compressed(folder)):
        raise OptionError(f"'{folder}' holds something else; name another folder with --out.")
