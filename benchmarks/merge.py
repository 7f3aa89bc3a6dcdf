"""Puts rows that were measured elsewhere into a result file here.

    python benchmarks/merge.py MEASURED.json docs/results/DEVICE/weight_accuracy.json

A row takes the place of the one it repeats: for weight_accuracy that of the same model, job, seed, protocol and
calibration. Both files have to be of one device and the same versions.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness import merge, read


def main() -> None:
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        raise SystemExit(__doc__)
    merge(Path(sys.argv[2]), read(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
