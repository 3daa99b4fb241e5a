"""Files of a run folder: names, states, saved configs, metrics; imports no torch."""
