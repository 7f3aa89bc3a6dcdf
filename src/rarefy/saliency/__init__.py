"""What matters: weights and statistics in, scores out. The larger a score, the dearer the weight is to lose."""

from rarefy.saliency.scores import magnitude, obs, wanda

__all__ = ["magnitude", "obs", "wanda"]
