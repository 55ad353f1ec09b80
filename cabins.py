"""CaBins: CLIP-based Adaptive Bins for Monocular Depth Estimation, in the order of the paper.

An MLP on CLIP's image embedding predicts 256 depth bins for the image (Eq. 1). They are condensed
to 8 distances, the CaBins (Eq. 2). Each is written as a number into a text prompt for CLIP's frozen
text encoder. The text embeddings look at the image (Eq. 3) and are compared with every place in it
(Eq. 4). A decoder turns the similarities and the image features into a probability over the bins
at every pixel. Depth is the mean of the bin centres under this probability (Eq. 5).

Read downwards, with the paper beside it. `CaBins.distribution` is Figure 2.

    code           paper         shape                 what                               section
    image          I             (B, 3, H, W)          normalised RGB of B images
    pyramid        {x_i}         4 of (B, C_i, …, …)   stages, at strides 4, 8, 16, 32    3.2.1
    z_bar          z̄             (B, D)                global image embedding             3.2.1
    z              z             (B, D, h, w)          image embedding of every place     3.2.1
    b              b′, then b    (B, n_bins)           bin widths, before and after       3.2.1
                                                       they are divided by their sum
    c, centers     c(b)          (B, n_bins)           bin centres, metres                3.2.1
    m              m_k           (B, K, 1)             mean of each group, metres         3.2.2
    w              w_i           (B, K, n_g)           weights in a group, sum 1          3.2.2
    e, cabins      {e_k}         (B, K)                CaBins: distance classes, metres   3.2.2
    prompts        p ∈ R^(N×512) (N, 512)              learnable context of each text     3.2.3
    t              t             (B, K, D)             text embeddings                    3.2.3
    v_post, gamma  v_post, γ     (B, K, D), (D,)       what the image adds, and its scale 3.2.3
    s, similarity  s             (B, K, h, w)          cosine of z and t                  3.2.4
    p              p             (B, n_bins, H/2, W/2) probability of each bin            3.2.4
    d, depth       d             (B, 1, H/2, W/2)      depth, metres; then H x W          3.2.4
    target         d*            (B, 1, H, W)          truth, metres; below d_min: none   3.3
    x              X             (B, HW)               the set of its valid depths        3.3
    g              g_i           (B, 1, H, W)          log d - log d*                     3.3

h, w are the size of z: H/32, W/32 for the ResNets, H/16, W/16 for ViT. In 3.2.1 x is the map x_4,
and x̄ its mean; C_i are the channels of x_i; ẑ and t̂ are z and t of length 1.

The paper's values: n_bins = 256 bins in K = n_cabins = 8 groups of n_g = 32; N = n_prompts = 8;
λ = LAMBDA = 0.85, α = ALPHA = 10, β = BETA = 0.1, ε = 1e-4. d_min, d_max are min_depth, max_depth.

D, the width of CLIP's joint embedding, is 1024 for RN50 and 512 for RN101 (Sec. 3.1) and ViT-B/16.
The paper writes t and γ with 512, because its network is RN101. The 512 of the prompts is another
width, that of the text encoder's tokens, and is the same for all three.

The paper uses some symbols twice. p is the prompts and the probability, x features and X depths. i
counts bins, pixels and stages, k groups in Eq. 2 and bins in Eq. 5. "CaBins" is the network, the
module of Sec. 3.2.2 and its K values; in the code they are `CaBins` and `cabins` or `e`.

NOTE(differs): the paper, the released code and this code do not all agree.
NOTE(paper silent): the paper leaves this open. README's ledger lists both kinds.
"""

import dataclasses
import hashlib
import math
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from clip_tokenizer import EOT, number_tokens, tokenize

# ---- Configuration -------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """The sizes of one CLIP."""

    embed_dim: int  # D
    layers: tuple[int, ...]  # ResNet: blocks in each of the four stages; ViT: blocks in all
    width: int  # ResNet: channels of the stem; ViT: of a token
    grid: int  # positions along a side in CLIP's training
    text_width: int  # of a text token, and so of a prompt
    text_layers: int
    context_length: int = 77  # the longest text, in tokens


BACKBONES = {
    "RN50": Architecture(1024, (3, 4, 6, 3), 64, 7, 512, 12),
    "RN101": Architecture(512, (3, 4, 23, 3), 64, 7, 512, 12),
    "ViT-B/16": Architecture(512, (12,), 768, 14, 512, 12),
    "tiny": Architecture(64, (1, 1, 1, 1), 10, 4, 64, 2),  # not CLIP's: for the demo and the tests
}
DISTANCE_CLASSES = ("cabins", "median", "mean", "semantic")  # the rows of Table 3
SEMANTIC_BINS = ["giant", "extremely close", "close", "not in distance", "a little remote"]
SEMANTIC_BINS += ["far", "farthest", "unseen"]  # Sec. 4.6


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a network, kept in its checkpoint. Raises ValueError for a wrong one."""

    backbone: str = "RN101"
    distance_class: str = "cabins"
    n_bins: int = 256
    n_cabins: int = 8  # K
    n_prompts: int = 8  # N; together with a number's 9 tokens at most 77
    min_depth: float = 1e-3  # d_min, metres. NOTE(paper silent): the released code's value
    max_depth: float = 10.0  # d_max, metres
    image_width: int = 640  # longer side, in pixels, of the images in training
    focal: float = 518.86  # of their camera, in the same pixels, for `eval.py --ply`; NYU's
    # NOTE(paper silent): how images are normalised. The released code takes ImageNet's mean and
    # std, not CLIP's. All networks share them, so a checkpoint does not store them.
    image_mean: ClassVar = (0.485, 0.456, 0.406)  # red, green, blue, of images from 0 to 1
    image_std: ClassVar = (0.229, 0.224, 0.225)

    def __post_init__(self):
        for field, allowed in (("backbone", BACKBONES), ("distance_class", DISTANCE_CLASSES)):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(allowed)}")
        for field, least in (("n_bins", 2), ("n_cabins", 1), ("n_prompts", 0), ("image_width", 1)):
            if not isinstance(value := getattr(self, field), int) or value < least:
                raise ValueError(f"{field} is {value!r}; it must be an integer of at least {least}")
        n, low, high = self.n_cabins, self.min_depth, self.max_depth
        if self.n_bins % n:
            raise ValueError(f"n_cabins is {n}; it must divide n_bins, which is {self.n_bins}")
        if self.distance_class == "semantic" and n != len(SEMANTIC_BINS):
            raise ValueError(f"n_cabins is {n}; for 'semantic' it must be {len(SEMANTIC_BINS)}")
        if not 0 < low < high < 10_000:  # prompts have up to four digits before the point
            raise ValueError(f"depths from {low} to {high} m; must be 0 < from < to < 10000 m")


# ---- Sec. 3.1  CLIP's blocks. Parameters have the names that CLIP's own files give them. ---------


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int, is_causal: bool = False) -> Tensor:
    """Multi-head attention of q (B, Tq, C) to k and v (B, Tk, C), by n heads: (B, Tq, C).

    CLIP attends among tokens and over the image; Eq. 3 among the texts and from texts to image.
    """
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, n, T, C/n)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return out.transpose(1, 2).flatten(2)  # (B, Tq, C)


class Bottleneck(nn.Module):
    """CLIP's residual block. Its convolutions have stride 1; an average pool does the striding."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if in_channels != 4 * width:
            conv = nn.Conv2d(in_channels, 4 * width, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.pool(out)))  # (B, 4 width, h / stride, w / stride)
        return F.relu_(out + self.downsample(self.pool(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention. Its three projections are one matrix, as in CLIP's files."""

    def __init__(self, width: int, is_causal: bool):
        super().__init__()
        self.n_heads, self.is_causal = width // 64, is_causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.n_heads, self.is_causal))


class TransformerBlock(nn.Module):
    """A pre-norm layer of CLIP's transformers: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, is_causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, is_causal)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.ModuleDict({"c_fc": c_fc, "c_proj": c_proj})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))  # CLIP's approximation of GELU


def transformer(width: int, n_layers: int, is_causal: bool) -> nn.ModuleDict:
    """CLIP's stack of blocks. In the text encoder a token sees only itself and those before it."""
    blocks = [TransformerBlock(width, is_causal) for _ in range(n_layers)]
    return nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})


# ---- Sec. 3.2.1  Image encoder: the pyramid, [z̄, z], and Eq. 1 -----------------------------------


def resize_positions(positions: Tensor, h: int, w: int) -> Tensor:
    """Positions (1 + n², C) of a global token and an n x n grid, resized to (1 + hw, C).

    NOTE(paper silent): corners are not aligned here, but are in `resize`; so it is as released.
    """
    side = math.isqrt(len(positions) - 1)
    grid = positions[1:].T.unflatten(1, (side, side))[None]  # (1, C, side, side)
    grid = F.interpolate(grid, size=(h, w), mode="bilinear")  # (1, C, h, w)
    return torch.cat([positions[:1], grid[0].flatten(1).T])  # (1 + hw, C)


class AttentionPool(nn.Module):
    """CLIP's MHA module. In CLIP only the mean token x̄ is a query; here every token is.

    That turns CLIP's one embedding per image into one per place. x̄'s own output does not depend on
    the other queries, so z̄ is computed as CLIP's image embedding is.
    """

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
        tokens = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)  # [x̄, x]: (B, 1 + hw, C)
        tokens = tokens + resize_positions(self.positional_embedding, h, w)
        q, k, v = self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens)
        out = self.c_proj(attend(q, k, v, self.n_heads))  # [z̄, z]: (B, 1 + hw, D)
        return out[:, 0], out[:, 1:].transpose(1, 2).unflatten(2, (h, w))  # (B, D), (B, D, h, w)


class ResNet(nn.Module):
    """CLIP's modified ResNet and its attention pool. It returns all four stages, not only the last.

    (B, 3, H, W) -> pyramid [x1..x4], z_bar (B, D), z (B, D, h, w), with h = H/32 and w = W/32.
    """

    def __init__(self, layers: tuple[int, ...], width: int, embed_dim: int, grid: int):
        super().__init__()
        # the stem: ResNet has one convolution and a max pool, CLIP three and an average pool
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.channels = [4 * width * 2**i for i in range(len(layers))]  # C_1..C_4, of x1..x4
        for i, (before, n_blocks) in enumerate(zip([width, *self.channels], layers)):
            stage = [Bottleneck(before, width * 2**i, 1 if i == 0 else 2)]
            stage += [Bottleneck(self.channels[i], width * 2**i, 1) for _ in range(n_blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool(self.channels[-1], embed_dim, grid)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        x = F.relu_(self.bn1(self.conv1(image)))  # (B, width / 2, H/2, W/2)
        x = F.relu_(self.bn2(self.conv2(x)))
        x = F.relu_(self.bn3(self.conv3(x)))  # (B, width, H/2, W/2)
        x = F.avg_pool2d(x, 2)  # (B, width, H/4, W/4)
        x1 = self.layer1(x)  # (B, 4 width, H/4, W/4)
        x2 = self.layer2(x1)  # (B, 8 width, H/8, W/8)
        x3 = self.layer3(x2)  # (B, 16 width, H/16, W/16)
        x4 = self.layer4(x3)  # (B, 32 width, H/32, W/32)
        z_bar, z = self.attnpool(x4)
        return [x1, x2, x3, x4], z_bar, z


class AdaptiveBins(nn.Module):
    """Bin widths b (B, n_bins), positive and of sum 1, from the global embedding z̄ (B, D).

    NOTE(differs): the paper says "MLP with ReLU". The released one has LeakyReLU between its layers
    and ReLU + 0.1 at the end, and so has this. The 0.1 keeps every width above 0; with
    ReLU alone, outputs that are all negative would give 0 / 0.
    NOTE(paper silent): the hidden widths, 512 and 256.
    """

    def __init__(self, embed_dim: int, n_bins: int):
        super().__init__()
        layers = [nn.Linear(embed_dim, 512), nn.LeakyReLU(), nn.Linear(512, 256), nn.LeakyReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(256, n_bins))

    def forward(self, z_bar: Tensor) -> Tensor:
        # widths and centres are float32 under autocast: bfloat16 has steps of 6 cm at 10 m
        b = F.relu(self.mlp(z_bar).float()) + 0.1  # b′
        return b / b.sum(1, keepdim=True)


def bin_centers(b: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Depth at the centre of each bin, in metres: (B, n_bins) from b (B, n_bins) of sum 1.

    The cumulative sum includes all of b_i, so b_i / 2 is taken off.
    """
    # Eq. 1:  c(b_i) = d_min + (d_max - d_min) (b_i / 2 + Σ_{j<i} b_j)
    return min_depth + (max_depth - min_depth) * (b.cumsum(1) - b / 2)


# ---- Sec. 3.2.2  CaBins: Eq. 2 -------------------------------------------------------------------


def distance_classes(centers: Tensor, n_groups: int, kind: str = "cabins") -> Tensor:
    """One distance for each group of adjacent bins: (B, K) metres from centres (B, n_bins).

    `kind` is a row of Table 3: "cabins" (Eq. 2), "median" or "mean". The row "semantic" has phrases
    in place of distances. Raises ValueError for another kind.
    NOTE(paper silent): which median. Of an even number this is the lower one, a real bin centre.

    Eq. 2 nearly picks the bin centre that is nearest to the group's mean. How nearly depends on the
    unit, because 1 / |c - m| has one. With 256 equal bins over 10 m, the two in the middle of a
    group get a weight of 0.50 each and the next 1e-15; over 80 m, 0.47 and 0.007. In centimetres
    weights are often almost equal, and e nearly the mean. All rows of Table 3 have AbsRel 0.059.
    """
    c = centers.unflatten(1, (n_groups, -1))  # (B, K, n_g)
    m = c.mean(2, keepdim=True)  # (B, K, 1)
    if kind == "mean":
        return m.squeeze(2)
    if kind == "median":
        return c.median(2).values
    if kind != "cabins":
        raise ValueError(f"kind is {kind!r}; it must be cabins, median or mean")
    # Eq. 2:  e_k = Σ_i w_i c_k(b_i),  w_i = softmax(1 / (|c_k(b_i) - m_k| + ε)),  ε = 1e-4
    w = torch.softmax(1 / ((c - m).abs() + 1e-4), dim=2)  # (B, K, n_g)
    return (w * c).sum(2)  # (B, K)


# ---- Sec. 3.2.3  Text encoder: CLIP, prompts, and Eq. 3 ------------------------------------------


class CLIP(nn.Module):
    """Both encoders of CLIP. The image encoder is trained, the text encoder is frozen."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        if len(a.layers) == 1:  # Sec. 4.6, further down
            self.visual = VisionTransformer(*a.layers, a.width, a.embed_dim, a.grid)
        else:
            self.visual = ResNet(a.layers, a.width, a.embed_dim, a.grid)
        self.token_embedding = nn.Embedding(EOT + 1, a.text_width)
        self.positional_embedding = nn.Parameter(torch.randn(a.context_length, a.text_width) * 0.01)
        self.transformer = transformer(a.text_width, a.text_layers, is_causal=True)
        self.ln_final = nn.LayerNorm(a.text_width)
        projection = torch.randn(a.text_width, a.embed_dim) / a.text_width**0.5
        self.text_projection = nn.Parameter(projection)
        # log of CLIP's scale of the cosine: in its files, but not in Eq. 4
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # NOTE(differs): frozen whole, as in the paper; the released code trains the token embedding
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))

    def encode_text(self, ids: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Text embeddings (L, D) of token ids (L, T), each a text from start to end token.

        `prompts` (N, text_width), where given, stand between the start token and the text, as in
        CoOp. They are learnable words: the gradient passes through the frozen encoder to them.

        NOTE(differs): 17 positions are encoded, 8 prompts and a number, not the 77 of Sec. 3.1. The
        encoder is causal, and a text's embedding is its end token's: what follows changes nothing.
        """
        x = self.token_embedding(ids)  # (L, T, text_width)
        end = ids.argmax(-1)  # (L,); the end token has the highest id
        if prompts is not None:
            prompts = prompts.expand(x.shape[0], -1, -1)  # (L, N, text_width)
            x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)  # (L, N + T, text_width)
            end = end + prompts.shape[1]
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.ln_final(self.transformer.resblocks(x))
        return x[torch.arange(x.shape[0], device=x.device), end] @ self.text_projection  # (L, D)


class Attention(nn.Module):
    """Multi-head attention as in DenseCLIP: q, k and v are projected separately, without bias."""

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
        return self.dropout(self.proj(attend(q, k, v, self.n_heads)))


class ContextLayer(nn.Module):
    """A pre-norm decoder layer: the texts look at each other, then at the image, the memory."""

    def __init__(self, width: int, n_heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, n_heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = Attention(width, n_heads, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.dropout(self.mlp(self.norm3(x)))


class ContextDecoder(nn.Module):
    """Eq. 3: the texts t (B, K, D), updated by what they find in z_bar (B, D) and z (B, D, h, w).

    NOTE(paper silent): TransDecoder's layers and sizes. Here, as in the released code, they are
    DenseCLIP's, and so is the start: width 256, 4 heads, 6 layers, dropout 0.1.
    """

    def __init__(self, embed_dim: int, width: int = 256, n_heads: int = 4, n_layers: int = 6):
        super().__init__()
        self.text_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        linear = nn.Linear(embed_dim, width)
        self.memory_proj = nn.Sequential(nn.LayerNorm(embed_dim), linear, nn.LayerNorm(width))
        self.layers = nn.ModuleList(ContextLayer(width, n_heads, 0.1) for _ in range(n_layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # so small that Eq. 3 changes almost nothing at first: training starts from CLIP's texts
        self.gamma = nn.Parameter(torch.full((embed_dim,), 1e-4))

    def forward(self, t: Tensor, z_bar: Tensor, z: Tensor) -> Tensor:
        image = torch.cat([z_bar[:, :, None], z.flatten(2)], dim=2).mT  # [z̄, z]: (B, 1 + hw, D)
        memory = self.memory_proj(image)  # (B, 1 + hw, width)
        x = self.text_proj(t)  # (B, K, width)
        for layer in self.layers:
            x = layer(x, memory)
        v_post = self.out_proj(x)  # (B, K, D)
        # Eq. 3:  t ← t + γ v_post,  v_post = TransDecoder(t, [z̄, z])
        return t + self.gamma * v_post


# ---- Sec. 3.2.4  Depth prediction: Eq. 4 and 5 ---------------------------------------------------


def cosine_similarity(z: Tensor, t: Tensor) -> Tensor:
    """Cosine of every place in the image z (B, D, h, w) and every text t (B, K, D): (B, K, h, w).

    CLIP multiplies it by a learnt scale, exp(`logit_scale`). Eq. 4 does not.
    """
    # Eq. 4:  s = ẑ · t̂
    return torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), F.normalize(t, dim=2))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corner pixels on corner pixels: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class DepthDecoder(nn.Module):
    """Probability p (B, n_bins, H/2, W/2) of every bin, from the pyramid and s (B, K, h, w).

    With a ResNet, s is 8 of 2056 channels at stride 32, beside x4, from which z itself is made. No
    loss asks s to mean anything; DenseCLIP has a loss on s. `eval.py --ablate` measures a trained
    network with s set to 0.

    NOTE(paper silent): channels and convolutions; all are the released code's. So is the padding of
    the 1 x 1 `reduce`, which adds a border that holds only its bias.
    NOTE(differs): `features` has n_bins channels in the paper, and always 256 in the released code.
    """

    def __init__(self, channels: list[int], n_cabins: int, n_bins: int):
        super().__init__()
        *skips, n = channels  # C_1, C_2, C_3 and C_4
        self.reduce = nn.Conv2d(n + n_cabins, n, 1, padding=1)
        self.up = nn.ModuleList()
        for skip in reversed(skips):  # of x3, x2, x1
            layers = []
            for inputs in (n + skip, n // 2):
                layers += [nn.Conv2d(inputs, n // 2, 3, padding=1), nn.BatchNorm2d(n // 2)]
                layers += [nn.LeakyReLU(inplace=True)]
            self.up.append(nn.Sequential(*layers))
            n = n // 2
        # nothing lies between these two, so together they are one linear map
        self.features = nn.Conv2d(n, n_bins, 3, padding=1)
        self.logits = nn.Conv2d(n_bins, n_bins, 1)

    def forward(self, pyramid: list[Tensor], s: Tensor) -> Tensor:
        *skips, x4 = pyramid
        s = resize(s, x4.shape[-2:])  # only ViT's s, at stride 16, shrinks, to x4's 32
        x = self.reduce(torch.cat([x4, s], dim=1))  # (B, C_4, H/32 + 2, W/32 + 2)
        for up, skip in zip(self.up, reversed(skips)):
            x = torch.cat([resize(x, skip.shape[-2:]), skip], dim=1)  # (B, C + C_skip, …)
            x = up(x)  # (B, C / 2, …), at the skip's size
        x = resize(x, (2 * x.shape[-2], 2 * x.shape[-1]))  # (B, C_4 / 8, H/2, W/2)
        logits = self.logits(self.features(x)).movedim(1, -1)  # (B, H/2, W/2, n_bins)
        # in channels_last the bins of a pixel are neighbours in memory: softmax needs no copy
        return logits.softmax(-1, torch.float32).movedim(-1, 1)  # (B, n_bins, H/2, W/2)


def expected_depth(centers: Tensor, p: Tensor) -> Tensor:
    """Depth (B, 1, H/2, W/2) in metres of centres (B, n_bins) under p (B, n_bins, H/2, W/2).

    It is a mean of the centres, so it never leaves their range. `CaBins.forward` upsamples it.
    """
    # Eq. 5:  d_i = Σ_k c(b_k) p_ik      (einsum would run in bfloat16 under autocast)
    return (centers[:, :, None, None] * p).sum(1, keepdim=True)


# ---- Figure 2: the network -----------------------------------------------------------------------


class Prediction(NamedTuple):
    """The output of CaBins, in float32 under autocast too."""

    depth: Tensor  # (B, 1, H, W) metres
    centers: Tensor  # (B, n_bins) metres, increasing
    cabins: Tensor  # (B, K) metres; semantic prompts do not use them
    similarity: Tensor  # (B, K, h, w), from -1 to 1


class CaBins(nn.Module):
    """The network of Figure 2. `clip` is what `load_clip` returns, or None: random weights.

    Raises ValueError if `clip` is not the backbone that the config names.
    """

    def __init__(self, config: Config, clip: CLIP | None = None):
        super().__init__()
        expected = BACKBONES[config.backbone]
        if clip is None:
            clip = CLIP(expected)
            if config.backbone != "tiny":
                warnings.warn("CLIP has random weights: give clip=load_clip(…)", stacklevel=2)
        # the authors' checkpoints have fewer positions for texts than CLIP's 77
        if clip.architecture._replace(context_length=77) != expected:
            raise ValueError(f"backbone is {config.backbone}; the CLIP given is another")
        self.integer_digits = len(f"{config.max_depth:.0f}")  # before the point
        self.config, self.clip, embed_dim = config, clip, expected.embed_dim
        self.bins = AdaptiveBins(embed_dim, config.n_bins)
        # NOTE(differs): prompts start at CoOp's std of 0.02, the released code's at 1
        self.prompts = nn.Parameter(torch.empty(config.n_prompts, expected.text_width))
        nn.init.trunc_normal_(self.prompts, std=0.02)
        sizes = {"width": 64, "n_layers": 2} if config.backbone == "tiny" else {}
        self.context_decoder = ContextDecoder(embed_dim, **sizes)
        self.depth_decoder = DepthDecoder(clip.visual.channels, config.n_cabins, config.n_bins)
        if config.distance_class == "semantic":
            ids = tokenize(SEMANTIC_BINS, 5)  # three tokens at most, and the two ends
            self.register_buffer("phrases", ids, persistent=False)
        self.to(memory_format=torch.channels_last)  # makes convolutions faster, on CPUs and GPUs

    def encode_prompts(self, e: Tensor) -> Tensor:
        """Text embeddings t (B, K, D) of the distances e (B, K), or of the phrases of Sec. 4.6.

        No gradient passes through the digits. So the bins get none from the text, only from Eq. 5
        and Eq. 7. Prompts, TransDecoder, γ and the image encoder learn through the text.

        NOTE(paper silent): how e_k is written. The released code writes the bare number, rounded to
        4 decimals, and so does this. Phrases come without DepthCLIP's "This object is".
        """
        if self.config.distance_class == "semantic":
            t = self.clip.encode_text(self.phrases, self.prompts)  # (K, D), for every image
            return t.expand(e.shape[0], -1, -1)  # (B, K, D)
        ids = number_tokens(e, self.integer_digits)  # (B, K, T), T = 9 for 10 and 80 m
        t = self.clip.encode_text(ids.flatten(0, 1), self.prompts)  # (BK, D)
        return t.view(*e.shape, -1)  # (B, K, D)

    def distribution(self, image: Tensor) -> tuple[Tensor, ...]:
        """Figure 2 up to p: b, c (B, n_bins), e (B, K), s (B, K, h, w), p (B, n_bins, H/2, W/2)."""
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 64:
            found = tuple(image.shape)
            raise ValueError(f"image is {found}; it must be (B, 3, H, W), H and W at least 64")
        config = self.config
        # image encoder and bins (Sec. 3.2.1)
        pyramid, z_bar, z = self.clip.visual(image)
        b = self.bins(z_bar)  # (B, n_bins)
        c = bin_centers(b, config.min_depth, config.max_depth)  # (B, n_bins)
        # CaBins (Sec. 3.2.2); semantic prompts do not use e, which is then only reported
        kind = "cabins" if config.distance_class == "semantic" else config.distance_class
        e = distance_classes(c, config.n_cabins, kind)  # (B, K)
        # text encoder (Sec. 3.2.3)
        t = self.encode_prompts(e)  # (B, K, D)
        t = self.context_decoder(t, z_bar, z)  # (B, K, D)
        # similarity and probability (Sec. 3.2.4)
        s = cosine_similarity(z, t)  # (B, K, h, w)
        p = self.depth_decoder(pyramid, s)  # (B, n_bins, H/2, W/2)
        return b, c, e, s, p

    def forward(self, image: Tensor, upsample: bool = True) -> Prediction:
        """Depth of normalised images (B, 3, H, W), of any size from 64 x 64 on (x4 is then 2 x 2).

        Without `upsample`, depth stays at the decoder's size, about H/2 x W/2.
        """
        _, c, e, s, p = self.distribution(image)
        d = expected_depth(c, p)  # (B, 1, H/2, W/2)
        if upsample:
            d = resize(d, image.shape[-2:])  # (B, 1, H, W)
        return Prediction(d, c, e, s.float())


# ---- Sec. 3.3  Training loss. A mask (B, 1, H, W) says where ground truth is valid. --------------

LAMBDA, ALPHA, BETA = 0.85, 10.0, 0.1


def silog_loss(depth: Tensor, target: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """Scale-invariant logarithmic loss over all valid pixels of the batch; ~0 if there are none.

    Under the root are the variance of g and 0.15 times its squared mean. λ = 0.85 takes off 85 % of
    that square, so a depth that is wrong by one factor everywhere costs less. λ = 1 would forgive
    it altogether.

    NOTE(paper silent): the sums run over the batch, not over each image.
    NOTE(differs): Eq. 6 has the biased variance. The released code has the unbiased: `unbiased`.
    """
    n = mask.sum().clamp(min=1)
    g = torch.where(mask, depth, 1).log() - torch.where(mask, target, 1).log()  # 0 if not valid
    # Eq. 6:  L_pixel = α √( 1/n Σ g_i² - λ/n² (Σ g_i)² )
    mean, mean_of_squares = g.sum() / n, g.square().sum() / n
    square = mean_of_squares - LAMBDA * mean.square()
    if unbiased:  # the variance counts n / (n - 1) times
        square = square + (mean_of_squares - mean.square()) / (n - 1).clamp(min=1)
    return ALPHA * square.clamp(min=1e-12).sqrt()  # the clamp keeps the gradient finite at 0


def nearest(values: Tensor, queries: Tensor) -> Tensor:
    """The value that is nearest to each query (B, Q), out of values (B, V) in increasing order."""
    with torch.no_grad():
        midpoints = (values[:, 1:] + values[:, :-1]) / 2  # (B, V - 1)
        index = torch.searchsorted(midpoints, queries)  # (B, Q): how many lie below the query
    return values.gather(1, index)


def chamfer_loss(centers: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Bi-directional chamfer distance of bin centres (B, n_bins) and the depths X of each image.

    Each bin is pulled to the nearest true depth, and each true depth pulls the nearest bin.
    An image without valid pixels adds 0.

    NOTE(paper silent): what chamfer(·, ·) is. Here, as in the released code, it is the squared
    distance to the nearest value, mean over the first set; the loss is the mean over the batch.
    Depths are numbers, so sorting finds the nearest, without a table of pixels x centres.
    """
    c, valid = centers, mask.flatten(1)  # (B, n_bins), (B, HW)
    x = target.flatten(1).masked_fill(~valid, 0)  # (B, HW)
    # an invalid pixel copies the greatest depth: the set X stays the same
    x = torch.where(valid, x, x.amax(1, keepdim=True))
    # Eq. 7:  L_bins = chamfer(X, c(b)) + chamfer(c(b), X)
    x_to_c = (x - nearest(c, x)).square() * valid  # (B, HW): min_c (x - c)²
    c_to_x = (c - nearest(x.sort(1).values, c)).square() * valid.any(1, keepdim=True)  # (B, n_bins)
    loss = x_to_c.sum(1) / valid.sum(1).clamp(min=1) + c_to_x.mean(1)  # (B,)
    return loss.mean()


def total_loss(prediction, target: Tensor, min_depth: float, unbiased: bool = False) -> Tensor:
    """The training loss against ground truth (B, 1, H, W) in metres, valid above `min_depth`."""
    mask = target > min_depth
    pixel = silog_loss(resize(prediction.depth, target.shape[-2:]), target, mask, unbiased)
    # Eq. 8:  L_total = L_pixel + β L_bins
    return pixel + BETA * chamfer_loss(prediction.centers, target, mask)


# ---- Sec. 4.3  Evaluation metrics (4.1 and 4.2 are in train.py and data.py) ----------------------


def depth_metrics(depth: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The metrics of one image, from the predicted and true depths (n,), in m, of its valid pixels.

    NOTE(paper silent): a metric is averaged over images with equal weight (`eval.evaluate`).

    Raises ValueError if there are none, or not as many of the one as of the other.
    """
    if depth.shape != target.shape or depth.ndim != 1 or not len(depth):
        shapes = f"{tuple(depth.shape)} and {tuple(target.shape)}"
        raise ValueError(f"depths of shapes {shapes}; they must be equal, 1-D and not empty")
    error = depth - target  # d - d*
    log_error = depth.log() - target.log()
    delta = torch.maximum(depth / target, target / depth)  # max(d / d*, d* / d)
    return {
        "abs_rel": (error.abs() / target).mean(),  # 1/n Σ |d - d*| / d*
        "sq_rel": (error.square() / target).mean(),  # 1/n Σ (d - d*)² / d*, m
        "rmse": error.square().mean().sqrt(),  # √(1/n Σ (d - d*)²), m
        "rmse_log": log_error.square().mean().sqrt(),  # √(1/n Σ (log d - log d*)²)
        "log10": (depth.log10() - target.log10()).abs().mean(),  # 1/n Σ |log10 d - log10 d*|
        "d1": (delta < 1.25).float().mean(),  # share, from 0 to 1, with δ < 1.25
        "d2": (delta < 1.25**2).float().mean(),
        "d3": (delta < 1.25**3).float().mean(),
    }


# ---- Sec. 4.6  The other backbone: ViT-B/16 ------------------------------------------------------


class VisionTransformer(nn.Module):
    """CLIP's ViT with a pyramid after DPT. z̄ is the class token's output, and z has stride 16.

    NOTE(paper silent): which blocks give the tokens, and the widths. Here: blocks 3, 6, 9 and 12
    without the class token, and DPT's widths for ViT-B. Images are resized to whole patches.
    NOTE(differs): the released code's ViT cannot run: it adds the class embedding twice.
    """

    def __init__(self, n_layers: int, width: int, embed_dim: int, grid: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 16, stride=16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(width, n_layers, is_causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) / width**0.5)
        self.taps = [n_layers * i // 4 for i in (1, 2, 3, 4)]  # after blocks 3, 6, 9, 12
        self.channels = [width // 8, width // 4, width // 2, width]  # C_1..C_4, of x1..x4
        c1, c2, c3, c4 = self.channels
        stages = [  # from stride 16 to 4, 8, 16, 32; not part of CLIP
            nn.Sequential(nn.Conv2d(width, c1, 1), nn.ConvTranspose2d(c1, c1, 4, stride=4)),
            nn.Sequential(nn.Conv2d(width, c2, 1), nn.ConvTranspose2d(c2, c2, 2, stride=2)),
            nn.Conv2d(width, c3, 1),
            nn.Sequential(nn.Conv2d(width, c4, 1), nn.Conv2d(c4, c4, 3, stride=2, padding=1)),
        ]
        self.reassemble = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        h, w = (math.ceil(size / 16) for size in image.shape[-2:])
        image = resize(image, (16 * h, 16 * w))  # whole patches only
        x = self.conv1(image).flatten(2).mT  # (B, hw, width)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1)  # (B, 1 + hw, width)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, h, w))
        pyramid = []
        for i, block in enumerate(self.transformer.resblocks, 1):
            x = block(x)
            if i in self.taps:
                tokens = x[:, 1:].mT.unflatten(2, (h, w))  # (B, width, h, w)
                pyramid.append(self.reassemble[len(pyramid)](tokens))
        out = self.ln_post(x) @ self.proj  # [z̄, z]: (B, 1 + hw, D)
        return pyramid, out[:, 0], out[:, 1:].mT.unflatten(2, (h, w))


# ==== The paper ends here. Below: where weights come from, and where they go. =====================

CLIP_URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
CLIP_SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
}


def download(url: str, file: str, sha256: str) -> Path:
    """The path of `file` in torch.hub's cache, where a download with the right hash is put."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{url} was not fetched ({error}); put it at {path}") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is not what {url} was: delete it, and it is fetched again")
    return path


def load_clip(name_or_path: str | Path) -> CLIP:
    """CLIP with OpenAI's weights, in float32: "RN50", "RN101", "ViT-B/16", or a file.

    A name is downloaded once. A file may be OpenAI's TorchScript archive or a plain state dict of
    the same names. Raises FileNotFoundError or ValueError, saying what was found and expected.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if sha256 := CLIP_SHA256.get(name):
        name = name.replace("/", "-")
        path = download(CLIP_URL.format(sha256=sha256, name=name), f"clip-{name}.pt", sha256)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file, and none of {', '.join(CLIP_SHA256)}")
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() in CLIP_SHA256.values():  # only OpenAI's may hold code
        state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = read_tensors(path, "a CLIP file: one of OpenAI's archives, or a state dict of it")
    sizes = ("input_resolution", "context_length", "vocab_size")  # entries that are not weights
    state = {k: v.float() for k, v in state.items() if k not in sizes and torch.is_tensor(v)}
    clip = new_clip(state, path)
    # ViT's pyramid is not in CLIP's files: it keeps its random start
    ours = {k: v for k, v in clip.state_dict().items() if k.startswith("visual.reassemble.")}
    load_strictly(clip, state | ours, path)
    return clip


def read_tensors(path: Path, expected: str) -> dict:
    """The dictionary that a PyTorch file holds. No code in the file is run."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; expected {expected}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch does not check the sums of the parts
                    raise ValueError(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: it depends on what the bytes happen to be
        what = f"{path} ({path.stat().st_size} bytes) is cut off, damaged or of another kind"
        raise ValueError(f"{what}; expected {expected}") from error
    if not (isinstance(content, dict) and content and all(isinstance(k, str) for k in content)):
        raise ValueError(f"{path} holds {str(content)[:40]!r}; expected {expected}")
    return content


def new_clip(state: dict[str, Tensor], source: object) -> CLIP:
    """A CLIP, with random weights, of the backbone whose tensors `state` has."""
    if missing := {"positional_embedding", "text_projection"} - state.keys():
        raise ValueError(f"{source} is no CLIP with its two encoders: it has no {min(missing)}")
    is_vit, shape = "visual.proj" in state, tuple(state["text_projection"].shape)
    for a in BACKBONES.values():  # told apart by these; `load_strictly` compares all else
        if (len(a.layers) == 1, (a.text_width, a.embed_dim)) == (is_vit, shape):
            return CLIP(a._replace(context_length=len(state["positional_embedding"])))
    raise ValueError(f"{source} is a CLIP, but none of {', '.join(BACKBONES)}")


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Load tensors that must be finite and fit exactly; ValueError says which are not."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source} holds values that are not finite, in {name}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # torch lists all that is missing, unknown or of another shape
        what = " ".join(str(error).split())[:250]
        raise ValueError(f"{source} does not fit the network: {what} …") from None


# ---- Checkpoints ---------------------------------------------------------------------------------

RELEASED_NAMES = {  # how names in the authors' checkpoints begin, and ours
    "contexts": "prompts",
    "gamma": "context_decoder.gamma",
    "clip_model.": "clip.",
    "computeAdaptiveBin.regressor.": "bins.mlp.",
    "context_decoder.decoder.": "context_decoder.layers.",
    "decoder.conv2.": "depth_decoder.reduce.",
    "decoder.up1._net.": "depth_decoder.up.0.",
    "decoder.up2._net.": "depth_decoder.up.1.",
    "decoder.up3._net.": "depth_decoder.up.2.",
    "decoder.conv3.": "depth_decoder.features.",
    "predict_D.conv_out.0.": "depth_decoder.logits.",
}


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, and rename it to `path` when it is complete."""
    partial = Path(f"{path}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        partial.replace(path)
    except RuntimeError as error:  # torch's own, of a full disk
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, model: CaBins, **state) -> None:
    """Write the model, its config and `state` (tensors and plain values), whole or not at all."""
    content = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), **state}
    write_whole(path, lambda partial: torch.save(content, partial))


def read_checkpoint(path: str | Path) -> dict:
    """All that a checkpoint holds: "model", and in ours "config" and what training needs."""
    content = read_tensors(Path(path), "a checkpoint of train.py or of the authors")
    state = content.get("model")
    if not (state and isinstance(state, dict) and all(map(torch.is_tensor, state.values()))):
        found = ", ".join(list(content)[:3])
        raise ValueError(f"{path} is no checkpoint of CaBins: it has no 'model', but {found}, …")
    return content


def restore(content: dict, source: object, max_depth: float | None = None) -> CaBins:
    """The network of a checkpoint that `read_checkpoint` read from `source`."""
    state = content["model"]
    if "config" in content:
        try:
            config = Config(**content["config"])
        except TypeError as error:
            raise ValueError(f"{source} is of another version of CaBins: {error}") from None
        if max_depth not in (None, config.max_depth):
            raise ValueError(f"{source} is for depths to {config.max_depth} m, not to {max_depth}")
    elif max_depth is None:
        raise ValueError(f"{source} is the authors': give max_depth, 10 for NYU or 80 for KITTI")
    else:
        kitti = {"image_width": 1216, "focal": 721.54}
        config = Config(max_depth=max_depth, **kitti if max_depth > 10 else {})
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        for theirs, ours in RELEASED_NAMES.items():
            for name in [name for name in state if name.startswith(theirs)]:
                state[ours + name.removeprefix(theirs)] = state.pop(name)
        if "prompts" in state:
            state["prompts"] = state["prompts"].squeeze(0)  # theirs is (1, N, 512)
    clip = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    model = CaBins(config, new_clip(clip, source))
    load_strictly(model, state, source)
    return model.eval()


def load_checkpoint(path: str | Path, max_depth: float | None = None, map_location="cpu") -> CaBins:
    """The network of a checkpoint, ours or the authors', in eval mode; see its `config`.

    The authors' do not say their range, so `max_depth` must. Raises FileNotFoundError, ValueError.
    """
    return restore(read_checkpoint(path), path, max_depth).to(map_location)


# ---- Your own pictures ---------------------------------------------------------------------------


class Inference(NamedTuple):
    """What `infer` gives: float32 arrays in metres, maps at the picture's own size."""

    depth: np.ndarray  # (H, W)
    std: np.ndarray  # (H, W), the standard deviation of depth under p; not a calibrated uncertainty
    centers: np.ndarray  # (n_bins,)
    cabins: np.ndarray  # (K,)


def mean_and_std(image: Tensor) -> Tensor:
    """ImageNet's mean and std, each (3, 1, 1), on the device of `image`, without waiting for it."""
    statistics = torch.tensor([Config.image_mean, Config.image_std])[..., None, None]
    return statistics.to(image.device, non_blocking=True)


def open_picture(path: str | Path, what: str = "a picture") -> Image.Image:
    """An image file, decoded. Raises ValueError, which calls it `what`."""
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # of many kinds: it depends on what the bytes happen to be
        raise ValueError(f"{path} cannot be read as {what}: {error}") from error
    return image


def read_picture(picture: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, upright, of a picture of any mode but floating point, or such an array."""
    if isinstance(picture, (str, Path)):
        picture = open_picture(picture)
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "F":
            raise ValueError("the picture has floating-point values; save it in 8 or 16 bits")
        if picture.mode.startswith("I"):  # grey of more than 8 bits: its brightest becomes white
            grey = np.asarray(picture).clip(0)
            picture = Image.fromarray((grey * (255 / max(grey.max(), 1))).astype(np.uint8))
        picture = np.asarray(picture.convert("RGB"))
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
        raise ValueError(f"picture is {picture.dtype} {picture.shape}; it must be uint8 (H, W, 3)")
    return picture


def to_input(model: CaBins, picture: np.ndarray) -> Tensor:
    """The network's input (1, 3, …, …), on its device; its longer side is that of training."""
    image = torch.tensor(picture, device=next(model.parameters()).device)
    image = image.permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
    factor = model.config.image_width / max(picture.shape[:2])
    size = [max(64, round(side * factor)) for side in picture.shape[:2]]  # 64 is the least it takes
    image = F.interpolate(image, size, mode="bilinear", antialias=True)
    mean, std = mean_and_std(image)
    return (image - mean) / std


@torch.inference_mode()
def look(model: CaBins, image: Tensor, size: tuple[int, int]) -> tuple[Inference, np.ndarray]:
    """`Inference` with maps of `size`, and s (K, h, w), of one normalised image (1, 3, H, W)."""
    _, c, e, s, p = model.eval().distribution(image.to(next(model.parameters()).device))
    depth = expected_depth(c, p)  # (1, 1, H/2, W/2)
    variance = (p * (c[:, :, None, None] - depth).square()).sum(1, keepdim=True)
    depth, std = resize(torch.cat([depth, variance.sqrt()], dim=1), size)[0]
    depth, std, c, e, s = (x.float().cpu().numpy() for x in (depth, std, c[0], e[0], s[0]))
    return Inference(depth, std, c, e), s


def infer(model: CaBins, picture: str | Path | Image.Image | np.ndarray) -> Inference:
    """Depth of a picture of any size: a path, a PIL image, or a uint8 array (H, W, 3).

    The network gets it at the size of the images in its training, on whichever device it is, and in
    the precision of the `torch.autocast` around. Raises ValueError for what is no picture.
    """
    picture = read_picture(picture)
    inference, _ = look(model, to_input(model, picture), picture.shape[:2])
    return inference
