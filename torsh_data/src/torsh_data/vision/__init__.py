"""Augmentation of image batches, drawn for each sample from its own key."""

from torsh_data.vision._mix import MixupCutmix
from torsh_data.vision._policy import RandAugment
from torsh_data.vision._sheet import plot_sheet

__all__ = ["MixupCutmix", "RandAugment", "plot_sheet"]
