"""What train, prepare, plan, sample, evaluate, export and report do once their config is checked."""
