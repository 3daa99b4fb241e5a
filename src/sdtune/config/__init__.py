"""A composed config made into checked objects."""
