"""What matters: weights and statistics in, scores out. The larger a score, the dearer the weight is to lose."""

from rarefy.saliency.scores import group_mean, group_obs, magnitude, obs, outputs, relative, taylor, wanda

__all__ = ["group_mean", "group_obs", "magnitude", "obs", "outputs", "relative", "taylor", "wanda"]
