"""Wrong commands, odd pictures and pairs, figures, and a real GPU: python -m pytest -q extras

What commands train and measure is in test_cabins.py.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cabins
import data
import eval as evaluation
from cabins import InputError
from test_cabins import HEAD, TINY, colours, files_below, run_script, short, tiny, write_pair

__all__ = ["short", "tiny"]  # fixtures


# ---- Pairs ---------------------------------------------------------------------------------------
def test_nyus_test_pairs_come_from_the_mat(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(1, 256, (3, 3, 640, 480), np.uint8)
    depths = np.random.default_rng(1).random((3, 640, 480), np.float32) + 1
    mat, split = tmp_path / data.NYU_MAT, tmp_path / "list.txt"
    mat.touch()  # h5py is optional
    arrays = {"images": images, "rawDepths": depths}
    h5py = SimpleNamespace(File=lambda path: contextlib.nullcontext(arrays))
    monkeypatch.setitem(sys.modules, "h5py", h5py)
    split.write_text("bath/rgb_00002.jpg bath/sync_depth_00002.png 518.8579\n")
    frame = np.s_[..., 7:474, 7:632]
    for root in (tmp_path, mat):
        sample = data.DepthDataset("nyu", root, split)[0]
        assert torch.equal(sample["depth"][0], torch.from_numpy(depths[2].T))
        image = (data.denormalize(sample["image"]) * 255).round()
        assert torch.equal(image[frame], torch.tensor(images[2]).mT[frame])
        assert (image > 0).sum() == 3 * 467 * 625  # the border is black
    with pytest.raises(InputError):
        data.DepthDataset("nyu", tmp_path, split, train=True)
    split.write_text(write_pair(tmp_path / "bath", "00001"))  # files that are there come first
    assert data.DepthDataset("nyu", tmp_path, split).pairs[0][0].endswith("rgb_00001.jpg")


def test_a_data_set_is_described_with_a_doubt_about_its_scale(tmp_path):
    split, values = tmp_path / "list.txt", (65535, 1500, 2000, 2500)  # the first stands for none
    lines = [write_pair(tmp_path / "a", i, 96, 128, x) for i, x in enumerate(values)]
    split.write_text("".join([*lines, "a.jpg None\n"]))
    known = "4 pairs (1 without ground truth left out); 75% of their pixels have a depth, in units "
    known += "of 1/500 m; median 4.00 m, deepest 5.00 m, 33.3% beyond 4.5 m"
    for top, is_odd in ((4.5, False), (4.4, True), (79, False), (81, True)):  # 5 and 90 %
        pairs = data.DepthDataset("list", tmp_path, split, depth_scale=500, max_depth=top)
        assert ("wrong --depth-scale" in data.describe(pairs)) == is_odd
        assert top != 4.5 or data.describe(pairs) == known
    pairs = data.DepthDataset("list", tmp_path, split, depth_scale=500, max_depth=3)
    with pytest.raises(InputError, match=r"rgb_0\.jpg.* 3 m: .*--max-depth"):
        data.describe(pairs)  # which 3 m itself is not below


def test_a_pair_is_stored_upright(tmp_path):
    image, split = colours(128, 96), tmp_path / "list.txt"
    depth = np.random.default_rng(1).integers(1, 9999, (128, 96)).astype(np.uint16)
    split.write_text("1.jpg depth.png")
    exif = Image.Exif()
    for orientation in range(1, 9):  # 1: as stored; 2 to 4 keep the size
        exif[0x0112] = orientation
        for name in ("1.png", "depth.png"):
            Image.fromarray(image).save(tmp_path / "1.png")
            Image.fromarray(depth).save(tmp_path / "depth.png")
            Image.open(tmp_path / name).save(tmp_path / name, exif=exif)
            if orientation > 1:
                with pytest.raises(InputError, match="without EXIF rotation"):
                    data.DepthDataset("list", tmp_path, split).read(0)
                continue
            found, metres, path = data.DepthDataset("list", tmp_path, split).read(0)
            assert path.endswith("1.png") and np.array_equal(found, image)
            assert metres.dtype == np.float32 and np.allclose(metres, depth / 1000)


# ---- Pictures and figures ------------------------------------------------------------------------
def test_pictures_of_any_size_mode_and_orientation(tiny, tmp_path):
    for size in ((1, 1), (20_000, 3), (3, 500)):
        found = cabins.infer(tiny, Image.new("RGB", size, (90, 80, 70)))
        assert found.depth.shape == size[::-1] and np.isfinite(found.depth).all()
    grey = colours(9, 12)[..., 0]
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        found = cabins.read_picture(Image.fromarray(grey).convert("RGB").convert(mode))
        assert found.shape == (9, 12, 3) and found.dtype == np.uint8
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright: to be turned by a quarter, clockwise
    Image.fromarray(grey).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(cabins.read_picture(tmp_path / "phone.png")[..., 0], np.rot90(grey, -1))
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "new.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    known = {"deep.png": "mode I.*8 bits", "new.heic": "convert it", "none.png": "No such file"}
    for name, what in known.items():
        with pytest.raises(InputError, match=f"{name}.*{what}"):
            cabins.read_picture(tmp_path / name)
    for wrong in (np.zeros((4, 5)), np.zeros((4, 5), np.float32), Image.new("F", (9, 9))):
        with pytest.raises(InputError, match="the picture"):
            cabins.infer(tiny, wrong)


def test_figures_show_the_network_and_mark_what_they_cut(monkeypatch):
    torch.manual_seed(0)
    model = cabins.CaBins(dataclasses.replace(TINY, distance_class="semantic")).eval()
    picture, figures, truth = colours(90, 120), [], np.full((90, 120), 9.5, np.float32)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda x, _, **__: figures.append(x))
    truth[:45] = 0  # no truth
    evaluation.draw_explained("a.png", picture, model, truth)
    found = cabins.infer(model, picture)
    s = cabins.predict_picture(model, picture).similarity[0].numpy()
    axes = figures[0].axes
    image, depth, true, error, std, *prompts = [a.images[0] for a in axes if a.images]
    maps = ((image, picture), (depth, found.depth), (std, found.std), *zip(prompts, s, strict=True))
    assert all(np.array_equal(shown.get_array(), values) for shown, values in maps)
    assert [a.axes.get_title() for a in prompts][::7] == ["“giant”", "“unseen”"]
    assert true.get_array().mask[:45].all() and not true.get_array().mask[45:].any()
    assert np.allclose(error.get_array()[45:], np.abs(found.depth - 9.5)[45:])
    (bins,) = [axis for axis in axes if axis.get_legend()]
    for lines, places in zip(bins.collections, (found.centers, found.distances), strict=True):
        assert np.allclose([line[0, 0] for line in lines.get_segments()], places)


# ---- A GPU ---------------------------------------------------------------------------------------
ON_GPU = """
found = []
torch.nn.Dropout.forward = lambda self, x: x  # a GPU has random numbers of its own
for device in ("cpu", sys.argv[1]):
    data.use_tf32(False)
    run = train.Run(train.parse_args(["--device", device, "--amp", "off"]))
    batch = next(iter(data.load(run.dataset, run.device, 0, batch_size=4)))
    numbers = [x.item() for x in run.learn(batch)]
    numbers += evaluation.evaluate(run.model, run.test_set, 0).values()
    picture = cabins.infer(run.model.eval(), batch["image"][0].permute(1, 2, 0).numpy())
    found.append([*numbers, *picture.depth[::20, ::20].flatten(), *picture.distances])
np.testing.assert_allclose(*found, rtol=1e-2)
"""


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU here")
def test_a_gpu_computes_what_the_cpu_computes():
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", HEAD + ON_GPU, "cuda"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert ran.returncode == 0, ran.stderr


# ---- Wrong commands ------------------------------------------------------------------------------
class Harmful:  # which pickle would build by running a command
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder of good files, and of broken ones that are named after what is wrong with them."""
    root = tmp_path_factory.mktemp("broken")
    good = write_pair(root / "a", 1, 96, 128)
    write_pair(root / "a", "narrow", 80, 128)
    small = write_pair(root / "a", "small", 48, 64)
    Image.new("L", (128, 96)).save(root / "a" / "grey.tif")
    cut = "a/cut.jpg a/sync_depth_1.png\n"
    files = {"good": good, "cut": cut, "late": good + cut + 7 * good, "small": small}
    files |= {"nonsense": f"{good}x", "notruth": "a/rgb_1.jpg None", "nothing": "\n"}
    depths = ("cut.jpg", "grey.tif", "sync_depth_narrow.png", "gone.png")
    files |= {x: f"a/rgb_1.jpg a/{x}" for x in depths}
    files = {f"{name}.txt": text.encode() for name, text in files.items()}
    cabins.save_checkpoint(root / "tiny.pt", cabins.CaBins(TINY))
    whole = (root / "tiny.pt").read_bytes()
    middle = len(whole) // 2
    files |= {"cut.pt": whole[:100_000], "bit.pt": whole[:middle] + b"bit" + whole[middle + 3 :]}
    files |= {"text.pt": b"no network", "binary.txt": b"\xff\xfe\x00", "nyu.mat": b"no HDF5"}
    files["a/cut.jpg"] = (root / "a" / "rgb_1.jpg").read_bytes()[:500]
    for name, content in files.items():
        (root / name).write_bytes(content)
    content = torch.load(root / "tiny.pt", weights_only=True)
    config, state = content["config"], content["model"]
    clip = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    networks = {"clip": clip, "other": {"a": torch.zeros(1)}, "evil": content | {"a": Harmful()}}
    networks |= {"theirs": {"model": {}}, "k": content | {"config": config | {"n_cabins": 7}}}
    networks |= {"shapes": content | {"config": config | {"n_bins": 128}}}
    for name, value in networks.items():
        torch.save(value, root / f"{name}.pt")
    return root


# Each command is its beginning and one of these ends. What the sentence must name is in [] or, if
# it is not typed, in {}. argparse's own errors have the status 2.
LIST = "data.py list --root . --train-split good.txt --test-split"
WRONG = {
    ("data.py", 1): "[nyu] | list --root [none] | toy [--root] . | list --root . {--train-split}"
    " | nyu --root [nyu.mat] --test-split good.txt",
    (LIST, 1): "[none.txt] | [binary.txt] | nothing.txt {test list} | notruth.txt {test list}"
    " | [nonsense].txt | [gone.png].txt | [cut].txt | late.txt --workers 1 {cut.jpg} | [small].txt"
    " | [cut.jpg].txt | [grey.tif].txt | sync_depth_narrow.png.txt {80, 128}"
    " | good.txt --max-depth 1 {wrong --depth-scale or --max-depth}",
    ("train.py", 1): "[--batch-size] 1000 | --out [a] | --out [tiny.pt] | --init [none.pt]"
    " | --init [tiny.pt] --backbone RN50 | --init theirs.pt {python -m extras.convert theirs.pt}"
    " | --clip clip.pt --backbone [RN50] | --clip [none.pt] | --clip [text.pt] | --clip [other.pt]"
    " | --clip [evil.pt]",
    ("eval.py", 1): "[none.pt] | [cut.pt] | bit.pt {damaged} | [text.pt] | [shapes.pt] | k.pt {7}"
    " | [evil.pt] | theirs.pt {python -m extras.convert theirs.pt} | tiny.pt {--data}"
    " | tiny.pt --data [nyu] | tiny.pt --data toy --figures [a]"
    " | tiny.pt --data toy --csv [none/rows.csv]"
    " | tiny.pt --data list --root . --split good.txt --depth-scale 1 {wrong --depth-scale}",
    ("train.py", 2): "--backbone [RN102] | --init tiny.pt [--clip] RN50"
    " | --resume a/last.pt {args.json}",
}
COMMANDS = [
    (" ".join([start, *end.split()]), status)
    for (start, status), ends in WRONG.items()
    for end in ends.split("|")
]


@pytest.mark.parametrize("command, status", COMMANDS, ids=str)
def test_a_wrong_command_says_why_and_changes_no_file(command, status, broken, short):
    short.chdir(broken)
    before, named = files_below(broken), re.search(r"[{\[](.*?)[\]}]", command)[1]
    ran = run_script(*re.sub(r"{.*}|[\[\]]", "", command).split())
    assert ran.status == status and named in ran.err, ran.err
    assert status == 2 or ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert not re.search(r"Traceback|0x[0-9a-f]{6}", ran.err) and files_below(broken) == before
