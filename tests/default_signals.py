"""Imported before sdtune, which leaves a signal ignored that is ignored when the process starts.

``nohup`` ignores SIGHUP, and a shell script SIGINT in background jobs; the tests send both.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
