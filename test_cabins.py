"""Every identity and claim of CaBins, in the order of the paper: python -m pytest -q

Goldens are what the authors' and CLIP's own code computed on made weights. A few of their values
stand here; the files themselves, and real pictures, are used where they lie in ../shared.
"""

import functools
import hashlib
import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cabins
import clip_tokenizer
import data
import eval as evaluation
import train

HERE = Path(__file__).parent
GOLDENS, SAMPLES = HERE.parent / "shared" / "goldens", HERE.parent / "shared" / "samples"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="no ../shared/goldens here")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples here")
TINY = cabins.Config(backbone="tiny", image_width=128)
TINY_CAMERA = cabins.Config(backbone="tiny", image_width=128, focal=100.0)


def normal(name: str, shape: tuple) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(math.prod(shape), dtype=np.float32).reshape(shape)


def made_tensor(name: str, shape: tuple) -> torch.Tensor:
    """The goldens' weight of this name and shape (theirs, not ours)."""
    n = normal(name, shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name == "gamma":
        pass
    elif name.endswith("running_var"):
        n = np.exp(np.float32(0.2) * n)
    elif name.endswith("running_mean"):
        n = 0.1 * n
    elif len(shape) == 1 and name.endswith("weight"):
        n = 1 + 0.1 * n
    elif len(shape) < 2:
        n = 0.05 * n
    elif name.endswith(("embedding", "embedding.weight", "contexts")):
        n = 0.02 * n
    else:
        n = n / np.float32(math.sqrt(math.prod(shape[1:])))
    return torch.from_numpy(np.float32(30 if name == "predict_D.conv_out.0.weight" else 1) * n)


def close(actual, expected, tolerance=1e-4):
    """Relative to the largest expected value."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    error = (actual.detach() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tiny() -> cabins.CaBins:
    torch.manual_seed(0)
    return cabins.CaBins(TINY).eval()


# ---- Sec. 3.1  CLIP's tokenizer ------------------------------------------------------------------


def test_tokenizer_known_answers():
    known = {
        "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
        "farthest": [1578, 35343],
        "79.1234": [278, 280, 269, 272, 273, 274, 275],
        "mojibake cafÃ©": [617, 3252, 11878, 15304],
        "<|startoftext|> inside <|endoftext|>": [49406, 2912, 49407],
        "日本語のテキスト": [39121, 44353, 34002, 252, 21575, 2429, 228, 47121, 32421, 486],
        "": [],
    }
    for text, ids in known.items():
        assert clip_tokenizer.encode(text) == ids
    assert clip_tokenizer.merge("farthest") == ("far", "thest</w>")


@needs_goldens
def test_tokenizer_goldens():
    for text, ids in json.loads((GOLDENS / "tokens.json").read_text()):
        assert clip_tokenizer.encode(text) == ids, text


def test_tokenize_pads_and_refuses_what_does_not_fit():
    ids = clip_tokenizer.tokenize(["far", "extremely close"], length=5)
    assert ids.tolist() == [[49406, 2384, 49407, 0, 0], [49406, 6519, 2660, 49407, 0]]
    with pytest.raises(ValueError, match="'extremely close' is 4 tokens long; at most 3 fit"):
        clip_tokenizer.tokenize("extremely close", length=3)


# ---- Sec. 3.1  CLIP's encoders -------------------------------------------------------------------

CLIP_KNOWN = {  # image 0, text 0: first three values of CLIP's own embedding
    "RN50": ([-0.89232415, -0.17029873, 0.15963185], [-1.518179, 0.2903049, 0.15889318]),
    "RN101": ([0.85525256, -1.7576025, -2.4198878], [1.3894114, 0.88841105, -0.52293265]),
    "ViT-B/16": ([-1.3473095, 0.38172603, -0.33779722], [1.3894114, 0.88841105, -0.52293265]),
}
CLIP_TEXTS = ["a photo of a cat.", "This object is giant", "extremely close", "2.7415", "farthest"]


def made_clip_state(backbone: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):  # names and shapes alone
        state = cabins.CLIP(cabins.BACKBONES[backbone]).state_dict()
    state = {k: v for k, v in state.items() if not k.startswith(("visual.reassemble.", "logit"))}
    made = {k: made_tensor(k, tuple(v.shape)) for k, v in state.items()}
    return made | {"logit_scale": torch.tensor(1 / 0.07).log()}


@pytest.mark.parametrize("backbone", CLIP_KNOWN)
def test_clips_own_embeddings(backbone, tmp_path):
    state = made_clip_state(backbone)
    torch.save(state, tmp_path / "clip.pt")
    clip = cabins.load_clip(tmp_path / "clip.pt").eval()
    image = torch.from_numpy(normal("image", (2, 3, 224, 224)))
    with torch.no_grad():
        pyramid, z_bar, z = clip.visual(image)
        t = clip.encode_text(clip_tokenizer.tokenize(CLIP_TEXTS))
        short = clip.encode_text(clip_tokenizer.tokenize(CLIP_TEXTS, 9))
    assert [tuple(x.shape[2:]) for x in pyramid] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [x.shape[1] for x in pyramid] == clip.visual.channels
    assert z.shape == (2, z_bar.shape[1], *((14, 14) if backbone == "ViT-B/16" else (7, 7)))
    image_known, text_known = CLIP_KNOWN[backbone]
    close(z_bar[0, :3], image_known)
    close(t[0, :3], text_known)
    close(short, t, 1e-5)  # what comes after the end token changes nothing
    if GOLDENS.is_dir():
        name = backbone.replace("/", "-")
        golden = np.load(GOLDENS / "clip_embeddings.npz")
        close(z_bar, golden[f"{name}/image"])
        close(t, golden[f"{name}/text"])
        shapes = json.loads((GOLDENS / "clip_state_dicts.json").read_text())[name]
        assert {k: list(v.shape) for k, v in state.items()} == shapes


def test_vit_is_tapped_where_dpt_taps_it_and_as_wide():
    vit = cabins.CLIP(cabins.BACKBONES["ViT-B/16"]).visual
    assert vit.taps == [3, 6, 9, 12] and vit.channels == [96, 192, 384, 768]


def test_text_encoder_is_causal_and_frozen(tiny):
    ids = clip_tokenizer.tokenize("2.7415", 9)
    longer = F.pad(ids, (0, 5), value=7)
    close(tiny.clip.encode_text(ids), tiny.clip.encode_text(longer), 1e-5)
    frozen = {n for n, p in tiny.clip.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in tiny.clip.named_parameters() if not n.startswith("visual.")}


class ClipLike(torch.nn.Module):
    """Something to script with CLIP's tensors in it."""

    def __init__(self, clip):
        super().__init__()
        self.visual, self.transformer = clip.visual, clip.transformer
        self.token_embedding, self.ln_final = clip.token_embedding, clip.ln_final
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(clip, name))
        self.register_buffer("context_length", torch.tensor(77))

    def forward(self, x):
        return x


def test_load_clip_reads_half_precision_torchscript_and_plain_files(tiny, tmp_path, monkeypatch):
    plain, archive = tmp_path / "plain.pt", tmp_path / "archive.pt"
    half = cabins.CLIP(cabins.BACKBONES["tiny"])
    half.load_state_dict(tiny.clip.state_dict())
    torch.save(half.half().state_dict(), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(ClipLike(half), torch.zeros(1)).save(archive)
    with pytest.raises(ValueError, match="archive.pt .* of another kind; expected a CLIP file"):
        cabins.load_clip(archive)
    known = {"tiny": hashlib.sha256(archive.read_bytes()).hexdigest()}
    monkeypatch.setattr(cabins, "CLIP_SHA256", known)
    for path in (plain, archive):
        clip = cabins.load_clip(path)
        assert clip.architecture == cabins.BACKBONES["tiny"]
        assert all(p.dtype == torch.float32 for p in clip.parameters())
        close(clip.visual.conv1.weight, tiny.clip.visual.conv1.weight, 1e-3)


# ---- Sec. 3.2.1  Adaptive bins, Eq. 1 -----------------------------------------------------------


def test_widths_sum_to_one_and_centers_increase_inside_the_range(tiny):
    b = tiny.bins(torch.randn(5, 64, generator=generator()) * 10)
    c = cabins.bin_centers(b, 1e-3, 10.0)
    close(b.sum(1), torch.ones(5), 1e-6)
    assert (b > 0).all() and (c.diff(dim=1) > 0).all() and c.min() > 1e-3 and c.max() < 10


def test_bin_centers_are_eq_1():
    b = torch.tensor([[0.5, 0.25, 0.25]])
    assert cabins.bin_centers(b, 2.0, 10.0).tolist() == [[4.0, 7.0, 9.0]]


# ---- Sec. 3.2.2  CaBins, Eq. 2 -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cabins", "median", "mean"])
def test_each_distance_lies_inside_its_group(kind):
    c = (torch.rand(3, 256, generator=generator()) * 80).sort(1).values
    e = cabins.distance_classes(c, 8, kind)
    groups = c.unflatten(1, (8, 32))
    assert e.shape == (3, 8)
    assert (e >= groups.min(2).values).all() and (e <= groups.max(2).values).all()


def test_distance_classes_known_answers():
    c = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert cabins.distance_classes(c, 1, "mean").item() == 3.0
    assert cabins.distance_classes(c, 1, "median").item() == 2.0  # the lower one, a bin centre
    assert cabins.distance_classes(c, 1).item() == 3.0  # the centre at the mean takes all weight
    # by hand: m = 1.5; deviations .5, .5; equal weights
    assert cabins.distance_classes(torch.tensor([[1.0, 2.0]]), 1).item() == 1.5
    # m = 0.4/3; weights softmax(1/(0.1334), 1/(0.0334), 1/(0.1668)) to 4 digits
    w = torch.softmax(1 / (torch.tensor([0.4 / 3, 0.1 / 3, 0.5 / 3]) + 1e-4), 0)
    e = cabins.distance_classes(torch.tensor([[0.0, 0.1, 0.3]]), 1).item()
    assert e == pytest.approx((w[1] * 0.1 + w[2] * 0.3).item(), rel=1e-5)


def test_epsilon_is_that_of_eq_2():
    e = cabins.distance_classes(torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.double), 1).item()
    assert e == pytest.approx(2.0636174, abs=1e-6)  # with ε = 1e-3 it is another


def test_equal_widths_give_group_means():
    c = cabins.bin_centers(torch.full((1, 256), 1 / 256), 1e-3, 10.0)
    close(cabins.distance_classes(c, 8), cabins.distance_classes(c, 8, "mean"), 1e-5)


# ---- Sec. 3.2.3  Prompts, Eq. 3 ------------------------------------------------------------------


def test_number_tokens_equal_tokenised_strings():
    g = generator()
    depths = torch.cat([torch.rand(3000, generator=g) * top for top in (0.01, 1, 10, 80, 9999)])
    edges = [0, 1e-4, 5e-5, 1e-3, 0.5, 0.12345, 2.00005, 9.99995, 10, 80, 99.99995, 100, 9999]
    depths = torch.cat([depths, torch.tensor(edges)])
    texts = [str(round(depth, 4)) for depth in depths.tolist()]
    assert torch.equal(cabins.number_tokens(depths), clip_tokenizer.tokenize(texts, 11))
    assert cabins.number_tokens(depths[:6].reshape(2, 3), 2).shape == (2, 3, 9)


def test_prompts_stand_between_start_and_text(tiny):
    ids = cabins.number_tokens(torch.tensor([2.5]), 2)
    with torch.no_grad():
        # prompts that are the embeddings of words must be those words
        words = clip_tokenizer.encode("a photo of")
        expected = tiny.clip.encode_text(clip_tokenizer.tokenize("a photo of 2.5"))
        prompts = tiny.clip.token_embedding(torch.tensor(words))
        close(tiny.clip.encode_text(ids, prompts), expected, 1e-5)


def test_gamma_zero_leaves_t_as_it_was(tiny):
    t, z_bar, z = torch.randn(2, 8, 64), torch.randn(2, 64), torch.randn(2, 64, 3, 4)
    decoder = cabins.ContextDecoder(64, 64, 4, 2).eval()
    assert not torch.equal(decoder(t, z_bar, z), t)
    torch.nn.init.zeros_(decoder.gamma)
    assert torch.equal(decoder(t, z_bar, z), t)


# ---- Sec. 3.2.4  Depth prediction, Eq. 4 and 5 ---------------------------------------------------


def test_similarity_is_a_cosine():
    z, t = torch.randn(2, 64, 3, 4, generator=generator()), torch.randn(2, 8, 64)
    s = cabins.cosine_similarity(z, t)
    assert s.shape == (2, 8, 3, 4) and s.abs().max() <= 1
    expected = F.cosine_similarity(z[1, :, 2, 3], t[1, 5], dim=0)
    assert s[1, 5, 2, 3].item() == pytest.approx(expected.item(), abs=1e-6)


def test_depth_is_a_convex_combination_of_centers(tiny):
    with torch.no_grad():
        prediction = tiny(torch.randn(2, 3, 96, 128, generator=generator()))
    low, high = prediction.centers[:, 0], prediction.centers[:, -1]
    depth = prediction.depth.flatten(1)
    assert (depth.min(1).values >= low).all() and (depth.max(1).values <= high).all()
    p = torch.eye(256)[None, :, :, None]  # certain of bin i at pixel i
    close(cabins.expected_depth(prediction.centers[:1], p)[0, 0, :, 0], prediction.centers[0], 1e-6)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (100, 333), (427, 65), (96, 128)])
def test_any_size(tiny, size):
    with torch.no_grad():
        prediction = tiny(torch.randn(1, 3, *size))
    assert prediction.depth.shape == (1, 1, *size) and prediction.depth.isfinite().all()
    assert prediction.similarity.shape[:2] == (1, 8)


def test_batch_equals_singles(tiny):
    image = torch.randn(3, 3, 70, 90, generator=generator())
    with torch.no_grad():
        batch, singles = tiny(image), [tiny(i[None]) for i in image]
    for name in batch._fields:
        close(torch.cat([getattr(s, name) for s in singles]), getattr(batch, name), 1e-5)


@pytest.mark.parametrize("kind", cabins.DISTANCE_CLASSES)
def test_every_distance_class_trains_every_parameter(kind):
    torch.manual_seed(0)
    model = cabins.CaBins(cabins.Config(backbone="tiny", distance_class=kind))
    prediction = model(torch.randn(2, 3, 64, 64))
    cabins.total_loss(prediction, torch.rand(2, 1, 64, 64) * 9 + 0.5, 1e-3).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
    assert model.prompts.grad.abs().sum() > 0  # through the frozen text encoder


def test_forward_asks_nothing_of_the_host(tiny):
    """No value of a tensor is read on the way: the meta device has none to read."""
    model = cabins.CaBins(TINY).to("meta").eval()
    assert model(torch.empty(2, 3, 96, 128, device="meta")).depth.shape == (2, 1, 96, 128)


def test_forward_compiles_as_one_graph(tiny):
    image = torch.randn(2, 3, 96, 128, generator=generator())
    compiled = torch.compile(tiny, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(image).depth, tiny(image).depth, 1e-5)


@pytest.mark.parametrize("max_depth", [10.0, 80.0])
def test_bfloat16_agrees_within_a_hundredth(max_depth):
    torch.manual_seed(0)
    model = cabins.CaBins(cabins.Config(backbone="tiny", max_depth=max_depth)).eval()
    torch.nn.init.normal_(model.depth_decoder.logits.weight, std=30)  # as sure as a trained one
    image = torch.randn(2, 3, 96, 128, generator=generator())
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(image)
    assert exact.depth.std() > 0.02 * max_depth
    for name, tensor in rounded._asdict().items():
        assert tensor.dtype == torch.float32, name
    assert ((rounded.depth - exact.depth).abs() / exact.depth).mean() < 0.01
    assert ((rounded.centers - exact.centers).abs() / exact.centers).max() < 0.01
    assert ((rounded.cabins - exact.cabins).abs() / exact.cabins).max() < 0.01


def test_no_logits_are_kept_beside_the_probabilities(tiny):
    """The largest map of all is kept once for Eq. 5, in float32, and once before the logits."""
    kept = []
    pyramid = [torch.randn(1, c, 64 // 2**i, 96 // 2**i) for i, c in enumerate((40, 80, 160, 320))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        p = tiny.depth_decoder(pyramid, torch.randn(1, 8, 8, 12))
        cabins.expected_depth(torch.linspace(1, 9, 256)[None], p)
    maps = {t.data_ptr() for t in kept if t.numel() == p.numel()}
    assert len(maps) == 2 and p.data_ptr() in maps


# ---- The released network, on made weights -------------------------------------------------------

PREDICTED_CABINS = [
    "0.8196",
    "2.0312",
    "3.0201",
    "3.9133",
    "5.197",
    "6.891",
    "8.0013",
    "9.3794",
    "0.8176",
    "2.027",
    "3.018",
    "3.9136",
    "5.1963",
    "6.8924",
    "8.0021",
    "9.376",
]
GRADIENT_NORMS = {
    "contexts": 0.012867416325285208,
    "gamma": 0.0005481540862108899,
    "clip_model.visual.conv1.weight": 0.2296860701479876,
    "context_decoder.decoder.5.cross_attn.k_proj.weight": 7.897430609852824e-06,
    "decoder.up3._net.3.weight": 79.12691072372812,
    "computeAdaptiveBin.regressor.4.weight": 1.2583868473592394,
}


def their_name(name: str) -> str:
    for theirs, ours in cabins.RELEASED_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A checkpoint as the authors' are, with the goldens' weights."""
    architecture = cabins.BACKBONES["RN101"]._replace(context_length=30)
    with torch.device("meta"):  # names and shapes alone
        state = cabins.CaBins(cabins.Config(), cabins.CLIP(architecture)).state_dict()
    state["prompts"] = state["prompts"][None]
    state["clip.logit_scale"] = torch.tensor(1 / 0.07).log()
    made = {}
    for ours, tensor in state.items():
        name = their_name(ours)
        made[name] = tensor if name == "clip_model.logit_scale" else made_tensor(name, tensor.shape)
    if GOLDENS.is_dir():
        shapes = json.loads((GOLDENS / "cabins_rn101_state_dict.json").read_text())
        assert {k: list(v.shape) for k, v in made.items()} == shapes
    path = tmp_path_factory.mktemp("released") / "CaBins_nyu.pt"
    made = {f"module.{name}": tensor for name, tensor in made.items()}
    torch.save({"model": made, "optimizer": {}, "epoch": 24}, path)
    return path


def made_truth() -> torch.Tensor:
    target = np.minimum(np.abs(normal("depth", (2, 1, 96, 128))) * np.float32(10 / 3), 10)
    return torch.from_numpy(np.where(target < 0.2, 0, target).astype(np.float32))


def test_released_network(released):
    with pytest.raises(ValueError, match="is the authors': give max_depth, 10 for NYU or 80"):
        cabins.load_checkpoint(released)
    model = cabins.load_checkpoint(released, max_depth=10.0)
    image = torch.from_numpy(normal("image", (2, 3, 96, 128)))
    target = made_truth()
    prediction = model(image)
    assert [str(round(e, 4)) for e in prediction.cabins.flatten().tolist()] == PREDICTED_CABINS
    if GOLDENS.is_dir():
        golden = np.load(GOLDENS / "cabins_rn101_nyu.npz")
        close(prediction.centers, golden["centers"])
        close(prediction.similarity, golden["similarity"])
        close(model(image, upsample=False).depth, golden["depth"])
    mask = target > 1e-3
    assert mask.sum() == 23429
    chamfer = cabins.chamfer_loss(prediction.centers, target, mask)
    assert chamfer.item() == pytest.approx(0.0005933056818321347, rel=1e-4)
    g = (prediction.depth[mask].log() - target[mask].log()).double()
    unbiased = 10 * (g.var() + 0.15 * g.mean() ** 2).sqrt()
    assert unbiased.item() == pytest.approx(9.66595458984375, rel=1e-4)
    (unbiased + 0.1 * chamfer).backward()
    norms = {their_name(n): p.grad.norm() for n, p in model.named_parameters() if p.requires_grad}
    for name, norm in GRADIENT_NORMS.items():
        assert norms[name].item() == pytest.approx(norm, rel=1e-3), name


# ---- Sec. 3.3  Losses, Eq. 6 to 8 ----------------------------------------------------------------


def test_both_forms_of_silog_agree():
    depth, target = torch.rand(2, 2, 1, 30, 40, generator=generator()).mul(9).add(0.5).double()
    mask = torch.rand(2, 1, 30, 40, generator=generator(1)) < 0.6
    g = depth[mask].log() - target[mask].log()
    variance_form = 10 * (g.var(correction=0) + 0.15 * g.mean() ** 2).sqrt()
    assert cabins.silog_loss(depth, target, mask).item() == pytest.approx(variance_form.item())


def test_losses_without_error_or_without_truth_have_finite_gradients():
    depth = torch.full((2, 1, 8, 8), 2.0, requires_grad=True)
    centers = torch.linspace(1, 9, 16).repeat(2, 1).requires_grad_()
    for target in (torch.full((2, 1, 8, 8), 2.0), torch.zeros(2, 1, 8, 8)):
        prediction = cabins.Prediction(depth, centers, None, None)
        cabins.total_loss(prediction, target, 1e-3).backward()
        assert depth.grad.isfinite().all() and centers.grad.isfinite().all()
    assert cabins.chamfer_loss(centers, target, target > 0).item() == 0


def test_random_networks_images_and_truths():
    """Finite losses and gradients and depth inside the range, whatever the sizes and the truth."""
    random = np.random.default_rng(0)
    clip = cabins.CLIP(cabins.BACKBONES["tiny"])
    kinds = ("dense", "sparse", "one pixel", "none", "constant", "the range's ends")
    for i in range(72):
        torch.manual_seed(i)
        distance_class = str(random.choice(cabins.DISTANCE_CLASSES))
        n_cabins = 8 if distance_class == "semantic" else int(random.integers(1, 10))
        low = 10 ** random.uniform(-4, 0)
        sizes = {"n_cabins": n_cabins, "n_bins": n_cabins * int(random.integers(2, 20))}
        sizes |= {"n_prompts": int(random.integers(0, 20))}
        sizes |= {"min_depth": low, "max_depth": low * 10 ** random.uniform(0.1, 3)}
        model = cabins.CaBins(cabins.Config("tiny", distance_class, **sizes), clip).train()
        batch, height, width = 1 + i % 2, *random.integers(64, 90, 2)  # of one: BatchNorm as well
        top = model.config.max_depth
        target = low + (top - low) * torch.rand(batch, 1, height, width)
        if (kind := kinds[i % len(kinds)]) == "sparse":
            target *= torch.rand_like(target) < 0.01
        elif kind in ("one pixel", "none"):
            kept, target = target[0, 0, 5, 7].item(), torch.zeros_like(target)
            target[0, 0, 5, 7] = kept if kind == "one pixel" else 0
        elif kind == "constant":
            target[:] = top / 2 + low / 2
        elif kind == "the range's ends":
            target = torch.where(target > top / 2, top, low)
        prediction = model(torch.randn(batch, 3, height, width) * random.uniform(0, 3))
        loss = cabins.total_loss(prediction, target, low)
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients), (i, kind, sizes)
        assert low < prediction.depth.min() and prediction.depth.max() < top, (i, kind, sizes)


def brute_force_chamfer(centers, target, mask):
    total = 0
    for c, x, valid in zip(centers, target, mask):
        table = (x[valid][:, None] - c).square()
        total += table.min(1).values.mean() + table.min(0).values.mean() if valid.any() else 0
    return total / len(centers)


@pytest.mark.parametrize("spread", [10.0, 0.05])  # 0.05: most centres see no pixel
def test_chamfer_equals_brute_force(spread):
    g = generator()
    target = 4 + spread * (torch.rand(3, 1, 20, 30, generator=g) - 0.4)
    mask = torch.rand(3, 1, 20, 30, generator=g) < 0.7
    mask[1] = False
    mask[2] = torch.arange(600).reshape(1, 20, 30) == 7  # one valid pixel
    gradients = []
    for chamfer in (cabins.chamfer_loss, brute_force_chamfer):
        c = (torch.rand(3, 64, generator=generator(1)) * 10).sort(1).values.requires_grad_()
        loss = chamfer(c, target, mask)
        loss.backward()
        gradients.append((loss.detach(), c.grad))
    close(gradients[0][0], gradients[1][0], 1e-5)
    close(gradients[0][1], gradients[1][1], 1e-5)


def test_total_loss_upsamples_the_prediction_first():
    target = torch.rand(2, 1, 20, 30, generator=generator()) * 9 + 0.5
    depth = torch.rand(2, 1, 10, 15, generator=generator(1)) * 9 + 0.5
    centers = torch.linspace(1, 9, 16).repeat(2, 1)
    loss = cabins.total_loss(cabins.Prediction(depth, centers, None, None), target, 1e-3)
    upsampled = F.interpolate(depth, (20, 30), mode="bilinear", align_corners=True)
    mask = target > 1e-3
    expected = cabins.silog_loss(upsampled, target, mask)
    expected += 0.1 * cabins.chamfer_loss(centers, target, mask)
    assert loss.item() == pytest.approx(expected.item())


# ---- Sec. 4.3  Metrics ---------------------------------------------------------------------------


def test_depth_metrics_by_hand():
    metrics = cabins.depth_metrics(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
    expected = {
        "abs_rel": 0.5,
        "sq_rel": 1.0,
        "rmse": 2**0.5,
        "rmse_log": math.log(2) / 2**0.5,
        "log10": math.log10(2) / 2,
        "d1": 0.5,
        "d2": 0.5,
        "d3": 0.5,
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="not empty"):
        cabins.depth_metrics(torch.empty(0), torch.empty(0))


@needs_samples
def test_metrics_of_a_surface_on_real_pairs():
    """The released code's metrics of a made surface on three pairs of NYU."""
    nyu = data.DepthDataset("nyu", SAMPLES / "nyu", SAMPLES / "nyu" / "split.txt")
    y, x = torch.meshgrid(torch.arange(480.0), torch.arange(640.0), indexing="ij")
    surface = 10 * (0.30 + 0.25 * (x / 37).sin() * (y / 23).cos())
    metrics = evaluation.evaluate(lambda image: surface[None, None], nyu)
    known = {"abs_rel": 0.4585017, "rmse": 1.8179230, "log10": 0.2152407, "d1": 0.3069172}
    for name, value in known.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    "name, size, window, pixels",
    [
        ("nyu", (480, 640), "eigen", 238_560),
        ("kitti", (375, 1242), "nested", 232_574),
        ("kitti", (375, 1242), "full", 251_354),
        ("kitti", (370, 1224), "full", 244_455),
    ],
)
def test_window_sizes(name, size, window, pixels):
    rows, columns = data.evaluation_windows(name, *size)[window]
    assert rows.start >= 0 and columns.start >= 0
    assert (rows.stop - rows.start) * (columns.stop - columns.start) == pixels


class Pairs(data.DepthDataset):
    """Made pairs in the place of toy rooms."""

    def __init__(self, depths):
        super().__init__("toy")
        self.depths, self.pairs = depths, list(range(len(depths)))

    def __getitem__(self, i):
        depth = self.depths[i]
        size = torch.tensor(depth.shape[1:])
        return {"image": torch.zeros(3, *depth.shape[1:]), "depth": depth, "path": "", "size": size}


def test_evaluation_protocol():
    few, many = torch.zeros(1, 64, 64), torch.full((1, 64, 64), 2.0)
    few[0, 0, :2] = 4.0
    few[0, 0, 2], few[0, 0, 3] = 10.0, 1e-3  # at the range's ends: not measured
    pairs = Pairs([few, many, torch.zeros(1, 64, 64)])  # the last has no truth: left out
    metrics = evaluation.evaluate(lambda image: torch.full((1, 1, 64, 64), 2.0), pairs)
    assert metrics["abs_rel"] == pytest.approx(0.25)  # images count alike: 1/2 and 0
    infinite = torch.full((1, 1, 64, 64), torch.inf)
    far = evaluation.evaluate(lambda image: infinite, Pairs([many]))
    assert far["rmse"] == pytest.approx(8)  # inf is the maximum
    near = evaluation.evaluate(lambda image: infinite * 0, Pairs([many]))
    assert near["rmse"] == pytest.approx(2 - 1e-3)  # NaN is the minimum
    with pytest.raises(ValueError, match="none of the 1 images has ground truth"):
        evaluation.evaluate(lambda image: infinite, Pairs([torch.zeros(1, 64, 64)]))


def test_kept_predictions_give_the_same_row(tiny, tmp_path):
    truth = [data.DepthDataset("toy")[i]["depth"] for i in range(3)]
    pairs = Pairs(truth)
    predict = evaluation.keep_predictions(lambda image: next(depths)[None] * 1.1, pairs, tmp_path)
    depths = iter(truth)
    row = evaluation.evaluate(predict, pairs)
    files = iter(sorted(tmp_path.iterdir()))
    again = evaluation.evaluate(
        lambda image: torch.from_numpy(data.read_depth(next(files)) / 1000)[None, None], pairs
    )
    assert again == pytest.approx(row, abs=1e-3) and row["abs_rel"] == pytest.approx(0.1, rel=1e-3)
    for label, metrics in (("a", row), ("b", again)):
        data.append_row(tmp_path / "results.csv", {"label": label, "protocol": "how", **metrics})
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("label,protocol,abs_rel") and len(lines) == 3


def test_flip_averaging_is_at_the_decoders_size(tiny):
    image = torch.randn(1, 3, 96, 128, generator=generator())
    with torch.no_grad():
        straight = tiny(image, upsample=False).depth
        mirrored = tiny(image.flip(-1), upsample=False).depth.flip(-1)
    assert straight.shape == (1, 1, 48, 64)
    expected = cabins.resize((straight + mirrored) / 2, (96, 128))
    close(evaluation.predictor(tiny)(image), expected, 1e-5)
    close(evaluation.predictor(tiny, flip=False)(image), cabins.resize(straight, (96, 128)), 1e-5)


def test_quoted_rows_are_the_papers():
    for name in ("nyu", "kitti"):
        lines = evaluation.format_table(name, {}).splitlines()
        columns = len(lines[0].split())
        assert all(len(line.split("(quoted)")[1].split()) == columns for line in lines[1:])
    assert "CaBins (quoted)           0.120    0.401" in evaluation.format_table("nyu", {})


# ---- Your own pictures, and figures --------------------------------------------------------------


def run_eval_main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    evaluation.main()


def run_eval(monkeypatch, *arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        run_eval_main(monkeypatch, *arguments)
    return stop.value.code


def test_pictures_of_every_kind(tiny, tmp_path, monkeypatch, capsys):
    cabins.save_checkpoint(tmp_path / "tiny.pt", tiny, args={"data": "toy"})
    folder = tmp_path / "in"
    folder.mkdir()
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120), np.uint8))
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1"):
        suffix = "tif" if mode == "CMYK" else "png"
        grey.convert(mode).save(folder / f"{mode}.{suffix}")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    grey.save(folder / "phone.jpg", exif=exif)
    grey.resize((30, 20)).save(folder / "small.png")
    grey.save(folder / "phone.png")  # the same name twice
    (folder / "broken.jpg").write_bytes((folder / "phone.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    options = ("--images", folder, "--out", out, "--ply", "--fov", 60, "--explain")
    assert run_eval(monkeypatch, tmp_path / "tiny.pt", *options) == 1
    printed = capsys.readouterr()
    assert "broken.jpg is left out: " in printed.err and "cannot be read as a pict" in printed.err
    assert "10 of 11 pictures written" in printed.out and "median" in printed.out
    names = {p.name for p in out.iterdir()}
    assert len(names) == 60 and not any(name.endswith(".partial") for name in names)
    depth = Image.open(out / "phone_depth_mm.png")
    assert depth.size == (90, 120) and depth.mode.startswith("I")  # upright
    assert depth.text["Description"].startswith("depth by CaBins, ")
    assert depth.text["Description"].endswith("tiny.pt, in 1/1000 m")
    assert Image.open(out / "phone_colour.png").size == (90, 120)
    line = next(line for line in printed.out.splitlines() if "phone.jpg: " in line)
    assert all(name in line for name in ("phone_std_mm.png", "phone_explained.png", "phone.ply"))
    assert "focal length of 77.9 pixels, from --fov" in line
    found = cabins.infer(tiny, folder / "phone.jpg")
    for name, values in (("depth", found.depth), ("std", found.std)):
        written = np.asarray(Image.open(out / f"phone_{name}_mm.png"))
        assert np.array_equal(written, (values * 1000).round())
    grey_line = next(line for line in printed.out.splitlines() if "deep.png: " in line)
    assert f"greatest grey value, {int(np.max(grey)) * 257}, is white" in grey_line
    assert 0 < np.asarray(depth).max() < 10_000
    assert Image.open(out / "phone__depth_mm.png").size == (120, 90)
    deep = cabins.read_picture(folder / "deep.png") / 255
    close(deep, np.asarray(grey.convert("RGB")) / 255, 0.01)
    # the point cloud, read back
    header, points = (out / "L.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 10800" in header and len(points) == 10800 * 15
    x, y, z = np.frombuffer(points[:12], "<f4")
    focal = 60 / math.tan(math.radians(30))
    assert (x, y) == pytest.approx((-59.5 * z / focal, -44.5 * z / focal), rel=1e-5)
    assert list(points[12:15]) == [np.asarray(grey)[0, 0]] * 3


def test_pictures_beyond_65_m_and_none(tmp_path, monkeypatch):
    far = cabins.CaBins(cabins.Config(backbone="tiny", max_depth=80.0, image_width=128))
    cabins.save_checkpoint(tmp_path / "far.pt", far)
    Image.new("RGB", (80, 70)).save(tmp_path / "a.png")
    command = (tmp_path / "far.pt", "--out", tmp_path / "out", "--images")
    assert run_eval(monkeypatch, *command, tmp_path / "*.png") == 0
    for name in ("depth", "std"):
        picture = Image.open(tmp_path / "out" / f"a_{name}_cm.png")
        assert picture.text["Description"].endswith("in 1/100 m")
    with pytest.raises(FileNotFoundError, match="none.png: no picture there"):
        run_eval_main(monkeypatch, *command, tmp_path / "none.png")
    own = (tmp_path / "far.pt", "--out", tmp_path, "--images", tmp_path / "a.png")
    with pytest.raises(ValueError, match="is the folder of .*a.png, which must stay"):
        run_eval_main(monkeypatch, *own)
    for option, value in (("--fov", 180), ("--focal", "nan"), ("--explain", 0)):
        with pytest.raises(ValueError, match=f"{option} is .*; it must be above 0 and below"):
            run_eval_main(monkeypatch, *command, tmp_path / "a.png", "--ply", option, value)


def test_thin_pictures_and_odd_values(tiny, tmp_path, monkeypatch, capsys):
    cabins.save_checkpoint(tmp_path / "tiny.pt", tiny, args={"data": "toy"})
    Image.new("RGB", (1, 300)).save(tmp_path / "$thin_{$.png")
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "float.tif")
    options = ("--images", tmp_path, "--out", tmp_path / "out")
    assert run_eval(monkeypatch, tmp_path / "tiny.pt", *options) == 1
    assert "the picture has floating-point values" in capsys.readouterr().err
    assert Image.open(tmp_path / "out" / "$thin_{$_depth_mm.png").size == (1, 300)
    with torch.no_grad():
        tiny.prompts[0, 0], kept = math.nan, tiny.prompts[0, 0].item()
        cabins.save_checkpoint(tmp_path / "nan.pt", tiny)
        tiny.prompts[0, 0] = kept
    with pytest.raises(ValueError, match="nan.pt holds values that are not finite, in prompts"):
        cabins.load_checkpoint(tmp_path / "nan.pt")


def test_what_is_explained_is_the_networks(tiny, tmp_path, monkeypatch):
    image = torch.randn(1, 3, 96, 128, generator=generator())
    found, s = cabins.look(tiny, image, (90, 120))
    with torch.no_grad():
        prediction = tiny(image)
    close(found.centers, prediction.centers[0], 1e-5)
    close(found.cabins, prediction.cabins[0], 1e-6)
    close(s, prediction.similarity[0], 1e-5)
    assert found.depth.shape == found.std.shape == (90, 120)
    assert 0 < found.std.min() and found.std.max() < 10 / 2
    shown = []
    monkeypatch.setattr(evaluation, "show_bins", lambda _, found, texts, *__: shown.extend(texts))
    picture = np.zeros((90, 120, 3), np.uint8)
    evaluation.draw_explained(tmp_path / "a.png", picture, tiny.config, found, s)
    assert shown == [str(round(e, 4)) for e in prediction.cabins[0].tolist()]


def test_the_readmes_python(tiny, tmp_path, monkeypatch, capsys):
    code = (HERE / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    cabins.save_checkpoint(tmp_path / "runs" / "toy" / "best.pt", tiny)
    Image.new("RGB", (100, 80)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)  # noqa: S102
    assert found["depth"].shape == (80, 100) and "(256,)" in capsys.readouterr().out


# ---- Sec. 4.2  Data ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nyu", "kitti", "toy"])
def test_augmentation_keeps_image_and_depth_together(name):
    recipe = data.DATASETS[name]._replace(gamma=0.0, brightness=0.0, colour=0.0)
    h, w = {"nyu": (427, 565), "kitti": (352, 1216), "toy": (96, 128)}[name]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    # rows and columns in the image, as brightness of green and red, and in the depth, as a number
    image = torch.stack([x * 255 / (w - 1), y * 255 / (h - 1), torch.full((h, w), 255)])
    image = image.round().byte().expand(8, -1, -1, -1)
    depth = (y * w + x + 1.0).expand(8, 1, h, w)
    out, found = data.augment(image, depth, recipe, generator(3))
    assert out.shape[2:] == found.shape[2:] == recipe.crop
    mean, std = torch.tensor([cabins.Config.image_mean, cabins.Config.image_std])[..., None, None]
    out = out * std + mean
    inside = (found[:, 0] > 0) & (out[:, 2] > 0.999)  # blue fades where zeros come in
    assert inside.float().mean() > 0.95
    number = found[:, 0].long() - 1
    column, row = out[:, 0] * (w - 1), out[:, 1] * (h - 1)
    assert (column - number % w)[inside].abs().max() < 0.6 + (w - 1) / 510 + 0.1
    assert (row - number // w)[inside].abs().max() < 0.6 + (h - 1) / 510 + 0.1
    mirrored = (number % w)[:, recipe.crop[0] // 2].diff(dim=1).median(1).values
    assert set(mirrored.tolist()) == {1, -1}  # some are flipped, some are not
    again = data.augment(image, depth, recipe, generator(3))
    assert torch.equal(again[1], found)


def test_augmentation_recolours_inside_the_recipe():
    image = torch.full((64, 3, 96, 128), 128, dtype=torch.uint8)
    out, _ = data.augment(image, torch.ones(64, 1, 96, 128), "toy", generator())
    mean, std = torch.tensor([cabins.Config.image_mean, cabins.Config.image_std])[..., None, None]
    value = (out * std + mean)[:, :, 48, 64]
    same = ((value - 128 / 255).abs() < 1e-4).all(1)
    assert 16 < same.sum() < 48  # half of them
    low, high = (128 / 255) ** 1.1 * 0.9 * 0.9, (128 / 255) ** 0.9 * 1.1 * 1.1
    assert value.min() > low and value.max() < high


def test_toy_rooms_are_exact_and_reproducible():
    image, depth = data.draw_room(5)
    again = data.draw_room(5)
    assert np.array_equal(image, again[0]) and np.array_equal(depth, again[1])
    assert image.shape == (96, 128, 3) and image.dtype == np.uint8
    assert depth.shape == (96, 128) and 0.3 < depth.min() and depth.max() < 10
    # walls are planes, and on a plane 1 / depth is linear in the pixel: no second difference
    flat = np.abs(np.diff(1 / depth.astype(np.float64), n=2, axis=1)) < 1e-5
    assert flat.mean() > 0.7
    train_set, test_set = data.DepthDataset("toy", train=True), data.DepthDataset("toy")
    assert not set(train_set.pairs) & set(test_set.pairs) and len(test_set) == 64
    assert train_set[0]["image"].dtype == torch.uint8
    assert test_set[0]["image"].dtype == torch.float32


def write_pair(folder: Path, name: str, height=480, width=640, depth=1500):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (10, 20, 30)).save(folder / f"rgb_{name}.jpg")
    values = np.full((height, width), depth, np.uint16)
    Image.fromarray(values).save(folder / f"sync_depth_{name}.png")


def test_nyu_files_are_found_whatever_folder_and_suffix(tmp_path):
    write_pair(tmp_path / "sync" / "kitchen", "1")
    split = tmp_path / "list.txt"
    split.write_text("/kitchen/rgb_1.png /kitchen/sync_depth_1.png 518.8579\r\n\r\n")
    pair = data.DepthDataset("nyu", tmp_path, split, train=True)[0]
    assert pair["image"].shape == (3, 427, 565) and pair["image"].dtype == torch.uint8
    assert pair["depth"].shape == (1, 427, 565) and pair["depth"].unique().tolist() == [1.5]
    pair = data.DepthDataset("nyu", tmp_path, split)[0]
    assert pair["image"].shape == (3, 480, 640) and pair["image"].dtype == torch.float32


def test_own_lists(tmp_path):
    write_pair(tmp_path / "x", "1", 240, 320)
    write_pair(tmp_path / "x", "2", 200, 320)
    split = tmp_path / "list.txt"
    split.write_text("x/rgb_1.jpg x/sync_depth_1.png\n")
    own = data.DepthDataset("list", tmp_path, split, True, depth_scale=500, max_depth=20)
    assert own[0]["depth"].max() == 3 and own.recipe.max_depth == 20
    image, depth = data.augment(
        own[0]["image"][None], own[0]["depth"][None], own.recipe, generator()
    )
    assert image.shape[2:] == depth.shape[2:] == (192, 256)
    with pytest.raises(ValueError, match="'list' needs --train-split"):
        data.DepthDataset("list", tmp_path, train=True)
    split.write_text("x/rgb_1.jpg x/sync_depth_1.png\nx/rgb_2.jpg x/sync_depth_2.png\n")
    with pytest.raises(
        ValueError, match="rgb_2.jpg has 200 x 320 pixels, but the first of the list 240 x 320"
    ):
        data.DepthDataset("list", tmp_path, split, train=True)[1]


def test_labelled_mat(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py, which is optional, is not installed")
    depth = np.random.default_rng(0).uniform(1, 9, (3, 640, 480)).astype(np.float32)
    with h5py.File(tmp_path / "nyu.mat", "w") as file:
        file["images"] = (
            np.arange(3 * 3 * 640 * 480, dtype=np.uint32).astype(np.uint8).reshape(3, 3, 640, 480)
        )
        file["rawDepths"] = depth
    split = tmp_path / "list.txt"
    split.write_text("bath/rgb_00002.jpg bath/sync_depth_00002.png 518.8579\n")
    nyu = data.DepthDataset("nyu", tmp_path / "nyu.mat", split)
    sample = nyu[0]
    assert torch.equal(sample["depth"][0], torch.from_numpy(depth[2].T))
    mean, std = torch.tensor([cabins.Config.image_mean, cabins.Config.image_std])[..., None, None]
    image = (sample["image"] * std + mean) * 255
    assert image[:, :7].abs().max() < 1e-3 and image[:, :, 632:].abs().max() < 1e-3  # black frame
    value = (2 * 3 * 640 * 480 + 1 * 640 * 480 + 20 * 480 + 10) % 256  # green, column 20, row 10
    assert image[1, 10, 20].item() == pytest.approx(value, abs=1e-3)
    split.write_text("bath/rgb.jpg bath/depth.png 518.8579\n")
    with pytest.raises(FileNotFoundError, match="2 of the 2 files .* not below .*: bath/rgb.jpg"):
        data.DepthDataset("nyu", tmp_path / "nyu.mat", split)
    split.write_text("bath/rgb_00003.jpg bath/sync_depth_00003.png 518.8579\n")
    with pytest.raises(ValueError, match="nyu.mat has no pair 3"):
        data.DepthDataset("nyu", tmp_path / "nyu.mat", split)[0]
    with pytest.raises(ValueError, match="can only be NYU's test set; nyu train needs a folder"):
        data.DepthDataset("nyu", tmp_path / "nyu.mat", split, train=True)


def test_checking_a_data_set(tmp_path, monkeypatch, capsys):
    for i in range(3):
        write_pair(tmp_path / "sync", str(i), depth=2000 + i)
    split = tmp_path / "list.txt"
    split.write_text("".join(f"rgb_{i}.jpg sync_depth_{i}.png 1\n" for i in range(3)))
    monkeypatch.chdir(tmp_path)
    command = [
        "data.py",
        "nyu",
        "--root",
        ".",
        "--train-split",
        "list.txt",
        "--test-split",
        "list.txt",
    ]
    monkeypatch.setattr(sys, "argv", command)
    data.main()
    printed = capsys.readouterr().out
    assert "train: 427 x 565 pixels, 100% with depth, median 2.00 m" in printed
    assert "odd" not in printed
    assert Image.open("runs/check_nyu_0_to_10_m.png").size[0] > 3 * 256
    monkeypatch.setattr(sys, "argv", [*command, "--depth-scale", "100"])
    data.main()  # a warning, as the range may really be so wide
    assert "median is odd for depths to 10.0 m: wrong --depth-scale" in capsys.readouterr().out


@needs_samples
def test_real_kitti_pairs():
    split = SAMPLES / "kitti" / "split.txt"
    kitti = data.DepthDataset("kitti", SAMPLES / "kitti", split)
    assert len(kitti) == 3 and kitti.n_left_out == 1
    sample = kitti[0]
    assert sample["image"].shape == (3, 352, 1216) and sample["size"].tolist() == [375, 1242]
    truth = sample["depth"]
    assert (
        truth.shape == (1, 352, 1216) and 60 < truth.max() < 85 and (truth > 0).float().mean() > 0.1
    )
    windows = evaluation.evaluate_windows(lambda image: truth[None].clamp(min=1), kitti)
    assert list(windows) == ["nested", "full"]
    assert windows["nested"]["d1"] > 1 / 3  # one image of three is its own truth


# ---- Sec. 4.2  Fetching, from a server on this machine -------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` by ranges. `faults` says what goes wrong, by the end of the path, and how often."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[dict[str, list]] = {}
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append((self.path, asked := self.headers.get("Range")))
        content = self.files.get(self.path)
        fault = next((f for end, f in self.faults.items() if self.path.endswith(end)), ["", 0])
        kind = fault[0] if fault[1] else ""
        if content is None or kind == "404":
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start, end = 0, len(content) - 1
        if asked and kind != "no ranges":
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(end, int(last)) if first and last else end
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        else:
            self.send_response(200)
        part = content[start : end + 1]
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if kind == "breaks":
            fault[1] -= 1
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        elif kind == "wrong bytes" and end < len(content) - 1:
            self.wfile.write(bytes(b ^ 1 for b in part))
        else:
            self.wfile.write(part)


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def picture_bytes(height: int, width: int, depth: int | None = None) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(height + (depth or 0))
    if depth is None:
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(buffer, "png")
    else:
        values = rng.integers(depth // 2, depth + 1, (height, width)).astype(np.uint16)
        Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


@functools.cache
def served() -> dict[str, bytes]:
    """Small archives in the layouts of the real ones, by path."""
    depth = "2011_09_26_drive_000{}_sync/proj_depth/groundtruth/{}/000000000{}.png"
    files = {}
    for drive, number in ((1, 5), (2, 7)):
        name = f"2011_09_26_drive_000{drive}"
        members = {
            f"2011_09_26/{name}_sync/{camera}/data/000000000{n}.png": picture_bytes(376 - n, 1242)
            for camera in ("image_02", "image_03")
            for n in (number, number + 1)
        }
        files[f"/raw/{name}/{name}_sync.zip"] = archive_of(members)
    members = {
        f"train/{depth.format(1, 'image_02', 5)}": picture_bytes(371, 1242, 5000),
        f"train/{depth.format(1, 'image_03', 5)}": picture_bytes(371, 1242, 9),
        f"val/{depth.format(2, 'image_02', 7)}": picture_bytes(369, 1242, 7000),
        "../../evil/rgb_9.jpg": b"evil",
    }
    files["/depth/data_depth_annotated.zip"] = archive_of(members)
    members = {}
    for i in range(3):
        members[f"sync/kitchen/rgb_0000{i}.jpg"] = picture_bytes(480, 640)
        members[f"sync/kitchen/sync_depth_0000{i}.png"] = picture_bytes(480, 640, 2000 + i)
    files["/sync.zip"] = archive_of(members | {"../../evil/rgb_9.jpg": b"evil"})
    files["/nyu.mat"] = np.random.default_rng(0).bytes(300_000)
    return files


KITTI_LIST = """\
2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000005.jpg 2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000005.png 721.5
2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000007.jpg 2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000007.png 721.5
2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000008.jpg None 721.5
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What is served, what was asked for, and what goes wrong; two lists of some of the files."""
    pytest.importorskip("remotezip", reason="remotezip, which is optional, is not installed")
    files = served()
    handler = type("Handler", (Server,), {"files": files, "faults": {}, "asked": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}"
    sources = {
        "nyu_train": f"{url}/sync.zip",
        "nyu_test": f"{url}/nyu.mat",
        "kitti_raw": url + "/raw/{drive}/{drive}_sync.zip",
        "kitti_depth": f"{url}/depth/data_depth_annotated.zip",
    }
    assert sources.keys() == data.SOURCES.keys()
    monkeypatch.setattr(data, "SOURCES", sources)
    md5 = hashlib.md5(files["/nyu.mat"], usedforsecurity=False).hexdigest()
    monkeypatch.setattr(data, "NYU_MAT_MD5", md5)
    (tmp_path / "kitti.txt").write_text(KITTI_LIST)
    pairs = "/kitchen/rgb_0000{0}.jpg /kitchen/sync_depth_0000{0}.png 518.8579\n"
    (tmp_path / "nyu.txt").write_text(pairs.format(0) + pairs.format(2))
    yield handler
    httpd.shutdown()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fetch(name: str, folder: Path) -> dict[str, bytes]:
    split = folder / f"{name}.txt"
    data.fetch(name, folder / "root", split, split)
    return files_below(folder / "root")


def test_fetching_kitti_gets_what_the_list_names_and_no_more(server, tmp_path, capsys):
    found = fetch("kitti", tmp_path)
    assert len(found) == 4 and not any(".partial" in name for name in found)
    image = "raw/2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000007.png"
    assert found[image] == picture_bytes(369, 1242)
    printed = capsys.readouterr().out
    assert "4 files from 127.0.0.1" in printed and "CC BY-NC-SA 3.0" in printed
    kitti = data.DepthDataset("kitti", tmp_path / "root", tmp_path / "kitti.txt")
    assert len(kitti) == 2 and kitti[1]["depth"].max().item() == pytest.approx(7000 / 256, rel=1e-3)
    # what is there is not fetched again, and what was lost is
    server.asked.clear()
    fetch("kitti", tmp_path)
    assert not server.asked and "0 files" in capsys.readouterr().out
    (tmp_path / "root" / image).unlink()
    assert fetch("kitti", tmp_path) == found and "1 files" in capsys.readouterr().out


def test_fetching_nyu_and_its_mat(server, tmp_path):
    found = fetch("nyu", tmp_path)
    names = [f"sync/kitchen/{kind}_0000{i}" for i in (0, 2) for kind in ("rgb", "sync_depth")]
    # the test pairs come from the .mat, though here the list names the same ones
    assert {name.rsplit(".", 1)[0] for name in found} == {*names, "nyu_depth_v2_labeled"}


def test_the_mat_gets_its_name_when_it_is_right(server, tmp_path):
    test, mat = tmp_path / "test.txt", tmp_path / "root" / data.NYU_MAT
    test.write_text("bath/rgb_00001.jpg bath/sync_depth_00001.png 1\n")
    call = ("nyu", tmp_path / "root", tmp_path / "nyu.txt", test)
    server.faults["nyu.mat"] = ["breaks", 1]
    with pytest.raises(ValueError, match="MD5, which is deleted|fetched|IncompleteRead|broke off"):
        data.fetch(*call)
    assert not mat.exists() and not Path(f"{mat}.partial").exists()
    data.fetch(*call)
    assert mat.read_bytes() == server.files["/nyu.mat"]
    data.fetch(*call)
    assert len([path for path, _ in server.asked if path == "/nyu.mat"]) == 2


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("404", "404"),
        ("no ranges", "range"),
        ("wrong bytes", "CRC|[Bb]ad|broke off"),
        ("breaks", "Connection broken|IncompleteRead|broke off"),
    ],
)
def test_a_host_that_fails_is_one_sentence_and_what_came_stays(fault, sentence, server, tmp_path):
    server.faults["data_depth_annotated.zip"] = [fault, 1000]
    with pytest.raises(ValueError, match=sentence) as error:
        fetch("kitti", tmp_path)
    assert "\n" not in str(error.value) and "docs/data.md, By hand" in str(error.value)
    found = files_below(tmp_path / "root")
    assert not any(name.startswith("data_depth") or ".partial" in name for name in found)
    server.faults.clear()
    assert len(fetch("kitti", tmp_path)) == 4


def test_a_break_in_the_middle_is_tried_again(server, tmp_path):
    server.faults["drive_0001_sync.zip"] = ["breaks", 1]
    assert len(fetch("kitti", tmp_path)) == 4


def test_archives_that_a_user_has_are_read_from_there(server, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for path, content in server.files.items():
        if path.endswith(".zip"):
            (root / path.rsplit("/", 1)[1]).write_bytes(content)
    (root / data.NYU_MAT).write_bytes(b"the user's own")
    assert len(fetch("kitti", tmp_path)) == 5 + 4 and len(fetch("nyu", tmp_path)) == 9 + 4
    assert not server.asked


def test_wrong_archives_and_members_that_lead_out(server, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "sync.zip").write_text("<html>Quota exceeded</html>")
    with pytest.raises(ValueError, match="sync.zip: File is not a zip file; what came stays"):
        fetch("nyu", tmp_path)
    (root / "sync.zip").write_bytes(server.files["/depth/data_depth_annotated.zip"])
    with pytest.raises(ValueError, match="sync.zip: it has no kitchen/rgb_00000.jpg; "):
        fetch("nyu", tmp_path)
    (root / "sync.zip").unlink()
    (tmp_path / "nyu.txt").write_text("evil/rgb_9.jpg evil/rgb_9.jpg 1\n")
    with pytest.raises(ValueError, match="it has no evil/rgb_9.jpg"):
        fetch("nyu", tmp_path)
    with pytest.raises(ValueError, match="toy cannot be fetched: only nyu and kitti can"):
        data.fetch("toy", root)


def test_sources_are_the_official_ones():
    assert data.SOURCES["kitti_raw"].format(drive="D").endswith("avg-kitti/raw_data/D/D_sync.zip")
    assert data.SOURCES["kitti_depth"].endswith("avg-kitti/data_depth_annotated.zip")
    assert data.SOURCES["nyu_test"].endswith("nyu_depth_v2/nyu_depth_v2_labeled.mat")
    assert data.SOURCES["nyu_train"].endswith("newcrfs/datasets/nyu/sync.zip")
    assert all(url.startswith("https://") for url in data.SOURCES.values())
    assert data.NYU_MAT_MD5 == "520609c519fba3ba5ac58c8fefcc3530"


# ---- Sec. 4.1  Training --------------------------------------------------------------------------


def test_every_trained_parameter_is_in_the_optimizer_once(tiny):
    groups = train.parameter_groups(tiny)
    found = [id(p) for group in groups for p in group["params"]]
    expected = [id(p) for p in tiny.parameters() if p.requires_grad]
    assert len(found) == len(set(found)) and set(found) == set(expected)
    assert {g["name"]: len(g["params"]) for g in groups}["prompts and gamma"] == 2


def test_batches_shuffle_each_epoch_and_can_start_anywhere():
    args = train.parse_args(["--batch-size", "3"])[0]
    whole = list(train.batches(range(10), args, range(9), 3))
    assert whole[4:] == list(train.batches(range(10), args, range(4, 9), 3))
    epochs = [[i for batch in whole[k : k + 3] for i in batch] for k in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]


def toy_learner(*options, device="cpu") -> tuple[train.Learner, dict]:
    args, _ = train.parse_args(list(options))
    recipe = data.DATASETS["toy"]
    learner = train.Learner(cabins.CaBins(TINY), args, recipe, 100, torch.device(device))
    image = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator())
    return learner, {"image": image, "depth": torch.rand(2, 1, 96, 128) * 9 + 0.5}


class NothingRead(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make a GPU's host wait: to read a value, or a size that depends on one."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not operation.__name__.startswith(self.READS), operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_does_not_wait_for_the_device(amp):
    learner, batch = toy_learner("--amp", amp)
    with NothingRead():
        for number in (1, 2):
            _, _, result = learner.step(batch, number)
        with pytest.raises(AssertionError):
            result[0].item()
    assert result.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_step_does_not_wait_for_a_gpu():
    learner, batch = toy_learner("--amp", "bf16", device="cuda")
    batch = {k: v.pin_memory() for k, v in batch.items()}
    learner.step(batch, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, _, result = learner.step(batch, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.isfinite().all()


DISTRIBUTED = """
import os, sys
sys.path.insert(0, {here!r})
import torch.nn.functional as F
from torch import nn
import data, train
# of its own images each process would have other statistics, which torch joins on GPUs only
nn.BatchNorm2d.forward = lambda self, x: F.batch_norm(
    x, self.running_mean, self.running_var, self.weight, self.bias)
nn.Dropout.forward = lambda self, x: x
data.TOY_ROOMS = {{"train": range(9), "test": range(1_000_000, 1_000_003)}}
train.LOG_EVERY = 1
train.draw_samples = train.draw_curves = lambda *_: None
draw = data.draw_room
def room(i):
    if i == {broken} and os.environ.get("RANK") == "1":
        raise ValueError(f"room {{i}} is on fire")
    return draw(i)
data.draw_room = room
data.run_command(train.main)
"""


def run_processes(folder: Path, n: int, broken: int = -1) -> subprocess.CompletedProcess:
    folder.mkdir()
    (folder / "script.py").write_text(DISTRIBUTED.format(here=str(HERE), broken=broken))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    # with numbers as prompts, a distance on the edge between two decimals could be written otherwise
    options = ["--distance-class", "semantic"]
    options += ["--epochs", "2", "--batch-size", "4", "--out", "."]
    command = [sys.executable, *(torchrun if n > 1 else []), "script.py", *options]
    return subprocess.run(
        command, check=False, cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_two_processes_learn_what_one_learns(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, n in ((one, 1), (two, 2)):
        run = run_processes(folder, n)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("epoch 2/2") == 1  # only the first process speaks
    for file, n_rows in (("log.csv", 4), ("metrics.csv", 2)):
        tables = [np.genfromtxt(f / file, delimiter=",", skip_header=1) for f in (one, two)]
        assert len(tables[0]) == n_rows
        np.testing.assert_allclose(*tables, rtol=1e-5)
    weights = [cabins.read_checkpoint(folder / "last.pt")["model"] for folder in (one, two)]
    start = cabins.CaBins(TINY).state_dict()
    for name, tensor in weights[0].items():
        if tensor.is_floating_point():
            # Adam makes a step out of any gradient, and out of the rounding of a tiny one too
            difference = (weights[1][name] - tensor).abs()
            assert difference.mean() < 1e-6 and difference.max() < 2e-4, name
    assert not torch.equal(weights[0]["prompts"], start["prompts"])


def test_a_process_that_ends_ends_the_run(tmp_path):
    run = run_processes(tmp_path / "run", 2, broken=3)  # in at most 120 s
    assert run.returncode != 0 and "error: room 3 is on fire" in run.stderr
    assert not (tmp_path / "run" / "best.pt").exists()


def test_shares_of_a_batch_are_augmented_as_the_whole():
    image = torch.randint(0, 256, (4, 3, 96, 128), dtype=torch.uint8, generator=generator())
    depth = torch.rand(4, 1, 96, 128, generator=generator())
    whole = data.augment(image, depth, "toy", generator(1))
    for i in (0, 1):
        part = data.augment(image[i::2], depth[i::2], "toy", generator(1), (i, 2))
        assert torch.equal(part[0], whole[0][i::2]) and torch.equal(part[1], whole[1][i::2])


@pytest.fixture
def few_rooms(monkeypatch):
    rooms = {"train": range(8), "test": range(1_000_000, 1_000_002)}
    monkeypatch.setattr(data, "TOY_ROOMS", rooms)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take longer than such short runs; other tests draw them."""
    monkeypatch.setattr(train, "draw_samples", lambda *_: None)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # and so does a loader's worker, to start


def run_train(*options):
    train.train(*train.parse_args(list(map(str, options))))


def test_a_run_its_figures_and_its_evaluation(few_rooms, tmp_path, monkeypatch, capsys):
    run_train("--epochs", 1, "--batch-size", 4, "--out", tmp_path)
    for figure in ("explained_0.png", "curves.png"):
        assert min(Image.open(tmp_path / figure).size) > 300
    with pytest.raises(ValueError, match="was trained with batch_size 4, not 2"):
        run_train("--resume", "--out", tmp_path, "--batch-size", 2)
    run_train("--resume", tmp_path / "last.pt", "--out", tmp_path / "new")  # which has no best.pt
    assert "last.pt, whole" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "last.pt").touch()
    with pytest.raises(ValueError, match="holds another run: --resume it, or take another"):
        run_train("--resume", tmp_path / "last.pt", "--out", tmp_path / "other")
    assert {*cabins.read_checkpoint(tmp_path / "best.pt")} & {"optimizer", "scheduler"} == set()
    with pytest.raises(ValueError, match="best.pt is no last.pt of train.py: it cannot be resumed"):
        run_train("--resume", tmp_path / "best.pt")
    capsys.readouterr()
    run_eval_main(monkeypatch, tmp_path / "best.pt", "--no-flip")
    printed = capsys.readouterr().out
    assert "window whole" in printed and "flip averaging off, fp32" in printed
    run_eval_main(monkeypatch, tmp_path / "best.pt", "--no-flip", "--amp", "bf16")
    rounded = capsys.readouterr().out
    assert "flip averaging off, bf16" in rounded
    values = [float(text.splitlines()[-1].split()[2]) for text in (printed, rounded)]
    assert values[1] == pytest.approx(values[0], rel=0.02) and rounded != printed


RUN = """
import sys
sys.path.insert(0, {here!r})
import data, train
data.TOY_ROOMS = {{"train": range(8), "test": range(1_000_000, 1_000_002)}}
train.LOG_EVERY = train.SAVE_EVERY = 1
train.draw_samples = train.draw_curves = lambda *_: None
data.run_command(train.main)
"""


def start_run(out: Path, *options) -> subprocess.Popen:
    """Eight steps of training in a process of its own, each of which is logged and saved."""
    command = [sys.executable, "-c", RUN.format(here=str(HERE)), "--epochs", "2"]
    command += ["--batch-size", "2", "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(process: subprocess.Popen, condition) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def same_run(one: Path, other: Path) -> None:
    """To the last bit: weights, optimizer, schedule, best metric, both tables."""
    contents = [cabins.read_checkpoint(folder / "last.pt") for folder in (one, other)]
    for content in contents:
        del content["args"]  # which name their folders
    leaves = [torch.utils._pytree.tree_flatten_with_path(content)[0] for content in contents]
    assert len(leaves[0]) == len(leaves[1]) > 500
    for (path, a), (_, b) in zip(*leaves):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path
    for file in ("log.csv", "metrics.csv"):
        assert (one / file).read_text() == (other / file).read_text(), file


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    printed = start_run(out).communicate()[0]
    assert "epoch 2/2" in printed, printed
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves_it(number, tmp_path):
    run = start_run(tmp_path)
    wait_until(run, (tmp_path / "log.csv").exists)
    run.send_signal(number)
    printed = run.communicate()[0]
    assert run.returncode == 128 + number, printed
    last = printed.splitlines()[-1]
    step = cabins.read_checkpoint(tmp_path / "last.pt")["step"]
    assert last == f"stopped after step {step} of 8; go on with --resume {tmp_path}/last.pt"
    assert 1 <= step < 8


def test_killed_again_and_again_also_while_saving(whole_run, tmp_path):
    random = np.random.default_rng(0)
    log, partial = tmp_path / "log.csv", tmp_path / "last.pt.partial"
    for is_in_save in (True, False):
        options = ["--resume"] if (tmp_path / "last.pt").exists() else []
        run, before = start_run(tmp_path, *options), log.stat().st_size if log.exists() else 0
        wait_until(run, lambda before=before: log.exists() and log.stat().st_size > before)
        if is_in_save:
            wait_until(run, partial.exists)
        else:
            time.sleep(random.uniform(0, 0.2))
        run.kill()
        assert run.wait() == -signal.SIGKILL, run.communicate()[0]
    printed = start_run(tmp_path, "--resume").communicate()[0]
    assert "epoch 2/2" in printed, printed
    same_run(tmp_path, whole_run)


@pytest.fixture
def saves_each_step(few_rooms, no_figures, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)


SHORT = ("--epochs", 2, "--batch-size", 2)


def test_a_damaged_checkpoint_is_named(whole_run, tmp_path):
    last = tmp_path / "last.pt"
    content = bytearray((whole_run / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:100_000], b""):
        last.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"last.pt \({len(damaged)} bytes\) is cut off, damaged"
        ):
            run_train("--resume", last)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_loses_nothing(kind, whole_run, saves_each_step, tmp_path, monkeypatch):
    torch_save, saved = torch.save, []

    def save(content, path):
        saved.append(path)
        if len(saved) > 3:
            Path(path).write_bytes(b"half")
            raise kind("No space left on device")
        torch_save(content, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        run_train(*SHORT, "--out", tmp_path)
    monkeypatch.setattr(torch, "save", torch_save)
    assert cabins.read_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert not list(tmp_path.glob("*.partial"))
    rows = (tmp_path / "log.csv").read_text()
    assert rows == "".join((whole_run / "log.csv").read_text().splitlines(True)[:5])
    (tmp_path / "log.csv").write_text(rows + "5,1.2")  # half a row, of the full disk too
    run_train("--resume", "--out", tmp_path)
    same_run(tmp_path, whole_run)


def test_a_long_run_takes_no_more_memory_or_files(
    few_rooms, no_figures, tmp_path, monkeypatch, capsys
):
    """200 steps, with the data loader's worker."""
    found = []
    of_bar = train.tqdm.update

    def look(bar, n):
        here = Path("/proc/self")
        workers = [
            Path("/proc") / pid
            for pid in (here / "task" / str(os.getpid()) / "children").read_text().split()
        ]
        pages = sum(int((p / "statm").read_text().split()[1]) for p in (here, *workers))
        found.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(list((here / "fd").iterdir()))))
        of_bar(bar, n)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    if not Path("/proc/self/task").is_dir():
        pytest.skip("reads /proc, which only Linux has")
    monkeypatch.setattr(train.tqdm, "update", look)
    monkeypatch.setattr(
        train,
        "evaluate_windows",
        lambda *_, **__: {"whole": dict.fromkeys(evaluation.HEADINGS, 1.0)},
    )
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(200), "test": range(2)})
    small = data.DATASETS["toy"]._replace(crop=(64, 64))
    monkeypatch.setitem(data.DATASETS, "toy", small)
    small = cabins.BACKBONES["tiny"]._replace(width=2, text_layers=1)
    monkeypatch.setitem(cabins.BACKBONES, "tiny", small)
    run_train("--epochs", 1, "--batch-size", 1, "--out", tmp_path)
    assert "200 training pairs, 2 test pairs; 1 x cpu, fp32" in capsys.readouterr().out
    memory, files = np.array(found).T
    assert len(found) == 200
    assert np.median(memory[-100:]) < np.median(memory[:100]) + 30  # MB
    assert files[-1] <= files[50:100].max()


ROWS = [  # of Tables 1 to 4
    ("RN101", "cabins", False),
    ("RN50", "semantic", False),
    ("RN50", "median", False),
    ("RN50", "mean", False),
    ("RN50", "cabins", True),
    ("ViT-B/16", "cabins", False),
]


@pytest.mark.parametrize("backbone, kind, as_released", ROWS)
def test_every_row_of_the_tables(
    backbone, kind, as_released, few_rooms, no_figures, tmp_path, monkeypatch, capsys
):
    """Two steps of training, evaluation and reloading, of each network at a reduced width."""
    widths = {"embed_dim": 32, "width": 64 if backbone == "ViT-B/16" else 8}
    small = cabins.BACKBONES[backbone]._replace(**widths, text_width=64, text_layers=1)
    if len(small.layers) == 4:
        small = small._replace(width=2)  # 64 channels at stride 32
    monkeypatch.setattr(cabins, "BACKBONES", cabins.BACKBONES | {backbone: small})
    options = ["--backbone", backbone, "--distance-class", kind, "--clip", "none"]
    options += ["--as-released"] if as_released else []
    with pytest.warns(UserWarning, match="random weights"):
        run_train(*options, "--epochs", 1, "--batch-size", 4, "--out", tmp_path)
    assert ("as released: see the rows marked *" in capsys.readouterr().out) == as_released
    content = cabins.read_checkpoint(tmp_path / "last.pt")
    assert content["step"] == 2 and content["args"]["as_released"] == as_released
    model = cabins.load_checkpoint(tmp_path / "last.pt")
    assert (model.config.backbone, model.config.distance_class) == (backbone, kind)
    # what learnt, and what did not
    torch.manual_seed(0)
    start = cabins.CaBins(model.config, cabins.CLIP(small))
    if as_released:
        torch.nn.init.trunc_normal_(start.prompts, std=1.0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start.state_dict()[n])}
    assert ("prompts" in moved) == ("context_decoder.gamma" in moved) == (not as_released)
    text = {n for n in moved if n.startswith("clip.") and not n.startswith("clip.visual.")}
    assert text == ({"clip.token_embedding.weight"} if as_released else set())


def test_a_loss_that_is_not_finite_stops_the_run(few_rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cabins, "total_loss", lambda prediction, *_: prediction.depth.sum() * math.nan
    )
    with pytest.raises(
        ValueError, match=r"loss nan .* at step 1, learning rate .*, of the images room \d, room"
    ):
        run_train("--epochs", 1, "--batch-size", 2, "--out", tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_checkpoints_are_whole_or_not_there(tiny, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    cabins.save_checkpoint(path, tiny, step=1)
    before = path.read_bytes()

    def full_disk(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        cabins.save_checkpoint(path, tiny, step=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    loaded = cabins.load_checkpoint(path)
    assert loaded.config == TINY and not loaded.training
    close(loaded.prompts, tiny.prompts, 1e-9)


@needs_samples
def test_tiny_learns_three_real_pairs():
    """d < 1.25 of at least 0.85 on three pairs of NYU, at a quarter of their size."""
    torch.manual_seed(0)
    nyu = data.DepthDataset("nyu", SAMPLES / "nyu", SAMPLES / "nyu" / "split.txt")
    image = F.interpolate(torch.stack([nyu[i]["image"] for i in range(3)]), (120, 160), mode="area")
    depth = torch.stack([nyu[i]["depth"] for i in range(3)])[..., ::4, ::4]
    model = cabins.CaBins(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        cabins.total_loss(model(image), depth, 1e-3).backward()
        optimizer.step()
    predict = evaluation.predictor(model, flip=False)

    def at_a_quarter(image):
        return cabins.resize(predict(F.interpolate(image, (120, 160), mode="area")), (480, 640))

    assert evaluation.evaluate(at_a_quarter, nyu)["d1"] >= 0.85


@needs_samples
@pytest.mark.parametrize("name", ["nyu", "kitti"])
def test_train_and_eval_on_real_pairs(name, tmp_path, monkeypatch, capsys, request):
    if name == "kitti":
        request.getfixturevalue("no_figures")
    split = SAMPLES / name / "split.txt"
    one = tmp_path / "one.txt"
    one.write_text(split.read_text().splitlines()[0])
    options = ("--data", name, "--root", SAMPLES / name, "--train-split", split)
    options += ("--test-split", one, "--backbone", "tiny", "--epochs", 1, "--batch-size", 2)
    run_train(*options, "--out", tmp_path)
    run_eval_main(monkeypatch, tmp_path / "last.pt", "--no-flip")
    printed = capsys.readouterr().out
    assert printed.count("CaBins (quoted)") == 2
    assert "window eigen" in printed if name == "nyu" else "window full" in printed


def test_downloads_are_whole_and_checked(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(5_000_000)
    (tmp_path / "source").write_bytes(content)
    url, sha256 = (tmp_path / "source").as_uri(), hashlib.sha256(content).hexdigest()
    code = f"import sys, torch, cabins; torch.hub.set_dir({str(tmp_path / 'hub')!r}); "
    code += f"cabins.download({url!r}, 'file', {sha256!r})"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    cache = tmp_path / "hub" / "checkpoints"
    assert [path.name for path in cache.iterdir()] == ["file"]
    assert (cache / "file").read_bytes() == content
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="was not fetched .invalid hash value"):
        cabins.download(url, "other", "0" * 64)
    assert not (cache / "other").exists()
    (cache / "file").write_bytes(b"changed")
    with pytest.raises(ValueError, match="file is not what .* was: delete it"):
        cabins.download(url, "file", sha256)
    assert cabins.CLIP_URL.startswith("https://") and data.LIST_URL.startswith("https://")


# ---- What the equations do not say: eight facts, where they arise in cabins.py -------------------


def test_no_gradient_passes_through_the_digits():
    model = cabins.CaBins(TINY)
    _, c, e, s, _ = model.distribution(torch.randn(1, 3, 64, 96, generator=generator()))
    learners = [model.bins.mlp[4].weight, model.prompts, model.context_decoder.gamma]
    of_bins, of_prompts, of_gamma = torch.autograd.grad(s.sum(), learners, allow_unused=True)
    assert of_bins is None and of_prompts.abs().sum() > 0 and of_gamma.abs().sum() > 0
    assert e.requires_grad and c.requires_grad  # Eq. 2 itself is differentiable: the text is not


@pytest.mark.parametrize(
    "max_depth, unit, first, second",
    [(10, 1, 0.50, 1e-15), (80, 1, 0.465, 7e-3), (10, 100, 0.048, 0.034)],
)
def test_eq_2_is_nearly_a_median_in_metres_and_a_mean_in_centimetres(
    max_depth, unit, first, second
):
    c = cabins.bin_centers(torch.full((1, 256), 1 / 256, dtype=torch.double), 0, max_depth * unit)
    c.requires_grad_()
    e = cabins.distance_classes(c, 8)
    # a change of one centre moves e_k by its weight, but for what it moves the weights: take weights
    group = c.detach()[0, :32]
    w = torch.softmax(1 / ((group - group.mean()).abs() + 1e-4), 0)
    assert e[0, 0].item() == pytest.approx((w * group).sum().item(), rel=1e-12)
    assert w[15].item() == pytest.approx(first, rel=0.03) == w[16].item()
    assert w[14].item() == pytest.approx(second, rel=0.3)


def test_the_text_jumps_where_the_number_does_not(released):
    near, at = cabins.number_tokens(torch.tensor([2.9999, 3.0]), 1).tolist()
    assert near[1:-1] == clip_tokenizer.encode("2.9999") and near[2] == at[2] == 269
    assert not set(near[1:7]) & set(at[1:4]) - {269}
    model = cabins.load_checkpoint(released, max_depth=10.0)
    with torch.no_grad():
        _, z_bar, z = model.clip.visual(torch.from_numpy(normal("image", (1, 3, 96, 128))))
        maps = []
        for e in (2.9999, 3.0):
            t = model.encode_prompts(torch.full((1, 8), e))
            maps.append(cabins.cosine_similarity(z, model.context_decoder(t, z_bar, z)))
    assert (maps[1] - maps[0]).abs().max() > 0.01 * maps[0].abs().max()


def test_eq_3_is_the_identity_at_first():
    torch.manual_seed(0)
    decoder = cabins.ContextDecoder(512).eval()
    t, z_bar, z = torch.randn(2, 8, 512), torch.randn(2, 512), torch.randn(2, 512, 3, 4)
    assert decoder.gamma.tolist() == pytest.approx([1e-4] * 512)
    change = (decoder(t, z_bar, z) - t).norm() / t.norm()
    assert 1e-6 < change < 1e-3
    assert decoder.layers[0].self_attn.q_proj.bias is None and len(decoder.layers) == 6
    assert decoder.layers[5].cross_attn.n_heads == 4 and decoder.layers[5].dropout.p == 0.1
    weights = torch.cat(
        [m.weight.flatten() for m in decoder.modules() if hasattr(m, "in_features")]
    )
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)


def test_nothing_in_the_loss_asks_s_to_mean_anything(tiny):
    decoder = cabins.DepthDecoder([256, 512, 1024, 2048], 8, 256)
    assert decoder.reduce.in_channels == 2056 and decoder.reduce.padding == (1, 1)
    prediction = tiny(torch.randn(1, 3, 64, 64))._replace(similarity=None)
    assert cabins.total_loss(prediction, torch.ones(1, 1, 64, 64), 1e-3).isfinite()


def test_every_bin_stays_open(tiny):
    bins = cabins.AdaptiveBins(64, 256)
    torch.nn.init.zeros_(bins.mlp[4].weight)
    with torch.no_grad():
        bins.mlp[4].bias[:] = -5.0
        bins.mlp[4].bias[7] = 99.9
    b = bins(torch.randn(1, 64))[0]
    assert b[7].item() == pytest.approx(100 / 125.5, rel=1e-5)  # what the other 255 leave
    assert b[8].item() == pytest.approx(
        0.1 / 125.5, rel=1e-5
    )  # ReLU, and not LeakyReLU, at the end
    assert isinstance(bins.mlp[1], torch.nn.LeakyReLU) and isinstance(
        bins.mlp[3], torch.nn.LeakyReLU
    )


def test_silog_forgives_a_wrong_scale_to_85_percent():
    target = torch.rand(2, 1, 20, 20, generator=generator(), dtype=torch.double) * 9 + 0.5
    for factor in (0.5, 1.2, 3.0):
        loss = cabins.silog_loss(target * factor, target, target > 0).item()
        assert loss == pytest.approx(10 * math.sqrt(0.15) * abs(math.log(factor)), rel=1e-6)


def test_the_heads_two_convolutions_are_one_linear_map(tiny):
    x = torch.randn(1, 40, 12, 16, generator=generator())
    head = tiny.depth_decoder
    weight = torch.einsum("om,mikl->oikl", head.logits.weight[:, :, 0, 0], head.features.weight)
    bias = head.logits.weight[:, :, 0, 0] @ head.features.bias + head.logits.bias
    with torch.no_grad():
        close(F.conv2d(x, weight, bias, padding=1), head.logits(head.features(x)), 1e-4)
        assert tiny(torch.randn(1, 3, 96, 128), upsample=False).depth.shape == (1, 1, 48, 64)


def test_ablations_silence_the_text_and_leave_the_network_as_it_was(released, monkeypatch, capsys):
    monkeypatch.setattr(data, "TOY_ROOMS", {"train": range(1), "test": range(1_000_000, 1_000_002)})
    rooms = data.DepthDataset("toy")
    model = cabins.load_checkpoint(released, max_depth=10.0)  # as the authors' are
    predict = evaluation.predictor(model, flip=False)
    before = evaluation.evaluate(predict, rooms)
    rows = evaluation.ablate(model, predict, rooms)
    names = ["s = 0", "s of the classes in reverse", "one text for all classes"]
    assert list(rows) == [f"{name}, whole" for name in names]
    assert evaluation.evaluate(predict, rooms) == before  # no hook is left
    silent = model.depth_decoder.reduce.weight
    assert len({row["abs_rel"] for row in [before, *rows.values()]}) == 4
    with torch.no_grad():
        silent[:, 2048:] = 0  # the weights of s
    assert evaluation.evaluate(predict, rooms)["abs_rel"] == pytest.approx(
        rows["s = 0, whole"]["abs_rel"], rel=1e-5
    )


# ---- Your own pictures: infer --------------------------------------------------------------------


def test_infer_takes_paths_pictures_and_arrays(tiny, tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (90, 121, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    found = [cabins.infer(tiny, p) for p in (tmp_path / "a.png", Image.fromarray(array), array)]
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other))
    depth, std, centers, e = found[0]
    assert depth.shape == std.shape == (90, 121) and centers.shape == (256,) and e.shape == (8,)
    assert all(x.dtype == np.float32 for x in found[0])
    # by hand, at the width that the network wants
    size = (round(90 * 128 / 121), 128)
    image = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, size, mode="bilinear", antialias=True)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        _, c, _, _, p = tiny.distribution((image - mean) / deviation)
        mean_depth = (c[:, :, None, None] * p).sum(1, keepdim=True)
        spread = (p * (c[:, :, None, None] - mean_depth).square()).sum(1, keepdim=True).sqrt()
    close(depth, cabins.resize(mean_depth, (90, 121))[0, 0], 1e-5)
    close(std, cabins.resize(spread, (90, 121))[0, 0], 1e-3)
    with pytest.raises(ValueError, match=r"picture is float64 .*; it must be uint8"):
        cabins.infer(tiny, array / 255)
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 16)  # 12 bits in 16
    assert abs(cabins.read_picture(deep)[..., 0].astype(int) - array[..., 0]).max() <= 1


def test_the_authors_networks_want_the_width_of_their_data(released):
    for top, width, focal in ((10.0, 640, 518.86), (80.0, 1216, 721.54)):
        config = cabins.load_checkpoint(released, max_depth=top).config
        assert (config.max_depth, config.image_width, config.focal) == (top, width, focal)


def test_a_picture_of_any_size_and_what_is_none(tiny, tmp_path):
    for size in ((1, 1), (40_000, 3), (3, 500)):
        Image.new("RGB", size, (90, 80, 70)).save(tmp_path / "a.png")
        found = cabins.infer(tiny, tmp_path / "a.png")
        assert found.depth.shape == size[::-1] and np.isfinite(found.depth).all()
    for wrong in (np.zeros((0, 5, 3), np.uint8), np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4))):
        with pytest.raises(ValueError, match="it must be uint8"):
            cabins.infer(tiny, wrong)
    (tmp_path / "a.txt").write_text("no picture")
    with pytest.raises(ValueError, match="a.txt cannot be read as a picture"):
        cabins.infer(tiny, tmp_path / "a.txt")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="floating-point values; save it in 8 or 16 bits"):
        cabins.infer(tiny, tmp_path / "f.tif")


def test_the_focal_length_comes_from_exif_where_there_is_one(tiny, tmp_path, monkeypatch, capsys):
    cabins.save_checkpoint(tmp_path / "tiny.pt", cabins.CaBins(TINY_CAMERA))
    folder = tmp_path / "in"
    folder.mkdir()
    picture, exif = Image.new("RGB", (120, 90)), Image.Exif()
    picture.save(folder / "none.jpg")
    exif.get_ifd(0x8769)[0xA405] = 28  # FocalLengthIn35mmFilm
    exif[0x0112] = 6  # held upright
    picture.save(folder / "phone.jpg", exif=exif)
    picture.save(folder / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    command = (tmp_path / "tiny.pt", "--images", folder, "--ply", "--out", tmp_path / "out")
    assert run_eval(monkeypatch, *command) == 0
    lines = {line.split(": ")[0][-9:]: line for line in capsys.readouterr().out.splitlines()}
    of_phone = 28 * math.hypot(120, 90) / math.hypot(36, 24)
    assert f"focal length of {of_phone:.1f} pixels, from EXIF" in lines["phone.jpg"]
    for name in ("/none.jpg", "n/odd.jpg"):  # 100 pixels at the training's 128
        assert "focal length of 93.8 pixels, from the training's camera" in lines[name]
    assert run_eval(monkeypatch, *command, "--focal", 77) == 0
    assert capsys.readouterr().out.count("focal length of 77.0 pixels, from --focal") == 3


def test_range_fixes_the_scale_of_colours(tiny, tmp_path, monkeypatch):
    import matplotlib

    cabins.save_checkpoint(tmp_path / "tiny.pt", tiny)
    rng = np.random.default_rng(0)
    for name in ("a", "写真", "a" * 250):  # the last is too long with what is added to it
        noise = rng.integers(0, 255, (70, 80, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    options = ("--range", 8, "--images", tmp_path, "--out", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's, of letters that a font lacks
        assert run_eval(monkeypatch, tmp_path / "tiny.pt", *options) == 1  # only that one failed
    for name in ("a", "写真"):
        depth = cabins.infer(tiny, tmp_path / f"{name}.png").depth
        colours = np.asarray(Image.open(tmp_path / "out" / f"{name}_colour.png"))
        expected = matplotlib.colormaps["viridis"](depth / 8, bytes=True)[..., :3]
        assert colours.shape == (70, 80, 3) and np.array_equal(colours, expected)
    assert len(list((tmp_path / "out").iterdir())) == 8


def test_sixteen_bits_hold_every_range(tmp_path):
    for top, unit, scale in (
        (10, "_mm", 1000),
        (80, "_cm", 100),
        (200, "_cm", 100),
        (9999, "_m", 1),
    ):
        path = evaluation.write_depth(f"{tmp_path}/a", np.full((2, 2), top - 0.4), top, 1000)
        assert path.endswith(f"a{unit}.png")
        assert (np.asarray(Image.open(path)) == round((top - 0.4) * scale)).all()
    path = evaluation.write_depth(f"{tmp_path}/b", np.full((2, 2), 79.9), 80, 256)
    assert path.endswith("b.png") and np.asarray(Image.open(path)).max() == round(79.9 * 256)


def test_results_say_what_they_are_of(few_rooms, tmp_path, monkeypatch):
    for name in ("one", "two"):
        torch.manual_seed(len(name) + (name == "two"))
        cabins.save_checkpoint(tmp_path / f"{name}.pt", cabins.CaBins(TINY), args={"data": "toy"})
        for _ in range(2):  # again: the same folder, nothing stale
            run_eval_main(monkeypatch, tmp_path / f"{name}.pt", "--out", tmp_path / "out")
    folders = sorted((tmp_path / "out").glob("predictions_*"))
    assert len(folders) == 2 and all(len(list(f.iterdir())) == 2 for f in folders)
    rows = np.genfromtxt(tmp_path / "out" / "results.csv", delimiter=",", dtype=str, skip_header=1)
    head = (tmp_path / "out" / "results.csv").read_text().splitlines()[0]
    assert head.startswith("label,checkpoint,data,list,predictions,date,protocol,abs_rel")
    assert len(rows) == 4 and str(tmp_path / "two.pt") in (tmp_path / "out/results.csv").read_text()
    (tmp_path / "out" / "results.csv").write_text("label,other\n")
    with pytest.raises(ValueError, match="results.csv has other columns"):
        run_eval_main(monkeypatch, tmp_path / "one.pt", "--out", tmp_path / "out")


def test_evaluate_takes_a_network_too(tiny, few_rooms):
    rooms = data.DepthDataset("toy")
    assert evaluation.evaluate(tiny, rooms) == evaluation.evaluate(
        evaluation.predictor(tiny), rooms
    )


# ---- Fast, and in other people's hands -----------------------------------------------------------


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return operation(*args, **(kwargs or {}))


def test_a_network_is_channels_last_wherever_it_comes_from(tiny, tmp_path):
    cabins.save_checkpoint(tmp_path / "tiny.pt", tiny)
    for model in (cabins.CaBins(TINY), cabins.load_checkpoint(tmp_path / "tiny.pt")):
        for conv in (model.clip.visual.conv2, model.depth_decoder.features):
            assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    layouts = []
    hook = tiny.depth_decoder.logits.register_forward_hook(
        lambda _, inputs, output: layouts.append((inputs[0], output))
    )
    with torch.no_grad(), Count() as count:
        tiny(torch.randn(1, 3, 64, 96))
    hook.remove()
    for x in layouts[0]:
        assert x.is_contiguous(memory_format=torch.channels_last)
    # two in each of three blocks that stride, and the stem's: none that does nothing
    assert count.calls["avg_pool2d.default"] == 7
    stride_1 = [m.stride for m in tiny.modules() if isinstance(m, torch.nn.AvgPool2d)]
    assert stride_1 == [2, 2, 2]


def test_the_fused_optimizer_steps_as_torchs_default(monkeypatch):
    """Its kernel for CPUs is wrong where gradient and weight lie in memory in other orders."""
    weights = []
    for fused in (True, None):
        torch.manual_seed(0)
        learner, batch = toy_learner("--lr", "1e-2")
        for group in learner.optimizer.param_groups:
            assert group["fused"] is True
            group["fused"] = fused
        torch.manual_seed(0)
        batch["depth"] = torch.rand(2, 1, 96, 128) * 9 + 0.5
        learner.step(batch, 1)
        weights.append(learner.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)


SIZES = [(1, 64, 64), (3, 100, 131), (2, 129, 65)]  # never seen in the export


# torch 2.6, the oldest that is promised, fixes the sizes of what it exports
needs_newer_torch = pytest.mark.skipif(torch.__version__ < "2.7", reason="needs torch > 2.6")


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    batch, height, width = (
        torch.export.Dim("batch"),
        *(torch.export.Dim(name, min=64) for name in ("height", "width")),
    )
    shapes = {"image": {0: batch, 2: height, 3: width}}
    return torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes)


@needs_newer_torch
def test_torch_export_equals_eager_at_any_size(tiny):
    program = exported(tiny).module()
    for b, h, w in SIZES:
        image = torch.randn(b, 3, h, w, generator=generator())
        with torch.no_grad():
            for found, expected in zip(program(image), tiny(image)):
                close(found, expected, 1e-6)


@needs_newer_torch
def test_onnx_equals_eager_at_any_size(tiny, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name}, which is optional, is not installed")
    import onnxruntime

    class Depth(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = tiny

        def forward(self, image):
            return self.network(image).depth

    program = exported(Depth().eval())
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "cabins.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "cabins.onnx")
    for b, h, w in SIZES:
        image = torch.randn(b, 3, h, w, generator=generator())
        found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
        with torch.no_grad():
            close(torch.from_numpy(found), tiny(image).depth, 1e-4)


# ---- Sec. 4.1  The recipe, observed --------------------------------------------------------------


@pytest.mark.parametrize("name", ["nyu", "kitti", "list"])
def test_the_spread_of_a_thousand_recoloured_pixels(name):
    """Gamma, brightness and colour reach the ends of their ranges and no further."""
    spread = {"nyu": 0.25, "kitti": 0.1, "list": 0.1}[name]
    recipe = data.DATASETS[name]._replace(crop=(2, 2), rotation=0.0)
    mean, std = torch.tensor([cabins.Config.image_mean, cabins.Config.image_std])
    ranges = {}
    for level in (255, 64):
        image = torch.full((1500, 3, 2, 2), level, dtype=torch.uint8)
        depth = torch.ones(1500, 1, 2, 2)
        out, _ = data.augment(image, depth, recipe, generator(level))
        value = out[:, :, 0, 0] * std + mean  # (1500, 3)
        changed = ((value - level / 255).abs() > 1e-5).any(1)
        assert level == 255 or 0.45 < changed.float().mean() < 0.55  # white stays so if brightened
        ranges[level] = value[changed]
    low, high = (1 - spread) * 0.9, (1 + spread) * 1.1  # brightness, and each colour
    white = ranges[255]
    assert low <= white.min() < low * 1.05 and white.max() == pytest.approx(1, abs=1e-6)
    ratio = white.amax(1) / white.amin(1)  # brightness leaves it alone, colour does not
    assert 1.1 < ratio.max() <= 1.1 / 0.9 + 1e-5
    dark = ranges[64].log() / math.log(64 / 255)
    ends = (0.9 + math.log(high) / math.log(64 / 255), 1.1 + math.log(low) / math.log(64 / 255))
    assert ends[0] <= dark.min() < ends[0] + 0.05 and ends[1] - 0.05 < dark.max() <= ends[1]


@pytest.mark.parametrize(
    "name, degrees", [("nyu", 2.5), ("kitti", 1.0), ("list", 2.5), ("toy", 0.0)]
)
def test_rotation_reaches_its_limits(name, degrees):
    recipe = data.DATASETS[name]._replace(crop=(201, 201))
    depth = torch.zeros(300, 1, 201, 201)
    depth[:, 0, 100, :] = torch.arange(1.0, 202.0)  # a level line through the centre
    _, out = data.augment(
        torch.zeros(300, 3, 201, 201, dtype=torch.uint8), depth, recipe, generator()
    )
    angles = []
    for row in out[:, 0]:
        ys, xs = row.nonzero(as_tuple=True)
        x, y = xs - 100.0, ys - 100.0
        angles.append(math.degrees(math.atan2((x * y).sum(), (x * x).sum())))
    assert max(angles) == pytest.approx(degrees, abs=0.12) == -min(angles)
    # what is upright turns with it
    _, out = data.augment(
        torch.zeros(300, 3, 201, 201, dtype=torch.uint8), depth.mT.contiguous(), recipe, generator()
    )
    for row, angle in zip(out[:, 0], angles):
        ys, xs = row.nonzero(as_tuple=True)
        x, y = xs - 100.0, ys - 100.0
        other = math.degrees(math.atan2((x * y).sum(), (y * y).sum()))
        assert abs(other) == pytest.approx(abs(angle), abs=0.3)
        assert abs(angle) < 0.5 or other * angle < 0


def test_recipes_sizes_and_scales():
    nyu, kitti = data.DATASETS["nyu"], data.DATASETS["kitti"]
    assert (nyu.crop, nyu.depth_scale, nyu.max_depth) == ((416, 544), 1000, 10)
    assert (kitti.crop, kitti.depth_scale, kitti.max_depth) == ((352, 704), 256, 80)
    assert (nyu.focal, kitti.focal, data.DATASETS["toy"].focal) == (518.86, 721.54, 100)
    assert data.fixed_crop("nyu", 480, 640, True) == (45, 472, 43, 608)
    assert data.fixed_crop("nyu", 480, 640, False) == (0, 480, 0, 640)
    assert data.fixed_crop("kitti", 375, 1242, True) == (23, 375, 13, 1229)
    rows, columns = data.evaluation_windows("kitti", 375, 1242)["nested"]
    assert (rows, columns) == (slice(143, 349), slice(43, 1172))
    rows, columns = data.evaluation_windows("nyu", 480, 640)["eigen"]
    assert (rows, columns) == (slice(45, 471), slice(41, 601))
    hashes = [sha256[:8] for _, sha256 in data.LISTS.values()]
    assert hashes == ["66e2beb7", "e92c191d", "dd5e51c2", "1a631c1b"]
    assert [n for n, _ in data.LISTS.values()] == [24_231, 654, 23_158, 697]


def test_the_optimizer_and_its_schedule():
    learner, _ = toy_learner("--lr", "1e-3")
    groups = learner.optimizer.param_groups
    assert {(g["weight_decay"], g["betas"][1], g["eps"]) for g in groups} == {(0.1, 0.999, 1e-8)}
    rates, momenta = [], []
    for _ in range(100):
        rates.append(groups[0]["lr"])
        momenta.append(groups[-1]["betas"][0])
        learner.optimizer.step()
        learner.scheduler.step()
    assert rates[0] == pytest.approx(1e-3 / 25) and max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) == 29 and rates[-1] == pytest.approx(1e-3 / 2500)
    assert (max(momenta), min(momenta)) == pytest.approx((0.95, 0.85))
    args, _ = train.parse_args(["--data", "nyu", "--root", "."])
    assert (args.lr, args.epochs, args.batch_size, args.backbone) == (3.57e-5, 25, 8, "RN101")


def test_gradients_are_clipped_at_a_tenth_and_cleared():
    learner, batch = toy_learner()
    for number in (1, 2):
        _, _, result = learner.step(batch, number)
        squares = [p.grad.square().sum() for p in learner.model.parameters() if p.grad is not None]
        assert result[1] > 0.1 and sum(squares).sqrt().item() == pytest.approx(0.1, rel=1e-3)


def test_gradients_of_what_is_not_stepped_pile_up_as_released():
    learner, batch = toy_learner("--as-released")
    prompts = learner.model.prompts
    before = prompts.detach().clone()
    prompts.grad = torch.full_like(prompts, 1e6)  # of earlier steps
    _, _, result = learner.step(batch, 1)
    assert result[1] > 1e6 and torch.equal(prompts, before)
    learner, batch = toy_learner()
    learner.model.prompts.grad = torch.full_like(prompts, 1e6)
    assert learner.step(batch, 1)[2][1] < 1e4  # cleared


def test_prompts_start_as_coops_do_or_as_the_released(few_rooms, tmp_path):
    for options, std, amp in ((["--amp", "bf16"], 0.02, "bf16"), (["--as-released"], 0.88, "off")):
        args, saved = train.parse_args(["--out", str(tmp_path / amp), *options])
        run = train.Run(args, saved)
        prompts = run.learner.model.prompts
        assert prompts.std().item() == pytest.approx(std, rel=0.1) and args.amp == amp
        assert prompts.abs().max() < (2.001 if args.as_released else 0.1)


def test_as_released_keeps_the_last_batch_and_one_order(few_rooms, tmp_path):
    options = ["--batch-size", "3", "--epochs", "2", "--out", str(tmp_path)]
    for is_released, n_steps in ((False, 4), (True, 6)):  # 8 pairs: 2 or 3 steps an epoch
        args, saved = train.parse_args([*options, *["--as-released"][:is_released]])
        run = train.Run(args, saved)
        assert run.n_steps == n_steps
        order = list(train.batches(run.dataset, args, range(n_steps), run.per_epoch))
        first, second = order[: n_steps // 2], order[n_steps // 2 :]
        assert (first == second) == is_released
        assert [len(batch) for batch in first] == ([3, 3, 2] if is_released else [3, 3])


@needs_goldens
def test_the_released_training_loop(released, monkeypatch):
    golden = json.loads((GOLDENS / "train_nyu.json").read_text())
    model = cabins.load_checkpoint(released, max_depth=10.0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    monkeypatch.setattr(data, "augment", lambda image, depth, *_: (image, depth))
    args, _ = train.parse_args(["--as-released", "--lr", str(golden["lr"])])
    recipe, device = data.DATASETS["nyu"], torch.device("cpu")
    learner = train.Learner(model, args, recipe, golden["n_steps_of_schedule"], device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"image": torch.from_numpy(normal("image", (2, 3, 96, 128))), "depth": made_truth()}
    for number, known in enumerate(golden["steps"]):
        assert learner.scheduler.get_last_lr()[0] == pytest.approx(known["lr"][0], rel=1e-6)
        loss, norm = learner.step(batch, number)[2].tolist()
        first = number == 0
        assert loss == pytest.approx(known["loss"], rel=1e-4 if first else 1e-2)
        assert norm == pytest.approx(known["grad_norm"], rel=1e-2 if first else 0.25)
    after = {their_name(k): (v - before[k]).norm() for k, v in model.state_dict().items() if v.ndim}
    for name, moved in golden["moved_norm"].items():
        assert after.get(name, torch.zeros(())).item() == pytest.approx(moved, rel=0.08), name


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 asks the driver, even so")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_on_a_gpu_that_is_not_here(amp, monkeypatch):
    """Shapes, devices and reads of values of a step's forward and loss; no kernel is run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def grid_sample(x, grid, *_, **__):  # which has no fake kernel for CUDA
        assert x.device == grid.device
        return x.new_empty(*x.shape[:2], *grid.shape[1:3])

    monkeypatch.setattr(F, "grid_sample", grid_sample)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **_: x)  # reads values
    args, _ = train.parse_args(["--amp", amp])
    mode, device = FakeTensorMode(), torch.device("cuda")
    monkeypatch.setattr(cabins.CaBins, "to", lambda model, **_: model)  # of the layout in memory
    with mode, device:  # all that is made is on the GPU
        model = cabins.CaBins(TINY)
    learner = train.Learner.__new__(train.Learner)
    learner.model = learner.network = model
    learner.args, learner.recipe, learner.device = args, data.DATASETS["toy"], device
    learner.amp, learner.rank, learner.n_processes = data.autocast(device, amp), 0, 1
    with mode:
        image = torch.empty(2, 3, 96, 128, dtype=torch.uint8)
        batch = {"image": image, "depth": torch.empty(2, 1, 96, 128)}
        prediction, depth, loss = learner.forward(batch, 1)
    assert {x.device.type for x in (*prediction, depth, loss)} == {"cuda"}
    assert all(x.dtype == torch.float32 for x in (*prediction, loss))


class NoTable(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses tensors of as many elements as pixels x centres."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            assert not torch.is_tensor(x) or x.numel() < 256 * 2000, operation
        return result


def test_chamfer_makes_no_table_of_pixels_and_centres():
    target = torch.rand(1, 1, 40, 50, generator=generator()) * 10
    c = (torch.rand(1, 256, generator=generator(1)) * 10).sort(1).values.requires_grad_()
    with NoTable():
        cabins.chamfer_loss(c, target, target > 0).backward()
        with pytest.raises(AssertionError):
            brute_force_chamfer(c, target, target > 0)


def test_own_lists_leave_out_what_is_too_far_and_their_camera_travels(no_figures, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        image = rng.integers(0, 255, (96, 160, 3), np.uint8)
        depth = np.full((96, 160), 2000, np.uint16)
        depth[:10] = 65535  # none
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        Image.fromarray(depth).save(tmp_path / f"d{i}.png")
    split = tmp_path / "list.txt"
    split.write_text("".join(f"{i}.png d{i}.png 130.5\n" for i in range(6)))
    own = data.DepthDataset("list", tmp_path, split, train=True)
    assert own[0]["depth"].unique().tolist() == [0, 2] and own.recipe.crop == (64, 128)
    options = ["--data", "list", "--root", tmp_path, "--train-split", split, "--test-split", split]
    options += ["--backbone", "tiny", "--epochs", 1, "--batch-size", 2]
    run_train(*options, "--out", tmp_path / "o")
    config = cabins.load_checkpoint(tmp_path / "o" / "last.pt").config
    assert (config.image_width, config.focal) == (160, 130.5)
    # another test list would mix two in best and metrics.csv
    other = tmp_path / "other.txt"
    other.write_text(split.read_text().replace("0.png d0.png", "1.png d1.png"))
    with pytest.raises(ValueError, match="last.pt is of other "):
        run_train("--resume", tmp_path / "o" / "last.pt", "--test-split", other)
    # without a focal length in the list: NYU's camera, in proportion
    split.write_text("".join(f"{i}.png d{i}.png\n" for i in range(6)))
    own = data.DepthDataset("list", tmp_path, split, train=True)
    assert own.recipe.focal == pytest.approx(518.86 / 4)


def test_nyus_test_pairs_come_from_the_mat_where_the_files_are_not(tmp_path):
    (tmp_path / data.NYU_MAT).touch()
    write_pair(tmp_path / "bath", "00001")
    split = tmp_path / "list.txt"
    split.write_text(
        "".join(f"bath/rgb_0000{i}.jpg bath/sync_depth_0000{i}.png 1\n" for i in (1, 2))
    )
    nyu = data.DepthDataset("nyu", tmp_path, split)
    assert nyu.pairs[1] == (tmp_path / data.NYU_MAT, 2) and nyu.pairs[0][0].endswith(
        "rgb_00001.jpg"
    )
    with pytest.raises(FileNotFoundError, match="2 of the 4 files"):
        data.DepthDataset("nyu", tmp_path, split, train=True)


# ---- A user's first day --------------------------------------------------------------------------


def test_nothing_of_an_old_run_goes_before_the_new_one_can_save(few_rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / "runs" / "toy"
    demo.mkdir(parents=True)
    files = {"last.pt": b"last", "best.pt": b"best", "log.csv": b"step,loss\n9,1.0\n"}
    for name, content in files.items():
        (demo / name).write_bytes(content)
    wrong = [["--batch-size", "1000"], ["--max-depth", "20000"], ["--clip", "nofile.pt"]]
    wrong += [["--init", "nofile.pt"], ["--depth-scale", "7"], ["--resume", "best.pt"]]
    for options in wrong:
        with pytest.raises((ValueError, OSError)):
            run_train(*options)
        assert {name: (demo / name).read_bytes() for name in files} == files, options

    def full_disk(content, path):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run_train("--epochs", 1)
    assert {name: (demo / name).read_bytes() for name in files} == files


def test_fine_tuning_starts_from_a_checkpoints_weights(few_rooms, tiny, tmp_path):
    cabins.save_checkpoint(tmp_path / "tiny.pt", tiny)
    options = ["--init", str(tmp_path / "tiny.pt"), "--out", str(tmp_path / "out")]
    run = train.Run(*train.parse_args(options))
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(run.learner.model.state_dict()[name], tensor), name
    assert run.step == 0 and not run.learner.optimizer.state


def test_training_without_any_valid_depth_ends_with_a_sentence(few_rooms, tmp_path, monkeypatch):
    draw = data.draw_room
    monkeypatch.setattr(data, "draw_room", lambda i: (draw(i)[0], np.zeros((96, 128), np.float32)))
    with pytest.raises(ValueError, match="no depth .* valid"):
        run_train("--epochs", 1, "--batch-size", 2, "--out", tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_a_second_signal_stops_at_once(tmp_path):
    run = start_run(tmp_path)
    wait_until(run, (tmp_path / "log.csv").exists)
    run.send_signal(signal.SIGSTOP)  # so that both are there before a step can end
    for number in (signal.SIGINT, signal.SIGTERM):
        run.send_signal(number)
    run.send_signal(signal.SIGCONT)
    printed = run.communicate()[0]
    assert run.returncode in (130, 143) and "stopped at once" in printed
    assert "Traceback" not in printed


def test_a_killed_worker_is_one_sentence(monkeypatch):
    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(SystemExit) as stop:
        data.run_command(main)
    assert stop.value.code.endswith(
        "killed by signal: Killed. Smaller batches or images may fit in memory"
    )
    with pytest.raises(RuntimeError, match="another"):
        data.run_command(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_processes_must_divide_the_batch(few_rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "rank_of", lambda: (0, 2))
    args = train.parse_args(["--batch-size", "7", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--batch-size 7 is the total: 2 processes must divide it"):
        train.Run(*args)


def test_an_own_list_is_checked(tmp_path, monkeypatch, capsys):
    for i in range(12):
        write_pair(tmp_path, str(i), 96, 128, depth=65535 if i == 3 else 2000)
    write_pair(tmp_path, "small", 40, 60)
    split, test = tmp_path / "train.txt", tmp_path / "test.txt"
    split.write_text("".join(f"rgb_{i}.jpg sync_depth_{i}.png\n" for i in range(12)))
    test.write_text(split.read_text())
    monkeypatch.chdir(tmp_path)
    command = ["data.py", "list", "--root", ".", "--train-split", "train.txt"]
    command += ["--test-split", "test.txt", "--out", "checks"]
    monkeypatch.setattr(sys, "argv", command)
    data.main()
    printed = capsys.readouterr().out
    assert "test: depths go to 65.53 m; above 10.0 m they are none" in printed.replace("54", "53")
    assert Image.open(tmp_path / "checks" / "check_list_0_to_10_m.png").size[0] > 8 * 256
    (tmp_path / "rgb_5.jpg").write_bytes(b"broken")  # none of the eight that are shown
    with pytest.raises(ValueError, match="rgb_5.jpg cannot be read as an image"):
        data.main()
    test.write_text("rgb_small.jpg sync_depth_small.png\n")
    with pytest.raises(
        ValueError, match="rgb_small.jpg has 40 x 60 pixels; the network needs at l"
    ):
        data.main()


@pytest.mark.parametrize("script", ["data.py", "train.py", "eval.py"])
def test_help_explains_every_option(script):
    command = [sys.executable, script, "--help"]
    run = subprocess.run(command, check=True, cwd=HERE, capture_output=True, text=True)
    options = re.split(r"\n  (?=-)", run.stdout.split("options:")[1])[1:]
    assert len(options) >= 8
    for option in options:
        text = " ".join(option.split("\n\n")[0].split())
        assert re.search(r"[a-z]{3,}", re.sub(r"-[-\w]+|\{.*?\}|\[.*?\]|\b[A-Z_|]+\b", "", text)), (
            text
        )
    if script != "data.py":
        assert run.stdout.count(f"python {script}") >= 3 and run.stdout.count(":\n  --") >= 3


# ---- Bad input: one sentence that names the file or value, and the remedy ------------------------


SCRIPTS = {
    "data.py": data.main,
    "train.py": lambda: train.train(*train.parse_args()),
    "eval.py": evaluation.main,
}


def run_script(monkeypatch, name: str, *arguments) -> str:
    """Standard error of a script that must fail."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        data.run_command(SCRIPTS[name])
    return stop.value.code


def test_an_error_is_one_line_on_standard_error():
    command = [sys.executable, "eval.py", "none.pt"]
    run = subprocess.run(command, check=False, cwd=HERE, capture_output=True, text=True)
    expected = "error: none.pt: no such file; expected a checkpoint of train.py or of the authors\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, "", expected)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("backbone", "RN102", "backbone is 'RN102'; it must be one of RN50, RN101, ViT-B/16, tiny"),
        ("distance_class", "mode", "must be one of cabins, median, mean, semantic"),
        ("n_cabins", 7, "n_cabins is 7; it must divide n_bins, which is 256"),
        ("n_bins", 1, "n_bins is 1; it must be an integer of at least 2"),
        ("max_depth", 1e-4, "must be 0 < from < to < 10000 m"),
        ("min_depth", 0.0, "must be 0 < from < to < 10000 m"),
    ],
)
def test_config_names_field_and_allowed_values(field, value, message):
    with pytest.raises(ValueError, match=message):
        cabins.Config(**{field: value})


def test_random_weights_warn_and_wrong_clip_is_refused(tiny, monkeypatch):
    small = {"RN50": cabins.BACKBONES["tiny"]._replace(embed_dim=32)}
    monkeypatch.setattr(cabins, "BACKBONES", cabins.BACKBONES | small)
    with pytest.warns(UserWarning, match="CLIP has random weights: give clip"):
        cabins.CaBins(cabins.Config(backbone="RN50"))
    with pytest.raises(ValueError, match="backbone is RN50; the CLIP given is another"):
        cabins.CaBins(cabins.Config(backbone="RN50"), tiny.clip)
    with pytest.raises(ValueError, match="H and W at least 64"):
        tiny(torch.zeros(1, 3, 63, 64))


class Evil:
    """What pickle would build by running a command."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder of good and of broken files."""
    root = tmp_path_factory.mktemp("broken")
    for name, size in (("1", (480, 640)), ("small", (100, 100)), ("zero", (480, 640))):
        write_pair(root / "a", name, *size, depth=0 if name == "zero" else 1500)
    for name in ("1", "2"):
        write_pair(root / "küche", name, 96, 128)
    write_pair(root / "küche", "low", 80, 128)
    jpg, png = root / "a" / "rgb_1.jpg", root / "a" / "sync_depth_1.png"
    (root / "a" / "cut.jpg").write_bytes(jpg.read_bytes()[:2000])
    (root / "a" / "cut.png").write_bytes(png.read_bytes()[:200])
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "a" / "text.jpg").write_text("no picture")
    shutil.copy(jpg, root / "a" / "jpg.png")
    shutil.copy(jpg, root / "a" / "closed.jpg")
    (root / "a" / "closed.jpg").chmod(0)
    Image.new("L", (640, 480)).save(root / "a" / "8bit.png")
    Image.new("RGB", (640, 480)).save(root / "a" / "colours.png")
    Image.fromarray(np.full((480, 640), 1500, np.uint16)).save(root / "a" / "16bit.png")
    (root / "loop").symlink_to(root / "loop")
    (root / "a" / "loop.jpg").symlink_to(root / "a" / "loop.jpg")
    (root / "nyu.mat").write_text("no HDF5")
    good = "a/rgb_1.jpg a/sync_depth_1.png 518.8579"
    lists = {
        "good": good,
        "windows": f"/{good}\r\n\r\n",
        "byte_order_mark": f"\ufeff{good}\n",
        "kueche": "küche/rgb_1.jpg küche/sync_depth_1.png\nküche/rgb_2.jpg küche/sync_depth_2.png",
        "two_sizes": "küche/rgb_1.jpg küche/sync_depth_1.png\nküche/rgb_low.jpg küche/sync_depth_low.png",
        "depth_for_image": "a/16bit.png a/16bit.png 1",
        "wrong_suffix": "a/jpg.png a/16bit.png 1",
        "nothing": "",
        "no_truth": "a/rgb_1.jpg None 1",
        "nonsense": f"{good}\nnonsense\n",
        "spaces": "my room/rgb.jpg my room/depth.png 518.8579",
        "outside": f"{good}\n../a/rgb_1.jpg a/sync_depth_1.png 1",
        "absolute": f"{jpg} {png} 1",
        "missing": f"{good}\nb/x b/y 1",
        "loop": "a/loop.jpg a/sync_depth_1.png 1",
        "small": "a/rgb_small.jpg a/sync_depth_small.png 1",
        "other_size": "a/rgb_1.jpg a/sync_depth_small.png 1",
        "zero": "a/rgb_zero.jpg a/sync_depth_zero.png 1",
    }
    for image in ("cut", "empty", "text", "closed"):
        lists[image] = f"a/{image}.jpg a/sync_depth_1.png 1"
    for depth in ("8bit", "colours", "jpg"):
        lists[depth] = f"a/rgb_1.jpg a/{depth}.png 1"
    lists["cut_depth"] = "a/rgb_1.jpg a/cut.png 1"
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")

    torch.manual_seed(0)
    model = cabins.CaBins(TINY)
    cabins.save_checkpoint(root / "tiny.pt", model)
    cabins.save_checkpoint(root / "trained.pt", model, args={"data": "nyu"})
    cabins.save_checkpoint(root / "newer.pt", model)
    content = torch.load(root / "newer.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | {"n_heads": 4}}, root / "newer.pt")
    torch.save(content | {"config": content["config"] | {"n_bins": 128}}, root / "shapes.pt")
    torch.save(content | {"args": ["toy"]}, root / "args.pt")
    args = vars(train.parse_args([])[0]) | {"out": "out"}
    state = {
        "args": args,
        "lists": [0, 0],
        "step": 1,
        "optimizer": {},
        "scheduler": {},
    }
    torch.save(content | state, root / "state.pt")
    state = model.clip.state_dict()
    torch.save(state, root / "clip.pt")
    torch.save({k: v for k, v in state.items() if k != "visual.bn1.bias"}, root / "less.pt")
    whole = bytearray((root / "tiny.pt").read_bytes())
    (root / "cut.pt").write_bytes(whole[:100_000])
    whole[len(whole) // 2] ^= 1
    (root / "bit.pt").write_bytes(whole)
    (root / "text.pt").write_text("not a network")
    (root / "empty.pt").write_bytes(b"")
    torch.save([1, 2], root / "list.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, root / "other.pt")
    torch.save({"model": {"prompts": 1}}, root / "numbers.pt")
    torch.save({"model": state, "args": Evil()}, root / "evil.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(ClipLike(model.clip), torch.zeros(1)).save(root / "script.pt")
    (root / "run").mkdir()
    shutil.copy(root / "tiny.pt", root / "run" / "last.pt")
    (root / "pictures").mkdir()
    shutil.copy(jpg, root / "pictures" / "a.jpg")
    (root / "empty").mkdir()
    shutil.copy(jpg, root / "empty" / ".hidden.jpg")
    return root


NYU = "data.py nyu --root . --train-split good.txt --test-split"
TRAIN = (
    "train.py --data nyu --root . --backbone tiny --batch-size 1 --out out --test-split good.txt"
)
OWN = (
    "train.py --data list --root . --backbone tiny --batch-size 1 --out out --test-split kueche.txt"
)
DAMAGED = "is cut off, damaged or of another kind; expected a"
FAULTS = {
    # the data set
    "data.py nyu": "data 'nyu' needs --root, the folder that holds it",
    "data.py nyu --root none": "none: no such folder; --root must be where nyu lies",
    "data.py nyu --root loop": "loop: no such folder; --root must be where nyu lies",
    "data.py list --root .": "data 'list' needs --train-split, a list of its train pairs",
    f"{NYU} none.txt": "none.txt is no list of pairs, .*No such file",
    f"{NYU} a": "a is no list of pairs, .*Is a directory",
    f"{NYU} binary.txt": "binary.txt is no list of pairs, a text in UTF-8",
    f"{NYU} nothing.txt": "the list for --data nyu names no pair of image and depth",
    f"{NYU} no_truth.txt": "the list for --data nyu names no pair of image and depth",
    f"{NYU} nonsense.txt": "nonsense.txt has the line 'nonsense'; it must be 'image depth focal'",
    f"{NYU} spaces.txt": "spaces.txt has the line 'my room.*; it must be .*without spaces",
    f"{NYU} outside.txt": "outside.txt has the line '../a/rgb_1.jpg .*paths below --root",
    f"{NYU} absolute.txt": "2 of the 2 files that the list names are not below .",
    f"{NYU} missing.txt": "2 of the 4 files that the list names are not below .: b/x, …; docs/data",
    f"{NYU} loop.txt": "1 of the 2 files that the list names .*: a/loop.jpg, …",
    f"{NYU} cut.txt": "a/cut.jpg cannot be read as an image: .*truncated",
    f"{NYU} good.txt --depth-scale 0": "depth_scale is 0.0; it must be positive",
    f"{NYU} good.txt --max-depth nan": "max_depth is nan; it must be positive",
    f"{NYU} empty.txt": "a/empty.jpg cannot be read as an image: cannot identify",
    f"{NYU} text.txt": "a/text.jpg cannot be read as an image: cannot identify",
    f"{NYU} closed.txt": "a/closed.jpg cannot be read as an image: .*Permission denied",
    f"{NYU} cut_depth.txt": "a/cut.png cannot be read as a depth map",
    f"{NYU} 8bit.txt": "a/8bit.png is no depth map: its mode is L, not 16-bit grey",
    f"{NYU} colours.txt": "a/colours.png is no depth map: its mode is RGB, not 16-bit grey",
    f"{NYU} depth_for_image.txt": "16bit.png is no image but perhaps a depth map: its mode is I",
    f"{NYU} jpg.txt": "a/jpg.png is no depth map: its mode is RGB, not 16-bit grey",
    f"{NYU} other_size.txt": r"rgb_1.jpg has \(480, 640\) pixels, a/sync_depth_small.png \(100, 100\)",
    f"{NYU} small.txt": "rgb_small.jpg has 100 x 100 pixels; NYU's images have 480 x 640",
    f"{NYU} zero.txt": "test: there is no depth at all in a/rgb_zero.jpg",
    "data.py kitti --root . --train-split good.txt": "has 480 x 640 pixels; KITTI's images have at",
    "data.py nyu --root nyu.mat --test-split good.txt": "nyu.mat (has no pair 1|needs h5py)",
    # training
    "train.py --epochs 0": "--epochs is 0; it must be positive",
    "train.py --batch-size -1": "--batch-size is -1; it must be positive",
    "train.py --lr nan": "--lr is nan; it must be positive",
    "train.py --seed -1": "--seed is -1; it must be from 0 to 2147483647",
    "train.py --root .": "toy rooms take no --root, list or --depth-scale",
    "train.py --data nyu --root none": "none: no such folder",
    "train.py --batch-size 1000 --out out": "--batch-size 1000 is the total: 1 processes must divide it, and 640 pairs fill it",
    "train.py --out run": "run holds another run: --resume it, or take another --out",
    f"{TRAIN} --train-split cut.txt": "^error: .*a/cut.jpg cannot be read as an image",
    f"{TRAIN} --train-split nothing.txt": "the list for --data nyu names no pair",
    f"{TRAIN} --train-split 8bit.txt": "^error: .*a/8bit.png is no depth map",
    f"{TRAIN} --train-split other_size.txt": "^error: .*rgb_1.jpg has .480, 640. pixels",
    f"{OWN} --train-split two_sizes.txt": "rgb_low.jpg has 80 x 128 pixels, but the first of the list 96 x 128",
    f"{TRAIN} --train-split good.txt --clip none.pt": "none.pt: no such file, and none of RN50, RN101, ViT-B/16",
    f"{TRAIN} --train-split good.txt --clip a": "a: a folder; expected a CLIP file",
    f"{TRAIN} --train-split good.txt --clip text.pt": f"text.pt .13 bytes. {DAMAGED} CLIP file",
    f"{TRAIN} --train-split good.txt --clip empty.pt": f"empty.pt .0 bytes. {DAMAGED} CLIP file",
    f"{TRAIN} --train-split good.txt --clip list.pt": r"list.pt holds '\[1, 2\]'; expected a CLIP",
    f"{TRAIN} --train-split good.txt --clip other.pt": "other.pt is no CLIP with its two encoders",
    f"{TRAIN} --train-split good.txt --clip less.pt": "less.pt does not fit the network: .*Missing key.*visual.bn1.bias",
    f"{TRAIN} --train-split good.txt --clip evil.pt": f"evil.pt .* {DAMAGED} CLIP file",
    f"{TRAIN} --train-split good.txt --clip script.pt": f"script.pt .* {DAMAGED} CLIP file",
    "train.py --clip clip.pt --backbone RN50 --out out": "backbone is RN50; the CLIP given is another",
    "train.py --resume none.pt": "none.pt: no such file; expected a checkpoint of train.py",
    "train.py --resume --out out": "out/last.pt: no such file",
    "train.py --resume tiny.pt": "tiny.pt is no last.pt of train.py: it cannot be resumed",
    "train.py --resume args.pt": "args.pt is no last.pt of train.py: it cannot be resumed",
    "train.py --resume state.pt --out out": "state.pt cannot be resumed: KeyError",
    "train.py --resume evil.pt": f"evil.pt .* {DAMAGED} checkpoint",
    # evaluation and pictures
    "eval.py none.pt": "none.pt: no such file; expected a checkpoint of train.py or of the authors",
    "eval.py a": "a: a folder; expected a checkpoint",
    "eval.py cut.pt": f"cut.pt .100000 bytes. {DAMAGED} checkpoint",
    "eval.py bit.pt": f"bit.pt .* {DAMAGED} checkpoint",
    "eval.py text.pt": f"text.pt .* {DAMAGED} checkpoint",
    "eval.py list.pt": "list.pt holds",
    "eval.py other.pt": "other.pt is no checkpoint of CaBins: it has no 'model', but state_dict",
    "eval.py numbers.pt": "numbers.pt is no checkpoint of CaBins",
    "eval.py newer.pt": "newer.pt is of another version of CaBins: .*n_heads",
    "eval.py shapes.pt": "shapes.pt does not fit the network: .*size mismatch",
    "eval.py evil.pt": f"evil.pt .* {DAMAGED} checkpoint",
    "eval.py script.pt": f"script.pt .* {DAMAGED} checkpoint",
    "eval.py args.pt": "args.pt does not say what data it is for: give --data",
    "eval.py tiny.pt": "tiny.pt does not say what data it is for: give --data",
    "eval.py tiny.pt --max-depth 80": "tiny.pt is for depths to 10.0 m, not to 80",
    "eval.py trained.pt": "data 'nyu' needs --root",
    "eval.py trained.pt --root . --split zero.txt": "none of the 1 images has ground truth",
    "eval.py trained.pt --root . --split cut.txt": "^error: .*a/cut.jpg cannot be read as an image",
    "eval.py tiny.pt --images none.png": "none.png: no picture there, nor any that the pattern fits",
    "eval.py tiny.pt --images pictures --out pictures": "is the folder of .*a.jpg, which must stay",
    "eval.py tiny.pt --images pictures --ply --fov 180": "--fov is 180.0; it must be above 0 and below 180",
    "eval.py tiny.pt --images pictures --ply --focal nan": "--focal is nan; it must be above 0 and below",
    "eval.py tiny.pt --explain 0": "--explain is 0; it must be above 0",
    "eval.py tiny.pt --images pictures --range 0": "--range is 0.0; it must be above 0",
    "eval.py tiny.pt --ply": "--ply is for --images",
    "eval.py tiny.pt --range 10": "--range is for --images",
    "eval.py tiny.pt --focal 500": "--focal is for --images",
    "eval.py tiny.pt --images pictures --fov 60": "--fov is for --ply",
    "eval.py tiny.pt --images pictures --focal 500": "--focal is for --ply",
    "eval.py tiny.pt --images pictures --ply --focal 500 --fov 60": "--fov or --focal: give one",
    "eval.py tiny.pt --images pictures --ablate": "--ablate is not for --images",
    "eval.py tiny.pt --images pictures --no-flip": "--no-flip is not for --images",
    "eval.py tiny.pt --data toy --root .": "toy rooms take no --root",
    "eval.py tiny.pt --data toy --train-split good.txt": "--train-split is for training",
    "eval.py tiny.pt --images pictures --out tiny.pt": "tiny.pt must be a folder, but a file is there",
    "eval.py tiny.pt --images pictures --out tiny.pt/a": "must be a folder, but a file is there",
    "eval.py tiny.pt --data toy --out tiny.pt": "must be a folder, but a file is there",
    "eval.py tiny.pt --images empty": "empty: no picture there",
    "eval.py tiny.pt --data toy --device cuda": "--device cuda: torch finds none on this machine",
    "train.py --device mps": "--device mps: torch finds none on this machine",
    "train.py --out tiny.pt": "tiny.pt must be a folder, but a file is there",
    "train.py --init none.pt --out out": "none.pt: no such file; expected a checkpoint",
    "train.py --init tiny.pt --backbone RN50 --out out": "tiny.pt needs --backbone tiny",
    "train.py --init tiny.pt --clip RN50 --out out": "--clip is not for --init",
    "data.py toy --root .": "toy rooms take no --root",
    "data.py nyu --root new.mat --fetch": "nyu cannot be fetched: .* into --root DIR",
    "eval.py tiny.pt --data toy --ablate --explain 1": "--ablate or --explain: give one",
    "train.py --max-depth 20000 --out out": "depths from 0.001 to 20000.0 m; must be 0 < from",
    "train.py --depth-scale 10": "toy rooms take no --root, list or --depth-scale",
}


@pytest.mark.parametrize("command", FAULTS)
def test_a_fault_gives_one_sentence(command, broken, monkeypatch):
    if "closed" in command and os.access(broken / "a" / "closed.jpg", os.R_OK):
        pytest.skip("this user may read everything")
    monkeypatch.chdir(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        sentence = run_script(monkeypatch, *command.split())
    assert re.search(FAULTS[command], sentence), sentence
    assert sentence.startswith("error: ") and "\n" not in sentence and "Traceback" not in sentence
    assert not (broken / "was_run").exists()
    assert not list((broken / "out").glob("*.pt")) if (broken / "out").exists() else True


@pytest.mark.parametrize("name", ["windows", "byte_order_mark", "wrong_suffix", "zero"])
def test_odd_lists_that_work(name, broken):
    pair = data.DepthDataset("nyu", broken, broken / f"{name}.txt", train=True)[0]
    assert pair["depth"].max() == (0 if name == "zero" else 1.5) and pair["image"].shape[0] == 3


def test_training_on_odd_paths(broken, no_figures, tmp_path, monkeypatch):
    monkeypatch.chdir(broken)
    options = f"{OWN} --epochs 1 --train-split kueche.txt --out".split()[1:]
    run_train(*options, tmp_path)
    assert (tmp_path / "last.pt").exists()
