"""Files that survive what real machines do: one atomic write, one way to read what comes from outside, one lock.

    write_atomic(path, content)      text or what torch.save takes: the old file or the new one, never half
    with reading(path, expected):    whatever a damaged file raises becomes one line (BadInput) that names the file
    with lock(path, doing):          a second process at the same folder is told of the first one
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import tempfile
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent                       # where the scripts lie

# Can only be read by setting it, and other threads would notice: so only once, at import.
UMASK = os.umask(0)
os.umask(UMASK)


class BadInput(Exception):
    """What the user can repair: one line that says what is wrong, what was expected and what to do.  Exit code 2."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory is short: torch and CUDA raise types of their own, or a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = str(error).lower()                                      # of a CPU; of CUDA; of cuBLAS and cuDNN
    signs = ("can't allocate memory", "out of memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in words for sign in signs)


def first_line(error: BaseException, width: int = 120) -> str:
    """The first words of an exception of a library, for one line of ours."""
    text = " ".join(str(error).split())
    if text.startswith("Weights only load failed"):                 # torch: a page of advice on its defaults
        text = "holds objects, not only tensors" if "GLOBAL" in text else "not readable as tensors alone"
    return text[:width] if text else type(error).__name__


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_atomic(path: str | Path, content) -> None:
    """Leave either the old file or the new one: temporary name of this process alone, flush to disk, rename.

    content: str, a callable that is given the temporary path and writes it, or what torch.save takes.
    OSError where the disk is full or the folder is gone, whatever the library that wrote raised for it.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))     # else of the temporary name
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        if callable(content):
            content(temporary)
        elif isinstance(content, str):
            Path(temporary).write_text(content, "utf-8", "backslashreplace")     # a path may be no UTF-8
        else:
            with open(temporary, "wb") as file:                     # to a name, torch would write that name into it
                torch.save(content, file)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, Exception) and no_space(error, path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


# What torch's zip writer and safetensors say of a full disk or a file over its limit.
FULL = ("no space left", "file too large", "unexpected pos", "os error 28", "os error 27")


def no_space(error, folder):
    """Whether an exception means that the disk is full: torch and safetensors raise their own, without a number."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = str(error).lower()
    if any(sign in words for sign in FULL):
        return True
    return "write" in words and os.statvfs(folder).f_bavail == 0


# ---- reading ---------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def reading(path: str | Path, expected: str, repair: str = "make it again"):
    """Whatever a missing or damaged file raises inside becomes one line: the file, what was expected, what to do.

    Warnings of the library that reads it would come beside that line, and are left out.
    """
    if Path(path).is_fifo():                                        # opening one waits for ever
        raise BadInput(f"{path}: is a pipe, expected {expected}")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except BadInput:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path}: no such file, expected {expected}") from None
    except PermissionError:
        raise BadInput(f"{path}: may not be read, expected {expected}; give yourself the right to read it") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, expected {expected}") from None
    except MemoryError:
        raise BadInput(f"{path}: needs more memory than there is, expected {expected}") from None
    except Exception as error:                                      # each library raises its own
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{path}: not {expected} ({first_line(error)}); {repair}") from None


def check_bytes(path: str | Path) -> None:
    """ValueError if a file of torch.save is not as it was written: it holds checksums, which torch.load ignores."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"bytes have changed in {damaged}")


def read_json(path: str | Path, expected: str, repair: str = "make it again") -> dict:
    """The dictionary in a JSON file; BadInput if the file is damaged or holds anything else."""
    with reading(path, expected, repair):
        found = json.loads(Path(path).read_text())
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}")
    return found


def json_text(obj, **options) -> str:
    """JSON that every reader takes: numbers that are not finite become null."""
    def finite(tree):
        if isinstance(tree, dict):
            return {k: finite(v) for k, v in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [finite(v) for v in tree]
        return None if isinstance(tree, float) and not math.isfinite(tree) else tree
    return json.dumps(finite(obj), allow_nan=False, **options)


def hidden(path: Path, folder: str | Path) -> bool:
    """Whether a name in a path below a folder begins with a dot."""
    return any(name.startswith(".") for name in path.relative_to(folder).parts)


def files_below(folder: str | Path) -> list[Path]:
    """All files below a folder, sorted.  Links to folders are followed, unless they lead back up.

    BadInput for a folder that may not be read; hidden ones are left out then.
    """
    def refuse(error):
        if isinstance(error, PermissionError) and not hidden(Path(error.filename), folder):
            raise BadInput(f"{error.filename}: may not be read; give yourself the right to read it")

    found = []
    for at, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        above = {os.path.realpath(each) for each in (at, *Path(at).parents)}
        folders[:] = [name for name in folders if os.path.realpath(Path(at) / name) not in above]
        found += [Path(at) / name for name in names]
    return sorted(found)


def listing_hash(paths: list[Path], folder: str | Path, times: bool = True) -> str:
    """Hex digits of the names below `folder`, sizes and, with `times`, times of change of files."""
    listing = []
    for path in paths:
        stat = path.stat() if path.exists() else path.lstat()      # a link that leads nowhere
        changed = f" {stat.st_mtime_ns}" if times else ""
        listing.append(f"{path.relative_to(folder)} {stat.st_size}{changed}")
    return hashlib.sha256("\n".join(listing).encode(errors="surrogateescape")).hexdigest()


def read_lines(path: str | Path) -> list[dict]:
    """The objects with a step in a metrics.jsonl.  A line cut by a kill or a full disk is left out."""
    found = []
    with reading(path, "lines of metrics"):
        for text in Path(path).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    found.append(line)
    return found


# ---- one process per folder ------------------------------------------------------------------------------------------

class Locked(BadInput):
    """Another process is at work in this folder."""


@contextlib.contextmanager
def lock(path: str | Path, doing: str, flag: str = "--out"):
    """Hold the lock file `path`; Locked, naming the holder's host and process, if another process does.

    doing, flag: for that line, what the holder does and which flag chooses another folder.  The kernel frees
    the lock when its holder dies, however it dies; the file itself stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise Locked(f"{path.parent}: {holder} is {doing} there; wait for it, or choose another {flag}") from None
        except OSError as error:                                    # a Lustre without -o flock
            raise BadInput(f"{path.parent}: this disk has no locks ({error.strerror}); choose another {flag}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@lru_cache
def sources(*scripts: str) -> dict[str, str]:
    """{file: hash} of scripts and of our own files that they import, in turn, and the version of torch."""
    found, ahead = {}, list(scripts)
    while ahead:
        file = ahead.pop()
        text = (HERE / file).read_text()
        found[file] = hashlib.sha256(text.encode()).hexdigest()[:12]
        text = text.replace("from plumbing import ", "import plumbing.")          # one name a line
        for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.M):
            imported = f"{name.replace('.', '/')}.py"
            if imported not in found and (HERE / imported).exists():
                ahead.append(imported)
    return dict(sorted(found.items())) | dict(torch=torch.__version__)
