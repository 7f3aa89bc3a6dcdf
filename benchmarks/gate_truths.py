"""What gates should learn: those of ``seer_attention`` trained by each truth on the same texts, beside oracles that
choose by them and plans that learn nothing. Other options, and rows, are those of ``attention_accuracy.py``."""

from __future__ import annotations

from collections.abc import Sequence

from attention_accuracy import main as measure
from harness import arguments

PLANS = ("oracle", "oracle by greatest", "untrained gate", "sparge", "xattention", "sink_local")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--truths", nargs="+", default=["both", "mass", "max"])
    options, rest = parser.parse_known_args(argv)
    given = [*rest, "--parts", "prefill", "choice", "retrieval", "--decoded-sessions", "0"]
    given += ["--json", str(options.json)] if options.json else []
    given += ["--quick"] if options.quick else []
    for truth in options.truths:
        measure([*given, "--plans", "seer_attention", "--truth", truth])
    measure([*given, "--plans", *PLANS])


if __name__ == "__main__":
    main()
