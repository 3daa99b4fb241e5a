"""Command line: composes the config, runs the command, maps errors to exit codes; imports no torch."""
