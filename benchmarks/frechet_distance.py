"""CPU time of metrics.frechet_distance at 2,048 dimensions against scipy's matrix square root, in one run.

    python benchmarks/frechet_distance.py            # writes results/frechet-benchmark/runs.json
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from metrics import frechet_distance, moments  # noqa: E402

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

# Statistics of 6,000 correlated Gaussian features, twice.
g = torch.Generator().manual_seed(0)
mixing = [torch.randn(2048, 2048, generator=g, dtype=torch.float64) / 2048 ** 0.5 for _ in range(2)]
a, b = (moments(torch.randn(6000, 2048, generator=g, dtype=torch.float64) @ m) for m in mixing)

start = time.process_time()
ours = frechet_distance(*a, *b)
ours_s = time.process_time() - start

start = time.process_time()
root = scipy.linalg.sqrtm(a[1].numpy() @ b[1].numpy())
theirs = float((a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace()) - 2 * np.trace(root.real)
theirs_s = time.process_time() - start

result = dict(
    ours_cpu_s=round(ours_s, 2),
    sqrtm_cpu_s=round(theirs_s, 2),
    ratio=round(theirs_s / ours_s, 1),
    relative_difference=float(abs(ours - theirs) / theirs),
    torch=torch.__version__,
    scipy=scipy.__version__,
    threads=torch.get_num_threads(),
)
(HERE / "results" / "frechet-benchmark" / "runs.json").write_text(json.dumps(result, indent=1) + "\n")
print(result)
