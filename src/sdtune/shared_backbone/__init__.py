"""Concurrent training of several runs on one backbone in one process."""
