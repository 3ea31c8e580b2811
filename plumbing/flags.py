"""Flags of the training scripts: the shared ones in groups, presets, --dry_run, the refusal of flags that do nothing.

A flag given on the command line goes over the preset, the preset over the default of the flag.
"""
import argparse
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from common import BadInput, rank
from data import data_name, preset_kind
from model import SIZES
from plumbing.checkpoints import load_checkpoint
from plumbing.files import HERE, sources
from plumbing.run_folder import RUNTIME_FLAGS, check_writable

# Upper limits of what no machine does: beyond them a slip is told at once, not by a library after minutes.
STEPS = 10 ** 9                 # and of every number of a flag that has no other
BATCH = 2 ** 20                 # images
SEED = 2 ** 32 - 1


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput, so that they end like every other one, and whose flags are spelled out."""

    def __init__(self, **options):
        # reproduce.py's --seeds is not a script's --seed; a file header keeps its lines
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        if message.startswith("unrecognized"):
            message += "; --help lists the flags"
        raise BadInput(message)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse an empty value, mostly a shell variable that is not set, instead of taking the default."""
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            if not word or (word.startswith("--") and word.partition("=")[1:] == ("=", "")):
                raise BadInput(f"{words[i - 1] if i and not word else word}: has an empty value, expected one; "
                               "leave the flag out where you mean its default")
        return super().parse_known_args(words, namespace)


def number(kind, low, high=STEPS, open_low=False):
    """An argparse type: a finite number in [low, high], or (low, high] with open_low."""
    noun = "an integer" if kind is int else "a number"
    limit = f"above {low}" if open_low else f"of at least {low}"
    limit += f" and at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            if not text.isdecimal():                                # so many digits that int() refuses them
                raise argparse.ArgumentTypeError(f"{text[:40]} is not {noun}, expected one {limit}") from None
            value = math.inf
        in_range = low <= value <= high                             # False for nan
        if not in_range or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range, expected {noun} {limit}")
        return value
    return parse


def folder_path(text):
    """An argparse type: the Path of a folder that is there or can be made."""
    try:
        check_writable(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def result_folder(text):
    """An argparse type: a folder_path into which README.md and runs.json are written; not over another's README.md."""
    folder = folder_path(text)
    if (folder / "README.md").exists() and not (folder / "runs.json").exists():
        raise argparse.ArgumentTypeError(f"{text}: has a README.md and no runs.json, so it is no folder of results; "
                                         "pass another")
    return folder


def parser(doc, init_help):
    """The flags that every training script shares, in groups.

    A script adds its own to p.network, p.method or p.run, then calls `resolve`.
    """
    p = Parser(description=doc)

    add = p.add_argument_group("data").add_argument
    add("--data", type=data_source, default="digits", help="`digits` (scikit-learn's, default), an .npz with images "
        "and labels, a folder of latent shards, of IDX or CIFAR files, or of small images")
    add("--vae", help="VAE checkpoint that decodes the pictures of latents "
        "(without it: their first 3 channels in false colour)")

    p.network = p.add_argument_group("network")
    add = p.network.add_argument
    add("--init", help=init_help)
    add("--size", default="tiny", choices=list(SIZES),
        help="network size; the preset sets tiny for pixels, small for images of 24 pixels or more, B/1 for latents; "
        "medium: for such images on a GPU, not tuned")
    add("--ema", type=number(float, 0, 1), default=0.99995,
        help="EMA decay (0.99995, Table 6); warmed up it is reached after 9 / (1 - ema) steps")
    add("--ema_warmup", type=number(int, 0, 1), default=1, help="1: decay min(ema, (1 + n) / (10 + n)); 0: constant")

    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=number(int, 1), help="optimizer steps; a finished run continues when given more")
    add("--batch_size", type=number(int, 1, BATCH), default=128,
        help="global batch, over all processes and micro-batches (128, Table 6)")
    add("--micro_batch", type=number(int, 0, BATCH), default=0,
        help="rows per forward pass; saves memory, changes no result (0: all at once)")
    add("--lr", type=number(float, 0, open_low=True),
        help="NorMuon learning rate, official scale (at B/1 6e-4 acts like AdamW at 1e-4)")
    add("--seed", type=number(int, 0, SEED), default=0, help="of the weights, the data order and all noise")
    add("--precision", choices=["fp32", "bf16"], default="fp32",
        help="bf16: autocast; weights, losses and the finite differences of du/dt stay fp32 (TF32 on CUDA); RCGM's "
        "recursion is in bf16, as its code's")

    p.method = p.add_argument_group("method")

    p.run = p.add_argument_group("run")
    add = p.run.add_argument
    add("--out", help="run folder (default: runs/<script>-<data>-<init> and the flags that differ from the preset)")
    add("--resume", choices=["auto", "no"], default="auto", help="auto: continue the run folder; no: start over in it")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--compile", type=auto_or_switch, default="auto",
        help="1: torch.compile every transformer block; auto: of latents on CUDA, and of images of 24 pixels or more "
        "in runs of 50 steps or more, where a C++ compiler is")
    add("--log_every", type=number(int, 1), default=10, help="steps between lines of metrics.jsonl")
    add("--preview_every", type=number(int, 0), default=0, help="steps between sample pictures (0: at the end only)")
    add("--eval_every", type=number(int, 0), default=0,
        help="steps between evaluations (0: at the end only); a start that is no random network is evaluated too")
    add("--save_every", type=number(int, 0), default=100, help="steps between state.pt (0: at the end only)")
    add("--dry_run", action="store_true", help="print the resolved configuration and exit; data are not read")
    return p


def data_source(text):
    """argparse type of --data: a folder loses the slash at its end; but digits/ is a folder, digits scikit-learn's."""
    plain = text.rstrip("/") or text
    return text if plain == "digits" else plain


def auto_or_switch(text):
    """argparse type: auto, 0 or 1."""
    if text not in ("auto", "0", "1"):
        raise argparse.ArgumentTypeError(f"{text} is none of auto, 0 and 1")
    return text if text == "auto" else int(text)


def time_law(text):
    """argparse type: uniform, or logitnormal:MEAN,SCALE (logitnormal alone is iMF's); see consistency.draw_times."""
    if text == "uniform":
        return text
    name, _, numbers = text.partition(":")
    try:
        mean, scale = (float(n) for n in (numbers or "-0.4,1").split(","))
    except ValueError:
        name = ""
    if name != "logitnormal" or not (math.isfinite(mean) and 0 < scale < math.inf):
        raise argparse.ArgumentTypeError(f"{text}: expected uniform or logitnormal:MEAN,SCALE with a positive scale")
    return f"logitnormal:{mean:g},{scale:g}"


def teacher_flag(p):
    p.network.add_argument(
        "--teacher", help="model.pt of the frozen teacher (default: the network of --init); the paper also trains DMD2 "
        "from a distilled student with the original teacher")


def guidance_flags(p):
    """Flags of every script: the guidance of teacher and samples."""
    add = p.method.add_argument
    add("--omega", type=number(float, 1), default=6.0,
        help="CFG scale omega of teacher, samples and FSF-DMD's fake side; other fake sides have none (Table 6)")
    add("--guide_to", type=number(float, 0, 1), default=0.9, help="guidance acts for t in [0, guide_to] (Table 6: "
        "0.9); some flow maps take it as an input, and have learned 0.5 to 1 only")
    add("--cfg_channels", type=number(int, 0), default=0,
        help="CFG of a plain teacher on this many first channels; 0: all (Table 4: 3 of 32)")


def flow_map_flags(p):
    """Flags of every script that trains a flow map: time law, derivative, distance, guidance, tokens."""
    add = p.method.add_argument
    add("--mask_prob", type=number(float, 0, 1), default=0.5,
        help="share of rows with s := t, the paper's random masking (Table 3); 0 in its plain CD row")
    add("--time_law", type=time_law, default="uniform",
        help="law of the two draws sorted into (t, s): uniform or logitnormal:MEAN,SCALE (iMF: -0.4,1)")
    add("--jvp", choices=["fd", "exact"], default="fd",
        help="du/dt by central difference, as the paper, or by torch.func.jvp")
    add("--fd_h", type=number(float, 1e-5, 0.5), default=0.005,
        help="h of the central difference (below 1e-5 it is rounding)")
    add("--huber_c", type=number(float, 1e-6), default=1e-3,
        help="c of the pseudo-Huber distance sqrt(mean e^2 + c^2) - c")
    add("--cosine", type=number(int, 0, 1), default=1,
        help="1: add 1 - cosine over the channels to the distance (needs two channels or more)")
    add("--label_drop", type=number(float, 0, 1), default=0.1,
        help="probability of the null label in the loss on data (Table 6)")
    guidance_flags(p)
    add("--omega_max", type=number(float, 1), default=8.0, help="iMF draws omega on [1, omega_max]")
    add("--omega_law", choices=["loguniform", "truncexp"], default="loguniform",
        help="law of that draw: iMF's, or a truncated exponential of omega itself")
    add = p.network.add_argument
    add("--n_tokens", type=number(int, 1, 1024),
        help="n, tokens per condition of the augmented backbone (default: 16; tiny, small, medium 1)")
    add("--token_block", type=number(int, 0, 1024),
        help="k, they join after this many blocks (default: 4; tiny, small, medium 2)")


def rcgm_flags(p):
    """Flags of RCGM, Eq. 66-67."""
    add = p.method.add_argument
    add("--delta", type=number(float, 0, 0.5, open_low=True), default=0.01,
        help="rcgm: delta of Eq. 66 (0.01, TwinFlow)")
    add("--order", type=number(int, 1, 100), default=2,
        help="rcgm: N, jumps of the target network in Eq. 66 (2, the paper)")
    add("--clamp", type=number(float, 0), default=1.0,
        help="rcgm: clamp of its residual to [-clamp, clamp] (1, TwinFlow); 0: off")
    add("--target_ema", type=number(float, 0, 1), default=0.99,
        help="rcgm: EMA decay of its target network, after a warm-up (TwinFlow: 0.99 to 0.999)")


def health_flag(p):
    p.run.add_argument("--health_every", type=number(int, 0), default=0, help="steps between health panels (0: none)")


def resolve(p, argv, presets, script):
    """argv -> the namespace: flags given, over the preset of (kind of data, init), over the parser's defaults.

    Where --init is the path of a checkpoint, the network in it says which preset.
    `args.sources` says who set each flag, `args.code` what the script consists of (`sources`; {} of one that lies
    elsewhere).  script: its file, whose name the run folder gets.
    """
    file, script = Path(script), Path(script).stem
    everything = vars(p.parse_args(argv))                           # --help and bad flags end here
    defaults = {k: p.get_default(k) for k in everything}
    given = given_flags(p, argv, everything)
    kind, inits = preset_kind(everything["data"]), sorted({init for _, init in presets})
    init = everything["init"]
    init_kind, stored = init, {}
    if init not in inits:
        init_kind, stored = look_into(init, inits, given, defaults)
    preset = presets[kind, init_kind] | stored
    values = defaults | preset | given
    if values.get("teacher") and not Path(values["teacher"]).is_file():
        raise BadInput(f"--teacher {values['teacher']}: no such file, expected a model.pt")
    if not values["out"]:
        name = f"{script}_{values['loss']}" if "loss" in values else script             # consistency_cd
        values["out"] = folder_name(name, values, given, defaults | preset, init_kind)
    args = argparse.Namespace(**values)
    args.sources = dict.fromkeys(values, "default") | dict.fromkeys(preset, "preset") | dict.fromkeys(given, "given")
    args.start, args.script = init_kind, script
    args.code = sources(file.name) if file.resolve() == HERE / file.name else {}
    if args.ema == 1 and not args.ema_warmup:
        raise BadInput("--ema 1 --ema_warmup 0: the result would be the network of step 0; expected --ema below 1")
    if args.compile == "auto":
        args.compile = resolve_compile(args, kind)
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        if kind == "latents" and args.compile == 0 and getattr(args, "jvp", "fd") == "fd" and on_gpu and rank() == 0:
            print("not compiled, so slower: no C compiler or no Python.h (python3-dev) is here")
    if kind != "latents":
        refuse(args, ["vae"], f"decodes latents, and --data {args.data} has pixels")
    if kind == "latents" and rank() == 0 and not args.dry_run and Path(args.data).exists():
        shown = []
        for k in presets[kind, init_kind]:
            note = "" if args.sources[k] == "preset" else " (given)"
            shown.append(f"--{k} {values[k]}{note}")
        print(f"{script}.py, latents, {init_kind}: {' '.join(shown)}")
    return args


def checked(args):
    """args, after a script's own refusals; with --dry_run they are printed, and the program ends."""
    if not args.dry_run:
        return args
    if args.data != "digits" and not Path(args.data).exists():
        print(f"--data {args.data}: is not there; by its name, below is what {preset_kind(args.data)} get")
    print(f"{args.script}.py: preset ({preset_kind(args.data)}, {args.start})")
    for k in sorted(args.sources.keys() - {"dry_run"}):
        value = getattr(args, k)
        print(f"  --{k:<14} {'-' if value is None else str(value):<12} {args.sources[k]}")
    sys.exit(0)


def resolve_compile(args, kind):
    """What --compile auto means for a kind of data: 0, 1, or "auto", which is left to the device (compile_blocks)."""
    if getattr(args, "jvp", "fd") == "exact":
        return 0
    if not os.path.exists(Path(sysconfig.get_path("include"), "Python.h")):     # what torch.compile makes includes it
        return 0
    if kind == "latents":                                           # on a GPU Triton needs a C compiler
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return "auto" if compiler else 0
    # Measured on Fashion-MNIST, one CPU thread: a fifth of a step is saved (FSF-DMD 0.3 s, DMD2 over a second), 17 s go
    # into the first one.  The digits' runs are done before that.
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return int(kind == "images" and args.steps >= 50 and shutil.which(compiler) is not None)


def given_flags(p, argv, names):
    """Only the flags on the command line, of all their names: argparse leaves alone what a namespace has already."""
    unset = object()
    found = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset))))
    return {k: v for k, v in found.items() if v is not unset}


def look_into(path, inits, given, defaults):
    """A checkpoint of --init -> ("imf" or "fm", the flags that its network decides)."""
    if not Path(path).is_file():
        expected = f"expected {' or '.join(inits)}, or the path of a model.pt"
        raise BadInput(f"--init {path}: {'no such file' if Path(path).suffix else expected}")
    config = load_checkpoint(path)["config"]
    kind = "imf" if config["conditioning"] == "in_context" else "fm"
    if kind not in inits:
        raise BadInput(f"--init {path}: holds a {config['conditioning']} network, "
                       f"expected one for --init {' or '.join(inits)}")
    names = [k for k in ("size", "n_tokens", "token_block") if k in defaults]
    stored = {k: config[k] for k in names if k in config}
    others = [k for k in names if k in given and given[k] != stored.get(k)]
    differ = [f"--{k} {given[k]} (it has {stored.get(k, 'none')})" for k in others]
    if differ:
        raise BadInput(f"--init {path}: the network is as the file has it, not {', '.join(differ)}; leave that out")
    return kind, stored


def network_name(path):
    """What a folder is named after where a network is given by its path: of a model.pt its folder's name."""
    path = Path(path)
    return path.parent.name if path.name == "model.pt" and path.parent.name else path.stem


def folder_name(script, values, given, preset_values, init_kind):
    """runs/<script>-<data>-<init>, then each flag that was given and differs from the preset."""
    init = values["init"] if values["init"] == init_kind else network_name(values["init"])
    not_named = RUNTIME_FLAGS | {"data", "init", "loss"}
    shown = given | ({"teacher": network_name(given["teacher"])} if given.get("teacher") else {})
    differs = [f"{k}{shown[k]}" for k in sorted(given) if k not in not_named and given[k] != preset_values.get(k)]
    name = "-".join([script, data_name(values["data"]), init, *differs]).replace("/", "")
    if len(os.fsencode(name)) > 255:                                # no file system takes more
        raise BadInput(f"the default --out, runs/{name[:40]}..., is too long a name for a folder; pass --out")
    return str(Path("runs") / name)


def refuse(args, flags, why):
    """BadInput if one of these flags was given although it would do nothing."""
    idle = [f"--{flag}" for flag in flags if args.sources.get(flag) == "given"]
    if idle:
        raise BadInput(f"{', '.join(idle)}: {why}; leave that out")


def refuse_idle(args):
    """`refuse` for the flags of `flow_map_flags` that do nothing beside the others, in the scripts that distil."""
    if args.start == "fm":
        refuse(args, ["n_tokens", "token_block", "cd_guidance", "omega_max", "omega_law"],
               "the network of --init fm has no guidance input")
    if args.start == "scratch":
        refuse(args, ["teacher"], "--init scratch has none")
        refuse(args, ["cd_guidance"], "L_CT of --init scratch draws omega as iMF does")
    elif args.cd_guidance == "fixed":
        refuse(args, ["omega_max", "omega_law"], "omega is drawn with --cd_guidance drawn only")
    refuse_idle_terms(args)
    refuse_guidance(args)


def refuse_idle_terms(args):
    """`refuse` for the flags of du/dt, and of the draw of omega, where there is nothing to derive or to draw."""
    if args.jvp == "exact":
        refuse(args, ["fd_h"], "--jvp exact takes no difference")
    if args.mask_prob == 1:
        refuse(args, ["jvp", "fd_h", "delta", "order"], "--mask_prob 1 leaves no row with s < t")
    if args.omega_max == 1:
        refuse(args, ["omega_law"], "--omega_max 1 draws no omega")


def refuse_guidance(args):
    """`refuse` for the flags of guidance that the teacher would not read: only the student would be guided."""
    file = args.teacher or (args.init if args.init not in ("imf", "fm", "scratch") else None)
    asked = {"omega", "guide_to", "cfg_channels"} & {k for k, source in args.sources.items() if source == "given"}
    if not asked:
        return
    velocity = args.start == "fm" or getattr(args, "loss", None) == "fm"            # no omega among its inputs
    teacher = "plain" if velocity else "in_context"
    if file:
        teacher = load_checkpoint(file)["config"]["conditioning"]
    if teacher == "decoupled":
        refuse(args, sorted(asked), f"the flow map in {file} takes no guidance, and it is the teacher; "
                                    "--teacher with a velocity network has one")
    if teacher == "plain" and velocity and args.omega == 1:
        refuse(args, ["guide_to", "cfg_channels"], "--omega 1 is no guidance")
    if teacher != "plain":
        refuse(args, ["cfg_channels"], "belongs to a velocity network (fm) as the teacher, whose CFG takes two passes")
