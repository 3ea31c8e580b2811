"""What a GPU makes measurable, in blocks of a few minutes, unattended; a block that is done is not done again.

    python benchmarks/gpu.py                            # every block; --block runs cost for some; again to go on
    python benchmarks/gpu.py --again 1                  # measure again
    python benchmarks/gpu.py --rehearse 1 --out /tmp/g  # the same code on a CPU, at tiny size: numbers of no meaning

    runs         every script on digits, fp32 and bf16, compiled and not; losses beside the CPU's, step by step
    compiled     two steps of FSF-DMD and DMD2 at the paper's size, compiled beside eager: the same losses?
    waits        calls within a step that hold up the CPU until the GPU is done, of every script, on digits and on
                 latents in bf16: there should be none
    cost         cost.py: seconds, memory and FLOPs of a step of every method at the paper's setting, and the share of
                 the bf16 matrix rate that is measured beside it (Table 10); rows that are missing, or were measured
                 with other code, come first
    profile      where a step of FSF-DMD (M = 2) goes: attention, matrix products, elementwise, reductions, copies,
                 idle (of a step that is not profiled); and the finite difference, the optimizer, the EMA
    difference   du/dt in bf16, with and without the float32 evaluations, against torch.func.jvp: error and time
    throughput   images a second of 2-step sampling, VAE decoding (batches, layouts) and Inception features; minutes of
                 a 50K FID
    evidence     Table 2 on Fashion-MNIST from the strong start, five seeds of a larger network (reproduce.py --size
                 medium, 8 runs at a time); where --minutes stop it, the table of the seeds that are done

Warm-up first, medians of CUDA events, random weights and inputs.  Writes gpu.md and gpu/<block>.json into --out.  A
block that fails does not end the others.
"""
import concurrent.futures
import functools
import hashlib
import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import consistency  # noqa: E402
import cost  # noqa: E402
import fsf_dmd  # noqa: E402
from common import BadInput, main, set_tf32  # noqa: E402
from evaluate import generate  # noqa: E402
from evidence import evidence  # noqa: E402
from hooks import Done, after_each_step, replaced  # noqa: E402
from inception import Inception  # noqa: E402
from model import LightningDiT, fixed_guidance, total_derivative  # noqa: E402
from normuon import NorMuon  # noqa: E402
from plumbing.files import json_text, read_json, read_lines, sources, write_atomic  # noqa: E402
from plumbing.flags import Parser, data_source, folder_path, number  # noqa: E402
from plumbing.report import markdown_lines  # noqa: E402
from vae import VAE  # noqa: E402

SCRIPTS = {
    "imf": "consistency.py --loss imf",
    "cd": "consistency.py --loss cd --init START",
    "fsf_dmd": "fsf_dmd.py --init START",
    "dmd2": "dmd2.py --init START",
    "sid": "sid.py --init START",
    "twinflow": "twinflow.py --base imf",
}
SETTINGS = {
    "fp32": "",
    "bf16": "--precision bf16",
    "fp32 compiled": "--compile 1",
    "bf16 compiled": "--precision bf16 --compile 1",
}
COMPARED = 20                   # steps whose losses are compared with the CPU's
SECONDS = dict(runs=180, compiled=120, waits=60, profile=100, difference=20, throughput=40)     # about, on an H200

# Rows of cost.py, those of the paper's claim first: FSF-DMD, DMD2, CD, ...
ORDER = "3 7 1 2 6 5 16 15 10 18 4 8 9 19 12 14 11 13 17 20 21".split()

# Functions whose share of a step is told beside its kernels.
PARTS = [
    (consistency, "total_derivative", "finite_difference"), (NorMuon, "step", "optimizer"),
    (fsf_dmd, "update_ema", "EMA"),
]

# Kernels by name, the first that fits; those of compiled blocks are named after all that they fuse.
KINDS = [
    ("reductions", r"^triton_(per|red)"),
    ("elementwise", r"^triton_"),
    ("attention", r"flash|fmha|attention|cudnn::fusion"),
    ("matrix products", r"gemm|cutlass|matmul|\bmm\b|cublas|conv|nvjet|xmma"),
    ("reductions", r"reduce|norm|softmax"),
    ("copies", r"memcpy|memset|copy"),
    ("elementwise", r"elementwise|foreach|multi_tensor|vectorized|cat|index|fill|add|mul|pow|silu|sub|div|lerp"),
]


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--block", nargs="+", choices=list(BLOCKS), default=list(BLOCKS), help="these blocks only")
    p.add_argument("--again", type=number(int, 0, 1), default=0, help="1: measure what is measured already")
    p.add_argument("--rehearse", type=number(int, 0, 1), default=0, help="1: on the CPU, at tiny size")
    p.add_argument("--out", type=folder_path, default=HERE / "results", help="where gpu.md and gpu/ are written")
    p.add_argument("--minutes", type=number(float, 0), default=7,
                   help="after so many minutes no block and no method of cost is begun, and evidence is stopped, which "
                   "takes up to three more (0: never); the next call goes on")
    p.add_argument("--data", type=data_source, default="/usr/share/datasets/fashion-mnist", help="of evidence")
    p.add_argument("--batch_size", type=number(int, 2), default=128, help="of profile and compiled")
    args = p.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise BadInput("no CUDA device here; --rehearse 1 runs the same code on the CPU, at tiny size")
    if args.rehearse and args.out.resolve() == p.get_default("out").resolve():
        raise BadInput("--rehearse 1: its numbers mean nothing, give them an --out of their own")
    if "evidence" in args.block and not args.rehearse and not Path(args.data).is_dir():
        raise BadInput(f"--data {args.data}: is not there, expected Fashion-MNIST's files; bring them, or leave "
                       "evidence out with --block")
    args.device = torch.device("cpu" if args.rehearse else "cuda")
    args.size = "tiny" if args.rehearse else "B/1"
    return args


def run(args):
    folder, failed, some_begun = args.out / "gpu", [], False
    folder.mkdir(parents=True, exist_ok=True)
    args.ends = time.perf_counter() + (60 * args.minutes or float("inf"))
    for name in args.block:
        path = folder / f"{name}.json"
        if path.exists() and not args.again and not unfinished(name, path):
            print(f"{name}: measured before, in {path}")
            continue
        begun = time.perf_counter()
        left = args.ends - begun
        if left < 0 or some_begun and left < SECONDS.get(name, 0):
            print(f"{name}: not begun, it would not end within {args.minutes:g} minutes; the same command goes on")
            continue
        some_begun = True
        try:
            found = BLOCKS[name](args)
        except Exception:                                       # the time of the others is short
            traceback.print_exc()
            failed.append(name)
            continue
        if found is None:
            print(f"{name}: stopped after {args.minutes:g} minutes; the same command goes on")
            continue
        head = dict(block=name, device=device_name(args), torch=torch.__version__, cuda=torch.version.cuda,
                    command=shlex.join(["python", *sys.argv]), date=time.strftime("%Y-%m-%d"))
        write_atomic(path, json_text(head | dict(seconds=time.perf_counter() - begun) | found, indent=1) + "\n")
        write_atomic(args.out / "gpu.md", page(folder))
        print(f"{name}: {time.perf_counter() - begun:.0f} s, {path}")
    if failed:
        raise BadInput(f"failed: {', '.join(failed)}; what they raised is above")


def unfinished(name, path):
    """Whether a block that was measured has something left: rows that are missing, or are of code that has changed."""
    found = read_json(path, "what was measured before")
    return bool(found.get("missing") or name == "cost" and changed_rows(found))


def changed_rows(found):
    """Labels of cost's rows whose code has changed since they were measured, as far as that was kept."""
    now = {label: code_of(command) for label, _, command in cost.COST}
    return [row["label"] for row in found["rows"] if found.get("code", {}).get(row["label"]) != now[row["label"]]]


def code_of(command):
    """One short hash of all files that a row of cost.py executes."""
    files = {name: text for name, text in sources(shlex.split(command)[0]).items() if name != "torch"}
    return hashlib.sha256(json_text(files).encode()).hexdigest()[:12]


def device_name(args):
    return "rehearsal on " + platform.processor() if args.rehearse else torch.cuda.get_device_name()


def seconds_of(action, args, repeats=10):
    """Median seconds of a call, after three that warm up."""
    times = []
    for _ in range(2 if args.rehearse else 3 + repeats):
        if args.rehearse:
            begun = time.perf_counter()
            action()
            times.append(time.perf_counter() - begun)
            continue
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        action()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1000)
    return float(np.median(times[3:] or times))


def matrix_rate(args):
    """FLOP/s of square matrix products in bf16, after a second of them: a card that is cool runs faster than it can go
    on."""
    n = 256 if args.rehearse else 8192
    a, b = (torch.randn(n, n, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    begun = time.perf_counter()
    while not args.rehearse and time.perf_counter() - begun < 1:
        a @ b
        torch.cuda.synchronize()
    return 2 * n ** 3 / seconds_of(lambda: a @ b, args)


# ---- The blocks: args -> dict of numbers -----------------------------------------------------------------------------

def runs(args):
    """Every script runs; its losses on the device beside those of fp32 on the CPU.  Several at a time: no timing."""
    steps, rows, losses = (2 if args.rehearse else COMPARED), [], {}
    settings = {"cpu": ""} | {name: flags for name, flags in SETTINGS.items()
                              if not (args.rehearse and "compiled" in name)}
    with tempfile.TemporaryDirectory() as folder:
        script("consistency.py --loss imf --device cpu --steps 20 --out start", folder)

        def lines_of(name, setting):
            command = f"{SCRIPTS[name].replace('START', 'start/model.pt')} --steps {steps} --log_every 1"
            if name not in ("imf", "cd"):
                command += " --health_every 0"
            device = "cpu" if setting == "cpu" else args.device.type
            return script(f"{command} {settings[setting]} --device {device} "
                          f"--out {name}-{setting.replace(' ', '-')}", folder)

        with concurrent.futures.ThreadPoolExecutor(max(1, os.cpu_count() // 2)) as pool:
            found = {(name, setting): pool.submit(lines_of, name, setting) for name in SCRIPTS for setting in settings}
        for (name, setting), run in found.items():
            losses[f"{name}, {setting}"] = lines = run.result()
            if setting != "cpu":
                # From the second step on NorMuon's products have made a difference: bf16 on a GPU, float32 on a CPU.
                on_cpu = found[name, "cpu"].result()
                rows.append(dict(script=name, setting=setting, first_step=largest_difference(on_cpu[:1], lines[:1]),
                                 all_steps=largest_difference(on_cpu, lines)))
    return dict(steps=steps, flash_attention=flash_attention(args), rows=rows, losses=losses)


def compiled(args):
    """Losses of two steps in bf16 with compiled blocks beside eager ones: at this size inductor takes other kernels."""
    rows, losses = [], {}
    with tempfile.TemporaryDirectory() as folder:
        data = cost.random_inputs(Path(folder), args.size)
        batch, both = (2, (0, 0)) if args.rehearse else (args.batch_size, (0, 1))
        for name in ("fsf_dmd.py", "dmd2.py --no_gan"):
            eager, other = (
                script(f"{name} --init {folder}/imf.pt --data {data} --batch_size {batch} --steps 2 --log_every 1 "
                       f"--health_every 0 --device {args.device.type} --compile {flag} --out {i}-{name[:4]}", folder)
                for i, flag in enumerate(both))
            rows.append(dict(script=name, first_step=largest_difference(eager[:1], other[:1]),
                             both_steps=largest_difference(eager, other)))
            losses[name] = [eager, other]
    return dict(batch=batch, rows=rows, losses=losses)


def waits(args):
    """Of every script the places where a step waits for the device, as torch's sync debug mode tells them."""
    begin, end, rows = 3, 6, []

    def look(run):
        if run.step == begin and not args.rehearse:
            torch.cuda.set_sync_debug_mode("warn")
        if run.step == end:
            raise Done

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script("consistency.py --loss imf --device cpu --steps 20 --out start", folder)
        data = cost.random_inputs(folder, "tiny")
        cases = [(name, "digits", command) for name, command in SCRIPTS.items()]
        cases += [(name, "latents, bf16", command) for name, command in SCRIPTS.items()]
        for name, kind, command in cases:
            start = folder / ("start/model.pt" if kind == "digits" else "imf.pt")
            file, *flags = shlex.split(command.replace("START", shlex.quote(str(start))))
            module = importlib.import_module(Path(file).stem)
            if kind != "digits":
                flags += ["--data", str(data), "--precision", "bf16", "--batch_size", "8", "--compile", "0"]
                flags += ["--size", "tiny"] if "--init" not in flags else []
            flags += ["--device", args.device.type, "--out", f"{folder}/{name}-{kind[:6]}", "--log_every", "100"]
            with warnings.catch_warnings(record=True) as caught, after_each_step(look):
                warnings.simplefilter("always")
                try:
                    module.train(module.parse_args(flags))
                finally:
                    if not args.rehearse:
                        torch.cuda.set_sync_debug_mode("default")
            waited = [w for w in caught if "called a synchronizing" in str(w.message)]
            places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waited})
            rows.append(dict(script=name, data=kind, waits_at=", ".join(places) or "-"))
    return dict(steps=end - begin, rows=rows)


def flash_attention(args):
    """Whether the flash kernel takes the network's attention: with nothing else allowed a pass raises where not."""
    net, size = LightningDiT(args.size, "in_context").to(args.device), (2, 32, 16, 16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(args.device.type, torch.bfloat16), torch.no_grad():
        net(torch.randn(size, device=args.device), 0.5, torch.arange(2, device=args.device), 0.0)
    return True


def script(command, folder):
    """Run a command of this project in a folder.  -> the lines of its metrics.jsonl that hold losses"""
    file, *flags = shlex.split(command)
    done = subprocess.run([sys.executable, str(HERE / file), *flags], cwd=folder, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="2"))
    if done.returncode:
        raise BadInput(f"{command} ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return [line for line in read_lines(Path(folder) / flags[-1] / "metrics.jsonl") if "grad_norm" in line]


def largest_difference(a, b):
    """Of the losses of two runs over all steps, each relative to the largest value that it has in the first run."""
    largest = {}
    for line in a:
        for name in line.keys() - {"step", "sec_per_step", "images_per_sec", "memory_gb"}:
            largest[name] = max(largest.get(name, 1e-6), abs(line[name]))
    differences = [0.0]
    for one, other in zip(a, b, strict=True):
        differences += [abs(one[name] - other[name]) / scale for name, scale in largest.items() if name in one]
    return max(differences)


def cost_table(args):
    """cost.py, row by row, and the matrix rate of today.  Rows that are not measured today stay, with their date."""
    rate, minutes = matrix_rate(args), (args.ends - time.perf_counter()) / 60
    flags = ["--runs", str(args.out / "gpu" / "rows"), "--out", str(args.out)]
    flags += ["--minutes", f"{max(minutes, 0.01):.2f}"] if args.minutes else []
    flags += ["--size", "tiny", "--batch_size", "2"] if args.rehearse else []
    path, labels = args.out / "gpu" / "cost.json", [label for label, *_ in cost.COST]
    earlier = read_json(path, "what was measured before") if path.exists() else {}
    here = earlier.get("device") == device_name(args) and earlier["torch"] == torch.__version__
    known = {row["label"]: row for row in earlier["rows"]} if here else {}
    changed, outdated = (changed_rows(earlier), earlier.get("outdated", {})) if here else ([], {})
    if args.again:                                              # cost.py keeps its rows too
        (args.out / "gpu" / "rows" / "cost.json").unlink(missing_ok=True)
    wanted = ["1"] if args.rehearse else ORDER
    absent = [number for number in wanted if here and labels[int(number) - 1] in earlier["missing"]]
    other_code = [number for number in wanted if labels[int(number) - 1] in changed]
    other_code.sort(key=lambda number: labels[int(number) - 1] not in outdated)
    if not args.again:
        wanted = absent + other_code or wanted
    measured = cost.parse_args([*flags, "--row", *wanted])
    table = cost.folder_of(measured) / "runs.json"
    before = read_json(table, "what cost.py measured") if table.exists() else {}
    cost.run(measured)
    found, today = read_json(table, "what cost.py measured"), time.strftime("%Y-%m-%d")
    rows, code = {}, {}
    for row in found["rows"]:
        if row["sec_per_step"] == known.get(row["label"], {}).get("sec_per_step"):
            continue                                            # not measured today
        flops = 1e9 * (found["batch"] * row["gflop_per_image"] + row["gflop_optimizer"])
        rows[row["label"]] = {k: row[k] for k in ("label", "passes", "sec_per_step", "memory_gb", "paper_sec_per_step")}
        rows[row["label"]] |= dict(share_of_matrix_rate=flops / row["sec_per_step"] / rate, date=today)
        code[row["label"]] = code_of(row["command"])
    outdated = {label: why for label, why in outdated.items() if label not in rows}
    if here:
        for label, row in known.items():
            rows.setdefault(label, row | dict(date=row.get("date", earlier["date"])))
            code.setdefault(label, earlier.get("code", {}).get(label))
        whole = {row["label"]: row for row in [*before.get("rows", ()), *found["rows"]]}
        found |= dict(rows=[whole[label] for label in labels if label in whole], outdated=outdated)
        write_atomic(table, json_text(found, indent=1))
        write_atomic(table.with_name("README.md"), cost.page(found, measured.command))
    kept = dict(before=earlier["before"]) if "before" in earlier else {}                # what the texts compare with
    return dict(batch=found["batch"], precision=found["precision"], matrix_rate=rate,
                rows=[rows[label] for label in labels if label in rows],
                missing=[label for label in labels if label not in rows], code=code, outdated=outdated,
                **kept)


def parts_timed(args, spans):
    """The calls of PARTS leave (name, begun, ended) in `spans`: events of the device, which nobody waits for."""
    def now():
        if args.rehearse:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(part, action):
        def wrapped(*rest, **flags):
            begun = now()
            result = action(*rest, **flags)
            spans.append((part, begun, now()))
            return result
        return wrapped

    return replaced([(owner, name, functools.partial(timed, part)) for owner, name, part in PARTS])


def profiled(args):
    """The kernels of a step of FSF-DMD after warm-up, by kind: means over five steps, in which nothing waits.

    The five steps before these are timed without the profiler, which slows a step: `idle` is what their kernels leave.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cost.random_inputs(folder, args.size)
        batch, precision = (2, "fp32") if args.rehearse else (args.batch_size, "bf16")
        flags = shlex.split(f"--health_every 0 --device {args.device.type} --batch_size {batch} "
                            f"--precision {precision}")
        flags += ["--init", f"{folder}/imf.pt", "--data", f"{folder}/latents", "--out", f"{folder}/run"]
        # Of the GPU alone: with the calls behind its kernels the CPU falls behind, and the GPU waits.
        activity = ProfilerActivity.CPU if args.rehearse else ProfilerActivity.CUDA
        profiler, steps, first = profile(activities=[activity]), 5, 1 if args.rehearse else 12
        marks, spans, own_spans = [], [], []                    # marks: of the clock, begin and end twice

        def look(run):
            if run.step not in (first, first + steps, first + 2 * steps):
                return
            wait(args)
            marks.append(time.perf_counter())
            if run.step == first:
                spans.clear()
            if run.step == first + steps:
                own_spans.extend(spans)
                profiler.start()
                marks.append(time.perf_counter())
            if run.step == first + 2 * steps:
                profiler.stop()
                raise Done

        with after_each_step(look), parts_timed(args, spans):
            fsf_dmd.train(fsf_dmd.parse_args(flags))
    step, profiled_step = ((end - begin) / steps for begin, end in (marks[:2], marks[2:]))
    kinds, kernels = dict.fromkeys([kind for kind, _ in KINDS] + ["other"], 0.0), []
    for event in profiler.key_averages():
        if event.is_user_annotation or (event.device_type != DeviceType.CUDA and not args.rehearse):
            continue
        spent = (event.self_cpu_time_total if args.rehearse else event.self_device_time_total) / 1e6 / steps
        kind = next((kind for kind, names in KINDS if re.search(names, event.key, re.I)), "other")
        kinds[kind] += spent
        kernels.append(dict(seconds=spent, calls=event.count / steps, kind=kind, name=event.key[:200]))
    kinds["idle"] = max(0.0, step - sum(kinds.values()))
    largest = sorted(kernels, key=lambda kernel: -kernel["seconds"])[:30]
    parts = {f"seconds_of_{part}": 0.0 for _, _, part in PARTS}
    for name, start, end in own_spans:
        spent = end - start if args.rehearse else start.elapsed_time(end) / 1000
        parts[f"seconds_of_{name}"] += spent / steps
    return dict(step_seconds=step, profiled_step_seconds=profiled_step, seconds_of=kinds, largest=largest, **parts)


def wait(args):
    if args.device.type == "cuda":
        torch.cuda.synchronize()


def difference(args):
    """du/dt four ways, against the exact one in float32."""
    set_tf32(False)
    torch.manual_seed(0)
    net = LightningDiT(args.size, "in_context", input_size=16, in_channels=32).to(args.device)
    cost.draw_zeros(net)
    B = 2 if args.rehearse else 32
    x, tangent = (torch.randn(B, 32, 16, 16, device=args.device) for _ in range(2))
    t, y = torch.rand(B, device=args.device), torch.arange(B, device=args.device) % 1000
    s, guidance = t / 2, fixed_guidance(2.0, 0.0, 1.0, x)

    def u(x, t, s):
        return net(x, t, y, s, guidance)

    def as_bf16(h=0.005):                                       # what autocast would make of the difference
        with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16):
            return (u(x + h * tangent, t + h, s) - u(x - h * tangent, t - h, s)).float() / (2 * h)

    exact = total_derivative(u, x, t, s, tangent, exact=True)
    ways = {
        "exact, float32": lambda: total_derivative(u, x, t, s, tangent, exact=True),
        "difference, float32": lambda: total_derivative(u, x, t, s, tangent),
        "difference, TF32 (of the bf16 presets)": lambda: total_derivative(u, x, t, s, tangent),
        "difference, bf16": as_bf16,
    }
    rows = []
    for name, way in ways.items():
        set_tf32("TF32" in name)
        error = ((way() - exact).norm() / exact.norm()).item()
        rows.append(dict(way=name, relative_error=error, seconds=seconds_of(way, args)))
    return dict(batch=B, rows=rows)


@torch.no_grad()
def throughput(args):
    """Images a second of each stage of an evaluation, and minutes of 50,000 (without precision and recall)."""
    torch.manual_seed(0)
    n = 4 if args.rehearse else 50                              # as fid.collect asks for them
    net = LightningDiT(args.size, "in_context", input_size=16, in_channels=32).to(args.device).eval()
    dims = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, z_channels=32) if args.rehearse else {}
    cost.draw_zeros(net)                                        # else its gates are zeros: a card is faster on these
    vae, inception = VAE("vavae", **dims).to(args.device).eval(), Inception().to(args.device).eval()
    z = torch.randn(8 if not args.rehearse else 2, 32, 16, 16, device=args.device)
    images = torch.randint(256, (50 if not args.rehearse else 2, 3, 256, 256), dtype=torch.uint8, device=args.device)
    rows, seconds = [], {}
    for arithmetic in ("float32", "TF32"):
        set_tf32(arithmetic == "TF32")
        stages = {
            f"2-step sampling, {n} at a time":
                n / seconds_of(lambda: generate(net, n, (32, 16, 16), 2, 6.0, 0.9), args, 3),
            f"VAE decoding, {len(z)} at a time": len(z) / seconds_of(lambda: vae.decode(z), args),
            f"Inception features, {len(images)} at a time": len(images) / seconds_of(lambda: inception(images), args),
        }
        rows += [dict(stage=name, arithmetic=arithmetic, images_per_second=rate) for name, rate in stages.items()]
        seconds[arithmetic] = [50_000 / rate for rate in stages.values()]
    rows += [dict(stage=f"VAE decoding, {name}", arithmetic="TF32", images_per_second=rate)
             for name, rate in other_decoding(vae, z, args)]
    as_evaluated = [*seconds["TF32"][:2], seconds["float32"][2]]        # evaluate.py has the features in float32
    return dict(rows=rows, minutes_of_fid=sum(as_evaluated) / 60,
                minutes_of_fid_float32=sum(seconds["float32"]) / 60)


def other_decoding(vae, z, args):
    """[(name, images a second)] of decoding in other batches and layouts than a FID does, and with cuDNN's search."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        vae.to(memory_format=layout)
        for searched in (False, True):
            torch.backends.cudnn.benchmark = searched
            for n in (len(z), 6 * len(z)):
                some = z.repeat(n // len(z), 1, 1, 1).contiguous(memory_format=layout)
                name = f"{n} at a time, {str(layout).removeprefix('torch.')}, cudnn.benchmark {searched}"
                found.append((name, n / seconds_of(lambda some=some: vae.decode(some), args)))
    torch.backends.cudnn.benchmark = False
    return found


BLOCKS = dict(runs=runs, compiled=compiled, waits=waits, cost=cost_table, profile=profiled, difference=difference,
              throughput=throughput, evidence=evidence)


# ---- gpu.md ----------------------------------------------------------------------------------------------------------

def page(folder):
    """The text of gpu.md: of every block that is measured its command, device and numbers."""
    lines = ["# On a GPU", "", "Made by `python benchmarks/gpu.py`; the numbers of a block are in gpu/BLOCK.json.", ""]
    for name in BLOCKS:
        path = folder / f"{name}.json"
        if not path.exists():
            lines += [f"## {name}", "", f"Not run here: `python benchmarks/gpu.py --block {name}`.", ""]
            continue
        found = read_json(path, "what gpu.py measured")
        spent = "" if found["seconds"] is None else f", {found['seconds']:.0f} s"
        lines += [f"## {name}", "", f"{found['device']}, torch {found['torch']}, {found['date']}, "
                  f"`{found['command']}`{spent}.", ""]
        rows = found.get("rows") or [dict(kind=kind, seconds=spent) for kind, spent in found["seconds_of"].items()]
        body = []
        for row in rows:
            body.append([f"{value:.4g}" if isinstance(value, float) else value for value in row.values()])
        lines += [*markdown_lines(list(rows[0]), body), ""]
        if found.get("missing"):
            lines += ["Not run here: " + ", ".join(found["missing"]) + ".", ""]
        if found.get("outdated"):
            lines += [cost.outdated_line(found), ""]
        if found.get("table"):
            lines += [f"[The whole table]({found['table']}/README.md).", ""]
        more = {k: v for k, v in found.items() if isinstance(v, (int, float)) and k != "seconds"}
        lines += ["; ".join(f"{k} {v:.4g}" for k, v in more.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main(run, parse_args)
