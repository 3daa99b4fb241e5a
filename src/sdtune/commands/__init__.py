"""The commands, such as train, prepare, caption and sample: check a composed config, then run it."""
