"""Names of the random streams.

The seed and the stream name determine the random numbers (:mod:`sdtune.randomness`). So these strings are data and must
never change, even if the code is renamed: a changed string would change the noise, the order or the scenes.
"""

TRAIN, VALIDATION = "train", "validation"
"""Prefixes of a step's streams; the names below are appended."""

VAE, NOISE, OFFSET, TIMESTEP = "vae", "noise", "offset", "timestep"
DROPOUT = "dropout"
INITIAL_VALUES = "init"
CONTROLNET_EMBEDDING = "controlnet.controlnet_cond_embedding"
"""Prefix of the layer's name in the stream of its initial values."""

ORDER_BUCKET, ORDER_BATCHES = "order/bucket", "order/batches"
ORDER_DRAWN = "order/drawn/"
"""Entries of a source that are used in an epoch, if its weight asks for a part of them; the source's name follows."""
CLASS_ORDER = "class/order"
ROW = "picture"
"""Caption dropout, flip, crop and prompt template of a sample."""
CAPTION = "caption"
"""Caption of a sample: one of several, wildcards, order and dropout of tags."""
REPLACEMENT = "replacement"
"""Entry that replaces an image which has become unreadable during training."""

WORLD_SCENE, WORLD_CAPTION, WORLD_HELD_OUT = "world/scene", "world/caption", "world/held-out"
SUBJECT, SUBJECT_SCENE, SUBJECT_VALIDATION = "subject", "scene", "validation"
STYLE_OBJECTS, STYLE_SCENE = "style/objects", "style/scene"
EVALUATION_CEILING, EVALUATION_STYLE = "evaluation/ceiling", "evaluation/style"
CLASSIFIER_CEILINGS, CLASSIFIER_SCENE, CLASSIFIER_BATCH = (
    "classifier/ceilings",
    "classifier/scene",
    "classifier/batch",
)
VAE_BATCH, CLIP_BATCH = "vae/batch", "clip/batch"
BOOTSTRAP = "bootstrap"
