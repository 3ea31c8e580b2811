"""Imported before torch, whose import takes seconds: Ctrl-C ends a script in one line then too.

An exception does not do here: numpy catches KeyboardInterrupt in the middle of its import, and goes on half imported.
"""
import os
import signal
import sys
from pathlib import Path

SCRIPTS = ("fsf_dmd.py", "dmd2.py", "sid.py", "twinflow.py", "consistency.py", "evaluate.py", "vae.py", "reproduce.py",
           "search.py", "cost.py")


def leave_at_once(number, frame):
    """Handler of SIGINT while modules are imported."""
    os.write(2, f"{Path(sys.argv[0]).name}: stopped before it began\n".encode())
    os._exit(128 + number)


def imported():
    """From here on Ctrl-C raises KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Of our scripts only, not of a program that imports one, nor of a shell's background job, which ignores SIGINT.
program = Path(sys.argv[0]).resolve()
ours = program.parent == Path(__file__).resolve().parent.parent and program.name in SCRIPTS
if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave_at_once)
