"""Files of weights and checkpoints: a state dict, a model.pt, official weights -> networks.  No code of a file runs."""
import copy
import hashlib
import zipfile
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist

from model import CONDITIONINGS, SIZES, LightningDiT, build, load_official, refuse_differences
from plumbing.files import BadInput, check_bytes, first_line, is_out_of_memory, reading


def read_weights(path):
    """The state dict in a .pt, .ckpt or .safetensors file, on the CPU.  BadInput if it is none.

    Never unpickles code (weights_only).
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, expected a file of weights; download it, or name another")
    with reading(path, "a file of weights", "fetch it again, or choose another"):
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        state = mapped(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not is_state_dict(state):
        raise BadInput(f"{path}: holds no state dict of tensors")
    return state


def mapped(path):
    """What is in a file of torch.save, mapped into memory where that can be done."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnicodeEncodeError):                      # from before torch 1.6; a path that is no UTF-8
        return torch.load(path, map_location="cpu", weights_only=True)


def is_state_dict(state):
    """Whether this is a dictionary of names and plain tensors."""
    return isinstance(state, dict) and all(
        isinstance(k, str) and torch.is_tensor(v) and v.layout == torch.strided and not v.is_quantized
        for k, v in state.items())


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
    with reading(path, "a model.pt", "take another, or train it again"):
        if zipfile.is_zipfile(path):                                # official weights may be older than that format
            check_bytes(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(checkpoint, dict) and {"config", "weights", "data", "args"} <= set(checkpoint):
        with reading(path, "a model.pt of this project", "take another, or train it again"):
            refuse_damage(**{k: checkpoint[k] for k in ("config", "weights", "data", "args")})
            if not isinstance(checkpoint.get("sampler", ""), (str, type(None))):
                raise ValueError("its sampler is no text")
        return checkpoint
    if isinstance(checkpoint, dict) and {"net", "ema", "evaluations"} <= set(checkpoint):
        raise BadInput(f"{path}: is the state.pt of a run, expected the model.pt beside it")
    return official(path, checkpoint)


# Whole numbers in the configuration of every network.
SIZES_OF = ("in_channels", "input_size", "num_classes", "depth", "hidden_size", "num_heads", "patch_size")


def refuse_damage(config, weights, data, args):
    """ValueError for the parts of a model.pt if one is empty, of another kind, or of sizes that it cannot have."""
    if not isinstance(config, dict) or not isinstance(args, dict) or not is_state_dict(weights):
        raise ValueError("its config, weights or args are of another kind")
    largest = sum(v.numel() for v in weights.values())              # no size of a network exceeds its parameters
    for name in SIZES_OF:
        value, most = config.get(name), len(weights) if name == "depth" else largest
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"its config has {name} {value!r}")
    if config["input_size"] % config["patch_size"]:
        raise ValueError(f"its config has input_size {config['input_size']}, patch_size {config['patch_size']}")
    for name in ("n_tokens", "token_block"):
        value = config.get(name, 1)
        if type(value) is not int or not 0 <= value <= largest:
            raise ValueError(f"its config has {name} {value!r}")
    if not isinstance(config.get("size", ""), str):
        raise ValueError("its config has a size that is no text")
    if config.get("conditioning") not in CONDITIONINGS:
        raise ValueError(f"its config has conditioning {config.get('conditioning')!r}")
    if data is None:                                                # of official weights
        return
    shape = [config["in_channels"], config["input_size"], config["input_size"]]
    if not isinstance(data, dict) or not isinstance(data.get("source"), str) or data.get("shape") != shape:
        raise ValueError("its data have no source, or another shape than its config")
    if data.get("kind", "pixels") not in ("pixels", "latents") or not isinstance(data.get("vae", ""), str):
        raise ValueError("its data are of no known kind")
    mean, std = (torch.tensor(data[name], dtype=torch.float64) for name in ("mean", "std"))
    channels = (config["in_channels"],)
    if mean.shape != channels or std.shape != channels or not mean.isfinite().all() or not (0 < std).all():
        raise ValueError("the mean and std of its data do not fit")


def official(path, state):
    """The checkpoint dict of official LightningDiT or iMF weights, which know neither data nor flags."""
    try:
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        net = load_official(state)
        refuse_damage(net.config, net.state_dict(), None, {})
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{path}: not a model.pt of this project, nor official LightningDiT or iMF weights "
                       f"({first_line(error, 300)})") from None
    return dict(config=net.config, weights=net.state_dict(), data=None, args={}, step=0)


def load_network(path, data=None):
    """(network with the EMA weights of a model.pt, its checkpoint).

    data: refuse a network that was made for other shapes, classes or latents.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    if data is not None:
        refuse_other_data(path, checkpoint, data)
    try:
        with torch.device("meta"):                                  # no memory for a configuration that does not fit
            refuse_differences(build(config), checkpoint["weights"], "network")
        net = build(config)
        net.load_state_dict(checkpoint["weights"])
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{path}: its weights do not fit its configuration ({first_line(error, 160)})") from None
    refuse_not_finite(path, net.state_dict())
    return net, checkpoint


def refuse_not_finite(path, state):
    """BadInput if a tensor of a state dict has NaN or infinity."""
    for name, v in state.items():
        if not v.isfinite().all():
            raise BadInput(f"{path}: its weights are not finite ({name}); expected those of a run that did not diverge")


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


def first_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def other_images(checkpoint, data):
    """What the images that a network was trained on have otherwise than these, in words; "" if nothing."""
    made_for = checkpoint["data"]
    if made_for is None or data.kind == "latents":
        return ""
    found, here = [*made_for["mean"], *made_for["std"]], [*data.mean, *data.std]
    if len(found) != len(here) or (torch.tensor(found) - torch.tensor(here)).abs().max() > 1e-3:
        return "mean and deviation"
    known = made_for.get("classes") and data.classes                # of image folders
    return "names of classes" if known and made_for["classes"] != data.classes else ""


def say_other_data(path, checkpoint, data):
    """Print a line if a network was trained on other images, as far as that is seen: it takes these for its own."""
    other = other_images(checkpoint, data)
    if other and first_process():
        print(f"{path}: was trained on {checkpoint['data']['source']}, of other {other} than {data.source}; "
              f"it goes on with those of {data.source}")


def refuse_jumps(path, checkpoint, why):
    """BadInput for a generator of DMD2 or SiD where a velocity is asked for: they train its jumps alone."""
    if (checkpoint.get("sampler") or "").startswith("renoised"):
        raise BadInput(f"{path}: is a few-step generator, whose velocity is untrained, so it is no teacher; {why}")


def say_unlearned(what, args, conditioning, omega):
    """Print a line if a network that takes omega as an input was trained, with the flags `args`, on smaller ones."""
    sampled_only = args.get("loss") in ("imf", "rcgm")              # --omega of these is the sampler's
    learned = [args.get("omega_max"), None if sampled_only else args.get("omega")]
    learned = [v for v in learned if isinstance(v, (int, float))]
    if conditioning == "in_context" and learned and omega > max(learned) and first_process():
        print(f"{what}: was trained with omega up to {max(learned):g}; at omega {omega:g} the network has to guess")


def load_start(path, data, flow_map=True, omega=1.0):
    """(student, frozen teacher) that start from a model.pt.

    flow_map: a plain velocity network becomes a flow map by decoupled conditioning; without, the student stays plain.
    omega: the largest that the teacher will be asked for.
    """
    teacher, checkpoint = load_network(path, data)
    say_unlearned(path, checkpoint["args"], teacher.conditioning, omega)
    net = copy.deepcopy(teacher)
    if teacher.conditioning == "plain" and flow_map:
        net = LightningDiT(**teacher.config | dict(conditioning="decoupled"))
        net.load_state_dict(teacher.state_dict())                   # the same parameters (DMF)
    return net.train(), teacher.requires_grad_(False).eval()


def new_network(args, data, conditioning):
    """A fresh LightningDiT for this data."""
    channels, size, _ = data.x.shape[1:]
    patch = SIZES[args.size]["patch_size"]
    if size % patch:
        others = [name for name, dims in SIZES.items() if size % dims["patch_size"] == 0 and name in ("tiny", "small")]
        hint = f"; --size {others[0]} takes them" if others else "; resize them"
        raise BadInput(f"--data {data.source}: has {size} x {size} pixels, expected a multiple of {patch}, the patch "
                       f"of --size {args.size}{hint}")
    tokens = {k: getattr(args, k) for k in ("n_tokens", "token_block") if getattr(args, k) is not None}
    try:
        return LightningDiT(args.size, conditioning, input_size=size, in_channels=channels,
                            num_classes=data.num_classes, **tokens)
    except ValueError as error:
        raise BadInput(f"--size {args.size}: {error}") from None


def has_state(args):
    """Whether the run of these flags has begun, and goes on from its own weights."""
    return args.resume != "no" and (Path(args.out) / "state.pt").exists()


def start_over(args):
    """What to do about a run folder that cannot be gone on with."""
    if getattr(args, "wait", False):                                # a start: --resume does not reach it
        return f"remove {args.out}, and the start is trained again"
    return "--resume no starts over"


def networks_of_state(args):
    """(student, frozen teacher or None) with the configurations in this run's state.pt, whose weights a Run loads.

    So a run that goes on needs its own folder, not that of its start.
    """
    path = Path(args.out) / "state.pt"
    with reading(path, "the state of this run", f"it cannot be resumed, {start_over(args)}"):
        configs = mapped(path)["configs"]
        teacher = build(configs["teacher"]).requires_grad_(False).eval() if "teacher" in configs else None
        return build(configs["net"]).train(), teacher


def starting_networks(args, data, device, pretrained, conditioning="in_context", flow_map=True):
    """--init and --teacher -> (student, frozen teacher; None from scratch) on the device.

    A run that goes on has the networks of its state.pt.  Else the student is new (scratch) or comes from a model.pt:
    that of --init, or of `consistency.py --loss imf` or `fm`, which pretrained(args, loss) -> path trains if needed.
    flow_map: see load_start.
    """
    if has_state(args):
        net, teacher = networks_of_state(args)
        return net.to(device), teacher and teacher.to(device)
    if args.cfg_channels > data.x.shape[1]:
        raise BadInput(f"--cfg_channels {args.cfg_channels}: --data {data.source} has {data.x.shape[1]} channels")
    if args.init == "scratch":
        say_unlearned("this run", dict(omega_max=args.omega_max), conditioning, args.omega)
        return new_network(args, data, conditioning).to(device).train(), None
    drawn = getattr(args, "cd_guidance", "fixed") == "drawn"        # by L_CD
    asked = max(args.omega, args.omega_max) if drawn else args.omega
    given = None
    if getattr(args, "teacher", None):                              # before pretraining; TwinFlow has no such flag
        given, checkpoint = load_network(args.teacher, data)
        given.requires_grad_(False).eval()
        refuse_jumps(args.teacher, checkpoint, "pass the network that it was distilled from")
        say_other_data(args.teacher, checkpoint, data)
        say_unlearned(args.teacher, checkpoint["args"], given.conditioning, asked)
    path = args.init
    if path in ("imf", "fm"):
        path = pretrained(args, path)
        torch.manual_seed(args.seed)                                # new weights as if --init were this path
    else:
        checkpoint = load_checkpoint(path)
        refuse_other_data(path, checkpoint, data)
        if given is None and "teacher" in args:                     # TwinFlow learns its velocity from the data
            refuse_jumps(path, checkpoint, "pass --teacher with the network that it was distilled from")
        say_other_data(path, checkpoint, data)
    net, start = load_start(path, data, flow_map, omega=1.0 if given else asked)
    return net.to(device), (given or start).to(device)
