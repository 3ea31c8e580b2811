"""Plumbing on the ground floor: errors in one line, devices, processes, randomness, EMA.

A method script reads from top to bottom without opening this file.  Two rules hold everywhere:

  * All randomness of step k is drawn on the CPU from (purpose, seed, k) for the GLOBAL batch (`Stream`); a process or
    micro-batch takes its rows.  So results depend neither on the number of processes nor on --micro_batch, and a
    resumed run sees what it would have seen.
  * Losses are per-sample means [b]; a script backpropagates their sum over the global batch size, and gradients are
    summed over processes (`sync_gradients`).  No DistributedDataParallel: it hides the sum, and skips it silently under
    torch.func.
"""
import contextlib
import copy
import ctypes
import os
import re
import sys
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.files import BadInput, first_line, is_out_of_memory, no_space


# ---- Device and processes --------------------------------------------------------------------------------------------

def rank():
    number = torchrun_variable("RANK", 0)
    if number >= world():
        raise BadInput(f"RANK={number} of WORLD_SIZE={world()}: expected what torchrun sets; "
                       "unset it to run one process")
    return number


def world():
    return torchrun_variable("WORLD_SIZE", 1)


def processes_here():
    """Number of processes of this run on this machine."""
    return torchrun_variable("LOCAL_WORLD_SIZE", 1) if os.environ.get("LOCAL_WORLD_SIZE") else world()


def torchrun_variable(name, default):
    """A whole number that torchrun sets for each process."""
    text = os.environ.get(name, "") or str(default)
    if not text.isdecimal() or int(text) < default:
        raise BadInput(f"{name}={text}: expected what torchrun sets; unset it to run one process")
    return int(text)


def usable_cores():
    """Cores that this process may use: a cluster's scheduler may give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def barrier():
    """Wait for the other processes, if there are any.  By gloo, which tells of one that is gone; NCCL would wait."""
    if world() > 1:
        dist.all_reduce(torch.zeros(()))


def pick_device(flag):
    """--device -> torch.device that works here: auto, cpu, cuda (under torchrun this process's own) or cuda:N."""
    name = flag
    if flag == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    expected = "expected auto, cpu, cuda or cuda:N"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", flag):
        raise BadInput(f"--device {flag}: not usable here; {expected}")
    if world() > 1 and flag.startswith("cuda:"):
        raise BadInput(f"--device {flag}: of {world()} processes each needs a device of its own, expected cuda")
    try:
        return torch.zeros(1, device=name).device                   # with its index, which set_device needs
    except Exception as error:                                      # torch raises errors of several types
        raise BadInput(f"--device {flag}: not usable here ({first_line(error)}); {expected}") from None


def keep_freed_memory():
    """Tell glibc to keep large freed blocks: given back, they are faulted in again at every step.

    On a CPU, where it is called, this saves a sixth of a step of the digits' network and a sixteenth of B/1's, for 3%
    more memory.  Either way glibc keeps a third more than is in use; with MALLOC_MMAP_THRESHOLD_=65536 in the
    environment it keeps nothing.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):              # no glibc
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h; older versions refuse more than 32 MB for the first.
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def setup(args):
    """The device, the process group under torchrun, TF32 and the seed of the weights.  -> torch.device"""
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_tf32(args.precision == "bf16")
    if world() > args.batch_size:
        raise BadInput(f"--batch_size {args.batch_size}: smaller than the {world()} processes, "
                       "expected at least one row for each")
    if world() > 1 and not dist.is_initialized():
        on_gpu = dict(backend="cpu:gloo,cuda:nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        # The others wait while the first one evaluates or saves; a process that is gone is noticed all the same.
        try:
            dist.init_process_group(timeout=timedelta(hours=6), **on_gpu)
        except ValueError as error:                                 # RANK and the like without an address
            raise BadInput(f"WORLD_SIZE={world()}: {first_line(error)}; start it by torchrun") from None
    torch.manual_seed(args.seed)                                    # the same initial weights in every process
    return device


def set_tf32(on):
    """float32's matrix products and convolutions on a GPU: with 10 bits of mantissa (TF32), or with all 23."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


@contextlib.contextmanager
def tf32(on=True):
    """`set_tf32` for a while."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_tf32(on)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def compile_blocks(args, *nets):
    """torch.compile each transformer block in place: one small graph for all blocks and networks; state-dict keys stay.

    nets: networks, or None for one that a method leaves out.
    """
    nets = [net for net in nets if net]
    if not nets or args.compile == 0 or (args.compile == "auto" and not next(nets[0].parameters()).is_cuda):
        return
    # Blocks see several batch sizes, with and without gradient, in two precisions; past 8 the default gives up.
    torch._dynamo.config.recompile_limit = 64
    for net in nets:
        for block in net.blocks:
            block.compile()


def sync_gradients(*nets):
    """Sum the gradients over all processes, one message per network.  A parameter without gradient counts as zero."""
    if world() == 1:
        return
    for net in nets:
        params = [p for p in net.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)


def gradient_norm(net):
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


# ---- Randomness and batches ------------------------------------------------------------------------------------------

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

    batch: dict of [B, ...] tensors, on the CPU or there already.  From pinned memory a copy to the GPU does not wait
    for the kernels before it: the CPU draws the numbers of the next step while the GPU is at this one.
    Where the batch has times t and s, `moving` is added: the rows with s < t.  They are found here, on the CPU: a
    GPU's nonzero() would make the CPU wait for it.
    """
    B = args.batch_size
    low, high = rank() * B // world(), (rank() + 1) * B // world()
    size = args.micro_batch or B
    for start in range(low, high, size):
        rows = {k: v[start:min(start + size, high)] for k, v in batch.items()}
        if "s" in rows:
            rows["moving"] = (rows["s"] < rows["t"]).nonzero()[:, 0]
        if device.type != "cpu":
            rows = {k: v.pin_memory() if v.is_cpu else v for k, v in rows.items()}
        yield SimpleNamespace(**{k: v.to(device, non_blocking=True) for k, v in rows.items()})


def ahead(function, values, count=4):
    """map(function, values), the next `count` computed in as many threads while the caller is at this one."""
    with ThreadPoolExecutor(count) as threads:
        waiting = deque()
        for value in values:
            waiting.append(threads.submit(function, value))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def noise_by_index(purpose, seed, indices, shape, jump=0):
    """Noise [len(indices), *shape] of which row i depends on (purpose, seed, index i, jump) alone.

    So the batch size and the number of processes change nothing.
    """
    return torch.stack([Stream(purpose, seed, int(i), jump).normal(*shape) for i in indices])


# ---- Networks and losses ---------------------------------------------------------------------------------------------

def trainable(flag, *nets):
    """Switch the gradients of the networks' weights on or off; off, gradients still pass through to their inputs."""
    for net in nets:
        for name, p in net.named_parameters():
            p.requires_grad_(flag and name != "pos_embed")          # a fixed table


def frozen_copy(net):
    """A copy that is not trained unless it is told to: EMA, teacher; the fake side begins as one."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def frozen_view(args, net):
    """A network with the same weights, now and after every update, through which they get no gradient."""
    view = frozen_copy(net)
    for of_view, p in zip(view.parameters(), net.parameters()):
        of_view.data = p.data                                       # the same memory
    compile_blocks(args, view)                                      # a copy is not compiled
    return view


def accumulate(total, B, **losses):
    """total[name] += sum(loss [b]) / B, without its graph: what `Run.log` takes."""
    for name, value in losses.items():
        total[name] = total.get(name, 0) + value.detach().float().sum() / B


# ---- EMA -------------------------------------------------------------------------------------------------------------

def ema_decay(args, n):
    """Decay after n updates.  It warms up: 0.99995 alone would keep 82% of the initial weights after 4,000 steps."""
    return min(args.ema, (1 + n) / (10 + n)) if args.ema_warmup else args.ema


def target_decay(args, n):
    """Decay of RCGM's target network after n updates; (2 + n) / (4 + n), about 1 - 2 / n: TwinFlow's warm-up."""
    return min(args.target_ema, (2 + n) / (4 + n))


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) net, for parameters; buffers are fixed tables."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ---- The end of a process --------------------------------------------------------------------------------------------

class TolerantStream:
    """stdout or stderr that never raises: its reader may be gone (Ctrl-C ends `| tee log` too), or its disk full.

    What cannot be written is left out, so that the run goes on and saves.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def main(train, parse_args):
    """Run a script: bad input ends in one line and exit code 2."""
    sys.stderr = TolerantStream(sys.stderr or open(os.devnull, "w"))         # closed by the shell; tqdm needs one
    if hasattr(sys.stdout, "reconfigure"):                          # None: closed
        sys.stdout.reconfigure(errors="backslashreplace")           # a terminal that has no +- sign
        sys.stdout = TolerantStream(sys.stdout)
    try:
        train(parse_args())
    except BadInput as error:
        leave(f"error: {error}", 2)
    except KeyboardInterrupt:                                       # outside of a Run, which saves first
        leave(f"stopped; {again()} to go on", 130)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}; repair that"
        if no_space(error, "."):
            what = "no space left on the disk; free some"
        elif error.filename is None:
            what = f"{error.strerror or first_line(error)}; repair that"
        leave(f"error: {what} and {again()}", 2)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            leave("error: out of memory; a smaller --micro_batch or --batch_size, where there is one, needs less", 2)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):         # /tmp is full, or noexec
            leave(f"error: torch.compile does not work here ({first_line(error, 160)}); --compile 0 does without", 2)
        if not is_lost(error):
            raise
        leave(f"another process of this run ended; the last state.pt is untouched, {again()} ({first_line(error)})", 1)
    except SystemExit as stop:                                      # after a signal all processes stop at one step
        if dist.is_initialized():
            dist.destroy_process_group()
            exit_at_once(stop.code)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
        exit_at_once(0)


def again():
    """How to go on, in words: --resume no would remove what has been saved."""
    starts_over = "--resume no" in " ".join(sys.argv).replace("=", " ")
    return "run the same command again" + (" without --resume no" if starts_over else "")


def leave(words, code):
    """End this process with one line of its own, not one behind a bar."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"{Path(sys.argv[0]).name}: {' '.join(words.splitlines())}", file=sys.stderr, flush=True)
    if dist.is_initialized():                                       # an orderly end waits for others that may wait too
        exit_at_once(code)
    sys.exit(code)


def exit_at_once(code):
    """End one process of several.

    While the interpreter ends by itself, a thread of gloo may free a tensor, which aborts the process
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):                        # a reader that is gone
            stream.flush()
    os._exit(code)


def is_lost(error):
    """Whether an exception is that of a collective whose other process has died: gloo's has no type of its own."""
    words = str(error).lower()
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in words or "by peer" in words)
