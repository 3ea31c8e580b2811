"""What one step of every method costs, at the paper's size on random latents: seconds, memory, FLOPs, forward passes.

    python cost.py                           # every method; batch 128 on a GPU, 1 on a CPU
    python cost.py --batch_size 4            # as results/cost-cpu, on 2 CPU cores
    python cost.py --size tiny --row 1       # one method, of a small network

Seconds and memory are those of a process of its own per method, the script as a user runs it.  FLOPs are counted of the
matrix products of one step at batch 2, the optimizer's apart; divided by those of one forward pass of the network they
are the forward passes of the file headers (backward = 2).  Latents and weights are drawn at random.  A row that was
measured is kept in --runs, and measured again only if its setting or a file that it executes has changed.

Leaves a folder cost-cpu or cost-cuda in --out, of another size than B/1 with its name: README.md, the table of all
rows measured in this setting so far, and runs.json.
"""
import contextlib
import importlib
import io
import json
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

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import BadInput, main
from model import SIZES, LightningDiT, fixed_guidance
from plumbing.checkpoints import load_network
from plumbing.files import HERE, json_text, lock, read_json, sources, write_atomic
from plumbing.flags import Parser, folder_path, number
from plumbing.kept_runs import refuse_torchrun
from plumbing.report import markdown_lines
from reproduce import DMD2_CD, TABLE_5, paper

CD_MASKED = "consistency.py --loss cd --init {start}"                 # a masked row needs no finite difference
FSF = "fsf_dmd.py --init {start}"
DMD2 = "dmd2.py --init {start}"

# label, start (imf, fm, or None: from scratch), command.
# fm: FSF-DMD is what comes after its 20,000 steps of L_CD alone (Table 6).
COST = [
    ("imf: Consistency distillation", "imf", CD_MASKED),
    ("imf: FSF-DMD M=1",              "imf", FSF + " --M 1"),
    ("imf: FSF-DMD M=2",              "imf", FSF + " --M 2"),
    ("imf: DMD2 1:1, no GAN",         "imf", DMD2 + " --ttur 1 --no_gan"),
    ("imf: DMD2 1:1",                 "imf", DMD2 + " --ttur 1"),
    ("imf: DMD2 1:5, no GAN",         "imf", DMD2 + " --no_gan"),
    ("imf: DMD2 1:5",                 "imf", DMD2),
    ("imf: DMD2 + IDA",               "imf", DMD2 + " --ida 0.97"),
    ("imf: DMD2 + L_CD",              "imf", DMD2_CD + " --steps 54000"),        # its peak in the paper
    ("imf: SiD",                      "imf", "sid.py --init {start}"),
    ("fm: Consistency distillation",  "fm",  CD_MASKED),
    ("fm: DMD2 1:5",                  "fm",  DMD2),
    ("fm: DMD2 + L_CD",               "fm",  DMD2_CD + " --steps 33000"),
    ("fm: FSF-DMD",                   "fm",  FSF + " --warmup 0 --steps 6000"),
    ("FM",                            None,  "consistency.py --loss fm"),
    ("iMF",                           None,  "consistency.py --loss imf"),
    ("iMF + DMD2",                    None,  TABLE_5["iMF + DMD2"]),
    ("iMF + TwinFlow",                None,  TABLE_5["iMF + TwinFlow"]),
    ("RCGM",                          None,  TABLE_5["RCGM"]),
    ("RCGM + TwinFlow",               None,  TABLE_5["RCGM + TwinFlow"]),
    ("FSF-DMD from scratch",          None,  TABLE_5["FSF-DMD"]),
]

# The labels under which the paper has them (Tables 5 and 10), where they differ from ours.
PAPER_LABEL = {
    "imf: DMD2 1:5": "imf: DMD2",
    "fm: DMD2 1:5": "fm: DMD2 (TTUR 1:5)",
    "FSF-DMD from scratch": "FSF-DMD",
}

# FLOP/s assumed for hours on an H100: a fifth of its 989e12 in bf16.  In the paper iMF has 18% of an A100's 312e12, and
# FSF-DMD 12% of a B200's 2250e12.
RATE = 2e14
PAPER_BATCH = 128
COUNTED = 2                                                           # batch at which FLOPs are counted
LINES = 4                                                             # of the log, while steps are timed

# {shapes of an optimizer's parameters: FLOPs of their update}, of all methods so far.
UPDATES = {}


# ---- Measuring -------------------------------------------------------------------------------------------------------

def random_inputs(folder, size):
    """Latents drawn from N(0, 1) in the paper's shape, 32 x 16 x 16 with 1000 classes, and starts with random weights.

    -> the folder of the latents; imf.pt and fm.pt lie beside it.
    """
    data = folder / "latents"
    data.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 32, 16, 16, generator=g), torch.arange(1000)
    save_file(dict(latents=x, latents_flip=x.flip(3), labels=y), data / "random.safetensors")
    statistics = dict(mean=torch.zeros(1, 32, 1, 1), std=torch.ones(1, 32, 1, 1))
    torch.save(statistics, data / "latents_stats.pt")
    for name, conditioning in (("imf", "in_context"), ("fm", "plain")):
        torch.manual_seed(0)
        net = LightningDiT(size, conditioning)
        draw_zeros(net)
        checkpoint = dict(config=net.config, weights=net.state_dict(), data=None, args={}, step=0)
        write_atomic(folder / f"{name}.pt", checkpoint)
    return data


def draw_zeros(net):
    """Draw the parameters that a new network has at zero: with its gates closed it would be timed on zeros."""
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)


class Enough(Exception):
    """So many optimizer updates are counted; ends the training loop."""


def count(script, argv, steps, forward_of, known=()):
    """FLOPs of matrix products in one step of a script, as dict:

    step        one step, without the optimizers
    optimizer   their updates in one step
    forward     one pass of the network
    preset      steps of the preset
    updates     UPDATES, as it is then

    Runs `steps` steps in this process, at the batch size in argv, and leaves at the last optimizer update.
    forward_of: a model.pt.  known: `updates` of an earlier call; an optimizer whose parameters have shapes that were
    counted before is not run again.
    """
    UPDATES.update(known)
    if torch.cuda.is_available():                                     # beside a step that is timed
        torch.set_num_threads(max(1, os.cpu_count() // 2))
    module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.redirect_stdout(io.StringIO()):                   # it prints what its flags resolve to
        args = module.parse_args(argv)
    updates_per_step = 1
    if script == "dmd2.py":
        updates_per_step = 1 + args.ttur
    elif script == "sid.py":
        updates_per_step = 2

    counter = FlopCounterMode(display=False)
    keys = []                                                         # of UPDATES, one an update
    marks = []                                                        # FLOPs before and after each update
    held = []                                                         # parameters of the optimizer that is stepping

    def begin(optimizer, *_):
        held[:] = [group["params"] for group in optimizer.param_groups]
        keys.append(tuple(p.shape for params in held for p in params))
        marks.append(counter.get_total_flops())
        if keys[-1] in UPDATES:
            for group in optimizer.param_groups:
                group["params"] = []                                  # nothing to update

    def end(optimizer, *_):
        marks.append(counter.get_total_flops())
        UPDATES.setdefault(keys[-1], marks[-1] - marks[-2])
        for group, params in zip(optimizer.param_groups, held):
            group["params"] = params
        if len(keys) == steps * updates_per_step:
            raise Enough

    hooks = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    quiet = io.StringIO()
    try:
        with contextlib.suppress(Enough), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            with counter, sdpa_kernel(SDPBackend.MATH):               # the fused kernel of CPUs is not counted
                module.train(args)
    finally:
        for hook in hooks:
            hook.remove()

    in_updates = sum(after - before for before, after in zip(marks[::2], marks[1::2]))
    return dict(
        step=(marks[-1] - in_updates) / steps,
        optimizer=sum(UPDATES[key] for key in keys) / steps,
        forward=count_forward(forward_of, args.batch_size),
        preset=args.steps,
        updates=UPDATES,
    )


def count_forward(path, batch_size):
    """FLOPs of matrix products in one pass of the network of a model.pt."""
    net, _ = load_network(path)
    x = torch.randn(batch_size, net.config["in_channels"], net.config["input_size"], net.config["input_size"])
    t = torch.full((batch_size,), 0.5)
    y = torch.zeros(batch_size, dtype=torch.int64)
    guidance = fixed_guidance(1.0, 0.0, 1.0, x) if net.conditioning == "in_context" else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(x, t, y, None, guidance)
    return counter.get_total_flops()


def time_steps(command, folder):
    """(median seconds of a step without the first line's, peak memory in GB) of a script in a process of its own.

    The process is killed after LINES lines of its log, or at the first one after a minute.
    """
    shutil.rmtree(folder, ignore_errors=True)
    script, *flags = command
    words = [sys.executable, str(HERE / script), *flags]
    every = 5 if torch.cuda.is_available() else 1                     # each line of the log waits for the GPU
    words += ["--log_every", str(every), "--save_every", "0", "--out", str(folder)]
    if script != "consistency.py":                                    # which has no health panel
        words += ["--health_every", "0"]
    path, lines = folder / "metrics.jsonl", []
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            # The first steps, which compile, do not count.
            while len(lines) < LINES and sum(line["sec_per_step"] for line in lines[1:]) < 60:
                time.sleep(0.2)
                if child.poll() is not None:
                    log.seek(0)
                    reason = re.split(r"[\r\n]+", log.read().decode(errors="replace").strip())[-1]
                    raise BadInput(f"{shlex.join(words[1:])} ended with exit code {child.returncode}: {reason}")
                if path.exists():
                    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
                    lines = [json.loads(line) for line in whole]
        finally:
            child.kill()                                              # no checkpoint of it is wanted, no picture
            child.wait()
    kept = lines[1:LINES]
    median = float(np.median([line["sec_per_step"] for line in kept]))
    return median, max(line["memory_gb"] for line in kept)


# ---- Another process -------------------------------------------------------------------------------------------------

def aside(function, *args):
    """Start function(*args) in a new process; `received` gives its result.

    So this process stays small: the peak memory of a process that it starts counts from its own size.  Ctrl-C reaches
    this process alone; when it ends, the other one ends too.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, its = spawn.Pipe(duplex=False)
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spawn.Process(target=answer, args=(its, function, args), daemon=True).start()
    finally:
        signal.signal(signal.SIGINT, on_ctrl_c)
        its.close()
    return ours


def answer(pipe, function, args):
    try:
        pipe.send((function(*args), None))
    except Exception as error:                                        # a full disk, say
        pipe.send((None, error))


def received(pipe):
    """The result, or the exception that the function raised; BadInput if its process was killed."""
    try:
        result, error = pipe.recv()
    except EOFError:
        raise BadInput("the process that counts FLOPs was killed (too little memory?); the same command goes on "
                       "with this method") from None
    if error:
        raise error
    return result


# ---- One method ------------------------------------------------------------------------------------------------------

def paper_seconds():
    """{the paper's label: seconds of a step}, of a B200 (Table 10) and of an A100 (Table 5)."""
    found = {label: values["sec_per_step_b200"] for label, values in paper("table10")}
    for label, values in paper("table5"):
        found[label] = values["sec_per_step_a100"]
    return found


def measure(args, setting, entry, folder):
    """A row of runs.json.  entry: of COST; folder: a scratch one with the random inputs."""
    label, start, command = entry
    script, *flags = shlex.split(command.format(start=shlex.quote(f"{folder}/{start}.pt")))
    flags += ["--data", str(folder / "latents")]
    if start is None:
        flags += ["--size", args.size]

    # Of two rows one is masked (--mask_prob 0.5), and costs no difference.
    as_counted = ["--batch_size", str(COUNTED), "--precision", "fp32", "--device", "cpu",
                  "--out", str(folder / "count"), "--resume", "no"]
    plain = start == "fm" or label == "FM"
    forward_of = folder / ("fm.pt" if plain else "imf.pt")
    counted_steps = 2 if script == "dmd2.py" else 1                   # its rollouts are drawn
    counted = aside(count, script, [*flags, *as_counted], counted_steps, forward_of, UPDATES)
    if not torch.cuda.is_available():
        flops = received(counted)                                     # would slow on a CPU what is timed there

    as_timed = ["--batch_size", str(setting["batch"]), "--precision", setting["precision"]]
    seconds, memory = time_steps([script, *flags, *as_timed], folder / "run")
    if torch.cuda.is_available():
        flops = received(counted)
    UPDATES.update(flops["updates"])

    per_image = flops["step"] / COUNTED
    of_a_step = PAPER_BATCH * per_image + flops["optimizer"]
    return dict(
        label=label,
        command=command.format(start=f"{str(start).upper()}.pt"),
        sec_per_step=seconds,
        memory_gb=memory,
        passes=flops["step"] / flops["forward"],
        gflop_per_image=per_image / 1e9,
        gflop_optimizer=flops["optimizer"] / 1e9,
        preset_steps=flops["preset"],
        hours_modelled=flops["preset"] * of_a_step / RATE / 3600,
        paper_sec_per_step=paper_seconds().get(PAPER_LABEL.get(label, label)),
    )


# ---- The folder ------------------------------------------------------------------------------------------------------

def markdown(found):
    """The table of a runs.json as Markdown."""
    rows = found["rows"]
    base = next((row for row in rows if row["label"] == "imf: FSF-DMD M=2"), rows[0])
    header = [
        f"one step, {found['size']}, batch {found['batch']}, {found['precision']}",
        "forward passes", "GFLOP an image", "GFLOP optimizer",
        "s/step", f"times {base['label']}", "GB", "times",
        "paper: s/step (B200; from scratch A100)", "steps", "H100 hours, modelled",
    ]
    body = []
    for row in rows:
        body.append([
            row["label"],
            f"{row['passes']:.1f}",
            f"{row['gflop_per_image']:.0f}",
            f"{row['gflop_optimizer']:.0f}",
            f"{row['sec_per_step']:.3g}",
            f"{row['sec_per_step'] / base['sec_per_step']:.2f}",
            f"{row['memory_gb']:.2f}",
            f"{row['memory_gb'] / base['memory_gb']:.2f}",
            row["paper_sec_per_step"] or "-",
            row["preset_steps"],
            f"{row['hours_modelled']:.1f}",
        ])
    return "\n".join(markdown_lines(header, body))


def page(found, command):
    """README.md of the folder.  command: what made it."""
    rate = f"{found['flop_per_second_modelled']:.0e}".replace("+", "")
    B, counted = PAPER_BATCH, found["counted"]
    outdated = f"\n{outdated_line(found)}\n" if found.get("outdated") else ""
    return f"""# What one step costs

Made by `{command}` on {found['device']}, torch {found['torch']}.

Random latents and weights. Seconds and memory: of a process per method, at the batch in the table's head.
FLOPs: of matrix products, counted at batch {counted}. Hours: modelled, not measured; the preset's steps at batch {B},
at {rate} FLOP/s. CD and L_CD have random masking, the presets'; the paper's rows of this table have none.
[runs.json](runs.json) holds the numbers unrounded.

{markdown(found)}
{outdated}"""


def outdated_line(found):
    """What benchmarks/gpu.py says of rows that stay in a table although the code has changed since."""
    labels_of = {}
    for label, why in found["outdated"].items():
        labels_of.setdefault(why, []).append(label)
    parts = [f"{', '.join(labels)} ({why})" for why, labels in labels_of.items()]
    return f"Of code that has changed since: {'; '.join(parts)}."


def kept_rows(path):
    """{name: dict(identity, row)} measured before; what is damaged is said, and measured again."""
    if not path.exists():
        return {}
    try:
        kept = read_json(path, "what was measured before", repair="measured again")
    except BadInput as error:
        tqdm.write(str(error))
        return {}
    whole = {"identity", "row"}
    return {name: entry for name, entry in kept.items() if isinstance(entry, dict) and whole <= entry.keys()}


def name_of(entry, setting):
    """Of a row among those that are kept."""
    return f"{setting['size']}, batch {setting['batch']}, {setting['device']}: {entry[0]}"


def identity(entry, setting):
    """What a kept row has to agree in."""
    _, _, command = entry
    return dict(setting, command=command, sources=sources(shlex.split(command)[0]))


def is_kept(entry, kept, setting):
    """Whether an entry of COST was measured before, in this setting and with these sources."""
    name = name_of(entry, setting)
    return name in kept and kept[name]["identity"] == identity(entry, setting)


def run(args):
    refuse_torchrun()
    with lock(args.runs / "cost.lock", "measuring costs", "--runs"):
        measure_all(args)


def measure_all(args):
    on_gpu, begun = torch.cuda.is_available(), time.perf_counter()
    setting = dict(
        device=torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU cores",
        size=args.size,
        batch=args.batch_size or (PAPER_BATCH if on_gpu else 1),
        precision="bf16" if on_gpu else "fp32",
    )
    numbers = args.row or range(1, len(COST) + 1)
    chosen = [COST[number - 1] for number in dict.fromkeys(numbers)]
    scratch, path = args.runs / ".cost", args.runs / "cost.json"
    kept, drawn = kept_rows(path), False                              # drawn: the random inputs

    signal.signal(signal.SIGTERM, signal.default_int_handler)         # a process that is timed ends with this one
    for entry in tqdm(chosen, unit="method", dynamic_ncols=True):
        name = name_of(entry, setting)
        late = args.minutes and time.perf_counter() - begun > 60 * args.minutes
        if late and entry is not chosen[0]:
            tqdm.write(f"{args.minutes} minutes are over: no method is begun any more, the same command goes on")
            break
        if is_kept(entry, kept, setting):
            continue
        if name in kept:
            tqdm.write(f"{name}: its command or sources changed since, measured again")
        if not drawn:
            received(aside(random_inputs, scratch, args.size))
            drawn = True
        row = measure(args, setting, entry, scratch)
        kept[name] = dict(identity=identity(entry, setting), row=row)
        write_atomic(path, json_text(kept, indent=1))
    shutil.rmtree(scratch, ignore_errors=True)

    rows = [kept[name_of(entry, setting)]["row"] for entry in COST if is_kept(entry, kept, setting)]
    found = dict(setting, torch=torch.__version__, flop_per_second_modelled=RATE, counted=COUNTED, rows=rows)
    folder = folder_of(args)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "runs.json", json_text(found, indent=1))
    write_atomic(folder / "README.md", page(found, args.command))
    print(f"{markdown(found)}\n\nwrote README.md and runs.json into {folder}")


def folder_of(args):
    """Where the table is left."""
    name = "cost-cuda" if torch.cuda.is_available() else "cost-cpu"
    return args.out / (name if args.size == "B/1" else f"{name}-{args.size.replace('/', '')}")


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--size", default="B/1", choices=list(SIZES), help="network size (default: B/1, the paper's)")
    p.add_argument("--batch_size", type=number(int, 1),
                   help="batch of the timing (default: 128 on a GPU, 1 on a CPU); FLOPs are counted at 2")
    p.add_argument("--row", type=number(int, 1), nargs="+",
                   help=f"these methods only, 1 to {len(COST)} as in the table, measured in this order")
    p.add_argument("--minutes", type=number(float, 0), default=0,
                   help="after so many minutes begin no other method (0: measure all)")
    p.add_argument("--runs", type=folder_path, default="runs/reproduce", help="keeps what was measured")
    p.add_argument("--out", type=folder_path, help="where the folder of the table is made (default: tables in --runs)")
    args = p.parse_args(argv)
    args.out = args.out or args.runs / "tables"
    for row in args.row or ():
        if row > len(COST):
            raise BadInput(f"--row {row}: expected 1 to {len(COST)}")
    args.command = shlex.join(["python", "cost.py", *(sys.argv[1:] if argv is None else argv)])
    return args


if __name__ == "__main__":
    main(run, parse_args)
