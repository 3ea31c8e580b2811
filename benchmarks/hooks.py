"""Looking into a training loop of this process: after each of its steps, and around the functions that it calls."""
import contextlib

from plumbing.run_folder import Run


class Done(Exception):
    """The steps that are looked at are over."""


@contextlib.contextmanager
def replaced(changes):
    """Attributes replaced for a while.  changes: (owner, name, wrap); the attribute becomes wrap(what it was)."""
    with contextlib.ExitStack() as undo:
        for owner, name, wrap in changes:
            before = getattr(owner, name)
            undo.callback(setattr, owner, name, before)
            setattr(owner, name, wrap(before))
        yield


@contextlib.contextmanager
def after_each_step(look):
    """Call look(run) at the end of every step; the loop ends where it raises Done."""
    def wrap(log):
        def logged(run, *rest):
            log(run, *rest)
            look(run)
        return logged

    with contextlib.suppress(Done), replaced([(Run, "log", wrap)]):
        yield
