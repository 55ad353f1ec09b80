"""What CaBins guarantees, in the order of the paper: python -m pytest -q test_cabins.py

Known answers of the released network and of CLIP were computed by the authors' code and by CLIP's
own code, with made weights (`made_tensor`).
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import os
import re
import sys
import warnings
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the CPU's
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


Ran = namedtuple("Ran", "status out err")


def run_script(script: str, *arguments) -> Ran:
    """Run train.py, eval.py or data.py with these arguments, in this process."""
    main = {"train.py": train.main, "eval.py": evaluation.main, "data.py": data.main}[script]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                data.run_command(main)
                status = 0
            except SystemExit as stop:  # Python prints a text, and exits with 1
                status = 1 if isinstance(stop.code, str) else stop.code or 0
                err.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
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
    ids = clip_tokenizer.number_tokens(depths)
    assert torch.equal(ids, clip_tokenizer.tokenize(texts, 11))
    assert torch.equal(clip_tokenizer.number_tokens(depths[None, :9], 1), ids[None, :9, :8])
    known = [49406, 276, 271, 269, 274, 49407]  # 50.3, to two decimals of 50.3000
    assert clip_tokenizer.number_tokens(torch.tensor(50.3), 2).tolist() == [*known, 0, 0, 0]


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


def test_clip_is_read_from_half_precision_archives_and_from_plain_files(tmp_path, monkeypatch):
    clip, expected = small_clip().half(), small_clip().half().state_dict()
    clip.ln_final.weight.data = F.pad(clip.ln_final.weight.data, (3, 0))[3:]  # part of a storage
    clip.text_projection.data = clip.text_projection.data.T.contiguous().T  # other strides
    for name in ("input_resolution", "context_length", "vocab_size"):  # not weights
        clip.register_buffer(name, torch.tensor(77))
    torch.save(clip.state_dict(), tmp_path / "plain.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript, the format of OpenAI's files, is deprecated
        ids = clip_tokenizer.tokenize("far", 3)
        torch.jit.trace_module(clip, {"encode_text": ids}).save(tmp_path / "archive.pt")
    for name in ("plain.pt", "archive.pt"):
        found = cabins.load_clip(tmp_path / name)
        assert cabins.CaBins(TINY, found).clip is found
        for key, tensor in found.state_dict().items():
            assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
    with pytest.raises(cabins.InputError, match=r"archive\.pt.*extras\.convert"):
        cabins.load_checkpoint(tmp_path / "archive.pt")
    with pytest.raises(cabins.InputError, match="RN50"):
        cabins.CaBins(cabins.Config(backbone="RN50"), found)
    # a ViT and a ResNet whose text encoders have one size
    is_vit = {"is_vit": True, "layers": (4,), "width": 64}
    sizes = cabins.BACKBONES["tiny"]._replace(text_layers=1, embed_dim=32)
    both = {"RN101": sizes, "ViT-B/16": sizes._replace(**is_vit)}
    monkeypatch.setattr(cabins, "BACKBONES", both)
    for sizes in both.values():
        torch.save(cabins.CLIP(sizes).state_dict(), tmp_path / "plain.pt")
        assert cabins.load_clip(tmp_path / "plain.pt").architecture == sizes
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for name, what in (("other.pt", "none of the CLIPs"), ("RN102", "RN102 is not a file.*RN50")):
        with pytest.raises(cabins.InputError, match=what):
            cabins.load_clip(tmp_path / name)


CLIPS = {  # OpenAI's address of each file, with its SHA-256
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
}
LISTS = {
    "nyudepthv2_train": "66e2beb718a58c5c946c169f6e70cc6ae166ddd19f5618266fff52ff7443e0e9",
    "nyudepthv2_test": "e92c191d5835a22589b843c11b80cd7235d5bd0d4136e42a6debcea4511bf906",
    "kitti_eigen_train": "dd5e51c2df33d4c53c1d4dd01726326e7c3ac087cff165b1007738c5c8a06aca",
    "kitti_eigen_test": "1a631c1bc0d40f5580f8363bffe0ffcc9524e5ecdd56765aebfffc3dce162201",
}


def test_what_is_fetched_is_named_by_url_and_sha256(monkeypatch, tmp_path):
    found, expected = [], []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetch = lambda url, path, sha256: found.append((url, sha256)) or Path("none").read_bytes()
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for name, file in CLIPS.items():
        with pytest.raises(cabins.InputError, match="No such file.*clip-"):
            cabins.load_clip(name)
        url = f"https://openaipublic.azureedge.net/clip/models/{file}"
        expected.append((url, file.split("/")[0]))
    for name, is_train in itertools.product(("nyu", "kitti"), (True, False)):
        with pytest.raises(cabins.InputError, match=r"No such file.*files_with_gt\.txt"):
            data.DepthDataset(name, tmp_path, train=is_train)
    lists = "https://raw.githubusercontent.com/EunjinSon1/CaBins/"
    lists += "4e9c9a03d16da42e65c67f5bb7911397726ade6c/train_test_inputs"
    expected += [(f"{lists}/{name}_files_with_gt.txt", sha) for name, sha in LISTS.items()]
    assert found == expected


def test_downloads_are_whole_checked_and_kept(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"weights")
    url, sha256 = (tmp_path / "source").as_uri(), hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(cabins.InputError, match=r"source was not fetched.*hub/checkpoints/file"):
        cabins.download(url, "file", "0" * 64)
    path = cabins.download(url, "file", sha256)
    assert path.read_bytes() == b"weights" and list(path.parent.iterdir()) == [path]
    assert cabins.download("file:///none", "file", sha256) == path  # which is not fetched again


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
    c = torch.tensor([[1.0, 2, 4, 11, 10, 20, 30, 64]])
    assert cabins.distance_classes(c, 2, "mean").tolist() == [[4.5, 31]]
    assert cabins.distance_classes(c, 2, "median").tolist() == [[2, 20]]  # the lower one
    with pytest.raises(ValueError, match="mode"):
        cabins.distance_classes(c, 2, "mode")


@pytest.mark.parametrize("seed", range(3))
def test_fact_2_eq_2_picks_the_centre_nearest_to_the_mean_and_depends_on_the_unit(seed):
    b = torch.rand(300, 256, generator=generator(seed)).double() + 0.1
    # metres and units of a metre: how far e is from the nearest centre, the mean and the median
    known = {(10, 1): (0.0004, 0.0106, 0.0266), (10, 100): (0.0105, 0.0006, 0.0280)}
    for (metres, units), expected in (known | {(80, 1): (0.024, 0.064, 0.212)}).items():
        c = cabins.bin_centers(b / b.sum(1, keepdim=True), 0.0, metres * units)
        e, groups = cabins.distance_classes(c, 8)[..., None], c.unflatten(1, (8, 32))
        m, median = groups.mean(2, keepdim=True), groups.median(2, keepdim=True).values
        nearest = groups.gather(2, (groups - m).abs().argmin(2, keepdim=True))
        found = [(e - x).abs().mean().item() / units for x in (nearest, m, median)]
        assert found == pytest.approx(expected, rel=0.2)


def test_equal_widths_give_the_means_of_the_groups():
    c = cabins.bin_centers(torch.full((1, 256), 1 / 256, dtype=torch.double), 0.0, 10.0)
    close(cabins.distance_classes(c, 8), c.unflatten(1, (8, 32)).mean(2), 1e-9)


# ---- Sec. 3.2.3  Prompts, text encoder, TransDecoder: Eq. 3 --------------------------------------


def inputs_of(module: nn.Module, run) -> tuple:
    """What `module` is given when `run` is called."""
    calls = []
    handle = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    run()
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("top, integer_digits", [(10.0, 2), (120.0, 3)])
def test_the_text_of_a_distance_is_its_number_with_four_decimals(top, integer_digits):
    torch.manual_seed(0)
    model = cabins.CaBins(dataclasses.replace(TINY, max_depth=top)).eval()
    image = torch.randn(2, 3, 64, 64, generator=generator())
    (ids,) = inputs_of(model.clip.token_embedding, lambda: model(image))
    texts = [str(round(e, 4)) for e in model(image).distances.flatten().tolist()]
    assert torch.equal(ids, clip_tokenizer.tokenize(texts, integer_digits + 7))


def test_prompts_stand_between_start_and_number_and_what_follows_the_end_changes_nothing(tiny):
    words = torch.tensor(clip_tokenizer.encode("a photo of"))  # prompts that are words' embeddings
    expected = tiny.clip.encode_text(clip_tokenizer.tokenize("a photo of 2.5"))
    prompts, ids = (
        tiny.clip.token_embedding(words),
        clip_tokenizer.number_tokens(torch.tensor([2.5]), 2),
    )
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


def test_fact_3_the_text_jumps_where_the_number_does_not(released_model):
    texts = clip_tokenizer.number_tokens(torch.tensor([2.9999, 3.0]), 2)
    assert set(texts[0].tolist()) & set(texts[1].tolist()) == {49406, 269, 49407, 0}  # the point
    image = torch.from_numpy(normal("image", (1, 3, 96, 128)))
    _, z_bar, z = released_model.clip.visual(image)
    t = released_model.clip.encode_text(texts, released_model.prompts)[None]
    s = cabins.cosine_similarity(z, released_model.trans_decoder(t, z_bar, z))[0]
    assert (s[1] - s[0]).abs().max() > 0.01 * s[0].abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_fact_10_the_last_digit_turns_t_nearly_as_far_as_a_metre_does(seed):
    clip = small_clip(text_width=256, text_layers=6)  # of random weights
    scales = [x.std().item() for x in (clip.token_embedding.weight, clip.positional_embedding)]
    assert scales == pytest.approx([1, 0.01], rel=0.02)
    e = torch.rand(40, generator=generator(seed)) * 8 + 1
    t, near, far = (
        clip.encode_text(clip_tokenizer.number_tokens(e + x, 2)).detach() for x in (0, 1e-4, 1)
    )
    near, far = (F.cosine_similarity(t, x).clamp(max=1).arccos().mean() for x in (near, far))
    assert far / 3 < near < 3 * far


SHAPES = (2, 8, 512), (2, 512), (2, 512, 3, 4)  # of t, z̄ and z: B = 2, K = 8, D = 512


TEXTS_AND_IMAGE = [torch.randn(shape, generator=generator(i)) for i, shape in enumerate(SHAPES)]


def test_eq_3_adds_gamma_times_v_post_to_t():
    decoder, t, changes = cabins.TransDecoder(512, 256, 6).eval(), TEXTS_AND_IMAGE[0], []
    for gamma in (0.0, 1.0, 2.0):
        nn.init.constant_(decoder.gamma, gamma)
        changes.append((decoder(*TEXTS_AND_IMAGE) - t).detach())
    assert changes[0].abs().max() == 0 and changes[1].abs().max() > 0
    close(changes[2], 2 * changes[1], 1e-5)


def test_fact_4_eq_3_is_the_identity_at_first():
    torch.manual_seed(0)
    decoder, t = cabins.TransDecoder(512, 256, 6).eval(), TEXTS_AND_IMAGE[0]
    assert decoder.gamma.tolist() == pytest.approx([1e-4] * 512)
    assert 1e-6 < (decoder(*TEXTS_AND_IMAGE) - t).norm() / t.norm() < 1e-3
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    for weight in (torch.cat([m.weight.flatten() for m in linear]), cabins.CaBins(TINY).prompts):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(m.bias is None or not m.bias.any() for m in linear)


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
    decoder, x = tiny.depth_decoder, torch.randn(1, 40, 12, 16, generator=generator())
    weight = torch.einsum(
        "om,mikl->oikl", decoder.classifier.weight[:, :, 0, 0], decoder.head.weight
    )
    bias = decoder.classifier.weight[:, :, 0, 0] @ decoder.head.bias + decoder.classifier.bias
    close(F.conv2d(x, weight, bias, padding=1), decoder.classifier(decoder.head(x)).detach(), 1e-4)


# ---- Figure 2: the network -----------------------------------------------------------------------


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
        with pytest.raises(cabins.InputError, match=re.escape(str(wrong))):
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


def test_no_value_is_read_and_all_is_made_on_the_images_device():
    """A read makes a GPU's host wait. Tensors on "meta" have no values, so none can be read."""
    model = cabins.CaBins(TINY).to("meta")
    image = torch.empty(2, 3, 70, 96, device="meta", dtype=torch.uint8)
    depth = torch.empty(2, 1, 70, 96, device="meta")
    image, depth = data.augment(image, depth, data.DATASETS["list"], generator())
    prediction = model(image)
    loss = cabins.total_loss(prediction, depth, 1e-3)
    loss.backward()
    assert {x.device.type for x in (*prediction, depth, loss, model.prompts.grad)} == {"meta"}
    assert data.denormalize(image).device.type == "meta"


KINDS = ("cabins", "median", "mean", "semantic")  # the rows of Table 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_but_those_of_the_text_encoder(kind):
    torch.manual_seed(0)
    model = cabins.CaBins(cabins.Config(backbone="tiny", distance_class=kind))
    prediction = model(torch.randn(2, 3, 64, 64))
    cabins.total_loss(prediction, torch.rand(2, 1, 64, 64) * 9 + 0.5, 1e-3).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith("clip.") and not name.startswith("clip.visual.")
        assert (parameter.grad is None) == is_frozen, name
        assert is_frozen or parameter.grad.isfinite().all(), name
    close(prediction.distances, cabins.distance_classes(prediction.centers, 8, kind), 1e-6)


# ---- Sec. 3.3  Losses: Eq. 6 to 8 ----------------------------------------------------------------


def test_eq_6_silog_by_hand():
    depth, target = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 0.0])
    g = [math.log(2), 0.0]  # the third pixel is not valid
    by_hand = 10 * math.sqrt((g[0] ** 2 + g[1] ** 2) / 2 - 0.85 * ((g[0] + g[1]) / 2) ** 2)
    assert cabins.silog_loss(depth, target, target > 0).item() == pytest.approx(by_hand)


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
        with pytest.raises(ValueError, match="one shape"):  # or they would broadcast
            cabins.silog_loss(*wrong)


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


def test_eq_8_adds_a_tenth_of_the_bins_loss_after_upsampling_the_prediction():
    target = torch.rand(2, 1, 20, 30, generator=generator()) * 9 + 0.5
    target[0, 0, 3:9] = 1e-3  # not above min_depth: not valid
    depth, c = target[..., ::2, ::2] + 1, torch.linspace(1, 9, 16).repeat(2, 1)
    large, mask = cabins.resize(depth, (20, 30)), target > 1e-3
    expected = cabins.silog_loss(large, target, mask) + 0.1 * cabins.chamfer_loss(c, target, mask)
    prediction = cabins.Prediction(depth, c, None, None, None)
    loss = cabins.total_loss(prediction, target, 1e-3)
    assert loss.item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="one shape"):
        cabins.total_loss(prediction, target[:, 0], 1e-3)


@pytest.mark.parametrize("truth", [2.0, 0.0])
def test_losses_without_error_or_without_truth_have_finite_gradients(truth):
    depth = torch.full((2, 1, 8, 8), 2.0, requires_grad=True)
    c = torch.linspace(1, 9, 16).repeat(2, 1).requires_grad_()
    target = torch.full((2, 1, 8, 8), truth)
    pixel = cabins.silog_loss(depth, target, target > 0)
    (pixel + cabins.chamfer_loss(c, target, target > 0)).backward()
    assert pixel.item() == pytest.approx(1e-5)
    assert depth.grad.isfinite().all() and c.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_fact_11_eq_3s_decoder_hardly_learns(seed):
    """Its clipped gradients are far below Adam's ε of 1e-8, and those of the others far above."""
    torch.manual_seed(seed)
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


def their_name(name: str) -> str:
    """The name of one of our tensors in the authors' checkpoints."""
    ours = next(prefix for prefix in RENAMED if name.startswith(prefix))
    return RENAMED[ours] + name.removeprefix(ours)


@pytest.fixture(scope="module")
def released_model() -> cabins.CaBins:
    """The authors' network, with made weights. No test changes it."""
    with torch.device("meta"):  # names and shapes alone
        model = cabins.CaBins(cabins.Config())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {name: made_tensor(their_name(name), shape) for name, shape in shapes.items()}
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
    loss = pixel + 0.1 * bins
    loss.backward()
    norms = {their_name(n): p.grad.norm() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for name, norm in GRADIENT_NORMS.items():
        assert norms[name].item() == pytest.approx(norm, rel=1e-3), name


# ---- Sec. 4.1 and 4.2  Recipes and augmentation --------------------------------------------------


def test_recipes_crops_and_windows_are_the_papers():
    nyu, kitti, own, toy = (data.DATASETS[name] for name in ("nyu", "kitti", "list", "toy"))
    assert (nyu.max_depth, nyu.depth_scale, nyu.crop) == (10, 1000, (416, 544))
    assert (kitti.max_depth, kitti.depth_scale) == (80, 256)
    assert kitti.crop == (352, 704)
    assert (own.max_depth, own.depth_scale, own.crop) == (10, 1000, None)
    assert toy[:5] == (10, 1000, (96, 128), 0, 0.1)  # rooms are not rotated
    assert [x.longer_side for x in (nyu, kitti, toy, own)] == [640, 1216, 128, None]
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
    with pytest.raises(ValueError, match="uint8"):
        data.augment(new_image, new_depth, recipe)


CROPS = [("nyu", 427, 565, 416, 544), ("kitti", 352, 1216, 352, 704), ("toy", 96, 128, 96, 128)]
CROPS += [("list", 240, 320, 192, 256), ("list", 64, 70, 64, 64)]  # 7/8, in multiples of 32


@pytest.mark.parametrize("name, height, width, rows, columns", CROPS)
def test_random_crops_have_the_recipes_size(name, height, width, rows, columns):
    image, depth = torch.zeros(1, 3, height, width).byte(), torch.ones(1, 1, height, width)
    new_image, new_depth = data.augment(image, depth, name, generator())
    assert new_image.shape[2:] == new_depth.shape[2:] == (rows, columns)
    assert new_depth.mean() > 0.95  # little of the crop lies outside


def test_no_temporary_is_copied_asynchronously(tiny, monkeypatch):
    """Its memory is freed, and may be written anew, before the copy has ended."""
    to = torch.Tensor.to

    def checked(tensor, *args, non_blocking=False, **more):
        assert not non_blocking
        return to(tensor, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", checked)
    image, depth = torch.zeros(1, 3, 64, 70).byte(), torch.ones(1, 1, 64, 70)
    data.augment(image, depth, "list", generator())
    data.denormalize(cabins.normalize(image / 255))
    cabins.infer(tiny, np.zeros((64, 64, 3), np.uint8))
    evaluation.predictor(tiny)(image / 255)


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
    assert test_set.pairs[0] == ("room", 1_000_000)
    for wrong in ({"root": "."}, {"split": "list.txt"}):
        with pytest.raises(cabins.InputError, match="--data"):
            data.DepthDataset("toy", **wrong)


FOLDERS = {
    "nyu": ("", "sync", "official_splits/test"),
    "kitti": (
        "",
        "raw",
        "data_depth_annotated/train",
        "data_depth_annotated/val",
        "gts",
        "gt_depth",
    ),
    "list": ("",),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_listed_file_in_the_documented_folders_comes_first(name, tmp_path):
    (tmp_path / "list.txt").write_text("/a/1.jpg\ta/my depth.png\n\n#a/2.jpg None\na/3.jpg\tNone\n")
    for folder in FOLDERS[name]:
        root = tmp_path / f"root_{folder.replace('/', '_')}"
        inside = root / folder / "a"
        inside.mkdir(parents=True)
        (inside / "my depth.png").touch()
        with pytest.raises(cabins.InputError, match=r"a/1\.jpg or .* is not below .*docs/data\.md"):
            data.DepthDataset(name, root, tmp_path / "list.txt")
        for file, image in (("1.jpeg", "1.jpeg"), ("1.png", "1.png"), ("1.jpg", "1.jpg")):
            (inside / file).touch()  # the listed one wins, then .png
            pairs = data.DepthDataset(name, root, tmp_path / "list.txt")
            assert pairs.pairs == [(f"{inside}/{image}", f"{inside}/my depth.png")]
            assert pairs.n_left_out == 1
        (inside / "my depth.png").unlink()  # a depth map has the listed suffix
        (inside / "my depth.jpg").touch()
        with pytest.raises(cabins.InputError, match="1 of the 1 listed"):
            data.DepthDataset(name, root, tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(f"\ufeff{inside}/1.jpeg a/1.jpg\r\n", "utf-8")
    found = data.DepthDataset(name, root, tmp_path / "list.txt").pairs  # absolute, without focal
    assert found == [(f"{inside}/1.jpeg", f"{inside}/1.jpg")]
    for text in ("a.jpg\n", "a b c d\n", "a.jpg None\n"):  # no pair; no pair; no depth
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(cabins.InputError, match="pair"):
            data.DepthDataset(name, root, tmp_path / "list.txt")
    with pytest.raises(cabins.InputError, match="gone.* is not a list"):
        data.DepthDataset(name, root, tmp_path / "gone.txt")
    with pytest.raises(cabins.InputError, match="--root .*gone does not exist"):
        data.DepthDataset(name, tmp_path / "gone", tmp_path / "list.txt")


def test_a_depth_map_is_no_image_of_its_own(tmp_path):
    for name in ("1.png", "2.jpg", "2.png"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("1.jpg 1.png\n2.jpg 2.png\n")
    with pytest.raises(cabins.InputError, match=r"1\.jpg or 1\.png is not .*1 of the 2 listed"):
        data.DepthDataset("list", tmp_path, tmp_path / "list.txt")
    with pytest.raises(cabins.InputError, match="--train-split"):
        data.DepthDataset("list", tmp_path, train=True)


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


def test_a_pair_of_kitti(tmp_path):
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "raw" / "a", "1", 375, 1242, 25_600))
    pixels = cabins.read_picture(tmp_path / "raw" / "a" / "rgb_1.jpg")[23:375, 13:1229]
    for is_train in (True, False):
        pair = data.DepthDataset("kitti", tmp_path, tmp_path / "list.txt", is_train)[0]
        image = pair["image"] if is_train else data.denormalize(pair["image"]) * 255
        assert np.array_equal(image.round().permute(1, 2, 0).numpy(), pixels)
        assert pair["depth"].unique().tolist() == [100]  # in units of 1/256 m; beyond 80 m counts
        assert pair["size"].tolist() == [375, 1242] and pair["path"].endswith("a/rgb_1.jpg")
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "raw" / "a", "2", 352, 1215))
    with pytest.raises(cabins.InputError, match=r"rgb_2\.jpg.*352, 1216"):
        data.DepthDataset("kitti", tmp_path, tmp_path / "list.txt")[0]


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
    with pytest.raises(cabins.InputError):
        data.DepthDataset("nyu", tmp_path, split, train=True)
    split.write_text(write_pair(tmp_path / "bath", "00001"))  # files that are there come first
    assert data.DepthDataset("nyu", tmp_path, split).pairs[0][0].endswith("rgb_00001.jpg")
    split.write_text("bath/rgb_00003.jpg bath/sync_depth_00003.png 518.8579\n")
    with pytest.raises(cabins.InputError, match=r"3 of .*labeled\.mat"):
        data.DepthDataset("nyu", tmp_path, split)[0]


def test_own_pairs_have_a_scale_a_range_and_one_size(own_pairs):
    root, split = own_pairs, own_pairs / "train.txt"
    own = data.DepthDataset("list", root, split, True, depth_scale=500, max_depth=4)
    assert own.frame_size == (96, 128)
    assert [own[i]["depth"].max() for i in range(4)] == [2, 3, 4, 0]  # 5 m is above the range
    # an absolute path below the root works, and so does a line without a focal length
    split.write_text(f"{root}/rooms/rgb_0.jpg {root}/rooms/sync_depth_0.png\n")
    own = data.DepthDataset("list", root, split, train=True)
    assert own[0]["depth"].unique().tolist() == [1] and own[0]["image"].dtype == torch.uint8
    write_pair(root / "rooms", "small", 80, 128)
    split.write_text(split.read_text() + "rooms/rgb_small.jpg rooms/sync_depth_small.png\n")
    with pytest.raises(cabins.InputError, match=r"rgb_small\.jpg .*80, 128.*96, 128"):
        data.DepthDataset("list", root, split, train=True)[1]
    assert data.DepthDataset("list", root, split)[1]["depth"].shape == (1, 80, 128)
    for size, is_large in (((64, 64), True), ((63, 64), False), ((64, 63), False)):
        split.write_text(write_pair(root / "rooms", "least", *size))
        with contextlib.nullcontext() if is_large else pytest.raises(cabins.InputError, match="64"):
            assert data.DepthDataset("list", root, split)[0]["depth"].shape == (1, 64, 64)


def test_a_data_set_is_described_with_a_doubt_about_its_scale(own_pairs):
    def about(**changes) -> str:
        split = own_pairs / "train.txt"
        return data.describe(
            data.DepthDataset("list", own_pairs, split, depth_scale=500, **changes)
        )

    write_pair(own_pairs / "rooms", "0", 96, 128, 65535)  # often stands for none
    lines = (own_pairs / "train.txt").read_text()
    (own_pairs / "train.txt").write_text(f"{lines}a.jpg None\n")
    line = about(max_depth=4.5)
    known = (
        "4 pairs (1 without",
        "75% of",
        "1/500 m",
        "median 4.00 m",
        "deepest 5.00 m",
        "33.3% beyond 4.5",
    )
    assert all(part in line for part in known) and "--max-depth" not in line
    for top, is_odd in ((4.4, True), (79, False), (81, True)):  # 5 and 90 % of the range
        assert ("--depth-scale" in about(max_depth=top)) == is_odd
    with pytest.raises(cabins.InputError, match=r"rgb_0\.jpg.* 3 m: .*--max-depth"):
        about(max_depth=3)  # which 3 m itself is not below


def test_a_pair_is_turned_upright_together(own_pairs):
    image = np.random.default_rng(0).integers(0, 255, (128, 96, 3), np.uint8)
    depth = np.random.default_rng(1).integers(1, 9999, (128, 96)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (own_pairs / "rooms" / "rgb_4.jpg").unlink()
    Image.fromarray(image).save(own_pairs / "rooms" / "rgb_4.png", exif=exif)
    pairs = data.DepthDataset("list", own_pairs, own_pairs / "test.txt")
    upright = np.rot90(depth, -1)
    for stored in (depth, upright):  # depth of the image's stored size, and one that is upright
        stored = Image.fromarray(np.ascontiguousarray(stored))
        stored.save(own_pairs / "rooms" / "sync_depth_4.png")
        found, metres, path = pairs.read(0)
        assert path.endswith("rgb_4.png") and np.array_equal(found, np.rot90(image, -1))
        assert metres.dtype == np.float32 and np.allclose(metres, upright / 1000)
    stored.resize((64, 64)).save(own_pairs / "rooms" / "sync_depth_4.png")
    with pytest.raises(cabins.InputError, match=r"rgb_4\.png .*96, 128.*sync_depth_4.*64, 64"):
        pairs.read(0)
    Image.fromarray(image[..., 0]).save(own_pairs / "rooms" / "sync_depth_4.png")
    with pytest.raises(cabins.InputError, match=r"sync_depth_4\.png has mode L; convert"):
        pairs.read(0)
    (own_pairs / "rooms" / "sync_depth_4.png").write_bytes(b"none")
    with pytest.raises(cabins.InputError, match=r"sync_depth_4\.png cannot .*16-bit grey PNG"):
        pairs.read(0)


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


def flat(depth: float, height=64, width=64) -> torch.Tensor:
    return torch.full((1, height, width), float(depth))


def measured(depth: torch.Tensor, *truths, **options) -> dict[str, evaluation.Measured]:
    """The result in each window of a method that predicts `depth` (1, H, W) for every image."""
    return evaluation.evaluate_windows(lambda _: depth[None], MadePairs(*truths, **options), 0)


def test_metrics_are_means_over_images_and_truth_counts_strictly_inside_the_range():
    few = flat(0)
    few[0, :2] = 4.0
    few[0, 2], few[0, 3] = 10.0, 1e-3  # the ends of the range
    row, n_images, n_nan = measured(flat(2), few, flat(2), flat(0))["whole"]  # one has no truth
    assert (row["abs_rel"], row["d1"]) == pytest.approx(((0.5 + 0) / 2, (0 + 1) / 2))
    assert (n_images, n_nan) == (2, 0)
    assert evaluation.evaluate(lambda _: flat(2)[None].numpy(), MadePairs(few, flat(2)), 0) == row
    for truth in (flat(10), flat(0)):
        with pytest.raises(cabins.InputError, match="whole"):
            measured(flat(2), truth)
    with pytest.raises(ValueError, match="64, 63"):
        measured(flat(2, 64, 63), flat(2))
    for predicted, counts_as in ((math.nan, 1e-3), (-1, 1e-3), (math.inf, 10), (99, 10)):
        found = measured(flat(predicted), flat(2), flat(2))["whole"]
        assert found.metrics["rmse"] == pytest.approx(abs(counts_as - 2))
        assert found.n_nan == (2 * 64 * 64 if math.isnan(predicted) else 0)
    few[0, 4:] = 8.0  # beyond a range of 6 m, to which the prediction is clipped
    assert measured(flat(9), few, max_depth=6.0)["whole"].metrics["rmse"] == pytest.approx(6 - 4)
    outside = flat(0, 352, 1216)
    outside[0, 130:143] = 2.0  # has truth in KITTI's second window only
    found = measured(outside, outside, outside + 2, name="kitti")
    assert {window: x.n_images for window, x in found.items()} == {"nested": 1, "full": 2}
    with pytest.raises(cabins.InputError, match="nested"):
        measured(outside, outside, name="kitti")
    with pytest.raises(cabins.InputError, match="Subset.*pairs"):
        evaluation.evaluate(None, torch.utils.data.Subset(MadePairs(few), [0]), 0)


def test_only_depth_in_the_windows_counts():
    windows = {"eigen": (45, 471, 41, 601)}  # top, bottom, left and right
    windows |= {"nested": (143, 349, 43, 1172), "full": (130, 348, 31, 1184)}
    for window, (top, bottom, left, right) in windows.items():
        name, size = ("nyu", (480, 640)) if window == "eigen" else ("kitti", (352, 1216))
        depth, pairs = flat(9, *size), MadePairs(flat(2, *size), name=name)
        depth[0, top:bottom, left:right] = 2.0
        depth[0, top, left] = depth[0, bottom - 1, right - 1] = 4.0
        row = measured(depth, flat(2, *size), name=name)[window].metrics
        assert row["abs_rel"] == pytest.approx(2 / ((bottom - top) * (right - left)))
        papers = evaluation.evaluate(lambda _, depth=depth: depth[None], pairs, 0)
        assert (papers == row) == (window != "full")


def test_flip_averaging_is_of_clipped_depths_at_the_decoders_size(monkeypatch):
    torch.manual_seed(0)
    model, image = cabins.CaBins(TINY).eval(), torch.randn(1, 3, 96, 128, generator=generator())
    model.depth_decoder.classifier.weight.data *= 30  # so that depth depends on the image
    straight, mirrored = (model(x, upsample=False).depth for x in (image, image.flip(-1)))
    for flip, expected in ((True, (straight + mirrored.flip(-1)) / 2), (False, straight)):
        depth = evaluation.predictor(model, flip)(image)
        torch.testing.assert_close(depth, cabins.resize(expected, (96, 128)).detach())
    assert torch.equal(evaluation.predictor(model)(image), evaluation.predictor(model, True)(image))
    large, seen = F.interpolate(image, (192, 256)), []
    handle = model.clip.visual.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    assert evaluation.predictor(model, False)(large).shape == (1, 1, 192, 256)
    handle.remove()
    close(seen[0], F.interpolate(large, (96, 128), mode="bilinear", antialias=True))  # as trained
    rooms = MadePairs(flat(2))
    model.train().bins.eval()
    found = evaluation.evaluate(model, rooms, 0)
    assert model.training and model.clip.training and not model.bins.training  # as it was
    assert found == evaluation.evaluate(evaluation.predictor(model.eval()), rooms, 0)
    with pytest.raises(cabins.InputError, match=r"model\.eval"):
        evaluation.predictor(model.train())
    halves = torch.full((2, 1, 48, 64), -5.0)
    halves[0, ..., 32:] = 30.0
    halves[0, :, 3] = math.nan
    found = cabins.Prediction(halves, None, None, None, None)
    monkeypatch.setattr(model.eval(), "forward", lambda *_, **__: found)
    depth = evaluation.predictor(model)(image)[0, 0]
    assert depth[0, [0, 127]].tolist() == pytest.approx([1e-3, (10 + 1e-3) / 2])
    assert depth[6].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_networks_of_other_types_are_measured_and_infer(dtype):
    torch.manual_seed(0)
    model = cabins.CaBins(TINY).eval()
    array = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    expected, row = cabins.infer(model, array), evaluation.evaluate(model, MadePairs(flat(2)), 0)
    found = cabins.infer(model.to(dtype), array)
    assert all(x.dtype == np.float32 for x in found)
    assert all(np.allclose(*x, rtol=0, atol=0.3) for x in zip(found, expected))
    assert evaluation.evaluate(model, MadePairs(flat(2)), 0)["rmse"] == pytest.approx(
        row["rmse"], 0.1
    )


ALL = ("AbsRel", "SqRel", "RMSE", "RMSElog", "log10", "d<1.25", "d<1.25^2", "d<1.25^3")
TABLES = {  # columns, by their number; and "Ours" of Tables 1 and 2
    "nyu": (10, (0, 2, 4, 5, 6, 7), "0.120 0.401 0.050 0.866 0.978 0.996"),
    "kitti": (80, range(8), "0.057 0.186 2.322 0.088 0.025 0.964 0.995 0.999"),
    "toy": (10, range(8), ""),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_the_papers_columns_and_its_row_beside_its_own_range(name):
    names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "d1", "d2", "d3")
    top, columns, quoted = TABLES[name]
    rows = {"ours": {metric: i + 0.12345 for i, metric in enumerate(names)}}
    recipe = data.Recipe(max_depth=top)
    found = evaluation.format_table(SimpleNamespace(name=name, recipe=recipe), rows).splitlines()
    assert found[0].split() == [ALL[i] for i in columns]
    assert found[1].split() == ["ours", *(f"{i}.123" for i in columns)]
    assert " ".join(" ".join(found[2:]).split()) == ("CaBins (quoted) " + quoted) * bool(quoted)
    other = SimpleNamespace(name=name, recipe=data.Recipe(max_depth=top / 2))
    assert "quoted" not in evaluation.format_table(other, rows)


def test_the_protocol_says_over_how_many_images_the_mean_is():
    pairs = MadePairs(*[flat(2)] * 9)
    pairs.n_left_out = 4
    line = evaluation.protocol(pairs, "whole", evaluation.Measured({}, 7, 0), "how")
    known = "toy: 7 of 9 images have ground truth (4 more without a file of it) in the window whole"
    assert line == f"{known}, 0.001 < depth < 10.0 m, how, mean over images"
    pairs.n_left_out = 0
    line = evaluation.protocol(pairs, "whole", evaluation.Measured({}, 7, 5), "how")
    assert "more" not in line and line.endswith("; 5 predicted pixels are NaN")


def test_figures_show_the_network_and_mark_what_they_cut(tmp_path, monkeypatch):
    torch.manual_seed(0)
    phrases = cabins.CaBins(dataclasses.replace(TINY, distance_class="semantic")).eval()
    numbers = cabins.CaBins(TINY).eval()
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    figures, truth = [], np.full((90, 120), 9.5, np.float32)
    truth[:45] = 0  # no truth
    save = lambda figure, path, **_: figures.append((path, figure))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    evaluation.draw_explained("a.png", picture, phrases, truth)
    evaluation.draw_explained("b.png", picture, numbers)
    assert [path for path, _ in figures] == ["a.png", "b.png"]
    figure = figures[0][1]
    found, s = (
        cabins.infer(phrases, picture),
        cabins.predict_picture(phrases, picture).similarity[0],
    )
    s = s.numpy()
    figure.draw_without_rendering()
    image, depth, true, error, std, *prompts = [a.images[0] for a in figure.axes if a.images]
    maps = ((image, picture), (depth, found.depth), (std, found.std), *zip(prompts, s, strict=True))
    for shown, values in maps:
        assert np.array_equal(shown.get_array(), values)
    assert {prompt.get_clim() for prompt in prompts} == {(s.min(), s.max())}
    assert [a.axes.get_title() for a in prompts][::7] == ["“giant”", "“unseen”"]
    assert depth.get_clim() == true.get_clim() == (found.depth.min(), 9.5)
    assert true.get_array().mask[:45].all() and not true.get_array().mask[45:].any()
    assert np.allclose(error.get_array()[45:], np.abs(found.depth - 9.5)[45:])
    assert error.get_clim() == (0, pytest.approx(0.95)) and std.get_clim() == (0, found.std.max())
    assert (error.colorbar.extend, depth.colorbar.extend) == ("max", "neither")
    boxes = [prompt.axes.title.get_window_extent() for prompt in prompts]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    (bins,) = [axis for axis in figure.axes if axis.get_legend()]
    for lines, places in zip(bins.collections, (found.centers, found.distances), strict=True):
        assert np.allclose([line[0, 0] for line in lines.get_segments()], places)
    e = cabins.infer(numbers, picture).distances
    titles = [axis.get_title() for axis in figures[1][1].axes if axis.images]
    assert titles[:3] == ["image", "prediction (m)", "spread of p (m)"]
    assert titles[3:] == [f"“{round(float(x), 4)}”" for x in e]


def test_samples_are_drawn_evenly_over_the_data_set(tiny, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "draw_explained", lambda *arguments: drawn.append(arguments))
    pairs = data.DepthDataset("toy")
    pairs.pairs = pairs.pairs[:9]
    evaluation.draw_samples(tmp_path, tiny, pairs, 3)
    evaluation.draw_samples(tmp_path, tiny, MadePairs(flat(2)), 4)
    paths = [tmp_path / f"explained_{i}.png" for i in (0, 4, 8, 0)]
    assert [path for path, *_ in drawn] == paths
    picture, model, truth = drawn[1][1:]
    assert np.array_equal(picture, data.draw_room(1_000_004)[0]) and model is tiny
    assert np.array_equal(truth, data.draw_room(1_000_004)[1])


# ---- Settings, checkpoints and pictures ----------------------------------------------------------


def test_the_papers_settings_are_the_defaults_and_wrong_ones_are_refused_by_name():
    paper = ("RN101", "cabins", 256, 8, 8, 1e-3, 10.0, 640)
    assert dataclasses.astuple(cabins.Config()) == paper
    wrong = {"backbone": ["RN102"], "distance_class": ["mode"], "min_depth": [0.0, 10.0]}
    wrong |= {"n_cabins": [7, 0, -8], "max_depth": [1e-4, math.nan, math.inf]}
    for field, values in wrong.items():
        for value in values:
            with pytest.raises(cabins.InputError, match=re.escape(str(value))):
                cabins.Config(**{field: value})
    numpy = cabins.Config(n_bins=np.int64(64), max_depth=np.float32(80), longer_side=np.int32(96))
    assert [*map(type, dataclasses.astuple(numpy))] == [str, str, int, int, int, float, float, int]
    assert type(cabins.Config(max_depth=10).max_depth) is float


class Evil:  # which pickle would build by making a folder
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_checkpoints_hold_the_network_its_settings_and_more(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cabins.save_checkpoint("a.pt", tiny, data={"name": "toy"})
    assert os.listdir() == ["a.pt"]
    assert cabins.read_checkpoint("a.pt")["data"] == {"name": "toy"}
    torch.manual_seed(5)
    loaded = cabins.load_checkpoint("a.pt")
    assert loaded.config == TINY and not loaded.training and not loaded.bins.training
    assert all(torch.equal(x, tiny.state_dict()[n]) for n, x in loaded.state_dict().items())
    for conv in (loaded.clip.visual.conv2, cabins.CaBins(TINY).depth_decoder.head):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)  # faster
    assert cabins.load_checkpoint(tmp_path / "a.pt", "meta").prompts.device.type == "meta"
    content = cabins.read_checkpoint("a.pt")
    broken = bytearray(Path("a.pt").read_bytes())
    broken[len(broken) // 2] ^= 1
    Path("broken.pt").write_bytes(broken)
    torch.save(content | {"more": Evil()}, "evil.pt")
    torch.save({"model": content["model"]}, "theirs.pt")
    content["config"]["backbone"] = "RN50"
    torch.save(content, "other.pt")
    remedies = {
        "theirs": r"extras\.convert theirs\.pt --data",
        "other": "backbone",
        "gone": "not a file",
    }
    for name, remedy in ({"broken": "damaged", "evil": "damaged"} | remedies).items():
        with pytest.raises(cabins.InputError, match=rf"{name}\.pt.*{remedy}"):
            cabins.load_checkpoint(f"{name}.pt")
    assert not os.path.exists("evil")


def test_infer_gives_mean_and_std_of_depth(tmp_path):
    torch.manual_seed(0)
    model = cabins.CaBins(TINY).eval()
    array = np.random.default_rng(0).integers(0, 255, (90, 141, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    negative = np.ascontiguousarray(array[..., ::-1])[..., ::-1]  # strides, as from OpenCV
    found = cabins.infer(model, array)
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), negative):
        assert all(np.array_equal(a, b) for a, b in zip(found, cabins.infer(model, picture)))
    assert all(x.dtype == np.float32 for x in found)
    # by hand: the longer side is that of training, and reducing averages pixels
    image = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (82, 128), mode="bilinear", antialias=True)
    assert cabins.to_training_size(image.mT, 128).shape == (1, 3, 128, 82)  # upright, too
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    (seen,) = inputs_of(model.clip.visual, lambda: cabins.infer(model, array))
    close(seen, (image - mean) / deviation, 1e-5)
    depth, c, e, _, p = model((image - mean) / deviation, upsample=False)
    std = (p * (c[..., None, None] - depth).square()).sum(1, keepdim=True).sqrt()
    close(found.depth, cabins.resize(depth, (90, 141))[0, 0].detach(), 1e-5)
    close(found.std, cabins.resize(std, (90, 141))[0, 0].detach(), 1e-3)
    close(found.centers, c[0].detach(), 1e-6)
    close(found.distances, e[0].detach(), 1e-6)
    before = [x.clone() for x in model.buffers()]
    with pytest.raises(cabins.InputError, match=r"model\.eval\(\)"):
        cabins.infer(model.train(), array)
    assert all(torch.equal(*x) for x in zip(before, model.buffers()))


def test_pictures_of_any_size_mode_and_orientation(tiny, tmp_path):
    for size in ((1, 1), (20_000, 3), (3, 500)):
        found = cabins.infer(tiny, Image.new("RGB", size, (90, 80, 70)))
        assert found.depth.shape == size[::-1] and np.isfinite(found.depth).all()
    grey = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        found = cabins.read_picture(Image.fromarray(grey).convert("RGB").convert(mode))
        assert found.shape == (9, 12, 3) and found.dtype == np.uint8
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright: to be turned by a quarter, clockwise
    Image.fromarray(grey).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(cabins.read_picture(tmp_path / "phone.png")[..., 0], np.rot90(grey, -1))
    real, missing = np.zeros((4, 5, 3)), None  # None is what OpenCV gives for a missing file
    deep = (Image.new("F", (9, 9)), Image.fromarray(grey.astype(np.uint16)))
    for wrong in (real, missing, grey, grey[:0, :, None].repeat(3, 2), grey[..., None], *deep):
        with pytest.raises(cabins.InputError, match="the picture"):
            cabins.infer(tiny, wrong)
    deep[1].save(tmp_path / "deep.png")
    (tmp_path / "new.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "cut.png").write_bytes((tmp_path / "phone.png").read_bytes()[:60])
    known = {"deep.png": "mode I.*8 bits", "new.heic": "convert it", "cut.png": "damaged"}
    for name, what in (known | {"none.png": "No such file"}).items():
        with pytest.raises(cabins.InputError, match=f"{name}.*{what}"):
            cabins.read_picture(tmp_path / name)
