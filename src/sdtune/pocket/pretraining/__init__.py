"""How pocket was trained."""
