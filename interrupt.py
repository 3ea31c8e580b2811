"""Imported before torch, whose import takes seconds: Ctrl-C ends a script in one line then too.

An exception does not do here: numpy catches KeyboardInterrupt in the middle of its import, and goes on half imported.
"""
import os
import signal
import sys
from pathlib import Path


def leave_while_importing(number, frame):
    """Handler of SIGINT: ends the process if modules are being imported, else raises KeyboardInterrupt as usual."""
    at = frame
    while at:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{Path(sys.argv[0]).name}: stopped before it began\n".encode())
            os._exit(128 + number)
        at = at.f_back
    signal.default_int_handler(number, frame)


# Of our scripts only, not of a notebook or a test that imports one; and a shell's background jobs ignore SIGINT.
ours = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave_while_importing)
