"""A simulation: do codes of a KV cache still find one key among millions, where no model at hand reaches?

Keys are drawn (normal, with channels of unequal size, all of one length), not made by a model, so this says nothing
about the quality of one. Each query is one of the keys with noise, so much that some are hard to find even among exact
keys; it is found when no other key has a greater product with it, and ``rank`` counts those that do. Keys go through
the codec in pieces, of which nothing is kept, and come again from their seed, so that memory does not limit their
number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from harness import Row, arguments, write

from rarefy.integrations.transformers.kv_evaluation import parse_cache
from rarefy.integrations.transformers.kv_setup import kv_recipe
from rarefy.kv.codec import Codec, nbytes
from rarefy.kv.plan import HeadShape
from rarefy.recipes import discover

KEY = ("job", "peer", "keys", "channels")
CACHES = ("identity", "fp8", "kivi:num_bits=4", "kivi:num_bits=2", "turbo_quant")
PIECE = 1 << 16
NOISE = 0.7


class Keys:
    """``count`` keys of ``channels`` channels, made piece by piece, and queries that point at ``targets``."""

    def __init__(self, count: int, channels: int, queries: int, device: str, seed: int = 0):
        self.count, self.channels, self._device, self._seed = count, channels, device, seed
        dice = torch.Generator().manual_seed(seed)
        sizes = torch.exp(0.5 * torch.randn(channels, generator=dice))
        self._sizes = (sizes / sizes.square().mean().sqrt()).to(device)
        self.targets = torch.randperm(count, generator=dice)[:queries].sort().values.to(device)
        self.queries = torch.empty(queries, channels, device=device)
        for start, piece in self.pieces():
            inside = (self.targets >= start) & (self.targets < start + len(piece))
            self.queries[inside] = piece[self.targets[inside] - start]
        noise = torch.randn(queries, channels, generator=dice).to(device)
        self.queries += NOISE * noise * self._sizes

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The first index of every piece, and its keys ``[n, channels]``; the same each time."""
        for number, start in enumerate(range(0, self.count, PIECE)):
            dice = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + number + 1)
            size = min(PIECE, self.count - start)
            piece = torch.randn(size, self.channels, generator=dice, device=self._device) * self._sizes
            yield start, piece * (self.channels**0.5 / piece.norm(dim=1, keepdim=True))


def ranks(keys: Keys, codec: Codec | None) -> tuple[torch.Tensor, int, float, float]:
    """How many keys beat the right one for each query; bytes of all codes; seconds of coding and of scoring."""
    wanted = torch.empty(len(keys.targets), device=keys.queries.device)
    beaten = torch.zeros(len(keys.targets), dtype=torch.long, device=keys.queries.device)
    size, coding, scoring = 0, 0.0, 0.0
    for looking in (True, False):  # first for the scores of the right keys alone
        for start, piece in keys.pieces():
            inside = (keys.targets >= start) & (keys.targets < start + len(piece))
            if looking and not inside.any():
                continue
            begin = time.perf_counter()
            payload = None
            if codec is not None:
                whole = len(piece) // codec.tokens * codec.tokens
                payload = codec.encode(piece[:whole].view(1, 1, -1, codec.tokens, keys.channels))
            middle = time.perf_counter()
            scores = keys.queries @ piece.T
            if codec is not None and payload is not None:
                # What does not fill a block stays exact, as in a cache.
                scores[:, :whole] = codec.score(keys.queries[None, None], payload)[0, 0]
            if looking:
                wanted[inside] = scores[inside, keys.targets[inside] - start]
                continue
            beaten += (scores > wanted[:, None]).sum(1)
            coding, scoring = coding + middle - begin, scoring + time.perf_counter() - middle
            size += piece.nbytes if payload is None else nbytes(payload).total + piece[whole:].nbytes
    return beaten, size, coding, scoring


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--caches", nargs="+", default=list(CACHES))
    parser.add_argument("--keys", nargs="+", type=int, help="default: 1 and 10 million")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    discover()
    shape = HeadShape(heads=1, key_channels=options.channels, value_channels=options.channels, dtype=torch.float16)
    for count in options.keys or ([100_000] if options.quick else [1_000_000, 10_000_000]):
        keys = Keys(count, options.channels, options.queries, options.device)
        rows: list[Row] = []
        for cache in ("exact float32", *options.caches):
            codec = None
            if cache != "exact float32":
                name, given = parse_cache(cache)
                codec = kv_recipe(name, given).codecs(shape, {}).keys
            found, size, coding, scoring = ranks(keys, codec)
            rows.append(
                {
                    "goal": "R9", "job": "simulated retrieval", "peer": cache, "keys": count,
                    "channels": options.channels, "found": float((found == 0).float().mean()),
                    "found_among_ten": float((found < 10).float().mean()), "rank": statistics.median(found.tolist()),
                    "bits_per_number": 8 * size / count / options.channels, "bytes": size,
                    "coding_seconds": round(coding, 3), "scoring_seconds": round(scoring, 3),
                    "note": "simulation: drawn keys, no model",
                }
            )  # fmt: skip
        write(options, rows, KEY)


if __name__ == "__main__":
    main()
