"""What CaBins guarantees, in the order of the paper: python -m pytest -q test_cabins.py

After Sec. 3 and 4 come checkpoints, pictures, reliability and wrong commands. "Goldens" are what
the authors' code and CLIP's own code computed with made weights. A few of their values stand here.
The rest is used where it lies in ../shared.
"""

import contextlib
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
from unittest import mock

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
pytestmark = pytest.mark.filterwarnings("error")
GOLDENS = Path(cabins.__file__).resolve().parents[1] / "shared" / "goldens"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="no ../shared/goldens here")
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


def save_network(path, model: cabins.CaBins, **more) -> None:
    """Write what a checkpoint of train.py holds of a network, and `more`."""
    settings = dataclasses.asdict(model.config)
    torch.save({"config": settings, "model": model.state_dict(), **more}, path)


@pytest.fixture(scope="module")
def tiny() -> cabins.CaBins:
    """A network of random weights, in eval mode. No test changes it."""
    torch.manual_seed(0)
    return cabins.CaBins(TINY).eval()


@pytest.fixture(scope="module")
def tiny_checkpoint(tiny, tmp_path_factory) -> Path:
    """The checkpoint of `tiny`, as train.py would save it after training on toy rooms."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    save_network(path, tiny, args={"data": "toy"})
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


# ---- Sec. 3.1 and 3.2.1  CLIP, its image encoder and Eq. 1 ---------------------------------------


def test_tokenizer_gives_clips_ids():
    known = {
        "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
        "farthest": [1578, 35343],  # two pieces: far, thest
        "79.1234": [278, 280, 269, 272, 273, 274, 275],  # single digits
        "  a PHOTO\tof\n": [320, 1125, 539],  # lower case, white space
        "it's": [585, 568],
        "mojibake cafÃ©": [617, 3252, 11878, 15304],  # repaired to café
        "<p> &amp;amp; q": [283, 335, 285, 261, 336],  # HTML is unescaped twice: <p> & q
        "<|startoftext|> inside <|endoftext|>": [49406, 2912, 49407],
        "日本語のテキスト": [39121, 44353, 34002, 252, 21575, 2429, 228, 47121, 32421, 486],
        "": [],
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
    assert torch.equal(cabins.number_tokens(depths), clip_tokenizer.tokenize(texts, 11))


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


def small_clip(**sizes) -> cabins.CLIP:
    """A CLIP of the tiny network's sizes, but for `sizes`."""
    torch.manual_seed(1)
    return cabins.CLIP(cabins.BACKBONES["tiny"]._replace(**sizes)).eval()


def test_clip_is_read_from_half_precision_archives_and_from_plain_files(tmp_path):
    clip, expected = small_clip().half(), small_clip().half().state_dict()
    clip.ln_final.weight.data = F.pad(clip.ln_final.weight.data, (3, 0))[3:]  # part of a storage
    for name in ("input_resolution", "context_length", "vocab_size"):  # not weights
        clip.register_buffer(name, torch.tensor(77))
    torch.save(clip.state_dict(), tmp_path / "plain.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript, the format of OpenAI's files, is deprecated
        ids = clip_tokenizer.tokenize("far", 3)
        torch.jit.trace_module(clip, {"encode_text": ids}).save(tmp_path / "archive.pt")
    for name in ("plain.pt", "archive.pt"):
        found = cabins.load_clip(tmp_path / name).state_dict()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor.to(found[key].dtype)), key
        assert found["visual.conv1.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="archive.pt"):
        cabins.load_checkpoint(tmp_path / "archive.pt")


def test_eq_1_a_bins_centre_lies_half_its_width_above_all_bins_before_it():
    b = torch.tensor([[0.5, 0.25, 0.25]])  # of 8 m: bins from 2, 6 and 8 m on
    assert cabins.bin_centers(b, 2.0, 10.0).tolist() == [[4.0, 7.0, 9.0]]


def test_fact_6_every_bin_stays_open_and_none_is_wider_than_the_others_leave():
    bins = cabins.AdaptiveBins(64, 256)
    bins.mlp[-1].weight.data.zero_()
    bins.mlp[-1].bias.data[:] = -9.0
    bins.mlp[-1].bias.data[7] = 99.9
    b = bins(torch.randn(1, 64))[0]
    assert b[7].item() == pytest.approx(100 / 125.5) and b[8].item() == pytest.approx(0.1 / 125.5)


def test_positions_are_resized_without_aligned_corners_and_feature_maps_with_them():
    grid = torch.tensor([[9.0], [0], [1], [2], [3]])  # of the mean token, then of 2 x 2 locations
    found = cabins.resize_positions(grid, 2, 4).flatten().tolist()
    assert found == [9, 0, 0.25, 0.75, 1, 2, 2.25, 2.75, 3]
    found = cabins.resize(torch.tensor([[[[0.0, 2.0, 4.0]]]]), (1, 5))
    assert found.tolist() == [[[[0, 1, 2, 3, 4]]]]


# ---- Sec. 3.2.2  CaBins: Eq. 2 -------------------------------------------------------------------


def test_eq_2_weighs_centres_near_the_groups_mean_most():
    c = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.double)
    weights = [math.exp(1 / (abs(x - 7 / 3) + 1e-4)) for x in (1, 2, 4)]
    by_hand = (weights[0] + 2 * weights[1] + 4 * weights[2]) / sum(weights)
    assert cabins.distance_classes(c, 1).item() == pytest.approx(by_hand, rel=1e-9)


def test_table_3_groups_are_of_neighbouring_bins_and_the_median_is_a_bin_centre():
    c = torch.tensor([[1.0, 2, 4, 9, 10, 20, 30, 60]])
    assert cabins.distance_classes(c, 2, "mean").tolist() == [[4, 30]]
    assert cabins.distance_classes(c, 2, "median").tolist() == [[2, 20]]  # the lower one
    with pytest.raises(ValueError, match="mode"):
        cabins.distance_classes(c, 2, "mode")


def test_fact_2_eq_2_picks_the_centre_nearest_to_the_mean_and_depends_on_the_unit():
    b = torch.rand(300, 256, generator=generator()).double() + 0.1
    # metres and units of a metre: how far e is from the nearest centre, the mean and the median
    known = {(10, 1): (0.0004, 0.0106, 0.0266), (10, 100): (0.0105, 0.0006, 0.0280)}
    for (metres, units), expected in known.items():
        c = cabins.bin_centers(b / b.sum(1, keepdim=True), 0.0, metres * units)
        e, groups = cabins.distance_classes(c, 8)[..., None], c.unflatten(1, (8, 32))
        m, median = groups.mean(2, keepdim=True), groups.median(2, keepdim=True).values
        nearest = groups.gather(2, (groups - m).abs().argmin(2, keepdim=True))
        found = [(e - x).abs().mean().item() / units for x in (nearest, m, median)]
        assert found == pytest.approx(expected, rel=0.2)


# ---- Sec. 3.2.3  Prompts, text encoder, TransDecoder: Eq. 3 --------------------------------------


def inputs_of(module: nn.Module, run) -> tuple:
    """What `module` is given when `run` is called."""
    calls = []
    handle = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    run()
    handle.remove()
    return calls[0]


def test_the_text_of_a_distance_is_its_number_with_four_decimals(tiny):
    image = torch.randn(2, 3, 64, 64, generator=generator())
    (ids,) = inputs_of(tiny.clip.token_embedding, lambda: tiny(image))
    texts = [str(round(e, 4)) for e in tiny(image).cabins.flatten().tolist()]
    assert torch.equal(ids, clip_tokenizer.tokenize(texts, 9))  # two digits before the point


def test_prompts_stand_between_start_and_number_and_what_follows_the_end_changes_nothing(tiny):
    words = torch.tensor(clip_tokenizer.encode("a photo of"))  # prompts that are words' embeddings
    expected = tiny.clip.encode_text(clip_tokenizer.tokenize("a photo of 2.5"))
    prompts, ids = tiny.clip.token_embedding(words), cabins.number_tokens(torch.tensor([2.5]), 2)
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
        assert gradients["clip.visual.conv1.weight"].abs().max() > 1e-3


def test_fact_3_the_text_jumps_where_the_number_does_not(released_model):
    texts = cabins.number_tokens(torch.tensor([2.9999, 3.0]), 2)
    assert set(texts[0].tolist()) & set(texts[1].tolist()) == {49406, 269, 49407, 0}  # the point
    image = torch.from_numpy(normal("image", (1, 3, 96, 128)))
    _, z_bar, z = released_model.clip.visual(image)
    t = released_model.clip.encode_text(texts, released_model.prompts)[None]
    s = cabins.cosine_similarity(z, released_model.trans_decoder(t, z_bar, z))[0]
    assert (s[1] - s[0]).abs().max() > 0.01 * s[0].abs().max()


def test_fact_10_the_last_digit_turns_t_nearly_as_far_as_a_metre_does():
    clip = small_clip(text_width=256, text_layers=6)  # of random weights
    scales = [x.std().item() for x in (clip.token_embedding.weight, clip.positional_embedding)]
    assert scales == pytest.approx([1, 0.01], rel=0.02)
    e = torch.rand(40, generator=generator()) * 8 + 1
    t, near, far = (clip.encode_text(cabins.number_tokens(e + x, 2)) for x in (0, 1e-4, 1))
    angles = [F.cosine_similarity(t, x).clamp(max=1).arccos().mean().item() for x in (near, far)]
    assert angles == pytest.approx([0.23, 0.37], rel=0.1)  # radians


SHAPES = (2, 8, 512), (2, 512), (2, 512, 3, 4)  # of t, z̄ and z: B = 2, K = 8, D = 512
TEXTS_AND_IMAGE = [torch.randn(shape, generator=generator(i)) for i, shape in enumerate(SHAPES)]


def test_eq_3_adds_gamma_times_v_post_to_t():
    decoder, t, changes = cabins.TransDecoder(512).eval(), TEXTS_AND_IMAGE[0], []
    for gamma in (0.0, 1.0, 2.0):
        nn.init.constant_(decoder.gamma, gamma)
        changes.append((decoder(*TEXTS_AND_IMAGE) - t).detach())
    assert changes[0].abs().max() == 0 and changes[1].abs().max() > 0
    close(changes[2], 2 * changes[1], 1e-5)


def test_fact_4_eq_3_is_the_identity_at_first():
    torch.manual_seed(0)
    decoder, t = cabins.TransDecoder(512).eval(), TEXTS_AND_IMAGE[0]
    assert decoder.gamma.tolist() == pytest.approx([1e-4] * 512)
    assert 1e-6 < (decoder(*TEXTS_AND_IMAGE) - t).norm() / t.norm() < 1e-3
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    for weight in (torch.cat([m.weight.flatten() for m in linear]), cabins.CaBins(TINY).prompts):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(m.bias is None or not m.bias.any() for m in linear)


def test_trans_decoder_has_six_layers_and_drops_a_tenth_anew_in_each_training_step():
    decoder = cabins.TransDecoder(512)
    assert decoder.layers[5].mlp[1](torch.ones(1)).item() == pytest.approx(0.8413447)  # 1 Φ(1)
    nn.init.ones_(decoder.gamma)
    assert not torch.equal(decoder(*TEXTS_AND_IMAGE), decoder(*TEXTS_AND_IMAGE))
    dropouts = [module for module in decoder.modules() if isinstance(module, nn.Dropout)]
    assert [dropout.p for dropout in dropouts] == [0.1] * 24  # four in each layer, all in use
    assert all(inputs_of(dropout, lambda: decoder(*TEXTS_AND_IMAGE)) for dropout in dropouts)


# ---- Sec. 3.2.4  Similarity, depth decoder, depth: Eq. 4 and 5 -----------------------------------


def test_eq_4_similarity_is_the_cosine_of_each_location_and_each_text():
    z, t = torch.randn(2, 64, 3, 4, generator=generator()), torch.randn(2, 8, 64)
    s = cabins.cosine_similarity(z, t)
    expected = F.cosine_similarity(z[1, :, 2, 3], t[1, 5], dim=0)
    assert s[1, 5, 2, 3].item() == pytest.approx(expected.item(), abs=1e-6)


def test_eq_5_depth_is_the_mean_of_the_centres_under_p():
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


def test_fact_8_a_padded_1x1_convolution_shifts_x4(tiny):
    x = torch.zeros(1, 328, 15, 20)  # x4 and s
    border = tiny.depth_decoder.fuse(x)
    x[:, :, 0] = 1
    change = tiny.depth_decoder.fuse(x) - border
    assert change.shape[2:] == (17, 22) and not change[:, :, 0].any() and change[:, :, 1].any()
    rows = cabins.resize(change, (30, 40))[0, :, :, 20].abs().amax(0)
    assert rows[0] == 0 and rows.argmax() == 2  # row 0 of x4 stands at 29 / 16 = 1.8


def test_fact_9_the_heads_two_convolutions_are_one_linear_map(tiny):
    head, x = tiny.depth_decoder, torch.randn(1, 40, 12, 16, generator=generator())
    weight = torch.einsum("om,mikl->oikl", head.logits.weight[:, :, 0, 0], head.features.weight)
    bias = head.logits.weight[:, :, 0, 0] @ head.features.bias + head.logits.bias
    close(F.conv2d(x, weight, bias, padding=1), head.logits(head.features(x)).detach(), 1e-4)


# ---- Figure 2: the network -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (427, 65), (96, 128)])
def test_fact_6_depth_never_leaves_the_range_of_the_centres_at_any_size_of_image(tiny, size):
    image = torch.randn(2, 3, *size, generator=generator()) * 3
    (depth, c, e, s), half = tiny(image), tiny(image, upsample=False).depth
    assert c.shape == (2, 256) and e.shape == (2, 8) and depth.shape == (2, 1, *size)
    assert s.shape == (2, 8, *(x // 32 for x in size))
    assert half.shape == (2, 1, *(2 * ((x + 1) // 4) for x in size))
    close(F.interpolate(half, size, mode="bilinear", align_corners=True), depth, 1e-6)
    assert (depth.flatten(1).amin(1) >= c[:, 0]).all() and (c[:, -1] >= depth.amax((1, 2, 3))).all()
    for wrong in ((1, 3, 63, 64), (1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=re.escape(str(wrong))):
            tiny(torch.zeros(wrong))


def test_a_batch_equals_singles(tiny):
    image = torch.randn(3, 3, 70, 90, generator=generator())
    batch, singles = tiny(image), [tiny(i[None]) for i in image]
    for name in batch._fields:
        close(torch.cat([getattr(s, name) for s in singles]), getattr(batch, name), 1e-5)


def test_all_results_are_float32_under_autocast_and_nearly_the_same(tiny):
    image = torch.randn(2, 3, 96, 128, generator=generator())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = tiny(image)
    for found, expected in zip(rounded, tiny(image)):
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.02


@pytest.mark.parametrize("kind", cabins.DISTANCE_CLASSES)
def test_every_parameter_learns_but_those_of_the_text_encoder(kind):
    torch.manual_seed(0)
    model = cabins.CaBins(cabins.Config(backbone="tiny", distance_class=kind))
    prediction = model(torch.randn(2, 3, 64, 64))
    cabins.total_loss(prediction, torch.rand(2, 1, 64, 64) * 9 + 0.5, 1e-3).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith("clip.") and not name.startswith("clip.visual.")
        assert (parameter.grad is None) == is_frozen, name
        assert is_frozen or parameter.grad.isfinite().all(), name
    close(prediction.cabins, cabins.distance_classes(prediction.centers, 8, kind), 1e-6)


# ---- Sec. 3.3  Losses: Eq. 6 to 8 ----------------------------------------------------------------


def test_eq_6_silog_by_hand():
    depth, target = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 0.0])
    g = [math.log(2), 0.0]  # the third pixel is not valid
    by_hand = 10 * math.sqrt((g[0] ** 2 + g[1] ** 2) / 2 - 0.85 * ((g[0] + g[1]) / 2) ** 2)
    assert cabins.silog_loss(depth, target, target > 0).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("unbiased", [False, True])
def test_fact_7_eq_6_is_a_variance_and_15_percent_of_a_squared_mean(unbiased):
    target = torch.rand(2, 1, 4, 5, generator=generator()).double() * 9 + 0.5
    mask = torch.rand(2, 1, 4, 5, generator=generator(1)) < 0.6
    one, two = ((target * 1.5 + 0.2 * target.sin()).requires_grad_() for _ in range(2))
    loss = cabins.silog_loss(one, target, mask, unbiased=unbiased)
    g = two[mask].log() - target[mask].log()
    formula = 10 * (g.var(correction=int(unbiased)) + 0.15 * g.mean() ** 2).sqrt()
    (loss + formula).backward()
    assert loss.item() == pytest.approx(formula.item(), rel=1e-9)
    close(one.grad, two.grad, 1e-9)


def test_eq_7_chamfer_by_hand():
    centers, target = torch.tensor([[1.0, 3.0]]), torch.tensor([[[[2.0, 2.5, 7.0, 0.0]]]])
    from_depths = (1 + 0.25 + 16) / 3  # squared distances to the nearest centre: mean over depths
    from_centers = (1 + 0.25) / 2  # and the other way round: mean over centres
    loss = cabins.chamfer_loss(centers, target, target > 0).item()
    assert loss == pytest.approx(from_depths + from_centers)


@pytest.mark.parametrize("spread", [10.0, 0.05])  # 0.05: most centres are near no depth
def test_chamfer_and_its_gradient_are_those_of_a_table_of_pixels_and_centres(spread):
    target = 4 + spread * (torch.rand(3, 1, 20, 30, generator=generator()) - 0.4)
    mask = torch.rand(3, 1, 20, 30, generator=generator(1)) < 0.7
    mask[1] = False  # an image without ground truth adds 0
    mask[2] = torch.arange(600).reshape(1, 20, 30) == 7  # one valid pixel
    centers = (torch.rand(3, 64, generator=generator(1)) * 10).sort(1).values
    one, two = (centers.clone().requires_grad_() for _ in range(2))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss = cabins.chamfer_loss(one, target, mask)
        loss.backward()
    assert max(event.self_cpu_memory_usage for event in profile.function_events) < 4 * 600 * 64
    tables = [(target[i][mask[i]][:, None] - two[i]).square() for i in (0, 2)]
    expected = sum(table.amin(1).mean() + table.amin(0).mean() for table in tables) / 3
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(one.grad, two.grad, 1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_eq_8_adds_a_tenth_of_the_bins_loss_after_upsampling_the_prediction(unbiased):
    target = torch.rand(2, 1, 20, 30, generator=generator()) * 9 + 0.5
    target[0, 0, 3:9] = 1e-3  # not above min_depth: not valid
    depth, c = target[..., ::2, ::2] + 1, torch.linspace(1, 9, 16).repeat(2, 1)
    large, mask = cabins.resize(depth, (20, 30)), target > 1e-3
    pixel = cabins.silog_loss(large, target, mask, unbiased)
    bins = cabins.chamfer_loss(c, target, mask)
    loss = cabins.total_loss(cabins.Prediction(depth, c, None, None), target, 1e-3, unbiased)
    assert loss.item() == pytest.approx((pixel + 0.1 * bins).item())


@pytest.mark.parametrize("truth", [2.0, 0.0])
def test_losses_without_error_or_without_truth_have_finite_gradients(truth):
    depth = torch.full((2, 1, 8, 8), 2.0, requires_grad=True)
    c = torch.linspace(1, 9, 16).repeat(2, 1).requires_grad_()
    target = torch.full((2, 1, 8, 8), truth)
    pixel = cabins.silog_loss(depth, target, target > 0)
    (pixel + cabins.chamfer_loss(c, target, target > 0)).backward()
    assert pixel.item() == pytest.approx(1e-5)
    assert depth.grad.isfinite().all() and c.grad.isfinite().all()


def test_fact_11_eq_3s_decoder_hardly_learns():
    """Its clipped gradients are far below Adam's ε of 1e-8, and those of the others far above."""
    torch.manual_seed(0)
    model = cabins.CaBins(TINY)
    prediction = model(torch.randn(2, 3, 64, 64))
    cabins.total_loss(prediction, torch.rand(2, 1, 64, 64) * 9 + 0.5, 1e-3).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    parts = (model.trans_decoder.layers, model.clip.visual, model.bins, model.depth_decoder)
    gradients = [torch.cat([p.grad.flatten() for p in part.parameters()]) for part in parts]
    decoder, *others = (gradient.square().mean().sqrt() for gradient in gradients)
    assert decoder < 1e-9 and min(others) > 1e-6


# ---- The released network, with made weights -----------------------------------------------------

PREDICTED_CABINS = "0.8196 2.0312 3.0201 3.9133 5.197 6.891 8.0013 9.3794 "
PREDICTED_CABINS += "0.8176 2.027 3.018 3.9136 5.1963 6.8924 8.0021 9.376"
GRADIENT_NORMS = {"contexts": 0.01286741633, "gamma": 0.0005481540862}
GRADIENT_NORMS |= {"clip_model.visual.conv1.weight": 0.22968607015}
GRADIENT_NORMS |= {"computeAdaptiveBin.regressor.4.weight": 1.2583868473592394}


def their_name(name: str) -> str:
    """The name of one of our tensors in the authors' checkpoints."""
    renamed = (pair for pair in cabins.RENAMED.items() if pair[1] and name.startswith(pair[1]))
    theirs, ours = next(renamed, ("", ""))
    return theirs + name.removeprefix(ours)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A checkpoint like the authors', with the goldens' weights."""
    with torch.device("meta"):  # names and shapes alone
        state = cabins.CaBins(cabins.Config()).state_dict()
    shapes = {their_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    shapes |= {"contexts": (1, 8, 512), "clip_model.positional_embedding": (30, 512)}
    made = {f"module.{name}": made_tensor(name, shape) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("released") / "CaBins_nyu.pt"
    torch.save({"model": made, "optimizer": {}, "epoch": 24}, path)
    return path


@pytest.fixture(scope="module")
def released_model(released) -> cabins.CaBins:
    return cabins.load_checkpoint(released, max_depth=10.0)


def made_truth() -> torch.Tensor:
    target = np.minimum(np.abs(normal("depth", (2, 1, 96, 128))) * np.float32(10 / 3), 10)
    return torch.from_numpy(np.where(target < 0.2, 0, target).astype(np.float32))


def test_the_released_networks_depth_losses_and_gradients(released_model):
    model, target = released_model, made_truth()
    prediction = model(torch.from_numpy(normal("image", (2, 3, 96, 128))), upsample=False)
    texts = [str(round(e, 4)) for e in prediction.cabins.flatten().tolist()]
    assert " ".join(texts) == PREDICTED_CABINS
    close(prediction.similarity[0, :3, 1, 2], [-0.039582014, -0.047857970, -0.037478499])
    close(prediction.depth[0, 0, 20, ::16], [4.4796448, 5.6915550, 4.2776427, 5.5420227])
    loss = cabins.total_loss(prediction, target, 1e-3, unbiased=True)
    assert loss.item() == pytest.approx(9.66595458984375 + 0.1 * 0.00059330568, rel=1e-5)
    loss.backward()
    norms = {their_name(n): p.grad.norm() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for name, norm in GRADIENT_NORMS.items():
        assert norms[name].item() == pytest.approx(norm, rel=1e-3), name


# ---- Sec. 4.1  The recipe ------------------------------------------------------------------------


def new_learner(**options):
    """A tiny network with its optimizer, and a batch of two random images."""
    torch.manual_seed(0)
    model = cabins.CaBins(TINY).train()
    learner = train.Learner(model, data.DATASETS["toy"], 100, **{"lr": 1e-3} | options)
    image = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator())
    depth = torch.rand(2, 1, 96, 128, generator=generator()) * 9 + 0.5
    return learner, {"image": image, "depth": depth}


@pytest.mark.parametrize("as_released", [False, True])
def test_the_optimizer_has_every_trained_parameter_once(as_released):
    learner, _ = new_learner(as_released=as_released)
    names = {id(p): name for name, p in learner.model.named_parameters()}
    found = [names[id(p)] for group in learner.optimizer.param_groups for p in group["params"]]
    text = {n for n in names.values() if re.match(r"clip\.(?!visual)", n)}
    never = {"prompts", "trans_decoder.gamma"} | text - {"clip.token_embedding.weight"}
    assert len(found) == len(set(found))
    assert set(found) == set(names.values()) - (never if as_released else text)


def test_the_rate_and_the_momentum_follow_one_cycle():
    learner, _ = new_learner()
    rates, momenta = [], []
    for _ in range(100):
        learner.optimizer.step()
        rates.append(learner.optimizer.param_groups[0]["lr"])
        momenta.append(learner.optimizer.param_groups[-1]["betas"][0])
        learner.scheduler.step()
    rise = (1 - math.cos(math.pi * 14 / 29)) / 2  # in step 14 of 29, of 1 - 1/25
    expected = [1 / 25, 0.04 + 0.96 * rise, 1, 0.5002, 1 / 2500]
    assert [1e3 * rates[i] for i in (0, 14, 29, 64, 99)] == pytest.approx(expected)
    assert [momenta[i] for i in (0, 29, 64, 99)] == pytest.approx([0.95, 0.85, 0.9, 0.95])


def test_a_step_is_adamws_with_a_weight_decay_of_a_tenth_and_clipped_gradients():
    """Also for convolutions, whose fused kernel needs gradient and weight in one memory order."""
    learner, batch = new_learner(lr=1e-2)
    before = [p.detach().clone() for p in learner.model.parameters()]
    norm, lr, squares = learner.step(batch, 1)[2][1], 1e-2 / 25, 0.0
    for p, old in zip(learner.model.parameters(), before):
        if p.grad is not None:
            squares += p.grad.square().sum().item()
            expected = old * (1 - lr * 0.1) - lr * p.grad / (p.grad.abs() + 1e-8)  # Adam's first
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
    assert norm > 0.1 and math.sqrt(squares) == pytest.approx(0.1, rel=1e-3)
    assert {group["betas"][1] for group in learner.optimizer.param_groups} == {0.999}


@pytest.mark.parametrize("as_released", [False, True])
def test_silogs_variance_and_gradients_that_pile_up_are_as_released_only(as_released):
    learner, batch = new_learner(as_released=as_released)
    prompts, start = learner.model.prompts, learner.model.prompts.detach().clone()
    prompts.grad = torch.full_like(prompts, 1e6)  # of earlier steps
    batch["depth"][:, :, 1:] = 0  # in 256 valid pixels the two variances differ by 0.4 %
    prediction, depth, (loss, norm) = learner.step(batch, 1)
    expected = cabins.total_loss(prediction, depth, 1e-3, as_released)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (norm > 1e6) == torch.equal(prompts, start) == as_released


def test_defaults_are_the_papers_and_as_released_starts_from_large_prompts(quick, tmp_path):
    (args, _), weights = train.parse_args(["--data", "nyu", "--root", "."]), set()
    assert (args.lr, args.epochs, args.batch_size) == (3.57e-5, 25, 8)
    assert (args.backbone, args.out, args.root) == ("RN101", "runs/nyu", os.getcwd())
    quick.setitem(data.TOY_ROOMS, "train", range(9))  # the last batch, of one, is kept as released
    for how, std, amp in (("--amp bf16 --seed 1", 0.02, "bf16"), ("--as-released", 0.88, "off")):
        run = train.Run(*train.parse_args(["--out", str(tmp_path / amp), *how.split()]))
        assert run.learner.model.prompts.std().item() == pytest.approx(std, rel=0.1)
        weights.add(run.learner.model.bins.mlp[0].weight.sum().item())  # from the seed
        assert run.args.amp == amp and run.n_steps == 3 * (1 + (amp == "off"))
        autocast = run.learner.autocast
        is_bf16 = autocast._enabled and autocast.fast_dtype == torch.bfloat16
        assert is_bf16 == (amp == "bf16") and run.learner.as_released == (amp == "off")
    with pytest.MonkeyPatch.context() as patch:  # on a GPU that has bf16
        patch.setattr(data, "choose_device", lambda _: torch.device("cuda"))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        amps = [train.parse_args(options.split())[0].amp for options in ("", "--as-released")]
    assert amps == ["bf16", "off"]
    found = cabins.Prediction(0, torch.tensor([[1.0, 3.0]]), 0, 0)
    text = run.log(found, torch.full((1, 1, 2, 2), 2.0), 1e-3, 5.0)
    assert text == "epoch 0, loss 5, bins 2, lr 0.001" and len(weights) == 2
    quick.setattr(data, "rank_of", lambda: (1, 2))
    for options in ("--batch-size 3", "--batch-size 4 --as-released"):
        with pytest.raises(ValueError, match="processes"):
            train.Run(*train.parse_args([*options.split(), "--out", str(tmp_path)]))


def test_pairs_are_shuffled_in_each_epoch_and_training_can_start_anywhere(monkeypatch):
    whole = list(train.batches(10, 3, range(9), 0, False))
    assert whole[:2] == [[7, 0, 9], [2, 1, 3]]
    assert whole[4:] == list(train.batches(10, 3, range(4, 9), 0, False))
    epochs = [{i for batch in whole[k : k + 3] for i in batch} for k in (0, 3, 6)]
    assert [len(epoch) for epoch in epochs] == [9, 9, 9] and whole[:3] != whole[3:6] != whole[6:]
    assert list(train.batches(10, 3, range(3), 1, False)) != whole[:3]
    kept = list(train.batches(10, 4, range(6), 0, True))  # as released: the last batch, one order
    assert [len(batch) for batch in kept] == [4, 4, 2] * 2 and kept[:3] == kept[3:]
    for rank in (0, 1):
        monkeypatch.setattr(data, "rank_of", lambda rank=rank: (rank, 2))
        share = list(train.batches(10, 4, range(6), 0, True))
        assert share == [batch[rank::2] for batch in kept]


def test_dropout_and_augmentation_depend_on_seed_step_and_process_alone(monkeypatch):
    (learner, batch), seeds, maps = new_learner(), [], []
    nn.init.ones_(learner.model.trans_decoder.gamma)  # or dropout would hardly change the texts
    augment = lambda image, depth, _, g, __: (seeds.append(g.initial_seed()) or image / 255, depth)
    monkeypatch.setattr(data, "augment", augment)
    draws = [(1, 0, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1)]
    for number, learner.rank, learner.seed in draws:
        maps.append(learner.forward(batch, number)[0].similarity)
    assert [torch.equal(maps[0], other) for other in maps[1:]] == [True, False, False, False]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds)) == 3  # not of the process


class NothingRead(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what makes a GPU's host wait: reading a value, or a size that depends on one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        assert not operation.__name__.startswith(reads), operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_does_not_wait_for_the_device(amp):
    learner, batch = new_learner(amp=amp)
    with NothingRead():
        result = learner.step(batch, 1)[2]
        with pytest.raises(AssertionError):
            result[0].item()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 asks the driver, even so")
@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_on_a_gpu_that_is_not_here(amp, dtype, monkeypatch):
    """Devices and types of the forward pass and the loss of a step. No kernel runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def grid_sample(x, grid, *_, **__):  # has no fake kernel for CUDA
        assert x.device == grid.device
        return x.new_empty(*x.shape[:2], *grid.shape[1:3])

    monkeypatch.setattr(F, "grid_sample", grid_sample)
    # without these two, torch warns and leaves bf16 autocast switched off
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    (learner, batch), mode, device = new_learner(), FakeTensorMode(), torch.device("cuda")
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, **_: x)  # reads values
    monkeypatch.setattr(cabins.CaBins, "to", lambda model, **_: model)  # of the layout in memory
    with mode, device:  # all that is made is on the GPU
        learner.model = learner.network = cabins.CaBins(TINY)
    learner.autocast = torch.autocast(device.type, torch.bfloat16, amp == "bf16")
    learner.device, types = device, []
    features = learner.model.depth_decoder.features
    features.register_forward_hook(lambda layer, inputs, output: types.append(output.dtype))
    with mode:
        batch = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in batch.items()}
        prediction, depth, loss = learner.forward(batch, 1)
    assert {x.device.type for x in (*prediction, depth, loss)} == {"cuda"}
    assert {x.dtype for x in (*prediction, loss)} == {torch.float32} and types == [dtype]


ROWS = ["RN101 cabins", "RN50 semantic", "RN50 median", "RN50 mean", "RN50 cabins --as-released"]


@pytest.mark.parametrize("row", [*ROWS, "ViT-B/16 cabins"])  # of Tables 1 to 4
def test_every_row_of_the_tables_trains(row, quick, tmp_path):
    """Two steps, validation and reloading, of each network at a reduced width."""
    backbone, kind, *option = row.split()
    small = cabins.BACKBONES[backbone]
    small = small._replace(embed_dim=32, width=64 if small.is_vit else 2, channels=(8, 16, 32, 64))
    small = small._replace(text_width=64, text_layers=1)
    quick.setitem(cabins.BACKBONES, backbone, small)
    option += ["--backbone", backbone, "--distance-class", kind, "--clip", "none"]
    assert run_train("--epochs", 1, "--batch-size", 4, *option, "--out", tmp_path).status == 0
    model = cabins.load_checkpoint(tmp_path / "last.pt")
    assert (model.config.backbone, model.config.distance_class) == (backbone, kind)
    log = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    assert len(log) == 2 and np.isfinite(log["loss"]).all()


@needs_goldens
def test_the_released_training_loop(released, monkeypatch):
    golden = json.loads((GOLDENS / "train_nyu.json").read_text())
    model = cabins.load_checkpoint(released, max_depth=10.0).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    monkeypatch.setattr(data, "augment", lambda image, depth, *_: (image, depth))
    n_steps, nyu = golden["n_steps_of_schedule"], data.DATASETS["nyu"]
    learner = train.Learner(model, nyu, n_steps, golden["lr"], as_released=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"image": torch.from_numpy(normal("image", (2, 3, 96, 128))), "depth": made_truth()}
    for number, known in enumerate(golden["steps"]):
        assert learner.scheduler.get_last_lr()[0] == pytest.approx(known["lr"][0], rel=1e-6)
        loss, norm = learner.step(batch, number)[2].tolist()
        assert loss == pytest.approx(known["loss"], rel=1e-2 if number else 1e-4)
        assert norm == pytest.approx(known["grad_norm"], rel=0.4 if number else 1e-2)
    after = {their_name(k): (v - before[k]).norm() for k, v in model.state_dict().items() if v.ndim}
    for name, moved in golden["moved_norm"].items():
        assert after.get(name, torch.zeros(())).item() == pytest.approx(moved, rel=0.08), name


# ---- Sec. 4.1 and 4.2  Recipes and augmentation --------------------------------------------------


def test_recipes_crops_and_windows_are_the_papers():
    nyu, kitti, own, toy = (data.DATASETS[name] for name in ("nyu", "kitti", "list", "toy"))
    assert (nyu.max_depth, nyu.depth_scale, nyu.crop) == (10, 1000, (416, 544))
    assert (kitti.max_depth, kitti.depth_scale) == (80, 256)
    assert kitti.crop == (352, 704)
    assert (own.max_depth, own.depth_scale, own.crop) == (10, 1000, None)
    assert toy[:5] == (10, 1000, (96, 128), 0, 0.1)  # rooms are not rotated
    assert data.fixed_crop("nyu", 480, 640, True) == (45, 472, 43, 608)
    assert data.fixed_crop("nyu", 480, 640, False) == (0, 480, 0, 640)
    for train_or_test in (True, False):
        assert data.fixed_crop("kitti", 376, 1241, train_or_test) == (24, 376, 12, 1228)
        assert data.fixed_crop("kitti", 352, 1216, train_or_test) == (0, 352, 0, 1216)
        assert data.fixed_crop("list", 64, 100, train_or_test) == (0, 64, 0, 100)
    windows = data.evaluation_windows("kitti", 376, 1241)
    assert list(windows) == ["nested", "full"]  # the paper's comes first
    assert windows["nested"] == (slice(143, 349), slice(43, 1172))
    assert windows["full"] == (slice(129, 348), slice(32, 1184))
    assert data.evaluation_windows("nyu", 480, 640) == {"eigen": (slice(45, 471), slice(41, 601))}
    assert data.evaluation_windows("toy", 96, 128) == {"whole": (slice(0, 96), slice(0, 128))}
    assert [x[:8] for x in data.LISTS.values()] == ["66e2beb7", "e92c191d", "dd5e51c2", "1a631c1b"]


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
    n, (h, w), crop = 8, (41, 64), (32, 48)
    image = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator(1))
    depth = torch.rand(n, 1, h, w, generator=generator(2)) * 10
    recipe = data.DATASETS[name]._replace(crop=crop)
    new_image, new_depth = data.augment(image, depth, recipe, generator(7))
    draws = torch.rand(n, 10, generator=generator(7)).numpy()
    assert {d < 0.5 for d in draws[:, 3]} == {d < 0.5 for d in draws[:, 4]} == {True, False}
    for i in range(n):
        sample = image[i].numpy(), depth[i, 0].numpy()
        expected = augmented(*sample, crop, degrees, brightness, draws[i])
        close(new_image[i], expected[0].astype(np.float32), 2e-4)
        assert (new_depth[i, 0].numpy() != expected[1].astype(np.float32)).sum() <= 2  # ties
    parts = [data.augment(image[i::2], depth[i::2], recipe, generator(7), (i, 2)) for i in (0, 1)]
    for i, part in enumerate(parts):  # each of two processes has every second sample
        assert torch.equal(part[0], new_image[i::2]) and torch.equal(part[1], new_depth[i::2])


CROPS = [("nyu", 427, 565, 416, 544), ("kitti", 352, 1216, 352, 704), ("toy", 96, 128, 96, 128)]
CROPS += [("list", 240, 320, 192, 256), ("list", 64, 70, 64, 64)]  # 7/8, in multiples of 32


@pytest.mark.parametrize("name, height, width, rows, columns", CROPS)
def test_random_crops_have_the_recipes_size(name, height, width, rows, columns):
    image, depth = torch.zeros(1, 3, height, width).byte(), torch.ones(1, 1, height, width)
    new_image, new_depth = data.augment(image, depth, data.DATASETS[name], generator())
    assert new_image.shape[2:] == new_depth.shape[2:] == (rows, columns)
    assert new_depth.mean() > 0.95  # little of the crop lies outside


# ---- Sec. 4.2  Data sets -------------------------------------------------------------------------


def test_toy_rooms_are_exact_and_reproducible():
    image, depth = data.draw_room(5)
    assert image.shape == (96, 128, 3) and image.dtype == np.uint8 and depth.shape == (96, 128)
    close(depth[[0, 0, 48, 95, 95], [0, 127, 64, 0, 127]], [2.639, 2.6675, 1.0717, 0.9598, 2.1194])
    close(image.mean((0, 1)), np.array([139.385, 139.15, 101.939]))
    far = data.draw_room(1_000_003)[1]
    close(np.array([far.mean(), far.std()]), np.array([3.394707, 2.210337]))
    # walls are planes, on which 1 / depth is linear in the pixel: the second difference is zero
    assert (np.abs(np.diff(1 / depth.astype(np.float64), n=2, axis=1)) < 1e-5).mean() > 0.7
    train_set, test_set = data.DepthDataset("toy", train=True), data.DepthDataset("toy")
    assert len(train_set) == 640 == len({*train_set.pairs, *test_set.pairs}) - 64
    assert torch.equal(train_set[5]["image"], torch.from_numpy(image).permute(2, 0, 1))
    assert test_set[0]["image"].dtype == torch.float32
    assert (train_set.checksum, test_set.checksum) == (1003203007, 1206272431)  # as in old runs


def test_files_are_found_in_any_folder_with_few_looks(tmp_path, monkeypatch):
    looks, is_file = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looks.append(path) or is_file(path))
    image, depth = "2011_09_26/{0}_sync/image_02/data/{1}", "{0}_sync/groundtruth/image_02/{1}.png"
    lines = []
    for i in range(60):
        drive, part = f"2011_09_26_drive_{i // 10:04}", "val" if i // 10 == 5 else "train"
        found = [tmp_path / "raw" / f"{image.format(drive, i)}.png"]
        found += [tmp_path / "data_depth_annotated" / part / depth.format(drive, i)]
        for path in found:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        lines.append(f"{image.format(drive, i)}.jpg {depth.format(drive, i)} 721.5\n")
    (tmp_path / "list.txt").write_text("".join([*lines, "a.jpg None 721.5\n"]))
    kitti = data.DepthDataset("kitti", tmp_path, tmp_path / "list.txt")
    assert len(kitti) == 60 and kitti.n_left_out == 1 and kitti.pairs[-1] == tuple(map(str, found))
    assert len(looks) < 3 * 60  # there are 28 folders and 4 suffixes


def test_a_pair_of_nyu(tmp_path):
    write_pair(tmp_path / "sync" / "kitchen", "1", depth=12_000)  # truth beyond 10 m counts
    split = tmp_path / "list.txt"
    split.write_text("\ufeff/kitchen/rgb_1.png /kitchen/sync_depth_1.png 518.8579\r\n\r\n")
    pixels = cabins.read_picture(tmp_path / "sync" / "kitchen" / "rgb_1.jpg")
    pixels = torch.tensor(pixels).permute(2, 0, 1)
    pair = data.DepthDataset("nyu", tmp_path, split, train=True)[0]
    assert torch.equal(pair["image"], pixels[:, 45:472, 43:608])
    assert pair["depth"].shape == (1, 427, 565) and pair["depth"].unique().tolist() == [12]
    pair = data.DepthDataset("nyu", tmp_path, split)[0]
    close(data.denormalize(pair["image"]), pixels / 255)
    assert pair["depth"].shape == (1, 480, 640) and pair["size"].tolist() == [480, 640]


def test_nyus_test_pairs_come_from_the_mat(tmp_path, monkeypatch):
    arrays = {"images": np.random.default_rng(0).integers(1, 256, (3, 3, 640, 480), np.uint8)}
    arrays["rawDepths"] = np.random.default_rng(1).random((3, 640, 480), np.float32) + 1
    mat, split = tmp_path / data.NYU_MAT, tmp_path / "list.txt"
    try:
        import h5py

        with h5py.File(mat, "w") as file:
            file.update(arrays)
    except ImportError:  # it is optional
        mat.touch()
        fake = {"File": staticmethod(lambda path: contextlib.nullcontext(arrays))}
        monkeypatch.setitem(sys.modules, "h5py", type("h5py", (), fake))
    split.write_text("bath/rgb_00002.jpg bath/sync_depth_00002.png 518.8579\n")
    frame = np.s_[..., 7:474, 7:632]
    sample, same = (data.DepthDataset("nyu", root, split)[0] for root in (tmp_path, mat))
    assert torch.equal(sample["image"], same["image"]) and sample["path"] == f"{mat} 2"
    assert torch.equal(sample["depth"][0], torch.from_numpy(arrays["rawDepths"][2].T))
    image = (data.denormalize(sample["image"]) * 255).round()
    assert torch.equal(image[frame], torch.tensor(arrays["images"][2]).mT[frame])
    assert (image > 0).sum() == 3 * 467 * 625  # the border is black
    with pytest.raises(FileNotFoundError):
        data.DepthDataset("nyu", tmp_path, split, train=True)
    split.write_text(write_pair(tmp_path / "bath", "00001"))  # files that are there come first
    assert data.DepthDataset("nyu", tmp_path, split).pairs[0][0].endswith("rgb_00001.jpg")
    split.write_text("bath/rgb_00003.jpg bath/sync_depth_00003.png 518.8579\n")
    with pytest.raises(ValueError, match=r"3 of .*labeled\.mat"):
        data.DepthDataset("nyu", tmp_path, split)[0]


def test_own_pairs_have_a_scale_a_range_and_one_size(own_pairs):
    root, split = own_pairs, own_pairs / "train.txt"
    own = data.DepthDataset("list", root, split, True, depth_scale=500, max_depth=4)
    assert own.frame_size == (96, 128)
    assert [own[i]["depth"].max() for i in range(4)] == [2, 3, 4, 0]  # 5 m is above the range
    ends = {"max_depth": 2}, {"max_depth": 100}
    shallow, deep = (data.DepthDataset("list", root, split, depth_scale=500, **end) for end in ends)
    about = data.describe(own)
    assert all(known in about for known in ("500", "4 m", "25.0%", "3.50 m", "5.00 m"))
    is_odd = ["--max-depth" in data.describe(some) for some in (own, deep)]
    assert is_odd == [False, True]  # the median is 3.5 m, the range ends at 4 and 100 m
    with pytest.raises(ValueError, match="--max-depth"):
        data.describe(shallow)  # 2 m is not inside the range
    # an absolute path below the root works, and so does a line without a focal length
    split.write_text(f"{root}/rooms/rgb_0.jpg {root}/rooms/sync_depth_0.png\n")
    own = data.DepthDataset("list", root, split, train=True)
    assert own[0]["depth"].unique().tolist() == [1]
    write_pair(root / "rooms", "small", 80, 128)
    split.write_text(split.read_text() + "rooms/rgb_small.jpg rooms/sync_depth_small.png\n")
    with pytest.raises(ValueError, match=r"rgb_small\.jpg .*80, 128.*96, 128"):
        data.DepthDataset("list", root, split, train=True)[1]
    assert data.DepthDataset("list", root, split)[1]["depth"].shape == (1, 80, 128)
    split.write_text(write_pair(root / "rooms", "least", 64, 64))  # the smallest
    assert data.DepthDataset("list", root, split)[0]["depth"].shape == (1, 64, 64)


def test_images_of_own_lists_are_upright(own_pairs):
    image = np.random.default_rng(0).integers(0, 255, (128, 96, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (own_pairs / "rooms" / "rgb_4.jpg").unlink()
    Image.fromarray(image).save(own_pairs / "rooms" / "rgb_4.png", exif=exif)
    found, _, path = data.DepthDataset("list", own_pairs, own_pairs / "test.txt").read(0)
    assert path.endswith("rgb_4.png") and np.array_equal(found, np.rot90(image, -1))


def test_the_check_reads_every_pair(own_pairs):
    lists = ["--train-split", own_pairs / "train.txt", "--test-split", own_pairs / "test.txt"]
    ran = run_script("data.py", "list", "--root", own_pairs, *lists)
    assert ran.status == 0 and "train: 4 pairs" in ran.out and "test: 2 pairs" in ran.out
    write_pair(own_pairs / "rooms", "2", 80, 128)
    ran = run_script("data.py", "list", "--root", own_pairs, *lists)
    assert ran.status == 1 and ran.err.count("\n") == 1 and "rgb_2.jpg" in ran.err


# ---- Sec. 4.3 and 4.6  Metrics, and the other rows of Tables 3 and 4 -----------------------------


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
    for wrong in ((depth[:0], target[:0]), (depth[:3], target), (depth[None], target[None])):
        with pytest.raises(ValueError):
            cabins.depth_metrics(*wrong)


def test_semantic_prompts_are_the_papers_eight_phrases():
    model = cabins.CaBins(cabins.Config(backbone="tiny", distance_class="semantic")).eval()
    (ids,) = inputs_of(model.clip.token_embedding, lambda: model(torch.zeros(2, 3, 64, 64)))
    phrases = ["giant", "extremely close", "close", "not in distance", "a little remote", "far"]
    assert torch.equal(ids, clip_tokenizer.tokenize([*phrases, "farthest", "unseen"], 5))
    t, *_ = inputs_of(model.trans_decoder, lambda: model(torch.zeros(2, 3, 64, 64)))
    close(t[1], model.clip.encode_text(ids, model.prompts).detach(), 1e-5)  # in this order


@pytest.fixture
def vit(monkeypatch) -> cabins.CaBins:
    """A network on a small ViT of twelve blocks, with made weights."""
    sizes = {"layers": (12,), "width": 64, "channels": (8, 16, 32, 64), "is_vit": True}
    sizes = cabins.BACKBONES["tiny"]._replace(**sizes)
    monkeypatch.setattr(cabins, "BACKBONES", cabins.BACKBONES | {"RN50": sizes})
    model = cabins.CaBins(cabins.Config(backbone="RN50", longer_side=128))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: made_tensor(name, shape) for name, shape in shapes.items()})
    return model


def test_vit_is_tapped_after_blocks_3_6_9_12_and_brought_to_strides_4_8_16_32(vit):
    image, blocks = torch.from_numpy(normal("image", (2, 3, 90, 128))), []
    for block in vit.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, inputs, output: blocks.append(output))
    taps = [inputs_of(stage, lambda: vit(image))[0] for stage in vit.reassemble]
    for i, tap in enumerate(taps):  # 90 rows become 6 patches; the class token is left out
        assert torch.equal(tap, blocks[3 * i + 2][:, 1:].mT.unflatten(2, (6, 8)))
    pyramid, s = inputs_of(vit.depth_decoder, lambda: vit(image))
    assert cabins.BACKBONES["ViT-B/16"].channels == (96, 192, 384, 768)  # DPT's
    sizes = [(8, 24, 32), (16, 12, 16), (32, 6, 8), (64, 3, 4)]
    assert [tuple(x.shape[1:]) for x in pyramid] == sizes
    close([x[0, 1, 2, 3].item() for x in pyramid], [0.5572053, 0.6477839, 0.6523997, -3.09675])
    assert s.shape == (2, 8, 6, 8) and vit(image).depth.shape == (2, 1, 90, 128)


# ---- Sec. 4.2 and 4.3  The protocol, the tables and the figures ----------------------------------


class MadePairs(data.DepthDataset):
    """Depth maps (1, H, W) as a test set."""

    def __init__(self, *depths, name="toy", max_depth=None):
        super().__init__("toy", max_depth=max_depth)
        self.name, self.depths, self.pairs = name, depths, range(len(depths))

    def __getitem__(self, i):
        depth = self.depths[i]
        size = torch.tensor([375, 1242] if self.name == "kitti" else depth.shape[1:])
        return {"image": depth.expand(3, -1, -1), "depth": depth, "path": "none", "size": size}


@pytest.fixture
def no_workers(monkeypatch):
    """`evaluate` reads the data in this process, because workers take long to start."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def flat(depth: float, height=64, width=64) -> torch.Tensor:
    return torch.full((1, height, width), float(depth))


def measured(depth: torch.Tensor, *truths, **options) -> dict[str, dict[str, float]]:
    """The metrics in each window of a method that predicts `depth` (1, H, W) for every image."""
    return evaluation.evaluate_windows(lambda _: depth[None], MadePairs(*truths, **options), 0)


def test_metrics_are_means_over_images_and_truth_counts_strictly_inside_the_range():
    few = flat(0)
    few[0, :2] = 4.0
    few[0, 2], few[0, 3] = 10.0, 1e-3  # the ends of the range
    row = measured(flat(2), few, flat(2), flat(0))["whole"]  # the last image has no truth
    assert (row["abs_rel"], row["d1"]) == pytest.approx(((0.5 + 0) / 2, (0 + 1) / 2))
    for depth, truth in ((flat(2), flat(10)), (flat(2), flat(0)), (flat(2, 64, 63), flat(2))):
        with pytest.raises(ValueError):
            measured(depth, truth)
    for predicted, counts_as in ((math.nan, 1e-3), (-1, 1e-3), (math.inf, 10), (99, 10)):
        rmse = measured(flat(predicted), flat(2))["whole"]["rmse"]
        assert rmse == pytest.approx(abs(counts_as - 2))
    few[0, 4:] = 8.0  # beyond a range of 6 m, to which the prediction is clipped
    assert measured(flat(9), few, max_depth=6.0)["whole"]["rmse"] == pytest.approx(6 - 4)
    outside = flat(0, 352, 1216)
    outside[0, 130:143] = 2.0  # has truth in KITTI's second window only
    assert list(measured(outside, outside, outside + 2, name="kitti")) == ["nested", "full"]


def test_only_depth_in_the_windows_counts(no_workers):
    windows = {"eigen": (45, 471, 41, 601)}  # top, bottom, left and right
    windows |= {"nested": (143, 349, 43, 1172), "full": (130, 348, 31, 1184)}
    for window, (top, bottom, left, right) in windows.items():
        name, size = ("nyu", (480, 640)) if window == "eigen" else ("kitti", (352, 1216))
        depth, pairs = flat(9, *size), MadePairs(flat(2, *size), name=name)
        depth[0, top:bottom, left:right] = 2.0
        depth[0, top, left] = depth[0, bottom - 1, right - 1] = 4.0
        row = measured(depth, flat(2, *size), name=name)[window]
        assert row["abs_rel"] == pytest.approx(2 / ((bottom - top) * (right - left)))
        papers = evaluation.evaluate(lambda _, depth=depth: depth[None], pairs)
        assert (papers == row) == (window != "full")


def test_flip_averaging_is_of_clipped_depths_at_the_decoders_size(monkeypatch):
    model, image = cabins.CaBins(TINY).eval(), torch.randn(1, 3, 96, 128, generator=generator())
    straight = model(image, upsample=False).depth
    mirrored = model(image.flip(-1), upsample=False).depth.flip(-1)
    model.train()
    for flip, expected in ((True, (straight + mirrored) / 2), (False, straight)):
        depth = evaluation.predictor(model, flip)(image)
        close(depth, cabins.resize(expected, (96, 128)), 1e-5)
        assert model.training and model.bins.training  # the network is left as it was
    halves = torch.full((2, 1, 48, 64), 30.0)
    halves[..., 32:] = math.nan
    monkeypatch.setattr(model, "forward", lambda *_, **__: cabins.Prediction(halves, 0, 0, 0))
    close(evaluation.predictor(model)(image), flat((10 + 1e-3) / 2, 96, 128)[None], 1e-6)


def test_own_lists_are_measured_at_the_size_of_training(tmp_path, no_workers, monkeypatch):
    model, drawn = cabins.CaBins(TINY).eval(), []
    model.depth_decoder.logits.weight.data *= 30  # so that the depth depends on the image
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "a", "1", 480, 640))
    pairs = data.DepthDataset("list", tmp_path, tmp_path / "list.txt")
    depth, image = cabins.infer(model, pairs[0]["path"]).depth, pairs[0]["image"][None]
    straight = evaluation.predictor(model, False, longer_side=128)
    close(straight(image)[0, 0], depth, 1e-5)
    small, large = (evaluation.predictor(model, longer_side=side) for side in (128, None))
    known = {"data": "list", "root": str(tmp_path), "test_split": str(tmp_path / "list.txt")}
    save_network(tmp_path / "a.pt", model, args=known)  # it says on what it was trained
    for predict, option, averaging in ((small, [], "on"), (straight, ["--no-flip"], "off")):
        row = evaluation.evaluate(predict, pairs)
        assert row != evaluation.evaluate(large, pairs)
        *_, line, _, printed = run_script("eval.py", tmp_path / "a.pt", *option).out.splitlines()
        assert "at 128 pixels" in line and f"flip averaging {averaging}" in line
        values = [f"{row[metric]:.3f}" for metric in evaluation.HEADINGS]
        assert printed.split() == ["a.pt,", "whole", *values]
    monkeypatch.setattr(evaluation, "draw_explained", lambda *arguments: drawn.append(arguments))
    evaluation.draw_samples(tmp_path, model, pairs, 1)
    close(drawn[0][3].depth, depth, 1e-5)
    evaluation.draw_samples(tmp_path, model, MadePairs(*[flat(2)] * 9), 3)
    assert [path.name for path, *_ in drawn[1:]] == [f"explained_{i}.png" for i in (0, 4, 8)]
    others = [MadePairs(name=name) for name in ("nyu", "kitti", "toy")]
    assert not any(evaluation.side_for(model, pairs) for pairs in others)


def test_quoted_rows_are_the_papers():
    ours = {"ours": dict.fromkeys(evaluation.HEADINGS, 0.12345)}
    for name, n, total in (("nyu", 6, 3.411), ("kitti", 8, 5.636)):
        headings, row, quoted = map(str.split, evaluation.format_table(name, ours).splitlines())
        assert len(headings) == n and row == ["ours"] + ["0.123"] * n
        assert quoted[:2] == ["CaBins", "(quoted)"] and len(quoted) == 2 + n
        assert sum(map(float, quoted[2:])) == pytest.approx(total)
    assert headings == [*evaluation.HEADINGS.values()]


def test_an_own_list_is_measured_over_the_networks_range(own_pairs, monkeypatch):
    found, path = [], own_pairs / "a.pt"
    command = ["--data", "list", "--root", own_pairs, "--split", own_pairs / "test.txt"]
    monkeypatch.setattr(evaluation, "measure", lambda _, pairs, __: found.append(pairs.recipe))
    for top, option in ((80, []), (80, ["--max-depth", 6]), (6, ["--depth-scale", 500])):
        model = cabins.CaBins(dataclasses.replace(TINY, max_depth=float(top)))
        save_network(path, model, args={"data": "list", "root": "gone"})
        run_script("eval.py", path, *command, *option)
    run_script("eval.py", path, "--data", "toy")  # to which the root of the training is not applied
    found = [(recipe.max_depth, recipe.depth_scale) for recipe in found]
    assert found == [(80, 1000), (6, 1000), (6, 500), (6, 1000)]


def test_the_authors_networks_get_the_range_of_their_data(tiny, few_rooms, tmp_path, monkeypatch):
    torch.save({"model": {"module.prompts": torch.zeros(1)}}, tmp_path / "theirs.pt")
    ranges, command = [], ["eval.py", tmp_path / "theirs.pt", "--workers", 0, "--data"]
    assert run_script(*command, "toy").status == 1  # toy rooms do not say which network it is
    monkeypatch.setattr(cabins, "restore", lambda _, __, top: (ranges.append(top), tiny)[1])
    for name in ("nyu", "kitti"):
        assert run_script(*command, "toy", "--released", name, "--max-depth", 5).status == 0
        run_script(*command, name, "--root", tmp_path / "none")
    assert ranges == [10.0, 10.0, 80.0, 80.0]


def test_figures_show_the_network_and_mark_what_they_cut(tmp_path, monkeypatch):
    model = cabins.CaBins(dataclasses.replace(TINY, distance_class="semantic")).eval()
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    found, s = cabins.infer_with_similarity(model, picture)
    figures, truth = [], np.full((90, 120), 9.5, np.float32)
    truth[:45] = 0  # no truth
    monkeypatch.setattr(evaluation, "save_figure", lambda path, figure: figures.append(figure))
    for options in ((model.config, found, s, truth), (TINY, found, s)):
        evaluation.draw_explained(tmp_path, np.zeros((90, 120, 3), np.uint8), *options)
    figures[0].draw_without_rendering()
    _, depth, true, error, std, *prompts = [a.images[0] for a in figures[0].axes if a.images]
    for shown, values in ((depth, found.depth), (std, found.std), *zip(prompts, s, strict=True)):
        assert np.array_equal(shown.get_array(), values)
    assert {prompt.get_clim() for prompt in prompts} == {(s.min(), s.max())}
    assert depth.get_clim() == true.get_clim() == (found.depth.min(), 9.5)
    assert true.get_array().mask[:45].all() and not true.get_array().mask[45:].any()
    assert error.get_clim() == (0, pytest.approx(0.95))
    assert (error.colorbar.extend, depth.colorbar.extend) == ("max", "neither")
    for axes in ((depth.axes, depth.colorbar.ax), (error.axes, error.colorbar.ax)):
        heights = [axis.get_window_extent().height for axis in axes]
        assert heights[0] == pytest.approx(heights[1], rel=0.1)  # a bar is as high as its map
    boxes = [prompt.axes.title.get_window_extent() for prompt in prompts]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    (bins,) = [axis for axis in figures[0].axes if axis.get_legend()]
    for lines, places in zip(bins.collections, (found.centers, found.cabins), strict=True):
        assert np.allclose([line[0, 0] for line in lines.get_segments()], places)
    titles = [axis.get_title() for axis in figures[1].axes if axis.images][-8:]
    assert titles == [f"“{round(float(e), 4)}”" for e in found.cabins]


def test_each_network_has_folders_of_its_own(few_rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 70)).save("a.png")
    data.use_tf32(True)  # which eval.py must undo
    for n, top, unit, scale in ((1, 10.0, "mm", 1000), (2, 66.0, "cm", 100)):  # fits 16 bits
        model = cabins.CaBins(dataclasses.replace(TINY, max_depth=top))
        save_network(f"{n}.pt", model, args={"data": "toy"})
        assert run_script("eval.py", f"{n}.pt", "--explain", n).status == 0
        assert len([*tmp_path.glob(f"{n}_explained/explained_[01].png")]) == n
        assert torch.get_float32_matmul_precision() == "highest"
        ran = run_script("eval.py", f"{n}.pt", "--images", "a.png", "none", "--explain")
        assert ran.status == 1 and "none" in ran.err
        files = {path.name for path in tmp_path.glob(f"{n}_pictures/*")}
        kinds = ("depth", "colour", f"depth_{unit}", f"std_{unit}", "explained")
        assert files == {f"a_{kind}.png" for kind in kinds}
        written = np.asarray(Image.open(f"{n}_pictures/a_depth_{unit}.png"))
        assert np.array_equal(written, (cabins.infer(model, "a.png").depth * scale).round())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures of every kind, and of other files."""
    folder, exif = tmp_path_factory.mktemp("pictures"), Image.Exif()
    values = np.random.default_rng(0).integers(0, 255, (90, 120), np.uint8)
    grey = Image.fromarray(values)
    for name in ("L.png", "RGBA.webp", "P.png", "CMYK.tif", "1.bmp"):
        grey.convert(name.split(".")[0]).save(folder / name)
    Image.fromarray(values.astype(np.uint16) * 257).save(folder / "deep.png")
    exif[0x0112] = 6  # the camera was held upright
    grey.save(folder / "phone.jpg", exif=exif)
    others = {"save_all": True, "append_images": [grey.rotate(90), grey.rotate(180)]}
    grey.save(folder / "frames.gif", **others)
    grey.resize((1, 300)).save(folder / "$thin_{$.PNG")
    (folder / "broken.jpg").write_bytes((folder / "phone.jpg").read_bytes()[:300])
    Image.fromarray(np.zeros((80, 90), np.float32)).save(folder / "float.tif")
    for name in ("notes.txt", "junk.AVIF", "new.HEIC"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "deeper.png").mkdir()
    for name in (".hidden.png", "deeper.png/below.png", "写真.png", "phone.png"):
        grey.save(folder / name)
    return folder


def test_pictures_of_every_kind_give_what_infer_gives(tiny, tiny_checkpoint, pictures, tmp_path):
    out, command = tmp_path / "out", ("eval.py", tiny_checkpoint, "--out", tmp_path / "out")
    ran = run_script(*command, "--images", pictures, "--range", 8)
    unreadable = ("broken.jpg", "deep.png", "float.tif", "junk.AVIF", "new.HEIC")
    assert ran.status == 1 and ran.err.count("\n") == 5
    assert all(name in ran.err for name in unreadable)
    stems = {"L", "RGBA", "P", "CMYK", "1", "phone", "phone_", "frames", "$thin_{$", "写真"}
    files = {f"{s}_{k}.png" for s in stems for k in ("depth", "colour", "depth_mm", "std_mm")}
    assert {path.name for path in out.iterdir()} == files
    for name in ("phone.jpg", "phone_.png", "CMYK.tif", "RGBA.webp", "$thin_{$.PNG"):
        found = cabins.infer(tiny, pictures / name.replace("_.", "."))
        start = f"{out}/{name.split('.')[0]}"
        for kind, values in (("depth", found.depth), ("std", found.std)):
            written = np.asarray(Image.open(f"{start}_{kind}_mm.png"))
            assert np.array_equal(written, (values * 1000).round())
        viridis = pytest.importorskip("matplotlib").colormaps["viridis"]
        colours = viridis(found.depth / 8, bytes=True)[..., :3]
        assert np.array_equal(np.asarray(Image.open(f"{start}_colour.png")), colours)
    assert run_script(*command, "--images", pictures / "L.png").status == 0  # without --range
    assert (68, 1, 84) in {c for _, c in Image.open(out / "L_colour.png").getcolors(9**6)}


def test_what_folders_and_patterns_find(pictures, tmp_path):
    found = evaluation.find_pictures([f"{pictures}", f"{pictures}/L.png", "none"])
    names, folder = {path.name for path in found}, tmp_path / "[1]"
    assert found == [*sorted(found[:-1]), Path("none")] and len(names) == len(found) == 16
    assert not names & {"notes.txt", ".hidden.png", "below.png", "deeper.png"}
    below = evaluation.find_pictures([f"{pictures}/**", f"{pictures}/notes.txt"])
    assert {path.name for path in below} ^ names == {"below.png", "notes.txt", "none"}
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        evaluation.find_pictures([str(folder)])
    (folder / "a.tif").write_bytes(b"")
    assert evaluation.find_pictures([str(folder)]) == [folder / "a.tif"]


# ---- Settings, checkpoints and your own pictures -------------------------------------------------


def test_the_papers_settings_are_the_defaults_and_wrong_ones_are_refused_by_name():
    paper = ("RN101", "cabins", 256, 8, 8, 1e-3, 10.0, 640)
    assert dataclasses.astuple(cabins.Config())[:8] == paper
    texts = {"backbone": ["RN102"], "distance_class": ["mode"], "min_depth": [0.0, "1"]}
    # 7 does not divide 256, and CLIP has 77 positions
    counts = {"n_bins": [1, 256.0], "n_cabins": [7, 0], "n_prompts": [-1, 61], "longer_side": [0]}
    for field, values in (texts | counts | {"max_depth": [1e-4, "10", math.nan]}).items():
        for value in values:
            with pytest.raises(ValueError, match=f"{field}.*{re.escape(str(value))}"):
                cabins.Config(**{field: value})


def test_checkpoints_hold_the_network_its_settings_and_more(tiny, tiny_checkpoint):
    assert cabins.read_checkpoint(tiny_checkpoint)["args"] == {"data": "toy"}
    loaded = cabins.load_checkpoint(tiny_checkpoint)
    assert loaded.config == TINY and not loaded.training
    assert all(torch.equal(x, tiny.state_dict()[n]) for n, x in loaded.state_dict().items())
    for conv in (loaded.clip.visual.conv2, cabins.CaBins(TINY).depth_decoder.features):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)  # faster
    with pytest.raises(ValueError, match="80"):
        cabins.load_checkpoint(tiny_checkpoint, max_depth=80.0)


def test_the_authors_checkpoints_need_a_range_and_get_the_size_of_their_data(monkeypatch):
    monkeypatch.setitem(cabins.BACKBONES, "RN101", cabins.BACKBONES["tiny"])
    content = {"model": cabins.CaBins(cabins.Config()).state_dict()}
    with pytest.raises(ValueError, match="max_depth"):
        cabins.restore(content, "theirs.pt")
    for expected in ((10, 640), (80, 1216)):
        model = cabins.restore(content, "theirs.pt", expected[0])
        assert dataclasses.astuple(model.config)[-2:] == expected


def test_checkpoints_of_earlier_versions_load(vit, tmp_path):
    config = {"backbone": "RN50", "image_width": 128, "focal": 518.86}
    state, names = vit.state_dict(), ["trans_decoder. context_decoder."]
    names += ["reassemble. clip.visual.reassemble.", "depth_decoder.fuse. depth_decoder.reduce."]
    for new, old in map(str.split, names):
        state = {re.sub(f"^{new}", old, name): tensor for name, tensor in state.items()}
    torch.save({"config": config, "model": state}, tmp_path / "old.pt")
    loaded = cabins.load_checkpoint(tmp_path / "old.pt")
    assert loaded.config == vit.config
    assert all(torch.equal(x, vit.state_dict()[n]) for n, x in loaded.state_dict().items())


def test_downloads_are_whole_checked_and_kept(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"weights")
    url, sha256 = (tmp_path / "source").as_uri(), hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="file"):
        cabins.download(url, "file", "0" * 64)
    path = cabins.download(url, "file", sha256)
    assert path.read_bytes() == b"weights" and list(path.parent.iterdir()) == [path]
    assert cabins.download("file:///none", "file", sha256) == path  # which is not fetched again
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match="file"):
        cabins.download(url, "file", sha256)


def test_infer_gives_mean_and_std_of_depth_and_leaves_each_part_in_its_mode(tmp_path):
    model = cabins.CaBins(TINY)
    model.clip.visual.eval()
    array = np.random.default_rng(0).integers(0, 255, (90, 141, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    negative = np.ascontiguousarray(array[..., ::-1])[..., ::-1]  # strides, as from OpenCV
    found = cabins.infer(model, array)
    assert model.training and model.bins.training and not model.clip.visual.training
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), negative):
        assert all(np.array_equal(a, b) for a, b in zip(found, cabins.infer(model, picture)))
    assert all(x.dtype == np.float32 for x in found)
    # by hand: the longer side is that of training, and reducing averages pixels
    image = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (82, 128), mode="bilinear", antialias=True)
    assert cabins.to_training_size(image.mT, 128).shape == (1, 3, 128, 82)  # upright, too
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    inputs = inputs_of(model.eval().depth_decoder, lambda: model((image - mean) / deviation))
    (seen,) = inputs_of(model.clip.visual, lambda: cabins.infer(model, array))
    close(seen, (image - mean) / deviation, 1e-5)
    c, p = model((image - mean) / deviation).centers, model.depth_decoder(*inputs)
    depth = cabins.expected_depth(c, p)
    std = (p * (c[..., None, None] - depth).square()).sum(1, keepdim=True).sqrt()
    close(found.depth, cabins.resize(depth, (90, 141))[0, 0], 1e-5)
    close(found.std, cabins.resize(std, (90, 141))[0, 0], 1e-3)
    close(found.centers, c[0], 1e-6)
    close(found.cabins, cabins.distance_classes(c, 8)[0], 1e-6)


def test_pictures_of_any_size_mode_and_orientation(tiny, tmp_path):
    for size in ((1, 1), (20_000, 3), (3, 500)):
        found = cabins.infer(tiny, Image.new("RGB", size, (90, 80, 70)))
        assert found.depth.shape == size[::-1] and np.isfinite(found.depth).all()
    grey = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)
    grey[0, 0] = 255
    for mode in ("L", "RGBA", "P", "CMYK"):
        found = cabins.read_picture(Image.fromarray(grey).convert("RGB").convert(mode))
        assert found.shape == (9, 12, 3) and found.dtype == np.uint8
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright: to be turned by a quarter, clockwise
    Image.fromarray(grey).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(cabins.read_picture(tmp_path / "phone.png")[..., 0], np.rot90(grey, -1))
    real, missing = np.zeros((4, 5, 3)), None  # None is what OpenCV gives for a missing file
    deep = (Image.new("F", (9, 9)), Image.fromarray(grey.astype(np.uint16)))
    for wrong in (real, missing, grey, grey[:0, :, None].repeat(3, 2), *deep):
        with pytest.raises(ValueError):
            cabins.infer(tiny, wrong)


# ---- Runs: several processes, interruptions, folders ---------------------------------------------


@contextlib.contextmanager
def short_runs():
    """Runs of eight steps, each of them logged and saved, without figures."""
    with pytest.MonkeyPatch.context() as patch:
        rooms = {"train": range(8), "test": range(1_000_000, 1_000_002)}
        patch.setattr(data, "TOY_ROOMS", rooms)
        for name, value in (("LOG_EVERY", 1), ("SAVE_EVERY", 0)):
            patch.setattr(train, name, value)
        patch.setattr(evaluation, "draw_samples", lambda *_: None)
        yield patch


@pytest.fixture
def quick():
    with short_runs() as patch:
        yield patch


SCRIPT = f"""
import sys
sys.path[:0] = {sys.path}
from {__name__} import *
if "--distance-class" in sys.argv:
    # a process would have the statistics of its own images, which torch joins on GPUs only
    nn.BatchNorm2d.forward = lambda self, x: F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias)
    nn.Dropout.forward = lambda self, x: x
    # without Adam and clipping, a step shows how long a gradient is
    train.MAX_NORM, torch.optim.AdamW = 1e9, lambda p, lr, **_: torch.optim.SGD(p, lr / 100, 0.9)
with short_runs():
    data.run_command(train.main)
"""


def test_two_processes_learn_what_one_learns(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    # phrases as prompts: a number on the edge between two decimals could be written in two ways
    options = ["--distance-class", "semantic", "--epochs", "2", "--batch-size", "4"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 180}
    torchrun, folders = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], []
    for start in ([], torchrun):
        folders.append(tmp_path / f"out{len(start)}")
        command = [sys.executable, *start, "script.py", *options, "--workers", "0", "--out"]
        ran = subprocess.run([*command, folders[-1]], cwd=tmp_path, check=False, **how)
        assert ran.returncode == 0, ran.stdout
        assert ran.stdout.count("epoch 2/2") == 1  # only the first process speaks
    for file, n_rows in (("log.csv", 4), ("metrics.csv", 2)):
        tables = [np.genfromtxt(f / file, delimiter=",", skip_header=1) for f in folders]
        assert len(tables[0]) == n_rows
        np.testing.assert_allclose(*tables, rtol=1e-5)
    one, two = (cabins.read_checkpoint(folder / "last.pt")["model"] for folder in folders)
    assert all(torch.allclose(two[name], tensor, atol=1e-6) for name, tensor in one.items())


EIGHT_STEPS = ("--epochs", 2, "--batch-size", 2)


def run_train(*options, stop=None) -> Ran:
    """Run train.py; `stop` is a step and the signal that comes before it."""
    take = train.Learner.step

    def step(learner, batch, number):
        assert torch.get_float32_matmul_precision() == "high"  # TF32, on a GPU
        if stop and number == stop[0]:
            os.kill(os.getpid(), stop[1])
            assert signal.getsignal(stop[1]) == signal.SIG_DFL  # the same again ends at once
        return take(learner, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "stops", [])
        patch.setattr(train.Learner, "step", step)
        return run_script("train.py", "--workers", 0, *options)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """The folder of a run of eight steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with short_runs():
        assert run_train(*EIGHT_STEPS, "--out", out).status == 0
    return out


def same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, best metric and tables are equal to the last bit."""
    for name in ("last.pt", "best.pt"):
        contents = [cabins.read_checkpoint(folder / name) for folder in (one, other)]
        for content in contents:
            del content["args"]  # which name their folders
        leaves = [torch.utils._pytree.tree_flatten_with_path(content)[0] for content in contents]
        assert len(leaves[0]) == len(leaves[1]) > 250
        for (path, a), (_, b) in zip(*leaves):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path
    for file in ("log.csv", "metrics.csv"):
        assert (one / file).read_text() == (other / file).read_text(), file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_has_done_its_step_and_goes_on_exactly(number, whole_run, quick, tmp_path):
    first, second = tmp_path / "a" / "last.pt", tmp_path / "b"
    quick.setattr(train, "SAVE_EVERY", 600)  # so the stop itself must save
    ran = run_train(*EIGHT_STEPS, "--out", first.parent, stop=(6, number))
    assert ran.status == 128 + number and cabins.read_checkpoint(first)["step"] == 6
    content = torch.load(first, weights_only=True)
    content["args"]["ply"] = content["args"].pop("workers")  # options come and go with versions
    torch.save(content, first)
    assert run_train("--resume", first.parent.rename(second) / "last.pt").status == 0
    same_run(second, whole_run)  # with the best network and the tables of the first half


def test_a_folder_has_one_run_until_that_is_killed_and_then_goes_on(whole_run, quick, tmp_path):
    options = map(str, (*EIGHT_STEPS, "--workers", 1, "--out", tmp_path))
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, *options])
    deadline, last = time.monotonic() + 120, tmp_path / "last.pt"
    while not (last.exists() and Path(f"{last}.partial").exists()):  # in the middle of saving
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGSTOP)
    for options in (["--resume"], EIGHT_STEPS):
        ran = run_train(*options, "--out", tmp_path)
        assert ran.status == 1 and str(tmp_path) in ran.err
    run.kill()
    assert run.wait(timeout=60) == -signal.SIGKILL
    assert run_train("--resume", "--out", tmp_path).status == 0
    same_run(tmp_path, whole_run)


def test_a_full_disk_loses_nothing(whole_run, quick, tmp_path):
    torch_save, is_full = torch.save, iter([True])

    def save(content, path):
        if path.name.startswith("best") and next(is_full, False):  # after the first validation
            path.write_bytes(b"half")
            raise RuntimeError("No space left on device")  # torch's own error
        torch_save(content, path)

    quick.setattr(torch, "save", save)
    assert run_train(*EIGHT_STEPS, "--out", tmp_path).status == 1
    assert cabins.read_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert not list(tmp_path.glob("*.partial"))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("1")  # a row that was cut off in its number
    assert run_train("--resume", "--out", tmp_path).status == 0
    same_run(tmp_path, whole_run)


def test_resuming_refuses_what_would_change_the_run_and_frees_the_checkpoint(whole_run, quick):
    last, before = whole_run / "last.pt", (whole_run / "last.pt").read_bytes()
    for options in (
        ["--epochs", 3],
        ["--batch-size", 4],
        ["--seed", 1],
        ["--as-released"],
        ["--out", "a"],
    ):
        ran = run_train("--resume", last, *options)
        assert ran.status == 1 and options[0] in ran.err
    assert run_train("--resume", last, *EIGHT_STEPS).status == 0  # has finished
    assert np.genfromtxt(whole_run / "log.csv", delimiter=",")[1, -1] == pytest.approx(2e-3 / 25)
    args, content = train.parse_args(["--resume", str(last)])
    assert train.Run(args, content).best == cabins.read_checkpoint(last)["best"]
    assert not content and last.read_bytes() == before
    (whole_run / "best.pt").unlink()  # another must be chosen
    assert train.Run(*train.parse_args(["--resume", str(last)])).best == math.inf


@pytest.mark.parametrize("seconds, steps", [(0, [*range(1, 9)]), (train.SAVE_EVERY, [3, 4, 7, 8])])
def test_last_is_saved_by_time_and_the_best_network_stays(seconds, steps, quick, tmp_path):
    metrics, found = dict.fromkeys(evaluation.HEADINGS, 1.0), iter([0.5, 0.5 + seconds])

    def measure(*_):
        assert torch.get_float32_matmul_precision() == "highest"  # TF32 is for training alone
        return {"whole": metrics | {"abs_rel": next(found)}, "full": metrics}

    saved, clock = [], mock.Mock(monotonic=itertools.count(0, 250).__next__)  # seconds
    save = lambda state, path: saved.append((path.stem, state["step"], state["best"], path.touch()))
    quick.setattr(evaluation, "evaluate_windows", measure)
    quick.setattr(torch, "save", save)
    quick.setattr(train, "SAVE_EVERY", seconds)
    quick.setattr(train, "PRINT_EVERY", 3)
    quick.setattr(train, "time", clock)
    ran = run_train(*EIGHT_STEPS, "--out", tmp_path)
    assert torch.get_float32_matmul_precision() == "high"
    assert [step for name, step, *_ in saved if name == "last.pt"] == steps
    assert [step for name, step, *_ in saved if name == "best.pt"] == [4]
    assert saved[-1][:3] == ("last.pt", 8, 0.5)
    assert [f"step {i} of 8" in ran.out for i in range(1, 9)] == [i in (3, 6) for i in range(1, 9)]


def test_a_new_demo_goes_to_the_first_folder_without_a_run(whole_run, quick, tmp_path):
    quick.chdir(tmp_path)
    names = ("toy", "toy_2", "toy_3")
    demos = [shutil.copytree(whole_run, Path(f"runs/{name}")) for name in names]
    old = {path: path.read_bytes() for demo in demos for path in demo.glob("*.*")}
    mixed = ["--resume", demos[0] / "last.pt", "--out", demos[1]]
    for options in (["--batch-size", 1000], ["--clip", "none.pt"], ["--resume", "best.pt"], mixed):
        assert run_train(*options).status == 1, options
    ran = run_train("--epochs", 2, "--batch-size", 4, stop=(1, signal.SIGTERM))
    assert ran.status == 143 and ran.out.count(" runs/toy_4") == 2  # it goes there; how to resume
    assert run_train("--resume", "runs/toy_4/last.pt").status == 0
    assert cabins.read_checkpoint("runs/toy_4/last.pt")["step"] == 4
    ran = run_train("--resume")  # the first demo, which has finished
    assert ran.status == 0 and "finished" in ran.out and "runs/toy/last.pt" in ran.out
    assert {path: path.read_bytes() for path in old} == old and len(os.listdir("runs")) == 4


@pytest.mark.parametrize("name", ["log.csv", "best.pt"])
def test_files_of_others_stay(name, quick, tmp_path):
    quick.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("time,note\n1,mine\n")
    ran = run_train(*EIGHT_STEPS, "--out", Path(name).parent)
    assert ran.status == 1 and "another" in ran.err
    assert Path(name).read_text() == "time,note\n1,mine\n"


def test_a_run_that_learns_nothing_ends_and_saves_nothing(quick, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cabins, "total_loss", lambda found, *_: found.depth.sum() * math.nan)
        ran = run_train(*EIGHT_STEPS, "--out", tmp_path / "a")
        assert ran.status == 1 and "step 1" in ran.err and "nan" in ran.err
        patch.setattr(cabins, "total_loss", lambda *_: torch.zeros(10**15))
        ran = run_train(*EIGHT_STEPS, "--out", tmp_path / "a")
        assert ran.status == 1 and "--workers" in ran.err and ran.err.count("\n") == 1
    draw = data.draw_room
    quick.setattr(data, "draw_room", lambda i: (draw(i)[0], draw(i)[1] * (i > 8)))
    ran = run_train(*EIGHT_STEPS, "--out", tmp_path / "b")  # without depth in the training rooms
    assert ran.status == 1 and "room 0" in ran.err
    assert not list(tmp_path.glob("*/*.pt"))


def test_training_starts_from_a_checkpoint(tiny, tiny_checkpoint, few_rooms, tmp_path):
    options = ["--init", tiny_checkpoint, "--max-depth", 20, "--out", tmp_path, *EIGHT_STEPS]
    assert run_train(*options, stop=(5, signal.SIGINT)).status == 130
    with Image.open(tmp_path / "explained_0.png") as figure:
        assert min(figure.size) > 300
    args, _ = train.parse_args([*map(str, options), "--out", str(tmp_path / "new")])
    model = train.Run(args, {}).learner.model
    assert all(torch.equal(model.state_dict()[n], x) for n, x in tiny.state_dict().items())
    assert model.config.max_depth == 20


def test_own_pairs_are_trained_and_their_faults_found_first(own_pairs, quick, tmp_path):
    def own(training: str, test: str, name: str, *options) -> Ran:
        lists = ["--train-split", own_pairs / training, "--test-split", own_pairs / test]
        options += ("--data", "list", "--root", own_pairs, *lists, "--backbone", "tiny")
        return run_train(*options, "--epochs", 1, "--batch-size", 2, "--out", tmp_path / name)

    for i, size in enumerate([(128, 96)] * 4 + [(192, 160)] * 2):  # the tests' are made smaller
        write_pair(own_pairs / "rooms", str(i), *size)
    own("train.txt", "test.txt", "other")
    other, pairs = tmp_path / "other", data.DepthDataset("list", own_pairs, own_pairs / "test.txt")
    predict = evaluation.predictor(cabins.load_checkpoint(other / "last.pt"), longer_side=128)
    row = evaluation.evaluate(predict, pairs)
    assert str(row["rmse"]) in (other / "metrics.csv").read_text()  # as eval.py measures
    ran = own("train.txt", "train.txt", "same")
    assert ran.status == 0 and "1000" in ran.out
    content = cabins.read_checkpoint(tmp_path / "same" / "last.pt")
    assert content["config"]["longer_side"] == 128
    assert own("train.txt", "test.txt", "far", "--max-depth", 1).status == 1  # no truth is so near
    assert not (tmp_path / "far").exists()
    assert "none.txt" in own("none.txt", "test.txt", "none").err
    torch.save(content | {"step": 1}, tmp_path / "same" / "last.pt")  # of a run that has not ended
    assert "other pairs" in own("train.txt", "test.txt", "same", "--resume").err  # of test pairs


# ---- What all scripts share ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_is_one_sentence_and_a_bug_is_not(workers, own_pairs):
    (own_pairs / "rooms" / "rgb_4.jpg").write_bytes(b"broken")
    own = data.DepthDataset("list", own_pairs, own_pairs / "test.txt")
    with pytest.raises(SystemExit, match=r"^error: .*rgb_4\.jpg cannot be read.*") as stop:
        data.run_command(lambda: next(iter(data.load(own, workers=workers))))
    assert "\n" not in stop.value.code and "Caught" not in stop.value.code
    with pytest.raises(RuntimeError, match="size"):
        data.run_command(lambda: torch.zeros(2) @ torch.zeros(3))


def test_what_the_machine_lacks_is_one_sentence_with_the_remedy():
    worker = "DataLoader worker (pid 7) is killed by signal: "
    remedies = {
        RuntimeError(f"{worker}Bus error."): "--shm-size",
        RuntimeError("unable to write to file </torch_7>: No space left"): "--shm-size",
        RuntimeError(f"{worker}Killed."): "--workers",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes\nat x"): "smaller",
        MemoryError(): "smaller",
    }
    for error, remedy in remedies.items():
        with pytest.raises(SystemExit) as stop:
            data.run_command(mock.Mock(side_effect=error))
        assert stop.value.code.startswith("error: ") and stop.value.code.count("\n") == 0
        assert remedy in stop.value.code and ("Docker" in stop.value.code) == ("sh" in remedy[:7])


# ---- Wrong commands: one sentence, which names the file or the option ----------------------------


class Evil:  # which pickle would build by running a command
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder of good files, and of broken ones that are named after what is wrong with them."""
    root = tmp_path_factory.mktemp("broken")
    folder = root / "a"
    good = write_pair(folder, "1", 96, 128)
    write_pair(folder, "narrow", 80, 128)
    write_pair(folder, "small", 48, 64)
    write_pair(folder, "zero", 96, 128, depth=0)
    jpg, png = (folder / "rgb_1.jpg").read_bytes(), (folder / "sync_depth_1.png").read_bytes()
    images = {"cut": jpg[:500], "void": b"", "text": b"no picture", "closed": jpg}
    depths = {"cutdepth": png[:60], "jpeg": jpg}
    for name, content in (images | depths).items():
        (folder / name).write_bytes(content)
    (folder / "closed").chmod(0)
    (folder / "loop").symlink_to(folder / "loop")
    for name, mode in (("8bit", "L"), ("colours", "RGB"), ("real", "F")):
        Image.new(mode, (128, 96)).save(folder / f"{name}.tif")
    lists = {name: f"a/{name} a/sync_depth_1.png 1" for name in (*images, "loop", "gone")}
    lists |= {name: f"a/rgb_1.jpg a/{name} 1" for name in depths}
    lists |= {name: f"a/rgb_1.jpg a/{name}.tif 1" for name in ("8bit", "colours", "real")}
    for name in ("narrow", "small", "zero"):
        lists[name] = f"a/rgb_{name}.jpg a/sync_depth_{name}.png 1\n"
    lists |= {"good": good, "rgb_narrow": good + lists.pop("narrow"), "nothing": ""}
    lists |= {"depth_narrow": "a/rgb_1.jpg a/sync_depth_narrow.png 1", "nonsense": f"{good}x"}
    lists |= {"spaces": "my room/rgb.jpg my room/d.png 1", "outside": "../a/1.jpg ../a/1.png 1"}
    lists["notruth"] = "a/rgb_1.jpg None"
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "nyu.mat").write_text("no HDF5")
    for name in ("pictures", "empty", "run"):
        (root / name).mkdir()
    (root / "pictures" / "a.jpg").write_bytes(jpg)
    # checkpoints
    torch.manual_seed(0)
    save_network(root / "tiny.pt", cabins.CaBins(TINY))
    content = torch.load(root / "tiny.pt", weights_only=True)
    config, state = content["config"], content["model"]
    nan = state | {"prompts": state["prompts"] * math.nan}
    clip = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    run = {"args": vars(train.parse_args([])[0]), "lists": [0, 0], "step": 1}
    files = {"newer": content | {"config": config | {"n_heads": 4}}}
    files["shapes"] = content | {"config": config | {"n_bins": 128}}
    files["setting"] = content | {"config": config | {"backbone": "RN102"}}
    files |= {"noconfig": content | {"config": ["tiny"]}, "args": content | {"args": ["toy"]}}
    files |= {"nan": content | {"model": nan}, "numbers": {"model": {"prompts": 1}}, "list": [1, 2]}
    files |= {"state": content | run | {"optimizer": {}, "scheduler": {}}, "clip": clip}
    files |= {"other": {"state_dict": {"a": torch.zeros(1)}}, "evil": {"model": state, "a": Evil()}}
    files["theirs"] = {"model": {"module.contexts": torch.zeros(1, 8, 512)}}
    files["less"] = {k: v for k, v in clip.items() if k != "visual.bn1.bias"}
    files["noclip"] = {k: v for k, v in clip.items() if k.startswith("visual.")}
    for name, value in files.items():
        torch.save(value, root / f"{name}.pt")
    with zipfile.ZipFile(root / "script.pt", "w") as archive:  # as TorchScript's are
        archive.writestr("script/data.pkl", pickle.dumps(Evil()))
        archive.writestr("script/constants.pkl", pickle.dumps(()))
    whole = bytearray((root / "tiny.pt").read_bytes())
    (root / "cut.pt").write_bytes(whole[:100_000])
    whole[len(whole) // 2] ^= 1
    (root / "bit.pt").write_bytes(whole)
    (root / "text.pt").write_text("not a network")
    shutil.copy(root / "tiny.pt", root / "run" / "last.pt")
    return root


LIST = "data.py list --root . --train-split good.txt --test-split"
TRAIN = "train.py --data list --root . --backbone tiny --out out --batch-size 1"
TRAIN += " --test-split good.txt --train-split"
# Each command is its beginning and one of these ends. What the sentence must name is in brackets.
WRONG = {
    "data.py": """
        [nyu] | [moon] --root . | [list] --root . | toy [--root] . | toy [--rot] .
        | toy --out [tiny.pt] | nyu --root [none] --test-split good.txt --train-split good.txt
        | nyu --root . --train-split good.txt --test-split good.txt []
        | kitti --root . --train-split [small].txt | nyu --root [nyu.mat] --test-split good.txt
        | nyu --root nyu.mat --test-split good.txt --train-split good.txt [a/]""",
    LIST: """
        [none.txt] | [a] | [binary.txt] | nothing.txt [] | notruth.txt [] | [nonsense].txt
        | [spaces.txt] | [outside.txt] | [gone].txt | [loop].txt | [cut].txt | [void].txt
        | [text].txt | [closed].txt | [cutdepth].txt | [jpeg].txt | [8bit].txt
        | [colours].txt | [real].txt | [depth_narrow].txt | [small].txt
        | good.txt [--depth-scale] 0 | good.txt [--max-depth] nan | good.txt [--max-depth] ten""",
    "train.py": """
        [--epochs] 0 | [--batch-size] -1 | [--batch-size] 1.5 | [--lr] inf | [--lr] x | [--seed] -1
        | [--root] . | [--depth-scale] 10 | [--max-depth] -3 | [--workers] -1 --out out
        | --data [moon] | --data [kitti] | --data nyu --root [none] --train-split good.txt
        | --backbone [RN102] | --distance-class [mode] | --amp [fp16] | [--epoch-length] 3
        | [--batch-size] 1000 --out out | --out [run] | --out [tiny.pt] | --device [mps]
        | --resume [none.pt] | --resume --out [out] | --resume [tiny.pt] | --resume [args.pt]
        | --resume [state.pt] | --resume [evil.pt] | --init [none.pt] --out out
        | --init [tiny.pt] --backbone RN50 --out out | --init tiny.pt [--clip] RN50 --out out
        | --init [cut.pt] --out out | --clip clip.pt --backbone [RN50] --out out""",
    TRAIN: """
        [cut].txt | nothing.txt [] | [8bit].txt | [depth_narrow].txt | [rgb_narrow].txt
        | [small].txt | good.txt --clip [none.pt] | good.txt --clip [a] | good.txt --clip [text.pt]
        | good.txt --clip [other.pt] | good.txt --clip [less.pt] | good.txt --clip [noclip.pt]
        | good.txt --clip [evil.pt] | good.txt --clip [script.pt]""",
    "eval.py": """
        [none.pt] | [a] | [cut.pt] | [bit.pt] --data toy | [text.pt] | [args.pt] | [list.pt]
        | [other.pt] | [numbers.pt] | [newer.pt] | [shapes.pt] | [setting.pt] | [noconfig.pt]
        | [nan.pt] | [evil.pt] | [script.pt] | [theirs.pt] | [tiny.pt]
        | theirs.pt --released [moon]""",
    "eval.py tiny.pt": """
        [--released] nyu | --data [nyu] | --data [moon] | --data toy [--root] .
        | --data toy [--train-split] good.txt | --data toy --device [cuda] | --data toy --amp [half]
        | --data list --root . --split [none.txt] | --data list --root . --split [cut].txt
        | --data list --root . --split zero.txt [] | --data list --root . --split [small].txt
        | --data toy [--out] out | --data toy --explain --out [tiny.pt]
        | --data toy [--range] 10 | --data toy --explain [--range] 10
        | --data toy [--explain] 0 | --data toy [--explain] two | --data toy [--max-depth] 0
        | --data toy --explain [--no-flip] | --data toy [--ablate]
        | --images [none.png] | --images [empty] | --images pictures --out [pictures]
        | --images pictures --out [tiny.pt] | --images pictures --out [tiny.pt]/a
        | --images pictures [--range] 0 | --images pictures [--no-flip]
        | --images pictures [--root] . | --images pictures [--data] toy
        | --images pictures [--explain] 2 | --images pictures [--max-depth] 5
        | --images pictures [--train-split] good.txt""",
}
COMMANDS = [" ".join([start, *end.split()]) for start in WRONG for end in WRONG[start].split("|")]


def files_below(folder: Path) -> dict[str, tuple]:
    paths = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_wrong_command_says_why_and_changes_no_file(command, broken, few_rooms, monkeypatch):
    monkeypatch.chdir(broken)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # and no worker, which takes long to start
    if "closed" in command and os.access("a/closed", os.R_OK):
        pytest.skip("this user may read everything")
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before, words = files_below(broken), re.sub(r"\[\]|[][]", "", command).split()
    assert all(Path(w).exists() for w in words if w.endswith((".txt", ".pt")) and "none" not in w)
    ran = run_script(*words)
    assert ran.status == 1 and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert re.search(r"\[(.*?)\]", command)[1] in ran.err
    assert not re.search(r"Traceback|invalid .* value|^error: \[", ran.err)
    assert files_below(broken) == before
