"""The commands train, prepare, plan, sample, evaluate, export and report: check a composed config, then run it."""
