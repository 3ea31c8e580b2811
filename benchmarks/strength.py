"""When does the distribution-matching term help?  FSF-DMD minus its own L_CD, over the strength of the start.

    python benchmarks/strength.py                                   # digits: 4 starts x (CD + 3 lambdas) x 3 seeds
    python benchmarks/strength.py --data /usr/share/datasets/fashion-mnist --starts 300 1500 --lam 0.03 0.1 --steps 174

A start is an iMF of so many steps; from it consistency distillation with random masking, and FSF-DMD (M = 2, k = 10)
with each lambda, for as many steps, so that they differ in lambda L_FSF alone.  (Images of 24 to 64 pixels need
--steps: there the presets have one number of forward passes.  A step takes 13 passes, of CD 5: --cd_steps 452 beside
--steps 174 gives both as many passes.)  --omega 3 guides teacher, fake side and samples by that scale.
Shown is the paired difference over seeds, at 1 and 2 sampling steps, of distance, precision and recall, against the
start's own distance at 2 steps.
Runs are kept, stopped and continued as reproduce.py's.  Leaves README.md, runs.json and strength.png in --out; other
starts and lambdas of an earlier call into the same --out, with the same data, steps, seeds and code, stay in them.
"""
import shlex
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from common import BadInput, main  # noqa: E402
from data import data_kind, preset_kind  # noqa: E402
from plumbing import report  # noqa: E402
from plumbing.files import json_text, read_json, write_atomic  # noqa: E402
from plumbing.flags import Parser, data_source, folder_path, number, result_folder  # noqa: E402
from plumbing.kept_runs import default_jobs, refuse_torchrun, run_all, sources_of  # noqa: E402
from reproduce import CD_MASKED, FSF, STARTS, job, usable_data  # noqa: E402

SHOWN = ("fd_1step", "fd_2step", "precision_2step", "recall_2step")
TITLES = ("distance, 1 step", "distance, 2 steps", "precision, 2 steps", "recall, 2 steps")


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--data", type=data_source, default="digits", help="as in reproduce.py, of pixels")
    p.add_argument("--starts", type=number(int, 1), nargs="+", default=[100, 200, 400, 800], help="steps of the starts")
    p.add_argument("--steps", type=number(int, 1), help="steps of both methods (default: the presets')")
    p.add_argument("--cd_steps", type=number(int, 1), help="steps of consistency distillation (default: as many)")
    p.add_argument("--omega", type=number(float, 1),
                   help="CFG scale of both methods (default: the presets'); the start has to know it (images: up to 4)")
    p.add_argument("--lam", type=number(float, 0, open_low=True), nargs="+", default=[0.01, 0.05, 0.2],
                   help="lambdas of Eq. 15")
    p.add_argument("--seeds", type=number(int, 1), default=3, help="seeds 0, 1, ...")
    p.add_argument("--jobs", type=number(int, 1), default=default_jobs(), help="runs at a time")
    p.add_argument("--runs", type=folder_path, default="runs/reproduce", help="folder of the runs that are kept")
    p.add_argument("--out", type=result_folder, default="runs/strength", help="folder of the results")
    args = p.parse_args(argv)
    args.starts, args.lam = sorted(set(args.starts)), sorted(set(args.lam))
    return args


def run(args):
    refuse_torchrun()
    usable_data(args.data)
    if data_kind(args.data) == "latents":
        raise BadInput(f"--data {args.data}: holds latents, expected pixels")
    if preset_kind(args.data) == "images" and not args.steps:
        raise BadInput(f"--data {args.data}: needs --steps, the presets of the two methods differ in theirs")
    jobs = planned(args)
    failed = run_all(args, list(jobs.values()))
    if failed:
        raise BadInput(f"{len(failed)} runs failed: {'; '.join(j.folder.name for j in failed)}")
    made_of = {}
    for each in jobs.values():
        made_of |= sources_of(each)
    write(args, differences(args, jobs), made_of)


def planned(args):
    """{(steps of the start, lambda, "CD" or "start", seed): kept_runs.Job}."""
    args.init, args.start, args.size, args.precision = None, "weak", None, None         # what reproduce.job looks at
    length = f" --steps {args.steps}" if args.steps else ""
    cd_length = f" --steps {args.cd_steps}" if args.cd_steps else length
    guided = f" --omega {args.omega:g}" if args.omega else ""
    jobs = {}
    for steps in args.starts:
        for seed in range(args.seeds):
            start = job(args, f"{STARTS['imf']} --steps {steps}", seed)
            jobs[steps, "start", seed] = start
            jobs[steps, "CD", seed] = job(args, CD_MASKED + cd_length + guided, seed, start)
            for lam in args.lam:
                jobs[steps, lam, seed] = job(args, f"{FSF} --M 2 --shift 10 --lam {lam}{length}{guided}", seed, start)
    return jobs


def differences(args, jobs):
    """A row for each start and lambda: the start's distance, and what FSF-DMD's metrics differ by from CD's."""
    kind = data_kind(args.data)
    runs = {key: report.collect(j, kind) for key, j in jobs.items()}
    report.refuse_mixed(runs.values())
    found = {key: each["evaluations"] for key, each in runs.items()}
    last = {key: evaluations[-1] for key, evaluations in found.items()}
    rows = []
    for steps in args.starts:
        of_start = [found[steps, "CD", seed][0]["fd_2step"] for seed in range(args.seeds)]      # at step 0, this omega
        for lam in args.lam:
            difference = {}
            for name in SHOWN:
                difference[name] = [last[steps, lam, seed][name] - last[steps, "CD", seed][name]
                                    for seed in range(args.seeds)]
            rows.append(dict(start_steps=steps, start_distance=of_start, lam=lam, difference=difference,
                             cd=[last[steps, "CD", seed]["fd_2step"] for seed in range(args.seeds)]))
    return rows


def with_earlier(path, stored):
    """`stored`, with the rows and commands of the runs.json at `path`, if one is there and was measured alike."""
    if not path.is_file():
        return stored
    earlier = read_json(path, "an earlier call's runs")
    alike = ("data", "seeds", "steps", "cd_steps", "omega", "sources")
    if any(earlier.get(name) != stored.get(name) for name in alike):
        return stored
    measured = {(row["start_steps"], row["lam"]) for row in stored["rows"]}
    kept = [row for row in earlier["rows"] if (row["start_steps"], row["lam"]) not in measured]
    rows = sorted(kept + stored["rows"], key=lambda row: (row["start_steps"], row["lam"]))
    commands = list(dict.fromkeys(earlier["commands"] + stored["commands"]))
    return dict(stored, rows=rows, commands=commands if kept else stored["commands"])


def write(args, rows, made_of):
    args.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/strength.py", *sys.argv[1:]])
    head = dict(data=args.data, seeds=args.seeds, steps=args.steps, cd_steps=args.cd_steps, omega=args.omega,
                torch=torch.__version__, sources=made_of)
    stored = with_earlier(args.out / "runs.json", dict(head, commands=[command], rows=rows))
    rows, commands = stored["rows"], " and ".join(f"`{command}`" for command in stored["commands"])
    write_atomic(args.out / "runs.json", json_text(stored, indent=1) + "\n")
    write_atomic(args.out / "strength.png", lambda path: figure(rows).savefig(path, format="png", dpi=100))
    text = "\n".join(table(rows))
    write_atomic(args.out / "README.md", f"""# FSF-DMD minus its L_CD, over the strength of the start: {args.data}

Made by {commands}, torch {torch.__version__};
paired differences over {args.seeds} seeds, mean ± standard deviation.  [runs.json](runs.json): of every seed.

{text}

![The differences against the start's distance](strength.png)
""")
    print(f"{text}\n\nwrote README.md, runs.json and strength.png into {args.out}")


def table(rows):
    """Markdown lines."""
    digits = (1, 1, 3, 3)
    body = []
    for row in rows:
        cells = [str(row["start_steps"]), report.spread(row["start_distance"], 1), report.spread(row["cd"], 1),
                 f"{row['lam']:g}"]
        for name, places in zip(SHOWN, digits):
            cells.append(report.spread(row["difference"][name], places, "+"))
        body.append(cells)
    return report.markdown_lines(["start, steps", "its distance", "after CD", "lambda", *TITLES], body)


def line_of_means(axis, at, values, i, label):
    """In colour i the means of `values`, lists over the seeds, at the places `at`; bars: their standard errors."""
    errors = [np.std(each, ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0 for each in values]
    axis.errorbar(at, [np.mean(each) for each in values], errors, fmt=".-", capsize=2, color=f"C{i}", label=label)


def frame(axis, title, xlabel):
    """Of a panel of differences."""
    axis.axhline(0, color="gray", linewidth=0.7)
    axis.set_xscale("log")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel)


def figure(rows):
    """A panel for each metric: the mean difference against the start's distance, a line a lambda; bars: its error."""
    drawing = matplotlib.figure.Figure(figsize=(13, 3.4), layout="constrained")
    largest = {}
    for name in SHOWN:
        largest[name] = max(abs(np.mean(row["difference"][name])) for row in rows)
    lams = list(dict.fromkeys(row["lam"] for row in rows))
    for axis, name, title in zip(drawing.subplots(1, len(SHOWN)), SHOWN, TITLES):
        for i, lam in enumerate(lams):
            of_lam = sorted((row for row in rows if row["lam"] == lam), key=lambda row: np.mean(row["start_distance"]))
            at = [np.mean(row["start_distance"]) for row in of_lam]
            line_of_means(axis, at, [row["difference"][name] for row in of_lam], i, f"lambda {lam:g}")
        frame(axis, f"FSF-DMD minus CD: {title}", "distance of the start, 2 steps")
        if largest[name] > 50:                                          # a seed that is lost would hide all the others
            axis.set_yscale("symlog", linthresh=10)
            axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=7)
    return drawing


if __name__ == "__main__":
    main(run, parse_args)
