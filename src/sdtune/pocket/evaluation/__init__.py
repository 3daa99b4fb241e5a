"""Evaluation on pocket's world, where the ground truth of every image is known."""
