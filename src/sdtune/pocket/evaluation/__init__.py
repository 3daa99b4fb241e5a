"""Measurements with ground truth: what an image of pocket's world shows is read, not guessed."""
