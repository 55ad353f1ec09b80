"""python -m pytest -q extras"""

import pytest
import torch
import torch.nn.functional as F

import cabins
import clip_tokenizer
from extras.depthclip import depthclip


def test_depthclip_is_the_softmax_of_cosines():
    torch.manual_seed(0)
    clip = cabins.CLIP(cabins.BACKBONES["tiny"])  # in training mode, as load_clip returns it
    mean, std = torch.tensor([cabins.Config.image_mean, cabins.Config.image_std])[..., None, None]
    image = (torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0)) - mean) / std
    depth = depthclip(clip)(image)
    assert not any(module.training for module in clip.modules())  # BatchNorm would learn
    assert depth.shape == (1, 1, 96, 128) and 1 <= depth.min() and depth.max() <= 3
    # by hand, at the corner, on which the corner of the map lies
    clips = torch.tensor(
        [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    )
    clip_mean, clip_std = clips[..., None, None]
    words = [
        "giant",
        "extremely close",
        "close",
        "not in distance",
        "a little remote",
        "far",
        "unseen",
    ]
    with torch.no_grad():
        _, _, z = clip.visual((image * std + mean - clip_mean) / clip_std)
        t = clip.encode_text(clip_tokenizer.tokenize([f"This object is {w}" for w in words]))
        p = (F.cosine_similarity(z[0, :, 0, 0], t) / 0.07).softmax(0)
    expected = (p * torch.tensor([1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0])).sum()
    assert depth[0, 0, 0, 0].item() == pytest.approx(expected.item(), rel=1e-4)
