"""Several runs on one backbone in one process."""
