"""One table of the paper, as commands of these scripts: run, cached, and shown with the paper's numbers beside ours.

Paper: Kim, Lee, Park, "Distribution Matching Distillation without Fake Score Network", arXiv 2605.19256; its numbers: results/paper_tables.json.

    python reproduce.py 2                    # Table 2 on digits: 11 rows x 5 seeds, 45 minutes on 2 CPU cores; also 3 4 5 7 8 9, and 10 (rows of 2 and 4)
    python reproduce.py 2 --start strong     # from an iMF trained four times as long
    python reproduce.py 2 --list             # the commands, to paste
    python reproduce.py 2 --row 7 --seeds 1  # one row
    python reproduce.py cost                 # seconds, memory and FLOPs of one step of every method at the paper's size, on random latents
    python reproduce.py 2 --data latents --vae VAE --inception WEIGHTS --ref REFERENCE --seeds 1 --fid_every 1000       # the paper's own setting

Every row is the command line of a script, run as a user would, once for each seed, from a start of the same seed.  A run is kept in
runs/reproduce/ under its arguments and runs again only if a file that it executes has changed, which is said.  Ctrl-C saves; the same
command goes on, and ends with the same table.  Leaves table<N>-<data>-<start>.md, .csv, .json, .png (metric against step) and
-samples.png (the same noise in every row) in --out.

Protocol (digits).  Settings were chosen on seeds 100 and 101, as many for each method (README, results/search_digits.json); reported are 0 to 4.  `last`:
after the preset's steps; `best`: the best of the evaluations on the way, at `step`.  Values are mean +- standard deviation over seeds.
A difference to the table's reference row is the mean of the paired differences over seeds; * marks p < 0.05 in a paired t-test after
Holm's correction over the rows of the table.  Five seeds see large effects only.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import fcntl
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ttest_rel
from tqdm import tqdm

from common import BadInput, Parser, load_checkpoint, load_network, main, number, preview, save_atomic
from evaluate import decoder, generate, sampling
from model import SIZES, fixed_guidance
from vae import data_kind, load_data

HERE = Path(__file__).resolve().parent
PAPER = json.loads((HERE / "results" / "paper_tables.json").read_text())
METRICS = ("fd", "is", "precision", "recall", "acc")                          # of evaluate.py

# ---- the rows ----------------------------------------------------------------------------------------------------------------

# The same rows on two kinds of data; where the flags differ, a name in braces stands for them.
STARTS = dict(imf="consistency.py --loss imf", fm="consistency.py --loss fm")
FLAGS = dict(
    pixels=dict(strong=" --steps 800", m1=" --lam 0.05", cd1=" --lr 1e-3 --fake_lr 1e-3", lam8="0.5", fm_all="", fm_few=" --cfg_channels 1", long=" --steps 400"),
    latents=dict(strong="", m1="", cd1="", lam8="0.05", fm_all=" --cfg_channels 0", fm_few=" --cfg_channels 3", long=""))
CONTROL = {("pixels", "weak"): 400, ("pixels", "strong"): 1000, ("latents", "weak"): 404_000}                 # steps of the start and of a distillation
CD, CD_MASKED = "consistency.py --loss cd --init {start} --mask_prob 0", "consistency.py --loss cd --init {start}"
FSF, DMD2, TEACHER = "fsf_dmd.py --init {start}", "dmd2.py --init {start}", "evaluate.py {start} --velocity"
EARLY = " --weight one --shift 1 --lam 0.1 --mask_prob 0"                     # Table 3 before "+ hyperparameter tuning"
TTUR = [" --ttur 1", " --ttur 2", " --ttur 3", " --ttur 4", "", " --ida 0.97", " --cd 1 --mask_prob 0{cd1}", " --cd 1{cd1}"]
WEIGHTS = [" --weight one", "", " --weight one --clip 1"]                      # adaptive is the default

Row = namedtuple("Row", "label paper start command")          # paper: {column: value}; start: imf, fm or None (from scratch); command None: the start itself
Table = namedtuple("Table", "title reference rows")            # reference: the row that the others are compared with


def paper(name):
    """[(label, {column: value})] of a table of the paper."""
    columns = PAPER[name]["columns"][1:]
    return [(label, dict(zip(columns, values))) for label, *values in PAPER[name]["rows"]]


def rows(name, start, commands):
    return [Row(label, values, start, command) for (label, values), command in zip(paper(name), commands, strict=True)]


TWO = [None, TEACHER, CD, DMD2, DMD2 + " --ida 0.97", DMD2 + " --cd 1 --mask_prob 0{cd1}", FSF + " --M 2", FSF + " --M 1{m1}"]
FOUR = ["evaluate.py {start}{fm_all}", "evaluate.py {start}{fm_few}", CD, DMD2, DMD2 + " --cd 1 --mask_prob 0", FSF]
NOT_IN_PAPER = [                                                # at the end of our Table 2
    Row("Consistency distillation + random masking (Table 3)", dict(fid=4.98), "imf", CD_MASKED), Row("SiD", {}, "imf", "sid.py --init {start}"),
    Row("control: the iMF trained on", {}, None, "consistency.py --loss imf --steps {control}")]
TABLES = {
    "2": Table("Flow-map-initialised", 3, rows("table2", "imf", TWO) + NOT_IN_PAPER),
    "3": Table("Ablation", 1, rows("table3", "imf", [
        CD, FSF + " --M 1" + EARLY, FSF + " --M 2 --rollout dmd2" + EARLY, FSF + " --M 2" + EARLY, FSF + " --M 2 --mask_prob 0", FSF + " --M 2",
        FSF + " --M 1{m1}", DMD2 + " --M 1", CD_MASKED])),
    "4": Table("Flow-matching-initialised", 3, rows("table4", "fm", FOUR)),
    "5": Table("From scratch", 1, rows("table5", None, [
        "consistency.py --loss imf{long}", "dmd2.py --init scratch", "twinflow.py --base imf", "consistency.py --loss rcgm", "twinflow.py --base rcgm", "fsf_dmd.py --init scratch"])),
    "7": Table("TTUR and GAN", 13, [Row(f"{label}, {gan}", dict(fid=values[f"fid_with{out}_gan"]), "imf", DMD2 + flags + off) for gan, off, out in (("no GAN", " --no_gan", "out"), ("GAN", "", ""))
                                    for (label, values), flags in zip(paper("table7"), TTUR, strict=True)]),
    "8": Table("Timestep shift k", 1, [Row(f"k = {k}", values, "imf", FSF + f" --lam {{lam8}} --shift {k} --weight one") for k, values in paper("table8")]),
    "9": Table("lambda and weight, k = 10", 6, [Row(f"{label}, lambda {lam}", dict(fid=fid), "imf", FSF + f" --lam {lam} --shift 10" + flags)
                                                for (label, values), flags in zip(paper("table9"), WEIGHTS, strict=True) for lam, fid in values.items() if fid]),
    "10": Table("Cost and other metrics", 1, rows("table10", None, TWO[2:] + FOUR[2:])),
}
TABLES["10"] = TABLES["10"]._replace(rows=[row._replace(start=row.label.split(":")[0]) for row in TABLES["10"].rows])


# ---- the runs ----------------------------------------------------------------------------------------------------------------

Job = namedtuple("Job", "folder command measure start")       # measure: evaluate.py's flags for latents; start: the Job that has to end first, or None


def init_name(args):
    return Path(args.init).parent.name if Path(args.init).name == "model.pt" else Path(args.init).stem


def job(args, command, seed, start=None):
    """The run of one command and one seed.  Its folder is named after its arguments."""
    kind = data_kind(args.data)
    script, *flags = shlex.split(command.format(start="START", control=CONTROL[kind, args.start], **FLAGS[kind]))
    name = "".join(flag for flag in flags if flag not in ("--init", "START")).replace("--", "-").replace("/", "_")
    origin = "" if start is None else "-" + (init_name(args) if args.init else start.folder.name.removeprefix("consistency-loss").removesuffix(f"-seed{seed}"))
    folder = args.runs / Path(args.data).stem / f"{Path(script).stem}{origin}{name if name[:1] in ('', '-') else '-' + name}-seed{seed}"
    model = str(args.init or start.folder / "model.pt") if start else ""
    argv = [script] + [model if flag == "START" else flag for flag in flags] + ["--data", args.data] * (args.data != "digits")
    argv += ["--seed", str(seed)] * (script != "evaluate.py") + ["--out", str(folder)]
    measure = []
    if kind == "latents":
        measure = ["--vae", args.vae, "--inception", args.inception, "--ref", args.ref, "--n", str(args.n or 50_000)] + ["--few", "1"] * bool(args.n and args.n <= 2048)
    return Job(folder, tuple(argv), tuple(measure), None if args.init else start)


def jobs_of(args, rows, seed):
    """{row number: Job} of one seed."""
    found = {}
    for r, row in rows.items():
        start = row.start and job(args, STARTS[row.start] + ("{strong}" if args.start == "strong" and row.start == "imf" else ""), seed)
        command = "evaluate.py {start}" if row.command is None and args.init else row.command
        found[r] = job(args, command, seed, start) if command else start
    return found


@lru_cache
def sources(*scripts):
    """{file: hash} of scripts and of the files of this folder that they import, in turn, and the version of torch."""
    found, ahead = {}, list(scripts)
    while ahead:
        file = ahead.pop()
        text = (HERE / file).read_text()
        found[file] = hashlib.sha256(text.encode()).hexdigest()[:12]
        ahead += [f"{name}.py" for name in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M) if (HERE / f"{name}.py").exists() and f"{name}.py" not in found]
    return dict(sorted(found.items())) | dict(torch=torch.__version__)


def sources_of(job):
    return sources(*(j.command[0] for j in (job, job.start) if j))


def identity(job):
    """What a kept run has to agree in."""
    return dict(command=list(job.command), measure=list(job.measure), sources=sources_of(job))


def beside(job, suffix):
    return job.folder.with_name(job.folder.name + suffix)                     # a name may hold a dot: lam0.05


def record(job):
    """What is known of a job's run: its command, the sources it ran with, whether it is done; {} of one that never began."""
    path = beside(job, ".json")
    return json.loads(path.read_text()) if path.exists() else {}


def is_done(job):
    return record(job) == identity(job) | dict(done=True)


class Stopped(Exception):
    """The user asked to stop."""


class Runner:
    """Runs jobs as child processes; `stop` ends them, each after saving its step."""

    def __init__(self, args):
        self.args, self.children, self.stopped = args, [], False

    def stop(self):
        self.stopped = True
        for child in self.children:
            child.terminate()

    def call(self, command, log, lock):
        """One command to its end, output into the log.  The lock stays held as long as the child lives, even if this process is killed."""
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")
        with open(log, "ab") as out:
            child = subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]], stdout=out, stderr=out, env=env, pass_fds=[lock])
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

    def run(self, job, waits=()):
        """A job, after those that it waits for, unless it is done."""
        for other in waits:
            other.result()
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(beside(job, ".lock"), "w") as lock:
            while True:                                                       # another process may be at the same run
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.5)
                if self.stopped:
                    raise Stopped
            if self.stopped:
                raise Stopped
            if is_done(job):
                return
            known, now, log, path = record(job), identity(job), beside(job, ".log"), beside(job, ".json")
            changed = [file for file, h in now["sources"].items() if known.get("sources", {}).get(file) != h] + [f"the {k}" for k in ("command", "measure") if known.get(k) != now[k]]
            if changed and job.folder.exists():
                tqdm.write(f"{job.folder.name}: {', '.join(changed)} changed since, the kept run is removed and runs again")
                shutil.rmtree(job.folder)
            if changed:
                log.unlink(missing_ok=True)
            path.write_text(json.dumps(now | dict(done=False), indent=1))
            for command in self.commands(job):
                self.call(command, log, lock.fileno())
                for features in job.folder.glob("fid_*/features"):            # 600 MB each
                    shutil.rmtree(features)
            path.write_text(json.dumps(now | dict(done=True), indent=1))

    def commands(self, job):
        """The command lines of a job that are still to do: with pixels its own; with latents training in pieces, each followed by FIDs of 2 (and 1) steps."""
        if not job.measure:
            return [job.command]

        def fids(line, at, steps):
            todo = [(N, job.folder / f"fid_{at:06d}_{N}step") for N in steps]
            return [[*line, "--steps", str(N), *job.measure, "--out", str(out)] for N, out in todo if not (out / "fid.json").exists()]

        if job.command[0] == "evaluate.py":
            return fids(job.command[:-2], 0, [25 if "--velocity" in job.command or "lossfm" in job.command[1] or self.args.table == "4" else 2])
        text = subprocess.run([sys.executable, str(HERE / job.command[0]), *job.command[1:], "--dry_run"], capture_output=True, text=True).stdout
        total, distils = int(re.search(r"--steps +(\d+)", text)[1]), "--init" in job.command and "scratch" not in job.command
        every = self.args.fid_every * distils                                 # the paper's "best found" is of the distillations
        lines = []
        for at in [*range(every, total, every), total] if every else [total]:
            measure = fids(["evaluate.py", str(job.folder / "model.pt"), "--data", self.args.data], at, [2, 1] if self.args.table == "5" else [2])
            if "--loss fm" in " ".join(job.command):                          # a start of Table 4, which measures its samples itself
                measure = []
            if measure or at == total:                                        # else done before an interruption, and training is past it
                lines += [[*job.command, "--steps", str(at)], *measure]
        return lines


def run_all(args, wanted):
    """Run the jobs, and the starts that they need, --jobs at a time.  -> {Job: why it failed}"""
    unique = list(dict.fromkeys(j for each in wanted for j in [each.start, each] if j))
    open_jobs = [j for j in unique if not is_done(j)]
    runner, failed, futures = Runner(args), {}, {}
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}       # a shell's background jobs ignore the first
    print(f"{len(unique)} runs, {len(unique) - len(open_jobs)} kept from before; {args.jobs} at a time, in {args.runs}")
    try:
        for j in sorted(open_jobs, key=lambda j: j.start is not None):        # starts first: nothing in the queue waits for what comes after it
            futures[j] = pool.submit(runner.run, j, [futures[j.start]] if j.start in futures else [])
        names = {future: j for j, future in futures.items()}
        with tqdm(total=len(unique), initial=len(unique) - len(open_jobs), unit="run", dynamic_ncols=True) as bar:
            waiting = set(futures.values())
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, timeout=2, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    bar.update()
                    if future.exception():
                        failed[names[future]] = str(future.exception())
                        tqdm.write(f"failed: {failed[names[future]]}")
                bar.set_postfix_str(", ".join(f"{j.folder.name} {last_step(j)}" for f, j in names.items() if f.running() and not is_done(j))[:150])
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        runner.stop()
        pool.shutdown()
        print("\nstopped; every run saved its step, the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    return failed


def last_step(job):
    lines = (job.folder / "metrics.jsonl").read_text().splitlines() if (job.folder / "metrics.jsonl").exists() else []
    return f"step {json.loads(lines[-1])['step']}" if lines and lines[-1].endswith("}") else ""


# ---- the results -------------------------------------------------------------------------------------------------------------

def collect(args, job):
    """One run: dict(evaluations=[{step, fd_2step, ...}], sec_per_step, memory_gb).  FID takes the place of `fd` for latents."""
    folder = job.folder
    if data_kind(args.data) == "latents":
        steps = {}
        for path in sorted(folder.glob("fid_*/fid.json")):
            at, N = re.findall(r"\d+", path.parent.name)
            values = json.loads(path.read_text())
            steps.setdefault(int(at), dict(step=int(at))).update({f"{k}_{N}step": values[k2] for k, k2 in zip(METRICS, ("fid", "is", "precision_inception", "recall_inception")) if k2 in values})
        found = [steps[at] for at in sorted(steps)]
    elif job.command[0] == "evaluate.py":
        found = [dict(step=0) | {k: v for k, v in json.loads((folder / "evaluation.json").read_text()).items() if k.endswith("step")}]
    else:
        found = json.loads((folder / "result.json").read_text())["evaluations"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if (folder / "metrics.jsonl").exists() else []
    seconds = [line["sec_per_step"] for line in lines if "sec_per_step" in line]
    return dict(evaluations=[{k: round(v, 4) for k, v in e.items()} for e in found], sec_per_step=round(float(np.median(seconds)), 4) if seconds else None,
                memory_gb=round(max(line.get("memory_gb", 0) for line in lines), 3) if lines else None)


def summary(table_rows, runs):
    """{row number: its label, paper's values, runs by seed, and the last and best values over the seeds}.  runs: {row number: {seed: collect(...)}}."""
    rows = {}
    for r, row in table_rows.items():
        seeds = {s: run for s, run in runs.get(r, {}).items() if run["evaluations"]}
        names = list(next(iter(seeds.values()))["evaluations"][-1])[1:] if seeds else []
        last = {k: [run["evaluations"][-1][k] for run in seeds.values()] for k in names}
        N = 2 if "fd_2step" in names else 25                                  # a velocity is sampled with 25 Euler steps
        evaluations = {s: [e for e in run["evaluations"] if e["step"] > 0] or run["evaluations"] for s, run in seeds.items()}
        best = [min(each, key=lambda e: e[f"fd_{N}step"]) for each in evaluations.values()]
        rows[r] = dict(number=r, label=row.label, paper=row.paper, n=len(seeds), N=N, seeds=seeds, last=last, best=[e[f"fd_{N}step"] for e in best], step=[e["step"] for e in best],
                       sec_per_step=[run["sec_per_step"] for run in seeds.values() if run["sec_per_step"]], memory_gb=[run["memory_gb"] for run in seeds.values() if run["memory_gb"]])
    return rows


def compare(rows, reference, metric):
    """{row: (mean of the paired differences to the reference row, p of the paired t-test, Holm-corrected)} over the seeds both have."""
    found, base = {}, rows.get(reference, {}).get("seeds", {})
    for r, row in rows.items():
        common = [s for s in row["seeds"] if s in base]
        values = [[side[s]["evaluations"][-1].get(f"{metric}_{N}step", math.nan) for s in common] for side, N in ((row["seeds"], row["N"]), (base, rows[reference]["N"] if base else 2))]
        if r != reference and len(common) >= 3:
            difference = np.subtract(*values)
            found[r] = [difference.mean(), ttest_rel(*values).pvalue if difference.std() > 0 else 1.0]
    worst = 0.0
    for i, r in enumerate(sorted(found, key=lambda r: found[r][1])):          # Holm: the i-th smallest of m, times m - i, never below the one before
        worst = max(worst, min(1.0, found[r][1] * (len(found) - i)))
        found[r][1] = worst
    return found


def spread(values, digits):
    """mean +- standard deviation, as text."""
    if not values:
        return "-"
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def paper_text(values):
    """The paper's values in one cell; a dash where our copy of the paper has lost the FID."""
    if any(k.startswith("fid_") for k in values):                             # Table 5
        text = " / ".join("-" if values[k] is None else str(values[k]) for k in ("fid_1step", "fid_2step"))
    else:
        text = str(values.get("fid", "-"))
    named = dict(peak_step="at {}", sec_per_step_b200="{} s/step", sec_per_step_a100="{} s/step (A100)", recall="recall {}", precision="precision {}") | {"is": "IS {}"}
    return ", ".join([text] + [form.format(values[k]) for k, form in named.items() if values.get(k) is not None])


def markdown(args, table, rows):
    """The two tables as Markdown: the paper beside ours, and every metric at every number of steps."""
    name = "FID" if data_kind(args.data) == "latents" else "distance"
    differences = {metric: compare(rows, table.reference, metric) for metric in ("fd", "is")}
    one = any("fid_1step" in row["paper"] for row in rows.values())           # Table 5 has FIDs of 1 step and of 2
    lines = [f"| | {table.title} | paper: FID{' of 1 / 2 steps' * one} | {f'{name}, 1 step | ' * one}{name}, 2 steps: last | best | at step | against row {table.reference} | IS, 2 steps | against row {table.reference} | s/step | GB | n |", "|" + "---|" * (12 + one)]
    for r, row in rows.items():
        against = {m: f"{d[r][0]:+.{1 if m == 'fd' else 2}f}{'*' if d[r][1] < 0.05 else ''} (p {d[r][1]:.2g})" if r in d else "-" for m, d in differences.items()}
        N, trained = row["N"], bool(row["sec_per_step"])
        cells = [r, row["label"] + " (25 Euler steps)" * (N == 25), paper_text(row["paper"]), *[spread(row["last"].get("fd_1step"), 1)] * one, spread(row["last"].get(f"fd_{N}step"), 1), spread(row["best"], 1) if trained else "-",
                 ", ".join(map(str, row["step"])) if trained else "-", against["fd"], spread(row["last"].get(f"is_{N}step"), 2), against["is"],
                 f"{np.median(row['sec_per_step']):.3f}" if trained else "-", f"{max(row['memory_gb']):.2f}" if trained else "-", row["n"] or "not run here"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"| | last, all metrics | steps | {name} | IS | precision | recall | accuracy |", "|" + "---|" * 8]
    for r, row in rows.items():
        for N in sorted(int(k[3:-4]) for k in row["last"] if k.startswith("fd_")):
            lines.append(f"| {r} | {row['label']} | {N} | " + " | ".join(spread(row["last"].get(f"{k}_{N}step"), d) for k, d in (("fd", 1), ("is", 2), ("precision", 3), ("recall", 3), ("acc", 3))) + " |")
    return "\n".join(lines)


def figure(args, table, rows, path):
    """Metric against step (the paper's Fig. 3): Frechet distance and IS at 2 steps, mean over seeds; band: the standard error of the paired difference to the reference row."""
    import matplotlib.figure
    drawing = matplotlib.figure.Figure(figsize=(10, 4.2), layout="constrained")
    styles, handles, mixed = ["-", "--", ":", "-."], {}, any(row.start for row in table.rows)
    levels = {r for r, row in enumerate(table.rows, 1) if row.command is None or mixed and row.start is None}       # the start, and the control
    for axis, metric, title in zip(drawing.subplots(1, 2), ("fd", "is"), (f"{'FID' if data_kind(args.data) == 'latents' else 'Frechet distance'}, 2 steps", "Inception Score, 2 steps")):
        for i, row in enumerate(rows.values()):
            key, seeds = f"{metric}_{row['N']}step", [run["evaluations"] for run in row["seeds"].values()]
            if not seeds or any(key not in e for run in seeds for e in run):
                continue
            steps = sorted(set.intersection(*({e["step"] for e in run} for run in seeds)))
            values = np.array([[e[key] for e in run if e["step"] in steps] for run in seeds])         # [seeds, steps]
            label = f"{row['number']} {row['label']}"
            if len(steps) == 1 or row["number"] in levels:                                            # not trained, or the control: a level
                handles[label] = axis.axhline(values[:, -1].mean(), linewidth=1, color=("black", "gray")[i % 2], linestyle=styles[1 + i % 3])
                continue
            base = [{e["step"]: e.get(key) for e in rows[table.reference]["seeds"].get(seed, dict(evaluations=[]))["evaluations"]} if table.reference in rows else {} for seed in row["seeds"]]
            paired = all(step in each for each in base for step in steps)
            error = (values - np.array([[each[step] for step in steps] for each in base])).std(0) / max(1, len(values) - 1) ** 0.5 if paired else 0 * values[0]
            shown = slice(0 if mixed else 1, None)                                                    # from scratch: step 0 is noise
            mean, error, steps = values.mean(0)[shown], error[shown], steps[shown]
            handles[label] = axis.plot(steps, mean, marker=".", color=f"C{i % 10}", linestyle=styles[i % 4])[0]
            axis.fill_between(steps, mean - error, mean + error, color=f"C{i % 10}", alpha=0.1 if len(rows) < 12 else 0.03, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        if metric == "fd":
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.tick_params(axis="y", which="both", labelsize=8)
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    drawing.savefig(path, dpi=100)


def samples(args, rows, jobs, path):
    """Samples of every row of the first seed from the same noise (the paper's Fig. 4): one of each of ten classes."""
    data = load_data(args.data)
    classes = min(data.num_classes, 10)
    bands = [("real", torch.cat([data.x[(data.y == c).nonzero()[:1, 0]] for c in range(classes)]))]
    for r, row in rows.items():
        if not row["n"]:
            continue
        job = jobs[r][min(row["seeds"])]
        velocity = "--velocity" in job.command
        net, checkpoint = load_network(job.command[1] if job.command[0] == "evaluate.py" else job.folder / "model.pt", data)
        guidance = sampling(argparse.Namespace(omega=None, guide_to=None, cfg_channels=None), checkpoint)
        bands.append((f"{r} {row['label']}, {row['N']} steps", generate(net, classes, data.x.shape[1:], row["N"], *guidance, classes=classes, velocity=velocity)[0]))
    preview(path, bands, data.meta, decoder(args.vae, data.vae, torch.device("cpu")))


def report(args, table, table_rows, jobs, runs):
    """Write and print the table of a {row number: Row}, from jobs and runs, {row number: {seed: ...}}."""
    rows = summary(table_rows, runs)
    regime = init_name(args) if args.init else args.start if "imf" in {row.start for row in table.rows} else ""
    name = "-".join(part for part in (f"table{args.table}", Path(args.data).stem, regime) if part)
    text = markdown(args, table, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(f"Table {args.table}, {table.title}; {args.data}{f', {regime} start' * bool(regime)}\n\n{text}\n")
    head = dict(table=args.table, title=table.title, data=args.data, start=regime, reference=table.reference, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                cores=os.cpu_count(), jobs=args.jobs, sources={f: h for each in jobs.values() for j in each.values() for f, h in sources_of(j).items()})
    lines = [json.dumps({k: row[k] for k in ("number", "label", "paper", "N")} | dict(command=shlex.join(next(iter(jobs[r].values())).command), seeds=row["seeds"]), separators=(",", ":")) for r, row in rows.items()]
    (args.out / f"{name}.json").write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(lines) + "\n]}\n")
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "row", "label", "paper_fid", "seed", "steps", "at_step", *METRICS, "sec_per_step", "memory_gb"])
        for r, row in rows.items():
            for seed, run in row["seeds"].items():
                for e in run["evaluations"]:
                    for N in sorted(int(k[3:-4]) for k in e if k.startswith("fd_")):
                        writer.writerow([args.table, r, row["label"], row["paper"].get("fid"), seed, N, e["step"], *(e.get(f"{m}_{N}step") for m in METRICS), run["sec_per_step"], run["memory_gb"]])
    figure(args, table, rows, args.out / f"{name}.png")
    samples(args, rows, jobs, args.out / f"{name}-samples.png")
    print(text)
    print(f"\nwrote {args.out / name}.md, .csv, .json, .png and -samples.png")


# ---- cost --------------------------------------------------------------------------------------------------------------------

# fm: FSF-DMD is what comes after its 20,000 steps of L_CD alone (Table 6).
COST = [(f"{start}: {label}" if start else label, start, command) for start, label, command in [
    ("imf", "Consistency distillation", CD_MASKED), ("imf", "FSF-DMD M=1", FSF + " --M 1"), ("imf", "FSF-DMD M=2", FSF + " --M 2"), ("imf", "DMD2 1:1, no GAN", DMD2 + " --ttur 1 --no_gan"),
    ("imf", "DMD2 1:1", DMD2 + " --ttur 1"), ("imf", "DMD2 1:5, no GAN", DMD2 + " --no_gan"), ("imf", "DMD2 1:5", DMD2), ("imf", "DMD2 + IDA", DMD2 + " --ida 0.97"), ("imf", "DMD2 + L_CD", DMD2 + " --cd 1"),
    ("imf", "SiD", "sid.py --init {start}"), ("fm", "Consistency distillation", CD_MASKED), ("fm", "DMD2 1:5", DMD2), ("fm", "DMD2 + L_CD", DMD2 + " --cd 1"), ("fm", "FSF-DMD", FSF + " --warmup 0 --steps 6000"),
    (None, "FM", "consistency.py --loss fm"), (None, "iMF", "consistency.py --loss imf"), (None, "iMF + DMD2", "dmd2.py --init scratch"), (None, "iMF + TwinFlow", "twinflow.py --base imf"),
    (None, "RCGM", "consistency.py --loss rcgm"), (None, "RCGM + TwinFlow", "twinflow.py --base rcgm"), (None, "FSF-DMD from scratch", "fsf_dmd.py --init scratch")]]
RATE = 2e14                     # FLOP/s assumed for hours on an H100: a fifth of its 989e12 in bf16, as iMF in the paper on an A100 (22% of 312e12); FSF-DMD there on a B200 12% of 2250e12
UPDATES = {}                    # {shapes of an optimizer's parameters: FLOPs of their update}, of this process


def random_inputs(folder, size):
    """Latents drawn from N(0, 1) in the paper's shape, 32 x 16 x 16 with 1000 classes, and starts with random weights, nothing zero."""
    from safetensors.torch import save_file

    from model import LightningDiT
    data = folder / "latents"
    data.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 32, 16, 16, generator=g), torch.randint(1000, (256,), generator=g)
    y[0] = 999                                                                # so that there are 1000 classes
    save_file(dict(latents=x, latents_flip=x.flip(3), labels=y), data / "random.safetensors")
    torch.save(dict(mean=torch.zeros(1, 32, 1, 1), std=torch.ones(1, 32, 1, 1)), data / "latents_stats.pt")
    for name, conditioning in (("imf", "in_context"), ("fm", "plain")):
        torch.manual_seed(0)
        net = LightningDiT(size, conditioning)
        for p in net.parameters():
            if not p.any():                                                   # zero-initialised: the timing should not be of zeros
                torch.nn.init.normal_(p, std=0.02)
        save_atomic(dict(config=net.config, weights=net.state_dict(), data=None, args={}, step=0), folder / f"{name}.pt")
    return data


def count(script, argv, steps, forward_of):
    """FLOPs of matrix products in one step of a script: dict(step, without the optimizers; optimizer; forward, one pass of a network; preset, its steps).

    Runs `steps` steps in this process, at the batch size in argv, and leaves at the last optimizer update.  forward_of: a model.pt.
    An optimizer whose parameters have shapes that were counted before is not run again.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from torch.utils.flop_counter import FlopCounterMode
    module = importlib.import_module(script)
    with contextlib.redirect_stdout(io.StringIO()):                           # it prints what its flags resolve to
        args = module.parse_args(argv)
    per_step = {"dmd2": 1 + getattr(args, "ttur", 0), "sid": 2}.get(script, 1)                        # optimizer updates in a step

    class Enough(Exception):
        pass

    counter, keys, marks, held = FlopCounterMode(display=False), [], [], []

    def begin(optimizer, *_):
        held[:] = [group["params"] for group in optimizer.param_groups]
        keys.append(tuple(p.shape for params in held for p in params))
        marks.append(counter.get_total_flops())
        for group in optimizer.param_groups if keys[-1] in UPDATES else []:
            group["params"] = []                                              # nothing to update

    def end(optimizer, *_):
        marks.append(counter.get_total_flops())
        UPDATES.setdefault(keys[-1], marks[-1] - marks[-2])
        for group, params in zip(optimizer.param_groups, held):
            group["params"] = params
        if len(keys) == steps * per_step:
            raise Enough

    hooks = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        with contextlib.suppress(Enough), counter, sdpa_kernel(SDPBackend.MATH), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.train(args)                                                # MATH: the fused kernel of CPUs is not counted
    finally:
        for hook in hooks:
            hook.remove()
    gradients = marks[-1] - sum(b - a for a, b in zip(marks[::2], marks[1::2]))
    net, _ = load_network(forward_of)
    x, t = torch.randn(args.batch_size, *(net.config[k] for k in ("in_channels", "input_size", "input_size"))), torch.full((args.batch_size,), 0.5)
    guidance = fixed_guidance(1.0, 0.0, 1.0, x) if net.conditioning == "in_context" else None
    with FlopCounterMode(display=False) as one, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(x, t, t.long(), None, guidance)                                   # of class 0
    return dict(step=gradients / steps, optimizer=sum(UPDATES[key] for key in keys) / steps, forward=one.get_total_flops(), preset=args.steps)


def time_steps(command, folder, steps, seconds=60):
    """(median seconds of a step without the first ones, peak memory in GB) of a script in a process of its own, killed after so many steps, or the first one past so many seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(HERE / command[0]), *command[1:], "--log_every", "1", "--save_every", "0", "--health_every", "0", "--out", str(folder)]
    if command[1].endswith("consistency.py"):
        command.remove("--health_every"), command.remove("0")
    lines = []
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while len(lines) < steps and sum(line["sec_per_step"] for line in lines) < seconds:
                time.sleep(0.2)
                if child.poll() is not None:
                    log.seek(0)
                    raise BadInput(f"{shlex.join(command[1:])} ended with exit code {child.returncode}: {log.read().decode(errors='replace').strip().splitlines()[-1]}")
                path = folder / "metrics.jsonl"
                lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        finally:
            child.kill()                                                      # nothing of it is wanted: no checkpoint, no picture
            child.wait()
    kept = lines[min(len(lines) - 1, max(1, steps // 4)):steps]
    return float(np.median([line["sec_per_step"] for line in kept])), max(line["memory_gb"] for line in kept)


def cost(args):
    """Seconds, memory, FLOPs and forward passes of one step of every method, on random latents; a measured row is kept, as the tables' runs are."""
    folder, on_gpu = args.runs / "cost", torch.cuda.is_available()
    B, precision, steps = args.batch_size or (128 if on_gpu else 1), "bf16" if on_gpu else "fp32", 24 if on_gpu else 4
    chosen = [row for i, row in enumerate(COST, 1) if args.row in (None, i)]
    seconds = {label: values["sec_per_step_b200"] for label, values in paper("table10")} | {label: values["sec_per_step_a100"] for label, values in paper("table5")}
    twin = {"imf: DMD2 1:5": "imf: DMD2", "fm: DMD2 1:5": "fm: DMD2 (TTUR 1:5)", "FSF-DMD from scratch": "FSF-DMD"}
    setting = dict(device=torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores", size=args.size, batch=B, precision=precision)
    path = args.runs / "cost.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)                  # Ctrl-C is for this process, which ends the other
    with multiprocessing.get_context("spawn").Pool(1) as aside:               # this one stays small: on Linux a child's peak memory begins with its parent's
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, signal.default_int_handler)             # the process that is timed must not outlive this one
        for label, start, command in tqdm(chosen, unit="method", dynamic_ncols=True):
            script, *flags = shlex.split(command.format(start=folder / f"{start}.pt"))
            identity = setting | dict(command=command, sources=sources(script))
            if kept.get(label, {}).get("identity") == identity:
                continue
            if label in kept:
                tqdm.write(f"{label}: its setting or sources changed since, measured again")
            data = aside.apply(random_inputs, (folder, args.size))
            flags += ["--data", str(data)] + ["--size", args.size] * (start is None)
            sec, memory = time_steps([script, *flags, "--batch_size", str(B), "--precision", precision], folder / "run", steps)
            flops = aside.apply(count, (script[:-3], [*flags, "--batch_size", "1", "--precision", "fp32", "--out", str(folder / "count"), "--resume", "no"], 2 if script == "dmd2.py" else 1,
                                        folder / f"{'fm' if start == 'fm' or label == 'FM' else 'imf'}.pt"))
            hours = flops["preset"] * (128 * flops["step"] + flops["optimizer"]) / RATE / 3600
            row = dict(label=label, command=command.format(start=f"{str(start).upper()}.pt"), sec_per_step=sec, memory_gb=memory, passes=flops["step"] / flops["forward"], gflop_per_image=flops["step"] / 1e9,
                       gflop_optimizer=flops["optimizer"] / 1e9, preset_steps=flops["preset"], hours_modelled=hours, paper_sec_per_step=seconds.get(twin.get(label, label)))
            kept[label] = dict(identity=identity, row=row)
            path.write_text(json.dumps(kept, indent=1))
            shutil.rmtree(folder)
    rows = [kept[label]["row"] for label, *_ in chosen]
    base = next((row for row in rows if row["label"] == "imf: FSF-DMD M=2"), rows[0])
    lines = [f"| one step, {args.size}, batch {B}, {precision} | forward passes | GFLOP an image | GFLOP optimizer | s/step | times {base['label']} | GB | times | paper: s/step | steps | H100 hours, modelled |", "|" + "---|" * 11]
    for row in rows:
        lines.append(f"| {row['label']} | {row['passes']:.1f} | {row['gflop_per_image']:.0f} | {row['gflop_optimizer']:.0f} | {row['sec_per_step']:.3g} | {row['sec_per_step'] / base['sec_per_step']:.2f} | {row['memory_gb']:.2f} | "
                     f"{row['memory_gb'] / base['memory_gb']:.2f} | {row['paper_sec_per_step'] or '-'} | {row['preset_steps']} | {row['hours_modelled']:.1f} |")
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"cost-{'cuda' if on_gpu else 'cpu'}"
    (args.out / f"{name}.json").write_text(json.dumps(setting | dict(torch=torch.__version__, flop_per_second_modelled=RATE, rows=rows), indent=1))
    (args.out / f"{name}.md").write_text(f"{setting['device']}, torch {torch.__version__}\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines) + f"\n\nwrote {args.out / name}.md and .json")


# ---- command line ------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", choices=[*TABLES, "cost"], help="table of the paper; or cost, one step of every method")
    p.add_argument("--data", default="digits", help="digits, an .npz, an image folder, or a folder of latent shards (then also --vae, --inception and --ref)")
    p.add_argument("--start", choices=["weak", "strong"], default="weak", help="tables 2, 3, 7, 8, 9, 10 on pixels: the iMF they start from, of 200 or of 800 steps")
    p.add_argument("--init", help="tables 2 to 9 but 5: start from this model.pt, or official weights, instead of one trained here")
    p.add_argument("--seeds", type=number(int, 1), default=5, help="seeds 0, 1, ... of every row (default: 5)")
    p.add_argument("--row", type=number(int, 1), help="this row only (see --list)")
    p.add_argument("--list", action="store_true", help="print the commands and exit")
    p.add_argument("--jobs", type=number(int, 1), help="runs at a time (default: the CPU cores, at most 8; one on a GPU)")
    p.add_argument("--vae", help="latents: VAE checkpoint, as in evaluate.py")
    p.add_argument("--inception", help="latents: weight file of FID's Inception network, as in evaluate.py")
    p.add_argument("--ref", help="latents: reference statistics, as in evaluate.py")
    p.add_argument("--n", type=number(int, 4), help="latents: images of an FID (default: 50,000)")
    p.add_argument("--fid_every", type=number(int, 0), default=0, help="latents: steps of a distillation between FIDs; 0: at the end only (the paper reports the best found)")
    p.add_argument("--size", default="B/1", choices=list(SIZES), help="cost: network size (default: B/1, the paper's)")
    p.add_argument("--batch_size", type=number(int, 1), help="cost: batch of the timing (default: 128 on a GPU, 1 on a CPU); FLOPs are counted at 1")
    p.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs that are kept")
    p.add_argument("--out", type=Path, default=Path("runs/reproduce/tables"), help="folder of the tables and pictures")
    args = p.parse_args(argv)
    given = {flag for flag in vars(args) if getattr(args, flag) != p.get_default(flag)}
    count, latents = len(COST if args.table == "cost" else TABLES[args.table].rows), args.table != "cost" and data_kind(args.data) == "latents"
    if args.row and args.row > count:
        raise BadInput(f"--row {args.row}: expected 1 to {count}")
    idle = given & (dict(cost={"data", "start", "init", "seeds", "list", "jobs"}).get(args.table, {"size", "batch_size"}) | (set() if latents else {"vae", "inception", "ref", "n", "fid_every"}))
    if idle:
        raise BadInput(f"{', '.join(f'--{flag}' for flag in sorted(idle))}: does nothing for {'cost' if args.table == 'cost' else f'table {args.table} on {args.data}'}; leave that out")
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else min(8, os.cpu_count() or 1))
    starts = {row.start for row in TABLES[args.table].rows} if args.table != "cost" else set()
    if args.start == "strong" and ("imf" not in starts or latents or args.init):
        raise BadInput("--start strong: the two regimes are iMFs of pixels, trained here; on latents pass --init with a network trained longer")
    if args.init:
        found = {"in_context": "imf", "plain": "fm"}.get(load_checkpoint(args.init)["config"]["conditioning"])
        if starts - {None} != {found}:
            raise BadInput(f"--init {args.init}: holds the start of {found or 'no'} rows, but those of table {args.table} start from {' and '.join(sorted(filter(None, starts))) or 'scratch'}")
    if latents and not args.list and not (args.vae and args.inception and args.ref):
        raise BadInput(f"--data {args.data}: FID of latents needs --vae, --inception and --ref (see evaluate.py)")
    return args


def run(args):
    if args.table == "cost":
        return cost(args)
    table = TABLES[args.table]
    rows = {r: row for r, row in enumerate(table.rows, 1) if args.row in (None, r) and not (args.init and row.start is None)}       # no control of a start that is given
    jobs = {r: {} for r in rows}
    for seed in range(args.seeds):
        for r, each in jobs_of(args, rows, seed).items():
            jobs[r][seed] = each
    if args.list:
        starts = dict.fromkeys(j.start for each in jobs.values() for j in each.values() if j.start)
        for start in starts:
            print(f"# a start\npython {shlex.join(start.command)}")
        for r, row in rows.items():
            print(f"# row {r}: {row.label} (the paper: {paper_text(row.paper)})")
            for each in jobs[r].values():
                print(f"python {shlex.join(each.command)}")
        return
    load_data(args.data)                                                      # refused now if it is not readable
    failed = run_all(args, [jobs[r][seed] for seed in range(args.seeds) for r in rows])
    done = {r: {seed: collect(args, j) for seed, j in each.items() if is_done(j)} for r, each in jobs.items()}
    report(args, table, rows, jobs, done)
    if failed:
        raise BadInput(f"{len(failed)} runs failed and are missing in the table: " + "; ".join(j.folder.name for j in failed))


if __name__ == "__main__":
    main(run, parse_args)
