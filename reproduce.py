"""One table of the paper, as commands of these scripts: run, kept, and shown with the paper's numbers beside ours.

Paper: Kim, Lee, Park, "Distribution Matching Distillation without Fake Score Network", arXiv 2605.19256; its numbers:
golden/paper_tables.json.

    python reproduce.py 2                    # Table 2 on digits: 12 rows x 5 seeds, about an hour on 2 cores
    python reproduce.py 2 --start strong     # from an iMF trained twice as long
    python reproduce.py 2 --list             # the commands, to paste
    python reproduce.py 2 --row 3 7 --seeds 1  # two rows, one seed
    python reproduce.py 2 --data /usr/share/datasets/fashion-mnist --row 1 3 4 7 --seeds 1
    python reproduce.py 2 --data latents --vae VAE --inception WEIGHTS --ref REFERENCE --seeds 1 --fid_every 1000
                                             # the paper's own setting

Also tables 3, 4, 5, 7, 8, 9, and 10 (rows of 2 and 4).  What one step of every method costs: cost.py.

Every row is the command line of a script, run as a user would, once for each seed, from a start of the same seed.
A run is kept in runs/reproduce/ under its arguments and runs again only if a file that it executes, its data, its
--init or torch has changed, which is said.  Ctrl-C saves; the same command goes on, and ends with the same table.
Leaves a folder table<N>-<data>-<start> in --out: README.md (the table), runs.json (every evaluation), curves.png
(metric against step) and samples.png (the same noise in every row).

Protocol (digits).  Settings were chosen on seeds 100 and 101, as many for each method of a start (search.py;
exceptions: RESULTS.md, Protocol); reported are 0 to 4.  `last`: after the preset's steps; `best`: the best of
the evaluations on the way, at `step`.  Values are mean +- standard deviation over seeds.  A difference to the table's
reference row is the mean of the paired differences over seeds; * marks p < 0.05 in a paired t-test after Holm's
correction over the rows of the table.  Five seeds see large effects only.
"""
import json
import shlex
import sys
from collections import namedtuple
from pathlib import Path

import torch

import consistency
from common import BadInput, main, usable_cores
from data import data_kind, data_name, load_data, preset_kind
from evaluate import EULER_STEPS, decoder_for
from fid import read_reference
from inception import load_inception
from metrics import refuse_few
from model import SIZES
from plumbing import report
from plumbing.checkpoints import load_checkpoint, new_network, refuse_jumps, refuse_other_data
from plumbing.files import HERE
from plumbing.flags import Parser, data_source, folder_path, network_name, number
from plumbing.kept_runs import (Job, chain, default_jobs, inputs_of, is_done, machine, record, refuse_torchrun, run_all,
                                sources_of)
from plumbing.passes import refuse_uncounted
from plumbing.run_folder import check_writable

PAPER = json.loads((HERE / "golden" / "paper_tables.json").read_text())

# ---- The rows --------------------------------------------------------------------------------------------------------

# label: in the paper.  paper: its values, {column: value}.  start: imf, fm, or None (from scratch).
# command: None for the start itself; {start} stands for its model.pt, other names in braces for FLAGS.
# via: a command from that start whose model.pt stands for {via} in the row's own command.
# base: of a control the command that trained as it does, for fewer steps: with latents it goes on from there.
Row = namedtuple("Row", "label paper start command via base", defaults=[None, None])

# reference: number of the row that the others are compared with.
Table = namedtuple("Table", "title reference rows")

STARTS = {
    "imf": "consistency.py --loss imf",
    "fm": "consistency.py --loss fm",
}

# The same rows on three kinds of data (data.preset_kind); where the flags differ, a name in braces stands for them.
KINDS = ("pixels", "images", "latents")
FLAGS = {
    # the iMF of --start strong
    "strong": (" --steps 800", " --steps 3000", ""),
    # the iMF of Table 5, where it is no start
    "imf":    (" --mask_prob 0.5 --lr 0.012 --eval_every 100", " --mask_prob 0.5 --lr 0.016", ""),
    # iMF and RCGM for the passes that TwinFlow on them has (plumbing/passes.py)
    "long":   (" --steps 1100", " --steps 3680 --eval_every 736", " --steps 982000"),
    "rlong":  (" --steps 1040", " --steps 3210 --eval_every 642", " --steps 857000"),
    "m1":     (" --lam 0.01", " --steps 225", ""),
    "cd_fm":  ("", " --lr 0.002", ""),
    # LightningDiT: timestep shift 0.3
    "euler":  ("", "", " --steps 250 --shift 3.3333"),
    "fm_all": ("", "", " --cfg_channels 0"),
    "fm_few": (" --cfg_channels 1", " --cfg_channels 1", " --cfg_channels 3"),
}

# From the strong start of the digits other settings are the best (results/search-digits-strong); elsewhere: presets.
FLAGS_STRONG = {
    "cd":     " --lr 0.004",
    "fsf":    " --lr 0.004",                                          # the rate of its L_CD
    "m1":     " --lam 0.05",
    "dmd2":   " --lr 0.001 --fake_lr 0.003",
    "cd1":    " --lam 0.1 --lr 0.003 --fake_lr 0.003",
}

# {control}, for (kind of data, --start): the start's steps, and those of a distillation (200; latents 4,000) or, of
# images, 525, which have its passes.
CONTROL = {
    ("pixels", "weak"): 600,
    ("pixels", "strong"): 1000,
    ("images", "weak"): 2025,
    ("images", "strong"): 3525,
    ("latents", "weak"): 404_000,
}

CD = "consistency.py --loss cd --init {start} --mask_prob 0{cd}"
CD_FM = CD + "{cd_fm}"
CD_MASKED = "consistency.py --loss cd --init {start}{cd}"
FSF = "fsf_dmd.py --init {start}{fsf}"
DMD2 = "dmd2.py --init {start}{dmd2}"
DMD2_CD = "dmd2.py --init {start} --cd 1"
UNTUNED = " --weight one --shift 1 --lam 0.1 --mask_prob 0"           # Table 3 before "+ hyperparameter tuning"

TABLE_2 = {
    "Pretrained flow map (iMF)":               None,
    "Teacher velocity network":                "evaluate.py {start} --sampler euler",
    "Consistency distillation":                CD,
    "DMD2":                                    DMD2,
    "DMD2 + IDA":                              DMD2 + " --ida 0.97",
    "DMD2 + L_CD":                             DMD2_CD + " --mask_prob 0{cd1}",
    "FSF-DMD M=2":                             FSF + " --M 2",
    "FSF-DMD M=1":                             FSF + " --M 1{m1}",
}
TABLE_3 = {
    "Consistency distillation":                CD,
    "+ FSF-DMD (Eq. 14)":                      FSF + " --M 1" + UNTUNED,
    "+ backward simulation (DMD2, Eq. 17)":    FSF + " --M 2 --rollout dmd2" + UNTUNED,
    "+ backward simulation (ours, Eq. 22)":    FSF + " --M 2" + UNTUNED,
    "+ hyperparameter tuning":                 FSF + " --M 2 --mask_prob 0",
    "+ random masking":                        FSF + " --M 2",
    "FSF-DMD, single-step simulation (M=1)":   FSF + " --M 1{m1}",
    "DMD2, single-step simulation":            DMD2 + " --M 1",
    "Consistency distillation + random masking": CD_MASKED,
}
TABLE_4 = {
    "Teacher velocity network":                "evaluate.py {start}{euler}{fm_all}",
    "+ 3-channel CFG":                         "evaluate.py {start}{euler}{fm_few}",
    "Consistency distillation":                CD_FM,
    "DMD2 (TTUR 1:5)":                         DMD2,
    "DMD2 + L_CD (TTUR 1:5)":                  DMD2_CD + " --mask_prob 0",
    "FSF-DMD":                                 FSF,
}
TABLE_5 = {
    "iMF":                                     "consistency.py --loss imf{imf}",
    "iMF + DMD2":                              "dmd2.py --init scratch",
    "iMF + TwinFlow":                          "twinflow.py --base imf",
    "RCGM":                                    "consistency.py --loss rcgm",
    "RCGM + TwinFlow":                         "twinflow.py --base rcgm",
    "FSF-DMD":                                 "fsf_dmd.py --init scratch",
}
TABLE_7 = {                                                           # each without and with the GAN
    "1:1":                                     DMD2 + " --ttur 1",
    "1:2":                                     DMD2 + " --ttur 2",
    "1:3":                                     DMD2 + " --ttur 3",
    "1:4":                                     DMD2 + " --ttur 4",
    "1:5":                                     DMD2,
    "1:5 + IDA":                               DMD2 + " --ida 0.97",
    "1:5 + L_CD":                              DMD2_CD + " --mask_prob 0{cd1}",
    "1:5 + L_CD + random masking":             DMD2_CD + "{cd1}",
}
TABLE_9 = {                                                           # each with every lambda
    "one":                                     FSF + " --lam {lam} --shift 10 --weight one",
    "adaptive":                                FSF + " --lam {lam} --shift 10",
    "one, clipped to [-1,1]":                  FSF + " --lam {lam} --shift 10 --weight one --clip 1",
}
TABLE_10 = {
    "imf: Consistency distillation":           TABLE_2["Consistency distillation"],
    "imf: DMD2":                               TABLE_2["DMD2"],
    "imf: DMD2 + IDA":                         TABLE_2["DMD2 + IDA"],
    "imf: DMD2 + L_CD":                        TABLE_2["DMD2 + L_CD"],
    "imf: FSF-DMD M=2":                        TABLE_2["FSF-DMD M=2"],
    "imf: FSF-DMD M=1":                        TABLE_2["FSF-DMD M=1"],
    "fm: Consistency distillation":            TABLE_4["Consistency distillation"],
    "fm: DMD2 (TTUR 1:5)":                     TABLE_4["DMD2 (TTUR 1:5)"],
    "fm: DMD2 + L_CD":                         TABLE_4["DMD2 + L_CD (TTUR 1:5)"],
    "fm: FSF-DMD":                             TABLE_4["FSF-DMD"],
}
# "We additionally train DMD2 on the consistency-distilled networks and report the better": student and teacher differ.
DMD2_FROM_CD = "dmd2.py --init {via} --teacher {start}{dmd2}"
NOT_IN_TABLE_2 = [                                                    # at the end of ours
    Row("Consistency distillation + random masking (Table 3)", dict(fid=4.98), "imf", CD_MASKED),
    Row("SiD", {}, "imf", "sid.py --init {start}"),
    Row("control: the iMF trained on", {}, None, "consistency.py --loss imf --steps {control}", base=STARTS["imf"]),
    Row("DMD2 from row 3", {}, "imf", DMD2_FROM_CD, CD),
]
NOT_IN_TABLE_4 = [
    Row("DMD2 from row 3", {}, "fm", DMD2_FROM_CD, CD_FM),
    Row("Consistency distillation + random masking", {}, "fm", CD_MASKED),
    Row("SiD", {}, "fm", "sid.py --init {start}"),
]
NOT_IN_TABLE_5 = [                                                    # TwinFlow has 2.5 and 2.1 times the passes
    Row("control: iMF, for the passes of row 3", {}, None, TABLE_5["iMF"] + "{long}", base=TABLE_5["iMF"]),
    Row("control: RCGM, for the passes of row 5", {}, None, TABLE_5["RCGM"] + "{rlong}", base=TABLE_5["RCGM"]),
]


def paper(name):
    """[(label, {column: value})] of a table of the paper."""
    columns = PAPER[name]["columns"][1:]
    return [(label, dict(zip(columns, values, strict=True))) for label, *values in PAPER[name]["rows"]]


def rows_of(name, start, commands):
    """The Rows of a table of the paper, all from one start.  commands: {label: command}, in the paper's order."""
    rows = []
    for (label, values), (ours, command) in zip(paper(name), commands.items(), strict=True):
        assert label == ours, f"{name}: {ours} stands where the paper has {label}"
        rows.append(Row(label, values, start, command))
    return rows


def rows_of_table_7():
    without = [Row(f"{label}, no GAN", dict(fid=values["fid_without_gan"]), "imf", TABLE_7[label] + " --no_gan")
               for label, values in paper("table7")]
    with_gan = [Row(f"{label}, GAN", dict(fid=values["fid_with_gan"]), "imf", TABLE_7[label])
                for label, values in paper("table7")]
    return without + with_gan


def rows_of_table_8():
    command = FSF + " --lam 0.05 --weight one --shift "
    return [Row(f"k = {k}", values, "imf", f"{command}{k}") for k, values in paper("table8")]


def rows_of_table_9():
    rows = []
    for label, values in paper("table9"):
        for lam, fid in values.items():
            if fid is not None:                                       # clipped: the paper has one lambda
                command = TABLE_9[label].replace("{lam}", lam)
                rows.append(Row(f"{label}, lambda {lam}", dict(fid=fid), "imf", command))
    return rows


def rows_of_table_10():
    """The label begins with the start: imf or fm."""
    return [row._replace(start=row.label.split(":")[0]) for row in rows_of("table10", None, TABLE_10)]


TABLES = {
    "2":  Table("Flow-map-initialised", 3, rows_of("table2", "imf", TABLE_2) + NOT_IN_TABLE_2),
    "3":  Table("Ablation", 1, rows_of("table3", "imf", TABLE_3)),
    "4":  Table("Flow-matching-initialised", 3, rows_of("table4", "fm", TABLE_4) + NOT_IN_TABLE_4),
    "5":  Table("From scratch", 1, rows_of("table5", None, TABLE_5) + NOT_IN_TABLE_5),
    "7":  Table("TTUR and GAN", 13, rows_of_table_7()),
    "8":  Table("Timestep shift k", 1, rows_of_table_8()),
    "9":  Table("lambda and weight, k = 10", 6, rows_of_table_9()),
    "10": Table("Cost and other metrics", 1, rows_of_table_10()),
}


# ---- Jobs: a row and a seed ------------------------------------------------------------------------------------------

def job(args, command, seed, start=None, via=None):
    """The run of one command and one seed.  Its folder is named after its arguments."""
    kind = preset_kind(args.data)
    choices = dict.fromkeys(FLAGS_STRONG, "") | {name: flags[KINDS.index(kind)] for name, flags in FLAGS.items()}
    if kind == "pixels" and args.start == "strong" and start and start.command[1:3] == ("--loss", "imf"):
        choices |= FLAGS_STRONG
    names = dict(start="START", via="VIA", control=CONTROL[kind, args.start])
    script, *flags = shlex.split(command.format(**names, **choices))

    name = [Path(script).stem]
    if via:
        name.append(via.folder.name.removeprefix("consistency-").removesuffix(f"-seed{seed}"))
    elif start and args.init:
        name.append(network_name(args.init)[:60])                     # a name has 255 bytes for all its flags
    elif start:
        name.append(start.folder.name.removeprefix("consistency-loss").removesuffix(f"-seed{seed}"))
    if script != "evaluate.py":
        of_start = "--init" in flags and "scratch" not in flags       # its network is as the start has it
        flags += ["--size", args.size] if args.size and not of_start else []
        flags += ["--precision", args.precision] if args.precision else []
    elif args.init and kind == "latents" and not load_checkpoint(args.init)["args"]:
        of_paper = consistency.PRESETS[kind, "scratch"]               # official weights say of no guidance
        flags += ["--omega", str(of_paper["omega"]), "--guide_to", str(of_paper["guide_to"])]
    joined = "".join(flag for flag in flags if flag not in ("--init", "START", "--teacher", "VIA"))
    if joined:
        name.append(joined.replace("--", "-").replace("/", "_").removeprefix("-"))
    folder = args.runs / data_name(args.data) / "-".join([*name, f"seed{seed}"])

    models = {}
    if start:
        models["START"] = str(args.init or start.folder / "model.pt")
    if via:
        models["VIA"] = str(via.folder / "model.pt")
    argv = [script] + [models.get(flag, flag) for flag in flags]
    if args.data != "digits":
        argv += ["--data", args.data]
    if script != "evaluate.py":
        argv += ["--seed", str(seed)]
    argv += ["--out", str(folder)]

    measure, counts, every = [], (), 0
    if kind == "latents":
        counts, every = fids_of(args, argv)
        measure = ["--vae", args.vae, "--inception", args.inception, "--ref", args.ref, "--n", str(args.n or 50_000)]
        if args.n and args.n <= 2048:
            measure += ["--few", "1"]
    return Job(folder, tuple(argv), tuple(measure), via or (None if args.init else start), counts, every)


def sampling_steps(command):
    """The steps of an evaluate.py row: those given, else 25 of Euler, else 2."""
    if "--steps" in command:
        return int(command[command.index("--steps") + 1])
    return EULER_STEPS if "euler" in command else 2


def fids_of(args, argv):
    """(counts, every) of the Job of a command on latents."""
    if argv[0] == "evaluate.py":
        return (sampling_steps(argv),), 0
    if argv[1:3] == ["--loss", "fm"]:                                 # a start of Table 4: rows 1 and 2 measure it
        return (), 0
    counts = (2, 1) if args.table == "5" else (2,)
    distils = "--init" in argv and "scratch" not in argv              # the paper's "best found" is of these
    return counts, args.fid_every if distils else 0


def jobs_of(args, rows, seed):
    """{row number: Job} of one seed."""
    found = {}
    for r, row in rows.items():
        start, command = None, row.command
        if row.start:
            flags = "{strong}" if args.start == "strong" and row.start == "imf" else ""
            start = job(args, STARTS[row.start] + flags, seed)
        via = job(args, row.via, seed, start) if row.via else None
        if command is None and args.init:
            command = "evaluate.py {start}"
        found[r] = job(args, command, seed, start, via) if command else start
        if row.base and data_kind(args.data) == "latents":            # of pixels they are minutes
            found[r] = found[r]._replace(base=job(args, row.base, seed))
    return found


# ---- Command line ----------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("table", choices=list(TABLES), help="table of the paper")
    g = p.add_argument_group("rows")
    g.add_argument("--data", type=data_source, default="digits",
                   help="digits, an .npz, a folder of IDX or CIFAR files, of images, or of latent shards (see FID "
                   "of latents)")
    g.add_argument("--start", choices=["weak", "strong"], default="weak",
                   help="tables 2, 3, 7, 8, 9, 10 on pixels: the iMF they start from, as it is or trained twice as "
                   "long (on digits with settings of its own)")
    g.add_argument("--init",
                   help="tables 2 to 9 but 5: start from this model.pt, or official weights, not from one trained here")
    g.add_argument("--seeds", type=number(int, 1, 1000), default=5, help="seeds 0, 1, ... of every row (default: 5)")
    g.add_argument("--size", choices=list(SIZES),
                   help="network of the starts and of rows from scratch (default: the presets)")
    g.add_argument("--precision", choices=["fp32", "bf16"], help="of every training run (default: the presets)")
    g.add_argument("--row", type=number(int, 1), nargs="+", help="these rows only (see --list)")
    g = p.add_argument_group("run")
    g.add_argument("--list", action="store_true", help="print the commands and exit")
    g.add_argument("--jobs", type=number(int, 1),
                   help="runs at a time (default: the CPU cores, at most 8; one on a GPU)")
    g.add_argument("--runs", type=folder_path, default=Path("runs/reproduce"), help="folder of the runs that are kept")
    g.add_argument("--out", type=folder_path, help="where the folder of the table is made (default: tables in --runs)")
    g = p.add_argument_group("FID of latents")
    g.add_argument("--vae", help="VAE checkpoint, as in evaluate.py")
    g.add_argument("--inception", help="weight file of FID's Inception network, as in evaluate.py")
    g.add_argument("--ref", help="reference statistics, as in evaluate.py")
    g.add_argument("--n", type=number(int, 4, 10 ** 8), help="images of an FID (default: 50,000)")
    g.add_argument("--fid_every", type=number(int, 0), default=0,
                   help="steps of a distillation between FIDs; 0: at the end only (the paper reports the best found)")
    args = p.parse_args(argv)
    given = {flag for flag in vars(args) if getattr(args, flag) != p.get_default(flag)}
    refuse_contradictions(args, given)
    args.row = args.row and list(dict.fromkeys(args.row))
    args.out = args.out or args.runs / "tables"
    args.jobs = args.jobs or default_jobs()
    args.command = shlex.join(["python", "reproduce.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def refuse_contradictions(args, given):
    """BadInput for flags that do nothing here, or that do not fit together.  given: names of the flags that were."""
    table = TABLES[args.table]
    latents = data_kind(args.data) == "latents"
    starts = {row.start for row in table.rows}
    for row in args.row or ():
        if row > len(table.rows):
            raise BadInput(f"--row {row}: expected 1 to {len(table.rows)}")
    idle = sorted(given & {"vae", "inception", "ref", "n", "fid_every"})
    if idle and not latents:
        flags = ", ".join(f"--{flag}" for flag in idle)
        raise BadInput(f"{flags}: does nothing for table {args.table} on {args.data}; leave that out")
    if args.fid_every and args.table == "5":
        raise BadInput("--fid_every: no row of table 5 distils; leave that out")
    if args.start == "strong" and "imf" not in starts:
        raise BadInput(f"--start strong: the strong start is an iMF, and table {args.table} has none; leave that out")
    if args.start == "strong" and (latents or args.init):
        raise BadInput("--start strong: the two regimes are iMFs of pixels, trained here; "
                       "on latents pass --init with a network trained longer")
    if args.init and args.size:
        raise BadInput(f"--size {args.size}: the network is that of --init; leave one of them out")
    if args.init:
        start = load_checkpoint(args.init)
        refuse_jumps(args.init, start, "pass the network that it was distilled from")
        found = {"in_context": "imf", "plain": "fm"}.get(start["config"]["conditioning"])
        needed = starts - {None}
        if needed != {found}:
            names = " and ".join(sorted(needed)) or "scratch"
            raise BadInput(f"--init {args.init}: holds the start of {found or 'no'} rows, "
                           f"but those of table {args.table} start from {names}")
    if latents and not args.list and Path(args.data).is_dir() and not (args.vae and args.inception and args.ref):
        raise BadInput(f"--data {args.data}: FID of latents needs --vae, --inception and --ref (see evaluate.py)")


def usable_data(source, size=None, init=None):
    """The data of --data; BadInput now for what each of the runs would refuse."""
    data = load_data(source)
    if data.kind == "pixels":
        refuse_few(data)
        if init:
            refuse_other_data(init, load_checkpoint(init), data)
        else:
            flags = ["--size", size] if size else []
            new_network(consistency.parse_args(["--loss", "imf", "--data", source, *flags]), data, "in_context")
    return data


def run(args):
    refuse_torchrun()
    table = TABLES[args.table]
    rows = {}
    for r, row in enumerate(table.rows, 1):
        a_control = args.init and row.start is None                   # of a start that is given there is none
        if (args.row is None or r in args.row) and not a_control:
            rows[r] = row
    if not rows:
        raise BadInput(f"--row {' '.join(map(str, args.row))}: a control, which --init leaves out; choose others")
    jobs = {r: {} for r in rows}                                      # {row number: {seed: Job}}
    for seed in range(args.seeds):
        for r, each in jobs_of(args, rows, seed).items():
            given = args.init and each.command[0] == "evaluate.py"    # the same network for every seed
            if seed == 0 or not given:
                jobs[r][seed] = each
    if args.list:
        return print_commands(rows, jobs)
    for each in rows.values():
        refuse_uncounted((each.command or "evaluate.py").split()[0])
    check_writable(args.runs, "--runs ")                              # not in parse_args: --list writes nothing

    folder = report.folder_of(args, regime_of(args, table))
    there = report.seeds_in(folder)
    if max(there.values(), default=0) > args.seeds:
        raise BadInput(f"--seeds {args.seeds}: {folder} holds the table of {max(there.values())}; "
                       "pass as many, or another --out")
    report.refuse_other_results(folder, args.data, inputs_of(args.data, args.init))
    data = usable_data(args.data, args.size, args.init)
    if data_kind(args.data) == "latents":
        decoder_for(data, args, torch.device("cpu"))
        load_inception(args.inception)
        read_reference(args.ref)
    wanted = [jobs[r][seed] for seed in range(args.seeds) for r in rows if seed in jobs[r]]
    failed = run_all(args, wanted)
    kind, runs = data_kind(args.data), {}
    for r in rows:
        runs[r] = {seed: report.collect(each, kind) for seed, each in jobs[r].items() if is_done(each)}
    names = "; ".join(j.folder.name for j in failed)
    if failed and any(len(runs[r]) < there.get(r, 0) for r in rows):
        raise BadInput(f"{len(failed)} runs failed, so the fuller table in {folder} stays: {names}")
    commands = {r: shlex.join(jobs[r][0].command) for r in rows}
    report.write(args, table, head_of(args, table, wanted), report.summary(rows, runs), jobs, commands)
    if failed:
        raise BadInput(f"{len(failed)} runs failed and are missing in the table: {names}")


def print_commands(rows, jobs):
    """The starts, then each row's command for each seed, to paste where this program was called."""
    starts, where = [], "" if Path.cwd() == HERE else f"{HERE}/"
    for each in jobs.values():
        for j in each.values():
            starts += [start for start in chain(j)[:0:-1] if start not in starts]
    for start in starts:
        print(f"# a start\npython {where}{shlex.join(start.command)}")
    for r, row in rows.items():
        print(f"# row {r}: {row.label} (the paper: {report.paper_text(row.paper)})")
        for j in jobs[r].values():
            print(f"python {where}{shlex.join(j.command)}")


def regime_of(args, table):
    """The start's name in the folder and the head of a table; "" where nothing starts from an iMF."""
    if args.init:
        return network_name(args.init)
    return args.start if any(row.start == "imf" for row in table.rows) else ""


def head_of(args, table, jobs):
    """What runs.json says of all rows."""
    found = {}
    for each in jobs:
        found |= sources_of(each)
    return dict(
        table=args.table,
        title=table.title,
        data=args.data,
        start=regime_of(args, table),
        inputs=inputs_of(args.data, args.init),
        network=" ".join(word for word in (args.size, args.precision) if word),
        reference=table.reference,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        cores=usable_cores(),
        jobs=args.jobs,
        machines=sorted({record(each).get("machine") or machine(args.jobs) for each in jobs}),
        sources=found,
    )


if __name__ == "__main__":
    main(run, parse_args)
