"""The run folder: whether a run may go on in it, and the Run that writes it: resume, log, save, stop.

Running a command again resumes it.  Every file is written to a temporary name, flushed and renamed (files.py): never
half a checkpoint.  (Lines are added to metrics.jsonl; half a last one is left out.)  One process per folder; state.pt
is checked for flipped bytes before it is used.
"""
import contextlib
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import Stream, again, ahead, barrier, rank, world
from data import data_kind
from plumbing.checkpoints import load_checkpoint, start_over
from plumbing.files import BadInput, Locked, check_bytes, json_text, lock, read_json, read_lines, reading, write_atomic

# Flags that change how a run is carried out, not what it computes: a folder may go on with other values of these.
RUNTIME_FLAGS = {"vae", "steps", "micro_batch", "device", "compile", "out", "resume", "log_every", "preview_every",
                 "eval_every", "save_every", "health_every", "dry_run"}

# Flags that may name a file.
PATHS = {"data", "init", "teacher"}

# Flags in which the processes of one run may differ.
OF_ONE_PROCESS = PATHS | {"vae", "out", "device", "compile", "micro_batch"}

# In the namespace, but no flags.  code: hashes of the script and what it imports; wait: whether to wait for another
# process that trains in this folder.
NO_FLAGS = {"sources", "code", "wait"}

# What a run writes, and evaluate.py of its model.pt: only these names are removed by --resume no.
OWN_FILES = ("args.json", "metrics.jsonl", "state.pt", "model.pt", "result.json", "evaluation.json", "fid.json",
             "samples.png")
OWN_PICTURES = r"(samples|health)_\d{6,}\.png"                       # samples_000200.png, of a step

# A network that trains has weights near 1 (1.2 at most in the digits' runs).  Beyond this one it has diverged, although
# its loss may be finite.
LARGEST_WEIGHT = 1e4

# Of a run that diverged.
UNTOUCHED = "the last state.pt is untouched: lower --lr, or look at the data (of latents: python vae.py check DATA)"


def identity(args):
    """The flags that a run folder has to agree in."""
    return {k: v for k, v in vars(args).items() if k not in RUNTIME_FLAGS | NO_FLAGS}


def of_a_run(path):
    """Whether an args.json is one of ours, of any version; a damaged one counts as ours."""
    try:
        found = read_json(path, "the configuration of a run")
    except BadInput:
        return True
    return {"data", "init", "seed"} <= found.keys()


def own_paths(folder):
    """What a run writes into its folder: the files, there or not, and the pictures that are there."""
    pictures = [path for path in folder.glob("*.png") if re.fullmatch(OWN_PICTURES, path.name)]
    return [folder / name for name in OWN_FILES] + pictures


def leftovers(folder):
    """Temporary files of a process that was killed while it wrote."""
    own = "|".join([*map(re.escape, OWN_FILES), OWN_PICTURES])
    return [path for path in folder.glob(".*.tmp") if re.fullmatch(rf"\.({own})\..*\.tmp", path.name)]


def check_writable(folder, flag=""):
    """BadInput if a folder cannot be made or written; the line begins with `flag`.  Touches nothing."""
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a file" if folder.exists() else "a link that leads nowhere"
        raise BadInput(f"{flag}{folder}: exists and is no run folder but {what}; nothing was touched")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise BadInput(f"{flag}{folder}: Not a directory: {existing} is a file; nothing was touched")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"{flag}{folder}: cannot be written in {existing}; nothing was touched")


def check_folder(args):
    """BadInput if --out cannot be a run folder, or is that of another configuration.  Touches nothing.

    Scripts ask before any pretraining; a Run asks again.
    """
    folder, data = Path(args.out), Path(args.data)
    elsewhere, over, flag = "pass --out elsewhere", "choose another --out, or --resume no to start over", "--out "
    if getattr(args, "wait", False):                        # a start: --out and --resume are not passed on to it
        elsewhere = over = (
            f"the start is trained there: run `python consistency.py --loss {args.loss} --data ... --out NEW`, "
            "then pass --init NEW/model.pt")
        flag = "the start, trained below the folder that you are in (or pass --init FILE): "
    check_writable(folder, flag)
    if not (folder / "args.json").exists() and Path("runs/cache").resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{flag}{folder}: would hold runs/, where starts are trained; expected a folder of its own, as "
                       "runs/NAME")
    of_folder = args.data != "digits" and data.is_dir()
    if of_folder and folder.resolve().is_relative_to(data.resolve()):
        raise BadInput(f"--out {folder}: lies in --data {data}, where it would be read as data; {elsewhere}")
    if of_folder and data_kind(args.data) == "pixels" and Path.cwd().is_relative_to(data.resolve()):
        raise BadInput(f"--data {data}: holds the folder you are in, whose runs/ would be read as data; "
                       "work in another folder")
    for name in ("init", "teacher"):
        network = Path(getattr(args, name, None) or "scratch")
        if network.is_file() and network.resolve() in [path.resolve() for path in own_paths(folder)]:
            raise BadInput(f"--out {folder}: holds --{name} {network}, which this run would write over; {elsewhere}")
    for path in own_paths(folder):
        if os.path.lexists(path) and not path.is_file():        # a link that leads nowhere is no file either
            raise BadInput(f"--out {folder}: {path.name} in it is no file; move it away, or pass another --out")
    if folder.is_symlink() and args.resume == "no":
        raise BadInput(f"--out {folder}: is a link, and --resume no does not remove through one; nothing was touched")
    path = folder / "args.json"
    there = set(folder.iterdir()) if folder.exists() else set()     # looked at first: another process may begin here
    if not path.exists() or not of_a_run(path):
        ours = {folder / ".lock", *leftovers(folder)}               # of a run that was killed at once
        if there - ours:
            raise BadInput(f"--out {folder}: exists and is no run folder, expected a new one; nothing was touched")
    elif args.resume != "no":
        before = read_json(path, "the configuration of a run", repair=start_over(args))
        now = identity(args)
        script = now.pop("script")
        if before.get("script", script) != script:          # not in the folders of earlier versions
            raise BadInput(f"{folder} holds a run of {before['script']}.py; {over}")
        names = [k for k in now if not same_value(k, before.get(k), now[k])]
        names = [k for k in names if k in before or args.sources.get(k) != "default"]   # a flag that is newer than it
        names = [k for k in names if k in args.sources] or names    # start and sampler follow from flags
        differ = [f"--{k} {before.get(k)} (there) {now[k]} (here)" for k in names]
        if differ:
            moved = " (files as seen from here; the run was begun elsewhere?)" if {*names} & PATHS else ""
            raise BadInput(f"{folder} holds another configuration: {', '.join(differ)}{moved}; {over}")
        if (folder / "model.pt").exists() and not (folder / "state.pt").exists():       # the first is written last
            raise BadInput(f"{folder}: has a model.pt but no state.pt to go on from; --init {folder}/model.pt starts "
                           f"another run from it, {start_over(args)}")


def refuse_folder_of_start(args, start):
    """BadInput if --out is the folder of the start that the run is about to train."""
    if Path(start.out).resolve() == Path(args.out).resolve():
        raise BadInput(f"--out {args.out}: is the folder of the start, which is trained first; pass --out elsewhere")


def same_value(flag, before, now):
    """Whether a flag means the same in both: a file may be spelled otherwise, ./toy.npz for toy.npz."""
    if flag in PATHS and isinstance(before, str) and isinstance(now, str):
        return os.path.abspath(before) == os.path.abspath(now)
    return before == now


def refuse_odd_history(step, evaluations):
    """ValueError unless these are what `save` writes: a number of steps, and the metrics [{step, fd_2step, ...}]."""
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}")
    if not isinstance(evaluations, list):
        raise ValueError("its evaluations are no list")
    for evaluation in evaluations:
        numbers = [evaluation["step"], *evaluation.values()]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError("an evaluation in it holds no finite numbers")


def changed_data(before, now):
    """What differs between two fingerprints of data, in a word; None: nothing.

    The last bits of mean and std, and of what follows from them, depend on the number of threads.
    """
    words = dict(rows="number of images", classes="names of the classes", num_classes="number of classes", vae="VAE")
    for name in ("shape", "num_classes", "classes", "rows", *before):   # these say most
        if name == "source" or name not in before:                  # check_folder has compared the source
            continue
        same = now.get(name) == before[name]
        if name == "images":                                        # a shuffle moves it by about 0.1 / sqrt(N)
            same = math.isclose(now[name], before[name], abs_tol=1e-6)
        if name in ("mean", "std") and len(before[name]) == len(now[name]):
            same = all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(before[name], now[name]))
        if not same:
            return words.get(name, name)
    return None


def fingerprint(data):
    """What a run that goes on has to find in the data again: statistics, number, labels; pixels in their order."""
    found = dict(data.meta, rows=len(data.x), labels=zlib.crc32(data.y.numpy().tobytes()))
    if data.kind == "pixels":                                       # of latents that would be to read them all
        each = data.x.flatten(1).mean(1).double()                   # [N]
        found["images"] = float((each * torch.linspace(1, 2, len(each), dtype=torch.float64)).mean())
    return found


def refuse_changed_data(args, data, before):
    """BadInput if the data are not those of `before`, the fingerprint in state.pt of --out."""
    if not before:
        raise ValueError("it does not say of which data")
    changed = changed_data(before, fingerprint(data))
    if changed:
        raise BadInput(f"--data {data.source}: has changed since {Path(args.out) / 'state.pt'} was written "
                       f"(its {changed}); {start_over(args)}")


def check_data(args, data):
    """BadInput if the run in --out was trained on other images.

    Scripts ask before a classifier of the images is trained; a Run asks again, of latents too, whose state is large.
    """
    path = Path(args.out) / "state.pt"
    if data.kind == "pixels" and args.resume != "no" and path.exists():
        with reading(path, "the state of this run", f"it cannot be resumed, {start_over(args)}"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            refuse_changed_data(args, data, saved["data"])


class Run:
    """One run folder while it is written.

    with Run(args, state, ema, data) as run:
        for step, batch in run.steps(draw):           # from where the folder left off; saves on Ctrl-C, SIGTERM, SIGHUP
            ...
            run.log(total, batch, grad_norm)          # see `accumulate`; refused if not finite
            if run.due(args.save_every): run.save()   # also at the last step

    state: {name: network, EMA, optimizer}, everything that resuming needs; None is left out.
    ema: the network of averaged weights, which model.pt keeps and evaluations see.
    """

    def __init__(self, args, state, ema, data):
        self.args, self.ema, self.data = args, ema, data
        self.state = {name: part for name, part in state.items() if part is not None}
        self.folder, self.main = Path(args.out), rank() == 0
        self.step, self.evaluations, self.pending = 0, [], []
        self.classifier = None                                      # hash of the one that made the evaluations
        self.asked = self.stop_signal = None                        # a signal of this process; one that all agreed on
        self.held = contextlib.ExitStack()                          # the folder's lock
        check_folder(args)
        try:
            self.take_folder()
            self.resume()
        except BaseException:
            self.held.close()
            raise

    def take_folder(self):
        """Lock the folder, and clear it with --resume no.  Nobody else reads or writes in it from here to the end."""
        bar = None
        while True:
            refusal = Locked(f"{self.folder}: another process is training there")
            taken = False
            if self.main:
                try:
                    self.held.enter_context(lock(self.folder / ".lock", "training"))
                    taken = True
                except Locked as error:
                    refusal = error
            if self.from_first_process(int(taken)):
                break
            if not getattr(self.args, "wait", False):
                raise refusal
            if bar is None:
                said = str(refusal).split(";")[0]
                bar = tqdm(desc=f"waiting: {said}", bar_format="{desc} {elapsed}", disable=not self.main)
            bar.update()
            time.sleep(0.5)
        if bar is not None:
            bar.close()
        check_folder(self.args)                                     # another one may have been here meanwhile
        barrier()
        if self.main:
            for path in leftovers(self.folder):
                path.unlink()
        if self.main and self.args.resume == "no":
            # In the reverse order of writing, and args.json stays: killed here, it is still a run folder.
            for path in reversed(own_paths(self.folder)):
                if path.name != "args.json":
                    path.unlink(missing_ok=True)
        barrier()

    def from_first_process(self, number):
        """The first process's integer, given to every process."""
        if world() == 1:
            return number
        number = torch.tensor(number)
        dist.broadcast(number, 0)
        return int(number)

    def resume(self):
        path = self.folder / "state.pt"
        if path.exists():
            self.load(path)
            if self.main and not self.model_is_good():              # killed between state.pt and model.pt
                self.save_model()
            if self.main and self.step < self.args.steps:
                print(f"{self.folder}: resuming at step {self.step}")
            elif self.main:
                past = f"is past --steps {self.args.steps} (at {self.step})"
                what = past if self.step > self.args.steps else f"is done ({self.step} steps)"
                print(f"{self.folder}: {what}; --steps trains longer, --resume no starts over")
            if self.main:
                self.say_other_code()
        elif self.main:
            flags = identity(self.args) | dict(made_with=made_with(), code=self.args.code)
            write_atomic(self.folder / "args.json", json_text(flags, indent=1))
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        barrier()
        self.refuse_other_processes()

    def say_other_code(self):
        """A line if the run was begun with other code than this: what has been trained is not what this would train."""
        before = read_json(self.folder / "args.json", "the configuration of a run").get("code")         # it is newer
        if not isinstance(before, dict):
            return
        now = self.args.code
        other = sorted(file for file in before.keys() | now.keys() if before.get(file) != now.get(file))
        if before and now and other:
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            print(f"{self.folder}: was begun with another {', '.join(other[:3])}{more}; {start_over(self.args)}")

    def refuse_other_processes(self):
        """BadInput in every process if one has other flags, data or weights than the first one, or is at another step.

        Each would train a network of its own, and their gradients would be summed.
        """
        if world() == 1:
            return
        flags = {name: value for name, value in vars(self.args).items() if name not in NO_FLAGS | OF_ONE_PROCESS}
        data = fingerprint(self.data)
        number = zlib.crc32(json_text([flags, data["shape"], data["rows"], data["labels"], self.step]).encode())
        for part in self.state.values():
            if isinstance(part, torch.nn.Module):                   # student, EMA, teacher, fake side
                for v in part.state_dict().values():
                    number = zlib.crc32(v.cpu().contiguous().numpy(), number)
        other = torch.tensor(int(self.from_first_process(number) != number))
        dist.all_reduce(other, dist.ReduceOp.MAX)
        if other:
            raise BadInput(f"--out {self.folder}: the processes of this run differ in flags, data or weights, or see "
                           "different folders; expected one command for all, and a disk that they share")

    def load(self, path):
        with reading(path, "the state of this run", f"it cannot be resumed, {start_over(self.args)}"):
            check_bytes(path)
            saved = torch.load(path, map_location="cpu", weights_only=True)
            refuse_changed_data(self.args, self.data, saved["data"])
            for name, part in self.state.items():
                part.load_state_dict(saved[name])
            refuse_odd_history(saved["step"], saved["evaluations"])
            self.step, self.evaluations = saved["step"], saved["evaluations"]
            self.classifier = saved.get("classifier")               # not in the files of earlier versions
        self.refuse_divergence(f"{path} holds it: {start_over(self.args)}")

    def model_is_good(self):
        """Whether model.pt holds what state.pt holds."""
        try:
            checkpoint = load_checkpoint(self.folder / "model.pt")
            found, ours = checkpoint["weights"], self.ema.state_dict()
            same = all(torch.equal(v.cpu(), found[name]) for name, v in ours.items())
            return same and checkpoint["step"] == self.step and checkpoint["config"] == self.ema.config
        except Exception:                                           # damaged, or gone
            return False

    def __enter__(self):
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()                    # of the pretraining before
        stops = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # nohup
            stops.append(signal.SIGHUP)
        self.began = self.step
        idle = not self.main or self.step >= self.args.steps
        self.bar = tqdm(total=self.args.steps, initial=self.step, desc=self.folder.name, disable=idle, mininterval=0.5,
                        dynamic_ncols=True)
        self.handlers = {s: signal.signal(s, self.ask_to_stop) for s in stops}      # after the bar, which they write to
        path = self.folder / "metrics.jsonl"
        if self.main and self.step and path.exists():               # lines after the saved step: killed, then resumed
            kept = [line for line in read_lines(path) if line["step"] <= self.step]
            write_atomic(path, "".join(json_text(line) + "\n" for line in kept))
        self.restart_clock()
        return self

    def __exit__(self, kind, error, trace):
        self.bar.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.held.close()
        if kind is None and self.asked:                             # after the last step: what follows is stopped
            signal.raise_signal(self.asked)

    def restart_clock(self):
        """sec/step counts from here: evaluations, pictures and saves are left out."""
        self.clock, self.clock_step = time.perf_counter(), self.step

    def ask_to_stop(self, signum, frame):
        if signum == signal.SIGHUP:                                 # nobody to show it to: writing there would fail
            self.bar.disable = True
        elif self.main and not self.asked:                          # os.write: a handler may come inside of a print
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, or after the evaluation that is under way\n")
        self.asked = signum

    def steps(self, draw):
        """(step, draw(its Stream, step)) of every step that is left.

        draw: all that a step draws.  Beside a GPU the next steps' are drawn in threads: at the paper's setting that is
        0.06 s of a CPU core for FSF-DMD and 0.6 for DMD2 1:5, in which the CPU would start no kernel.
        """
        def of(step):
            return step, draw(Stream("step", self.args.seed, step), step)

        left = range(self.step, self.args.steps)
        on_cpu = next(self.ema.parameters()).device.type == "cpu"
        for drawn in map(of, left) if on_cpu else ahead(of, left):
            yield drawn
            if self.stopping():
                self.save()
                self.bar.close()
                if self.main:
                    print(f"\nstopped at step {self.step} and saved; {again()} to resume", file=sys.stderr)
                sys.exit(128 + self.stop_signal)

    def stopping(self):
        """All processes stop after the same step.  A signal that comes while they agree counts at the next."""
        agreed = self.asked or 0
        if world() > 1:
            signals = torch.tensor(agreed)                          # on the CPU: the GPU is not waited for
            dist.all_reduce(signals, op=dist.ReduceOp.MAX)
            agreed = int(signals)
        self.stop_signal = agreed or None
        return agreed > 0

    def due(self, *intervals):
        """True at a multiple of any of these numbers of steps, and at the last step (0: only there)."""
        return self.step == self.args.steps or any(every and self.step % every == 0 for every in intervals)

    def log(self, losses, batch, grad_norm):
        """End of a step: `losses` are 0-dim tensors on the device; the times in `batch` say where a loss broke."""
        times = {k: v for k, v in batch.items() if v.ndim == 1 and v.is_floating_point()}
        self.pending.append((self.step, losses, times, grad_norm))
        self.step += 1
        self.bar.update()
        if self.due(self.args.log_every, self.args.save_every, self.args.eval_every):
            self.flush()

    def flush(self):
        """Check and write the losses since the last flush: one transfer from the device, not one a step."""
        if not self.pending:
            return
        names = list(dict.fromkeys(name for _, losses, _, _ in self.pending for name in losses))
        zero = torch.zeros((), device=self.pending[0][3].device)    # of a loss that a step does not have
        rows = []
        for _, losses, _, _ in self.pending:
            rows.append(torch.stack([losses.get(name, zero).float() for name in names]))
        values = torch.stack(rows)                                  # [steps, names]
        if world() > 1:
            dist.all_reduce(values)
        values, norms = values.cpu(), torch.stack([norm.float() for *_, norm in self.pending]).cpu()
        for (step, _, times, _), row, norm in zip(self.pending, values, norms):
            bad = [name for name, value in zip(names, row) if not value.isfinite()]
            if not norm.isfinite():
                bad.append("gradient norm")
            if bad:
                spans = [f"{k} in [{v.min():.3g}, {v.max():.3g}], median {v.median():.3g}" for k, v in times.items()]
                raise BadInput(f"{bad[0]} is not finite at step {step + 1} ({', '.join(spans)}); {UNTOUCHED}")
        self.refuse_divergence()
        steps_with = torch.zeros(len(names))
        for _, losses, _, _ in self.pending:
            steps_with += torch.tensor([name in losses for name in names])
        line = dict(zip(names, (values.sum(0) / steps_with).tolist()))
        line["grad_norm"] = norms.mean().item()
        timed = self.step - self.clock_step
        if timed:                                                   # none where a picture came after the last step
            line["sec_per_step"] = seconds = (time.perf_counter() - self.clock) / timed
            line["images_per_sec"] = self.args.batch_size / seconds
        shown = {k: f"{v:.3g}" for k, v in line.items() if k not in ("grad_norm", "images_per_sec")}
        line["memory_gb"] = peak_memory() / 1e9
        self.write(line)
        if self.evaluations:
            shown |= {k: f"{v:.1f}" for k, v in self.evaluations[-1].items() if k.startswith("fd_")}
        self.bar.set_postfix(shown)
        self.pending = []
        self.restart_clock()

    def refuse_divergence(self, what=UNTOUCHED):
        """BadInput if a weight has left all bounds: one step can do that before any loss shows it."""
        for name, part in self.state.items():
            if isinstance(part, torch.nn.Module):
                largest = torch.nn.utils.get_total_norm([*part.parameters()], float("inf")).item()
                if not largest <= LARGEST_WEIGHT:                   # or nan
                    raise BadInput(f"the run has diverged: a weight of {name} is {largest:.3g} after step {self.step}; "
                                   f"{what}")

    def write(self, line):
        """One line of metrics.jsonl, under the step's number."""
        if not self.main:
            return
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json_text(dict(step=self.step) | line) + "\n")

    def measured_by(self, classifier):
        """Leave out the evaluations by another classifier, one of another machine: distances do not compare."""
        if self.evaluations and self.classifier not in (None, classifier):
            print(f"{self.folder}: was measured by another classifier so far ({self.classifier}, now {classifier}): "
                  "those evaluations stay in metrics.jsonl alone")
            self.evaluations = []
        self.classifier = classifier

    def evaluated(self, metrics):
        """Keep an evaluation ({} of latents), which only the first process makes."""
        if not metrics:
            return
        self.evaluations.append(dict(step=self.step) | metrics)
        self.write(metrics)
        self.restart_clock()

    def save(self):
        self.flush()
        if self.main:
            parts = {name: part.state_dict() for name, part in self.state.items()}
            configs = {name: part.config for name, part in self.state.items() if hasattr(part, "config")}
            history = dict(step=self.step, evaluations=self.evaluations, classifier=self.classifier,
                           data=fingerprint(self.data), configs=configs)
            write_atomic(self.folder / "state.pt", parts | history)
            self.save_model()
        barrier()
        self.restart_clock()

    def save_model(self):
        args = {k: v for k, v in vars(self.args).items() if k not in NO_FLAGS}
        weights = {name: v.cpu() for name, v in self.ema.state_dict().items()}        # read on any machine
        write_atomic(self.folder / "model.pt",
                     dict(config=self.ema.config, weights=weights, data=self.data.meta,
                          sampler=self.args.sampler, step=self.step, args=args))

    def result(self, definition):
        """Write result.json: last and best of every metric, with their definition.  -> the dict"""
        last, best = {}, {}
        if self.evaluations:
            last = self.evaluations[-1]
        for k in last:
            if k == "step":
                continue
            choose = min if k.startswith("fd") else max             # a distance is best low
            at = choose((e for e in self.evaluations if k in e), key=lambda e, k=k: e[k])
            best[k] = dict(value=at[k], step=at["step"])
        result = dict(last=last, best=best, evaluations=self.evaluations, definition=definition, made_with=made_with())
        if self.main:
            write_atomic(self.folder / "result.json", json_text(result, indent=1))
        return result


def made_with():
    """torch's version, the device, the number of processes, and the commit of this code ("" where git knows none)."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
    commit = ""
    with contextlib.suppress(OSError):                              # no git
        words = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return dict(torch=torch.__version__, device=device, processes=world(), commit=commit)


def peak_memory():
    """Bytes: of the device where there is one, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024                  # Linux counts kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
