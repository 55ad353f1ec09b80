# ruff: noqa: F401
"""What CaBins guarantees, in the order of the paper: python -m pytest -q test_cabins.py

The paper's sections come first: 3.1 to 3.3, 4.3 and 4.6. Checkpoints, data (4.2), evaluation,
training (4.1) and the command line follow. "Golden" values are what the authors' code and CLIP's
own code computed with made weights. A few of them stand in this file. The files that hold all of
them, and six real pictures, are used where they lie in ../shared.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start, too

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cabins
import clip_tokenizer
import data
import eval as evaluation
import train

torch.set_num_threads(1)  # on small networks several threads only wait for each other
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:CLIP has random weights"),
]
HERE = Path(cabins.__file__).resolve().parent
GOLDENS, SAMPLES = HERE.parent / "shared" / "goldens", HERE.parent / "shared" / "samples"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="no ../shared/goldens here")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples here")
TINY = cabins.Config(backbone="tiny", longer_side=128)


def normal(name: str, shape: tuple) -> np.ndarray:
    """Numbers that depend on the name alone, as the goldens' inputs and weights do."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(math.prod(shape), dtype=np.float32).reshape(shape)


def made_tensor(name: str, shape: tuple) -> torch.Tensor:
    """The goldens' weight that has this name in the released code, and this shape."""
    n = normal(name, shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("logit_scale"):
        return torch.tensor(1 / 0.07).log()
    if name == "gamma":
        return torch.from_numpy(n)
    if name.endswith("running_var"):
        n = np.exp(np.float32(0.2) * n)
    elif name.endswith("running_mean"):
        n = 0.1 * n
    elif len(shape) < 2:
        n = 1 + 0.1 * n if name.endswith("weight") and shape else 0.05 * n
    elif name.endswith(("embedding", "embedding.weight", "contexts")):
        n = 0.02 * n
    else:
        n = n / np.float32(math.sqrt(math.prod(shape[1:])))
    return torch.from_numpy(np.float32(30 if name == "predict_D.conv_out.0.weight" else 1) * n)


def close(actual, expected, tolerance=1e-4):
    """Assert equality relative to the largest expected value."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tiny() -> cabins.CaBins:
    """A network of random weights, in eval mode. No test changes it."""
    torch.manual_seed(0)
    return cabins.CaBins(TINY).eval()


@pytest.fixture(scope="module")
def tiny_checkpoint(tiny, tmp_path_factory) -> Path:
    """The checkpoint of `tiny`, as train.py would save it after training on toy rooms."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    cabins.save_checkpoint(path, tiny, args={"data": "toy"})
    return path


@pytest.fixture
def few_rooms(monkeypatch):
    rooms = {"train": range(8), "test": range(1_000_000, 1_000_002)}
    monkeypatch.setattr(data, "TOY_ROOMS", rooms)


Ran = namedtuple("Ran", "status out err")


def run_script(script: str, *arguments) -> Ran:
    """Run train.py, eval.py or data.py with these arguments, in this process."""
    main = {"train.py": train.main, "eval.py": evaluation.main, "data.py": data.main}[script]
    out, err = io.StringIO(), io.StringIO()
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                data.run_command(main)
                status = 0
            except SystemExit as stop:  # Python prints a text, and exits with 1
                status = 1 if isinstance(stop.code, str) else stop.code or 0
                err.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
            finally:
                for number, handler in signals.items():
                    signal.signal(number, handler)
    return Ran(status, out.getvalue(), err.getvalue())


def write_pair(folder: Path, name: str, height=480, width=640, depth=1500) -> str:
    """Write an image and a depth map, of one value in millimetres; return their line of a list."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    small = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    Image.fromarray(small).resize((width, height)).save(folder / f"rgb_{name}.jpg")
    values = np.full((height, width), depth, np.uint16)
    Image.fromarray(values).save(folder / f"sync_depth_{name}.png")
    return f"{folder.name}/rgb_{name}.jpg {folder.name}/sync_depth_{name}.png 518.8579\n"


@pytest.fixture
def own_pairs(tmp_path) -> Path:
    """A folder of own pairs: six of 96 x 128 pixels in rooms/, named by train.txt and test.txt."""
    root = tmp_path / "own"
    lines = [write_pair(root / "rooms", str(i), 96, 128, 1000 + 500 * i) for i in range(6)]
    (root / "train.txt").write_text("".join(lines[:4]))
    (root / "test.txt").write_text("".join(lines[4:]))
    return root
