"""A trained file put onto a backbone for sampling and taken off again."""
