"""Control maps for ControlNet: read from files, computed from edges, or estimated by a model."""
