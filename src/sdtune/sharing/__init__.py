"""Several runs at once on one backbone: a sweep's jobs that differ in settings, not in the model."""
