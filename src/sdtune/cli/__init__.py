"""From ``sys.argv`` to a composed config, a command, an exit code and one line of error; imports no torch."""
