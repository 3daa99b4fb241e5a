"""Many runs from one command: launch, stop, resume, prune."""
