"""Augmentation of image batches, drawn for each sample from its own key."""

from torsh_data.vision._augmix import AugMix
from torsh_data.vision._auto_augment import AutoAugment
from torsh_data.vision._engine import Drawn
from torsh_data.vision._mix import MixupCutmix
from torsh_data.vision._pipeline import BatchPipeline
from torsh_data.vision._policy import Policy
from torsh_data.vision._rand_augment import RandAugment
from torsh_data.vision._sheet import augmentation_sheet, plot_sheet
from torsh_data.vision._tables import OPS
from torsh_data.vision._trivial_augment import TrivialAugmentWide

__all__ = [
    "OPS",
    "AugMix",
    "AutoAugment",
    "BatchPipeline",
    "Drawn",
    "MixupCutmix",
    "Policy",
    "RandAugment",
    "TrivialAugmentWide",
    "augmentation_sheet",
    "plot_sheet",
]
