"""What calibration knows of a layer: second moments of its inputs, and gradients of its weight.

A statistic is a handful of sums, so statistics of different data merge by addition.
"""

from rarefy.statistics.base import Statistic, Statistics
from rarefy.statistics.gradients import Fisher, Gradient
from rarefy.statistics.inputs import ColumnMoments, Gram, InputStatistic

__all__ = ["ColumnMoments", "Fisher", "Gradient", "Gram", "InputStatistic", "Statistic", "Statistics"]
