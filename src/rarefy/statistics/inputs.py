"""Moments of a layer's inputs. Stacked experts have leading members, each with the tokens that were routed to it."""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise

import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.statistics.base import Statistic

# Tokens multiplied at once: bounds the 32-bit copy of 16-bit inputs, and with it the error of each partial sum.
CHUNK_TOKENS = 1 << 14


# Columns of a part, at least, of a product of which only half is computed, part by part; and the most parts.
SPLIT, MOST_PARTS = {"cpu": 384, "cuda": 2048}, 4


class InputStatistic(Statistic):
    """Sums over the tokens ``x [tokens, columns]`` that reach a layer; ``members`` is its number of stacked experts."""

    def __init__(self, columns: int, members: int | None = None, device: torch.device | str = "cpu"):
        self.columns, self.members, self.device = columns, members, torch.device(device)
        self.tokens = self._zeros((), torch.int64)

    def update(self, x: Tensor, member: int | None = None) -> None:
        """Add ``x [tokens, columns]``, in any floating dtype, for expert ``member``."""
        self._at(self.tokens, member).add_(x.shape[0])
        for piece in x.detach().split(CHUNK_TOKENS):
            self._add(piece, member)

    def unseen(self) -> Tensor:
        return self.tokens == 0

    @abstractmethod
    def _add(self, x: Tensor, member: int | None) -> None: ...

    def check(self) -> None:
        """Raise FormatError when an input was NaN or infinite."""
        for tensor in self.sums().values():
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(
                    "its inputs are NaN or infinite on the calibration data; repair the model or calibrate in float32"
                )

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        lead = () if self.members is None else (self.members,)
        return torch.zeros((*lead, *shape), dtype=dtype, device=self.device)

    @staticmethod
    def _at(tensor: Tensor, member: int | None) -> Tensor:
        return tensor if member is None else tensor[member]


class Gram(InputStatistic):
    """``sum of x xT`` over tokens, float32 ``[columns, columns]``: the Hessian of a layer's squared output error up to
    a factor (GPTQ, Frantar et al. 2022, section 3)."""

    def __init__(self, columns: int, members: int | None = None, device: torch.device | str = "cpu"):
        super().__init__(columns, members, device)
        self._sum = self._zeros((columns, columns), torch.float32)
        self._parts = _parts(columns, SPLIT["cuda" if self._sum.is_cuda else "cpu"])
        self._half = False  # whether what lies below the parts on the diagonal has still to be copied from above

    @property
    def sum(self) -> Tensor:
        """The sum itself, not a copy."""
        if self._half:
            for index, left in enumerate(self._parts):
                for right in self._parts[index + 1 :]:
                    self._sum[..., right, left] = self._sum[..., left, right].mT
            self._half = False
        return self._sum

    @sum.setter
    def sum(self, value: Tensor) -> None:
        self._sum, self._half = value, False

    def _add(self, x: Tensor, member: int | None) -> None:
        target = self._at(self._sum, member)
        # Products of 16-bit numbers are exact in 32 bits, and tensor cores sum them there.
        exact = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        x = x if exact else x.to(torch.float32)
        for index, left in enumerate(self._parts):
            for right in self._parts[index:]:
                if exact:
                    target[left, right] += torch.mm(x[:, left].T, x[:, right], out_dtype=torch.float32)
                else:
                    target[left, right].addmm_(x[:, left].T, x[:, right])
        self._half = len(self._parts) > 1

    def sums(self) -> dict[str, Tensor]:
        return {"gram": self.sum, "tokens": self.tokens}

    def assume_uniform_(self) -> None:
        self.sum[self.unseen()] = torch.eye(self.columns, device=self.device)

    def mean(self) -> Tensor:
        """``sum / tokens``; where no token came, ``sum``."""
        return self.sum / self.tokens.clamp(min=1)[..., None, None]


class ColumnMoments(InputStatistic):
    """Sums of ``|x|`` and ``x ** 2`` per column, float64 ``[columns]``."""

    def __init__(self, columns: int, members: int | None = None, device: torch.device | str = "cpu"):
        super().__init__(columns, members, device)
        self.absolute = self._zeros((columns,), torch.float64)
        self.square = self._zeros((columns,), torch.float64)

    def _add(self, x: Tensor, member: int | None) -> None:
        wide = x.to(torch.float32)
        self._at(self.absolute, member).add_(wide.abs().sum(0, dtype=torch.float64))
        self._at(self.square, member).add_(wide.square().sum(0, dtype=torch.float64))

    def sums(self) -> dict[str, Tensor]:
        return {"absolute": self.absolute, "square": self.square, "tokens": self.tokens}

    def assume_uniform_(self) -> None:
        for tensor in (self.absolute, self.square):
            tensor[self.unseen()] = 1

    def mean_absolute(self) -> Tensor:
        """Mean ``|x|``, float32 ``[columns]``."""
        return (self.absolute / self.tokens.clamp(min=1).unsqueeze(-1)).float()

    def norm(self) -> Tensor:
        """Root mean square of ``x``, float32 ``[columns]``: its L2 norm up to a common factor."""
        return (self.square / self.tokens.clamp(min=1).unsqueeze(-1)).sqrt().float()


def _parts(columns: int, least: int) -> list[slice]:
    """``columns`` in a few parts of about the same size."""
    count = min(MOST_PARTS, max(1, columns // least))
    edges = [columns * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges)]
