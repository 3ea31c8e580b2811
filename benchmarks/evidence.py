"""The block `evidence` of gpu.py: Table 2 on Fashion-MNIST, five seeds of a larger network, as far as the time goes."""
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import reproduce
from common import BadInput
from plumbing.files import read_json
from plumbing.kept_runs import is_done
from plumbing.report import folder_of, seeds_in, spread

HERE = Path(__file__).resolve().parent.parent
EVIDENCE = "--start strong --size medium --precision bf16 --row 1 2 3 4 7 9 10 --jobs 8"
SEEDS = (1, 3, 5)
TABLE = 110                                                     # seconds for the table of the seeds that are done
SHOWN = dict(fd_1step=1, fd_2step=1, fd_4step=1, is_2step=2, precision_2step=3, recall_2step=3)     # digits


def evidence(args):
    """reproduce.py to the end of its table, of one seed, then of more.  Its runs are kept.

    Where --minutes stop it a table is made of the seeds that are done (None: of no seed), and the next call goes on.
    """
    words = ["2", "--data", args.data, *shlex.split(EVIDENCE), "--out", str(args.out)]
    if args.rehearse:
        words = ["2", *shlex.split("--row 1 9"), "--out", str(args.out)]
    made = reproduce.parse_args([*words, "--seeds", "1" if args.rehearse else str(SEEDS[-1])])
    path = folder_of(made, reproduce.regime_of(made, reproduce.TABLES["2"])) / "runs.json"
    earlier = path.stat().st_mtime_ns if path.exists() else 0
    code, held = 0, max(seeds_in(path.parent).values(), default=0)
    for seeds in SEEDS:                                         # all five at once would train five starts first
        if not held <= seeds <= made.seeds:
            continue
        code = table_code([*words, "--seeds", str(seeds)], args.ends - TABLE - time.perf_counter())
        if code is None:
            done = finished_seeds(made)
            if not done:
                return None
            code = table_code([*words, "--seeds", str(done)], TABLE)
            break
        if code:
            break
    if code and (not path.exists() or path.stat().st_mtime_ns == earlier):      # no new table
        raise BadInput(f"reproduce.py {shlex.join(words)} ended with exit code {code}")
    rows = rows_of_table(read_json(path, "the table"))
    missing = [f"{row['row']} ({made.seeds - row['seeds']} of {made.seeds} seeds)" for row in rows
               if row["seeds"] < made.seeds]
    return dict(table=path.parent.name, rows=rows, missing=missing, seconds=None)


def table_code(words, seconds):
    """Exit code of reproduce.py, or None where it was stopped after so many seconds.

    SIGTERM and Ctrl-C end it too, then KeyboardInterrupt is raised: an exception in the middle of Popen would leave the
    child behind.
    """
    asked = []
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in stops}
    child = subprocess.Popen([sys.executable, str(HERE / "reproduce.py"), *words], start_new_session=True)
    ends = time.perf_counter() + max(1, seconds)
    while child.poll() is None and not asked and time.perf_counter() < ends:
        time.sleep(0.2)
    code = child.poll()
    if code is None:
        child.terminate()                                       # its runs save their step
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=60)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    for s, handler in before.items():
        signal.signal(s, handler)
    if asked:
        raise KeyboardInterrupt
    return code


def finished_seeds(made):
    """How many seeds of a table, from seed 0 on, have all their runs.  made: arguments of reproduce.py."""
    rows = {r: reproduce.TABLES[made.table].rows[r - 1] for r in made.row}
    for seed in range(made.seeds):
        if not all(is_done(job) for job in reproduce.jobs_of(made, rows, seed).values()):
            return seed
    return made.seeds


def rows_of_table(table):
    """Of every row of a runs.json of reproduce.py its last values: mean and standard deviation over the seeds."""
    rows = []
    for row in table["rows"]:
        last = [run["evaluations"][-1] for run in row["seeds"].values()]
        found = dict(row=row["label"], seeds=len(last), passes=last[0].get("passes", "-") if last else "-")
        for name, digits in SHOWN.items():
            values = [np.nan if e[name] is None else e[name] for e in last if name in e]    # None: it diverged
            found[name] = spread(values, digits)
        rows.append(found)
    return rows
