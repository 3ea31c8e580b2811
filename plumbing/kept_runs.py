"""Jobs: command lines of the scripts that are run once, kept, and run again when what they are made of has changed.

    Job(folder, command, ...)      a command line and the folder that it leaves
    run_all(args, jobs)            all of them and the starts that they need, --jobs at a time; Ctrl-C saves them
    is_done(job)                   whether its run is kept: same command, same sources, same inputs, result there

Beside a job's folder lie its record (.json: what it ran with, whether it is done), its log and its lock, so two
processes may be at the same jobs.  Used by reproduce.py, search.py and benchmarks/strength.py.
"""
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from common import BadInput, usable_cores, world
from plumbing.checkpoints import load_checkpoint
from plumbing.files import HERE, files_below, hidden, json_text, listing_hash, lock, read_json, sources, write_atomic

# Flags of a command that name a file or a folder, and the words after each that do not.
PATH_FLAGS = {"--out": (), "--data": ("digits",), "--init": ("imf", "fm", "scratch"), "--teacher": ()}
MEASURES_READ = ("--vae", "--inception", "--ref")                     # flags of a measure that name a file

# measure: evaluate.py's flags for latents.  start: the Job that has to end first, or None.  counts: numbers of sampling
# steps; with latents a FID is measured for each.  every: training steps between two measurements; 0: at the end only.
# base: a Job of the same flags and fewer steps, from a copy of whose end this one goes on (of latents, the control's).
Job = namedtuple("Job", "folder command measure start counts every base", defaults=[(), 0, None])


# ---- Kept runs -------------------------------------------------------------------------------------------------------

def chain(job):
    """A job, then its start, then the start of that one, ..."""
    found = [job]
    while found[-1].start:
        found.append(found[-1].start)
    return found


def sources_of(job):
    return sources(*[j.command[0] for j in chain(job)])


def identity(job):
    """What a kept run has to agree in (`changes`).  Of a file that it reads its content counts, not its path."""
    measure = []
    for flag, word in zip(("", *job.measure), job.measure):
        read = flag in MEASURES_READ and Path(word).exists()
        measure.append(content_hash(word) if read else word)
    found = dict(command=list(job.command), absolute=absolute(job.command), measure=measure, sources=sources_of(job))
    if job.every:
        found["every"] = job.every
    inputs = [content_hash(path) for path in from_outside(job, job.command) if Path(path).exists()]
    if inputs:
        found["inputs"] = inputs
    return found


def absolute(command):
    """A command with its paths resolved, so that it is the same from any folder and however a path is spelled."""
    words = list(command)
    for i in range(1, len(words)):
        if names_a_path(words, i):
            words[i] = str(Path(words[i]).resolve())
    return words


def names_a_path(command, i):
    """Whether word i of a command is a file or a folder; evaluate.py's first word is."""
    if i == 1 and command[0] == "evaluate.py":
        return True
    flag = command[i - 1]
    return flag in PATH_FLAGS and command[i] not in PATH_FLAGS[flag]


def from_outside(job, command):
    """What a command of a job names as its data, and as a network that no job of ours trains."""
    ours = {(j.folder / "model.pt").resolve() for j in chain(job)}
    found = []
    for i in range(1, len(command)):
        if names_a_path(command, i) and command[i - 1] != "--out" and Path(command[i]).resolve() not in ours:
            found.append(command[i])
    return found


def look_again():
    """Forget the hashes: files may have changed since."""
    sources.cache_clear()
    content_hash.cache_clear()


@lru_cache(maxsize=None)
def content_hash(path):
    """Of a file its content; of a folder the names, sizes and times of what it holds, without hidden files (locks).

    Of latents, instead of the times, the content of their statistics.
    """
    if Path(path).is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    files, statistics = [file for file in files_below(path) if not hidden(file, path)], Path(path) / "latents_stats.pt"
    if statistics.is_file():                                          # of latents: a copy, with new times, is the same
        listing = listing_hash(files, path, times=False)
        return hashlib.sha256(listing.encode() + statistics.read_bytes()).hexdigest()[:12]
    return listing_hash(files, path)[:12]


def inputs_of(data, init=None):
    """{"data" or "init": [path, hash]}: what results were made of, known again where it has moved or was edited."""
    given = {name: path for name, path in (("data", data), ("init", init)) if path and path != "digits"}
    return {name: [str(Path(path).resolve()), content_hash(path)] for name, path in given.items()}


def beside(job, suffix):
    return job.folder.with_name(job.folder.name + suffix)             # a name may hold a dot: lam0.05


def record(job):
    """What is known of a job's run: command, sources it ran with, whether it is done; {} of one that never began.

    A damaged one is said, and counts as none.
    """
    path = beside(job, ".json")
    if not path.exists():
        return {}
    try:
        return read_json(path, "the record of a run", repair=f"move {job.folder} away, and the run is made again")
    except BadInput as error:
        say_once(str(error))
        return {}


@lru_cache(maxsize=None)
def say_once(text):
    tqdm.write(text)


def is_done(job):
    known = record(job)
    return known.get("done") is True and not changes(job) and not trained_on(job, known) and has_result(job)


def trained_on(job, known):
    """Whether a run that was done has been trained further since, by hand."""
    step = known.get("step")
    return isinstance(step, int) and (logged_step(job.folder) or 0) > step


def has_result(job):
    """Whether a run's files are there and can be read: a kept folder may be removed, or damaged."""
    if job.command[0] != "evaluate.py" and not zipfile.is_zipfile(job.folder / "model.pt"):         # not there, or cut
        return False
    if job.measure:
        measured, step = [*job.folder.glob("fid_*/fid.json")], record(job).get("step")
        counted = {path.parent.name.split("_")[2] for path in measured}
        if step:                                                      # None: evaluate.py's, or of an earlier version
            measured += [job.folder / f"fid_{step:06d}_{N}step" / "fid.json" for N in job.counts]
        return {f"{N}step" for N in job.counts} <= counted and all(readable(path) for path in measured)
    return readable(job.folder / ("evaluation.json" if job.command[0] == "evaluate.py" else "result.json"))


def readable(path):
    """Whether a JSON file is there and whole."""
    try:
        read_json(path, "a result")
    except BadInput:
        return False
    return True


def changes(job):
    """Names of what differs between the kept run of a job and what would run now."""
    known, now = record(job), identity(job)
    known_sources = known.get("sources")
    if not isinstance(known_sources, dict):
        known_sources = {}
    changed = [file for file, digest in now["sources"].items() if known_sources.get(file) != digest]
    if known.get("command") != now["command"] and known.get("absolute") != now["absolute"]:
        changed.append("the command")
    parts = dict(measure="the measure", inputs="what it reads")
    changed += [name for part, name in parts.items() if known.get(part) != now.get(part)]
    measured = known.get("every") or 0                                # more FIDs than are asked for do no harm
    if job.every and (not measured or job.every % measured):
        changed.append("--fid_every")
    return changed


# ---- The runner ------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """The user asked to stop."""


class Runner:
    """Runs jobs as child processes; `stop` ends them, each after saving its step."""

    def __init__(self, args):
        self.args, self.children, self.stopped = args, [], False

    def stop(self):
        self.stopped = True
        for child in list(self.children):                             # the workers take theirs out meanwhile
            child.terminate()

    def run(self, job, before=()):
        """A job, after what it needs (futures), unless it is done."""
        for each in before:
            each.result()
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(beside(job, ".lock"), "w") as held:
            self.take(held)
            if job.start and not is_done(job.start):                  # another process may have replaced it
                raise BadInput(f"{job.folder.name}: its start {job.start.folder} is not there, or is another by now; "
                               "the same command makes it again")
            if not is_done(job):
                self.do(job, held)

    def take(self, held):
        """Wait for the lock: another process may be at the same run."""
        while not self.stopped:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.5)
            except OSError as error:                                  # a Lustre without -o flock
                raise BadInput(f"{held.name}: this disk has no locks ({error.strerror}); pass another --runs") from None
        if self.stopped:
            raise Stopped

    def do(self, job, held):
        look_again()
        now, log, path = identity(job), beside(job, ".log"), beside(job, ".json")
        changed, kept = changes(job), record(job)
        if job.folder.exists() and not kept:                          # a command of --list that was pasted
            raise BadInput(f"{job.folder}: is there, and this command did not make it; move it, or pass another --runs")
        read = from_outside(job, kept.get("absolute") or absolute(kept.get("command") or job.command))
        if {"the command", "what it reads"} & {*changed} and read != from_outside(job, now["absolute"]):
            raise BadInput(f"{job.folder}: is a run of the same name that read {' and '.join(read) or 'no file'}; "
                           "pass another --runs")
        if trained_on(job, kept):                                     # whatever else has changed: it is not removed
            raise BadInput(f"{job.folder}: has been trained on since, from step {kept.get('step')} to "
                           f"{logged_step(job.folder)}; move it, or pass another --runs")
        names, measured = ", ".join(changed), sorted(job.folder.glob("fid_*"))
        lost = [each for each in measured if not (each / "model.pt").exists()]        # of these the network on its way
        if changed == ["the measure"] and {int(each.name.split("_")[1]) for each in lost} <= {step_of(job)}:
            tqdm.write(f"{job.folder.name}: how it is measured changed since, its network is measured again")
            for each in measured:
                (each / "fid.json").unlink(missing_ok=True)
                shutil.rmtree(each / "features", ignore_errors=True)
        elif changed and job.measure and job.command[0] != "evaluate.py" and holds_network(job):     # hours of a GPU
            raise BadInput(f"{job.folder}: {names} changed since it was trained; nothing was removed: go back to what "
                           "made it, pass a start with --init, or move it away")
        elif changed and job.folder.exists():
            log.unlink(missing_ok=True)
            tqdm.write(f"{job.folder.name}: {names} changed since, the kept run is removed and runs again")
            with lock(job.folder / ".lock", "training", "--runs"):    # a pasted command may be at it
                empty(job.folder)
        elif kept.get("done"):
            tqdm.write(f"{job.folder.name}: its folder or result is gone or damaged, made again")
        write_atomic(path, json_text(dict(now, done=False), indent=1))
        self.begin(job)
        for command in self.commands(job):
            keep_network(job, command)
            self.call(command, log, held.fileno())
            for measured in job.folder.glob("fid_*/fid.json"):        # of a FID that is done: 600 MB each
                shutil.rmtree(measured.with_name("features"), ignore_errors=True)
        look_again()
        changed = changes(job)
        if changed:
            raise BadInput(f"{job.folder.name}: {', '.join(changed)} changed while it ran; "
                           "the same command runs it again")
        ended = dict(done=True, step=logged_step(job.folder), machine=machine(self.args.jobs))
        write_atomic(path, json_text(now | ended, indent=1))

    def begin(self, job):
        """Of a job with a base: copy that one's end, unless it has begun."""
        if not job.base or holds_network(job):
            return
        half = job.folder.with_name(job.folder.name + ".copy")
        shutil.rmtree(half, ignore_errors=True)                       # of a process that was killed
        shutil.copytree(job.base.folder, half, ignore=shutil.ignore_patterns("fid_*", ".lock", "*.png"))
        shutil.rmtree(job.folder, ignore_errors=True)                 # it holds no network
        half.rename(job.folder)
        tqdm.write(f"{job.folder.name}: goes on from the end of {job.base.folder.name}")

    def call(self, command, log, held):
        """One command to its end, output into the log.

        The child inherits the lock: it stays held as long as the child lives, even if this process is killed.
        """
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // self.args.jobs))
        env = dict(os.environ, OMP_NUM_THREADS=threads, PYTHONUNBUFFERED="1")
        words = [sys.executable, str(HERE / command[0]), *absolute(command)[1:]]      # so that any folder can go on
        with open(log, "ab") as out:
            child = subprocess.Popen(words, stdout=out, stderr=out, env=env, pass_fds=[held])
        self.children.append(child)
        if self.stopped:
            child.terminate()
        code = child.wait()
        self.children.remove(child)
        if self.stopped:
            raise Stopped
        if code:
            reason = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())[-1]
            raise BadInput(f"{shlex.join(command)} ended with exit code {code}: {reason}")

    def commands(self, job):
        """The command lines of a job that are still to do.

        With pixels its own.  With latents training in pieces, each followed by FIDs of 2 (and 1) sampling steps.
        """
        if not job.measure:
            return [job.command]
        if job.command[0] == "evaluate.py":
            return self.fids(job, 0, job.command[:-2])

        total = self.steps_of(job)
        pieces = [total]
        if job.every:
            pieces = [*range(job.every, total, job.every), total]
        shown = job.measure[:2] if job.measure[0] == "--vae" else ()  # which decodes the pictures of training
        lines = []
        reached = step_of(job)
        if reached > total:
            raise BadInput(f"{job.folder}: is trained for {reached} steps, expected {total}; remove that folder")
        for at in pieces:
            measure = self.fids(job, at)
            if at < reached:                                          # where its network is not kept, it is gone
                lines += [command for command in measure if Path(command[1]).exists()]
            # A piece whose FIDs are all there is passed over: the next one trains through it.
            elif measure or at == total:
                lines += [[*job.command, *shown, "--steps", str(at)], *measure]
        return lines

    def fids(self, job, at, evaluate=None):
        """The commands still to do that measure a job after `at` training steps.  evaluate: of one that has none."""
        lines = []
        for N in job.counts:
            out = job.folder / f"fid_{at:06d}_{N}step"
            if not readable(out / "fid.json"):
                # Its network as `keep_network` leaves it.
                command = evaluate or ["evaluate.py", str(out / "model.pt"), "--data", self.args.data]
                steps = [] if "--steps" in command else ["--steps", str(N)]
                lines.append([*command, *steps, *job.measure, "--out", str(out)])
        return lines

    def steps_of(self, job):
        """The training steps of a job, as its script resolves them."""
        words = [sys.executable, str(HERE / job.command[0]), *job.command[1:], "--dry_run"]
        said = subprocess.run(words, capture_output=True, text=True)
        if said.returncode:
            raise BadInput(f"{shlex.join(job.command)}: {said.stderr.strip()}")
        return int(re.search(r"--steps +(\d+)", said.stdout)[1])


def holds_network(job):
    """Whether training has left something in a job's folder, also where its model.pt is damaged."""
    return any(job.folder.glob("**/*.pt"))


def keep_network(job, command):
    """Before a FID of a network in training: keep it beside the FID, so that the best one found is there at the end.

    A link takes no room until training replaces model.pt.
    """
    if command[0] != "evaluate.py" or job.command[0] == "evaluate.py" or Path(command[1]).exists():
        return
    Path(command[1]).parent.mkdir(parents=True, exist_ok=True)
    network = job.folder / "model.pt"
    try:
        os.link(network, command[1])
    except OSError:                                                   # a file system without links
        write_atomic(command[1], lambda temporary: shutil.copyfile(network, temporary))


def empty(folder):
    """Remove what a run left, but not the lock that is held: NFS keeps an open file, and then the folder stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def step_of(job):
    """The step that a job's model.pt is at; 0 where there is none, or a damaged one."""
    with contextlib.suppress(BadInput):
        return load_checkpoint(job.folder / "model.pt")["step"]
    return 0


def with_starts(jobs):
    """The jobs and the starts and bases that they need, each once, these first."""
    found = {}
    for each in jobs:
        found |= dict.fromkeys([each.base] if each.base else [])
        found |= dict.fromkeys(reversed(chain(each)))
    return list(found)


def refuse_torchrun():
    """Each copy would start its own runs, and runs of different seeds could join one group of processes."""
    if world() > 1:
        raise BadInput("starts its runs itself, one process each; leave torchrun out")


def default_jobs():
    """Runs at a time where --jobs does not say: one on a GPU, else one a core, at most 8."""
    return 1 if torch.cuda.is_available() else min(8, usable_cores())


def run_all(args, wanted):
    """Run the jobs, and the starts that they need, --jobs at a time.  -> {Job: why it failed}"""
    unique = with_starts(wanted)
    open_jobs = [j for j in unique if not is_done(j)]
    kept = len(unique) - len(open_jobs)
    print(f"{len(unique)} runs, {kept} kept from before; {args.jobs} at a time, in {args.runs}")
    runner, futures = Runner(args), {}
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    signals = (signal.SIGINT, signal.SIGTERM)                         # a shell's background jobs ignore the first
    before = {s: signal.signal(s, signal.default_int_handler) for s in signals}
    try:
        # Starts first: nothing in the queue waits for what comes after it.
        for j in sorted(open_jobs, key=lambda j: len(chain(j))):
            futures[j] = pool.submit(runner.run, j, [futures[each] for each in (j.start, j.base) if each in futures])
        with tqdm(total=len(unique), initial=kept, unit="run", dynamic_ncols=True) as bar:
            failed = follow(futures, bar)
        for j in wanted:
            if j not in failed and not is_done(j):
                failed[j] = "its script has changed while others ran, or its files are damaged"
                print(f"failed: {j.folder.name}: {failed[j]}; the same command runs it again")
        return failed
    except BaseException as error:                                    # Ctrl-C; or the bar failed: no run goes on unseen
        pool.shutdown(wait=False, cancel_futures=True)
        runner.stop()
        pool.shutdown()
        if not isinstance(error, KeyboardInterrupt):
            raise
        print("\nstopped; every run saved its step, the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def follow(futures, bar):
    """Move the bar until every future {Job: future} is done.  -> {Job: why it failed}"""
    failed = {}
    names = {future: j for j, future in futures.items()}
    waiting = set(names)
    while waiting:
        done, waiting = concurrent.futures.wait(waiting, timeout=2, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            bar.update()
            if future.exception():
                failed[names[future]] = str(future.exception())
                tqdm.write(f"failed: {failed[names[future]]}")
        running = [names[future] for future in waiting if future.running()]
        bar.set_postfix_str(", ".join(f"{j.folder.name} {last_step(j)}" for j in running)[:150])
    return failed


def last_step(job):
    """How far a running job is, as text."""
    step = logged_step(job.folder)
    return "" if step is None else f"step {step}"


def logged_step(folder):
    """The last training step in a run's metrics.jsonl; None: there is none yet, or its line is being written."""
    try:
        last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["step"]
    except (OSError, LookupError, ValueError, TypeError):             # a run that begins anew removes the file
        return None


def machine(jobs):
    """Where a run was made, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{device} ({usable_cores()} cores, {jobs} runs at a time)"
