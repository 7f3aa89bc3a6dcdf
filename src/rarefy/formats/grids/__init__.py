"""The grids: which values codes can stand for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rarefy.formats.grids.base import Grid, Params
from rarefy.formats.grids.float import FloatGrid
from rarefy.formats.grids.integer import IntegerGrid, LevelGrid
from rarefy.formats.grids.lut import BinaryGrid, LutGrid

AnyGrid = Annotated[IntegerGrid | LevelGrid | FloatGrid | LutGrid | BinaryGrid, Field(discriminator="type")]

__all__ = ["AnyGrid", "BinaryGrid", "FloatGrid", "Grid", "IntegerGrid", "LevelGrid", "LutGrid", "Params"]
