"""Runs of a table as statistics over seeds, Markdown tables, curves and samples.

reproduce.py shows its tables with it; search.py and the benchmarks use parts.
A run is what `collect` reads from its folder.  A row is an entry of `summary`: the runs of one row of a table, by seed.
A table and its rows are reproduce.py's Table and Row, its jobs kept_runs.py's Job.
"""
import json
import math
import re
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel

from common import BadInput, pick_device
from data import data_kind, data_name, load_data, preview
from evaluate import decoder_for, generate, parse_args, real_images, restated, sampling, steps_in
from plumbing.checkpoints import load_checkpoint, load_network
from plumbing.files import json_text, read_json, read_lines, write_atomic
from plumbing.passes import passes_a_step, passes_until

# Our metrics: name here, name in fid.json of evaluate.py (None: not there), digits shown.
METRICS = [
    ("fd", "fid", 1),
    ("is", "is", 2),
    ("precision", "precision_inception", 3),
    ("recall", "recall_inception", 3),
    ("acc", None, 3),
]


# ---- One run ---------------------------------------------------------------------------------------------------------

def rounded(evaluation):
    """Of an evaluation every number to 4 digits; null, which json_text writes for what is not finite, is NaN."""
    found = {}
    for name, value in evaluation.items():
        if value is None:
            value = math.nan
        found[name] = round(value, 4) if isinstance(value, float) else value
    return found


def collect(job, kind):
    """One run: dict(evaluations=[{step, fd_2step, ...}], sec_per_step, memory_gb, passes, measured).

    kind: of data, as in data_kind.  passes: forward passes a step, None of a row that trains nothing.  measured: by
    which classifier, or of latents what its FID is called.
    """
    measured = None
    if kind == "latents":
        evaluations = read_fids(job.folder)
        labels = {read_json(path, "an evaluation").get("label") for path in job.folder.glob("fid_*/fid.json")}
        if len(labels) > 1:                                           # by hand, without --out
            raise BadInput(f"{job.folder}: holds FIDs of several kinds ({', '.join(sorted(map(str, labels)))}); remove "
                           "the fid.json of those that do not belong, and the same command makes them again")
        measured = next(iter(labels), None)
    elif job.command[0] == "evaluate.py":
        found = read_json(job.folder / "evaluation.json", "an evaluation")
        evaluations = [dict(step=0) | {k: v for k, v in found.items() if k.endswith("step")}]
        measured = classifier_of(found)
    else:
        result = read_json(job.folder / "result.json", "the result of a run")
        evaluations, measured = result["evaluations"], classifier_of(result)
    evaluations = [rounded(evaluation) for evaluation in evaluations]

    lines = []
    path = job.folder / "metrics.jsonl"
    if path.exists():
        lines = read_lines(path)
    passes, warmup, path = None, 0, job.folder / "args.json"
    if path.exists():
        flags = read_json(path, "the flags of a run")
        passes, warmup = passes_a_step(job.command[0], flags), flags.get("warmup", 0)
        for evaluation in evaluations:
            done = passes_until(job.command[0], flags, evaluation["step"])
            evaluation["passes"] = round(passes_before(job) + done, 1)
    seconds = [line["sec_per_step"] for line in lines if "sec_per_step" in line and line["step"] > warmup]
    memory = [line.get("memory_gb", 0) for line in lines]
    return dict(
        evaluations=evaluations,
        sec_per_step=round(float(np.median(seconds)), 4) if seconds else None,
        memory_gb=round(max(memory), 3) if memory else None,
        passes=passes,
        measured=measured,
    )


def classifier_of(result):
    """In the features of which classifier an evaluation was made, from its definition; None: not said."""
    found = re.search(r"classifier of .* \(weights (\w+)", result.get("definition", ""))
    return f"classifier {found[1]}" if found else None


def passes_before(job):
    """Of a row that starts from a distilled network (its teacher is the start): that distillation's passes, else 0."""
    if "--teacher" not in job.command or not job.start:
        return 0
    flags = read_json(job.start.folder / "args.json", "the flags of a run")
    return passes_until(job.start.command[0], flags, load_checkpoint(job.start.folder / "model.pt")["step"])


def read_fids(folder):
    """[{step, fd_2step, ...}] of the folders fid_<training step>_<N>step of a run on latents; `fd` is the FID."""
    evaluations = {}
    for path in sorted(folder.glob("fid_*/fid.json")):
        at, N = map(int, re.findall(r"\d+", path.parent.name))
        values = read_json(path, "an evaluation")
        evaluation = evaluations.setdefault(at, dict(step=at))
        for name, theirs, _ in METRICS:
            if theirs in values:
                evaluation[f"{name}_{N}step"] = values[theirs]
    return [evaluations[at] for at in sorted(evaluations)]


# ---- Statistics over seeds -------------------------------------------------------------------------------------------

def summary(table_rows, runs):
    """{row number: dict} with each Row's label, the paper's values, its runs by seed, their last and best values.

    table_rows: {row number: Row}; runs: {row number: {seed: `collect`}}.
    """
    refuse_mixed(run for of_row in runs.values() for run in of_row.values())
    return {r: summarise(r, row, runs.get(r, {})) for r, row in table_rows.items()}


def refuse_mixed(runs):
    """BadInput if runs (`collect`) were measured by different classifiers, or by FIDs of other numbers of samples."""
    used = {run.get("measured") for run in runs} - {None}
    if len(used) > 1:
        raise BadInput(f"the runs were measured in several ways ({', '.join(sorted(used))}), so their distances do not "
                       "compare; pass another --runs")


def summarise(number, row, runs):
    seeds = {seed: run for seed, run in runs.items() if run["evaluations"]}
    finals = [run["evaluations"][-1] for run in seeds.values()]
    last = {}
    for name in finals[0] if finals else ():
        if "_" in name and all(name in final for final in finals):    # a FID of 1 step may be there for some seeds only
            last[name] = [final[name] for final in finals]
    shown = steps_in(last)
    N = shown[0] if len(shown) == 1 else 2                           # a velocity is sampled with its own number
    best = []
    for run in seeds.values():
        trained = [e for e in run["evaluations"] if e["step"] > 0]
        best.append(min(trained or run["evaluations"], key=lambda e: np.nan_to_num(e[f"fd_{N}step"], nan=np.inf)))
    return dict(
        number=number,
        label=row.label,
        paper=row.paper,
        n=len(seeds),
        N=N,
        seeds=seeds,
        last=last,
        best=[e[f"fd_{N}step"] for e in best],
        step=[e["step"] for e in best],
        sec_per_step=[run["sec_per_step"] for run in seeds.values() if run["sec_per_step"]],
        memory_gb=[run["memory_gb"] for run in seeds.values() if run["memory_gb"]],
        passes=next((run["passes"] for run in seeds.values() if run.get("passes")), None),
    )


def compare(rows, reference, metric):
    """{row: [mean of the paired differences to the reference row, p of the paired t-test after Holm's correction]}.

    Pairs are of the seeds that both rows have; fewer than three show nothing.  Rows with the same values in every seed
    are one sampler under two names, and count once.
    """
    if reference not in rows:
        return {}
    base, found = rows[reference], {}
    for r, row in rows.items():
        common = [seed for seed in row["seeds"] if seed in base["seeds"]]
        if r == reference or len(common) < 3:
            continue
        ours = [final_value(row, seed, metric) for seed in common]
        theirs = [final_value(base, seed, metric) for seed in common]
        difference = np.subtract(ours, theirs)
        p = ttest_rel(ours, theirs).pvalue if difference.std() > 0 else 1.0
        found[r] = [difference.mean(), p]
    # Holm: the i-th smallest p of m, times m - i, never below the one before.
    twins = {}                                                       # values of a row -> the rows that have them
    for r in sorted(found, key=lambda r: found[r][1]):
        values = tuple(final_value(rows[r], seed, metric) for seed in rows[r]["seeds"])
        twins.setdefault(values, []).append(r)
    worst = 0.0
    for i, same in enumerate(twins.values()):
        worst = max(worst, min(1.0, found[same[0]][1] * (len(twins) - i)))
        for r in same:
            found[r][1] = worst
    return found


def final_value(row, seed, metric):
    """A metric of the last evaluation of one seed, at the row's number of sampling steps; NaN if not measured."""
    return row["seeds"][seed]["evaluations"][-1].get(f"{metric}_{row['N']}step", math.nan)


# ---- Markdown --------------------------------------------------------------------------------------------------------

def spread(values, digits, sign=""):
    """mean +- standard deviation, as text; sign="+": a mean above 0 has its sign."""
    if not values:
        return "-"
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def difference_text(difference, digits):
    """An entry of `compare` as text; a dash where there is none."""
    if difference is None:
        return "-"
    mean, p = difference
    star = "*" if p < 0.05 else ""
    return f"{mean:+.{digits}f}{star} (p {p:.2g})"


PAPER_TEXT = [
    ("peak_step", "at {}"),
    ("sec_per_step_b200", "{} s/step"),
    ("sec_per_step_a100", "{} s/step (A100)"),
    ("recall", "recall {} (VGG16)"),
    ("precision", "precision {} (VGG16)"),
    ("is", "IS {}"),
]


def paper_text(values):
    """The paper's values in one cell; a dash where our copy of the paper has lost the FID."""
    if "fid_1step" in values:                                        # Table 5
        fids = [values["fid_1step"], values["fid_2step"]]
        text = " / ".join("-" if fid is None else str(fid) for fid in fids)
    else:
        text = str(values.get("fid", "-"))
    more = [form.format(values[name]) for name, form in PAPER_TEXT if values.get(name) is not None]
    return ", ".join([text, *more])


def markdown_lines(header, rows):
    """A Markdown table as lines."""
    lines = [markdown_line(header), "|" + "---|" * len(header)]
    return lines + [markdown_line(cells) for cells in rows]


def markdown_line(cells):
    """| a | b |, and | | b | where the first cell is empty."""
    return " ".join(f"| {cell}" if cell != "" else "|" for cell in cells) + " |"


def distance_name(kind, rows):
    """What the distances are called: the paper's name is that of 50,000 samples alone."""
    if kind != "latents":
        return "distance"
    names = {run.get("measured") for row in rows.values() for run in row["seeds"].values()} - {None}
    return " or ".join(sorted(names)) or "FID"


def markdown(kind, table, rows):
    """The two tables as Markdown: the paper beside ours, and every metric at every number of sampling steps."""
    return "\n".join([*beside_the_paper(kind, table, rows), "", *all_metrics(kind, rows)])


def beside_the_paper(kind, table, rows):
    name, against = distance_name(kind, rows), f"against row {table.reference}"
    one_step = any("fid_1step" in row["paper"] for row in rows.values())        # Table 5: FIDs of 1 step and of 2
    header = ["", table.title, "paper: FID of 1 / 2 steps" if one_step else "paper: FID"]
    if one_step:
        header.append(f"{name}, 1 step")
    header += [f"{name}, 2 steps: last", "best", "at step", against, "IS, 2 steps", against, "passes a step", "s/step",
               "GB", "n"]
    distances, scores = compare(rows, table.reference, "fd"), compare(rows, table.reference, "is")

    body = []
    for r, row in rows.items():
        last, N, trained = row["last"], row["N"], bool(row["sec_per_step"])
        label = f"{row['label']} ({N} Euler steps)" if N > 4 else row["label"]
        cells = [r, label, paper_text(row["paper"])]
        if one_step:
            cells.append(spread(last.get("fd_1step"), 1))
        cells.append(spread(last.get(f"fd_{N}step"), 1))
        cells.append(spread(row["best"], 1) if trained else "-")
        cells.append(", ".join(map(str, row["step"])) if trained else "-")
        cells.append(difference_text(distances.get(r), 1))
        cells.append(spread(last.get(f"is_{N}step"), 2))
        cells.append(difference_text(scores.get(r), 2))
        cells.append(f"{row['passes']:.1f}" if row["passes"] else "-")
        cells.append(f"{np.median(row['sec_per_step']):.3f}" if trained else "-")
        cells.append(f"{max(row['memory_gb']):.2f}" if trained else "-")
        cells.append(row["n"] or "not run here")
        body.append(cells)
    return markdown_lines(header, body)


def all_metrics(kind, rows):
    header = ["", "last, all metrics", "steps", distance_name(kind, rows), "IS", "precision", "recall", "accuracy"]
    body = []
    for r, row in rows.items():
        for N in steps_in(row["last"]):
            values = [spread(row["last"].get(f"{name}_{N}step"), digits) for name, _, digits in METRICS]
            body.append([r, row["label"], N, *values])
    return markdown_lines(header, body)


# ---- Pictures --------------------------------------------------------------------------------------------------------

def levels_of(table):
    """The numbers of the rows that are drawn as a level, not as a curve: the start itself and the control."""
    mixed = any(row.start for row in table.rows)
    return {r for r, row in enumerate(table.rows, 1) if row.command is None or mixed and row.start is None}


def curve(row, key):
    """(steps at which every seed was evaluated, values [seeds, steps] of the metric `key`); None if one lacks it."""
    seeds = [run["evaluations"] for run in row["seeds"].values()]
    if not seeds:
        return None
    for evaluations in seeds:
        if any(key not in e for e in evaluations):
            return None
    steps = {e["step"] for e in seeds[0]}
    for evaluations in seeds:
        steps &= {e["step"] for e in evaluations}
    values = []
    for evaluations in seeds:
        values.append([e[key] for e in evaluations if e["step"] in steps])
    return sorted(steps), np.array(values)


def paired_error(row, base, key, steps, values):
    """Standard error [steps] of the paired difference to the row `base`; NaN where that has no such seed or step."""
    theirs = []
    for seed in row["seeds"]:
        evaluations = base["seeds"][seed]["evaluations"] if base and seed in base["seeds"] else []
        at = {e["step"]: e.get(key, np.nan) for e in evaluations}
        theirs.append([at.get(step, np.nan) for step in steps])
    return (values - np.array(theirs)).std(0) / max(1, len(values) - 1) ** 0.5


def figure(kind, table, rows, path):
    """Metric against step (the paper's Fig. 3), distance against forward passes: at 2 sampling steps, mean over seeds.

    The passes are without the start's.  Band: the standard error of the paired difference to the reference row, at
    steps at which both were evaluated.
    """
    # Half a second: only where it is used.
    import matplotlib.figure
    import matplotlib.ticker

    drawing = matplotlib.figure.Figure(figsize=(13, 4.2), layout="constrained")
    distance, cost, score = drawing.subplots(1, 3)
    name = "FID, 2 steps" if kind == "latents" else "Frechet distance, 2 steps"
    handles = {}
    for axis, metric, title, unit in ((distance, "fd", name, "step"), (cost, "fd", name, "forward passes"),
                                      (score, "is", "Inception Score, 2 steps", "step")):
        handles |= draw_curves(axis, metric, table, rows, against_passes=unit != "step")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit)
    for axis in (distance, cost):
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.tick_params(axis="y", which="both", labelsize=8)
    title = "mean over seeds"
    if table.reference in rows:
        title += f"; band: standard error of the paired difference to row {table.reference}, where both were evaluated"
    drawing.suptitle(title, fontsize=8)
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    write_atomic(path, lambda temporary: drawing.savefig(temporary, format="png", dpi=100))


def draw_curves(axis, metric, table, rows, against_passes=False):
    """The rows of a table on one axis, against steps or passes.  -> {label: its line}"""
    styles, levels, handles = ["-", "--", ":", "-."], levels_of(table), {}
    from_scratch = not any(row.start for row in table.rows)
    base = rows.get(table.reference)
    alpha = 0.1 if len(rows) < 12 else 0.03
    for i, row in enumerate(rows.values()):
        key, label = f"{metric}_{row['N']}step", f"{row['number']} {row['label']}"
        found = curve(row, key)
        if found is None:
            continue
        steps, values = found
        alone = len(steps) == 1
        if alone and from_scratch:                                   # trained, and measured at the end only
            x = row["passes"] * steps[0] if against_passes else steps[0]
            [handles[label]] = axis.plot(x, values.mean(), "o", color=f"C{i}")
            continue
        if alone or row["number"] in levels:                         # not trained, or the control
            color, style = ("black", "gray")[i % 2], styles[1 + i % 3]
            handles[label] = axis.axhline(values[:, -1].mean(), linewidth=1, color=color, linestyle=style)
            continue
        mean, error = values.mean(0), paired_error(row, base, key, steps, values)
        if against_passes:
            at = {e["step"]: e.get("passes", np.nan) for e in next(iter(row["seeds"].values()))["evaluations"]}
            steps = [at[step] for step in steps]
        color, style = f"C{i % 10}", styles[i % 4]
        handles[label] = axis.plot(steps, mean, marker=".", color=color, linestyle=style)[0]
        axis.fill_between(steps, mean - error, mean + error, color=color, alpha=alpha, linewidth=0)
    return handles


def samples(args, rows, jobs, path):
    """Samples of every row of the first seed from the same noise (the paper's Fig. 4): one of each of ten classes.

    Of 1 and 2 sampling steps, or the row's own number; beside each, the forward passes that its training took.
    """
    data, device = load_data(args.data), pick_device("auto")
    classes = min(data.num_classes, 10)
    bands = [("real", real_images(data, classes))]
    for r, row in rows.items():
        if not row["n"]:
            continue
        job = jobs[r][min(row["seeds"])]
        evaluated = job.command[0] == "evaluate.py"
        flags = parse_args(job.command[1:] if evaluated else [str(job.folder / "model.pt")])
        net, checkpoint = load_network(flags.what, data)
        net = net.to(device)
        restate = restated(checkpoint, data)
        omega, guide_to, channels, sampler = sampling(flags, checkpoint)
        cost = row["seeds"][min(row["seeds"])]["evaluations"][-1].get("passes", 0)
        trained = f"; trained for {cost:,.0f} passes" if cost else ""
        for N in (1, 2) if row["N"] == 2 else (row["N"],):
            x, _ = generate(net, classes, data.x.shape[1:], N, omega, guide_to, channels, classes=classes,
                            sampler=sampler, shift=flags.shift)
            bands.append((f"{r} {row['label']}: {N} step{'s' if N > 1 else ''}{trained}", restate(x)))
    preview(path, bands, data.meta, decoder_for(data, args, device))


# ---- The folder of a table -------------------------------------------------------------------------------------------

def page(head, command, tables, rows):
    """README.md of a table's folder.  head: of its runs.json; command: what made it; tables: `markdown`."""
    cost = ""                                                         # a network that is only evaluated has none
    if any(row["passes"] for row in rows.values()):
        cost = ", distance also against passes"
    regime = f", {head['start']} start" if head["start"] else ""
    regime += f", {head['network']}" if head.get("network") else ""
    torch_version = head["sources"]["torch"]
    here = f"{head['device']} ({head['cores']} cores, {head['jobs']} runs at a time)"
    machines = " and on ".join(head.get("machines") or [here])        # older results do not say where each run was made
    return f"""# Table {head['table']}, {head['title']}: {head['data']}{regime}

Made by `{command}` on {machines}, torch {torch_version}.

Mean ± standard deviation over n seeds. `last`: after the last step; `best`: the best evaluation on the way, at `step`.
`against row {head['reference']}`: mean of the paired differences over seeds; `*` marks p < 0.05 in a paired t-test,
after Holm's correction over the rows of the table.

* [runs.json](runs.json): the command of every row, and every evaluation of every seed
* [curves.png](curves.png): distance and IS at 2 steps against training step{cost}
* [samples.png](samples.png): every row from the same noise, seed 0

{tables}
"""


def runs_json(head, rows, commands):
    """The text of runs.json: head, and one line a row."""
    lines = []
    for r, row in rows.items():
        entry = {name: row[name] for name in ("number", "label", "paper", "N")}
        entry |= dict(command=commands[r], seeds=row["seeds"])
        lines.append(json_text(entry, separators=(",", ":")))
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def folder_of(args, start):
    """The folder in args.out of a table; start: weak, strong, the name of --init, or ""."""
    some = "row" + "-".join(map(str, args.row)) if args.row else ""  # a few rows do not replace the whole table
    size = (args.size or "").replace("/", "")
    parts = [f"table{args.table}", data_name(args.data), start, size, args.precision, some]
    return args.out / "-".join(part for part in parts if part)


def stored_runs(folder):
    """What the runs.json in a folder of results holds; {} where there is none."""
    path = folder / "runs.json"
    return read_json(path, "earlier results") if path.exists() else {}


def seeds_in(folder):
    """{row number: number of seeds} of the table that a folder holds."""
    return {row["number"]: len(row["seeds"]) for row in stored_runs(folder).get("rows", [])}


def refuse_other_results(folder, data, inputs=None):
    """BadInput if a folder of results is of other data or another start: it is named by the last part of their paths.

    inputs: {"data" or "init": [path, hash]}, `kept_runs.inputs_of`; a runs.json of earlier versions holds none.
    """
    stored, inputs = stored_runs(folder), inputs or {}
    before, known = stored.get("data", data), stored.get("inputs", {})
    if "data" not in known.keys() & inputs.keys() and Path(before).resolve() != Path(data).resolve():
        raise BadInput(f"{folder}: holds the results of --data {before}; pass another --out")
    for name in known.keys() & inputs.keys():
        if not {*known[name]} & {*inputs[name]}:
            raise BadInput(f"{folder}: holds the results of another --{name} of that name, {known[name][0]}; "
                           "pass another --out")


def write(args, table, head, rows, jobs, commands):
    """Write and print a table: a folder in args.out with README.md, runs.json, curves.png and samples.png.

    rows: `summary`; jobs: {row number: {seed: Job}}; commands: {row number: command line}.
    """
    kind = data_kind(args.data)
    folder = folder_of(args, head["start"])
    folder.mkdir(parents=True, exist_ok=True)
    tables = markdown(kind, table, rows)
    write_atomic(folder / "README.md", page(head, args.command, tables, rows))
    write_atomic(folder / "runs.json", runs_json(head, rows, commands))
    figure(kind, table, rows, folder / "curves.png")
    samples(args, rows, jobs, folder / "samples.png")
    print(f"{tables}\n\nwrote README.md, runs.json, curves.png and samples.png into {folder}")
