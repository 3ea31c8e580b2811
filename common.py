"""What is not a method: flags and presets, device and torchrun, randomness, EMA, checkpoints, the run folder, pictures.

A method script reads from top to bottom without opening this file.  Three rules hold everywhere:

  * All randomness of step k is drawn on the CPU from (seed, k) for the GLOBAL batch; a process or micro-batch takes its rows.
    So results depend neither on the number of processes nor on --micro_batch, and a resumed run sees what it would have seen.
  * Losses are per-sample means [b]; a script backpropagates their sum over the global batch size, and gradients are summed over
    processes (`sync_gradients`).  No DistributedDataParallel: it hides the sum, and skips it silently under torch.func.
  * Running a command again resumes it.  state.pt is written to a temporary name, flushed and renamed: never half a checkpoint.
"""
import argparse
import copy
import errno
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

from model import SIZES, LightningDiT, build, load_official
from vae import BadInput, data_kind, read_weights, to_images

CONSISTENCY_FLAGS = {"mask_prob", "time_law", "jvp", "fd_h", "huber_c", "cosine", "label_drop", "omega_max", "omega_law"}
# Flags that change how a run is carried out, not what it computes: a run folder may be continued with other values of these.
RUNTIME_FLAGS = {"vae", "steps", "micro_batch", "device", "compile", "out", "resume", "log_every", "preview_every", "eval_every", "save_every",
                 "health_every", "dry_run"}


# ------------------------------------------------------------------------------------------------------------------------------
# Flags and presets
# ------------------------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a finite number in [low, high], or (low, high] with open_low."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (open_low and value == low) or math.isinf(value):
            noun = "an integer" if kind is int else "a number"
            limit = f"above {low}" if open_low else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {noun} {limit}" + (f" and at most {high}" if high < math.inf else ""))
        return value
    return parse


def parser(doc, init_help):
    """The flags that every training script shares.  A script adds its own, then calls `resolve`."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="digits", help="`digits` (scikit-learn's, default), an .npz with images and labels, a folder of latent shards, or a folder of small images")
    p.add_argument("--vae", help="VAE checkpoint that decodes the pictures of latents (without it: their first 3 channels in false colour)")
    p.add_argument("--size", default="tiny", choices=list(SIZES), help="network size; the preset sets tiny for pixels, B/1 for latents")
    p.add_argument("--init", help=init_help)
    p.add_argument("--steps", type=number(int, 1), help="optimizer steps; a finished run continues when given more")
    p.add_argument("--batch_size", type=number(int, 1), default=128, help="global batch, over all processes and micro-batches (128, Table 6)")
    p.add_argument("--micro_batch", type=number(int, 0), default=0, help="rows per forward pass; saves memory, changes no result (0: all at once)")
    p.add_argument("--lr", type=number(float, 0, open_low=True), help="NorMuon learning rate, official scale (6e-4 acts like AdamW at 1e-4)")
    p.add_argument("--ema", type=number(float, 0, 1), default=0.99995, help="EMA decay (0.99995, Table 6)")
    p.add_argument("--ema_warmup", type=int, choices=[0, 1], default=1, help="1: decay min(ema, (1 + n) / (10 + n)); 0: constant")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the weights, the data order and all noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast; weights, losses and finite differences stay fp32 (TF32 on CUDA)")
    p.add_argument("--compile", type=int, choices=[0, 1], default=0, help="1: torch.compile every transformer block")
    p.add_argument("--out", help="run folder (default: runs/<script>-<data>-<init> and the flags that differ from the preset)")
    p.add_argument("--resume", choices=["auto", "no"], default="auto", help="auto: continue the run folder; no: start over in it")
    p.add_argument("--log_every", type=number(int, 1), default=10, help="steps between lines of metrics.jsonl")
    p.add_argument("--preview_every", type=number(int, 0), default=0, help="steps between sample pictures (0: at the end only)")
    p.add_argument("--eval_every", type=number(int, 0), default=0, help="steps between evaluations (0: at the start and the end only)")
    p.add_argument("--save_every", type=number(int, 0), default=0, help="steps between state.pt (0: at the end only)")
    p.add_argument("--dry_run", action="store_true", help="print the resolved configuration and exit")
    return p


def flow_map_flags(p):
    """Flags of every script that trains a flow map: time law, derivative, distance, guidance."""
    p.add_argument("--mask_prob", type=number(float, 0, 1), default=0.5, help="probability of s := t, the paper's random masking (Table 3); 0 in its plain CD row")
    p.add_argument("--time_law", choices=["uniform", "logitnormal"], default="uniform", help="law of the two draws sorted into (t, s); logitnormal is iMF's (-0.4, 1)")
    p.add_argument("--jvp", choices=["fd", "exact"], default="fd", help="du/dt by central difference, as the paper, or by torch.func.jvp")
    p.add_argument("--fd_h", type=number(float, 0, 0.5, open_low=True), default=0.005, help="h of the central difference")
    p.add_argument("--huber_c", type=number(float, 0, open_low=True), default=1e-3, help="c of the pseudo-Huber distance sqrt(mean e^2 + c^2) - c")
    p.add_argument("--cosine", type=int, choices=[0, 1], default=1, help="1: add 1 - cosine over the channels to the distance (needs two channels or more)")
    p.add_argument("--label_drop", type=number(float, 0, 1), default=0.1, help="probability of the null label in the consistency loss (Table 6)")
    p.add_argument("--omega", type=number(float, 1), default=6.0, help="CFG scale omega of teacher, fake side and samples (Table 6)")
    p.add_argument("--guide_to", type=number(float, 0, 1), default=0.9, help="guidance acts for t in [0, guide_to] (Table 6: 0.9)")
    p.add_argument("--cfg_channels", type=number(int, 0), default=0, help="CFG of a plain teacher on this many first channels; 0: all (Table 4: 3 of 32)")
    p.add_argument("--omega_max", type=number(float, 1), default=8.0, help="iMF draws omega on [1, omega_max]")
    p.add_argument("--omega_law", choices=["loguniform", "truncexp"], default="loguniform", help="law of that draw: iMF's, or the truncated exponential the paper names")
    p.add_argument("--n_tokens", type=number(int, 1), help="n, tokens per condition of the augmented backbone (default: 16; tiny 1)")
    p.add_argument("--token_block", type=number(int, 0), help="k, they join after this many blocks (default: 4; tiny 2)")


def resolve(p, argv, presets, script):
    """argv -> the namespace: flags given, over the preset of (kind of data, init), over the parser's defaults.

    Where --init is the path of a checkpoint, the network in it says which preset.  `args.sources` says who set each flag.
    """
    everything = vars(p.parse_args(argv))                                 # --help and bad flags end here
    defaults = {k: p.get_default(k) for k in everything}
    p._defaults.clear()                                                   # of set_defaults
    for action in p._actions:
        action.default = argparse.SUPPRESS
    given = vars(p.parse_args(argv))
    kind, inits = data_kind(everything["data"]), sorted({init for _, init in presets})
    init = given.get("init") or (inits[0] if len(inits) == 1 else defaults["init"])
    init_kind, stored = init, {}
    if init not in inits:
        if not Path(init).is_file():
            raise BadInput(f"--init {init}: expected {' or '.join(inits)}, or the path of a model.pt")
        config = load_checkpoint(init)["config"]
        init_kind = "imf" if config["conditioning"] == "in_context" else "fm"
        if init_kind not in inits:
            raise BadInput(f"--init {init}: holds a {config['conditioning']} network, expected one for --init {' or '.join(inits)}")
        stored = {k: config[k] for k in ("size", "n_tokens", "token_block") if k in defaults and k in config}
        differ = [f"--{k} {given[k]} (it has {v})" for k, v in stored.items() if given.get(k, v) != v]
        if differ:
            raise BadInput(f"--init {init}: the network is as the file has it, not {', '.join(differ)}; leave that out")
    preset = presets[kind, init_kind] | stored
    values = defaults | preset | given | dict(init=init)
    sources = {k: "given" if k in given else "preset" if k in preset else "default" for k in values}
    if not values["out"]:
        differs = [f"{k}{given[k]}" for k in sorted(given) if k not in RUNTIME_FLAGS | {"data", "init", "loss"} and given[k] != (defaults | preset).get(k)]
        name = [script, Path(values["data"]).stem, init if init_kind == init else Path(init).parent.name or Path(init).stem, *differs]
        values["out"] = str(Path("runs") / "-".join(name).replace("/", ""))
    args = argparse.Namespace(**values)
    args.sources = sources
    if args.dry_run:
        print(f"{script}: preset ({kind}, {init_kind})")
        for k in sorted(set(values) - {"dry_run"}):
            print(f"  --{k:<14} {'-' if values[k] is None else values[k]!s:<12} {sources[k]}")
        sys.exit(0)
    args.start = init_kind
    if kind == "latents" and rank() == 0:
        print(f"{script}, latents, {init_kind}: " + " ".join(f"--{k} {values[k]}" + ("" if sources[k] == "preset" else " (given)") for k in presets[kind, init_kind]))
    return args


def refuse(args, flags, why):
    """BadInput if one of these flags was given although it would do nothing."""
    idle = [f"--{flag}" for flag in flags if args.sources.get(flag) == "given"]
    if idle:
        raise BadInput(f"{', '.join(idle)}: {why}; leave that out")


def refuse_idle(args):
    """`refuse` for the flags of `flow_map_flags` that do nothing beside the others, in the scripts that distil."""
    if args.start == "fm":
        refuse(args, ["n_tokens", "token_block", "cd_guidance", "omega_max", "omega_law"], "the network of --init fm has no guidance input")
    else:
        refuse(args, ["cfg_channels"], "belongs to --init fm; the augmented network takes omega as an input")
    if args.start == "scratch":
        refuse(args, ["cd_guidance"], "L_CT of --init scratch draws omega as iMF does")
    elif args.cd_guidance == "fixed":
        refuse(args, ["omega_max", "omega_law"], "omega is drawn with --cd_guidance drawn only")
    if args.jvp == "exact":
        refuse(args, ["fd_h"], "--jvp exact takes no difference")


def main(train, parse_args):
    """Run a script: bad input ends in one line and exit code 2."""
    try:
        train(parse_args())
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:                                             # outside of a Run, which saves first
        print(f"\n{Path(sys.argv[0]).name}: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                               # `| head`
        os._exit(141)
    except OSError as error:
        what = "no space left on the disk; free some" if error.errno == errno.ENOSPC else f"{error.filename}: {error.strerror}; mend that"
        print(f"{Path(sys.argv[0]).name}: error: {what} and run the same command again", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------------------
# Device and processes
# ------------------------------------------------------------------------------------------------------------------------------

def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def pick_device(flag):
    """--device -> torch.device that works here: auto, cpu, cuda (under torchrun this process's own) or cuda:N."""
    name = flag if flag != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {flag}: not usable here ({str(error).splitlines()[0]}); expected auto, cpu, cuda or cuda:N") from None
    return device


def setup(args):
    """The device, the process group under torchrun, TF32 and the seed of the weights.  -> torch.device"""
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "bf16"
    if world() > args.batch_size:
        raise BadInput(f"--batch_size {args.batch_size}: smaller than the {world()} processes, expected at least one row for each")
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)                                          # the same initial weights in every process
    return device


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def compile_blocks(args, *nets):
    """torch.compile each transformer block in place: one small graph, shared by all blocks and networks; state-dict keys stay."""
    if args.compile:
        for net in nets:
            for block in net.blocks:
                block.compile()


def sync_gradients(net):
    """Sum the gradients over all processes, in one message.  A parameter without gradient counts as zero."""
    if world() == 1:
        return
    params = [p for p in net.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p).clone()


def gradient_norm(net):
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


# ------------------------------------------------------------------------------------------------------------------------------
# Randomness and batches
# ------------------------------------------------------------------------------------------------------------------------------

def step_rng(seed, step):
    """The CPU generator of one training step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2))


def batch_rows(n, batch_size, seed, step):
    """Row numbers of step's global batch: epochs of n shuffled rows, cut into batches without a gap.  -> int64 [batch_size]"""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epoch = position // n
    return torch.cat([epoch_order(n, seed, int(e))[position[epoch == e] % n] for e in epoch.unique()])


def micro_batches(batch, args, device):
    """This process's rows of the global batch (a dict of [B, ...] CPU tensors), --micro_batch at a time, as namespaces on the device."""
    B = args.batch_size
    low, high = rank() * B // world(), (rank() + 1) * B // world()
    size = args.micro_batch or B
    for start in range(low, high, size):
        rows = slice(start, min(start + size, high))
        yield SimpleNamespace(**{k: v[rows].to(device, non_blocking=True) for k, v in batch.items()})


def noise_by_index(seed, indices, shape):
    """Noise [len(indices), *shape] in which row i depends on (seed, index i) alone: batch size and process count change nothing."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(i))) for i in indices])


# ------------------------------------------------------------------------------------------------------------------------------
# EMA and checkpoints
# ------------------------------------------------------------------------------------------------------------------------------

def ema_decay(args, n):
    """Decay after n updates.  A constant 0.99995 would keep 82% of the initial weights after 4,000 steps, so it warms up."""
    return min(args.ema, (1 + n) / (10 + n)) if args.ema_warmup else args.ema


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) net, for parameters; buffers are fixed tables."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def frozen_copy(net):
    """A copy of a network that nothing trains: EMA, teacher, fake side."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def save_atomic(obj, path):
    """torch.save that leaves either the old file or the new one: temporary name, flush to disk, rename."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path):
    """A model.pt as dict: config and weights (EMA) of the network, data statistics, args.  Never unpickles code.

    Official LightningDiT and iMF weights are taken too (model.load_official); their `data` is None.
    """
    if str(path).endswith(".safetensors"):
        return official(path, read_weights(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:                                            # truncated zip, pickle with code, text file, ...
        raise BadInput(f"{path}: not a model.pt ({str(error).splitlines()[0][:120]})") from None
    if isinstance(checkpoint, dict) and {"config", "weights", "data", "args"} <= set(checkpoint):
        return checkpoint
    return official(path, checkpoint)


def official(path, state):
    """The checkpoint dict of official LightningDiT or iMF weights, which know neither data nor flags."""
    try:
        net = load_official(state)
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: not a model.pt of this project, nor official LightningDiT or iMF weights ({error})") from None
    return dict(config=net.config, weights=net.state_dict(), data=None, args={}, step=0)


def load_network(path, data=None, conditioning=None):
    """(network with the EMA weights of a model.pt, its checkpoint).  data: refuse a network made for other shapes or classes."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    if conditioning and config["conditioning"] not in conditioning:
        raise BadInput(f"{path}: is a {config['conditioning']} network, expected {' or '.join(conditioning)}")
    if data is not None:
        made_for = checkpoint["data"] or dict(shape=[config["in_channels"], config["input_size"], config["input_size"]])
        for name, found, expected in (("shape", made_for["shape"], list(data.x.shape[1:])), ("num_classes", config["num_classes"], data.num_classes)):
            if found != expected:
                raise BadInput(f"{path}: was made for {name} {found}, but --data {data.source} has {expected}")
        if data.vae and made_for.get("vae", data.vae) not in ("", data.vae):
            raise BadInput(f"{path}: was trained on latents of another VAE ({made_for['vae']}) than --data {data.source} ({data.vae})")
    try:
        net = build(config)
        net.load_state_dict(checkpoint["weights"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: its weights do not fit its configuration ({' '.join(str(error).split())[:160]})") from None
    return net, checkpoint


def load_start(path, data):
    """(student, frozen teacher) that start from a model.pt.  A plain velocity network becomes a flow map by decoupled conditioning."""
    teacher, _ = load_network(path, data)
    net = teacher
    if teacher.conditioning == "plain":
        net = LightningDiT(**teacher.config | dict(conditioning="decoupled"))
        net.load_state_dict(teacher.state_dict())                         # the same parameters (DMF)
    return copy.deepcopy(net).train(), frozen_copy(teacher)


def new_network(args, data, conditioning):
    """A fresh LightningDiT for this data."""
    channels, size, _ = data.x.shape[1:]
    tokens = {k: v for k, v in dict(n_tokens=args.n_tokens, token_block=args.token_block).items() if v is not None}
    try:
        return LightningDiT(args.size, conditioning, input_size=size, in_channels=channels, num_classes=data.num_classes, **tokens)
    except ValueError as error:
        raise BadInput(f"--size {args.size}: {error}") from None


# ------------------------------------------------------------------------------------------------------------------------------
# The run folder: resume, log, save, stop
# ------------------------------------------------------------------------------------------------------------------------------

class Run:
    """One run folder while it is written.  `state` maps names to everything that has a state_dict (networks, EMA, optimizers).

    with Run(args, state, model, data) as run:        # model: the EMA network that model.pt keeps
        for step in run.steps():                      # from where the folder left off; stops and saves on Ctrl-C and SIGTERM
            ...
            run.log(losses, times, grad_norm)         # losses: sums over this process's rows / B; refused if not finite
            if run.due(args.save_every): run.save()   # also at the last step
    """

    def __init__(self, args, state, model, data):
        self.args, self.state, self.model, self.data = args, state, model, data
        self.folder, self.main = Path(args.out), rank() == 0
        self.identity = {k: v for k, v in vars(args).items() if k not in RUNTIME_FLAGS | {"sources"}}
        self.step, self.evaluations, self.pending, self.stop_signal = 0, [], [], None
        if self.folder.is_file() or self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "args.json").exists():
            raise BadInput(f"--out {self.folder}: exists and is no run folder, expected a new one; nothing was touched")
        if world() > 1:
            dist.barrier()
        if args.resume == "no" and self.main and self.folder.exists():
            shutil.rmtree(self.folder)
        if world() > 1:
            dist.barrier()
        self.resume()

    def resume(self):
        saved = self.folder / "args.json"
        if saved.exists():
            before = json.loads(saved.read_text())
            differ = [f"--{k} {before.get(k)} (there) {v} (here)" for k, v in self.identity.items() if before.get(k) != v]
            if differ:
                raise BadInput(f"{self.folder} holds another configuration: {', '.join(differ)}; choose another --out, or --resume no to start over")
        path = self.folder / "state.pt"
        if path.exists():
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                for name, part in self.state.items():
                    part.load_state_dict(saved[name])
            except Exception as error:
                raise BadInput(f"{path}: cannot be resumed ({' '.join(str(error).split())[:120]}); --resume no starts over") from None
            self.step, self.evaluations = saved["step"], saved["evaluations"]
            if self.main:
                done = f"is done ({self.step} steps); --steps trains longer, --resume no starts over"
                print(f"{self.folder}: " + (f"resuming at step {self.step}" if self.step < self.args.steps else done))
        elif self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "args.json").write_text(json.dumps(self.identity, indent=1))
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.args.steps, initial=self.step, desc=self.folder.name, disable=not self.main, mininterval=0.5, dynamic_ncols=True)
        if self.main and self.step and (self.folder / "metrics.jsonl").exists():       # lines after the saved step: killed, then resumed
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            (self.folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
        self.clock, self.clock_step = time.perf_counter(), self.step
        return self

    def __exit__(self, kind, error, trace):
        self.bar.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def ask_to_stop(self, signum, frame):
        self.stop_signal = signum

    def steps(self):
        while self.step < self.args.steps:
            yield self.step
            if self.stopping():
                self.save()
                self.bar.close()
                if self.main:
                    print(f"\nstopped at step {self.step} and saved; run the same command again to resume", file=sys.stderr)
                sys.exit(128 + self.stop_signal)

    def stopping(self):
        """All processes stop after the same step."""
        if world() > 1:
            signals = torch.tensor(self.stop_signal or 0, device=next(self.model.parameters()).device)
            dist.all_reduce(signals, op=dist.ReduceOp.MAX)
            self.stop_signal = int(signals) or None
        return self.stop_signal is not None

    def due(self, every):
        """True every `every` steps and at the last one (every = 0: only there)."""
        return self.step == self.args.steps or (every > 0 and self.step % every == 0)

    def log(self, losses, times, grad_norm):
        """End of a step: `losses` are 0-dim tensors on the device; `times` CPU tensors, to say where a loss broke."""
        self.pending.append((self.step, {k: v.detach() for k, v in losses.items()}, times, grad_norm))
        self.step += 1
        self.bar.update()
        if self.due(self.args.log_every) or self.due(self.args.save_every) or self.due(self.args.eval_every):
            self.flush()

    def flush(self):
        """Check and write the losses since the last flush: one transfer from the device, not one a step."""
        if not self.pending:
            return
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([losses[k].float() for k in names]) for _, losses, _, _ in self.pending])   # [steps, names]
        if world() > 1:
            dist.all_reduce(values)
        values, norms = values.cpu(), torch.stack([n.float() for *_, n in self.pending]).cpu()
        for (step, _, times, _), row, norm in zip(self.pending, values, norms):
            bad = [k for k, v in zip(names, row) if not v.isfinite()] or ([] if norm.isfinite() else ["gradient norm"])
            if bad:
                spans = ", ".join(f"{k} in [{v.min():.3g}, {v.max():.3g}], median {v.median():.3g}" for k, v in times.items())
                raise BadInput(f"{bad[0]} is not finite at step {step} ({spans}); the last state.pt is untouched: lower --lr, or look at the data")
        seconds = (time.perf_counter() - self.clock) / max(1, self.step - self.clock_step)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)       # the process
        if torch.cuda.is_initialized():
            memory = torch.cuda.max_memory_allocated()                                                               # the device
        line = dict(zip(names, values.mean(0).tolist())) | dict(grad_norm=norms.mean().item(), sec_per_step=seconds)
        line |= dict(images_per_sec=self.args.batch_size / seconds, memory_gb=memory / 1e9)
        self.write(line)
        shown = {k: f"{v:.3g}" for k, v in line.items() if k in names or k == "sec_per_step"}
        last = {k: f"{v:.1f}" for k, v in (self.evaluations[-1] if self.evaluations else {}).items() if k.startswith("fd_")}
        self.bar.set_postfix(shown | last)
        self.pending = []
        self.clock, self.clock_step = time.perf_counter(), self.step

    def write(self, line):
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(dict(step=self.step) | {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")

    def evaluated(self, metrics):
        """Keep an evaluation ({} of latents), which only the first process makes.  The time it took is not counted into sec/step."""
        if not metrics:
            return
        self.evaluations.append(dict(step=self.step) | metrics)
        self.write(metrics)
        self.clock, self.clock_step = time.perf_counter(), self.step

    def save(self):
        self.flush()
        if self.main:
            parts = {name: part.state_dict() for name, part in self.state.items()}
            save_atomic(parts | dict(step=self.step, evaluations=self.evaluations), self.folder / "state.pt")
            save_atomic(dict(config=self.model.config, weights=self.model.state_dict(), data=self.data.meta, step=self.step,
                             args={k: v for k, v in vars(self.args).items() if k != "sources"}), self.folder / "model.pt")
        if world() > 1:
            dist.barrier()
        self.clock, self.clock_step = time.perf_counter(), self.step

    def result(self, definition):
        """Write result.json: last and best of every metric, with their definition.  -> the dict"""
        last, best = (self.evaluations or [{}])[-1], {}
        for k in [k for k in last if k != "step"]:
            lower = k.startswith("fd")
            at = (min if lower else max)(self.evaluations, key=lambda e: e[k])
            best[k] = dict(value=at[k], step=at["step"])
        result = dict(last=last, best=best, evaluations=self.evaluations, definition=definition)
        if self.main:
            (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        return result


# ------------------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------------------

def preview(path, rows, meta, vae=None):
    """A PNG of labelled bands of images.  rows: [(caption, x [n, C, H, W] normalised)], ten to a line; meta: Data.meta; vae: of latents."""
    rows = [(text, to_images(x, meta, vae)) for text, x in rows]                                     # uint8 [n, H, W, C]
    height = rows[0][1].shape[1]
    scale = max(1, 48 // height)
    cell, per_line, caption = height * scale + 4, 10, 20
    lines = [math.ceil(len(x) / per_line) for _, x in rows]
    picture = Image.new("RGB", (per_line * cell + 4, sum(caption + n * cell for n in lines) + 4), "white")
    draw, top = ImageDraw.Draw(picture), 0
    for (text, x), n in zip(rows, lines):
        draw.text((4, top + 4), text, fill="black")
        for i, image in enumerate(x):
            tile = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).resize((height * scale, height * scale), Image.NEAREST)
            picture.paste(tile, (4 + i % per_line * cell, top + caption + i // per_line * cell))
        top += caption + n * cell
    picture.save(path)
