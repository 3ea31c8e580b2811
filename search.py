"""The settings of the presets, as many for every method, on seeds that no table reports.

    python search.py weak                    # from the iMF of 400 steps: 7 methods, 8 runs each, and DMD2's lambda_G
    python search.py strong                  # from the iMF of 800 steps: 7 methods, 6 runs each
    python search.py fm                      # from the velocity network (Table 4): 5 methods, 6 runs each
    python search.py scratch                 # Table 5: 6 methods, 6 runs each
    python search.py weak --method SiD       # one method
    python search.py strong --method "DMD2, beyond"    # past the edge at which its search ended (BEYOND)
    python search.py weak --data /usr/share/datasets/fashion-mnist --seeds 1  # 7 methods, 4 runs each; strong: 7; fm: 5
    python search.py scratch --data /usr/share/datasets/fashion-mnist --seeds 1  # 6 methods, 3 or 4 runs each

Six settings a method from the weak start; four elsewhere, around what the weak search chose, or from scratch around the
presets.  Of images of 24 pixels or more CD and FSF-DMD have the same number of forward passes; from scratch there are
three or four settings, for half of the preset's steps.  Every setting is the command line of a script, run on seed 100
for the preset's steps (DMD2 1:1 without GAN for FSF-DMD's forward passes); the best two of a method run on seed 101
too, and their mean decides.  A run starts from a start of its own seed.  The criterion is the distance after the last
step at 2 sampling steps, with the sampler that the network was trained for.  The paper's own lambda and shift are among
the settings.
Runs are kept, stopped and continued as reproduce.py's.  Leaves search-<data>-<start> in --out: README.md, runs.json.
"""
import argparse
import re
import shlex
import sys

import numpy as np
import torch

from common import BadInput, main, usable_cores
from data import data_name, preset_kind
from plumbing import report
from plumbing.files import json_text, write_atomic
from plumbing.flags import Parser, data_source, folder_path, number
from plumbing.kept_runs import default_jobs, inputs_of, is_done, refuse_torchrun, run_all
from reproduce import CD, CD_MASKED, DMD2, DMD2_CD, FSF, STARTS, job, usable_data

SEEDS = (100, 101)
FINALISTS = 2                                                         # of each method, that run on the second seed too
SIX_RATES = ["--lr 0.001", "--lr 0.002", "--lr 0.003", "--lr 0.0045", "--lr 0.006", "--lr 0.012"]
TWO_SIDES = [                                                         # generator, fake side
    "--lr 0.0001 --fake_lr 0.001",
    "--lr 0.0003 --fake_lr 0.001",
    "--lr 0.0003 --fake_lr 0.003",
    "--lr 0.001 --fake_lr 0.001",
    "--lr 0.001 --fake_lr 0.003",
    "--lr 0.003 --fake_lr 0.003",
]
BOTH_LOSSES = [
    "--lam 0.01 --lr 0.001 --fake_lr 0.001",
    "--lam 0.1 --lr 0.001 --fake_lr 0.001",
    "--lam 1 --lr 0.001 --fake_lr 0.001",
    "--lam 0.01 --lr 0.003 --fake_lr 0.003",
    "--lam 0.1 --lr 0.003 --fake_lr 0.003",
    "--lam 1 --lr 0.003 --fake_lr 0.003",
]
FOUR_OF_TWO_SIDES = [TWO_SIDES[i] for i in (0, 1, 2, 4)]
FOUR_OF_BOTH_LOSSES = [BOTH_LOSSES[i] for i in (1, 2, 4, 5)]
SIX_LAMBDAS = [f"--lam {lam} --shift {k}" for lam in (0.01, 0.05, 0.2) for k in (1, 10)]
FOUR_LAMBDAS = ["--lam 0.003 --shift 10", "--lam 0.01 --shift 1", "--lam 0.01 --shift 10", "--lam 0.05 --shift 10"]
FOUR_LAMBDAS_FM = ["--lam 0.001 --shift 10", "--lam 0.02 --shift 1", "--lam 0.02 --shift 10", "--lam 0.1 --shift 10"]
FOUR_LAMBDAS_SCRATCH = [
    "--lam 0.001 --shift 1",
    "--lam 0.01 --shift 1",
    "--lam 0.01 --shift 10",
    "--lam 0.05 --shift 1",
]
FOUR_OF_TWINFLOW = ["--lam 0.01", "--lam 0.03", "--lam 0.1", "--lam 1"]
# The target network's memory has to be short against 400 steps: with TwinFlow's 0.99 it lags by a quarter of the run.
FOUR_OF_RCGM = [
    "--target_ema 0.5 --delta 0.05 --lr 0.012",
    "--target_ema 0.5 --delta 0.05 --lr 0.024",
    "--target_ema 0.5 --delta 0.05 --lr 0.048",
    "--target_ema 0.99 --delta 0.01 --lr 0.012",
]

# Past a best setting that was the last one in some direction: that one again, and those beside it.
PAST_0003 = ["--lr 0.0003 --fake_lr 0.003", "--lr 0.0003 --fake_lr 0.01", "--lr 0.0001 --fake_lr 0.003"]
PAST_001 = [
    "--lr 0.001 --fake_lr 0.003",
    "--lr 0.001 --fake_lr 0.01",
    "--lr 0.003 --fake_lr 0.003",
    "--lr 0.003 --fake_lr 0.01",
]

SID = "sid.py --init {start}"
ONE_FAKE_UPDATE = " --ttur 1 --no_gan"                                # 8.5 passes a step; steps: for FSF-DMD's passes
FROM_WEAK = {
    "CD with masking":    (CD_MASKED, SIX_RATES),
    "FSF-DMD, M = 2":     (FSF + " --M 2", SIX_LAMBDAS),
    "FSF-DMD, M = 1":     (FSF + " --M 1", SIX_LAMBDAS),
    "DMD2":               (DMD2, TWO_SIDES),
    "DMD2 + L_CD":        (DMD2_CD, BOTH_LOSSES),
    "DMD2, 1:1, no GAN":  (DMD2 + ONE_FAKE_UPDATE + " --steps 300", TWO_SIDES),
    "SiD":                (SID, ["--lr 0.00003 --fake_lr 0.001", *TWO_SIDES[:5]]),
    # 0.003: the paper's; 0.042: as heavy beside the DM loss, a mean over elements, as on DMD2's 64 x 64 x 3
    "DMD2's lambda_G":    (DMD2, [f"--lambda_g {g}" for g in (0.003, 0.012, 0.042, 0.15)]),
}
FROM_STRONG = {
    "CD with masking":    (CD_MASKED, ["--lr 0.0005", "--lr 0.001", "--lr 0.002", "--lr 0.004"]),
    "FSF-DMD, M = 2":     (FSF + " --M 2 --lr 0.002", FOUR_LAMBDAS),
    "FSF-DMD, M = 1":     (FSF + " --M 1 --lr 0.002", FOUR_LAMBDAS),
    "DMD2":               (DMD2, FOUR_OF_TWO_SIDES),
    "DMD2 + L_CD":        (DMD2_CD, FOUR_OF_BOTH_LOSSES),
    "DMD2, 1:1, no GAN":  (DMD2 + ONE_FAKE_UPDATE + " --steps 300", FOUR_OF_TWO_SIDES),
    "SiD":                (SID, FOUR_OF_TWO_SIDES),
}
FROM_FM = {
    "CD with masking":    (CD_MASKED, ["--lr 0.0015", "--lr 0.003", "--lr 0.006", "--lr 0.012"]),
    "FSF-DMD, M = 2":     (FSF + " --M 2 --lr 0.003", FOUR_LAMBDAS_FM),
    "DMD2":               (DMD2, FOUR_OF_TWO_SIDES),
    "DMD2 + L_CD":        (DMD2_CD, FOUR_OF_BOTH_LOSSES),
    "SiD":                (SID, FOUR_OF_TWO_SIDES),
}
FROM_SCRATCH = {
    "iMF":                ("consistency.py --loss imf --mask_prob 0.5",
                           ["--lr 0.003", "--lr 0.006", "--lr 0.012", "--lr 0.024"]),
    "RCGM":               ("consistency.py --loss rcgm", FOUR_OF_RCGM),
    "iMF + DMD2":         ("dmd2.py --init scratch", ["--lam 0.01", "--lam 0.03", "--lam 0.1", "--lam 0.3"]),
    "iMF + TwinFlow":     ("twinflow.py --base imf", FOUR_OF_TWINFLOW),
    "RCGM + TwinFlow":    ("twinflow.py --base rcgm --lr 0.024", FOUR_OF_TWINFLOW),
    "FSF-DMD":            ("fsf_dmd.py --init scratch", FOUR_LAMBDAS_SCRATCH),
}
FROM_FM_OF_IMAGES = {
    "CD with masking":    (CD_MASKED, ["--lr 0.002", "--lr 0.004", "--lr 0.008", "--lr 0.016"]),
    "DMD2":               (DMD2, [TWO_SIDES[i] for i in (1, 2, 4, 5)]),
    "FSF-DMD, M = 2":     (FSF + " --M 2 --lr 0.008",                 # the best of CD's first three rates
                           [f"--lam {lam} --shift 10" for lam in (0.001, 0.01, 0.05, 0.2)]),
    "DMD2 + L_CD":        (DMD2_CD, FOUR_OF_BOTH_LOSSES),
    "SiD":                (SID, FOUR_OF_TWO_SIDES),
}
FROM_WEAK_OF_IMAGES = {
    "CD with masking":    (CD_MASKED, ["--lr 0.001", "--lr 0.002", "--lr 0.004", "--lr 0.008"]),
    "DMD2":               (DMD2, [TWO_SIDES[i] for i in (1, 2, 4, 5)]),
    "FSF-DMD, M = 2":     (FSF + " --M 2 --lr 0.004",                 # CD's best rate
                           [f"--lam {lam} --shift 10" for lam in (0.0003, 0.003, 0.015, 0.05)]),
    "FSF-DMD, M = 1":     (FSF + " --M 1 --lr 0.004 --steps 225",     # as many passes as M = 2
                           [f"--lam {lam} --shift 10" for lam in (0.0003, 0.003, 0.015, 0.05)]),
    "DMD2 + L_CD":        (DMD2_CD, FOUR_OF_BOTH_LOSSES),
    "DMD2, 1:1, no GAN":  (DMD2 + ONE_FAKE_UPDATE + " --steps 265 --eval_every 133", FOUR_OF_TWO_SIDES),
    "SiD":                (SID, FOUR_OF_TWO_SIDES),
}
FROM_STRONG_OF_IMAGES = {
    "CD with masking":    FROM_WEAK_OF_IMAGES["CD with masking"],
    "DMD2":               (DMD2, FOUR_OF_TWO_SIDES),
    "FSF-DMD, M = 2":     FROM_WEAK_OF_IMAGES["FSF-DMD, M = 2"],
    "FSF-DMD, M = 1":     FROM_WEAK_OF_IMAGES["FSF-DMD, M = 1"],
    "DMD2 + L_CD":        (DMD2_CD, FOUR_OF_BOTH_LOSSES),
    "DMD2, 1:1, no GAN":  FROM_WEAK_OF_IMAGES["DMD2, 1:1, no GAN"],
    "SiD":                (SID, ["--lr 0.00003 --fake_lr 0.001", *TWO_SIDES[:3]]),
}
FOUR_RATES = ["--lr 0.004", "--lr 0.008", "--lr 0.016", "--lr 0.032"]
FROM_SCRATCH_OF_IMAGES = {                                            # for half of the presets' steps
    "iMF":                ("consistency.py --loss imf --mask_prob 0.5 --steps 750", FOUR_RATES),
    "RCGM":               ("consistency.py --loss rcgm --steps 750", FOUR_RATES),
    "FSF-DMD":            ("fsf_dmd.py --init scratch --steps 750",
                           ["--lr 0.016 --lam 0.01 --shift 1",
                            "--lr 0.016 --lam 0.001 --shift 10",
                            "--lr 0.032 --lam 0.001 --shift 10"]),
    "iMF + DMD2":         ("dmd2.py --init scratch --steps 750",      # the preset's rate is iMF's best
                           ["--lam 0.003", "--lam 0.01", "--lam 0.03", "--lam 0.1"]),
    "iMF + TwinFlow":     ("twinflow.py --base imf --steps 750",
                           ["--lam 0.01", "--lam 0.03", "--lam 0.1", "--lam 0.3"]),
    "RCGM + TwinFlow":    ("twinflow.py --base rcgm --steps 750",     # at RCGM's best rate
                           ["--lam 0.01", "--lam 0.03", "--lam 0.1", "--lam 0.3"]),
}
# start: (the start's command, or None from scratch; its methods)
SEARCHES = {
    "weak": (STARTS["imf"], FROM_WEAK),
    "strong": (STARTS["imf"] + "{strong}", FROM_STRONG),
    "fm": (STARTS["fm"], FROM_FM),
    "scratch": (None, FROM_SCRATCH),
}
SEARCHES_OF_IMAGES = {
    "weak": (STARTS["imf"], FROM_WEAK_OF_IMAGES),
    "strong": (STARTS["imf"] + "{strong}", FROM_STRONG_OF_IMAGES),
    "fm": (STARTS["fm"], FROM_FM_OF_IMAGES),
    "scratch": (None, FROM_SCRATCH_OF_IMAGES),
}
# By --method alone.  FSF-DMD's lambda is not among them: below its smallest lies CD with masking.
BEYOND = {
    "weak": {
        "CD without masking": (CD, SIX_RATES),
        "DMD2, beyond": (DMD2, PAST_0003),
    },
    "strong": {
        "CD without masking": (CD, ["--lr 0.001", "--lr 0.002", "--lr 0.004", "--lr 0.008"]),
        "CD, beyond": (CD_MASKED, ["--lr 0.004", "--lr 0.008", "--lr 0.016"]),
        "DMD2, beyond": (DMD2, PAST_001),
        "SiD, beyond": (SID, PAST_0003),
    },
    "fm": {
        "CD without masking": (CD, ["--lr 0.00075", "--lr 0.0015", "--lr 0.003", "--lr 0.006"]),
        "CD, beyond": (CD_MASKED, ["--lr 0.0015", "--lr 0.00075"]),
        "DMD2, beyond": (DMD2, PAST_001),
    },
}
BEYOND_OF_IMAGES = {
    "weak": {"CD without masking": (CD, FROM_WEAK_OF_IMAGES["CD with masking"][1])},
    "fm": {"CD without masking": (CD, ["--lr 0.001", *FROM_FM_OF_IMAGES["CD with masking"][1]])},
}


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("start", choices=list(SEARCHES), help="where the methods start from")
    lists = [methods for _, methods in (*SEARCHES.values(), *SEARCHES_OF_IMAGES.values())]
    lists += [*BEYOND.values(), *BEYOND_OF_IMAGES.values()]
    p.add_argument("--method", choices=sorted({name for each in lists for name in each}), help="this method only")
    p.add_argument("--data", type=data_source, default="digits", help="digits, or other images, as in reproduce.py")
    p.add_argument("--seeds", type=number(int, 1, 2), default=2, help="1: no second seed for the best two of a method")
    p.add_argument("--jobs", type=number(int, 1), help="runs at a time (default: as reproduce.py)")
    p.add_argument("--runs", type=folder_path, default="runs/reproduce", help="folder of the runs that are kept")
    p.add_argument("--out", type=folder_path, help="where the folder is made (default: tables in --runs)")
    args = p.parse_args(argv)
    args.out, args.jobs = args.out or args.runs / "tables", args.jobs or default_jobs()
    args.command = shlex.join(["python", "search.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def run(args):
    refuse_torchrun()
    usable_data(args.data)
    kind = preset_kind(args.data)
    if kind == "latents":
        raise BadInput(f"--data {args.data}: holds latents, expected digits or images")
    start_command, methods = (SEARCHES if kind == "pixels" else SEARCHES_OF_IMAGES)[args.start]
    if args.method:
        methods = methods | (BEYOND if kind == "pixels" else BEYOND_OF_IMAGES).get(args.start, {})
    if args.method and args.method not in methods:
        raise BadInput(f"--method {args.method}: is not searched from {args.start}, expected "
                       + ", ".join(repr(name) for name in methods))
    if args.method:
        methods = {args.method: methods[args.method]}
    folder = folder_of(args)
    stored = report.stored_runs(folder)
    report.refuse_other_results(folder, args.data, inputs_of(args.data))
    there = len(stored.get("seeds", []))
    if there > args.seeds:
        raise BadInput(f"--seeds {args.seeds}: {folder} holds the search with {there}; pass as many, or another --out")
    # start: every setting stands in the commands, none comes from FLAGS_STRONG
    found = argparse.Namespace(data=args.data, init=None, size=None, precision=None, runs=args.runs, start="weak",
                               jobs=args.jobs)
    jobs = {}                                                         # {(method, setting): [Job of each seed]}
    for method, (command, settings) in methods.items():
        for setting in settings:
            jobs[method, setting] = [one_run(found, start_command, f"{command} {setting}", SEEDS[0])]
    failed = run_all(found, all_of(jobs))
    for method, (command, settings) in methods.items():
        best = sorted((setting for setting in settings if is_done(jobs[method, setting][0])),
                      key=lambda setting, method=method: distances(jobs[method, setting])[0])
        for setting in best[:FINALISTS]:
            for seed in SEEDS[1:args.seeds]:
                jobs[method, setting].append(one_run(found, start_command, f"{command} {setting}", seed))
    failed |= run_all(found, [each for each in all_of(jobs) if each not in failed])
    rows = []
    for (method, setting), each in jobs.items():
        runs = [report.collect(j, "pixels") for j in each if is_done(j)]
        rows.append(dict(method=method, setting=setting, command=shlex.join(each[0].command), runs=runs,
                         distance=distances(each)))
    report.refuse_mixed(each for row in rows for each in row["runs"])
    names = "; ".join(j.folder.name for j in failed)
    fuller = {(row["method"], row["setting"]): len(row["distance"]) for row in stored.get("rows", [])}
    fewer = [row for row in rows if len(row["distance"]) < fuller.get((row["method"], row["setting"]), 0)]
    if failed and fewer:                                              # without a failure the finalists are others
        raise BadInput(f"{len(failed)} runs failed, so the fuller search in {folder} stays: {names}")
    write(args, rows)
    if failed:
        raise BadInput(f"{len(failed)} runs failed: {names}")


def all_of(jobs):
    return [j for each in jobs.values() for j in each]


def distances(jobs):
    """The criterion of each run that is done."""
    return [report.collect(j, "pixels")["evaluations"][-1]["fd_2step"] for j in jobs if is_done(j)]


def one_run(args, start_command, command, seed):
    start = job(args, start_command, seed) if start_command else None
    return job(args, command, seed, start)


def folder_of(args):
    """Where the search is left."""
    name = f"search-{data_name(args.data)}-{args.start}"
    if args.method:                                                   # does not replace the whole search
        name += "-" + re.sub(r"\W+", "_", args.method)
    return args.out / name


def write(args, rows):
    """Print the search, and leave it in a folder.  rows: [dict(method, setting, command, runs, distance)]"""
    lines = report.markdown_lines(["method", "setting", "distance, 2 steps", "of each seed"], body(rows, args.seeds))
    folder = folder_of(args)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS[:args.seeds]
    head = dict(data=args.data, inputs=inputs_of(args.data), start=args.start, seeds=seeds, torch=torch.__version__,
                cores=usable_cores())
    write_atomic(folder / "runs.json", json_text(dict(head, rows=rows), indent=1) + "\n")
    text = "\n".join(lines)
    finals, bold = f", the best two of\na method on seed {SEEDS[1]} too", "the lower mean of the two"
    if args.seeds == 1:
        finals, bold = " alone", "the lowest of a method"
    write_atomic(folder / "README.md", f"""# Search on {data_name(args.data)}, start: {args.start}

Made by `{args.command}`, torch {torch.__version__}.  Every setting on seed {SEEDS[0]}{finals}; no table reports
these seeds.  The distance is after the last step, with the sampler
that the network was trained for; **bold**: {bold}.  [runs.json](runs.json): the command of every
setting, and every evaluation of every seed.

{text}
""")
    print(f"{text}\n\nwrote README.md and runs.json into {folder}")


def body(rows, seeds=2):
    """Cells of the table; the best setting of a method is bold."""
    best = {}                                                         # {method: the lower mean of its finalists}
    for row in rows:
        if len(row["distance"]) == seeds:
            best[row["method"]] = min(best.get(row["method"], np.inf), np.mean(row["distance"]))
    cells = []
    for row in rows:
        text = f"{np.mean(row['distance']):.1f}" if row["distance"] else "failed"
        if len(row["distance"]) == seeds and np.mean(row["distance"]) == best[row["method"]]:
            text = f"**{text}**"
        each = ", ".join(f"{value:.1f}" for value in row["distance"])
        cells.append([row["method"], f"`{row['setting']}`", text, each])
    return cells


if __name__ == "__main__":
    main(run, parse_args)
