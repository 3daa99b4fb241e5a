"""Names of the random streams: part of what a seed means.

With the seed, a stream's name decides what is drawn (:mod:`sdtune.randomness`). So its text is data and never changes,
whatever the code around it comes to be called: another text would be other noise, another order, other scenes.
"""

TRAIN, VALIDATION = "train", "validation"
"""What a step's draws are for; the names of the draws themselves stand behind it."""

VAE, NOISE, OFFSET, TIMESTEP = "vae", "noise", "offset", "timestep"
DROPOUT = "dropout"
INITIAL_VALUES = "init"
CONTROLNET_EMBEDDING = "controlnet.controlnet_cond_embedding"
"""Stands before the layer's name in the stream of its initial values."""

ORDER_BUCKET, ORDER_BATCHES = "order/bucket", "order/batches"
CLASS_ORDER = "class/order"
ROW = "picture"
"""Caption dropout, flip, crop and template of a sample."""

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
