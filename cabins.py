"""CaBins: CLIP-based Adaptive Bins for Monocular Depth Estimation, in PyTorch.

How far away is each pixel of one photograph? CaBins predicts 256 depth bins for the image from
CLIP's image embedding (Eq. 1) and condenses them to eight distances, the CaBins (Eq. 2). Each
distance is written as a number into a text prompt, which CLIP's frozen text encoder turns into an
embedding. The text embeddings attend to the image (Eq. 3) and are compared with every location in
the image (Eq. 4). A decoder turns these similarities and the image features into a probability over
the bins at each pixel. Depth is the expected bin centre (Eq. 5).

The method comes first, in the paper's order. The rest of CLIP follows, then weights and pictures.
What the equations do not say (docs/findings.md has the evidence):

- The text does not train the MLP of the bins: a distance becomes digits, and no gradient passes
  through them. The MLP learns from the bin centres alone, through Eq. 5 with Eq. 6, and Eq. 7.
- No loss supervises the similarity s directly. The decoder receives s as 8 of 2,056 channels. The
  other 2,048 are x4, from which z, and so s, is computed.
- γ scales all that Eq. 3 does. At the start γ is 1e-4, and Eq. 3 is nearly the identity. From
  random weights, the layers of TransDecoder hardly learn before γ has grown.
- The released code trains neither γ nor the prompts. Both keep their initial values. We train both.
- Eq. 2 depends on the unit of depth and on how far apart the centres are. For random widths in
  metres, e_k is almost the bin centre nearest to the mean of its group.

The letters that count something, with their values for RN101 and one training image of NYU:

    B       images in a batch
    H, W    rows and columns of an image: 416 x 544
    h, w    rows and columns of x4 and of z: H/32 x W/32, or 13 x 17
    D       width of CLIP's joint embedding: 512 (1024 for RN50)
    n_bins  bins: 256
    K       distances, and texts of an image: 8; `n_cabins` in the code
    n_g     bins in each of the K groups: 32
    N       learnable prompt vectors: 8; `n_prompts` in the code
    L, T    texts that are encoded together: BK; token ids of one number: 9

The paper's symbols. A batch adds an axis B in front of all but the prompts, γ and the ids.

    code         paper      size          what                                           section
    pyramid      {x_i}      C x H/4 … h   [x1, x2, x3, x4], features at strides 4 to 32  3.2.1
    z_bar, z     z̄, z       D, D x h x w  embedding of the image, and of each location   3.2.1
    b_prime, b   b′, b      n_bins        bin widths, before and after normalisation     3.2.1
    c            c(b)       n_bins        bin centres, metres                            3.2.1
    min_depth, … d_min, …   -             depth range to d_max: 1e-3 to 10 m (KITTI 80)  3.2.1
    m, w         m_k, w_i   K, K x n_g    means of the groups, and weights inside them   3.2.2
    e            e_k        K             distances (the paper's distance classes), m    3.2.2
    1e-4         ε          -             keeps Eq. 2 from dividing by 0                 3.2.2
    prompts      p          N x 512       learnable vectors in every text                3.2.3
    ids          -          L x T         token ids of the texts                         3.2.3
    t            t          K x D         text embeddings                                3.2.3
    gamma, …     γ, v_post  D, K x D      what the image adds to t is γ v_post           3.2.3
    s            s          K x h x w     cosine similarity of z and t                   3.2.4
    p            p          n_bins x …    probability of each bin, at H/2 x W/2          3.2.4
    d            d          1 x …         depth, metres, at H/2 x W/2, then at H x W     3.2.4
    target, X    d*, X      1 x H x W     ground truth, metres; X: as a set              3.3
    g            g_i        1 x H x W     log d - log d*                                 3.3
    LAMBDA, …    λ, α, β    -             constants of Eq. 6 and 8: 0.85, 10 and 0.1     3.3

The public names of c, e, s, p and d are centers, distances, similarity, probability and depth.
`NOTE(differs)` marks a place where the paper, the released code (github.com/EunjinSon1/CaBins at
4e9c9a0) and this code disagree, and `NOTE(paper silent)` a choice that the paper leaves open.
README's table "Paper, released code, and here" has all of them.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import zipfile
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import MLP, Conv2dNormActivation
from torchvision.transforms.v2 import Normalize

from clip_tokenizer import EOT, number_tokens, tokenize


class InputError(ValueError):
    """A file or a setting is wrong. The message names it and says what to do."""


# ---- Configuration -------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a network, which its checkpoints hold. A wrong one raises InputError."""

    backbone: str = "RN101"  # a key of BACKBONES
    distance_class: str = "cabins"  # a row of TABLE_3
    n_bins: int = 256
    n_cabins: int = 8  # K
    n_prompts: int = 8  # N
    min_depth: float = 1e-3  # d_min, metres. NOTE(paper silent): the released code's value
    max_depth: float = 10.0  # d_max, metres; 80 for KITTI
    longer_side: int = 640  # longer side of the training frames, pixels; 1216 for KITTI
    # NOTE(paper silent): As in the released code, these are ImageNet's statistics, not CLIP's.
    image_mean: ClassVar = (0.485, 0.456, 0.406)  # red, green, blue, in [0, 1]
    image_std: ClassVar = (0.229, 0.224, 0.225)  # constants, not settings

    def __post_init__(self):
        for field in dataclasses.fields(self):  # a checkpoint must not hold NumPy's scalars
            value = type(field.default)(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.backbone not in BACKBONES or self.distance_class not in TABLE_3:
            raise InputError(f"{self}: choose one of {[*BACKBONES]} and one of {TABLE_3}")
        if self.n_cabins < 1 or self.n_bins % self.n_cabins:
            raise InputError(f"{self}: n_cabins must divide n_bins")


# ---- Sec. 3.1 and 3.2.1  The last layer of the image encoder `ResNet`, which is below the metrics
def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int, is_causal=False) -> Tensor:
    """Attention of queries (B, Tq, C) to keys and values (B, Tk, C): (B, Tq, C)."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, n, T, C/n)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return out.transpose(1, 2).flatten(2)  # (B, Tq, C)


def resize_positions(positions: Tensor, h: int, w: int) -> Tensor:
    """Resize the positional embeddings of a global token and a square grid to (1 + hw, C)."""
    side = math.isqrt(len(positions) - 1)
    grid = positions[1:].T.unflatten(1, (side, side))[None]  # (1, C, side, side)
    # NOTE(paper silent): As in the released code, corners are aligned in `resize`, but not here.
    grid = F.interpolate(grid, size=(h, w), mode="bilinear")  # (1, C, h, w)
    return torch.cat([positions[:1], grid[0].flatten(1).T])  # (1 + hw, C)


class AttentionPool(nn.Module):
    """CLIP's MHA module: z_bar (B, D) and z (B, D, h, w) from x4 (B, C, h, w)."""

    def __init__(self, channels: int, embed_dim: int, grid: int):
        super().__init__()
        self.n_heads = channels // 64
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, channels) / channels**0.5)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, w = x.shape[-2:]
        x = x.flatten(2).mT  # (B, hw, C)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)  # [x̄, x], with the global token x̄
        x = x + resize_positions(self.positional_embedding, h, w)  # (B, 1 + hw, C)
        # CLIP:  z̄ = MHA(q = x̄, kv = [x̄, x]).   Here:  [z̄, z] = MHA(q = kv = [x̄, x])
        # The output of a query does not depend on the other queries, so z̄ stays CLIP's own.
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out = self.c_proj(multi_head_attention(q, k, v, self.n_heads))  # [z̄, z]: (B, 1 + hw, D)
        return out[:, 0], out[:, 1:].mT.unflatten(2, (h, w))  # (B, D), (B, D, h, w)


# ---- Sec. 3.2.1  Bins ----------------------------------------------------------------------------
def bin_centers(b: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Centres (B, n_bins), in metres, of bins whose widths b are shares of the range."""
    # Fixed bins would spend centres on depths that the image does not contain.
    # Eq. 1:  c(b_i) = d_min + (d_max - d_min) (b_i / 2 + Σ_{j<i} b_j)
    return min_depth + (max_depth - min_depth) * (b.cumsum(1) - b / 2)  # cumsum includes b_i


class AdaptiveBins(nn.Module):
    """The MLP of Sec. 3.2.1: bin widths b (B, n_bins), which sum to 1, from z_bar (B, D)."""

    def __init__(self, embed_dim: int, n_bins: int):
        super().__init__()
        # NOTE(differs): The paper says "MLP with ReLU". We follow the released code: these layers,
        # LeakyReLU between them, ReLU + 0.1 after the last.
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 512),
            nn.LeakyReLU(),
            nn.Linear(512, 256),
            nn.LeakyReLU(),
            nn.Linear(256, n_bins),
        )

    def forward(self, z_bar: Tensor) -> Tensor:
        # Widths and centres are float32, because bfloat16 has steps of 6 cm near 10 m. With ReLU
        # alone, a row without a positive output would be divided by 0.
        b_prime = F.relu(self.mlp(z_bar).float()) + 0.1  # b′: (B, n_bins)
        return b_prime / b_prime.sum(1, keepdim=True)  # if one bin grows, all other centres move


# ---- Sec. 3.2.2  CaBins --------------------------------------------------------------------------
TABLE_3 = ("cabins", "median", "mean", "semantic")  # the rows of Table 3; "cabins" is "Ours"
SEMANTIC_BINS = [  # in the texts of "semantic" (Sec. 4.6); its distances are only reported
    "giant",
    "extremely close",
    "close",
    "not in distance",
    "a little remote",
    "far",
    "farthest",
    "unseen",
]


def distance_classes(centers: Tensor, n_cabins: int, kind: str = "cabins") -> Tensor:
    """Condense the bin centres (B, n_bins) to K distances (B, K), in metres (Figure 3, Eq. 2).

        bin centres      c_1 … c_32    c_33 … c_64    …    c_225 … c_256    n_bins = 256
        8 groups of 32   mean m_1      mean m_2       …    mean m_8
        8 distances      e_1           e_2            …    e_8              K = 8

    e_k is a weighted mean of group k, in which the centres nearest to m_k weigh most. Without
    groups, the text encoder would have to encode 256 texts for each image. The weights depend on
    the unit of depth, because 1 / |c - m| has a unit, and on how far apart the centres are. We
    measured the mean for 256 random widths (uniform on [0.1, 1.1], normalised). Over 10 m, e_k lies
    0.35 mm from the centre nearest to m_k, and over 80 m 23 mm. Over 10 m in centimetres, e_k lies
    0.6 mm from m_k itself. With equal widths, two centres tie, and e_k is m_k in any unit.
    """
    groups = centers.unflatten(1, (n_cabins, -1))  # (B, K, n_g)
    m = groups.mean(2, keepdim=True)  # (B, K, 1)
    if kind == "mean":
        return m.squeeze(2)
    if kind == "median":
        return groups.median(2).values  # NOTE(paper silent): the lower median, always a bin centre
    if kind not in TABLE_3:
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(TABLE_3)}")
    # Eq. 2:  e_k = Σ_i w_i c_k(b_i),   w_i = softmax(1 / (|c_k(b_i) - m_k| + ε)),   ε = 1e-4
    w = torch.softmax(1 / ((groups - m).abs() + 1e-4), dim=2)  # (B, K, n_g)
    return (w * groups).sum(2)  # (B, K)


# ---- Sec. 3.2.3  Text encoder --------------------------------------------------------------------
# A distance of 2.498 m becomes the text below. `number_tokens` makes the ids of [SOT], the number
# and [EOT] (the paper writes [SOS] and [EOS]). `CLIP.encode_text` inserts the prompts p1 … p8.
# Close distances need not have similar texts: "2.9999" and "3.0" share only the point.
# NOTE(paper silent): Like the released code, we write e_k as a number with up to 4 decimals, and
# leave out DepthCLIP's "This object is".
#     [SOT]  p1  p2  p3  p4  p5  p6  p7  p8  "2"  "."  "4"  "9"  "8"  [EOT]
class TransDecoderAttention(nn.Module):
    """Attention of x (B, Tq, C) to `memory` (B, Tk, C), without CLIP's biases of q, k and v."""

    def __init__(self, width: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        return self.dropout(self.proj(multi_head_attention(q, k, v, self.n_heads)))


class TransDecoderLayer(nn.Module):
    """A pre-norm layer, from the texts x (B, K, C) and the image (B, 1 + hw, C) to (B, K, C)."""

    def __init__(self, width: int, n_heads: int, dropout: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = TransDecoderAttention(width, n_heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = TransDecoderAttention(width, n_heads, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width, [4 * width, width], activation_layer=nn.GELU, dropout=dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y)  # among the texts
        x = x + self.cross_attn(self.norm2(x), memory)  # from the texts to the image
        return x + self.mlp(self.norm3(x))


class TransDecoder(nn.Module):
    """Update the text embeddings t (B, K, D) by attention to the image: z_bar (B, D) and z."""

    def __init__(self, embed_dim: int, width: int, n_layers: int, n_heads: int = 4):
        super().__init__()
        # NOTE(paper silent): Layers and initialisation are DenseCLIP's, as in the released code.
        self.text_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width), nn.LayerNorm(width)
        )
        self.layers = nn.ModuleList(TransDecoderLayer(width, n_heads) for _ in range(n_layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:  # a weight of a linear layer
                nn.init.trunc_normal_(parameter, std=0.02)
        # With a small γ, training starts almost from CLIP's own text embeddings. The gradient of
        # the layers has the factor γ.
        # NOTE(differs): The released optimizer has neither γ nor the prompts. There, γ stays 1e-4.
        self.gamma = nn.Parameter(torch.full((embed_dim,), 1e-4))

    def forward(self, t: Tensor, z_bar: Tensor, z: Tensor) -> Tensor:
        # A distance looks different in two rooms. Eq. 3 adapts its text embedding to the room.
        memory = torch.cat([z_bar[:, :, None], z.flatten(2)], dim=2).mT  # [z̄, z]: (B, 1 + hw, D)
        memory = self.memory_proj(memory)  # (B, 1 + hw, width)
        x = self.text_proj(t)  # (B, K, width)
        for layer in self.layers:
            x = layer(x, memory)
        v_post = self.out_proj(x)  # (B, K, D)
        # Eq. 3:  t ← t + γ v_post,   v_post = TransDecoder(t, [z̄, z])
        return t + self.gamma * v_post


# ---- Sec. 3.2.4  Depth prediction ----------------------------------------------------------------
def cosine_similarity(z: Tensor, t: Tensor) -> Tensor:
    """Cosine of each location z (B, D, h, w) and each text t (B, K, D): s (B, K, h, w)."""
    # CLIP multiplies its cosines by exp(`logit_scale`). Eq. 4 has no such factor.
    # Eq. 4:  s = ẑ · t̂,   where ẑ and t̂ are z and t of length 1
    return torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), F.normalize(t, dim=2))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, h, w) to (B, C, *size), bilinearly, with aligned corners."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class DepthDecoder(nn.Module):
    """Probability p (B, n_bins, H/2, W/2) over the bins, from the pyramid and s (B, K, h, w)."""

    def __init__(self, channels: tuple[int, ...], n_cabins: int, n_bins: int):
        super().__init__()
        *skips, width = channels  # of x1, x2 and x3, and of x4
        # NOTE(paper silent): The convolutions are the released code's. This one is 1 x 1, but pads
        # [x4, s] by one location. Near the border, this shifts x4 by 28 to 31 image pixels against
        # the skip connections. We keep it, so that the authors' checkpoints give the same depth.
        self.fuse = nn.Conv2d(width + n_cabins, width, 1, padding=1)
        self.up = nn.ModuleList()
        for skip in reversed(skips):  # x3, x2, x1
            up = nn.Sequential()  # 3 x 3 convolution, BatchNorm and LeakyReLU, twice
            for n in (width + skip, width // 2):  # input channels
                up += Conv2dNormActivation(n, width // 2, bias=True, activation_layer=nn.LeakyReLU)
            self.up.append(up)
            width = width // 2
        # No activation stands between these two, so together they equal one 3 x 3 convolution.
        # NOTE(differs): `head` has n_bins channels in the paper and here, 256 in the released code.
        self.head = nn.Conv2d(width, n_bins, 3, padding=1)
        self.classifier = nn.Conv2d(n_bins, n_bins, 1)

    def forward(self, pyramid: list[Tensor], s: Tensor) -> Tensor:
        *skips, x4 = pyramid
        s = resize(s, x4.shape[-2:])  # ViT (Table 4): stride 16 to 32; else a no-op
        x = self.fuse(torch.cat([x4, s], dim=1))  # (B, C_4, h + 2, w + 2), C_4 channels as in x4
        for up, skip in zip(self.up, reversed(skips)):
            x = resize(x, skip.shape[-2:]).to(skip.dtype)  # CUDA's autocast resizes in float32
            x = up(torch.cat([x, skip], dim=1))  # half the channels, at the size of the skip
        x = resize(x, (2 * x.shape[-2], 2 * x.shape[-1]))  # (B, C_4 / 8, H/2, W/2)
        logits = self.classifier(self.head(x)).movedim(1, -1)  # (B, H/2, W/2, n_bins), as in memory
        return logits.softmax(-1, torch.float32).movedim(-1, 1)  # (B, n_bins, H/2, W/2)


def expected_depth(centers: Tensor, p: Tensor) -> Tensor:
    """Depth (B, 1, H/2, W/2) in metres: the mean of the centres (B, n_bins) under p."""
    # The argmax would jump from bin to bin. The mean never leaves [c_1, c_n_bins].
    # Eq. 5:  d_i = Σ_k c(b_k) p_ik
    return (centers[:, :, None, None] * p).sum(1, keepdim=True)


# ---- Figure 2: the network -----------------------------------------------------------------------
class Prediction(NamedTuple):
    """What the network gives for a batch of images, in float32."""

    depth: Tensor  # d (B, 1, H, W), metres
    centers: Tensor  # c (B, n_bins), metres, increasing
    distances: Tensor  # e (B, K), metres
    similarity: Tensor  # s (B, K, h, w), from -1 to 1
    probability: Tensor  # p (B, n_bins, H/2, W/2)


class CaBins(nn.Module):
    """The network of Figure 2. `clip` comes from `load_clip`; None gives random weights."""

    def __init__(self, config: Config, clip: CLIP | None = None):
        super().__init__()
        sizes = BACKBONES[config.backbone]
        embed_dim = sizes.embed_dim
        self.config = config
        self.integer_digits = len(f"{config.max_depth:.0f}")  # of the largest distance
        self.clip = clip or CLIP(sizes)
        if self.clip.sizes != sizes:
            raise InputError(f"the CLIP that was given is not {config.backbone}: name its backbone")
        self.reassemble = dpt_reassembly(sizes) if sizes.is_vit else None
        self.bins = AdaptiveBins(embed_dim, config.n_bins)
        # NOTE(differs): The standard deviation is CoOp's, 0.02. The released code takes 1.
        self.prompts = nn.Parameter(torch.empty(config.n_prompts, sizes.text_width))
        nn.init.trunc_normal_(self.prompts, std=0.02)
        self.trans_decoder = TransDecoder(embed_dim, sizes.decoder_width, sizes.decoder_layers)
        self.depth_decoder = DepthDecoder(sizes.channels, config.n_cabins, config.n_bins)
        if config.distance_class == "semantic":  # a phrase has at most 3 tokens, [SOT] and [EOT]
            self.phrases = nn.Buffer(tokenize(SEMANTIC_BINS, length=5), persistent=False)
        self.to(memory_format=torch.channels_last)  # makes convolutions faster: docs/speed.md

    def encode_distances(self, e: Tensor) -> Tensor:
        """Text embeddings t (B, K, D) of the distances e (B, K), or of the phrases of Sec. 4.6."""
        if self.config.distance_class == "semantic":
            t = self.clip.encode_text(self.phrases, self.prompts)  # (K, D)
            return t.expand(e.shape[0], -1, -1)  # (B, K, D): the same for every image
        # No gradient passes from t to e, which becomes digits. The text trains the prompts, γ,
        # TransDecoder and, through Eq. 3 and 4, the image encoder.
        ids = number_tokens(e, self.integer_digits)  # (B, K, T), with T = 9 for 10 m and for 80 m
        t = self.clip.encode_text(ids.flatten(0, 1), self.prompts)  # (BK, D)
        return t.view(*e.shape, -1)  # (B, K, D)

    def forward(self, image: Tensor, upsample: bool = True) -> Prediction:
        """Figure 2, for normalised images (B, 3, H, W) of at least 64 x 64 pixels."""
        # In a smaller image x4 may be one location, which BatchNorm cannot train on.
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 64:
            raise InputError(f"image is {tuple(image.shape)}, not (B, 3, H >= 64, W >= 64)")
        config = self.config
        pyramid, z_bar, z = self.clip.visual(image)  # Sec. 3.2.1: the image encoder
        if self.reassemble:  # ViT's four feature maps all have stride 16
            pyramid = [stage(x) for stage, x in zip(self.reassemble, pyramid)]
        c = bin_centers(self.bins(z_bar), config.min_depth, config.max_depth)  # (B, n_bins)
        e = distance_classes(c, config.n_cabins, config.distance_class)  # Sec. 3.2.2: (B, K)
        t = self.encode_distances(e)  # Sec. 3.2.3: (B, K, D)
        t = self.trans_decoder(t, z_bar, z)  # updated with the image: (B, K, D)
        s = cosine_similarity(z, t)  # Sec. 3.2.4: (B, K, h, w)
        p = self.depth_decoder(pyramid, s)  # (B, n_bins, H/2, W/2)
        d = expected_depth(c, p)  # (B, 1, H/2, W/2)
        if upsample:  # else d stays at H/2 x W/2, where eval.py averages an image and its mirror
            d = resize(d, image.shape[-2:])  # (B, 1, H, W)
        return Prediction(d, c, e, s.float(), p)


# ---- Sec. 3.3  Training loss ---------------------------------------------------------------------
LAMBDA, ALPHA, BETA = 0.85, 10.0, 0.1  # λ, α, β


def silog_loss(depth: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Scale-invariant logarithmic loss over the valid pixels of the batch (Eq. 6).

    The term under the root is Var(g) + (1 - λ) mean(g)². So λ = 0.85 forgives 85 % of the squared
    mean. With λ = 1, a depth that is wrong by one factor everywhere would cost nothing.
    NOTE(paper silent): As in the released code, the sums run over the batch, not over each image.
    NOTE(differs): The variance in Eq. 6 is the biased one. The released code has the unbiased one.
    """
    if not depth.shape == target.shape == mask.shape:  # or they would broadcast
        raise ValueError("depth, target and mask must have the same shape")
    n = mask.sum().clamp(min=1)  # without a valid pixel, the loss is 1e-5
    g = torch.where(mask, depth, 1).log() - torch.where(mask, target, 1).log()  # 0 outside mask
    # Eq. 6:  L_pixel = α √( 1/n Σ g_i² - λ/n² (Σ g_i)² )
    square = g.square().sum() / n - LAMBDA * (g.sum() / n).square()
    return ALPHA * square.clamp(min=1e-12).sqrt()  # the root of 0 has no finite gradient


def nearest(values: Tensor, queries: Tensor) -> Tensor:
    """For each query (B, Q), the nearest of the increasing values (B, V)."""
    midpoints = (values[:, 1:] + values[:, :-1]) / 2  # (B, V - 1)
    index = torch.searchsorted(midpoints, queries)  # (B, Q): how many midpoints lie below a query
    return values.gather(1, index)


def chamfer_loss(centers: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Bi-directional chamfer loss of bin centres (B, n_bins) and ground truth, in square metres.

    Each true depth pulls the nearest centre, and each centre is pulled to the nearest true depth.
    Eq. 6 constrains only the mean of the centres under p, and Eq. 7 places the centres themselves.
    NOTE(paper silent): Like the released code, we take chamfer(·, ·) as the squared distance to the
    nearest element of the second set, averaged over the first set, and then over the images.
    """
    c = centers
    valid = mask.flatten(1)  # (B, HW)
    X = target.flatten(1).masked_fill(~valid, 0)  # (B, HW)
    # Pixels without ground truth get the largest true depth, which adds no new value to X.
    X = torch.where(valid, X, X.amax(1, keepdim=True))
    # Eq. 7:  L_bins = chamfer(X, c(b)) + chamfer(c(b), X)
    X_to_c = (X - nearest(c, X)).square() * valid  # (B, HW)
    c_to_X = (c - nearest(X.sort(1).values, c)).square() * valid.any(1, keepdim=True)  # (B, n_bins)
    loss = X_to_c.sum(1) / valid.sum(1).clamp(min=1) + c_to_X.mean(1)  # (B,); 0 without truth
    return loss.mean()


def total_loss(prediction: Prediction, target: Tensor, min_depth: float) -> Tensor:
    """The training loss. The ground truth (B, 1, H, W), in metres, is valid above min_depth."""
    # In centimetres, L_bins would be 10,000 times as large, and L_pixel the same.
    mask = target > min_depth
    d = resize(prediction.depth, target.shape[-2:])  # a no-op, unless depth is at H/2 x W/2
    # Eq. 8:  L_total = L_pixel + β L_bins
    return silog_loss(d, target, mask) + BETA * chamfer_loss(prediction.centers, target, mask)


# ---- Sec. 4.3  Evaluation metrics ----------------------------------------------------------------
def depth_metrics(depth: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The metrics of one image, from the predicted and true depths (n,) in metres."""
    error = depth - target  # d - d*
    log_error = depth.log() - target.log()
    delta = torch.maximum(depth / target, target / depth)  # δ = max(d / d*, d* / d)
    return {
        "abs_rel": (error.abs() / target).mean(),  # 1/n Σ |d - d*| / d*
        "sq_rel": (error.square() / target).mean(),  # 1/n Σ (d - d*)² / d*, metres
        "rmse": error.square().mean().sqrt(),  # √(1/n Σ (d - d*)²), metres
        "rmse_log": log_error.square().mean().sqrt(),  # √(1/n Σ (log d - log d*)²)
        "log10": (depth.log10() - target.log10()).abs().mean(),  # 1/n Σ |log10 d - log10 d*|
        "d1": (delta < 1.25).float().mean(),  # share of pixels with δ < 1.25
        "d2": (delta < 1.25**2).float().mean(),
        "d3": (delta < 1.25**3).float().mean(),
    }


# ==== CLIP (Sec. 3.1): parameters are named as in OpenAI's files ==================================
class Architecture(NamedTuple):
    """The sizes of one CLIP."""

    embed_dim: int  # D
    channels: tuple[int, ...]  # of x1, x2, x3 and x4
    layers: tuple[int, ...]  # ResNet: the blocks of each stage; ViT: the number of blocks
    width: int  # ResNet: channels after the stem; ViT: channels of a token
    grid: int  # locations along each side of x4 (ViT: of z) in CLIP's own training
    text_width: int  # channels of a text token, and therefore of a prompt vector
    text_layers: int
    is_vit: bool = False
    decoder_width: int = 256  # of TransDecoder
    decoder_layers: int = 6


BACKBONES = {  # the sizes in the order above; "tiny" is for the demo and the tests
    "RN50": Architecture(1024, (256, 512, 1024, 2048), (3, 4, 6, 3), 64, 7, 512, 12),
    "RN101": Architecture(512, (256, 512, 1024, 2048), (3, 4, 23, 3), 64, 7, 512, 12),
    "ViT-B/16": Architecture(512, (96, 192, 384, 768), (12,), 768, 14, 512, 12, is_vit=True),
    "tiny": Architecture(64, (40, 80, 160, 320), (1, 1, 1, 1), 10, 4, 64, 2, False, 64, 2),
}


class Bottleneck(resnet.Bottleneck):
    """CLIP's residual block: the usual three convolutions, but an average pool for the stride."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__(in_channels, width)  # conv1, bn1, conv2, bn2, conv3 and bn3
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if in_channels != 4 * width:
            self.downsample = Conv2dNormActivation(in_channels, 4 * width, 1, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.pool(out)))  # (B, 4 width, h / stride, w / stride)
        return F.relu_(out + self.downsample(self.pool(x)))


class ResNet(nn.Module):
    """CLIP's modified ResNet: image (B, 3, H, W) to pyramid, z_bar (B, D) and z (B, D, h, w)."""

    def __init__(self, sizes: Architecture):
        super().__init__()
        width = sizes.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)  # the stem
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for i, n_blocks in enumerate(sizes.layers):
            stage = [Bottleneck(channels, width * 2**i, stride=1 if i == 0 else 2)]
            channels = 4 * width * 2**i
            stage += [Bottleneck(channels, width * 2**i, stride=1) for _ in range(n_blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool(channels, sizes.embed_dim, sizes.grid)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        x = F.relu_(self.bn1(self.conv1(image)))  # (B, width / 2, H/2, W/2)
        x = F.relu_(self.bn2(self.conv2(x)))
        x = F.relu_(self.bn3(self.conv3(x)))  # (B, width, H/2, W/2)
        x = F.avg_pool2d(x, 2)  # (B, width, H/4, W/4)
        x1 = self.layer1(x)  # (B, 4 width, H/4, W/4)
        x2 = self.layer2(x1)  # (B, 8 width, H/8, W/8)
        x3 = self.layer3(x2)  # (B, 16 width, H/16, W/16)
        x4 = self.layer4(x3)  # (B, 32 width, H/32, W/32)
        return [x1, x2, x3, x4], *self.attnpool(x4)  # CLIP uses only x4


class TransformerBlock(nn.Module):
    """A pre-norm layer of CLIP's transformers: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, is_causal: bool):
        super().__init__()
        self.n_heads = width // 64
        self.is_causal = is_causal  # whether a token attends only to itself and to earlier ones
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.Module()  # a name in OpenAI's files; one matrix projects to q, k and v
        self.attn.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict()
        self.mlp["c_fc"] = nn.Linear(width, 4 * width)
        self.mlp["c_proj"] = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)  # 3 width
        y = multi_head_attention(*qkv.chunk(3, dim=-1), self.n_heads, self.is_causal)
        x = x + self.attn.out_proj(y)
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))  # QuickGELU, CLIP's GELU


class CLIP(nn.Module):
    """Both encoders of CLIP: `visual`, which is trained, and the text encoder, which is frozen."""

    def __init__(self, sizes: Architecture):
        super().__init__()
        self.sizes = sizes
        width = sizes.text_width
        self.visual = VisionTransformer(sizes) if sizes.is_vit else ResNet(sizes)
        self.token_embedding = nn.Embedding(EOT + 1, width)  # std 1 without OpenAI's weights
        self.positional_embedding = nn.Parameter(torch.randn(77, width) * 0.01)
        blocks = [TransformerBlock(width, is_causal=True) for _ in range(sizes.text_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, sizes.embed_dim) / width**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # which Eq. 4 does not use
        # NOTE(differs): We freeze the whole text encoder. The released code trains its tokens.
        self.requires_grad_(False)
        self.visual.requires_grad_(True)

    def encode_text(self, ids: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Text embeddings (L, D) of token ids (L, T). The prompts (N, text_width) follow [SOT]."""
        # NOTE(differs): Sec. 3.1 encodes 77 positions, the released code 30. We encode 17, because
        # the encoder is causal, and positions after [EOT] change nothing.
        x = self.token_embedding(ids)  # (L, T, text_width)
        end = ids.argmax(-1)  # (L,): [EOT] has the highest id
        if prompts is not None:
            prompts = prompts.expand(x.shape[0], -1, -1)  # (L, N, text_width)
            x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)  # (L, N + T, text_width)
            end = end + prompts.shape[1]
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.ln_final(self.transformer.resblocks(x))
        return x[torch.arange(x.shape[0], device=x.device), end] @ self.text_projection  # (L, D)


# ---- Sec. 4.6  ViT-B/16 --------------------------------------------------------------------------
class VisionTransformer(nn.Module):
    """CLIP's ViT: image (B, 3, H, W) to four feature maps, z_bar (B, D) and z (B, D, h, w)."""

    def __init__(self, sizes: Architecture):
        super().__init__()
        width = sizes.width
        self.conv1 = nn.Conv2d(3, width, 16, stride=16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(sizes.grid**2 + 1, width) / width**0.5)
        self.ln_pre = nn.LayerNorm(width)
        blocks = [TransformerBlock(width, is_causal=False) for _ in range(sizes.layers[0])]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, sizes.embed_dim) / width**0.5)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        h, w = (math.ceil(size / 16) for size in image.shape[-2:])  # of z and all feature maps
        x = self.conv1(resize(image, (16 * h, 16 * w)))  # whole patches: (B, width, h, w)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)  # in the role of x̄
        x = torch.cat([class_token, x.flatten(2).mT], dim=1)  # (B, 1 + hw, width)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, h, w))
        # NOTE(differs): Like DPT, which the paper follows, we take the tokens after blocks 3, 6, 9
        # and 12. We drop DPT's readout of the class token. The released ViT lacks [z̄, z] and fails.
        features = []
        step = len(self.transformer.resblocks) // 4  # 3
        for i in range(0, 4 * step, step):
            x = self.transformer.resblocks[i : i + step](x)
            features.append(x[:, 1:].mT.unflatten(2, (h, w)))  # (B, width, h, w)
        out = self.ln_post(x) @ self.proj  # [z̄, z]: (B, 1 + hw, D)
        return features, out[:, 0], out[:, 1:].mT.unflatten(2, (h, w))  # …, (B, D), (B, D, h, w)


def dpt_reassembly(sizes: Architecture) -> nn.ModuleList:
    """DPT's stages, which bring ViT's four feature maps from stride 16 to 4, 8, 16 and 32."""
    # NOTE(paper silent): The channels are those of DPT for ViT-B: 96, 192, 384 and 768.
    width = sizes.width
    c1, c2, c3, c4 = sizes.channels
    x1 = nn.Sequential(nn.Conv2d(width, c1, 1), nn.ConvTranspose2d(c1, c1, 4, stride=4))
    x2 = nn.Sequential(nn.Conv2d(width, c2, 1), nn.ConvTranspose2d(c2, c2, 2, stride=2))
    x3 = nn.Conv2d(width, c3, 1)
    x4 = nn.Sequential(nn.Conv2d(width, c4, 1), nn.Conv2d(c4, c4, 3, stride=2, padding=1))
    return nn.ModuleList([x1, x2, x3, x4])


# ==== The paper ends here. Below: weights, checkpoints, pictures ==================================
CLIP_URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
CLIP_SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
}
normalize = Normalize(Config.image_mean, Config.image_std)  # of colours (…, 3, H, W) in [0, 1]


def download(url: str, file: str, sha256: str) -> Path:
    """The path of `file` in torch.hub's cache. Fetches a missing file, whose SHA-256 must fit."""
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{url} was not fetched ({error}): put it at {path}") from error
    return path


def load_clip(name_or_path: str | Path) -> CLIP:
    """CLIP with OpenAI's weights: a key of CLIP_SHA256, or a file, an archive or a state dict."""
    path = Path(name_or_path)
    if name_or_path in CLIP_SHA256:
        sha256 = CLIP_SHA256[name_or_path]
        name = name_or_path.replace("/", "-")
        path = download(CLIP_URL.format(sha256=sha256, name=name), f"clip-{name}.pt", sha256)
    state = read_tensors(path, f"{', '.join(CLIP_SHA256)}, or a file of OpenAI's weights")
    for name in ("input_resolution", "context_length", "vocab_size"):  # not weights
        state.pop(name, None)
    found = state.get("text_projection", torch.empty(0)).shape, "visual.proj" in state
    for sizes in BACKBONES.values():
        if found == ((sizes.text_width, sizes.embed_dim), sizes.is_vit):
            return load_strictly(CLIP(sizes), state, path)
    raise InputError(f"{path} is none of the CLIPs {', '.join(CLIP_SHA256)}")


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: object) -> nn.Module:
    """The module with these tensors, which must have its names and shapes."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # torch lists all that is missing, unknown or of another shape
        what = " ".join(str(error).split())[:250]
        raise InputError(f"{source} does not fit; is its backbone another one? {what}") from None
    return module


def read_tensors(path: Path, expected: str) -> dict:
    """The dictionary in a PyTorch file, or the tensors of a TorchScript archive. No code is run."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected {expected}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch does not check these checksums
                    raise ValueError("a checksum is wrong")
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return read_torchscript(archive)
        return dict(torch.load(path, "cpu", weights_only=True))
    except Exception as error:  # its kind depends on what the bytes happen to be
        raise InputError(f"{path} is damaged or of another kind; expected {expected}") from error


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, by name, without torch.jit, which is deprecated."""
    file = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    known = {"HalfStorage": torch.half, "FloatStorage": torch.float, "LongStorage": torch.long}
    known["_rebuild_tensor_v2"] = lambda x, start, size, step, *_: x.as_strided(size, step, start)

    class Module(nn.Module):  # stands for each module of the archive
        def __setstate__(self, state: dict):
            super().__init__()
            for name, value in state.items():
                setattr(self, name, nn.Buffer(value) if torch.is_tensor(value) else value)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            return known.get(name, Module if module.startswith("__torch__") else lambda *_: None)

        def persistent_load(self, key: tuple) -> Tensor:
            content = archive.read(f"{file.removesuffix('.pkl')}/{key[2]}")
            return torch.frombuffer(bytearray(content), dtype=key[1])

    return Unpickler(archive.open(file)).load().state_dict()


def save_checkpoint(path: str | Path, model: CaBins, **more) -> None:
    """Write the network, its settings and `more`, to a file that is renamed when it is complete."""
    content = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), **more}
    partial = Path(f"{path}.partial")
    torch.save(content, partial)
    partial.replace(path)


def read_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote. Raises InputError for any other file."""
    content = read_tensors(Path(path), "a checkpoint of train.py")
    if "config" not in content:
        remedy = f"python -m extras.convert {path} --data nyu|kitti --out OURS.pt"
        raise InputError(f"{path} is not a checkpoint of train.py; if it is the authors': {remedy}")
    return content


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> CaBins:
    """The network of a checkpoint of train.py, in eval mode."""
    content = read_checkpoint(path)
    model = CaBins(Config(**content["config"]))
    return load_strictly(model, content["model"], path).to(device).eval()


class Inference(NamedTuple):
    """What `infer` gives: float32 arrays in metres, maps at the size of the picture."""

    depth: np.ndarray  # (H, W)
    std: np.ndarray  # (H, W): standard deviation of depth under p; not a calibrated uncertainty
    centers: np.ndarray  # (n_bins,)
    distances: np.ndarray  # (K,)


def open_picture(path: str | Path, expected: str = "a picture such as JPEG or PNG") -> Image.Image:
    """Decode an image file."""
    try:
        with Image.open(path) as image:
            return image.copy()
    except Exception as error:  # its kind depends on what the bytes happen to be
        reason = getattr(error, "strerror", None) or f"it is damaged or not {expected}; convert it"
        raise InputError(f"{path} cannot be read: {reason}") from error


def read_picture(picture: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """The picture as uint8 (H, W, 3), turned upright as its EXIF data say."""
    image = open_picture(picture) if isinstance(picture, (str, Path)) else picture
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.mode[0] in "IF":
        raise InputError(f"the picture {picture} has mode {image.mode}; convert it to 8 bits")
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def to_training_size(image: Tensor, longer_side: int) -> Tensor:
    """Resize (B, 3, H, W) to the longer side of the training frames; the other is at least 64."""
    factor = longer_side / max(image.shape[-2:])
    size = [max(64, round(side * factor)) for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


@torch.inference_mode()
def predict_picture(model: CaBins, picture: np.ndarray) -> Prediction:
    """The network's prediction for a picture (H, W, 3) that `read_picture` has read."""
    if model.training:  # BatchNorm would learn from the picture
        raise InputError("the network is in training mode: call model.eval() first")
    image = torch.tensor(picture, device=model.prompts.device).permute(2, 0, 1)[None] / 255
    image = normalize(to_training_size(image, model.config.longer_side))
    return model(image.to(model.prompts.dtype), upsample=False)


def infer(model: CaBins, picture: str | Path | Image.Image | np.ndarray) -> Inference:
    """Depth of a picture of any size: a path, a PIL image, or a uint8 array (H, W, 3)."""
    array = read_picture(picture)
    d, c, e, _, p = predict_picture(model, array)
    variance = (p * (c[:, :, None, None] - d).square()).sum(1, keepdim=True)  # Σ p (c - d)²
    d, std = resize(torch.cat([d, variance.sqrt()], dim=1), array.shape[:2])[0]  # (H, W) each
    return Inference(*(x.cpu().numpy() for x in (d, std, c[0], e[0])))
