"""What is seen: pictures, captions, buckets, order and caches. Knows no model: batches carry prompts as strings."""

from sdtune.data.pictures import Encoders, PictureData
from sdtune.data.rows import Batch
from sdtune.data.samples import Sample
from sdtune.data.sources import Folder

__all__ = ["Batch", "Encoders", "Folder", "PictureData", "Sample"]
