"""What real machines do: kills, signals, full disks, two starts at once, damaged files (README, "What it promises").

The fast tests run in this process; the slow ones start commands as a user does.  benchmarks/soak.py kills for longer.
"""
import argparse
import contextlib
import copy
import errno
import gc
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import consistency
import evaluate
import metrics
import reproduce
from data import load_data
from plumbing import checkpoints, files, kept_runs, run_folder, watch
from test_helpers import HERE, assert_same, environment, refusal, run, small_images, small_net, start, state, train

IMF = "consistency.py --loss imf --data toy.npz"
FSF = "fsf_dmd.py --init imf/model.pt --data toy.npz --M 2 --health_every 0"


def contents(folder):
    """{name: bytes} of the files in a folder, without the lock's."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def until(condition, process, seconds=120):
    """Wait for a condition, as long as a process lives."""
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.02)
    assert condition(), process.communicate(timeout=30)


# ---- files.py --------------------------------------------------------------------------------------------------------

def cut_short(path):
    with open(path, "w") as file:
        file.write("half")
    raise RuntimeError("killed while it wrote")


def stop(path):
    raise KeyboardInterrupt


def full(path):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args)))
    files.write_atomic(tmp_path / "file", "new")
    assert done == ["fsync", "replace"] and contents(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("content, raised", [(cut_short, RuntimeError), (stop, KeyboardInterrupt), (full, OSError)])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, content, raised):
    path = tmp_path / "state.pt"
    files.write_atomic(path, "old")
    with pytest.raises(raised) as caught:
        files.write_atomic(path, content)
    assert contents(tmp_path) == {"state.pt": b"old"}
    if raised is OSError:
        assert caught.value.errno == errno.ENOSPC


def test_a_text_that_names_a_path_that_is_no_utf8_is_written(tmp_path):
    files.write_atomic(tmp_path / "file", f"{os.fsdecode(bytes([97, 255]))} ± 1")
    assert (tmp_path / "file").read_text("utf-8") == r"a\udcff ± 1"


@pytest.mark.parametrize("content", ["text", dict(x=torch.ones(2)), lambda path: open(path, "w").close()])
def test_a_write_replaces_the_file_with_the_usual_mode(tmp_path, content):
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.touch()
    files.write_atomic(path, "old")
    files.write_atomic(path, content)
    assert path.read_bytes() != b"old" and path.stat().st_mode == usual.stat().st_mode
    assert {each.name for each in tmp_path.iterdir()} == {"file", "usual"}


@pytest.mark.parametrize("text, words", [
    (None, "no such file, expected a record"),
    ("", "not a record"),
    ('{"step": 1', "not a record"),
    ("[1, 2]", "holds a list"),
    (b"\xff\xfe\x00", "not a record"),
])
def test_a_damaged_json_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(files.BadInput) as caught:
        files.read_json(path, "a record")
    said = str(caught.value)
    assert str(path) in said and words in said and "\n" not in said


def test_json_has_no_nan_and_cut_lines_are_left_out(tmp_path):
    text = files.json_text(dict(step=1, gap=float("nan"), of=[float("inf"), 2.5]))
    assert json.loads(text) == dict(step=1, gap=None, of=[None, 2.5])
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{text}\n{{"step": 2, "lo{text}\n{{"step": 3, "loss": 1.0}}\n[4]\n{{"step": 5, "lo')
    assert [line["step"] for line in files.read_lines(path)] == [1, 3]


def test_a_lock_names_its_holder_and_is_freed_however_it_dies(tmp_path):
    held = "import sys, time\nfrom plumbing import files\nwith files.lock(sys.argv[1], 'training'):\n" \
           "  print('held', flush=True)\n  time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", held, str(tmp_path / "run" / ".lock")], cwd=HERE,
                               env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(files.Locked, match=f"process {process.pid} on .* is training there"):
        with files.lock(tmp_path / "run" / ".lock", "training"):
            pass
    process.kill()
    process.communicate()
    with files.lock(tmp_path / "run" / ".lock", "training"):
        pass


# ---- signals and lost processes --------------------------------------------------------------------------------------

def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch):
    run = SimpleNamespace(asked=None, stop_signal=None, model=torch.nn.Linear(1, 1), main=False)

    def late(tensor, op):                                   # the other process has none, this one is told meanwhile
        run_folder.Run.ask_to_stop(run, signal.SIGTERM, None)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(common.dist, "all_reduce", late)
    assert not run_folder.Run.stopping(run) and run.stop_signal is None
    monkeypatch.setattr(common.dist, "all_reduce", lambda tensor, op: None)
    assert run_folder.Run.stopping(run) and run.stop_signal == signal.SIGTERM


@pytest.mark.parametrize("error, processes, code", [
    (RuntimeError("[../third_party/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:4001"), "2", 1),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "2", None),
    (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "metrics.jsonl"), "1", 2),
    (OSError("cannot identify image file"), "1", 2),
    (MemoryError(), "1", 2),
    (torch.OutOfMemoryError("CUDA out of memory."), "1", 2),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "1", 2),
    (torch.AcceleratorError("CUDA error: out of memory"), "1", 2),
])
def test_what_ends_a_command_is_one_line_or_a_bug(monkeypatch, capsys, error, processes, code):
    def fails(args):
        raise error

    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(SystemExit if code else RuntimeError) as caught:
        common.main(fails, lambda: None)
    if code:
        said = capsys.readouterr().err
        assert caught.value.code == code and len(said.splitlines()) == 1 and "None" not in said


def test_more_memory_than_there_is_ends_in_one_line(capsys):
    with pytest.raises(SystemExit):
        common.main(lambda args: torch.empty(10 ** 15), lambda: None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and ": error: out of memory; a smaller --micro_batch" in said[0]

    def reads(args):                                            # nothing is wrong with the file
        with files.reading("state.pt", "the state of a run", "--resume no starts over"):
            torch.empty(10 ** 15)

    with pytest.raises(SystemExit):
        common.main(reads, lambda: None)
    assert ": error: out of memory; a smaller --micro_batch" in capsys.readouterr().err


def test_a_signal_after_the_last_step_is_not_lost(in_home):
    """It comes while the last evaluation is made; what the run was a start of must not begin."""
    args = consistency.parse_args(f"{IMF} --steps 1 --out late".split()[1:])
    net = small_net("plain")
    with pytest.raises(KeyboardInterrupt):
        with run_folder.Run(args, dict(net=net), net, load_data(args.data)):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_start_over_that_is_killed_can_be_started_over(in_home, few_samples, monkeypatch):
    """Whatever of the old run was removed by then, with the pictures that evaluate.py lays beside it."""
    command, killed = f"{IMF} --steps 1 --out again --resume no", 0
    unlink = Path.unlink
    while True:
        shutil.copytree(in_home / "imf", in_home / "again", dirs_exist_ok=True)
        (in_home / "again" / "samples.png").write_text("of evaluate.py")
        left = [killed]

        def dies(path, *rest, left=left, **options):
            if path.parent.name == "again" and not left[0]:
                raise KeyboardInterrupt
            left[0] -= path.parent.name == "again"
            unlink(path, *rest, **options)

        with monkeypatch.context() as broken:
            broken.setattr(Path, "unlink", dies)
            try:
                train(command)
                break                                       # more deletions than there are
            except KeyboardInterrupt:
                killed += 1
        train(command)
        assert state(in_home, "again")["step"] == 1
    assert killed > 3


@pytest.mark.slow
def test_a_closed_terminal_saves(home):
    """SIGHUP; Ctrl-C and SIGTERM: test_ctrl_c_saves_and_says_how_to_go_on."""
    out, command = "signal", FSF.split()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)   # under nohup the process would ignore it
    process = start(home, [sys.executable, str(HERE / command[0]), *command[1:], "--steps", "5000", "--log_every", "1",
                           "--out", out])
    signal.signal(signal.SIGHUP, before)
    until((home / out / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP and "and saved" in err and "Traceback" not in err
    assert state(home, out)["step"] > 0


def two_processes(folders, command, second=""):
    """One run's two processes, started without torchrun, which would end the other one too, in its own way.

    second: more flags of the second one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [[sys.executable, str(HERE / "consistency.py"), *shlex.split(f"{command} {more}")[1:]]
             for more in ("", second)]
    group = dict(environment(), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [subprocess.Popen(words[rank], cwd=folder, env=dict(group, RANK=str(rank)), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for rank, folder in enumerate(folders)]


@pytest.mark.slow
def test_processes_that_see_different_folders_are_refused(in_home, few_samples, tmp_path):
    """As on two machines without a shared disk: one would go on, the other begin again."""
    command = IMF.replace("toy.npz", str(in_home / "toy.npz"))
    train(f"{command} --steps 2 --out apart")
    before = state(in_home, "apart")["step"]
    for process in two_processes([in_home, tmp_path], f"{command} --steps 4 --out apart"):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "or see different folders; expected one command for all" in err
    assert state(in_home, "apart")["step"] == before == 2


@pytest.mark.slow
def test_processes_that_are_not_of_one_run_are_refused(home, tmp_path):
    """As of two nodes whose commands or files differ: each would train a network of its own with both gradients."""
    other = checkpoints.load_checkpoint(home / "imf" / "model.pt")
    other["weights"]["x_embedder.proj.bias"] += 0.1
    torch.save(other, home / "other.pt")
    labels = dict(np.load(home / "toy.npz"))
    np.savez(tmp_path / "toy.npz", images=labels["images"], labels=labels["labels"][::-1])
    there, cd = [home, home], "consistency.py --loss cd --init imf/model.pt --data toy.npz"
    for i, (command, second, folders) in enumerate((
            (IMF, "--save_every 3", there), (IMF, "", [home, tmp_path]),
            (f"{cd} --teacher imf/model.pt", "--teacher other.pt", there))):
        for process in two_processes(folders, f"{command} --steps 2 --out mixed{i}", second):
            _, err = process.communicate(timeout=120)
            assert process.returncode == 2 and "differ in flags, data or weights" in err, err
        assert not (home / f"mixed{i}" / "state.pt").exists()


@pytest.mark.slow
def test_a_lost_process_ends_the_other_with_one_line(home):
    first, second = two_processes([home, home], f"{IMF} --steps 5000 --log_every 1 --out lost")
    until((home / "lost" / "metrics.jsonl").exists, first)
    second.kill()
    _, err = first.communicate(timeout=120)
    second.communicate()
    last = err.splitlines()[-1]
    assert first.returncode == 1 and "Traceback" not in err
    assert last.startswith("consistency.py: another process of this run ended; the last state.pt is untouched")


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGHUP, signal.SIGTERM])
def test_two_processes_of_torchrun_stop_together_and_save(home, sig):
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    out = f"both-{sig}"
    process = start(home, [*python, str(HERE / "consistency.py"), *IMF.split()[1:], "--steps", "5000",
                           "--log_every", "1", "--out", out])
    until((home / out / "metrics.jsonl").exists, process)
    process.send_signal(sig)                                # torchrun sends it to both
    _, err = process.communicate(timeout=120)
    assert "and saved" in err and state(home, out)["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("end, code", [("return", 0), ("sys.exit(143)", 143), ("raise common.BadInput('no')", 2)])
def test_one_of_several_processes_ends_before_the_interpreter_does(tmp_path, end, code):
    """There a thread of gloo could abort it; what was printed is not lost."""
    (tmp_path / "script.py").write_text(f"""import atexit, sys
sys.path.insert(0, {str(HERE)!r})
import common, torch.distributed as dist
def train(_):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "the interpreter's own end")
    print("trained")
    {end}
common.main(train, lambda: None)
""")
    process = start(tmp_path, [sys.executable, "script.py"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "trained\n"), err


# ---- the run folder --------------------------------------------------------------------------------------------------

def a_file(folder):
    folder.write_text("mine")


def a_foreign_folder(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")


def another_configuration(folder):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(dict(data="digits", init="imf", seed=0, lr=7.0)))


def another_script(folder):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(dict(data="digits", init="imf", seed=0, script="sid")))


def damaged_args(folder):
    folder.mkdir()
    (folder / "args.json").write_text("")


def a_list_as_args(folder):
    folder.mkdir()
    (folder / "args.json").write_text("[1]")


@pytest.mark.parametrize("make, words", [
    (a_file, "exists and is no run folder but a file; nothing was touched"),
    (a_foreign_folder, "exists and is no run folder"),
    (another_configuration, "holds another configuration: --"),
    (another_script, "holds a run of sid.py; choose another --out, or --resume no to start over"),
    (damaged_args, "--resume no starts over"),
    (a_list_as_args, "holds a list"),
])
def test_a_folder_that_will_not_do_is_refused_before_the_pretraining(in_home, monkeypatch, capsys, make, words):
    out = in_home / make.__name__
    make(out)
    before = sorted(in_home.rglob("*"))
    said = refusal(f"fsf_dmd.py --init imf --data toy.npz --seed 9 --out {out.name}", capsys, monkeypatch)
    assert words in said and sorted(in_home.rglob("*")) == before
    said = refusal("fsf_dmd.py --init imf --data toy.npz --seed 9 --out toy.npz/below", capsys, monkeypatch)
    assert "toy.npz is a file" in said and sorted(in_home.rglob("*")) == before
    for folder, words in (("runs", "would hold runs/"), (".", "would hold runs/"),
                          ("runs/consistency_imf-toy-scratch-seed9", "is the folder of the start")):
        said = refusal(f"fsf_dmd.py --init imf --data toy.npz --seed 9 --out {folder}", capsys, monkeypatch)
        assert words in said and sorted(in_home.rglob("*")) == before, folder


@pytest.mark.parametrize("flags", ["--init imf/model.pt", "--init fm/model.pt --teacher imf/model.pt"])
@pytest.mark.parametrize("resume", ["auto", "no"])
def test_a_run_does_not_write_over_the_network_that_it_needs(in_home, monkeypatch, capsys, flags, resume):
    before = contents(in_home / "imf")
    said = refusal(f"fsf_dmd.py {flags} --data toy.npz --out ./imf --resume {resume}", capsys, monkeypatch)
    assert "imf/model.pt, which this run would write over; pass --out elsewhere" in said
    assert contents(in_home / "imf") == before
    (in_home / "kept").mkdir(exist_ok=True)
    shutil.copy(in_home / "imf" / "model.pt", in_home / "kept" / "mine.pt")             # it would stay
    said = refusal(f"fsf_dmd.py --init kept/mine.pt --data toy.npz --out kept --resume {resume}", capsys, monkeypatch)
    assert "kept: exists and is no run folder, expected a new one; nothing was touched" in said


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 alone")
def test_a_folder_whose_name_is_no_utf8_is_resumed(in_home, few_samples):
    out = os.fsdecode(b"caf\xe9")
    for steps in (1, 2):
        train(f"fsf_dmd.py --init imf/model.pt --data toy.npz --health_every 0 --steps {steps} --out {out}")
    assert checkpoints.load_checkpoint(f"{out}/model.pt")["step"] == 2
    with open(f"{out}/weights.pt", "wb") as file:
        torch.save(dict(w=torch.ones(3)), file)
    assert checkpoints.read_weights(f"{out}/weights.pt")["w"].sum() == 3


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(files.BadInput, match="x.pt: may not be read, expected a model.pt; give yourself the right"):
        with files.reading("x.pt", "a model.pt", "train it again"):
            raise PermissionError(errno.EACCES, "Permission denied", "x.pt")


def flip(path):
    """Change one bit in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def empty(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


def without_step(path):
    saved = torch.load(path, weights_only=True)
    del saved["step"]
    torch.save(saved, path)


def a_number(path):
    torch.save(7, path)


def of_an_earlier_save(path):
    saved = torch.load(path, weights_only=True)
    saved["step"] -= 1
    torch.save(saved, path)


def of_other_weights(path):
    saved = torch.load(path, weights_only=True)
    saved["weights"]["final_layer.linear.bias"] += 1
    torch.save(saved, path)


@pytest.mark.parametrize("damage", [flip, cut, empty, without_step, a_number])
def test_a_damaged_state_is_refused_and_kept(in_home, monkeypatch, capsys, damage):
    out = in_home / f"state-{damage.__name__}"
    shutil.copytree(in_home / "imf", out)
    damage(out / "state.pt")
    before = contents(out)
    said = refusal(f"{IMF} --steps 9 --out {out.name}", capsys, monkeypatch)
    assert "state.pt" in said and "cannot be resumed, --resume no starts over" in said
    assert contents(out) == before


@pytest.mark.parametrize("damage", [gone, flip, cut, empty, of_an_earlier_save, of_other_weights])
def test_the_next_start_makes_model_pt_good_from_state_pt(in_home, few_samples, damage):
    """A kill between the two renames leaves an older model.pt, or none."""
    out = in_home / f"model-{damage.__name__}"
    shutil.copytree(in_home / "imf", out)
    damage(out / "model.pt")
    train(f"{IMF} --steps 8 --out {out.name}")
    found, expected = (checkpoints.load_checkpoint(path) for path in (out / "model.pt", "imf/model.pt"))
    assert_same(found["weights"], expected["weights"])
    assert found["step"] == expected["step"] == 8


def test_leftovers_of_a_kill_are_removed_and_a_cut_line_is_survived(in_home, few_samples):
    out = in_home / "leftovers"
    shutil.copytree(in_home / "imf", out)
    (out / ".state.pt.abc.tmp").write_bytes(b"half a state")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "imf": 1.')
    train(f"{IMF} --steps 9 --out {out.name}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {8, 9} <= {line["step"] for line in lines}
    assert not list(out.glob(".*.tmp"))


def test_a_folder_of_a_run_that_was_killed_at_once_is_an_empty_one(in_home, few_samples):
    out = in_home / "at-once"
    out.mkdir()
    (out / ".lock").write_text("process 1 on here")
    (out / ".args.json.abc.tmp").write_text("{")
    train(f"{IMF} --steps 1 --out {out.name}")
    assert (out / "model.pt").exists() and not list(out.glob(".*.tmp"))


def test_a_run_that_was_killed_before_its_first_save_has_one_history(in_home, few_samples, monkeypatch):
    command, updates, real = f"{IMF} --steps 4 --log_every 1 --out unsaved", [], consistency.update_ema

    def dies(*args):
        updates.append(args)
        if len(updates) == 3:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(consistency, "update_ema", dies)
        train(command)
    assert len(lines_of(in_home / "unsaved")) == 2 and not (in_home / "unsaved" / "state.pt").exists()
    train(command)
    assert [line["step"] for line in lines_of(in_home / "unsaved")] == [1, 2, 3, 4]


def test_every_file_of_a_run_gets_its_name_by_a_rename(in_home, few_samples, monkeypatch):
    """Else a kill leaves half of one.  metrics.jsonl grows line by line."""
    named, real = set(), os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (named.add(Path(new)), real(old, new)))
    train(f"{FSF.replace('--health_every 0', '--health_every 1')} --steps 1 --out renamed")
    evaluate.run(evaluate.parse_args("renamed/model.pt --steps 1 --n 8".split()))
    written = {path.relative_to(in_home) for path in (in_home / "renamed").iterdir()}
    assert len(written) >= 9 and {path.name for path in written} - {path.name for path in named} == {
        ".lock", "metrics.jsonl"}


def test_a_run_goes_on_with_other_flags_of_how_it_is_carried_out(in_home, few_samples):
    """README: --micro_batch may be added to a run that stopped for memory."""
    train(f"{FSF} --steps 1 --out carried")
    train(f"{FSF} --steps 2 --out carried --micro_batch 8 --device cpu --compile 0 --log_every 1 --save_every 1 "
          "--eval_every 1 --preview_every 1 --health_every 1")
    assert state(in_home, "carried")["step"] == 2


def test_a_signal_that_nohup_ignores_stays_ignored(in_home):
    args = consistency.parse_args(f"{IMF} --steps 1 --out ignored".split()[1:])
    net, before = small_net("plain"), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run_folder.Run(args, dict(net=net), net, load_data(args.data)) as run:
            os.kill(os.getpid(), signal.SIGHUP)
            assert run.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_starting_over_removes_what_a_run_wrote_and_nothing_else(in_home, few_samples, monkeypatch, capsys):
    out = in_home / "over"
    shutil.copytree(in_home / "imf", out)
    mine = {"thesis.tex", "samples_of_mine.png", "samples_4steps.png", "health_1st.png"}
    for name in mine:
        (out / name).write_text("mine")
    (out / "sub").mkdir()
    of_before = ["samples_000007.png", "samples.png", "evaluation.json", "fid.json"]    # three are evaluate.py's
    for name in of_before:
        (out / name).write_text("of the run before")
    train(f"{IMF} --steps 1 --out over --resume no")
    assert mine | {"sub"} <= {path.name for path in out.iterdir()}
    assert not any((out / name).exists() for name in of_before) and state(in_home, "over")["step"] == 1

    (in_home / "link").symlink_to(out)
    before = contents(out)
    assert "is a link" in refusal(f"{IMF} --steps 1 --out link --resume no", capsys, monkeypatch)
    assert contents(out) == before


def test_distances_of_two_classifiers_are_not_put_side_by_side(in_home, few_samples, capsys):
    """As where a run goes on on another machine, on which the classifier of the metrics ends at other weights."""
    out = in_home / "measured"

    def steps_of(steps):
        train(f"{IMF} --steps {steps} --eval_every 1 --out measured")
        return [e["step"] for e in json.loads((out / "result.json").read_text())["evaluations"]]

    assert steps_of(2) == [1, 2]
    saved = torch.load(out / "state.pt", weights_only=True)
    torch.save(saved | dict(classifier="01234567"), out / "state.pt")
    assert steps_of(2) == [2] and "measured by another classifier so far (01234567" in capsys.readouterr().out
    assert steps_of(3) == [2, 3]


def test_weights_that_are_not_finite_are_refused(in_home, monkeypatch, capsys):
    checkpoint = checkpoints.load_checkpoint("imf/model.pt")
    checkpoint["weights"]["final_layer.linear.bias"][0] = float("nan")
    torch.save(checkpoint, "nan.pt")
    before = sorted(in_home.rglob("*"))
    for command in ("fsf_dmd.py --init nan.pt --data toy.npz", "evaluate.py nan.pt --data toy.npz",
                    "fsf_dmd.py --init imf --teacher nan.pt --data toy.npz --seed 9"):
        assert "not finite" in refusal(command, capsys, monkeypatch)
    assert sorted(in_home.rglob("*")) == before


@pytest.mark.parametrize("command, words", [
    ("consistency.py --loss rcgm --data toy.npz --steps 4 --lr 1e9", ["diverged"]),
    ("fsf_dmd.py --init imf/model.pt --data toy.npz --M 2 --steps 8 --lr 1e9 --save_every 1 --log_every 1",
     ["diverged"]),
    ("fsf_dmd.py --init imf/model.pt --data toy.npz --M 2 --steps 50 --lr 1e9 --save_every 4 --log_every 4",
     ["is not finite at step", "tau in ["]),
])
def test_a_run_that_diverges_is_one_line_and_not_saved(in_home, few_samples, monkeypatch, capsys, command, words):
    out = in_home / f"diverges-{command.split('.')[0]}-{command.split()[-1]}"
    said = refusal(f"{command} --out {out.name}", capsys, monkeypatch)
    assert all(each in said for each in words), said
    assert not (out / "state.pt").exists() and not (out / "model.pt").exists()


def test_a_second_start_is_refused_and_spares_the_first(in_home, few_samples, monkeypatch, capsys):
    """It is tried in the middle of the first one: not a byte of the folder changes, and the first goes on."""
    real, tried = run_folder.Run.log, []

    def log(run, *rest):
        real(run, *rest)
        if run.step == 2:
            before = contents(run.folder)
            monkeypatch.setattr(run_folder.Run, "log", real)
            for extra in ("", " --resume no"):
                said = refusal(f"{FSF} --out twice --steps 3{extra}", capsys, monkeypatch)
                assert f"process {os.getpid()} on " in said and "is training there" in said
                tried.append(contents(run.folder) == before)

    monkeypatch.setattr(run_folder.Run, "log", log)
    train(f"{FSF} --out twice --log_every 1 --save_every 1 --steps 3")
    assert tried == [True, True] and [line["step"] for line in lines_of(in_home / "twice")] == [1, 2, 3]
    assert state(in_home, "twice")["step"] == 3


@pytest.mark.slow
def test_a_start_network_that_another_run_trains_is_waited_for(home, tmp_path, few_samples, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(home / "toy.npz", tmp_path)
    shutil.copytree(home / "runs" / "cache", tmp_path / "runs" / "cache")
    args = consistency.parse_args("--loss fm --data toy.npz".split())
    folder = Path(args.out)
    shutil.copytree(home / "fm", folder)                    # as if 60 of its steps were left
    saved = torch.load(folder / "state.pt", weights_only=True)
    torch.save(dict(saved, step=args.steps - 60, evaluations=[]), folder / "state.pt")
    command = "fsf_dmd.py --init fm --data toy.npz --steps 2 --health_every 0 --warmup 1 --out"
    first = start(tmp_path, [sys.executable, str(HERE / "fsf_dmd.py"), *command.split()[1:], "a"])
    until(lambda: f"process {first.pid} on" in (folder / ".lock").read_text(), first)
    train(f"{command} b")
    outputs = first.communicate(timeout=500)
    assert first.returncode == 0, outputs
    said = capsys.readouterr().err
    assert "waiting" in said and f"process {first.pid}" in said
    assert_same(state(tmp_path, "a"), state(tmp_path, "b"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_spares_the_last_files(in_home, few_samples):
    """A limit on the size of a file fails in the same calls as a full disk, of torch's zip writer too."""
    out, command = in_home / "full", f"{IMF} --log_every 1 --out full"
    train(f"{command} --steps 8")
    before = contents(out)
    for kilobytes in (2000, 1):                             # state.pt has 3.4 MB, metrics.jsonl 3 KB
        words = f"{sys.executable} {HERE / command} --steps 12 --save_every 1"
        found = subprocess.run(["bash", "-c", f"ulimit -f {kilobytes}; exec {words}"], cwd=in_home, env=environment(),
                               capture_output=True, text=True, timeout=300)
        last = found.stderr.splitlines()[-1]
        assert found.returncode == 2 and "Traceback" not in found.stderr
        assert last.startswith("consistency.py: error: no space left on the disk")      # on a line of its own
        after = contents(out)
        assert all(after[name] == before[name] for name in ("state.pt", "model.pt", "args.json", "result.json"))
        assert not list(out.glob(".*.tmp"))
    train(f"{command} --steps 12")                          # with space again it goes on
    assert state(in_home, "full")["step"] == 12


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 7 MB; only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    gc.collect()                                            # of a file that is mapped into memory
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
def test_a_run_on_a_real_full_disk_goes_on_when_there_is_space_again(in_home, few_samples, small_disk):
    command = f"{IMF} --log_every 1 --preview_every 4 --out"
    train(f"{command} {small_disk}/run --steps 8")          # state.pt and model.pt: 4.5 MB
    before = contents(small_disk / "run")
    said = run(in_home, f"{command} {small_disk}/run --steps 12 --save_every 1", code=2)    # no second state.pt fits
    assert said.splitlines()[-1].startswith("consistency.py: error: no space left on the disk")
    after = contents(small_disk / "run")
    assert "Traceback" not in said
    assert all(after[name] == before[name] for name in ("state.pt", "model.pt", "args.json", "result.json"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    train(f"{command} {small_disk}/run --steps 12")
    train(f"{command} uninterrupted --steps 12")
    assert_same(state(small_disk, "run"), state(in_home, "uninterrupted"))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_not_faulted_in_again():
    """80 MB are 19,500 pages of 4 KB; as glibc is by itself, some processes fault all of them in again every time."""
    pages = 80_000_000 / os.sysconf("SC_PAGE_SIZE")
    code = """if True:
        import common, resource, torch
        common.keep_freed_memory()
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for turn in range(10):
            if turn == 1:
                begun = faults()
            together = [torch.ones(100_000) for _ in range(200)]
            del together
        print(faults() - begun)
        """
    def faults(**env):
        words = [sys.executable, "-c", code]
        env = environment() | env
        return int(subprocess.run(words, cwd=HERE, env=env, capture_output=True, text=True, check=True).stdout)

    assert faults() < pages / 20
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 7.5 * pages       # what the user says to glibc stands: 9 times


def test_batches_go_from_pinned_memory_to_a_device_and_what_is_there_stays(monkeypatch):
    """No GPU here: `meta` stands for it.  A tensor that is there already cannot be pinned."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda v: pinned.append(v.device.type) or v)
    there = torch.ones(1, 3, device="meta").expand(6, 3)
    args, rows = SimpleNamespace(batch_size=6, micro_batch=4), []
    for b in common.micro_batches(dict(x=torch.arange(6.0), guidance=there), args, torch.device("meta")):
        rows.append(len(b.x))
        assert b.x.device == b.guidance.device == torch.device("meta") and len(b.guidance) == len(b.x)
    assert rows == [4, 2] and pinned == ["cpu", "cpu"]


def test_the_next_steps_numbers_are_drawn_in_threads_and_are_the_same():
    begun, where, held = [], set(), threading.Event()

    def of(step):
        begun.append(step)
        where.add(threading.current_thread())
        if step == 3:
            held.set()
        return common.Stream("step", 0, step).normal(4)

    drawn = common.ahead(of, range(2, 9), count=2)
    first = next(drawn)
    assert held.wait(60) and set(begun) <= {2, 3, 4}                    # step 3's, while the caller is at step 2
    assert threading.current_thread() not in where and len(where) <= 2
    for step, found in enumerate([first, *drawn], start=2):
        assert torch.equal(found, common.Stream("step", 0, step).normal(4))
    assert sorted(begun) == [*range(2, 9)] and list(common.ahead(of, [])) == []     # and none after the last
    with pytest.raises(ZeroDivisionError):                              # what goes wrong there ends the run
        list(common.ahead(lambda step: 1 // step, [1, 0, 1]))


# ---- what is kept of a table -----------------------------------------------------------------------------------------

def test_a_kept_run_whose_files_are_gone_or_damaged_is_not_done(tmp_path, capsys):
    args = argparse.Namespace(data="digits", init=None, runs=tmp_path, start="weak",
                              size=None, precision=None, jobs=1, table="2")
    job = reproduce.job(args, reproduce.STARTS["imf"], 0)
    record = kept_runs.beside(job, ".json")

    def keep():
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        torch.save({}, job.folder / "model.pt")
        (job.folder / "result.json").write_text("{}")
        (job.folder / "metrics.jsonl").write_text('{"step": 400}\n')
        files.write_atomic(record, files.json_text(dict(kept_runs.identity(job), done=True, step=400)))
        assert kept_runs.is_done(job) and not kept_runs.changes(job)

    for damage in (lambda: shutil.rmtree(job.folder), lambda: (job.folder / "result.json").write_text("{"),
                   lambda: (job.folder / "model.pt").unlink(), lambda: (job.folder / "model.pt").write_bytes(b"P"),
                   lambda: record.write_text('{"command": ['),
                   lambda: record.write_text("[]"), lambda: record.write_text('{"sources": 3}')):
        keep()
        damage()
        assert not kept_runs.is_done(job)
        kept_runs.changes(job)                                          # can be asked whatever is in the record
    said = capsys.readouterr().out
    assert "not the record of a run" in said and f"move {job.folder} away" in said
    keep()
    record.write_text("[]")
    with pytest.raises(common.BadInput, match="is there, and this command did not make it; move it"):
        kept_runs.Runner(args).run(job)                                 # its record is damaged: nothing is removed
    assert (job.folder / "model.pt").exists()

    # Trained on by hand, with its own command and more --steps: neither taken for the run of the table, nor removed.
    keep()
    (job.folder / "metrics.jsonl").write_text('{"step": 400}\n{"step": 600}\n')
    assert not kept_runs.is_done(job)
    for sources in (kept_runs.identity(job)["sources"], {"model.py": "another one"}):
        record.write_text(json.dumps(dict(kept_runs.identity(job), done=True, step=400, sources=sources)))
        with pytest.raises(common.BadInput, match="has been trained on since, from step 400 to 600; move it"):
            kept_runs.Runner(args).run(job)
        assert (job.folder / "model.pt").exists()
    for odd in ("", "{", "[1]", "{}", "3"):                             # a line that is being written
        (job.folder / "metrics.jsonl").write_text(odd)
        assert kept_runs.logged_step(job.folder) is None and kept_runs.last_step(job) == ""


def test_a_path_that_is_spelled_otherwise_is_no_other_run(tmp_path, monkeypatch):
    """From another folder, or with ./ before it: the same command, the same data, the same measure."""
    small_images(tmp_path / "set.npz", 60)
    (tmp_path / "vae.pt").write_text("a network")
    monkeypatch.chdir(tmp_path)

    def of(runs, data):
        args = argparse.Namespace(data=data, init=None, start="weak",
                                  size=None, precision=None, jobs=1, table="2", runs=Path(runs))
        start = reproduce.job(args, reproduce.STARTS["imf"], 0)
        return start, reproduce.job(args, reproduce.CD_MASKED, 0, start)

    for j in of("runs", "set.npz"):
        j.folder.mkdir(parents=True)
        torch.save({}, j.folder / "model.pt")
        (j.folder / "result.json").write_text("{}")
        files.write_atomic(kept_runs.beside(j, ".json"), files.json_text(dict(kept_runs.identity(j), done=True)))
    ways = [of("runs", "set.npz"), of(tmp_path / "runs", "./set.npz"), of("./runs", str(tmp_path / "set.npz"))]
    for jobs in ways:
        assert [kept_runs.changes(j) for j in jobs] == [[], []] and all(kept_runs.is_done(j) for j in jobs)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert all(kept_runs.is_done(j) for j in of("../runs", "../set.npz"))
    both = ("../vae.pt", tmp_path / "vae.pt")
    by_name = [kept_runs.Job(Path("run"), ("sid.py",), ("--vae", vae), None) for vae in both]
    assert kept_runs.identity(by_name[0])["measure"] == kept_runs.identity(by_name[1])["measure"]


def test_kept_runs_of_other_data_and_of_another_start_are_neither_taken_nor_removed(tmp_path, monkeypatch):
    def of(data):
        args = argparse.Namespace(data=str(tmp_path / data / "set.npz"), init=None, start="weak",
                                  size=None, precision=None, jobs=1, table="2",
                                  runs=tmp_path / "runs")
        (tmp_path / data).mkdir(exist_ok=True)
        small_images(args.data, 60 if data == "a" else 90)
        start = reproduce.job(args, reproduce.STARTS["imf"], 0)
        return kept_runs.Runner(args), start, reproduce.job(args, reproduce.CD_MASKED, 0, start)

    runner, start, distilled = of("a")
    start.folder.mkdir(parents=True)
    torch.save({}, start.folder / "model.pt")
    (start.folder / "result.json").write_text("{}")
    record = dict(kept_runs.identity(start), done=True)
    files.write_atomic(kept_runs.beside(start, ".json"), files.json_text(record))
    assert kept_runs.is_done(start)

    # The folder of runs written in full: the start of its own job is not one from outside.
    elsewhere = [str(Path(word).resolve()) if word.endswith("model.pt") else word for word in distilled.command]
    assert kept_runs.from_outside(distilled, elsewhere) == [str(tmp_path / "a" / "set.npz")]

    # Another data set of the same name: its runs would lie in the same folders.
    other_runner, other, _ = of("b")
    assert other.folder == start.folder and not kept_runs.is_done(other)
    with pytest.raises(common.BadInput, match="is a run of the same name that read .*/a/set.npz; pass another --runs"):
        other_runner.run(other)
    assert kept_runs.is_done(start)

    # The same words, and so the same command, from another folder.
    monkeypatch.chdir(tmp_path / "a")
    named = start._replace(command=tuple("set.npz" if word.endswith("set.npz") else word for word in start.command))
    files.write_atomic(kept_runs.beside(start, ".json"), files.json_text(dict(kept_runs.identity(named), done=True)))
    assert kept_runs.is_done(named)
    monkeypatch.chdir(tmp_path / "b")
    kept_runs.look_again()
    assert kept_runs.changes(named) == ["what it reads"]
    with pytest.raises(common.BadInput, match="is a run of the same name that read .*/a/set.npz; pass another --runs"):
        runner.run(named)
    assert (start.folder / "model.pt").exists()
    files.write_atomic(kept_runs.beside(start, ".json"), files.json_text(record))

    # A pasted command trains in the folder: it is not removed under its feet.
    files.write_atomic(kept_runs.beside(start, ".json"), files.json_text(dict(record, sources={})))
    with files.lock(start.folder / ".lock", "training"), pytest.raises(files.Locked, match="is training there"):
        runner.run(start)
    assert (start.folder / "model.pt").exists()

    # A start that is another by now, or not done, teaches nobody.
    with pytest.raises(common.BadInput, match="its start .* is not there, or is another by now"):
        runner.run(distilled)

    # The same path with other images in it.
    files.write_atomic(kept_runs.beside(start, ".json"), files.json_text(record))
    small_images(tmp_path / "a" / "set.npz", 30)
    kept_runs.look_again()
    assert not kept_runs.is_done(start) and kept_runs.changes(start) == ["what it reads"]

    # A command of --list that was pasted leaves no record: what it made is not ours to remove.
    kept_runs.beside(start, ".json").unlink()
    with pytest.raises(common.BadInput, match="is there, and this command did not make it"):
        runner.run(start)
    assert (start.folder / "model.pt").exists()


def test_a_network_of_init_has_runs_of_its_own(tmp_path):
    """Two networks in folders of one name, or one named as a start of ours, would have their runs in one folder."""
    def of(init):
        args = argparse.Namespace(data="digits", init=init and str(tmp_path / init), start="weak",
                                  size=None, precision=None, jobs=1, table="2",
                                  runs=tmp_path / "runs")
        if init:
            (tmp_path / init).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / init).write_text(init)
        start = reproduce.job(args, reproduce.STARTS["imf"], 0)
        return kept_runs.Runner(args), reproduce.job(args, reproduce.FSF, 0, start)

    runner, ours = of(None)
    ours.folder.mkdir(parents=True)
    files.write_atomic(kept_runs.beside(ours, ".json"), files.json_text(dict(kept_runs.identity(ours), done=False)))
    refused = []
    for init in ("a/run/model.pt", "b/run/model.pt", "imf/model.pt"):
        runner, given = of(init)
        if given.folder.exists():
            refused.append(init)
            with pytest.raises(common.BadInput, match="is a run of the same name that read"):
                runner.do(given, None)
        else:
            given.folder.mkdir(parents=True)
            record = dict(kept_runs.identity(given), done=False)
            files.write_atomic(kept_runs.beside(given, ".json"), files.json_text(record))
    assert refused == ["b/run/model.pt", "imf/model.pt"]


@pytest.mark.slow
def test_a_record_of_before_inputs_were_kept_is_not_one_of_other_data(tmp_path):
    small_images(tmp_path / "set.npz", 60)
    args = argparse.Namespace(data=str(tmp_path / "set.npz"), init=None, start="weak",
                              size=None, precision=None, jobs=2, table="2", runs=tmp_path)
    job = reproduce.job(args, reproduce.STARTS["imf"], 0)
    job = job._replace(command=(*job.command, "--steps", "1"))
    job.folder.mkdir(parents=True)
    (job.folder / "notes.txt").write_text("of the older run")
    record = dict(kept_runs.identity(job), done=True)
    del record["inputs"]
    files.write_atomic(kept_runs.beside(job, ".json"), files.json_text(record))
    assert kept_runs.changes(job) == ["what it reads"]

    # Data that are replaced while the run reads them: it may have seen both.
    def replaces():
        late = time.monotonic() + 60
        while not (job.folder / "args.json").exists() and time.monotonic() < late:
            time.sleep(0.05)
        small_images(tmp_path / "set.npz", 90)

    replacing = threading.Thread(target=replaces)
    replacing.start()
    with pytest.raises(common.BadInput, match="seed0: what it reads changed while it ran; the same command runs it"):
        kept_runs.Runner(args).run(job)
    replacing.join()
    assert not kept_runs.is_done(job) and not (job.folder / "notes.txt").exists()


def test_what_measures_an_fid_is_part_of_a_kept_run(tmp_path):
    """VAE, Inception and reference: other content under the same name is measured again."""
    paths = {flag: tmp_path / f"{flag}.npz" for flag in ("vae", "inception", "ref")}
    measure = [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
    job = kept_runs.Job(tmp_path / "run", ("fsf_dmd.py",), tuple(measure), None)
    for path in paths.values():
        path.write_text("of some images")
    for path in paths.values():
        before = kept_runs.identity(job)
        path.write_text("of others")
        kept_runs.look_again()
        now = kept_runs.identity(job)
        assert {name for name in now if now[name] != before[name]} == {"measure"}


@pytest.mark.slow
def test_a_run_whose_data_have_changed_is_not_resumed(tmp_path, monkeypatch, capsys, few_samples):
    monkeypatch.chdir(tmp_path)
    small_images("set.npz", 60)
    train("consistency.py --loss imf --data set.npz --steps 2 --out run")
    small_images("set.npz", 90)
    said = refusal("consistency.py --loss imf --data set.npz --steps 4 --out run", capsys, monkeypatch)
    expected = "run/state.pt was written (its number of images); --resume no starts over"
    assert f"--data set.npz: has changed since {expected}" in said

    # Of a start --resume no would say nothing: it is of the run that wants the start.
    train("consistency.py --loss imf --data set.npz --steps 2")
    small_images("set.npz", 60)
    said = refusal("fsf_dmd.py --data set.npz --steps 1 --resume no", capsys, monkeypatch)
    folder = Path("runs/consistency_imf-set-scratch")
    expected = f"{folder}/state.pt was written (its number of images); remove {folder}, and the start is trained again"
    assert f"has changed since {expected}" in said
    whole = (folder / "state.pt").read_bytes()
    cut(folder / "state.pt")
    said = refusal("fsf_dmd.py --data set.npz --steps 1 --resume no", capsys, monkeypatch)
    assert f"it cannot be resumed, remove {folder}, and the start is trained again" in said
    (folder / "state.pt").write_bytes(whole)
    small_images("set.npz", 90)

    with np.load("set.npz") as found:
        images, labels = found["images"], found["labels"]
    train("consistency.py --loss imf --data set.npz --steps 2 --out labelled")
    twice = dict(images=np.concatenate([images, images]), labels=np.concatenate([labels, labels]))
    two, exchanged = np.flatnonzero(labels == labels[0])[:2], images.copy()             # of one class
    exchanged[two] = images[two[::-1]]
    for changed, what in ((dict(images=images, labels=labels[::-1]), "labels"),         # the same statistics
                          (dict(images=exchanged, labels=labels), "images"),
                          (dict(images=images[::-1], labels=labels), "images"),
                          (twice, "number of images"), (dict(images=255 - images, labels=labels), "mean")):
        np.savez("set.npz", **changed)
        kept = len(list(Path("runs/cache").iterdir()))
        said = refusal("consistency.py --loss imf --data set.npz --steps 4 --out labelled", capsys, monkeypatch)
        assert f"--data set.npz: has changed since labelled/state.pt was written (its {what})" in said
        assert len(list(Path("runs/cache").iterdir())) == kept                          # no classifier was trained


def test_another_number_of_threads_is_no_other_data(in_home, few_samples):
    """The sums behind mean and deviation are taken in another order then: their last bits differ."""
    shutil.copytree(in_home / "imf", in_home / "threads")
    saved = torch.load(in_home / "threads" / "state.pt", weights_only=True)
    before, step = copy.deepcopy(saved["data"]), saved["step"]
    saved["data"]["std"] = [math.nextafter(value, 9) for value in before["std"]]
    torch.save(saved, in_home / "threads" / "state.pt")
    train(f"{IMF} --steps {step + 1} --out threads")
    assert state(in_home, "threads")["step"] == step + 1
    assert run_folder.changed_data(before, before) is None
    for name, value, what in (("std", [1.001 * std for std in before["std"]], "std"),
                              ("mean", before["mean"] * 2, "mean"), ("rows", 7, "number of images"),
                              ("classes", ["a"], "names of the classes")):
        assert run_folder.changed_data(before, before | {name: value}) == what


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    small_images(tmp_path / "set.npz", 60)
    (tmp_path / "cache").write_text("a file where the folder should be")
    made = metrics.Features(load_data(str(tmp_path / "set.npz")), tmp_path / "cache")
    kept = metrics.Features(load_data(str(tmp_path / "set.npz")), tmp_path / "other")
    assert made.hash == kept.hash


@pytest.mark.slow
def test_a_distillation_goes_on_after_its_start_was_trained_further(tmp_path, few_samples, monkeypatch):
    """It has its own weights; one that begins is told that its start is another by now."""
    monkeypatch.chdir(tmp_path)
    small_images("set.npz", 60)
    command = "fsf_dmd.py --init imf --data set.npz --health_every 0"
    folder = Path(consistency.parse_args("--loss imf --data set.npz".split()).out)
    train("consistency.py --loss imf --data set.npz --steps 1 --out " + str(folder))
    (folder / "args.json").unlink()                             # the flags of the preset, but for --out
    args = consistency.parse_args("--loss imf --data set.npz".split())
    files.write_atomic(folder / "args.json", files.json_text(run_folder.identity(args)))

    def trained_for(steps):
        for name in ("state.pt", "model.pt"):
            found = torch.load(folder / name, weights_only=True) | dict(step=steps)
            if steps > args.steps and name == "model.pt":
                for tensor in found["weights"].values():
                    tensor.mul_(1.5)
            torch.save(found, folder / name)

    trained_for(args.steps)
    train(f"{command} --steps 1 --out begun")
    teacher = state(tmp_path, "begun")["teacher"]
    trained_for(2 * args.steps)
    train(f"{command} --steps 2 --out begun")
    went_on = state(tmp_path, "begun")
    assert went_on["step"] == 2
    assert_same(went_on["teacher"], teacher)
    with pytest.raises(common.BadInput, match=f"for {2 * args.steps} steps, not {args.steps}: pass --init {folder}"):
        train(f"{command} --steps 1 --out other")
    shutil.rmtree(folder)
    train(f"{command} --steps 3 --out begun")                   # its own folder is enough: nothing is trained again
    assert state(tmp_path, "begun")["step"] == 3 and not folder.exists()


def test_a_start_by_its_name_and_by_its_path_is_one_run(tmp_path, few_samples, monkeypatch):
    """Also where the run trains it first: the new weights, here of the discriminator, do not depend on that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(consistency.PRESETS["pixels", "scratch"], "steps", 2)
    small_images("set.npz", 60)
    path = Path(consistency.parse_args("--loss imf --data set.npz".split()).out) / "model.pt"
    for init, out in (("imf", "first"), ("imf", "second"), (path, "by_path")):
        train(f"dmd2.py --init {init} --data set.npz --steps 1 --ttur 1 --health_every 0 --eval_every 0 --out {out}")
        found, first = state(tmp_path, out), state(tmp_path, "first")
        assert_same({k: found[k] for k in ("net", "fake", "head")}, {k: first[k] for k in ("net", "fake", "head")})


def test_a_folder_of_another_start_says_how_to_train_this_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_images("set.npz", 60)
    args = consistency.parse_args("--loss imf --data set.npz".split())
    args.data = "elsewhere/set.npz"
    Path(args.out).mkdir(parents=True)
    files.write_atomic(Path(args.out) / "args.json", files.json_text(run_folder.identity(args)))
    said = refusal("fsf_dmd.py --init imf --data set.npz --out mine", capsys, monkeypatch)
    assert "the start is trained there: run `python consistency.py --loss imf --data ... --out NEW`" in said


def test_the_same_file_spelled_otherwise_and_a_newer_flag_are_the_same_run(in_home, few_samples, monkeypatch, capsys):
    command = "consistency.py --loss imf --out spelled --steps"
    train(f"{command} 1 --data toy.npz")
    train(f"{command} 2 --data ./toy.npz")
    path = in_home / "spelled" / "args.json"
    stored = json.loads(path.read_text())
    del stored["tangent_norm"]                                  # of before this flag was
    path.write_text(json.dumps(stored))
    train(f"{command} 3 --data {in_home / 'toy.npz'}")
    assert state(in_home, "spelled")["step"] == 3
    said = refusal(f"{command} 4 --data toy.npz --tangent_norm 0.1", capsys, monkeypatch)
    assert "--tangent_norm None (there) 0.1 (here)" in said


def test_what_happens_beside_the_steps_is_not_in_their_seconds(in_home, few_samples, monkeypatch):
    """By a clock that ticks when it is read, and 1000 times in an evaluation or a picture."""
    ticks = itertools.count()
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(perf_counter=lambda: next(ticks), sleep=time.sleep))

    def slow(real):
        def wrapped(*args, **flags):
            for _ in range(1000):
                next(ticks)
            return real(*args, **flags)
        return wrapped

    for name in ("evaluate", "show"):
        monkeypatch.setattr(watch, name, slow(getattr(watch, name)))
    train(f"{FSF} --steps 6 --eval_every 2 --preview_every 3 --log_every 1 --out clock")         # measures its start
    assert [line["sec_per_step"] < 100 for line in lines_of(in_home / "clock")] == [True] * 6

    def stopping(real):
        def wrapped(*args, **flags):
            real(*args, **flags)
            signal.raise_signal(signal.SIGTERM)
        return wrapped

    monkeypatch.setattr(watch, "show", stopping(watch.show))
    with pytest.raises(SystemExit):
        train(f"{IMF} --steps 6 --preview_every 3 --log_every 10 --out clock2")
    [line] = lines_of(in_home / "clock2")                       # the picture came between the last step and the stop
    assert line["step"] == 3 and "sec_per_step" not in line and "images_per_sec" not in line


def lines_of(folder):
    """The lines of training in a metrics.jsonl."""
    return [line for line in files.read_lines(folder / "metrics.jsonl") if "grad_norm" in line]


def test_a_loss_is_checked_before_what_came_of_it_is_measured(in_home, few_samples, monkeypatch):
    real = consistency.imf_loss
    monkeypatch.setattr(consistency, "imf_loss", lambda *args, **flags: real(*args, **flags) * float("nan"))
    with pytest.raises(common.BadInput, match="imf is not finite at step 1 "):
        train(f"{IMF} --steps 4 --eval_every 2 --log_every 100 --out burst")


def test_a_folder_is_looked_at_again_once_it_is_ours(in_home, few_samples, monkeypatch, capsys):
    """Another run may have begun in it between the first look and the lock."""
    real, path = run_folder.lock, in_home / "raced" / "args.json"
    theirs = dict(data="other.npz", init="scratch", seed=0)

    @contextlib.contextmanager
    def raced(*args, **flags):
        with real(*args, **flags):
            path.write_text(json.dumps(theirs))
            yield

    monkeypatch.setattr(run_folder, "lock", raced)
    said = refusal(f"{IMF} --steps 1 --out raced", capsys, monkeypatch)
    assert "holds another configuration" in said and json.loads(path.read_text()) == theirs


def test_the_best_of_a_run_is_its_lowest_distance_and_its_highest_score(tmp_path):
    run = object.__new__(run_folder.Run)
    run.main, run.folder = True, tmp_path
    run.evaluations = [dict(step=i, fd_2step=fd, is_2step=score)
                       for i, (fd, score) in enumerate([(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])]
    found = run.result("of a test")
    assert found["best"] == dict(fd_2step=dict(value=1.0, step=1), is_2step=dict(value=3.0, step=1))
    assert found["last"] == run.evaluations[-1]
