"""What CaBins guarantees: python -m pytest -q test_cabins.py

The tests follow the paper: Sec. 3.1, 3.2.1, 3.2.2, 3.2.3, 3.2.4, 3.3, 4.1, 4.2 and 4.3. Checkpoints
and pictures come next, then what a command trains, what a command measures, what a run's folder
promises, and several processes. Wrong commands, odd files, figures and a real GPU are in
extras/test_commands.py. Known answers were computed by the authors' and CLIP's code (`made_tensor`).
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
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the CPU's
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start, too

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cabins
import clip_tokenizer
import data
import eval as evaluation
import train
from cabins import InputError

torch.set_num_threads(1)  # on small networks several threads only wait for each other
FILES = ("cabins", "clip_tokenizer", "data", "eval", "train")
pytestmark = pytest.mark.filterwarnings(  # a warning of our own files is a fault, a deprecation not
    *(f"error:::{name}" for name in FILES), "default::DeprecationWarning", "default::FutureWarning"
)
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
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_of(module: nn.Module, run) -> tuple:
    """What `module` is given when `run` is called."""
    calls = []
    handle = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    run()
    handle.remove()
    return calls[0]


def colours(height=96, width=128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def tiny() -> cabins.CaBins:
    """A network of random weights, in eval mode. No test changes it."""
    torch.manual_seed(0)
    return cabins.CaBins(TINY).eval()


Ran = namedtuple("Ran", "status out err")


def run_script(script: str, *arguments) -> Ran:
    """Run train.py, eval.py or data.py with these arguments, in this process."""
    main = {"train.py": train.main, "eval.py": evaluation.main, "data.py": data.main}[script]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                data.run_command(main)
            except SystemExit as stop:  # Python prints a text, and exits with 1
                status = 1 if isinstance(stop.code, str) else stop.code or 0
                err.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
    return Ran(status, out.getvalue(), err.getvalue())


def write_pair(folder: Path, name, height=480, width=640, depth=1500) -> str:
    """Write an image and a depth map, of one value in millimetres; return their line of a list."""
    folder.mkdir(parents=True, exist_ok=True)
    small = colours(height // 16, width // 16)
    Image.fromarray(small).resize((width, height)).save(folder / f"rgb_{name}.jpg")
    values = np.full((height, width), depth, np.uint16)
    Image.fromarray(values).save(folder / f"sync_depth_{name}.png")
    return f"{folder.name}/rgb_{name}.jpg {folder.name}/sync_depth_{name}.png 518.8579\n"


def spied(patch, holder, name: str, note) -> None:
    """Call `note` with the arguments of each call of holder.name."""
    function = getattr(holder, name)

    def spy(*given, **more):
        note(*given, **more)
        return function(*given, **more)

    patch.setattr(holder, name, spy)


# ---- Sec. 3.1 and 3.2.1  CLIP, its image encoder and Eq. 1 ---------------------------------------
def test_tokenizer_gives_clips_ids():
    known = {
        "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
        "farthest": [1578, 35343],  # two pieces: far, thest
        "79.1234": [278, 280, 269, 272, 273, 274, 275],  # single digits
        "  it's a PHOTO\tof\n": [585, 568, 320, 1125, 539],  # lower case, white space
        "mojibake cafÃ©": [617, 3252, 11878, 15304],  # repaired to café
        "<p> &amp;amp; q": [283, 335, 285, 261, 336],  # HTML is unescaped twice: <p> & q
        "<|startoftext|> inside <|endoftext|>": [49406, 2912, 49407],
        "日本語のテキスト": [39121, 44353, 34002, 252, 21575, 2429, 228, 47121, 32421, 486],
    }
    for text, ids in known.items():
        assert clip_tokenizer.encode(text) == ids, text
    ids = clip_tokenizer.tokenize(["far", "extremely close"], length=5)
    assert ids.tolist() == [[49406, 2384, 49407, 0, 0], [49406, 6519, 2660, 49407, 0]]
    with pytest.raises(ValueError, match="extremely close"):  # which is never cut off
        clip_tokenizer.tokenize("extremely close", length=3)


def test_number_tokens_are_the_tokens_of_the_printed_number():
    depths = [torch.rand(800, generator=generator()) * top for top in (0.01, 1, 10, 80, 9999)]
    edges = [0, 1e-4, 5e-5, 1e-3, 0.5, 0.12345, 2.00005, 9.99995, 10, 80, 99.99995, 100, 9999]
    depths = torch.cat([*depths, torch.tensor(edges)])
    texts = [str(round(depth, 4)) for depth in depths.tolist()]
    ids = clip_tokenizer.number_tokens(depths)
    assert torch.equal(ids, clip_tokenizer.tokenize(texts, 11))
    assert torch.equal(clip_tokenizer.number_tokens(depths[None, :9], 1), ids[None, :9, :8])


CLIP_IMAGE = {  # of CLIP's own embedding of an image, and of z at row 4, column 2
    "RN50": ([-0.89232415, -0.17029873, 0.15963185], [-0.8921474, -0.1697332, 0.1597825]),
    "RN101": ([0.85525256, -1.7576025, -2.4198878], [0.7441988, -1.782209, -2.416223]),
    "ViT-B/16": ([-1.3473095, 0.38172603, -0.33779722], [0.4498522, -0.307845, -1.415948]),
}
CLIP_TEXT = {1024: [-1.518179, 0.2903049, 0.15889318], 512: [1.3894114, 0.88841105, -0.52293265]}


@pytest.mark.parametrize("backbone", CLIP_IMAGE)
def test_embeddings_are_those_of_clips_own_code(backbone):
    """z̄ is CLIP's image embedding, although here every token asks, and not the mean alone."""
    with torch.device("meta"):  # names and shapes alone
        clip = cabins.CLIP(cabins.BACKBONES[backbone])
    state = {k: made_tensor(k, tuple(v.shape)) for k, v in clip.state_dict().items()}
    clip.load_state_dict(state, assign=True)
    with torch.inference_mode():
        _, z_bar, z = clip.eval().visual(torch.from_numpy(normal("image", (1, 3, 224, 224))))
        t = clip.encode_text(clip_tokenizer.tokenize("a photo of a cat."))
    close(torch.stack([z_bar[0, :3], z[0, :3, 4, 2]]), CLIP_IMAGE[backbone])
    close(t[0, :3], CLIP_TEXT[t.shape[1]])


def test_clip_is_read_from_half_precision_archives_and_from_plain_files(tmp_path, monkeypatch):
    sizes, plain, archive = cabins.BACKBONES["tiny"], tmp_path / "a.pt", tmp_path / "archive.pt"
    clip = cabins.CLIP(sizes).eval().half()
    clip.ln_final.weight.data = F.pad(clip.ln_final.weight.data, (3, 0))[3:]  # part of a storage
    clip.text_projection.data = clip.text_projection.data.T.contiguous().T  # other strides
    expected = clip.state_dict()
    for name in ("input_resolution", "context_length", "vocab_size"):  # not weights
        clip.register_buffer(name, torch.tensor(77))
    torch.save(clip.state_dict(), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript, the format of OpenAI's files, is deprecated
        ids = clip_tokenizer.tokenize("far", 3)
        torch.jit.trace_module(clip, {"encode_text": ids}).save(archive)
    for path in (plain, archive):
        found = cabins.load_clip(path)
        assert cabins.CaBins(TINY, found).clip is found
        for key, tensor in found.state_dict().items():
            assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
    # a ViT and a ResNet whose text encoders have one size
    is_vit = {"is_vit": True, "layers": (4,), "width": 64}
    both = {"RN101": sizes._replace(text_layers=1), "ViT-B/16": sizes._replace(**is_vit)}
    monkeypatch.setattr(cabins, "BACKBONES", both)
    for sizes in both.values():
        torch.save(cabins.CLIP(sizes).state_dict(), plain)
        assert cabins.load_clip(plain).sizes == sizes


FETCHED = {  # what the authors and OpenAI publish, with its SHA-256
    "RN50.pt": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101.pt": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "nyudepthv2_train": "66e2beb718a58c5c946c169f6e70cc6ae166ddd19f5618266fff52ff7443e0e9",
    "nyudepthv2_test": "e92c191d5835a22589b843c11b80cd7235d5bd0d4136e42a6debcea4511bf906",
    "kitti_eigen_train": "dd5e51c2df33d4c53c1d4dd01726326e7c3ac087cff165b1007738c5c8a06aca",
    "kitti_eigen_test": "1a631c1bc0d40f5580f8363bffe0ffcc9524e5ecdd56765aebfffc3dce162201",
}


def test_what_is_fetched_is_named_by_url_and_sha256_whole_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "source").write_bytes(b"weights")
    url, sha256 = (tmp_path / "source").as_uri(), hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(InputError, match=r"source was not fetched.*hub/checkpoints/file"):
        cabins.download(url, "file", "0" * 64)
    path = cabins.download(url, "file", sha256)
    assert path.read_bytes() == b"weights" and list(path.parent.iterdir()) == [path]
    assert cabins.download("file:///none", "file", sha256) == path  # which is not fetched again
    found = []
    fetch = lambda url, path, sha256: found.append((url, sha256)) or Path("none").read_bytes()
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for name in ("RN50", "RN101", "ViT-B/16"):
        with pytest.raises(InputError, match="No such file.*clip-"):
            cabins.load_clip(name)
    for name, is_train in itertools.product(("nyu", "kitti"), (True, False)):
        with pytest.raises(InputError, match=r"No such file.*files_with_gt\.txt"):
            data.DepthDataset(name, tmp_path, train=is_train)
    lists = "https://raw.githubusercontent.com/EunjinSon1/CaBins/"
    lists += "4e9c9a03d16da42e65c67f5bb7911397726ade6c/train_test_inputs/{1}_files_with_gt.txt"
    clips = "https://openaipublic.azureedge.net/clip/models/{0}/{1}"
    for (url, sha256), (name, known) in zip(found, FETCHED.items(), strict=True):
        assert sha256 == known and url == (clips if ".pt" in name else lists).format(known, name)


def test_eq_1_a_centre_lies_half_a_width_above_the_bins_before_and_every_bin_stays_open():
    b = torch.tensor([[0.5, 0.25, 0.25]])  # of 8 m: bins from 2, 6 and 8 m on
    assert cabins.bin_centers(b, 2.0, 10.0).tolist() == [[4.0, 7.0, 9.0]]
    bins = cabins.AdaptiveBins(64, 256)
    bins.mlp[-1].weight.data.zero_()
    bins.mlp[-1].bias.data[:] = -9.0
    bins.mlp[-1].bias.data[7] = 99.9
    b = bins(torch.randn(1, 64))[0]
    assert b[7].item() == pytest.approx(100 / 125.5) and b[8].item() == pytest.approx(0.1 / 125.5)


# ---- Sec. 3.2.2 and 3.2.3  CaBins, prompts, text encoder, TransDecoder: Eq. 2 and 3 --------------
def test_eq_2_weighs_centres_near_the_mean_and_table_3_has_means_and_lower_medians():
    c = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.double)
    weights = [math.exp(1 / (abs(x - 7 / 3) + 1e-4)) for x in (1, 2, 4)]
    by_hand = (weights[0] + 2 * weights[1] + 4 * weights[2]) / sum(weights)
    assert cabins.distance_classes(c, 1).item() == pytest.approx(by_hand, rel=1e-9)
    c = cabins.bin_centers(torch.full((1, 256), 1 / 256, dtype=torch.double), 0.0, 10.0)
    close(cabins.distance_classes(c, 8), c.unflatten(1, (8, 32)).mean(2), 1e-9)  # equal widths
    c = torch.tensor([[1.0, 2, 4, 11, 10, 20, 30, 64]])
    assert cabins.distance_classes(c, 2, "mean").tolist() == [[4.5, 31]]
    assert cabins.distance_classes(c, 2, "median").tolist() == [[2, 20]]  # the lower one
    with pytest.raises(ValueError, match="mode"):
        cabins.distance_classes(c, 2, "mode")


@pytest.mark.parametrize("top, integer_digits", [(10.0, 2), (120.0, 3)])
def test_texts_are_numbers_with_four_decimals_or_semantic_phrases(top, integer_digits):
    image = torch.randn(2, 3, 64, 64, generator=generator())
    for kind in ("cabins", "median", "mean", "semantic"):
        config = cabins.Config("tiny", kind, max_depth=top)
        model = cabins.CaBins(config).eval()
        (ids,) = inputs_of(model.clip.token_embedding, partial(model, image))
        distances = model(image).distances
        close(distances, cabins.distance_classes(model(image).centers, 8, kind).detach(), 1e-6)
        texts, length = [str(round(e, 4)) for e in distances.flatten().tolist()], integer_digits + 7
        if kind == "semantic":
            texts, length = ["giant", "extremely close", "close", "not in distance"], 5
            texts += ["a little remote", "far", "farthest", "unseen"]
        assert torch.equal(ids, clip_tokenizer.tokenize(texts, length))
    t, *_ = inputs_of(model.trans_decoder, lambda: model(image))
    close(t[1], model.clip.encode_text(ids, model.prompts).detach(), 1e-5)  # in this order


def test_prompts_stand_between_start_and_number_and_what_follows_the_end_changes_nothing(tiny):
    words = torch.tensor(clip_tokenizer.encode("a photo of"))  # prompts that are words' embeddings
    expected = tiny.clip.encode_text(clip_tokenizer.tokenize("a photo of 2.5"))
    prompts = tiny.clip.token_embedding(words)
    ids = clip_tokenizer.number_tokens(torch.tensor([2.5]), 2)
    close(tiny.clip.encode_text(F.pad(ids, (0, 20), value=7), prompts), expected, 1e-5)


def test_fact_1_no_gradient_passes_through_the_digits():
    model = cabins.CaBins(TINY)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    prediction = model(torch.randn(1, 3, 64, 96, generator=generator()))
    of_s, of_c = ("clip.visual.", "prompts", "trans_decoder."), ("clip.visual.", "bins.")
    for output, learners in ((prediction.similarity, of_s), (prediction.centers[:, 9], of_c)):
        gradients = torch.autograd.grad(output.sum(), parameters, None, True, allow_unused=True)
        gradients = {name: g for name, g in zip(names, gradients) if g is not None}
        assert gradients.keys() == {name for name in names if name.startswith(learners)}
        assert gradients["clip.visual.conv1.weight"].any()


TEXTS_AND_IMAGE = [  # t, z̄ and z: B = 2, K = 8, D = 512
    torch.randn(2, *shape, generator=generator()) for shape in ((8, 512), (512,), (512, 3, 4))
]


def test_eq_3_adds_gamma_times_v_post_to_t_and_is_the_identity_at_first():
    decoder, t, changes = cabins.TransDecoder(512, 256, 6).eval(), TEXTS_AND_IMAGE[0], []
    assert decoder.gamma.tolist() == pytest.approx([1e-4] * 512)
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    assert all(m.bias is None or not m.bias.any() for m in linear)
    weights, model = torch.cat([m.weight.flatten() for m in linear]), cabins.CaBins(TINY)
    clip = model.clip.token_embedding.weight, model.clip.positional_embedding
    for weight, std in zip((weights, model.prompts, *clip), (0.02, 0.02, 1, 0.01)):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    for gamma in (0.0, 1e-4, 1.0, 2.0):
        nn.init.constant_(decoder.gamma, gamma)
        changes.append((decoder(*TEXTS_AND_IMAGE) - t).detach())
    assert changes[0].abs().max() == 0 and 1e-6 < changes[1].norm() / t.norm() < 1e-3
    close(changes[3], 2 * changes[2], 1e-5)


def test_trans_decoder_has_six_layers_and_drops_a_tenth_anew_in_each_training_step():
    sizes = {sizes[-2:] for name, sizes in cabins.BACKBONES.items() if name != "tiny"}
    assert sizes == {(256, 6)}
    decoder = cabins.TransDecoder(512, 256, 6)
    assert {layer.self_attn.n_heads for layer in decoder.layers} == {4}
    assert decoder.layers[5].mlp[1](torch.ones(1)).item() == pytest.approx(0.8413447)  # 1 Φ(1)
    nn.init.ones_(decoder.gamma)
    assert not torch.equal(decoder(*TEXTS_AND_IMAGE), decoder(*TEXTS_AND_IMAGE))
    dropouts = [module for module in decoder.modules() if isinstance(module, nn.Dropout)]
    assert [dropout.p for dropout in dropouts] == [0.1] * 24  # four in each layer, all in use
    assert all(inputs_of(dropout, lambda: decoder(*TEXTS_AND_IMAGE)) for dropout in dropouts)


# ---- Sec. 3.2.4  Similarity, depth decoder, depth: Eq. 4 and 5; the network of Figure 2 ----------
def test_eq_4_and_5_similarity_is_a_cosine_and_depth_the_mean_of_the_centres_under_p():
    z, t = torch.randn(2, 64, 3, 4, generator=generator()), torch.randn(2, 8, 64)
    s = cabins.cosine_similarity(z, t)
    expected = F.cosine_similarity(z[1, :, 2, 3], t[1, 5], dim=0)
    assert s[1, 5, 2, 3].item() == pytest.approx(expected.item(), abs=1e-6)
    centers, p = torch.tensor([[1.0, 3.0]]), torch.tensor([[[[0.25]], [[0.75]]]])
    assert cabins.expected_depth(centers, p).tolist() == [[[[2.5]]]]


def test_fact_5_text_learns_through_eight_channels_of_one_convolution(released_model):
    """No loss asks s to mean anything. With these weights at 0, the prompts learn nothing."""
    assert released_model.depth_decoder.fuse.weight.shape == (2048, 2056, 1, 1)
    torch.manual_seed(0)
    model = cabins.CaBins(TINY)
    image, target = torch.randn(1, 3, 64, 64), torch.rand(1, 1, 64, 64) * 9
    for is_silent in (False, True):
        model.depth_decoder.fuse.weight.data[:, -8:] *= not is_silent
        model.zero_grad()
        cabins.total_loss(model(image), target, 1e-3).backward()
        assert model.prompts.grad.any() != is_silent


def test_fact_8_a_padded_1x1_convolution_shifts_x4_and_the_heads_two_convolutions_are_one(tiny):
    decoder = tiny.depth_decoder
    x = torch.zeros(1, 328, 15, 20)  # x4 and s
    border = decoder.fuse(x)
    x[:, :, 0] = 1
    change = decoder.fuse(x) - border
    assert change.shape[2:] == (17, 22) and not change[:, :, 0].any() and change[:, :, 1].any()
    rows = cabins.resize(change, (30, 40))[0, :, :, 20].abs().amax(0)
    assert rows[0] == 0 and rows.argmax() == 2  # row 0 of x4 stands at 29 / 16 = 1.8
    x = torch.randn(1, 40, 12, 16, generator=generator())
    last = decoder.classifier.weight[..., 0, 0]
    weight = torch.einsum("om,mikl->oikl", last, decoder.head.weight)
    bias = last @ decoder.head.bias + decoder.classifier.bias
    close(F.conv2d(x, weight, bias, padding=1), decoder.classifier(decoder.head(x)))


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (427, 65), (96, 128)])
def test_fact_6_depth_never_leaves_the_range_of_the_centres_at_any_size_of_image(tiny, size):
    image = torch.randn(2, 3, *size, generator=generator()) * 3
    (depth, c, e, s, p), half = tiny(image), tiny(image, upsample=False).depth
    assert c.shape == (2, 256) and e.shape == (2, 8) and depth.shape == (2, 1, *size)
    close(p.sum(1), torch.ones(len(p), *half.shape[2:]), 1e-5)
    close((c[..., None, None] * p).sum(1, keepdim=True), half.detach(), 1e-5)
    assert s.shape == (2, 8, *(x // 32 for x in size))
    assert half.shape == (2, 1, *(2 * ((x + 1) // 4) for x in size))
    close(F.interpolate(half, size, mode="bilinear", align_corners=True), depth, 1e-6)
    assert (depth.flatten(1).amin(1) >= c[:, 0]).all() and (c[:, -1] >= depth.amax((1, 2, 3))).all()
    for wrong in ((1, 3, 63, 64), (1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(InputError, match=re.escape(str(wrong))):
            tiny(torch.zeros(wrong))


def test_a_batch_equals_singles_and_autocast_gives_nearly_the_same_in_float32(tiny):
    image = torch.randn(3, 3, 70, 90, generator=generator())
    batch, singles = tiny(image), [tiny(i[None]) for i in image]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny(image)
    for name, found, half in zip(batch._fields, batch, rounded):
        close(torch.cat([getattr(s, name) for s in singles]), found.detach(), 1e-5)
        assert half.dtype == torch.float32 and (half - found).abs().max() < 0.02


# ---- Sec. 3.3  Losses: Eq. 6 to 8; the released network, with made weights -----------------------
def test_fact_7_eq_6_is_a_variance_and_15_percent_of_a_squared_mean():
    target = torch.rand(2, 1, 4, 5, generator=generator()).double() * 9 + 0.5
    mask = torch.rand(2, 1, 4, 5, generator=generator(1)) < 0.6
    one, two = ((target * 1.5 + 0.2 * target.sin()).requires_grad_() for _ in range(2))
    loss = cabins.silog_loss(one, target, mask)
    g = two[mask].log() - target[mask].log()
    formula = 10 * (g.var(correction=0) + 0.15 * g.mean() ** 2).sqrt()
    (loss + formula).backward()
    assert loss.item() == pytest.approx(formula.item(), rel=1e-9)
    close(one.grad, two.grad, 1e-9)
    for wrong in ((one[0], target, mask), (one, target[:, 0], mask), (one, target, mask[:1])):
        with pytest.raises(ValueError, match="the same shape"):  # or they would broadcast
            cabins.silog_loss(*wrong)
    c = torch.linspace(1, 9, 16).repeat(2, 1).requires_grad_()
    for target in (one.detach(), torch.zeros_like(one)):  # without error, and without truth
        pixel = cabins.silog_loss(one, target, target > 0)
        (pixel + cabins.chamfer_loss(c, target.float(), target > 0)).backward()
        assert pixel.item() == pytest.approx(1e-5)
        assert one.grad.isfinite().all() and c.grad.isfinite().all()


@pytest.mark.parametrize("spread", [10.0, 0.05])  # 0.05: most centres are near no depth
def test_eq_7_and_8_are_those_of_a_table_of_pixels_and_centres(spread):
    target = 4 + spread * (torch.rand(3, 1, 20, 30, generator=generator()) - 0.4)
    mask = torch.rand(3, 1, 20, 30, generator=generator(1)) < 0.7
    mask[1] = False  # an image without ground truth adds 0
    mask[2] = torch.arange(600).reshape(1, 20, 30) == 7  # one valid pixel
    centers = (torch.rand(3, 64, generator=generator(1)) * 10).sort(1).values
    one, two = (centers.clone().requires_grad_() for _ in range(2))
    loss = cabins.chamfer_loss(one, target, mask)
    tables = [(target[i][mask[i]][:, None] - two[i]).square() for i in (0, 2)]
    expected = sum(table.amin(1).mean() + table.amin(0).mean() for table in tables) / 3
    (loss + expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(one.grad, two.grad, 1e-5)
    target = target.abs().where(mask, 1e-3)  # which is not above min_depth, and not valid
    prediction = cabins.Prediction(target[..., ::2, ::2] + 1, centers, None, None, None)
    large = cabins.resize(prediction.depth, (20, 30))
    total = cabins.silog_loss(large, target, mask) + 0.1 * expected
    assert cabins.total_loss(prediction, target, 1e-3).item() == pytest.approx(total.item())


PREDICTED_CABINS = "0.8196 2.0312 3.0201 3.9133 5.197 6.891 8.0013 9.3794 "
PREDICTED_CABINS += "0.8176 2.027 3.018 3.9136 5.1963 6.8924 8.0021 9.376"
GRADIENT_NORMS = {
    "prompts": 0.01286741633,
    "trans_decoder.gamma": 0.0005481540862,
    "clip.visual.conv1.weight": 0.22968607015,
    "bins.mlp.4.weight": 1.2583868473592394,
}
RENAMED = {  # how names begin here, and in the authors' files; the first that fits counts
    "prompts": "contexts",
    "trans_decoder.gamma": "gamma",
    "clip.": "clip_model.",
    "bins.mlp.": "computeAdaptiveBin.regressor.",
    "trans_decoder.layers.": "context_decoder.decoder.",
    "trans_decoder.": "context_decoder.",
    "depth_decoder.fuse.": "decoder.conv2.",
    "depth_decoder.up.0.": "decoder.up1._net.",
    "depth_decoder.up.1.": "decoder.up2._net.",
    "depth_decoder.up.2.": "decoder.up3._net.",
    "depth_decoder.head.": "decoder.conv3.",
    "depth_decoder.classifier.": "predict_D.conv_out.0.",
}


@pytest.fixture(scope="module")
def released_model() -> cabins.CaBins:
    """The authors' network, with made weights. No test changes it."""
    with torch.device("meta"):  # names and shapes alone
        model = cabins.CaBins(cabins.Config())
    state = {}
    for name, tensor in model.state_dict().items():
        ours = next(prefix for prefix in RENAMED if name.startswith(prefix))
        theirs = RENAMED[ours] + name.removeprefix(ours)
        state[name] = made_tensor(theirs, tuple(tensor.shape))
    model.load_state_dict(state, assign=True)
    return model.eval()


def made_truth() -> torch.Tensor:
    target = np.minimum(np.abs(normal("depth", (2, 1, 96, 128))) * np.float32(10 / 3), 10)
    return torch.from_numpy(np.where(target < 0.2, 0, target).astype(np.float32))


def test_the_released_networks_depth_losses_and_gradients(released_model):
    model, target = released_model, made_truth()
    prediction = model(torch.from_numpy(normal("image", (2, 3, 96, 128))), upsample=False)
    texts = [str(round(e, 4)) for e in prediction.distances.flatten().tolist()]
    assert " ".join(texts) == PREDICTED_CABINS
    close(prediction.similarity[0, :3, 1, 2], [-0.039582014, -0.047857970, -0.037478499])
    close(prediction.depth[0, 0, 20, ::16], [4.4796448, 5.6915550, 4.2776427, 5.5420227])
    d, mask = cabins.resize(prediction.depth, (96, 128)), target > 1e-3
    g = d[mask].log() - target[mask].log()
    pixel = 10 * (g.var() + 0.15 * g.mean() ** 2).sqrt()  # as released: the unbiased variance
    assert pixel.item() == pytest.approx(9.66595458984375, rel=1e-5)
    bins = cabins.chamfer_loss(prediction.centers, target, mask)
    assert bins.item() == pytest.approx(0.00059330568, rel=1e-4)
    (pixel + 0.1 * bins).backward()
    parameters = dict(model.named_parameters())
    norms = {name: parameters[name].grad.norm().item() for name in GRADIENT_NORMS}
    model.zero_grad()
    assert norms == pytest.approx(GRADIENT_NORMS, rel=1e-3)


# ---- Sec. 4.1 and 4.2  Recipes, augmentation and data sets ---------------------------------------
def augmented(image, depth, crop, degrees, brightness, draws):
    """What the recipe makes of one sample and its ten random numbers, pixel by pixel."""
    (rows, columns), (h, w) = crop, depth.shape
    angle = math.radians(degrees) * (2 * draws[0] - 1)
    top, left = int(draws[1] * (h - rows + 1)), int(draws[2] * (w - columns + 1))
    new_image, new_depth = np.zeros((3, rows, columns)), np.zeros((rows, columns))
    padded = np.pad(image / 255, ((0, 0), (1, 2), (1, 2)))  # black outside
    for v, u in np.ndindex(rows, columns):
        x = left + (columns - 1 - u if draws[3] < 0.5 else u) - (w - 1) / 2
        y = top + v - (h - 1) / 2
        x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
        x, y = min(max(x + (w - 1) / 2, -1), w), min(max(y + (h - 1) / 2, -1), h)
        if 0 <= round(y) < h and 0 <= round(x) < w:
            new_depth[v, u] = depth[round(y), round(x)]
        i, j, b, a = int(y + 1), int(x + 1), (y + 1) % 1, (x + 1) % 1
        upper = (1 - a) * padded[:, i, j] + a * padded[:, i, j + 1]
        lower = (1 - a) * padded[:, i + 1, j] + a * padded[:, i + 1, j + 1]
        new_image[:, v, u] = (1 - b) * upper + b * lower
    if draws[4] < 0.5:
        gamma = 1 + 0.1 * (2 * draws[5] - 1)
        factor = (1 + brightness * (2 * draws[6] - 1)) * (1 + 0.1 * (2 * draws[7:] - 1))
        new_image = (new_image**gamma * factor[:, None, None]).clip(0, 1)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (new_image - mean) / std, new_depth


@pytest.mark.parametrize("name", ["nyu", "kitti", "list"])
def test_augmentation_is_one_rotation_crop_flip_and_colour(name):
    degrees, brightness = {"nyu": (2.5, 0.25), "kitti": (1, 0.1), "list": (2.5, 0.1)}[name]
    n, crop = 8, (32, 48)
    image = torch.randint(0, 256, (n, 3, 41, 64), dtype=torch.uint8, generator=generator(1))
    depth = torch.rand(n, 1, 41, 64, generator=generator(2)) * 10
    recipe = data.DATASETS[name]._replace(crop=crop)
    new_image, new_depth = data.augment(image, depth, recipe, generator(7))
    draws = torch.rand(n, 10, generator=generator(7)).numpy()
    assert {d < 0.5 for d in draws[:, 3]} == {d < 0.5 for d in draws[:, 4]} == {True, False}
    for i in range(n):
        sample = image[i].numpy(), depth[i, 0].numpy()
        expected = augmented(*sample, crop, degrees, brightness, draws[i])
        close(new_image[i], expected[0].astype(np.float32), 2e-4)
        assert (new_depth[i, 0].numpy() != expected[1].astype(np.float32)).sum() <= 2  # ties


def test_toy_rooms_are_exact_and_reproducible():
    image, depth = data.draw_room(5)
    close(depth[[0, 0, 48, 95, 95], [0, 127, 64, 0, 127]], [2.639, 2.6675, 1.0717, 0.9598, 2.1194])
    close(image.mean((0, 1)), np.array([139.385, 139.15, 101.939]))
    # walls are planes, on which 1 / depth is linear in the pixel: the second difference is zero
    assert (np.abs(np.diff(1 / depth.astype(np.float64), n=2, axis=1)) < 1e-5).mean() > 0.7
    train_set, test_set = data.DepthDataset("toy", train=True), data.DepthDataset("toy")
    assert len(train_set) == 640 == len({*train_set.pairs, *test_set.pairs}) - 64
    assert torch.equal(train_set[5]["image"], torch.from_numpy(image).permute(2, 0, 1))
    close(data.denormalize(test_set[3]["image"]).mean(), data.draw_room(1_000_003)[0].mean() / 255)


FOLDERS = ["nyu/", "nyu/sync", "nyu/official_splits/test", "list/", "kitti/", "kitti/raw"]
FOLDERS += ["kitti/data_depth_annotated/train", "kitti/data_depth_annotated/val"]
FOLDERS += ["kitti/gts", "kitti/gt_depth"]


@pytest.mark.parametrize("place", FOLDERS)
def test_the_listed_file_in_the_documented_folders_comes_first(place, tmp_path):
    name, _, folder = place.partition("/")
    root, split = tmp_path / "root", tmp_path / "list.txt"
    inside = root / folder / "a"
    inside.mkdir(parents=True)
    (inside / "my depth.png").touch()
    split.write_text("/a/1.jpg \ta/my depth.png\n\n #a/2.jpg None\na/3.jpg\tNone\n")
    with pytest.raises(InputError, match=r"a/1\.jpg or .* is not below .*docs/data\.md"):
        data.DepthDataset(name, root, split)
    for image in ("1.jpeg", "1.png", "1.jpg"):
        (inside / image).touch()  # the listed one wins, then .png
        pairs = data.DepthDataset(name, root, split)
        assert pairs.pairs == [(f"{inside}/{image}", f"{inside}/my depth.png")]
        assert pairs.n_left_out == 1
    split.write_text(f"\ufeff{inside}/1.jpeg a/1.jpg\r\n", "utf-8")  # absolute, without focal
    found = data.DepthDataset(name, root, split).pairs
    assert found == [(f"{inside}/1.jpeg", f"{inside}/1.jpg")]
    for image, depth in (("2.jpg", "1.png"), ("1.jpg", "my depth.jpg"), ("1.jpg", "1.gif")):
        split.write_text(f"a/{image}\ta/{depth}")  # a depth map has the listed suffix
        with pytest.raises(InputError, match="1 of the 1 listed"):
            data.DepthDataset(name, root, split)


KB = np.s_[23:375, 13:1229]
CROPS = {  # folder, rows, columns, value of depth, metres; what is cut out for training and testing
    "nyu": ("sync/den", 480, 640, 12_000, 12, np.s_[45:472, 43:608], np.s_[:480, :640]),
    "kitti": ("raw/den", 375, 1242, 25_600, 100, KB, KB),  # truth beyond the range counts
    "list": ("den", 64, 100, 9000, 9, np.s_[:64, :100], np.s_[:64, :100]),
}


@pytest.mark.parametrize("name", CROPS)
def test_recipes_fixed_crops_and_windows_are_the_papers(name, tmp_path):
    folder, rows, columns, value, metres, *crops = CROPS[name]
    split, folder = tmp_path / "list.txt", tmp_path / folder
    split.write_text("/" + write_pair(folder, 1, rows, columns, value))
    pixels = torch.tensor(cabins.read_picture(folder / "rgb_1.jpg"))
    for is_train, crop in zip((True, False), crops):
        pair = data.DepthDataset(name, tmp_path, split, is_train)[0]
        image = pair["image"] if is_train else data.denormalize(pair["image"]) * 255
        assert torch.equal(image.round().permute(1, 2, 0), pixels[crop])
        assert pair["depth"].shape[1:] == image.shape[1:] and (pair["depth"] == metres).all()
        assert pair["size"].tolist() == [rows, columns] and pair["path"].endswith("den/rgb_1.jpg")
    assert data.DATASETS["list"][:5] == (10, 1000, None, 2.5, 0.1)
    windows = data.evaluation_windows("kitti", 376, 1241)
    nested = ("nested", (slice(143, 349), slice(43, 1172)))  # the paper's comes first
    assert [*windows.items()] == [nested, ("full", (slice(129, 348), slice(32, 1184)))]
    assert data.evaluation_windows("nyu", 480, 640) == {"eigen": (slice(45, 471), slice(41, 601))}
    assert data.evaluation_windows("toy", 96, 128) == {"whole": (slice(0, 96), slice(0, 128))}


def test_own_pairs_have_a_scale_a_range_and_one_size(tmp_path):
    split, rooms = tmp_path / "list.txt", tmp_path / "rooms"
    values = (1000, 1500, 2000, 2500, 65535)
    split.write_text("".join(write_pair(rooms, i, 96, 128, x) for i, x in enumerate(values)))
    own = data.DepthDataset("list", tmp_path, split, True, depth_scale=500, max_depth=4)
    assert own.frame_size == (96, 128) and own[0]["image"].dtype == torch.uint8
    assert [own[i]["depth"].max() for i in range(5)] == [2, 3, 4, 0, 0]  # 5 m is above the range
    own = data.DepthDataset("list", tmp_path, split, True, max_depth=99)
    assert own[3]["depth"].max() == 2.5 and not own[4]["depth"].any()  # 65535 stands for none
    write_pair(rooms, 2, 80, 128)
    with pytest.raises(InputError, match=r"rgb_2\.jpg .*80, 128.*96, 128"):
        own[2]
    assert data.DepthDataset("list", tmp_path, split)[2]["depth"].shape == (1, 80, 128)
    for name, *size in (("nyu", 63, 64), ("list", 64, 63), ("kitti", 351, 1216)):
        split.write_text(write_pair(rooms, 1, *size))
        with pytest.raises(InputError, match=r"rgb_1\.jpg .*at least"):
            data.DepthDataset(name, tmp_path, split)[0]


# ---- Sec. 4.3 and 4.6  Metrics, the other rows of Tables 3 and 4, the protocol -------------------
def test_metrics_by_hand():
    depth, target = torch.tensor([1.25, 3, 3.5, 9, 1.8]), torch.tensor([1.0, 2, 5, 4, 1])
    logs = [math.log(ratio) for ratio in (1.25, 1.5, 0.7, 2.25, 1.8)]
    expected = {"abs_rel": (0.25 + 1 / 2 + 1.5 / 5 + 5 / 4 + 0.8) / 5}
    expected["sq_rel"] = (0.25**2 + 1 / 2 + 1.5**2 / 5 + 5**2 / 4 + 0.8**2) / 5
    expected["rmse"] = math.sqrt((0.25**2 + 1 + 1.5**2 + 5**2 + 0.8**2) / 5)
    expected["rmse_log"] = math.sqrt(sum(x**2 for x in logs) / 5)
    expected["log10"] = sum(abs(x) for x in logs) / math.log(10) / 5
    # 1.25 itself does not count. Below 1.25² = 1.56 are 1.5 and 1 / 0.7, below 1.25³ = 1.95 is 1.8.
    expected |= {"d1": 0.0, "d2": 0.6, "d3": 0.8}
    found = {k: v.item() for k, v in cabins.depth_metrics(depth, target).items()}
    assert found == pytest.approx(expected, rel=1e-6)


def test_vit_is_tapped_after_blocks_3_6_9_12_and_brought_to_strides_4_8_16_32(monkeypatch):
    assert cabins.BACKBONES["ViT-B/16"].channels == (96, 192, 384, 768)  # DPT's
    sizes = {"layers": (12,), "width": 64, "channels": (8, 16, 32, 64), "is_vit": True}
    small = cabins.BACKBONES["tiny"]._replace(**sizes)
    monkeypatch.setitem(cabins.BACKBONES, "RN50", small)
    vit = cabins.CaBins(cabins.Config(backbone="RN50", longer_side=128))
    shapes = {name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    vit.load_state_dict({name: made_tensor(name, shape) for name, shape in shapes.items()})
    image, blocks = torch.from_numpy(normal("image", (2, 3, 90, 128))), []
    for block in vit.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, inputs, output: blocks.append(output))
    taps = [inputs_of(stage, lambda: vit(image))[0] for stage in vit.reassemble]
    for i, tap in enumerate(taps):  # 90 rows become 6 patches; the class token is left out
        assert torch.equal(tap, blocks[3 * i + 2][:, 1:].mT.unflatten(2, (6, 8)))
    pyramid, s = inputs_of(vit.depth_decoder, lambda: vit(image))
    sizes = [(8, 24, 32), (16, 12, 16), (32, 6, 8), (64, 3, 4)]
    assert [tuple(x.shape[1:]) for x in pyramid] == sizes
    close([x[0, 1, 2, 3].item() for x in pyramid], [0.5572053, 0.6477839, 0.6523997, -3.09675])
    assert s.shape == (2, 8, 6, 8) and vit(image).depth.shape == (2, 1, 90, 128)


class MadePairs(data.DepthDataset):
    """Depth maps (1, H, W) as a test set."""

    def __init__(self, *depths, name="toy", max_depth=None):
        super().__init__("toy", max_depth=max_depth)
        self.name, self.depths, self.pairs = name, depths, range(len(depths))

    def __getitem__(self, i):
        depth = self.depths[i]
        size = torch.tensor([375, 1242] if self.name == "kitti" else depth.shape[1:])
        return {"image": depth.expand(3, -1, -1), "depth": depth, "path": "none", "size": size}


def flat(depth: float, height=64, width=64) -> torch.Tensor:
    return torch.full((1, height, width), float(depth))


def measured(depth: torch.Tensor, *truths, **options) -> dict[str, evaluation.Measured]:
    """The result in each window of a method that predicts `depth` (1, H, W) for every image."""
    return evaluation.evaluate_windows(lambda _: depth[None], MadePairs(*truths, **options), 0)


def test_metrics_are_means_over_images_and_truth_counts_strictly_inside_the_range():
    few = flat(0)
    few[0, :2] = 4.0
    few[0, 2], few[0, 3] = 10.0, 1e-3  # the ends of the range
    row, line = measured(flat(2), few, flat(2), flat(0))["whole"]  # one has no truth
    assert (row["abs_rel"], row["d1"]) == pytest.approx(((0.5 + 0) / 2, (0 + 1) / 2))
    assert line == (
        "toy, window whole: 2 of 3 images have ground truth (0 more have no file), "
        "0.001 < depth < 10.0 m, mean over images; 0 NaN pixels predicted"
    )
    assert evaluation.evaluate(lambda _: flat(2)[None].numpy(), MadePairs(few, flat(2)), 0) == row
    with pytest.raises(RuntimeError, match="64, 63"):
        measured(flat(2, 64, 63), flat(2))
    for predicted, counts_as in ((math.nan, 1e-3), (-1, 1e-3), (math.inf, 10), (99, 10)):
        found = measured(flat(predicted), flat(2), flat(2))["whole"]
        assert found.metrics["rmse"] == pytest.approx(abs(counts_as - 2))
        n_nan = 2 * 64 * 64 if math.isnan(predicted) else 0
        assert found.protocol.endswith(f"; {n_nan} NaN pixels predicted")
    few[0, 4:] = 8.0  # beyond a range of 6 m, to which the prediction is clipped
    assert measured(flat(9), few, max_depth=6.0)["whole"].metrics["rmse"] == pytest.approx(6 - 4)
    outside = flat(0, 352, 1216)
    outside[0, 130:143] = 2.0  # has truth in KITTI's second window only
    depth = flat(9, 352, 1216)
    depth[0, 143:349, 43:1172] = 3.0
    found = measured(depth, outside, flat(2, 352, 1216), name="kitti")
    assert list(found) == ["nested", "full"]
    for (window, x), n in zip(found.items(), (1, 2)):
        assert f"kitti, window {window}: {n} of 2 images" in x.protocol
    assert found["nested"].metrics["rmse"] == 1 and found["full"].metrics["rmse"] > 2
    for truths, name, window in (([outside], "kitti", "nested"), ([flat(10)], "toy", "whole")):
        with pytest.raises(InputError, match=f"window {window}: 0 of 1"):
            measured(truths[0], *truths, name=name)


def test_flip_averaging_is_of_clipped_depths_at_the_decoders_size(monkeypatch):
    torch.manual_seed(0)
    model, image = cabins.CaBins(TINY).eval(), torch.randn(1, 3, 96, 128, generator=generator())
    model.depth_decoder.classifier.weight.data *= 30  # so that depth depends on the image
    straight, mirrored = (model(x, upsample=False).depth for x in (image, image.flip(-1)))
    for options, expected in (((), (straight + mirrored.flip(-1)) / 2), ((False,), straight)):
        depth = evaluation.predictor(model, *options)(image)
        torch.testing.assert_close(depth, cabins.resize(expected, (96, 128)).detach())
    large = F.interpolate(image, (192, 256))
    (seen,) = inputs_of(model.clip.visual, lambda: evaluation.predictor(model, False)(large))
    close(seen, F.interpolate(large, (96, 128), mode="bilinear", antialias=True))  # as trained
    rooms = MadePairs(flat(2))
    model.train().bins.eval()
    found = evaluation.evaluate(model, rooms, 0)
    assert model.training and model.clip.training and not model.bins.training  # as it was
    assert found == evaluation.evaluate(evaluation.predictor(model.eval()), rooms, 0)
    with pytest.raises(InputError, match=r"model\.eval"):
        evaluation.predictor(model.train())
    halves = torch.full((2, 1, 48, 64), -5.0)
    halves[0, ..., 32:] = 30.0
    halves[0, :, 3] = math.nan
    found = cabins.Prediction(halves, None, None, None, None)
    monkeypatch.setattr(model.eval(), "forward", lambda *_, **__: found)
    depth = evaluation.predictor(model)(image)[0, 0]
    assert depth[0, [0, 127]].tolist() == pytest.approx([1e-3, (10 + 1e-3) / 2])
    assert depth[6].isnan().all()


@pytest.mark.parametrize("name", ["nyu", "kitti", "toy"])
def test_tables_have_the_papers_columns_and_its_row_beside_its_own_range(name):
    names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "d1", "d2", "d3")
    headings = ("AbsRel", "SqRel", "RMSE", "RMSElog", "log10", "d<1.25", "d<1.25^2", "d<1.25^3")
    columns = (0, 2, 4, 5, 6, 7) if name == "nyu" else range(8)
    quoted = {"nyu": "0.120 0.401 0.050 0.866 0.978 0.996"}  # "Ours" of Tables 1 and 2
    quoted["kitti"] = "0.057 0.186 2.322 0.088 0.025 0.964 0.995 0.999"
    rows = {"ours": {metric: i + 0.12345 for i, metric in enumerate(names)}}
    dataset = SimpleNamespace(name=name, recipe=data.DATASETS[name])
    found = evaluation.format_table(dataset, rows).splitlines()
    assert found[0].split() == [headings[i] for i in columns]
    assert found[1].split() == ["ours", *(f"{i}.123" for i in columns)]
    known = [["CaBins", "(quoted)", *quoted[name].split()]] if name in quoted else []
    assert [line.split() for line in found[2:]] == known
    dataset.recipe = dataset.recipe._replace(max_depth=5.0)
    assert "quoted" not in evaluation.format_table(dataset, rows)


# ---- Settings, checkpoints and pictures ----------------------------------------------------------
def test_the_papers_settings_are_the_defaults_and_wrong_ones_are_refused_by_name():
    paper = ("RN101", "cabins", 256, 8, 8, 1e-3, 10.0, 640)
    assert dataclasses.astuple(cabins.Config()) == paper
    wrong = {"backbone": ["RN102"], "distance_class": ["mode"], "n_cabins": [7, 0, -8]}
    for field, values in wrong.items():
        for value in values:
            with pytest.raises(InputError, match=re.escape(str(value))):
                cabins.Config(**{field: value})
    numpy = cabins.Config(n_bins=np.int64(64), max_depth=np.float32(80), longer_side=np.int32(96))
    assert [*map(type, dataclasses.astuple(numpy))] == [str, str, int, int, int, float, float, int]


def test_checkpoints_hold_the_network_its_settings_and_more(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cabins.save_checkpoint("a.pt", tiny, data={"name": "toy"})
    assert os.listdir() == ["a.pt"]
    places = []
    spied(monkeypatch, torch, "load", lambda path, device=None, **_: places.append(device))
    content = cabins.read_checkpoint("a.pt")
    assert content["data"] == {"name": "toy"} and places == ["cpu"]  # a GPU's, too
    loaded = cabins.load_checkpoint("a.pt")
    assert loaded.config == TINY and not loaded.training and not loaded.bins.training
    assert all(torch.equal(x, tiny.state_dict()[n]) for n, x in loaded.state_dict().items())
    assert cabins.load_checkpoint(tmp_path / "a.pt", "meta").prompts.device.type == "meta"


def test_infer_gives_mean_and_std_of_depth(tmp_path):
    torch.manual_seed(0)
    model, array = cabins.CaBins(TINY).eval(), colours(90, 141)
    Image.fromarray(array).save(tmp_path / "a.png")
    negative = np.ascontiguousarray(array[..., ::-1])[..., ::-1]  # strides, as from OpenCV
    found = cabins.infer(model, array)
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), negative):
        assert all(np.array_equal(a, b) for a, b in zip(found, cabins.infer(model, picture)))
    # by hand: the longer side is that of training, and reducing averages pixels
    image = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (82, 128), mode="bilinear", antialias=True)
    assert cabins.to_training_size(image.mT, 128).shape == (1, 3, 128, 82)  # upright, too
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    (seen,) = inputs_of(model.clip.visual, lambda: cabins.infer(model, array))
    close(seen, (image - mean) / deviation, 1e-5)
    depth, c, e, _, p = model((image - mean) / deviation, upsample=False)
    std = (p * (c[..., None, None] - depth).square()).sum(1, keepdim=True).sqrt()
    depth, std = (cabins.resize(x, (90, 141))[0, 0] for x in (depth, std))
    for array, by_hand in zip(found, (depth, std, c[0], e[0])):
        close(array, by_hand, 1e-4)
    before = [x.clone() for x in model.buffers()]
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        cabins.infer(model.train(), picture)
    assert all(torch.equal(*x) for x in zip(before, model.buffers()))


# ---- What a command trains and measures: a spy looks at each part while it is used ---------------
@pytest.fixture
def short(monkeypatch):
    """Eight toy rooms, and no process for loading."""
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(8), "test": range(50, 52)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    return monkeypatch


def rows_of(table: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(table.read_text().splitlines())]


def watched(script: str, *options) -> SimpleNamespace:
    """Run a command, and return what its parts were given."""
    names = ("rates", "augmented", "order", "forwards", "loaders", "measured", "compiled")
    seen = SimpleNamespace(**{name: [] for name in names})

    def look_at_run(run):
        seen.run = run
        seen.start = {k: v.clone() for k, v in run.model.state_dict().items()}

    def look_at_step(run, batch):
        (group,) = run.optimizer.param_groups
        seen.rates.append((group["lr"], group["betas"][0]))

    def look_at_augment(image, depth, recipe):
        about = tuple(recipe)[:5], tuple(image.shape), depth.max().item(), torch.initial_seed()
        seen.augmented.append(about)

    def look_at_forward(model, image, upsample=True):
        tf32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() == "high"
        about = (model.training, tuple(image.shape), torch.is_autocast_enabled("cpu"), tf32)
        seen.forwards.append((*about, torch.initial_seed()))

    def look_at_measuring(predict, dataset, *_):
        if not isinstance(predict, nn.Module):  # else this is called again, with a predictor
            seen.measured.append(dataset)

    look_at_pair = lambda dataset, i: dataset.train and seen.order.append(i)
    look_at_loader = lambda _, device=None, n=None, **__: seen.loaders.append((device, n))
    compiled = lambda module: lambda image: seen.compiled.append(1) or module(image)
    with pytest.MonkeyPatch.context() as patch:
        spied(patch, train.Run, "train", look_at_run)
        spied(patch, train.Run, "learn", look_at_step)
        spied(patch, data, "augment", look_at_augment)
        spied(patch, cabins.CaBins, "forward", look_at_forward)
        spied(patch, data.DepthDataset, "__getitem__", look_at_pair)
        spied(patch, data, "load", look_at_loader)
        spied(patch, evaluation, "evaluate_windows", look_at_measuring)
        patch.setattr(torch, "compile", compiled)
        seen.ran = run_script(script, *options)
    assert seen.ran.status == 0, seen.ran.err
    return seen


@pytest.fixture
def narrow(monkeypatch, tmp_path) -> Path:
    """Backbones of reduced width, and torch.hub's cache with a CLIP for each and the lists."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for i, (name, full) in enumerate([*cabins.BACKBONES.items()][:3]):
        sizes = {"embed_dim": full.embed_dim // 32, "text_width": 64, "text_layers": 1}
        sizes |= {"channels": (8, 16, 32, 64), "decoder_width": 64, "decoder_layers": 1}
        sizes |= {"width": 64, "layers": (4,)} if full.is_vit else {"width": 2, "layers": (1,) * 4}
        small = full._replace(**sizes)
        monkeypatch.setitem(cabins.BACKBONES, name, small)
        torch.manual_seed(7 + i)
        torch.save(cabins.CLIP(small).state_dict(), cache / f"clip-{name.replace('/', '-')}.pt")
    return cache


def write_data(root: Path, lists: Path, name: str) -> list[str]:
    """Two pairs for training, and one for testing. Returns the options of a command for them."""
    options = ["--data", name, "--root", str(root), "--batch-size", "1"]
    if name == "toy":
        return ["--batch-size", "4"]
    if name == "nyu":
        file, folders = "nyudepthv2_{}_files_with_gt.txt", ("sync", "sync", "official_splits/test")
        lines = [write_pair(root / x / "den", i, depth=9e3 + i) for i, x in enumerate(folders)]
    elif name == "kitti":  # the list says .jpg
        file, folders = "kitti_eigen_{}_files_with_gt.txt", ("train", "val", "val")
        folders = [root / "data_depth_annotated" / x / "drive" for x in folders]
        lines = [write_pair(x, i, 376, 1241, 5120) for i, x in enumerate(folders)]
        (root / "raw" / "drive").mkdir(parents=True)
        for i, folder in enumerate(folders):
            (folder / f"rgb_{i}.jpg").rename(root / "raw" / "drive" / f"rgb_{i}.png")
    else:
        file = "own_{}.txt"
        lines = [write_pair(root / "a", i, 64, 192, 1000 + 500 * i) for i in range(2)]
        lines.append(write_pair(root / "a", 2, 128, 384))  # measured at the size of training
        for part in ("train", "test"):  # relative ones, as users type them
            options += [f"--{part}-split", os.path.relpath(lists / file.format(part))]
        options += ["--depth-scale", "500", "--max-depth", "6"]
    (lists / file.format("train")).write_text("# mine\n/" + "/".join(lines[:2]))
    (lists / file.format("test")).write_text(lines[2] + "a.jpg None 721.5\n")
    return options


# max_depth, depth_scale, crop, degrees and brightness; longer side and backbone; what augment gets:
# size and deepest point; the size at which the network is measured

KNOWN = {
    "toy": ((10, 1000, (96, 128), 0, 0.1), (128, "tiny"), (4, 3, 96, 128), None, (96, 128)),
    "nyu": ((10, 1000, (416, 544), 2.5, 0.25), (640, "RN101"), (1, 3, 427, 565), 9, (480, 640)),
    "kitti": ((80, 256, (352, 704), 1, 0.1), (1216, "RN101"), (1, 3, 352, 1216), 20, (352, 1216)),
    "list": ((6, 500, None, 2.5, 0.1), (192, "RN101"), (1, 3, 64, 192), 3, (64, 192)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_command_trains_and_measures(name, short, narrow, tmp_path):
    """Also that eval.py, from elsewhere and without options, measures what the run measured."""
    recipe, (side, backbone), size, deepest, shown = KNOWN[name]
    crop, is_toy = recipe[2] or (64, 160), name == "toy"  # 7/8, in multiples of 32, at least 64
    out, options = tmp_path / "out", write_data(tmp_path / "data", narrow, name)
    seen = watched("train.py", *options, "--epochs", 1, "--out", out)
    expected = (backbone, "cabins", 256, 8, 8, 1e-3, recipe[0], side)
    assert dataclasses.astuple(seen.run.model.config) == expected
    assert [x[:2] for x in seen.augmented] == [(recipe, size)] * 2
    assert is_toy or max(x[2] for x in seen.augmented) == pytest.approx(deepest, rel=1e-3)
    assert sorted(seen.order) == [*range(8 if is_toy else 2)]
    assert seen.rates[1][0] == pytest.approx((2e-3 if is_toy else 3.57e-5) / 2500)
    given = torch.load(narrow / "clip-RN101.pt")
    assert all(torch.equal(seen.start[f"clip.{k}"], v) for k, v in given.items()) == (not is_toy)
    learning, measuring = ([x for x in seen.forwards if x[0] == mode] for mode in (True, False))
    assert [x[1:4] for x in learning] == [((size[0], 3, *crop), False, (True, True))] * 2  # TF32
    (tested,) = seen.measured
    assert [x[1:4] for x in measuring] == [((2, 3, *shown), False, (False, False))] * len(tested)
    assert (tested.name, tested.train, tuple(tested.recipe)[:2]) == (name, False, recipe[:2])
    assert seen.loaders == [(seen.run.device, None), (None, None)]  # as many as cores allow
    saved = cabins.read_checkpoint(out / "last.pt")
    assert saved["data"] == {"name": name, "depth_scale": recipe[1]} and saved["step"] == 2

    args = train.parse_args(["--data", name, "--root", "x"])
    papers = (3 if is_toy else 25, 8, 0, "off", f"runs/{name}", os.path.abspath("x"))
    assert (args.epochs, args.batch_size, args.seed, args.amp, args.out, args.root) == papers
    short.chdir(narrow)
    again = watched("eval.py", out / "last.pt", "--csv", tmp_path / "rows.csv")
    (dataset,) = again.measured
    assert (dataset.pairs, dataset.recipe) == (tested.pairs, tested.recipe)
    assert len(dataset) == 1 + is_toy and dataset.n_left_out == (not is_toy)
    assert [x[1:4] for x in again.forwards] == [x[1:4] for x in measuring]
    row, *_ = rows_of(tmp_path / "rows.csv")
    (same_row,) = rows_of(out / "metrics.csv")
    assert all(row[key] == same_row[key] for key in evaluation.HEADINGS)  # all digits
    assert row["window"] == {"nyu": "eigen", "kitti": "nested"}.get(name, "whole")
    assert f"({int(not is_toy)} more have no file)" in row["protocol"]
    assert (same_row["step"], same_row["epoch"]) == ("2", "1")


def one_cycle(lr: float, n: int) -> list[tuple[float, float]]:
    """Rate and momentum of each of n steps: Sec. 4.1 names the policy, the release its ends."""
    found, top = [], 0.3 * n - 1
    for i in range(n):
        x = i / top if i <= top else 1 - (i - top) / (n - 1 - top)
        height = (1 - math.cos(math.pi * x)) / 2
        low = lr / 25 if i <= top else lr / 2500
        found.append((low + (lr - low) * height, 0.95 - 0.1 * height))
    return found


def test_options_reach_schedule_order_seeds_and_network(short, tmp_path):
    command = ["--epochs", 3, "--batch-size", 2, "--lr", 1e-2, "--workers", 0, "--out"]
    some = [], ["--seed", 3, "--amp", "bf16", "--compile", "--distance-class", "mean"]
    seen = [watched("train.py", *command, tmp_path / f"{len(x)}", *x) for x in some]
    for k, one in enumerate(seen):
        assert np.allclose(one.rates, one_cycle(1e-2, 12), rtol=1e-6)
        forwards = [x for x in one.forwards if x[0]]
        one.seeds = {x[3] for x in one.augmented} | {x[4] for x in forwards}
        assert len(one.seeds) == 24  # another seed in each step, for augmentation and for dropout
        assert {x[2:4] for x in forwards} == {(k == 1, (True, True))}  # also after a validation
        assert len(one.compiled) == 12 * k
        epochs = [tuple(one.order[i : i + 8]) for i in range(0, 24, 8)]
        assert all(sorted(epoch) == [*range(8)] for epoch in epochs) and len({*epochs}) == 3
        assert one.loaders == [(one.run.device, 0), (None, 0)] * 3
        log = rows_of(one.run.out / "log.csv")
        assert [int(row["step"]) for row in log] == [4, 8, 10, 12]
        assert [float(row["lr"]) for row in log] == [one.rates[i][0] for i in (3, 7, 9, 11)]
        assert [float(row["epoch"]) for row in log] == [1, 2, 2.5, 3]
    assert not seen[0].seeds & seen[1].seeds and seen[0].order != seen[1].order
    assert not same(seen[0].start, seen[1].start)


def same(a, b) -> bool:
    """Whether nested contents are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_step_is_adamws_with_a_decay_of_a_tenth_and_clipped_gradients(short):
    run = train.Run(train.parse_args(["--lr", "0.01", "--batch-size", "2"]))
    run.model.train().bins.mlp[0].weight.grad = torch.full((512, 64), 1e6)  # of an earlier step
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    given = []
    spied(short, cabins, "total_loss", lambda *x: given.extend(x))
    loss, norm = run.learn(next(iter(data.load(run.dataset, batch_size=2))))
    torch.testing.assert_close(loss, cabins.total_loss(*given[:3]).detach())
    lr, squares, learners = 0.01 / 25, 0.0, {}
    for name, p in run.model.named_parameters():
        if p.grad is not None:
            learners[name] = p
            squares += p.grad.square().sum().item()
            expected = before[name] * (1 - lr * 0.1) - lr * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
    assert {*before} - {*learners} == {x for x in before if re.match(r"clip\.(?!visual)", x)}
    assert 0.1 < norm < 1e4 and math.sqrt(squares) == pytest.approx(0.1, rel=1e-3)
    (group,) = run.optimizer.param_groups
    assert [*map(id, group["params"])] == [*map(id, learners.values())] and run.step == 1
    assert group["betas"][1] == 0.999 and group["lr"] != lr


@pytest.mark.parametrize("row", ["RN50 semantic", "RN50 median", "RN101 cabins", "ViT-B/16 mean"])
def test_every_row_trains_from_its_own_clip_or_from_a_checkpoint(row, short, narrow, tmp_path):
    backbone, kind = row.split()
    file, option = narrow / f"clip-{backbone.replace('/', '-')}.pt", []
    if kind == "median":  # a file, whose name says nothing
        file, option = tmp_path / "a.bin", ["--clip", tmp_path / "a.bin"]
        torch.save(cabins.CLIP(cabins.BACKBONES[backbone]).state_dict(), file)
    option += ["--backbone", backbone, "--distance-class", kind, "--epochs", 1, "--batch-size", 4]
    seen, given = watched("train.py", *option, "--out", tmp_path / "a"), torch.load(file)
    assert all(torch.equal(seen.start[f"clip.{name}"], x) for name, x in given.items())
    model = cabins.load_checkpoint(tmp_path / "a" / "last.pt")
    assert (model.config.backbone, model.config.distance_class) == (backbone, kind)
    for name, x in model.clip.state_dict().items():
        assert torch.equal(x, given[name]) or name.startswith("visual."), name  # which learns
    assert not torch.equal(model.clip.visual.conv1.weight, given["visual.conv1.weight"])
    option = option[2:] if kind == "median" else option
    option += ["--init", tmp_path / "a" / "last.pt", "--max-depth", 20, "--out", tmp_path / "b"]
    seen = watched("train.py", *option)
    assert same(seen.start, dict(model.state_dict())) and "for depths up to 10.0 m" in seen.ran.out
    assert seen.run.model.config.max_depth == seen.measured[0].recipe.max_depth == 20


def test_workers_leave_a_core_and_memory_is_pinned_for_gpus(monkeypatch):
    found = []
    monkeypatch.setattr(data, "DataLoader", lambda *_, **options: found.append(options))
    for cores, processes, workers in ((1, 1, 0), (4, 1, 3), (64, 1, 8), (8, 2, 3), (8, 8, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: {*range(n)}, raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        data.load(None)
        assert found[-1] == {"num_workers": workers, "pin_memory": False}
    for device, is_pinned in (("cuda", True), ("cpu", False)):
        data.load(None, torch.device(device), 5, batch_size=3)
        assert found[-1] == {"num_workers": 5, "pin_memory": is_pinned, "batch_size": 3}


def test_eval_prints_how_it_measured_and_writes_all_digits_first(tiny, short, tmp_path):
    about = {"name": "toy", "depth_scale": 1000.0, "max_depth": 10.0}
    cabins.save_checkpoint(tmp_path / "a.pt", tiny, data=about)
    command = "eval.py", tmp_path / "a.pt", "--csv", tmp_path / "rows.csv"
    data.use_tf32(True)  # which eval.py must undo
    for options, top, flip in (([], 10.0, "on"), (["--no-flip", "--max-depth", 7], 7.0, "off")):
        seen = watched(*command, *options)
        assert {x[3] for x in seen.forwards} == {(False, False)} and seen.ran.out.isascii()
        assert {x[1][0] for x in seen.forwards} == {1 + (flip == "on")}
        dataset = data.DepthDataset("toy", max_depth=top)
        expected = evaluation.evaluate(evaluation.predictor(tiny, flip == "on"), dataset, 0)
        line = "toy, window whole: 2 of 2 images have ground truth (0 more have no file), "
        line += f"0.001 < depth < {top} m, mean over images; 0 NaN pixels predicted; longer side "
        line += f"128 pixels, flip averaging {flip}, fp32"
        row = rows_of(tmp_path / "rows.csv")[-1]
        values = {name: str(value) for name, value in expected.items()}
        first = {"checkpoint": str(tmp_path / "a.pt"), "window": "whole"}
        assert row == {**first, **values, "protocol": line} and line in seen.ran.out
    short.setattr(evaluation, "format_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error that is not ours keeps its traceback
        run_script(*command)
    assert len(rows_of(tmp_path / "rows.csv")) == 3


def test_eval_takes_from_the_run_what_the_options_leave_open(short, tmp_path):
    """And nothing, when the data set is another one: its own scale and range, then."""
    run, other, used, drawn = tmp_path / "run", tmp_path / "other", [], []
    for root in (run, other):
        line = write_pair(root / "a", 1, 96, 128, 3000)
        (root / "list.txt").write_text(line * 9)
    short.undo()
    short.setattr(evaluation, "evaluate_windows", lambda _, x, *__: used.append(x) or {})
    short.setattr(evaluation, "draw_explained", lambda *given: drawn.append(given))
    about = {"name": "list", "depth_scale": 500.0, "max_depth": 10.0}
    model = cabins.CaBins(dataclasses.replace(TINY, max_depth=12.0))
    cabins.save_checkpoint(run / "best.pt", model, data=about)
    options = {"root": str(run), "test_split": str(run / "list.txt")}
    (run / "args.json").write_text(json.dumps({"options": options}))
    shutil.copy(run / "best.pt", tmp_path / "best.pt")  # published: without its folder
    elsewhere = ["--root", other, "--split", other / "list.txt"]
    commands = {
        ("run/best.pt",): ("list", 500, 12, run),
        ("run/best.pt", "--depth-scale", 400, "--max-depth", 9): ("list", 400, 9, run),
        ("best.pt", *elsewhere): ("list", 500, 12, other),
        ("run/best.pt", "--data", "kitti", *elsewhere): ("kitti", 256, 80, other),
        ("run/best.pt", "--data", "toy", "--figures", tmp_path / "b"): ("toy", 1000, 12, None),
    }
    for (path, *more), expected in commands.items():
        ran = run_script("eval.py", tmp_path / path, *more)
        assert ran.status == 0, ran.err
        found = used[-1].name, used[-1].recipe.depth_scale, used[-1].recipe.max_depth
        root = Path(used[-1].pairs[0][0]).parents[1] if found[0] != "toy" else None
        assert (*found, root) == expected
    assert [x[0] for x in drawn] == [tmp_path / f"b/explained_{i}.png" for i in (0, 21, 42, 63)]
    image, depth = data.draw_room(1_000_021)
    assert np.array_equal(drawn[1][1], image) and np.array_equal(drawn[1][3], depth)


# ---- A run's folder: saved in time, resumed exactly ----------------------------------------------
EIGHT_STEPS = ("--epochs", 2, "--batch-size", 2)


def killed(monkeypatch, what: str, at: int, *options) -> Ran | None:
    """Run train.py, with slow steps, until call number `at` of a run's method, where it dies."""
    count, clock = itertools.count(1), itertools.count(0, 250).__next__
    with monkeypatch.context() as patch, contextlib.suppress(ZeroDivisionError):
        patch.setattr(train, "LOG_EVERY", 1)
        patch.setattr(train, "time", SimpleNamespace(monotonic=clock))
        holder = train.Run if what == "learn" else evaluation
        spied(patch, holder, what, lambda *_, **__: next(count) == at and 1 / 0)
        return run_script("train.py", *options)


def test_last_is_saved_every_ten_minutes_and_before_each_validation(short, tmp_path):
    events, found = [], iter([0.5, 0.6, 0.4])
    metrics = dict.fromkeys(evaluation.HEADINGS, 1.0)
    measure = lambda *_: events.append("validate") or metrics | {"abs_rel": next(found)}
    save = lambda path, _, **more: events.append((path.name, more["step"]))
    short.setattr(evaluation, "evaluate", measure)
    short.setattr(cabins, "save_checkpoint", save)
    ran = killed(short, "learn", 99, "--epochs", 3, "--batch-size", 2, "--out", tmp_path / "a")
    assert events == [
        *[("last.pt", 3), ("last.pt", 4), "validate", ("best.pt", 4)],
        *[("last.pt", 7), ("last.pt", 8), "validate"],  # which is worse
        *[("last.pt", 11), ("last.pt", 12), "validate", ("best.pt", 12)],
    ]
    assert train.SAVE_EVERY == 600 and "epoch 2, abs_rel 0.6, " in ran.out and ran.out.isascii()


def test_a_killed_run_goes_on_exactly_and_auto_begins_where_there_is_nothing(short, tmp_path):
    """Killed in an epoch, in a validation and before it saved; with cut tables; moved."""

    def content(folder: Path) -> list:
        files = [cabins.read_checkpoint(folder / name) for name in ("last.pt", "best.pt")]
        return files + [(folder / name).read_text() for name in ("log.csv", "metrics.csv")]

    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "log.csv").write_text("step,epoch,loss,bins,lr\n1,2,3,4,5\n")
    (whole / "metrics.csv").touch()  # of a disk that was full
    killed(short, "learn", 99, *EIGHT_STEPS, "--resume", "auto", "--out", whole)  # it is not
    whole = content(whole)
    assert whole[0]["optimizer"]["state"][0]["step"] == whole[0]["step"] == 8
    for what, at, step in (("learn", 4, 3), ("learn", 8, 7), ("evaluate_windows", 1, 4)):
        out = tmp_path / f"{what}{at}"
        killed(short, what, at, *EIGHT_STEPS, "--out", out)
        assert cabins.read_checkpoint(out / "last.pt")["step"] == step
        (out / "best.pt.partial").write_bytes(b"half")
        with open(out / "log.csv", "a") as file:
            file.write(f"{step + 2},0.5,1,1,1\n1")  # of a later step, and one that was cut
        out = out.rename(tmp_path / f"moved_{what}{at}")
        killed(short, "learn", 99, "--resume", out / "last.pt")
        assert same(content(out), whole), what
    assert run_script("train.py", "--resume", "auto", "--out", out).status == 0  # it has finished
    assert same(content(out), whole)
    ran = run_script("train.py", "--resume", out / "best.pt")
    assert ran.status == 2 and "best.pt is not the last.pt of a run" in ran.err


def test_a_run_names_its_options_and_its_checkpoints_name_no_folder(short, tmp_path):
    options = write_data(tmp_path / "data", tmp_path, "list") + ["--backbone", "tiny"]
    killed(short, "evaluate_windows", 1, *options, "--epochs", 2, "--out", tmp_path / "a")
    about = json.loads((tmp_path / "a" / "args.json").read_text())
    folder = Path(train.__file__).parent  # without git, its message stands for the commit
    head = subprocess.getoutput(f'git -C "{folder}" rev-parse HEAD')
    assert about == {"options": about["options"], "torch": torch.__version__, "commit": head}
    known = {"data": "list", "root": str(tmp_path / "data"), "epochs": 2, "seed": 0, "amp": "off"}
    known |= {"depth_scale": 500, "train_split": str(tmp_path / "own_train.txt"), "clip": "none"}
    assert about["options"].items() >= known.items()
    (tmp_path / "data").rename(tmp_path / "moved")
    last = tmp_path / "a" / "last.pt"
    ran = run_script("train.py", "--resume", last)
    assert ran.status == 1 and f"--root is {tmp_path}/data" in ran.err
    again = ("--root", tmp_path / "moved", "--device", "cpu", "--workers", 0)
    seen = watched("train.py", "--resume", last, *again)
    assert [x.pairs[0][0] for x in seen.measured] == [str(tmp_path / "moved/a/rgb_2.jpg")] * 2
    assert seen.run.step == 4 and len(seen.rates) == 2
    for name in ("last.pt", "best.pt"):
        assert str(tmp_path).encode() not in (tmp_path / "a" / name).read_bytes()
    assert run_script("eval.py", last, *again[:2]).status == 0


CHANGES = "--epochs 3 | --batch-size 4 | --seed 1 | --lr 1 | --data nyu | --out b | --compile"
CHANGES += " | --distance-class mean | --amp bf16 | --max-depth 5 | --backbone RN50 | --init a.pt"


def files_below(folder: Path) -> dict[str, tuple]:
    stats = {str(path): path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_a_resumed_run_keeps_its_options_and_a_new_one_takes_a_new_folder(short, tmp_path):
    short.chdir(tmp_path)
    killed(short, "evaluate_windows", 1, *EIGHT_STEPS, "--out", "a")
    before = files_below(tmp_path)
    for change in CHANGES.split(" | "):
        ran = run_script("train.py", "--resume", "a/last.pt", *change.split())
        name = change.split()[0].removeprefix("--").replace("-", "_")
        assert ran.status == 2 and f"began with {name} " in ran.err and "--init a" in ran.err
    for taken in ("a", "a/last.pt"):
        ran = run_script("train.py", *EIGHT_STEPS, "--out", taken)
        assert ran.status == 1 and ran.err.count("\n") == 1
        assert all(word in ran.err for word in (f"error: {taken} exists", "--resume", "--out"))
    assert files_below(tmp_path) == before
    args = train.parse_args(["--resume", "./a/last.pt", "--epochs", "2", "--out", "a"])  # the same
    assert (args.batch_size, args.last, args.out) == (2, "./a/last.pt", "a")
    short.setattr(train.Run, "loss", lambda *given: math.nan * cabins.total_loss(*given[1:], 1e-3))
    ran = run_script("train.py", "--epochs", 3, "--batch-size", 2, "--resume", "auto", "--out", "b")
    assert ran.status == 1 and "step 4: loss nan" in ran.err and "last.pt" not in os.listdir("b")


# ---- Several processes, and what a GPU would see -------------------------------------------------
HEAD = f"""
import sys
sys.path[:0] = {sys.path}
import numpy as np, torch, cabins, data, eval as evaluation, train
data.TOY_ROOMS = {{"train": range(8), "test": range(50, 52)}}
"""
TWO = """
learn = train.Run.learn

def told_learn(run, batch):
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    result = learn(run, batch)
    gradients = {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}
    torch.save((batch, before, gradients, result[0]), f"step{run.step}_{run.rank}.pt")
    return result

train.Run.learn, train.MAX_NORM = told_learn, 1e9
data.run_command(train.main)
"""


def test_two_processes_average_the_gradients_of_their_shares(short, tmp_path):
    (tmp_path / "script.py").write_text(HEAD + TWO)
    options = ["--epochs", "1", "--batch-size", "4", "--seed", "3", "--workers", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 180}
    command += ["script.py", *options, "--out", "a"]
    ran = subprocess.run(command, cwd=tmp_path, check=False, **how)
    assert ran.returncode == 0, ran.stdout
    for line in ("training on", "2 x cpu", "epoch 1, abs_rel"):
        assert ran.stdout.count(line) == 1  # only the first process speaks
    assert len(rows_of(tmp_path / "a" / "metrics.csv")) == 1
    assert cabins.read_checkpoint(tmp_path / "a" / "last.pt")["step"] == 2

    short.setattr(train, "MAX_NORM", 1e9)
    run, means, seeds = train.Run(train.parse_args(options)), {}, []
    spied(short, data, "augment", lambda *_: seeds.append(torch.initial_seed()))
    order, run.n_processes = run.order(0)[1], 2
    told = [torch.load(tmp_path / f"step2_{rank}.pt") for rank in (0, 1)]
    for run.rank, (batch, before, gradients, loss) in enumerate(told):
        assert batch["path"] == [f"room {i}" for i in order[run.rank :: 2]]
        run.model.train().load_state_dict(before)
        run.step = 1
        close(run.learn(batch)[0], loss, 1e-4)  # of its own share, with its own random numbers
        seeds.append(torch.initial_seed())  # of dropout
        parameters = dict(run.model.named_parameters())
        for name in gradients:
            means[name] = means.get(name, 0) + parameters[name].grad / 2
    assert len({*seeds}) == 4
    for _, _, gradients, _ in told:
        found, expected = (torch.cat([*map(torch.ravel, x.values())]) for x in (gradients, means))
        close(found, expected, 1e-3)


def test_each_process_has_its_own_gpu_and_all_share_batchnorms_statistics(short):
    calls, gpu = [], torch.device("cuda")
    note = lambda name: lambda *given, **_: calls.append((name, *given))
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
    ):
        short.setenv(name, value)
    short.setattr(torch.cuda, "is_available", lambda: True)
    short.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    short.setattr(torch.cuda, "set_device", note("set_device"))
    short.setattr(dist, "init_process_group", note("init"))
    short.setattr(nn.parallel, "DistributedDataParallel", note("parallel"))
    short.setattr(cabins.CaBins, "to", lambda model, *given, **_: note("to")(*given) or model)
    short.setattr(torch, "compile", note("compile"))
    args = train.parse_args(["--batch-size", "4", "--compile"])
    run = train.Run(args)
    assert (args.device, args.amp, run.device, run.rank) == (None, "bf16", gpu, 1)
    wanted = [("to", gpu), ("init",), ("parallel", run.model), ("compile", None)]
    assert calls == [("to",), ("set_device", 1), *wanted]
    kinds = {type(module) for module in run.model.modules()}
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds
    assert [len(batch) for batch in run.order(1)] == [2] * 2
    with pytest.raises(InputError, match="--batch-size .* no multiple of the processes"):
        train.Run(train.parse_args(["--batch-size", "5"]))
    assert train.parse_args(["--device", "cpu"]).amp == "off"
    short.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    assert train.parse_args([]).amp == "off"
    assert data.choose_device("cpu").type == "cpu" and data.choose_device().type == "cuda"


def test_all_of_a_step_is_on_one_device_and_reads_no_value(short):
    """The device "meta" stands for a GPU: its tensors have shapes, but no values to be read."""
    autocast, flags = [], []
    note = lambda *given: autocast.append(given) or contextlib.nullcontext()
    short.setattr(torch, "autocast", note)
    short.setattr(train, "AdamW", lambda p, lr, **_: torch.optim.SGD(p, lr, 0.9))
    run = train.Run(train.parse_args(["--device", "meta", "--amp", "bf16", "--batch-size", "2"]))
    batch = next(iter(data.load(run.dataset, batch_size=2)))
    copy = lambda *_, non_blocking=False, **__: flags.append(non_blocking)
    spied(short, torch.Tensor, "to", copy)
    assert {x.device.type for x in run.learn(batch)} == {"meta"}
    assert autocast == [("meta", torch.bfloat16, True)]
    assert sum(flags) == 2  # the batch; a temporary's memory would be written anew too early


def test_pictures_and_test_images_go_to_the_networks_device(tiny, short, tmp_path):
    cabins.save_checkpoint(tmp_path / "a.pt", tiny, data={"name": "toy"})
    found = []

    def forward(model, image, upsample=True):
        found.append((image.device.type, image.dtype, model.prompts.device.type))
        p = torch.full((len(image), 256, 48, 64), 1 / 256)
        return cabins.Prediction(p[:, :1], p[:, :, 0, 0], p[:, :8, 0, 0], p[:, :8], p)

    short.setattr(cabins.CaBins, "forward", forward)
    model = cabins.load_checkpoint(tmp_path / "a.pt", "meta").half()
    cabins.infer(model, np.zeros((90, 120, 3), np.uint8))
    evaluation.predictor(model)(torch.zeros(1, 3, 96, 128))
    assert run_script("eval.py", tmp_path / "a.pt", "--device", "meta").status == 0
    assert found == [("meta", x, "meta") for x in 2 * [torch.half] + 2 * [torch.float]]
