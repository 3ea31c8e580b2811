"""Plumbing on the ground floor: errors in one line, devices, processes, randomness, EMA, checkpoints, the run folder.

A method script reads from top to bottom without opening this file.  Three rules hold everywhere:

  * All randomness of step k is drawn on the CPU from (purpose, seed, k) for the GLOBAL batch (`Stream`); a process or
    micro-batch takes its rows.  So results depend neither on the number of processes nor on --micro_batch, and a
    resumed run sees what it would have seen.
  * Losses are per-sample means [b]; a script backpropagates their sum over the global batch size, and gradients are
    summed over processes (`sync_gradients`).  No DistributedDataParallel: it hides the sum, and skips it silently under
    torch.func.
  * Running a command again resumes it.  state.pt is written to a temporary name, flushed and renamed: never half a
    checkpoint.
"""
import copy
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import LightningDiT, build, load_official


class BadInput(Exception):
    """What the user can repair: one line that says what is wrong, what was expected and what to do.  Exit code 2."""


def main(train, parse_args):
    """Run a script: bad input ends in one line and exit code 2."""
    name = Path(sys.argv[0]).name
    try:
        train(parse_args())
    except BadInput as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:                                       # outside of a Run, which saves first
        print(f"\n{name}: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                         # `| head`
        os._exit(141)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}; repair that"
        if error.errno == errno.ENOSPC:
            what = "no space left on the disk; free some"
        print(f"{name}: error: {what} and run the same command again", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Device and processes
# ----------------------------------------------------------------------------------------------------------------------

def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier():
    """Wait for the other processes, if there are any."""
    if world() > 1:
        dist.barrier()


def pick_device(flag):
    """--device -> torch.device that works here: auto, cpu, cuda (under torchrun this process's own) or cuda:N."""
    name = flag
    if flag == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {flag}: not usable here ({reason}); expected auto, cpu, cuda or cuda:N") from None
    return device


def setup(args):
    """The device, the process group under torchrun, TF32 and the seed of the weights.  -> torch.device"""
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "bf16"
    if world() > args.batch_size:
        raise BadInput(f"--batch_size {args.batch_size}: smaller than the {world()} processes, "
                       "expected at least one row for each")
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)                                    # the same initial weights in every process
    return device


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def compile_blocks(args, *nets):
    """torch.compile each transformer block in place: one small graph for all blocks and networks; state-dict keys stay.

    nets: networks, or None for one that a method leaves out.
    """
    if not args.compile:
        return
    for net in nets:
        for block in net.blocks if net else ():
            block.compile()


def sync_gradients(*nets):
    """Sum the gradients over all processes, in one message a network.  A parameter without gradient counts as zero."""
    if world() == 1:
        return
    for net in nets:
        params = [p for p in net.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p).clone()


def gradient_norm(net):
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


# ----------------------------------------------------------------------------------------------------------------------
# Randomness and batches
# ----------------------------------------------------------------------------------------------------------------------

class Stream:
    """Random numbers of one purpose, on the CPU: numpy's Philox, a counter-based generator.

    Its 128-bit key is (purpose, seed) and the upper half of its 256-bit counter is the position (a step, an epoch; an
    index and a jump), so two streams that differ in any of these share no number, whatever is drawn from them.
    Every random number of training and sampling but the initial weights (torch.manual_seed) comes from here.
    """

    def __init__(self, purpose, seed, *position):
        key = np.array([zlib.crc32(purpose.encode()), seed], dtype=np.uint64)
        counter = np.zeros(4, dtype=np.uint64)
        counter[2:2 + len(position)] = position
        self.rng = np.random.Generator(np.random.Philox(key=key, counter=counter))

    def normal(self, *shape):
        """N(0, 1), float32."""
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))

    def uniform(self, *shape):
        """U[0, 1), float32."""
        return torch.from_numpy(self.rng.random(shape, dtype=np.float32))

    def integers(self, high, *shape):
        """Integers in 0 .. high - 1, int64; a plain int without shape."""
        drawn = self.rng.integers(high, size=shape or None)
        return torch.from_numpy(drawn) if shape else int(drawn)


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.from_numpy(Stream("order", seed, epoch).rng.permutation(n))


def batch_rows(n, batch_size, seed, step):
    """Row numbers of step's global batch: epochs of n shuffled rows, cut into batches without a gap.

    -> int64 [batch_size]
    """
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epoch = position // n
    rows = [epoch_order(n, seed, int(e))[position[epoch == e] % n] for e in epoch.unique()]
    return torch.cat(rows)


def micro_batches(batch, args, device):
    """This process's rows of the global batch, --micro_batch at a time, as namespaces on the device.

    batch: dict of [B, ...] CPU tensors.
    """
    B = args.batch_size
    low, high = rank() * B // world(), (rank() + 1) * B // world()
    size = args.micro_batch or B
    for start in range(low, high, size):
        rows = slice(start, min(start + size, high))
        yield SimpleNamespace(**{k: v[rows].to(device, non_blocking=True) for k, v in batch.items()})


def noise_by_index(purpose, seed, indices, shape, jump=0):
    """Noise [len(indices), *shape] of which row i depends on (purpose, seed, index i, jump) alone.

    So the batch size and the number of processes change nothing.
    """
    return torch.stack([Stream(purpose, seed, int(i), jump).normal(*shape) for i in indices])


def trainable(flag, *nets):
    """Whether networks keep gradients; where they do not, gradients still pass through to their inputs."""
    for net in nets:
        for name, p in net.named_parameters():
            p.requires_grad_(flag and name != "pos_embed")          # a fixed table


def accumulate(total, B, **losses):
    """total[name] += the sum of a loss [b] over B, without its graph: what `Run.log` takes."""
    for name, value in losses.items():
        total[name] = total.get(name, 0) + value.detach().sum() / B


# ----------------------------------------------------------------------------------------------------------------------
# EMA
# ----------------------------------------------------------------------------------------------------------------------

def ema_decay(args, n):
    """Decay after n updates.  It warms up: 0.99995 alone would keep 82% of the initial weights after 4,000 steps."""
    return min(args.ema, (1 + n) / (10 + n)) if args.ema_warmup else args.ema


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) net, for parameters; buffers are fixed tables."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def frozen_copy(net):
    """A copy of a network that nothing trains: EMA, teacher, fake side."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def frozen_view(net):
    """A network with the same weights, now and after every update, through which they get no gradient."""
    same = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    return copy.deepcopy(net, same).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Files of weights, and checkpoints
# ----------------------------------------------------------------------------------------------------------------------

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


def first_line(error, width=120):
    """The first words of an exception of a library, for one line of ours."""
    return str(error).splitlines()[0][:width] if str(error) else type(error).__name__


def read_weights(path):
    """The state dict in a .pt, .ckpt or .safetensors file, on the CPU.  BadInput if it is none.

    Never unpickles code (weights_only).
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    try:
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:                                        # written before torch 1.6: cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                      # pickle with code, truncated zip, text file, ...
        raise BadInput(f"{path}: not a file of weights ({first_line(error)})") from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise BadInput(f"{path}: holds no state dict of tensors")
    return state


def weights_hash(net):
    """Twelve hex digits of the SHA-256 of all tensors of a network."""
    tensors = [v.cpu().numpy().tobytes() for v in net.state_dict().values()]
    return hashlib.sha256(b"".join(tensors)).hexdigest()[:12]


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
    except Exception as error:                                      # truncated zip, pickle with code, text file, ...
        raise BadInput(f"{path}: not a model.pt ({first_line(error)})") from None
    if isinstance(checkpoint, dict) and {"config", "weights", "data", "args"} <= set(checkpoint):
        return checkpoint
    return official(path, checkpoint)


def official(path, state):
    """The checkpoint dict of official LightningDiT or iMF weights, which know neither data nor flags."""
    try:
        net = load_official(state)
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: not a model.pt of this project, nor official LightningDiT or iMF weights "
                       f"({error})") from None
    return dict(config=net.config, weights=net.state_dict(), data=None, args={}, step=0)


def load_network(path, data=None, conditioning=None):
    """(network with the EMA weights of a model.pt, its checkpoint).

    data: refuse a network that was made for other shapes, classes or latents.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    if conditioning and config["conditioning"] not in conditioning:
        raise BadInput(f"{path}: is a {config['conditioning']} network, expected {' or '.join(conditioning)}")
    if data is not None:
        refuse_other_data(path, checkpoint, data)
    try:
        net = build(config)
        net.load_state_dict(checkpoint["weights"])
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(f"{path}: its weights do not fit its configuration ({reason})") from None
    return net, checkpoint


def refuse_other_data(path, checkpoint, data):
    """BadInput if a checkpoint was made for other shapes, classes or latents than `data`."""
    config, made_for = checkpoint["config"], checkpoint["data"]
    if made_for is None:                                            # official weights know their network only
        made_for = dict(shape=[config["in_channels"], config["input_size"], config["input_size"]])
    pairs = [("shape", made_for["shape"], list(data.x.shape[1:])),
             ("num_classes", config["num_classes"], data.num_classes)]
    for name, found, expected in pairs:
        if found != expected:
            raise BadInput(f"{path}: was made for {name} {found}, but --data {data.source} has {expected}")
    vae = made_for.get("vae", "")
    if data.vae and vae not in ("", data.vae):
        raise BadInput(f"{path}: was trained on latents of another VAE ({vae}) than --data {data.source} ({data.vae})")


def load_start(path, data, flow_map=True):
    """(student, frozen teacher) that start from a model.pt.

    flow_map: a plain velocity network becomes a flow map by decoupled conditioning; without, the student stays plain.
    """
    teacher, _ = load_network(path, data)
    net = teacher
    if teacher.conditioning == "plain" and flow_map:
        net = LightningDiT(**teacher.config | dict(conditioning="decoupled"))
        net.load_state_dict(teacher.state_dict())                   # the same parameters (DMF)
    return copy.deepcopy(net).train(), frozen_copy(teacher)


def new_network(args, data, conditioning):
    """A fresh LightningDiT for this data."""
    channels, size, _ = data.x.shape[1:]
    tokens = {k: getattr(args, k) for k in ("n_tokens", "token_block") if getattr(args, k) is not None}
    try:
        return LightningDiT(args.size, conditioning, input_size=size, in_channels=channels,
                            num_classes=data.num_classes, **tokens)
    except ValueError as error:
        raise BadInput(f"--size {args.size}: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# The run folder: resume, log, save, stop
# ----------------------------------------------------------------------------------------------------------------------

# Flags that change how a run is carried out, not what it computes: a folder may go on with other values of these.
RUNTIME_FLAGS = {"vae", "steps", "micro_batch", "device", "compile", "out", "resume", "log_every", "preview_every",
                 "eval_every", "save_every", "health_every", "dry_run"}


class Run:
    """One run folder while it is written.

    with Run(args, state, model, data) as run:
        for step in run.steps():                      # from where the folder left off; saves on Ctrl-C and SIGTERM
            ...
            run.log(total, batch, grad_norm)          # see `accumulate`; refused if not finite
            if run.due(args.save_every): run.save()   # also at the last step

    state: {name: network, EMA, optimizer}, everything that resuming needs; None is left out.
    model: the EMA network that model.pt keeps.
    """

    def __init__(self, args, state, model, data):
        self.args, self.model, self.data = args, model, data
        self.state = {name: part for name, part in state.items() if part is not None}
        self.folder, self.main = Path(args.out), rank() == 0
        self.identity = {k: v for k, v in vars(args).items() if k not in RUNTIME_FLAGS | {"sources"}}
        self.step, self.evaluations, self.pending, self.stop_signal = 0, [], [], None
        self.refuse_foreign_folder()
        barrier()
        if args.resume == "no" and self.main and self.folder.exists():
            shutil.rmtree(self.folder)
        barrier()
        self.resume()

    def refuse_foreign_folder(self):
        is_empty = not self.folder.exists() or self.folder.is_dir() and not any(self.folder.iterdir())
        if not is_empty and not (self.folder / "args.json").exists():
            raise BadInput(f"--out {self.folder}: exists and is no run folder, expected a new one; "
                           "nothing was touched")

    def resume(self):
        path = self.folder / "args.json"
        if path.exists():
            before = json.loads(path.read_text())
            differ = [f"--{k} {before.get(k)} (there) {v} (here)" for k, v in self.identity.items()
                      if before.get(k) != v]
            if differ:
                raise BadInput(f"{self.folder} holds another configuration: {', '.join(differ)}; "
                               "choose another --out, or --resume no to start over")
        path = self.folder / "state.pt"
        if path.exists():
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                for name, part in self.state.items():
                    part.load_state_dict(saved[name])
            except Exception as error:
                reason = " ".join(str(error).split())[:120]
                raise BadInput(f"{path}: cannot be resumed ({reason}); --resume no starts over") from None
            self.step, self.evaluations = saved["step"], saved["evaluations"]
            if self.main and self.step < self.args.steps:
                print(f"{self.folder}: resuming at step {self.step}")
            elif self.main:
                print(f"{self.folder}: is done ({self.step} steps); --steps trains longer, --resume no starts over")
        elif self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "args.json").write_text(json.dumps(self.identity, indent=1))
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.args.steps, initial=self.step, desc=self.folder.name, disable=not self.main,
                        mininterval=0.5, dynamic_ncols=True)
        path = self.folder / "metrics.jsonl"
        if self.main and self.step and path.exists():               # lines after the saved step: killed, then resumed
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            path.write_text("".join(line + "\n" for line in kept))
        self.restart_clock()
        return self

    def __exit__(self, kind, error, trace):
        self.bar.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def restart_clock(self):
        """sec/step counts from here: evaluations and saves are left out."""
        self.clock, self.clock_step = time.perf_counter(), self.step

    def ask_to_stop(self, signum, frame):
        self.stop_signal = signum

    def steps(self):
        while self.step < self.args.steps:
            yield self.step
            if self.stopping():
                self.save()
                self.bar.close()
                if self.main:
                    print(f"\nstopped at step {self.step} and saved; run the same command again to resume",
                          file=sys.stderr)
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

    def log(self, losses, batch, grad_norm):
        """End of a step: `losses` are 0-dim tensors on the device; the times in `batch` say where a loss broke."""
        times = {k: v for k, v in batch.items() if v.ndim == 1 and v.is_floating_point()}
        self.pending.append((self.step, losses, times, grad_norm))
        self.step += 1
        self.bar.update()
        if self.due(self.args.log_every) or self.due(self.args.save_every) or self.due(self.args.eval_every):
            self.flush()

    def flush(self):
        """Check and write the losses since the last flush: one transfer from the device, not one a step."""
        if not self.pending:
            return
        names = list(dict.fromkeys(name for _, losses, _, _ in self.pending for name in losses))
        zero = torch.zeros((), device=self.pending[0][3].device)    # of a loss that a step does not have
        values = torch.stack([torch.stack([losses.get(name, zero).float() for name in names])
                              for _, losses, _, _ in self.pending])                               # [steps, names]
        if world() > 1:
            dist.all_reduce(values)
        values, norms = values.cpu(), torch.stack([norm.float() for *_, norm in self.pending]).cpu()
        for (step, _, times, _), row, norm in zip(self.pending, values, norms):
            bad = [name for name, value in zip(names, row) if not value.isfinite()]
            if not norm.isfinite():
                bad.append("gradient norm")
            if bad:
                spans = [f"{k} in [{v.min():.3g}, {v.max():.3g}], median {v.median():.3g}" for k, v in times.items()]
                raise BadInput(f"{bad[0]} is not finite at step {step} ({', '.join(spans)}); "
                               "the last state.pt is untouched: lower --lr, or look at the data")
        seconds = (time.perf_counter() - self.clock) / max(1, self.step - self.clock_step)
        line = dict(zip(names, values.mean(0).tolist()))
        line |= dict(grad_norm=norms.mean().item(), sec_per_step=seconds)
        shown = {k: f"{v:.3g}" for k, v in line.items() if k != "grad_norm"}
        line |= dict(images_per_sec=self.args.batch_size / seconds, memory_gb=peak_memory() / 1e9)
        self.write(line)
        if self.evaluations:
            shown |= {k: f"{v:.1f}" for k, v in self.evaluations[-1].items() if k.startswith("fd_")}
        self.bar.set_postfix(shown)
        self.pending = []
        self.restart_clock()

    def write(self, line):
        """One line of metrics.jsonl, under the step's number."""
        if not self.main:
            return
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(dict(step=self.step) | line) + "\n")

    def evaluated(self, metrics):
        """Keep an evaluation ({} of latents), which only the first process makes."""
        if not metrics:
            return
        self.evaluations.append(dict(step=self.step) | metrics)
        self.write(metrics)
        self.restart_clock()

    def save(self):
        self.flush()
        if self.main:
            parts = {name: part.state_dict() for name, part in self.state.items()}
            save_atomic(parts | dict(step=self.step, evaluations=self.evaluations), self.folder / "state.pt")
            args = {k: v for k, v in vars(self.args).items() if k != "sources"}
            save_atomic(dict(config=self.model.config, weights=self.model.state_dict(), data=self.data.meta,
                             sampler=self.args.sampler, step=self.step, args=args), self.folder / "model.pt")
        barrier()
        self.restart_clock()

    def result(self, definition, other_sampler=None):
        """Write result.json: last and best of every metric, with their definition.  -> the dict"""
        last, best = {}, {}
        if self.evaluations:
            last = self.evaluations[-1]
        for k in last:
            if k == "step":
                continue
            choose = min if k.startswith("fd") else max             # a distance is best low
            at = choose(self.evaluations, key=lambda e, k=k: e[k])
            best[k] = dict(value=at[k], step=at["step"])
        result = dict(last=last, best=best, evaluations=self.evaluations, definition=definition,
                      other_sampler=other_sampler or {})
        if self.main:
            (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        return result


def peak_memory():
    """Bytes: of the device where there is one, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024                  # Linux counts kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
