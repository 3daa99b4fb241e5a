"""Captioned images for training: buckets, caches, deterministic order; imports no model code and no tokenizer."""

from sdtune.data.datamodule import CacheInputs, ImageDataModule
from sdtune.data.dataset import Batch
from sdtune.data.mix import Mix
from sdtune.data.samples import Sample
from sdtune.data.sources import Folder, Table

__all__ = ["Batch", "CacheInputs", "Folder", "ImageDataModule", "Mix", "Sample", "Table"]
