"""The third part of the suite (see test_all.py): reproduce.py, and the tables in README."""
import argparse
import csv
import importlib
import io
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch

import reproduce
from test_all import HERE, environment, refusal, small_images

PAPER = json.loads((HERE / "results" / "paper_tables.json").read_text())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with random latents and tiny starts: imf.pt, fm.pt."""
    folder = tmp_path_factory.mktemp("inputs")
    reproduce.random_inputs(folder, "tiny")
    return folder


def arguments(*argv):
    return reproduce.parse_args([*argv, "--list"])


@pytest.mark.parametrize("data", ["digits", "latents"])
def test_every_row_is_a_command_that_its_script_accepts(inputs, data, monkeypatch, capsys):
    """No row passes a flag that its script refuses, on pixels and on latents; and no two rows of a table are one run (but 4's first two)."""
    for table, (_, reference, rows) in reproduce.TABLES.items():
        assert 1 <= reference <= len(rows)
        args = arguments(table, *(["--data", str(inputs / "latents")] if data == "latents" else []))
        jobs = reproduce.jobs_of(args, dict(enumerate(rows, 1)), 3)
        assert len({job.folder for job in jobs.values()}) == len(rows)
        for each in jobs.values():
            script, *argv = each.command
            argv = [str(inputs / ("fm.pt" if "lossfm" in flag else "imf.pt")) if flag.endswith("model.pt") else flag for flag in argv]
            parsed = importlib.import_module(script[:-3]).parse_args(argv)
            assert script == "evaluate.py" or parsed.seed == 3


def test_list_prints_what_would_run(capsys):
    """Starts first, each row's command for each seed; the strong start is four times as long, and its control as much longer as a distillation."""
    reproduce.run(arguments("2", "--start", "strong", "--seeds", "2"))
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 2 + 11 * 2 and all(re.match(r"python \w+\.py .* --out runs/reproduce/digits/\S+-seed[01]$", line) for line in commands)
    assert commands[0] == "python consistency.py --loss imf --steps 800 --seed 0 --out runs/reproduce/digits/consistency-lossimf-steps800-seed0"
    assert "--steps 1000 --seed 1" in commands[-1] and "# row 7: FSF-DMD M=2 (the paper: 3.85, at 4000)" in lines


def test_rows_are_the_papers_and_its_lost_numbers_stay_lost():
    counts = {name: len(table.rows) for name, table in reproduce.TABLES.items()}
    assert counts == {"2": 8 + 3, "3": 9, "4": 6, "5": 6, "7": 16, "8": 5, "9": 9, "10": 10}
    fids = {name: [row.paper.get("fid") for row in table.rows] for name, table in reproduce.TABLES.items()}
    assert fids["2"][:8] == [9.1, 8.54, 6.06, 4.18, 4.2, 4.67, 3.85, 3.96] and fids["5"] == [None] * 6
    assert fids["7"][:8] == [row[1] for row in PAPER["table7"]["rows"]] and fids["7"][8:] == [row[2] for row in PAPER["table7"]["rows"]]
    assert fids["9"] == [3.97, 3.87, 3.98, 3.99, 4.03, 3.85, 3.85, 3.94, 3.98]
    assert reproduce.paper_text(reproduce.TABLES["5"].rows[0].paper) == "- / -, 0.78 s/step (A100)"
    labels = {name: [row.label for row in table.rows] for name, table in reproduce.TABLES.items()}
    assert labels["3"] == [row[0] for row in PAPER["table3"]["rows"]] and labels["10"] == [row[0] for row in PAPER["table10"]["rows"]]


def fake_row(values):
    """A row of `summary` with the fd at 2 steps of each seed; IS falls as it rises."""
    return dict(seeds={s: dict(evaluations=[dict(step=9, fd_2step=v, is_2step=10 - v)]) for s, v in values.items()}, N=2)


def test_differences_are_paired_over_seeds_and_corrected_for_many_rows():
    base = {0: 10.0, 1: 20.0, 2: 40.0}
    rows = {1: fake_row(base), 2: fake_row({0: 11.0, 1: 22.0, 2: 43.0}), 3: fake_row({0: 10.0, 1: 20.0, 2: 40.0}), 4: fake_row({0: 9.9, 1: 19.9, 2: 39.7, 7: 0.0})}
    found = reproduce.compare(rows, 1, "fd")
    t = 2 * math.sqrt(3)                                                      # differences 1, 2, 3: mean 2, deviation 1
    assert found[2][0] == pytest.approx(2) and found[3] == [0.0, 1.0]
    p2, p4 = 1 - t / math.sqrt(t * t + 2), scipy.stats.ttest_1samp([-0.1, -0.1, -0.3], 0).pvalue      # Student's t with 2 degrees of freedom in closed form
    assert sorted([found[2][1], found[4][1]]) == pytest.approx(sorted([3 * min(p2, p4), max(3 * min(p2, p4), 2 * max(p2, p4))]))
    assert 1 not in found and reproduce.compare(rows, 1, "is")[2][0] == pytest.approx(-2)
    assert reproduce.compare({1: fake_row({0: 1.0}), 2: fake_row({0: 2.0})}, 1, "fd") == {}           # one seed shows nothing
    assert reproduce.spread([1.0, 3.0], 1) == "2.0 ± 1.4" and reproduce.spread([1.0], 1) == "1.0" and reproduce.spread([], 1) == "-"


def test_latents_are_trained_in_pieces_and_the_best_fid_is_found(inputs, tmp_path):
    args = argparse.Namespace(data=str(inputs / "latents"), vae="V", inception="W", ref="R", n=2000, fid_every=1500, table="2", jobs=1, start="weak", init=str(inputs / "imf.pt"), runs=tmp_path)
    jobs = reproduce.jobs_of(args, {1: reproduce.TABLES["2"].rows[0], 2: reproduce.TABLES["2"].rows[1], 7: reproduce.TABLES["2"].rows[6]}, 0)
    lines = [shlex.join(line) for line in reproduce.Runner(args).commands(jobs[7])]
    train = f"fsf_dmd.py --init {inputs}/imf.pt --M 2 --data {inputs}/latents --seed 0 --out {jobs[7].folder} --steps "
    assert [line.removeprefix(train) for line in lines[::2]] == ["1500", "3000", "4000"]              # Table 6: 4,000 steps
    assert lines[1] == (f"evaluate.py {jobs[7].folder}/model.pt --data {inputs}/latents --steps 2 --vae V --inception W --ref R --n 2000 --few 1 --out {jobs[7].folder}/fid_001500_2step")
    [teacher], [start] = reproduce.Runner(args).commands(jobs[2]), reproduce.Runner(args).commands(jobs[1])
    assert "--velocity" in teacher and teacher[teacher.index("--steps") + 1] == "25" and start[:2] == ["evaluate.py", f"{inputs}/imf.pt"] and "2" in start
    for at, fid in ((1500, 5.0), (3000, 4.0), (4000, 4.5)):
        (jobs[7].folder / f"fid_{at:06d}_2step").mkdir(parents=True)
        (jobs[7].folder / f"fid_{at:06d}_2step" / "fid.json").write_text(json.dumps({"fid": fid, "is": 200.0, "precision_inception": 0.6, "recall_inception": 0.5, "n": 2000}))
    assert reproduce.Runner(args).commands(jobs[7]) == [[*jobs[7].command, "--steps", "4000"]]         # interrupted and restarted: no FID is measured twice
    run = reproduce.collect(args, jobs[7])
    assert [e["fd_2step"] for e in run["evaluations"]] == [5.0, 4.0, 4.5] and run["evaluations"][2] == dict(step=4000, fd_2step=4.5, is_2step=200.0, precision_2step=0.6, recall_2step=0.5)
    row = reproduce.summary({7: reproduce.TABLES["2"].rows[6]}, {7: {0: run}})[7]
    assert row["best"] == [4.0] and row["step"] == [3000] and row["last"]["fd_2step"] == [4.5]


def test_forward_passes_that_the_scripts_claim_are_what_the_code_does(inputs, tmp_path):
    """The costs in the file headers, in passes of one network (backward = 2), against counted FLOPs; below by the first layer's input gradient."""
    claimed = {"imf: Consistency distillation": 6, "imf: FSF-DMD M=1": 11, "imf: FSF-DMD M=2": 14, "fm: Consistency distillation": 7, "fm: FSF-DMD": 16, "FM": 3, "iMF": 7, "iMF + TwinFlow": 15,
               "RCGM": 7, "FSF-DMD from scratch": 12}
    for label, start, command in reproduce.COST:
        if label in claimed:
            script, *flags = shlex.split(command.format(start=inputs / f"{start}.pt"))
            argv = [*flags, "--data", str(inputs / "latents"), *([] if start else ["--size", "tiny"]), "--batch_size", "1", "--precision", "fp32", "--out", str(tmp_path / "count"), "--resume", "no"]
            found = reproduce.count(script[:-3], argv, 1, inputs / f"{'fm' if start == 'fm' or label == 'FM' else 'imf'}.pt")
            assert 0.98 * claimed[label] < found["step"] / found["forward"] <= claimed[label], label
            assert found["optimizer"] > 0


def test_cost_measures_a_step_of_a_method(tmp_path):
    """The first row of `reproduce.py cost`, of a small network: seconds and memory of a process of its own, and counted passes."""
    printed = subprocess.run([sys.executable, str(HERE / "reproduce.py"), "cost", "--size", "tiny", "--row", "1", "--batch_size", "2", "--runs", "kept", "--out", "."], cwd=tmp_path, env=environment() | dict(CUDA_VISIBLE_DEVICES=""),
                             capture_output=True, text=True, check=True).stdout
    found = json.loads((tmp_path / "cost-cpu.json").read_text())
    [row] = found["rows"]
    assert row["label"] == "imf: Consistency distillation" and row["paper_sec_per_step"] == 0.23 and 5.9 < row["passes"] <= 6
    assert 0 < row["sec_per_step"] < 60 and 0.1 < row["memory_gb"] < 20 and found["batch"] == 2
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["cost.json"]                    # its random inputs are gone
    assert row["hours_modelled"] == pytest.approx(40_000 * (128 * row["gflop_per_image"] + row["gflop_optimizer"]) * 1e9 / found["flop_per_second_modelled"] / 3600)
    assert "| imf: Consistency distillation | 6.0 |" in printed


def test_interrupted_and_restarted_a_table_is_the_same_and_a_changed_script_runs_again(tmp_path):
    """A copy of the project, as a clone; the teacher row of Table 2 (a start of 200 steps, and its evaluation) on a small image set."""
    for file in [*HERE.glob("*.py"), HERE / "results" / "paper_tables.json"]:
        target = tmp_path / file.relative_to(HERE)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    small_images(tmp_path / "toy.npz", 60)

    def start(*flags):
        return subprocess.Popen([sys.executable, "reproduce.py", "2", "--data", "toy.npz", "--row", "2", "--seeds", "1", "--jobs", "1", *flags], cwd=tmp_path, env=environment(),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start()
    metrics = tmp_path / "runs" / "reproduce" / "toy" / "consistency-lossimf-seed0" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "the same command goes on" in printed and "Traceback" not in printed
    stopped = torch.load(metrics.parent / "state.pt", weights_only=True)["step"]
    assert 0 < stopped < 200
    printed, _ = (second := start()).communicate(timeout=300)
    assert second.returncode == 0 and "0 kept from before; 1 at a time" in printed, printed
    log = metrics.parent.with_name(metrics.parent.name + ".log").read_text()
    assert f"resuming at step {stopped}" in log
    out = tmp_path / "runs" / "reproduce" / "tables"
    before = [(out / f"table2-toy-weak{end}").read_text() for end in (".md", ".csv")]
    assert {f.name for f in out.iterdir()} == {f"table2-toy-weak{end}" for end in (".md", ".csv", ".json", ".png", "-samples.png")}
    lines = list(csv.DictReader(io.StringIO(before[1])))
    assert [(line["seed"], line["steps"]) for line in lines] == [("0", "25")] and float(lines[0]["fd"]) > 0
    own = json.loads((tmp_path / "runs/reproduce/toy/evaluate-imf-velocity-seed0/evaluation.json").read_text())
    assert float(lines[0]["fd"]) == pytest.approx(own["fd_25step"], abs=1e-4)                        # the number is the script's own
    printed, _ = start().communicate(timeout=60)
    assert "2 runs, 2 kept" in printed and [(out / f"table2-toy-weak{end}").read_text() for end in (".md", ".csv")] == before
    with open(tmp_path / "consistency.py", "a") as file:
        file.write("# changed\n")
    printed, _ = (third := start()).communicate(timeout=300)
    assert third.returncode == 0 and "consistency-lossimf-seed0: consistency.py changed since, the kept run is removed and runs again" in printed
    assert "evaluate-imf-velocity-seed0: consistency.py changed since" in printed                     # what started from it too
    assert f"| {reproduce.spread([float(lines[0]['fd'])], 1)} |" in (out / "table2-toy-weak.md").read_text()


def test_bad_flags_of_reproduce_end_in_one_line(capsys, monkeypatch, inputs):
    for command, words in (("reproduce.py 6", "invalid choice"), ("reproduce.py 2 --row 12", "expected 1 to 11"), ("reproduce.py 5 --start strong", "--start strong"), ("reproduce.py 2 --seeds 0", "--seeds"),
                           (f"reproduce.py 2 --data {inputs}/latents", "needs --vae, --inception and --ref"), ("reproduce.py 2 --vae x", "does nothing"), ("reproduce.py cost --seeds 3 --jobs 2", "--jobs, --seeds: does nothing for cost"),
                           (f"reproduce.py 5 --init {inputs}/imf.pt", "start from scratch"), (f"reproduce.py 10 --init {inputs}/imf.pt", "start from fm and imf"), (f"reproduce.py 4 --init {inputs}/imf.pt", "start from fm"),
                           ("reproduce.py 2 --init nowhere.pt", "no such file"), (f"reproduce.py 2 --init {HERE}/README.md", "not a model.pt"), ("reproduce.py cost --size huge", "invalid choice"), ("reproduce.py 2 --size tiny", "does nothing")):
        assert words in refusal(command, capsys, monkeypatch)


def test_tables_in_readme_are_those_of_the_results():
    """Every table in results/ follows from its JSON, and README shows its first half word for word."""
    readme, names = (HERE / "README.md").read_text(), []
    for path in sorted((HERE / "results").glob("table*.json")):
        stored = json.loads(path.read_text())
        table = reproduce.TABLES[stored["table"]]
        rows = reproduce.summary({row["number"]: table.rows[row["number"] - 1] for row in stored["rows"]}, {row["number"]: row["seeds"] for row in stored["rows"]})
        text = reproduce.markdown(argparse.Namespace(data=stored["data"]), table, rows)
        assert path.with_suffix(".md").read_text().endswith(f"\n\n{text}\n"), path
        assert len(rows) == len(table.rows) and all(row["n"] == 5 for row in rows.values()), path
        if path.stem in readme:
            assert text.split("\n\n")[0] in readme, path
            assert re.search(rf"results/{path.stem}\.png", readme), path
            names.append(path.stem)
    assert "table2-digits-weak" in names


def test_what_readme_says_of_cost_is_in_the_numbers():
    """The table word for word; hours of the ImageNet tables and ratios from its counted FLOPs; the passes of DMD2's header."""
    readme, found = (HERE / "README.md").read_text(), json.loads((HERE / "results" / "cost-cpu.json").read_text())
    assert (HERE / "results" / "cost-cpu.md").read_text().split("\n\n", 1)[1].strip() in readme
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == [label for label, *_ in reproduce.COST] and (found["size"], found["batch"]) == ("B/1", 4)
    assert [row["command"].replace(f"{str(start).upper()}.pt", "{start}") for row, (_, start, _) in zip(found["rows"], reproduce.COST)] == [command for *_, command in reproduce.COST]
    flops = {label: 128 * row["gflop_per_image"] + row["gflop_optimizer"] for label, row in rows.items()}
    hours = {label: row["hours_modelled"] for label, row in rows.items()}
    assert all(hours[label] == pytest.approx(row["preset_steps"] * flops[label] * 1e9 / reproduce.RATE / 3600) for label, row in rows.items())
    CD, M1, M2, DMD2, BOTH = (f"imf: {name}" for name in ("Consistency distillation", "FSF-DMD M=1", "FSF-DMD M=2", "DMD2 1:5", "DMD2 + L_CD"))

    def ttur(R, gan):                                                          # linear in R
        return hours[f"imf: DMD2 1:1{gan}"] + (R - 1) / 4 * (hours[f"imf: DMD2 1:5{gan}"] - hours[f"imf: DMD2 1:1{gan}"])

    FM = {name: hours[f"fm: {name}"] for name in ("Consistency distillation", "DMD2 1:5", "DMD2 + L_CD", "FSF-DMD")}
    sums = {"2": sum(hours[label] for label in (CD, DMD2, "imf: DMD2 + IDA", BOTH, M2, M1)), "3": 2 * hours[CD] + 2 * hours[M1] + 4 * hours[M2] + hours[DMD2],        # of M = 1 as of M = 2
            "4": sum(FM.values()) + FM["Consistency distillation"],           # FSF-DMD begins with as many steps of it
            "5": sum(hours[label] for label in ("iMF", "iMF + DMD2", "iMF + TwinFlow", "RCGM", "RCGM + TwinFlow", "FSF-DMD from scratch")),
            "7": sum(ttur(R, gan) for gan in (", no GAN", "") for R in (1, 2, 3, 4, 5, 5, 5, 5)) + 4 * (hours[BOTH] - hours[DMD2]), "8": 5 * hours[M2], "9": 9 * hours[M2]}
    for table, total in sums.items():
        assert re.search(rf"^\| {table}, .*\| not run here \| `python reproduce.py {table} --data latents ...` \| {total:.0f} \|$", readme, re.M), table
    text = " ".join(readme[readme.index("The hours are modelled"):readme.index("## Read it")].split())
    share = [rows[CD]["gflop_optimizer"] / (B * rows[CD]["gflop_per_image"] + rows[CD]["gflop_optimizer"]) for B in (4, 128)]
    paper = {label: values["sec_per_step_b200"] for label, values in reproduce.paper("table10")} | {label: values["sec_per_step_a100"] for label, values in reproduce.paper("table5")}
    for words in (f"(iMF {hours['iMF']:.0f} hours, FM {hours['FM']:.0f})", f"NorMuon is {share[0]:.0%} of CD's FLOPs here and {share[1]:.0%} at", f"({rows[DMD2]['sec_per_step'] / rows[M2]['sec_per_step']:.1f} times FSF-DMD, M = 2)",
                  f"DMD2 takes {flops[DMD2] / flops[M2]:.1f} times FSF-DMD, M = 2, and CD {flops[CD] / flops[M2]:.2f} times; in the paper's seconds 3.8 and {paper[CD] / paper[M2]:.2f}",
                  f"DMD2 + L_CD is {flops[BOTH] / flops[M2]:.1f} here and {paper[BOTH] / paper[M2]:.1f} there", f"FSF-DMD takes {flops['FSF-DMD from scratch'] / flops['iMF']:.1f} times iMF, in the paper {paper['FSF-DMD'] / paper['iMF']:.1f}",
                  f"RCGM {flops['RCGM'] / flops['iMF']:.1f} times, in the paper {paper['RCGM'] / paper['iMF']:.1f}", f"DMD2 needs {rows[DMD2]['memory_gb'] / rows[M2]['memory_gb']:.1f} times"):
        assert words in text, words
    for label, percent, peak in (("iMF", 22, 312e3), (M2, 12, 2250e3)):                               # GFLOP/s in bf16 of an A100 and a B200
        assert f"{flops[label] / paper[label] / peak:.0%}" == f"{percent}%" and f"{percent}% of a" in text
    passes = {R: rows[f"imf: DMD2 1:{R}"]["passes"] - rows[f"imf: DMD2 1:{R}, no GAN"]["passes"] for R in (1, 5)}           # of the GAN: a + b R
    b = (passes[5] - passes[1]) / 4
    assert (f"{passes[1] - b:.1f}", f"{b:.1f}", f"{26.5 + passes[5]:.1f}") == ("1.1", "3.3", "44.1")


class Told:
    """A table in results/, and what README says of it."""

    def __init__(self, name):
        self.readme, self.stored = (HERE / "README.md").read_text(), json.loads((HERE / "results" / f"{name}.json").read_text())
        self.last = {row["number"]: [run["evaluations"][-1] for run in row["seeds"].values()] for row in self.stored["rows"]}

    def gain(self, a, b, metric, words="", all_five=True, p=None):
        """The paired differences of row b to row a [5]; their mean and deviation stand in README as `words`, and they have one sign."""
        d = np.array([y[metric] - x[metric] for x, y in zip(self.last[a], self.last[b])])
        digits = len((words or "0.0").split(".")[-1])
        assert not words or (f"{d.mean():+.{digits}f} ± {d.std(ddof=1):.{digits}f}" in (words, f"+{words}", f"-{words}") and words in self.readme), (a, b, metric, d.mean(), d.std(ddof=1))
        assert not all_five or (np.sign(d) == np.sign(d[0])).all()
        assert p is None or scipy.stats.ttest_1samp(d, 0).pvalue < p
        return d

    def mean(self, row, metric, digits):
        return f"{statistics.mean(e[metric] for e in self.last[row]):.{digits}f}"

    def seconds(self, row):
        return statistics.median(run["sec_per_step"] for run in self.stored["rows"][row - 1]["seeds"].values())

    def differences(self, metric):
        table = reproduce.TABLES[self.stored["table"]]
        return reproduce.compare(reproduce.summary(dict(enumerate(table.rows, 1)), {row["number"]: row["seeds"] for row in self.stored["rows"]}), table.reference, metric)


def test_the_digest_in_readme_is_of_its_tables():
    """What its lines say beyond the paragraphs, whose tests follow."""
    weak, strong, three, five = Told("table2-digits-weak"), Told("table2-digits-strong"), Told("table3-digits-weak"), Told("table5-digits")
    CD, DMD2, DMD2_CD, M2, MASKED = 3, 4, 6, 7, 9
    means = {row: float(weak.mean(row, "fd_2step", 4)) for row in (1, *range(CD, MASKED))}
    assert sorted(means, key=means.get)[:2] == [M2, 8] and (weak.mean(DMD2, "fd_2step", 1), strong.mean(M2, "fd_2step", 1), strong.mean(CD, "fd_2step", 1)) == ("75.9", "29.5", "15.7")
    for told in (weak, strong):
        for row in set(range(CD, 11)) - {M2}:
            assert told.gain(row, M2, "is_2step").min() > 0
        assert told.gain(MASKED, M2, "recall_2step").max() < 0 and abs(told.gain(CD, DMD2_CD, "fd_2step", all_five=False).mean()) < 1
    weak.gain(CD, MASKED, "fd_2step", "4.2 ± 0.8")
    three.gain(3, 4, "is_2step", "+0.007 ± 0.001")
    assert scipy.stats.ttest_1samp(three.gain(3, 4, "fd_2step", all_five=False), 0).pvalue > 0.05
    assert [abs(five.gain(1, row, "fd_2step", all_five=False).mean()) < 1 for row in range(2, 7)] == [False] * 4 + [True]
    scratch = dict(reproduce.paper("table5"))
    assert f"{five.seconds(6) / five.seconds(1):.1f}" == "1.7" and f"{scratch['FSF-DMD']['sec_per_step_a100'] / scratch['iMF']['sec_per_step_a100']:.1f}" == "1.1"
    assert all(f"{told.seconds(DMD2) / told.seconds(M2):.1f}" == "4.3" for told in (weak, strong))
    cost = dict(reproduce.paper("table10"))
    assert f"{cost['imf: DMD2']['sec_per_step_b200'] / cost['imf: FSF-DMD M=2']['sec_per_step_b200']:.1f}" == "3.8"
    assert [[cost[row][metric] for row in ("imf: Consistency distillation", "imf: FSF-DMD M=2")] for metric in ("recall", "precision")] == [[0.47, 0.53], [0.65, 0.59]]


def test_what_readme_says_of_table_4_is_in_the_numbers():
    told = Told("table4-digits")
    gain, mean, CD, DMD2, BOTH, FSF = told.gain, told.mean, 3, 4, 5, 6
    assert all(p > 0.05 for _, p in told.differences("fd").values())
    curve = {row["number"]: [[e["fd_2step"] for e in run["evaluations"]] for run in row["seeds"].values()] for row in told.stored["rows"] if row["N"] == 2}
    assert f"({np.mean(curve[FSF], 0)[2]:.1f})" in told.readme and np.mean(curve[FSF], 0).argmin() == 2
    assert f"({np.mean(curve[CD], 0)[1]:.1f})" in told.readme and mean(1, "fd_25step", 1) == "12.6"
    gain(CD, FSF, "fd_2step", "0.6 ± 0.4")
    for metric, words in (("precision_2step", "+0.032 ± 0.009"), ("is_2step", "+0.05 ± 0.02"), ("acc_2step", "+0.012 ± 0.002"), ("recall_2step", "-0.024 ± 0.004"), ("fd_4step", "-3.7 ± 0.8"), ("fd_1step", "+11.0 ± 3.3")):
        gain(CD, FSF, metric, words)
    assert (mean(DMD2, "fd_4step", 1), mean(DMD2, "acc_1step", 3)) == ("42.1", "0.950") and gain(CD, DMD2, "acc_1step").min() > 0
    assert statistics.stdev(e["fd_2step"] for e in told.last[BOTH]) < 2 < statistics.stdev(e["fd_2step"] for e in told.last[DMD2])


def test_what_readme_says_of_table_3_is_in_the_numbers():
    told = Told("table3-digits-weak")
    gain, mean, CD, EQ14, DMD2S, EQ22, TUNED, MASKED, M1, DMD2, CD_MASKED = told.gain, told.mean, 1, 2, 3, 4, 5, 6, 7, 8, 9
    distances = [float(mean(row, "fd_2step", 4)) for row in (EQ14, DMD2S, EQ22, TUNED, MASKED)]
    assert distances == sorted(distances, reverse=True) and [row.paper["fid"] for row in reproduce.TABLES["3"].rows[1:6]] == [5.70, 5.81, 5.34, 4.45, 3.85]
    called = [row for row, (_, p) in told.differences("fd").items() if p < 0.05]
    assert called == [M1, CD_MASKED]                                                                  # of rows 2 to 6 none
    assert {row for row, (_, p) in told.differences("is").items() if p < 0.05} >= {EQ22, TUNED, MASKED}
    for a, b, metric, words in ((EQ22, TUNED, "fd_2step", "-2.4 ± 1.2"), (EQ22, TUNED, "is_2step", "+0.085 ± 0.020"), (TUNED, MASKED, "is_2step", "+0.093 ± 0.022"), (TUNED, MASKED, "fd_4step", "-6.0 ± 1.5"),
                                (TUNED, MASKED, "fd_1step", "+5.1 ± 3.1"), (CD, EQ14, "acc_1step", "+0.008 ± 0.002"), (EQ14, EQ22, "fd_2step", "-0.5 ± 0.4"), (EQ14, EQ22, "is_2step", "+0.011 ± 0.003"),
                                (DMD2S, EQ22, "is_2step", "+0.007 ± 0.001"), (EQ14, DMD2S, "fd_2step", "0.4 ± 0.2")):
        gain(a, b, metric, words)
    assert (gain(TUNED, MASKED, "fd_2step", "-1.3 ± 1.4", all_five=False) < 0).sum() == 4 and (gain(CD, DMD2, "fd_1step", all_five=False) < 0).sum() == 4
    assert -gain(EQ14, EQ22, "acc_1step").mean() > gain(CD, EQ14, "acc_1step").mean() / 2
    assert gain(EQ14, DMD2S, "fd_2step").max() < 0 and max(told.last, key=lambda row: float(mean(row, "fd_2step", 4))) == DMD2
    assert mean(DMD2, "fd_1step", 1) == "69.8" and min(told.last, key=lambda row: float(mean(row, "fd_1step", 4))) == DMD2 and mean(CD_MASKED, "fd_2step", 1) == mean(MASKED, "fd_2step", 1)


def test_what_readme_says_of_table_5_is_in_the_numbers():
    told = Told("table5-digits")
    gain, mean, IMF, DMD2, TWIN, RCGM, RCGM_TWIN, FSF = told.gain, told.mean, 1, 2, 3, 4, 5, 6
    assert all(row.paper["fid_1step"] is row.paper["fid_2step"] is None for row in reproduce.TABLES["5"].rows)
    assert min(told.last, key=lambda row: float(mean(row, "fd_2step", 4))) == min(told.last, key=lambda row: float(mean(row, "fd_1step", 4))) == IMF
    gain(IMF, FSF, "fd_2step", "+0.4 ± 3.2", all_five=False)
    assert gain(IMF, FSF, "acc_1step", "+0.003 ± 0.001").min() > 0 and (gain(IMF, FSF, "fd_1step", "6.3 ± 4.8", all_five=False) > 0).sum() == 4
    assert mean(DMD2, "acc_1step", 3) == mean(FSF, "acc_1step", 3) and abs(gain(IMF, DMD2, "fd_4step", all_five=False).mean()) < 0.1
    for a, b, metric, words in ((IMF, DMD2, "fd_1step", "53.5 ± 6.7"), (IMF, TWIN, "fd_2step", "+35.0 ± 10.4"), (RCGM, RCGM_TWIN, "fd_2step", "+80.8 ± 34.0")):
        assert gain(a, b, metric, words).min() > 0
    assert gain(IMF, RCGM, "fd_2step").min() > 0
    assert told.seconds(FSF) == min(told.seconds(row) for row in (DMD2, TWIN, RCGM_TWIN, FSF))


def test_what_readme_says_of_table_7_is_in_the_numbers():
    told, two = Told("table7-digits-weak"), Told("table2-digits-weak")
    gain = told.gain
    paper = [row.paper["fid"] for row in reproduce.TABLES["7"].rows]
    pairs = [gain(row, row + 8, "fd_2step", all_five=False) for row in range(1, 9)]
    assert all(a > b for a, b in zip(paper[:8], paper[8:])) and all(pair.mean() < 0 for pair in pairs) and [(pair < 0).all() for pair in pairs] == [False] + [True] * 7
    gain(5, 13, "fd_2step", "2.5 ± 0.9")
    gain(7, 15, "fd_2step", "0.2 ± 0.1")
    gain(9, 13, "fd_2step", "-3.6 ± 5.4", all_five=False)
    assert paper[8:13] == [4.28, 4.27, 4.25, 4.3, 4.18] and (paper[6], paper[14], paper[15]) == (5.51, 4.67, 3.85)
    assert all(scipy.stats.ttest_1samp(gain(a, b, "fd_2step", all_five=False), 0).pvalue > 0.05 for a, b in ((5, 6), (13, 14), (9, 13), (1, 5)))
    gain(15, 16, "fd_2step", "5.1 ± 0.9")
    best = [min(rows, key=lambda row: float(told.mean(row, "fd_2step", 4))) for rows in (range(1, 9), range(9, 17))]
    assert best == [8, 16]
    told.last |= {"FSF": two.last[7], "masked CD": two.last[9]}                                   # the same seeds and starts
    gain("FSF", 16, "fd_2step", "-0.5 ± 2.5", all_five=False)
    gain("masked CD", 16, "fd_2step", "-0.6 ± 2.1", all_five=False)
    gain("FSF", 16, "recall_2step", "+0.055 ± 0.014")
    gain("FSF", 16, "is_2step", "-0.07 ± 0.03")
    assert f"{told.seconds(16) / two.seconds(7):.1f}" == "4.7" and (f"{told.seconds(13):.3f}", f"{told.seconds(5):.3f}") == ("1.251", "0.577")


def test_what_readme_says_of_table_8_is_in_the_numbers():
    told = Told("table8-digits-weak")
    paper = [row.paper["fid"] for row in reproduce.TABLES["8"].rows]
    distances = [float(told.mean(row, "fd_2step", 4)) for row in range(1, 6)]
    assert paper == sorted(paper, reverse=True) and distances == sorted(distances) and all(p > 0.05 for _, p in told.differences("fd").values())
    assert (told.mean(1, "fd_2step", 1), told.mean(5, "fd_2step", 1)) == ("69.7", "70.6")
    told.gain(1, 5, "fd_2step", "+0.9 ± 1.1", all_five=False)
    for metric, words in (("precision_2step", "-0.012 ± 0.004"), ("recall_2step", "+0.017 ± 0.006"), ("acc_1step", "-0.005 ± 0.001")):
        told.gain(1, 5, metric, words)


def test_what_readme_says_of_table_9_is_in_the_numbers():
    told = Told("table9-digits-weak")
    gain, mean, ONE, ADAPTIVE, CLIPPED = told.gain, told.mean, (1, 2, 3, 4), (5, 6, 7, 8), 9                     # lambda 0.01, 0.05, 0.1, 0.5
    distances = [float(mean(row, "fd_2step", 4)) for row in told.last]
    assert sorted(distances)[-2] - min(distances) < 0.5 and distances.index(max(distances)) == ADAPTIVE[3] - 1 and mean(ADAPTIVE[3], "fd_2step", 1) == "73.0"
    gain(ADAPTIVE[2], ADAPTIVE[3], "fd_2step", "+2.4 ± 1.7")
    for rows in (ONE, ADAPTIVE):
        for a, b in zip(rows, rows[1:]):
            assert gain(a, b, "is_2step").min() > 0 and gain(a, b, "recall_2step").max() < 0
    for rows, more, less in ((ADAPTIVE, "+0.155 ± 0.042", "-0.077 ± 0.013"), (ONE, "+0.065 ± 0.018", "-0.032 ± 0.008")):
        gain(rows[0], rows[3], "is_2step", more)
        gain(rows[0], rows[3], "recall_2step", less)
    for a, b in ((ONE[2], ADAPTIVE[1]), (ONE[1], CLIPPED)):
        assert all(scipy.stats.ttest_1samp(gain(a, b, metric, all_five=False), 0).pvalue > 0.05 for metric in ("is_2step", "fd_2step"))
    assert all(scipy.stats.ttest_1samp(gain(ONE[1], CLIPPED, metric, all_five=False), 0).pvalue > 0.05 for metric in ("precision_2step", "recall_2step", "acc_2step"))


def test_what_readme_says_of_table_2_is_in_the_numbers():
    told = Told("table2-digits-weak")
    gain, mean, last = told.gain, told.mean, told.last
    CD, DMD2, IDA, M2, M1, MASKED, SID, CONTROL = 3, 4, 5, 7, 8, 9, 10, 11
    assert gain(CD, MASKED, "fd_2step", "4.2 ± 0.8").max() < 0
    assert (mean(M2, "fd_2step", 1), mean(M1, "fd_2step", 1), mean(CD, "fd_2step", 1), mean(MASKED, "fd_2step", 1), mean(CONTROL, "fd_2step", 1)) == ("70.6", "70.7", "74.9", "70.6", "56.3")
    for metric, words in (("acc_2step", "+0.024 ± 0.009"), ("is_2step", "+0.15 ± 0.03"), ("precision_2step", "+0.071 ± 0.019"), ("recall_2step", "-0.083 ± 0.012")):
        gain(MASKED, M2, metric, words, p=0.01)
    gain(MASKED, M2, "fd_2step", "-0.0 ± 2.7", all_five=False)
    assert gain(MASKED, M2, "acc_2step").mean() > (1 - float(mean(MASKED, "acc_2step", 3))) / 3
    gain(MASKED, M1, "acc_1step", "+0.015 ± 0.004")
    gain(CD, DMD2, "fd_2step", "+1.0 ± 6.6", all_five=False)
    assert (mean(DMD2, "acc_1step", 3), mean(M2, "acc_1step", 3), mean(DMD2, "acc_2step", 3), mean(M2, "acc_2step", 3)) == ("0.964", "0.961", "0.923", "0.963")
    assert (mean(DMD2, "recall_2step", 3), mean(M2, "recall_2step", 3), mean(SID, "recall_2step", 3), mean(SID, "precision_2step", 3)) == ("0.773", "0.636", "0.865", "0.436")
    assert gain(DMD2, M2, "acc_2step").min() > 0 and gain(M2, DMD2, "fd_4step", "20.0 ± 10.0").min() > 0
    for row in set(last) - {SID, 2}:
        assert gain(row, SID, "recall_2step").min() > 0 and gain(row, SID, "precision_2step").max() < 0
    for row in set(last) - {CONTROL, 2}:
        assert all(gain(row, CONTROL, metric).min() > 0 for metric in ("is_2step", "precision_2step", "acc_2step"))
    closest, farthest = sorted(-gain(MASKED, CONTROL, "fd_2step"))[::4]
    assert f"by {closest:.1f} to {farthest:.1f}" in told.readme
    assert gain(DMD2, IDA, "fd_2step", all_five=False).mean() < 1 and scipy.stats.ttest_1samp(gain(DMD2, IDA, "fd_2step", all_five=False), 0).pvalue > 0.05


def test_what_readme_says_of_table_2_from_a_trained_iMF_is_in_the_numbers():
    told = Told("table2-digits-strong")
    gain, mean, CD, DMD2, M2, M1, MASKED, SID = told.gain, told.mean, 3, 4, 7, 8, 9, 10
    for row in set(told.last) - {2, CD}:
        assert gain(CD, row, "fd_2step").min() > 0 and gain(CD, row, "fd_1step").min() > 0
    assert (mean(CD, "fd_2step", 1), mean(2, "fd_25step", 1), mean(M2, "acc_2step", 3), mean(6, "fd_2step", 1), mean(SID, "recall_2step", 3)) == ("15.7", "15.7", "0.998", "16.3", "0.889")
    for metric, words in (("fd_2step", "+11.1 ± 2.5"), ("recall_2step", "-0.172 ± 0.016"), ("is_2step", "+0.071 ± 0.016"), ("precision_2step", "+0.100 ± 0.013"), ("acc_2step", "+0.008 ± 0.003")):
        gain(MASKED, M2, metric, words, p=0.01)
    curves = [[e["fd_2step"] for e in run["evaluations"]] for run in told.stored["rows"][M2 - 1]["seeds"].values()]
    assert all(min(curve[1:]) == curve[1] < curve[-1] for curve in curves)
    assert gain(MASKED, M1, "fd_2step", "0.5 ± 0.3").max() < 0 < gain(MASKED, M1, "fd_1step", "6.5 ± 0.9").min()
    gain(CD, MASKED, "fd_2step", "+2.7 ± 0.8")
    gain(CD, DMD2, "fd_2step", "17.0 ± 4.8")
    assert all(scipy.stats.ttest_1samp(gain(CD, DMD2, metric, all_five=False), 0).pvalue > 0.05 for metric in ("is_2step", "recall_2step"))
    assert max(set(told.last) - {2}, key=lambda row: float(mean(row, "recall_2step", 4))) == SID
    for row in set(told.last) - {2, M2}:
        assert gain(row, M2, "is_2step").min() > 0


def test_presets_of_the_digits_are_what_the_search_chose():
    """The chosen setting is the best of its search, on the mean 2-step distance of seeds 100 and 101, or within 1% of it; as many settings for each."""
    runs = {run["run"]: run for run in json.loads((HERE / "results" / "search_digits.json").read_text())["runs"]}

    def means(names, at="last"):
        return [statistics.mean(runs[name.replace("S", seed)][at]["fd_2step"] for seed in ("100", "101")) for name in names.split()]

    six = {"cd": "xS-cd-lr3e-3 xS-cd-lr6e-3 cd6-1e-3-S cd6-2e-3-S cd6-4.5e-3-S cd6-1.2e-2-S", "M=2": "xS-fsf-l0.5-k1 xS-fsf-l0.5-k3 xS-fsf-l0.3-k1 xS-fsf-l0.3-k3 xS-fsf-l1-k1 xS-fsf-l1-k3",
           "M=1": "yS-m1-l0.05 yS-m1-l0.15 m1six-0.02-S m1six-0.1-S m1six-0.3-S m1six-0.5-S", "dmd2": "dmd6-lr3e-4-f3e-3-S dS-lr3e-4 dS-lr1e-3 dS-lr3e-3 dmd6-lr2e-3-S dmd6-lr1e-3-f3e-3-S",
           "sid": "sid-1e-4-f1e-3-S sid-3e-4-S sid-1e-3-S sid-3e-3-S sid-3e-5-f1e-3-S sid-3e-5-f3e-5-S"}                     # the chosen one first
    three = {"dmd2 + L_CD": "dmdcd-1-S dmdcd-0.1-S dmdcd-0.01-S", "dmd2 scratch": "dmdsc-0.1-S dmdsc-0.03-S dmdsc-0.3-S", "rcgm + twinflow": "twrcgm-0.1-S twrcgm-0.3-S twrcgm-1-S",
             "dmd2 fm": "dmdfm-1e-3-S dmdfm-3e-3-S dmdfm-3e-4-S", "fsf fm": "fsffm-0.02-S fsffm-0.1-S fsffm-0.5-S", "rcgm": "rcgm-1.2e-2-S rcgm-6e-3-S rcgm-3e-3-S"}
    for count, groups in ((6, six), (3, three)):
        for method, names in groups.items():
            chosen, *others = means(names)
            assert len(others) == count - 1 and chosen <= 1.01 * min(others), method
    chosen, *others = means("cdfm-3e-3-S cdfm-1e-3-S cdfm-6e-3-S", "at_200")
    assert chosen <= 1.01 * min(others)
    chosen, *others = means("fsfsc-0.01-S fsfsc-0.05-S fsfsc-0.2-S")
    assert chosen <= 1.04 * min(others)
    a = {(script, start): importlib.import_module(script).PRESETS["pixels", start] for script in ("fsf_dmd", "dmd2", "sid", "twinflow") for start in ("imf", "scratch") if script != "sid" or start == "imf"}
    assert [a[key]["lam"] for key in (("fsf_dmd", "imf"), ("fsf_dmd", "scratch"), ("dmd2", "imf"), ("dmd2", "scratch"), ("twinflow", "imf"), ("twinflow", "scratch"))] == [0.5, 0.01, 1, 0.1, 0.1, 0.1]
    assert (a["dmd2", "imf"]["lr"], a["dmd2", "imf"]["fake_lr"], a["sid", "imf"]["lr"], a["sid", "imf"]["fake_lr"], a["fsf_dmd", "imf"]["shift"]) == (3e-4, 3e-3, 1e-4, 1e-3, 1)
