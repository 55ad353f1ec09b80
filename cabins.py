"""CaBins: CLIP-based Adaptive Bins for Monocular Depth Estimation, in the order of the paper.

One RGB image in, metres per pixel out. CLIP's image encoder predicts 256 depth bins for the image
(Eq. 1), which are condensed to 8 distances, the CaBins (Eq. 2). Each is written as a number into a
text prompt for CLIP's frozen text encoder; the text embeddings look at the image (Eq. 3) and are
then compared with every place in it (Eq. 4). A decoder turns the similarities and the image
features into a probability over the bins at every pixel, and depth is its mean (Eq. 5).

Read downwards: each part uses only what stands above it; `CaBins.forward` is Figure 2.

    code           paper         shape                 what                               section
    image          I             (B, 3, H, W)          normalised RGB of B images
    pyramid        {x_i}         4 of (B, C_i, …, …)   features at stride 4, 8, 16, 32    3.2.1
    z_bar          z̄             (B, D)                global image embedding             3.2.1
    z              z             (B, D, h, w)          dense image embedding, stride 32   3.2.1
    b              b             (B, n_bins)           bin widths, sum 1                  3.2.1
    c, centers     c(b)          (B, n_bins)           bin centres, m                     3.2.1
    e, cabins      {e_k}         (B, K)                CaBins: the distance classes, m    3.2.2
    m              m_k           (B, K, 1)             mean of each group of centres, m   3.2.2
    w              w_i           (B, K, n_g)           weights in a group, sum 1          3.2.2
    prompts        p             (N, 512)              learnable context of each text     3.2.3
    t              t             (B, K, D)             text embeddings                    3.2.3
    v_post, gamma  v_post, γ     (B, K, D), (D,)       what the image tells the text      3.2.3
    s, similarity  s             (B, K, h, w)          cosine of z and t                  3.2.4
    p              p             (B, n_bins, H/2, W/2) probability of each bin            3.2.4
    d, depth       d             (B, 1, H, W)          depth, m                           3.2.4
    g              g_i           (B, 1, H, W)          log d - log d*                     3.3
    target         d*, X         (B, 1, H, W)          ground truth, m; 0 is none         3.3

K is n_cabins = 8, N is n_prompts = 8, n_bins = 256. D is CLIP's joint width: 1024 for RN50, 512 for
RN101, for which the paper writes it out, and for ViT-B/16, whose z has stride 16. Sizes such as
H/32 are rounded where they do not divide.
NOTE(differs) marks where the paper, the authors' code and this file are not the same; the README's
ledger lists all such places.
"""

import dataclasses
import hashlib
import math
import os
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_tokenizer import EOT, SOT, tokenize

# ---- Configuration -------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """The sizes of one CLIP. They are read off its tensors, so they cannot disagree with them."""

    embed_dim: int  # D
    layers: tuple[int, ...]  # ResNet: blocks of each of the four stages; ViT: all blocks
    width: int  # ResNet: the pyramid has 4, 8, 16 and 32 times as many channels; ViT: of a token
    grid: int  # side of the square of positions that CLIP was trained with
    text_width: int
    text_layers: int
    context_length: int  # the longest text, in tokens
    vocab_size: int


BACKBONES = {
    "RN50": Architecture(1024, (3, 4, 6, 3), 64, 7, 512, 12, 77, 49408),
    "RN101": Architecture(512, (3, 4, 23, 3), 64, 7, 512, 12, 77, 49408),
    "ViT-B/16": Architecture(512, (12,), 768, 14, 512, 12, 77, 49408),
    "tiny": Architecture(64, (1, 1, 1, 1), 10, 4, 64, 2, 77, 49408),  # for the demo and the tests
}
DISTANCE_CLASSES = ("cabins", "median", "mean", "semantic")  # the rows of Table 3
SEMANTIC_BINS = ["giant", "extremely close", "close", "not in distance", "a little remote"]
SEMANTIC_BINS += ["far", "farthest", "unseen"]  # Sec. 4.6


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what the network computes; each checkpoint carries its own.

    Depths are in metres. Raises ValueError, naming the field and what it may be.
    """

    backbone: str = "RN101"
    distance_class: str = "cabins"
    n_bins: int = 256
    n_cabins: int = 8  # K
    n_prompts: int = 8  # N
    min_depth: float = 1e-3  # d_min
    max_depth: float = 10.0  # d_max
    # NOTE(differs): the paper does not say; the released code normalises as for ImageNet, not CLIP
    image_mean: ClassVar = (0.485, 0.456, 0.406)  # red, green, blue, of images from 0 to 1
    image_std: ClassVar = (0.229, 0.224, 0.225)

    def __post_init__(self):
        for field, allowed in (("backbone", BACKBONES), ("distance_class", DISTANCE_CLASSES)):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(allowed)}")
        for field, least in (("n_bins", 2), ("n_cabins", 1), ("n_prompts", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field} is {value!r}; it must be an integer of at least {least}")
        n, low, high = self.n_cabins, self.min_depth, self.max_depth
        if self.n_bins % n:
            raise ValueError(f"n_cabins is {n}; it must divide n_bins, which is {self.n_bins}")
        if self.distance_class == "semantic" and n != len(SEMANTIC_BINS):
            raise ValueError(f"n_cabins is {n}; for 'semantic' it must be {len(SEMANTIC_BINS)}")
        if not 0 < low < high < 10_000:
            must = "they must satisfy 0 < min_depth < max_depth < 10000 metres"
            raise ValueError(f"min_depth is {low} and max_depth {high}; {must}")


# ---- Sec. 3.1  CLIP. Parameters have the names that CLIP's own files give them. ------------------


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int, is_causal: bool = False) -> Tensor:
    """Multi-head attention of queries (B, Lq, C) to keys and values (B, Lk, C): (B, Lq, C)."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, n, L, C/n)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return out.transpose(1, 2).flatten(2)  # (B, Lq, C)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corner pixels on corner pixels: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class Bottleneck(nn.Module):
    """CLIP's residual block: all convolutions have stride 1, an average pool does the striding."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride)
        self.downsample = nn.Identity()
        if stride > 1 or in_channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.pool(out)))  # (B, 4 width, h / stride, w / stride)
        return F.relu(out + self.downsample(self.pool(x)))


def resize_positions(positions: Tensor, h: int, w: int) -> Tensor:
    """Positions of a global token and a square grid (1 + n², C), for a grid of h x w."""
    side = math.isqrt(len(positions) - 1)
    grid = positions[1:].T.unflatten(1, (side, side))[None]  # (1, C, side, side)
    grid = F.interpolate(grid, size=(h, w), mode="bilinear")  # (1, C, h, w)
    return torch.cat([positions[:1], grid[0].flatten(1).T])  # (1 + hw, C)


class AttentionPool(nn.Module):
    """CLIP's MHA module, in which here *every* token attends and not only the mean (Sec. 3.2.1).

    The mean's own output does not depend on the other queries: it is CLIP's image embedding.
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


class ImageEncoder(nn.Module):
    """CLIP's modified ResNet, which returns all of its stages (Sec. 3.2.1).

    (B, 3, H, W) -> pyramid [x1..x4], z_bar (B, D), z (B, D, h, w), h and w being H/32 and W/32.
    """

    def __init__(self, layers: tuple[int, ...], width: int, embed_dim: int, grid: int):
        super().__init__()
        # the stem: three convolutions and an average pool, in place of ResNet's one and max pool
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.channels = [4 * width * 2**i for i in range(len(layers))]  # of x1..x4
        for i, (before, n_blocks) in enumerate(zip([width, *self.channels], layers)):
            stage = [Bottleneck(before, width * 2**i, 1 if i == 0 else 2)]
            stage += [Bottleneck(self.channels[i], width * 2**i, 1) for _ in range(n_blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool(self.channels[-1], embed_dim, grid)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(image)))  # (B, width / 2, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))  # (B, width, H/2, W/2)
        x = F.avg_pool2d(x, 2)  # (B, width, H/4, W/4)
        x1 = self.layer1(x)  # (B, 4 width, H/4, W/4)
        x2 = self.layer2(x1)  # (B, 8 width, H/8, W/8)
        x3 = self.layer3(x2)  # (B, 16 width, H/16, W/16)
        x4 = self.layer4(x3)  # (B, 32 width, H/32, W/32)
        z_bar, z = self.attnpool(x4)
        return [x1, x2, x3, x4], z_bar, z


class QuickGELU(nn.Module):
    """The approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head self-attention whose three projections are one matrix, as CLIP's files have it."""

    def __init__(self, width: int):
        super().__init__()
        self.n_heads = width // 64
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.n_heads, is_causal))


class TransformerBlock(nn.Module):
    """A pre-norm layer of CLIP's transformers: (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), is_causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """CLIP's stack of blocks, of which a text token sees only those before it (`is_causal`)."""

    def __init__(self, width: int, n_layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(TransformerBlock(width) for _ in range(n_layers))

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        for block in self.resblocks:
            x = block(x, is_causal)
        return x


class VisionTransformer(nn.Module):
    """CLIP's ViT with a pyramid after DPT (Sec. 4.6); returns what `ImageEncoder` does.

    z has stride 16 here. The paper leaves the pyramid's widths open; these are DPT's for ViT-B.
    """

    def __init__(self, n_layers: int, width: int, embed_dim: int, grid: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 16, stride=16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, n_layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) / width**0.5)
        self.taps = [n_layers * i // 4 for i in (1, 2, 3, 4)]  # after blocks 3, 6, 9, 12
        self.channels = [width // 8, width // 4, width // 2, width]  # of x1..x4
        c1, c2, c3, c4 = self.channels
        self.reassemble = nn.ModuleList(  # from stride 16 to 4, 8, 16, 32; not part of CLIP
            [
                nn.Sequential(nn.Conv2d(width, c1, 1), nn.ConvTranspose2d(c1, c1, 4, stride=4)),
                nn.Sequential(nn.Conv2d(width, c2, 1), nn.ConvTranspose2d(c2, c2, 2, stride=2)),
                nn.Conv2d(width, c3, 1),
                nn.Sequential(nn.Conv2d(width, c4, 1), nn.Conv2d(c4, c4, 3, stride=2, padding=1)),
            ]
        )

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        h, w = (math.ceil(size / 16) for size in image.shape[-2:])
        image = resize(image, (16 * h, 16 * w))  # whole patches only
        x = self.conv1(image).flatten(2).mT  # (B, hw, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + hw, width)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, h, w))
        pyramid = []
        for i, block in enumerate(self.transformer.resblocks, 1):
            x = block(x, is_causal=False)
            if i in self.taps:
                tokens = x[:, 1:].mT.unflatten(2, (h, w))  # (B, width, h, w)
                pyramid.append(self.reassemble[len(pyramid)](tokens))
        out = self.ln_post(x) @ self.proj  # [z̄, z]: (B, 1 + hw, D)
        return pyramid, out[:, 0], out[:, 1:].mT.unflatten(2, (h, w))


class CLIP(nn.Module):
    """CLIP's two encoders. The text encoder is frozen (Sec. 3.2.3), the image encoder is not."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        if len(a.layers) == 1:
            self.visual = VisionTransformer(*a.layers, a.width, a.embed_dim, a.grid)
        else:
            self.visual = ImageEncoder(a.layers, a.width, a.embed_dim, a.grid)
        self.token_embedding = nn.Embedding(a.vocab_size, a.text_width)
        self.positional_embedding = nn.Parameter(torch.randn(a.context_length, a.text_width) * 0.01)
        self.transformer = Transformer(a.text_width, a.text_layers)
        self.ln_final = nn.LayerNorm(a.text_width)
        projection = torch.randn(a.text_width, a.embed_dim) / a.text_width**0.5
        self.text_projection = nn.Parameter(projection)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # Eq. 4 has no temperature
        # NOTE(differs): the released code trains its token embedding; the paper freezes all of it
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))

    def encode_text(self, ids: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Text embeddings (L, D) of token ids (L, T), each a text from start to end token.

        `prompts` (N, text_width), where given, are put between the start token and the text, as in
        CoOp. The encoder is causal, and a text's embedding is its end token's: what comes after
        the end token changes nothing, so T need only be as long as the longest text.
        """
        x = self.token_embedding(ids)  # (L, T, text_width)
        end = ids.argmax(-1)  # (L,); the end token has the highest id
        if prompts is not None:
            prompts = prompts.expand(len(x), -1, -1)  # (L, N, text_width)
            x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)  # (L, N + T, text_width)
            end = end + prompts.shape[1]
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.ln_final(self.transformer(x, is_causal=True))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection  # (L, D)


# ---- CLIP's weights ------------------------------------------------------------------------------

CLIP_URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
CLIP_SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url: str, file: str, sha256: str) -> Path:
    """The path of `file` in torch.hub's cache, where a download with the right hash is put."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{url} could not be fetched ({error}); put the file at {path}, or name one of yours"
            ) from None
    if sha256_of(path) != sha256:
        raise ValueError(f"{path} is not what {url} was: delete it, and it is fetched again")
    return path


def read_tensors(path: Path, expected: str) -> dict:
    """The dictionary that a PyTorch file holds. No code in the file is run."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; expected {expected}")
    try:
        is_script = False
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                is_script = any(n.endswith("/constants.pkl") for n in archive.namelist())
                if broken := archive.testzip():  # torch does not look at the sums of the parts
                    raise ValueError(broken)
        if not is_script:
            content = torch.load(path, map_location="cpu", weights_only=True)
        elif is_known := sha256_of(path) in CLIP_SHA256.values():
            content = torch.jit.load(path, map_location="cpu").state_dict()
    except Exception as error:  # of many kinds: it depends on what the bytes happen to be
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is cut off, damaged or of another kind; expected {expected}"
        ) from error
    if is_script and not is_known:
        raise ValueError(
            f"{path} is a TorchScript archive, and none of OpenAI's: it could run any code. Where you "
            f"trust it, make a state dict: torch.save(torch.jit.load({path.name!r}).state_dict(), 'clip.pt')"
        )
    if not (isinstance(content, dict) and content and all(isinstance(k, str) for k in content)):
        raise ValueError(f"{path} holds {str(content)[:40]!r}; expected {expected}")
    return content


def read_architecture(state: dict[str, Tensor], source: object) -> Architecture:
    """The sizes of the CLIP whose tensors these are."""

    def count(prefix: str) -> int:  # of the modules that are numbered after the prefix
        return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})

    try:
        is_vit = "visual.proj" in state
        stages = ["transformer.resblocks."] if is_vit else [f"layer{i}." for i in (1, 2, 3, 4)]
        first, pool = ("", "") if is_vit else ("layer1.0.", "attnpool.")
        positions = state[f"visual.{pool}positional_embedding"]
        return Architecture(
            embed_dim=state["text_projection"].shape[1],
            layers=tuple(count(f"visual.{stage}") for stage in stages),
            width=len(state[f"visual.{first}conv1.weight"]),
            grid=math.isqrt(len(positions) - 1),
            text_width=len(state["ln_final.weight"]),
            text_layers=count("transformer.resblocks."),
            context_length=len(state["positional_embedding"]),
            vocab_size=len(state["token_embedding.weight"]),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{source} is no CLIP with its two encoders, for want of {error}; "
            f"its {len(state)} tensors begin with {', '.join(list(state)[:3]) or 'none'}"
        ) from None


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Load a state dict that must fit exactly, or raise one ValueError that says what does not."""
    ours, given = ({k: tuple(v.shape) for k, v in s.items()} for s in (module.state_dict(), state))
    others = [k for k in ours if k in given and given[k] != ours[k]]
    broken = [k for k, v in state.items() if not torch.isfinite(v).all()]
    misfits = {
        "missing": [k for k in ours if k not in given],
        "unknown": [k for k in given if k not in ours],
        "of another shape": [f"{k} {given[k]} for {ours[k]}" for k in others],
        "not finite": broken,
    }
    found = [f"{len(names)} {what} ({names[0]}, …)" for what, names in misfits.items() if names]
    if found:
        raise ValueError(f"{source} does not fit the network: tensors " + ", ".join(found))
    module.load_state_dict(state)


def load_clip(name_or_path: str | Path) -> CLIP:
    """CLIP with OpenAI's weights, in float32, by name, a key of CLIP_SHA256, or from a file.

    A name is downloaded once. A file may be OpenAI's TorchScript archive or a plain state dict of
    the same names. The architecture is read off the tensors. Raises FileNotFoundError or
    ValueError, saying what was found and what was expected.
    """
    path = Path(name_or_path)
    if sha256 := CLIP_SHA256.get(str(name_or_path)):
        name = str(name_or_path).replace("/", "-")
        path = download(CLIP_URL.format(sha256=sha256, name=name), f"clip-{name}.pt", sha256)
    elif not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file, and no CLIP of that name; known are {', '.join(CLIP_SHA256)}"
        )
    state = read_tensors(path, "a CLIP file: OpenAI's TorchScript archive, or a state dict of it")
    sizes = ("input_resolution", "context_length", "vocab_size")  # entries that are no weights
    state = {k: v.float() for k, v in state.items() if k not in sizes and torch.is_tensor(v)}
    clip = CLIP(read_architecture(state, path))
    ours = {k: v for k, v in clip.state_dict().items() if k.startswith("visual.reassemble.")}
    load_strictly(clip, state | ours, path)
    return clip


# ---- Sec. 3.2.1  Adaptive bins -------------------------------------------------------------------


class AdaptiveBins(nn.Module):
    """Bin widths b (B, n_bins), positive and of sum 1, from the global embedding z̄ (B, D)."""

    def __init__(self, embed_dim: int, n_bins: int):
        super().__init__()
        # NOTE(differs): the paper says "MLP with ReLU". The released one has LeakyReLU between its
        # layers, and ReLU + 0.1 at its end, which keeps every bin open; so does this.
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 512),
            nn.LeakyReLU(),
            nn.Linear(512, 256),
            nn.LeakyReLU(),
            nn.Linear(256, n_bins),
        )

    def forward(self, z_bar: Tensor) -> Tensor:
        # under autocast, too, float32 from here on: bfloat16 has steps of 6 cm at 10 m
        b = F.relu(self.mlp(z_bar).float()) + 0.1  # b'
        return b / b.sum(1, keepdim=True)


def bin_centers(b: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Depth at the centre of each bin, in metres: (B, n_bins) from b (B, n_bins) of sum 1."""
    # Eq. 1:  c(b_i) = d_min + (d_max - d_min) (b_i / 2 + Σ_{j<i} b_j)
    sums = b.cumsum(1)  # Σ_{j≤i} b_j, of which the last term counts by half
    return min_depth + (max_depth - min_depth) * (sums - b / 2)


# ---- Sec. 3.2.2  CaBins --------------------------------------------------------------------------


def distance_classes(centers: Tensor, n_groups: int, kind: str = "cabins") -> Tensor:
    """One distance for each group of adjacent bins: (B, K) metres from centres (B, n_bins).

    `kind` is a row of Table 3: "cabins" (Eq. 2), "median" (the lower one, a real bin centre) or
    "mean". The row "semantic" has phrases in place of distances. Raises ValueError.
    """
    if centers.shape[1] % n_groups:
        raise ValueError(f"n_groups is {n_groups}; it must divide the {centers.shape[1]} bins")
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


# ---- Sec. 3.2.3  Text encoder: prompts, and Eq. 3 ------------------------------------------------

DIGIT_0, POINT = 271, 269  # CLIP's ids of "0" to "9" are 271 to 280, that of "." is 269
DECIMALS = 4


def number_tokens(depths: Tensor, integer_digits: int = 4) -> Tensor:
    """CLIP's token ids of depths in metres, written as Python prints them rounded to 4 decimals.

    NOTE(differs): the paper does not say how e_k is written; the released code writes this.

    (…,) -> (…, T) from start to end token, padded with zeros, T = integer_digits + 7; for depths of
    at least 0 and below 10^integer_digits. CLIP splits a number into single digits, so its ids are
    look-ups of its digits: no string is made, and nothing leaves the depths' device.

    >>> number_tokens(torch.tensor([2.5, 0.81961]), integer_digits=1)
    tensor([[49406,   273,   269,   276, 49407,     0,     0,     0],
            [49406,   271,   269,   279,   272,   280,   277, 49407]])
    """
    # MPS has no float64, in which alone the product is exact: there, and only there, ask the CPU
    exact = depths.detach().cpu() if depths.device.type == "mps" else depths.detach()
    unit = 10**DECIMALS
    number = (exact.double() * unit).round().long()[..., None]  # (…, 1)
    places = 10 ** torch.arange(integer_digits + DECIMALS - 1, -1, -1, device=number.device)
    digits = number // places % 10 + DIGIT_0  # (…, integer_digits + 4)
    # A digit before the point is written if it or one before it is not 0; a decimal, if it or one
    # after it is not 0; and those next to the point in any case, as in "0.5" and "2.0".
    keep = torch.where(places >= unit, number >= places, number % (10 * places) > 0)
    keep = keep | (places == unit) | (places == unit // 10)
    whole, decimals = (digits * keep).split((integer_digits, DECIMALS), -1)
    one = torch.ones_like(number)
    ids = torch.cat([SOT * one, whole, POINT * one, decimals, EOT * one], -1)  # (…, T)
    # what is left out is 0 by now, and no id of a digit is: the rest moves together, to the left
    order = (ids > 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order).to(depths.device)


class Attention(nn.Module):
    """Multi-head attention with separate projections without bias, as in DenseCLIP."""

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
    """A pre-norm transformer decoder layer: the texts look at each other, then at the image."""

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
    """Texts t (B, K, D), updated by what they find in the image: z_bar (B, D), z (B, D, h, w).

    TransDecoder, of which the paper says no more, is DenseCLIP's.
    """

    def __init__(self, embed_dim: int, width: int = 256, n_heads: int = 4, n_layers: int = 6):
        super().__init__()
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width), nn.LayerNorm(width)
        )
        self.text_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        self.layers = nn.ModuleList(ContextLayer(width, n_heads, 0.1) for _ in range(n_layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.gamma = nn.Parameter(torch.full((embed_dim,), 1e-4))

    def forward(self, t: Tensor, z_bar: Tensor, z: Tensor) -> Tensor:
        image = torch.cat([z_bar[:, :, None], z.flatten(2)], dim=2).mT  # [z̄, z]: (B, 1 + hw, D)
        memory = self.memory_proj(image)  # (B, 1 + hw, width)
        v = self.text_proj(t)  # (B, K, width)
        for layer in self.layers:
            v = layer(v, memory)
        v_post = self.out_proj(v)  # (B, K, D)
        # Eq. 3:  t ← t + γ v_post,  v_post = TransDecoder(t, [z̄, z])
        return t + self.gamma * v_post


# ---- Sec. 3.2.4  Depth prediction ----------------------------------------------------------------


def cosine_similarity(z: Tensor, t: Tensor) -> Tensor:
    """Cosine of every place in the image z (B, D, h, w) and every text t (B, K, D): (B, K, h, w)."""
    # Eq. 4:  s = ẑ · t̂
    return torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), F.normalize(t, dim=2))


class DepthDecoder(nn.Module):
    """Probability p (B, n_bins, H/2, W/2) of every bin, from the pyramid and s (B, K, h, w)."""

    def __init__(self, channels: list[int], n_cabins: int, n_bins: int):
        super().__init__()
        *skips, last = channels  # of x1, x2, x3; of x4
        # NOTE(differs): the padding puts a ring of one pixel, which holds only the bias, around the
        # map at stride 32. The paper does not say; the released code has it.
        self.reduce = nn.Conv2d(last + n_cabins, last, 1, padding=1)
        self.up = nn.ModuleList()
        for skip in reversed(skips):  # x3, x2, x1
            last, before = last // 2, last + skip
            self.up.append(nn.Sequential(*self.layers(before, last), *self.layers(last, last)))
        self.features = nn.Conv2d(last, n_bins, 3, padding=1)
        self.logits = nn.Conv2d(n_bins, n_bins, 1)

    @staticmethod
    def layers(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        return conv, nn.BatchNorm2d(outputs), nn.LeakyReLU()

    def forward(self, pyramid: list[Tensor], s: Tensor) -> Tensor:
        *skips, x4 = pyramid
        s = resize(s, x4.shape[-2:])  # which it has already, but for ViT
        x = self.reduce(torch.cat([x4, s], dim=1))  # (B, 32 width, h + 2, w + 2)
        for up, skip in zip(self.up, reversed(skips)):
            x = torch.cat([resize(x, skip.shape[-2:]), skip], dim=1)  # (B, C + C_skip, h_skip, …)
            x = up(x)  # (B, C / 2, h_skip, w_skip)
        x = resize(x, (2 * x.shape[-2], 2 * x.shape[-1]))  # (B, 4 width, H/2, W/2)
        # the gradient needs p and not the logits, so one such map is kept; float32 under autocast
        return self.logits(self.features(x)).softmax(dim=1)  # (B, n_bins, H/2, W/2)


def expected_depth(centers: Tensor, p: Tensor) -> Tensor:
    """Depth (B, 1, h, w) in metres of centres (B, n_bins) with probabilities p (B, n_bins, h, w)."""
    # Eq. 5:  d_i = Σ_k c(b_k) p_ik
    return (centers[:, :, None, None] * p).sum(1, keepdim=True)  # autocast rounds einsum


# ---- Figure 2: the network -----------------------------------------------------------------------


class Prediction(NamedTuple):
    """What CaBins says of a batch of images, in float32 under autocast too."""

    depth: Tensor  # (B, 1, H, W) metres
    centers: Tensor  # (B, n_bins) metres, increasing
    cabins: Tensor  # (B, K) metres; given for semantic prompts too, which do not use them
    similarity: Tensor  # (B, K, h, w), from -1 to 1


class CaBins(nn.Module):
    """The network of Figure 2. `clip` is what `load_clip` returns; without it, weights are random.

    Raises ValueError if `clip` is not the backbone that the config names.
    """

    def __init__(self, config: Config, clip: CLIP | None = None):
        super().__init__()
        expected = BACKBONES[config.backbone]
        if clip is None:
            clip = CLIP(expected)
            if config.backbone != "tiny":
                warnings.warn(
                    f"CLIP {config.backbone} has random weights: depths mean nothing until trained",
                    stacklevel=2,
                )
        # texts may be cut to fewer positions than CLIP's 77, as the authors' checkpoints are
        n_positions = clip.architecture.context_length
        if clip.architecture != expected._replace(context_length=n_positions):
            sizes = clip.architecture._replace(context_length=expected.context_length)
            found = next((name for name, a in BACKBONES.items() if a == sizes), sizes)
            raise ValueError(f"backbone is {config.backbone}, but the CLIP given is {found}")
        if config.n_prompts + 11 > n_positions:
            raise ValueError(f"n_prompts is {config.n_prompts}; at most {n_positions - 11} fit")
        self.config = config
        self.clip = clip
        embed_dim, text_width = expected.embed_dim, expected.text_width
        self.bins = AdaptiveBins(embed_dim, config.n_bins)
        self.prompts = nn.Parameter(torch.empty(config.n_prompts, text_width))
        nn.init.trunc_normal_(self.prompts, std=0.02)
        sizes = {"width": 64, "n_layers": 2} if config.backbone == "tiny" else {}
        self.context_decoder = ContextDecoder(embed_dim, **sizes)
        self.depth_decoder = DepthDecoder(clip.visual.channels, config.n_cabins, config.n_bins)
        if config.distance_class == "semantic":
            ids = tokenize(SEMANTIC_BINS, 5)  # three words at most, and the two ends
            self.register_buffer("phrases", ids, persistent=False)

    def encode_prompts(self, e: Tensor) -> Tensor:
        """Text embeddings t (B, K, D) of the distances e (B, K), or of the phrases of Table 3."""
        if self.config.distance_class == "semantic":
            t = self.clip.encode_text(self.phrases, self.prompts)  # (K, D), for every image
            return t.expand(len(e), -1, -1)  # (B, K, D)
        integer_digits = len(f"{self.config.max_depth:.0f}")  # rounded, as the numbers are
        ids = number_tokens(e, integer_digits).flatten(0, 1)  # (BK, T), T = 9 for 10 and 80 m
        return self.clip.encode_text(ids, self.prompts).unflatten(0, e.shape)  # (B, K, D)

    def forward(self, image: Tensor, upsample: bool = True) -> Prediction:
        """Depth of normalised images (B, 3, H, W), H and W at least 64 and otherwise of any size.

        Without `upsample`, depth stays at the decoder's size, about H/2 x W/2.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 64:
            raise ValueError(
                f"image has shape {tuple(image.shape)}; it must be (B, 3, H, W), H and W at least 64"
            )
        config = self.config
        # image encoder and bins (Sec. 3.2.1)
        pyramid, z_bar, z = self.clip.visual(image)
        b = self.bins(z_bar)  # (B, n_bins)
        c = bin_centers(b, config.min_depth, config.max_depth)  # (B, n_bins)
        # CaBins (Sec. 3.2.2); with phrases in their place they are only reported
        kind = "cabins" if config.distance_class == "semantic" else config.distance_class
        e = distance_classes(c, config.n_cabins, kind)  # (B, K)
        # text encoder (Sec. 3.2.3)
        t = self.encode_prompts(e)  # (B, K, D)
        t = self.context_decoder(t, z_bar, z)  # (B, K, D)
        # depth (Sec. 3.2.4)
        s = cosine_similarity(z, t)  # (B, K, h, w)
        p = self.depth_decoder(pyramid, s)  # (B, n_bins, H/2, W/2)
        d = expected_depth(c, p)  # (B, 1, H/2, W/2)
        if upsample:
            d = resize(d, image.shape[-2:])  # (B, 1, H, W)
        return Prediction(d, c, e, s.float())


# ---- Sec. 3.3  Training loss. A mask (B, 1, H, W) says where ground truth is valid. --------------

LAMBDA, ALPHA, BETA = 0.85, 10.0, 0.1


def silog_loss(depth: Tensor, target: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """Scale-invariant logarithmic loss over all valid pixels of the batch; ~0 if there are none.

    NOTE(differs): Eq. 6 has the biased variance of g; `unbiased`, the released code's torch.var.
    """
    n = mask.sum().clamp(min=1)
    g = torch.where(mask, depth, 1).log() - torch.where(mask, target, 1).log()  # 0 if not valid
    mean, mean_of_squares = g.sum() / n, g.square().sum() / n
    # Eq. 6:  L_pixel = α √( 1/n Σ g_i² - λ/n² (Σ g_i)² )
    square = mean_of_squares - LAMBDA * mean.square()
    if unbiased:  # n / (n - 1) times the variance, in place of once
        square = square + (mean_of_squares - mean.square()) / (n - 1).clamp(min=1)
    return ALPHA * square.clamp(min=1e-12).sqrt()  # the clamp keeps the gradient finite at 0


@torch.no_grad()
def nearest(queries: Tensor, values: Tensor) -> Tensor:
    """Index (B, Q) of the value nearest to each query (B, Q), among values (B, V) in order."""
    above = torch.searchsorted(values, queries)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=values.shape[1] - 1)
    is_below = queries - values.gather(1, below) <= values.gather(1, above) - queries
    return torch.where(is_below, below, above)


def chamfer_loss(centers: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Bi-directional chamfer distance of bin centres (B, n_bins) and the depths X of each image.

    Squared metres, as in the released code: mean over each set, sum of both, mean over the batch,
    to which an image without valid pixels adds 0. In one dimension the nearest neighbour is next to
    where a value would be sorted in, so no table of pixels x centres is needed.
    """
    c, valid = centers, mask.flatten(1)  # (B, n_bins), (B, HW)
    x = target.flatten(1).masked_fill(~valid, 0)  # (B, HW)
    x_sorted = x.masked_fill(~valid, torch.inf).sort(1).values  # (B, HW), valid ones first
    c_of_x = c.gather(1, nearest(x, c))  # (B, HW)
    x_of_c = x_sorted.gather(1, nearest(c, x_sorted))  # (B, n_bins), inf where none is valid
    x_of_c = torch.where(x_of_c.isfinite(), x_of_c, c.detach())
    # Eq. 7:  L_bins = chamfer(X, c(b)) + chamfer(c(b), X),  chamfer(X, c) = 1/|X| Σ_x min_c (x - c)²
    x_to_c = ((x - c_of_x).square() * valid).sum(1) / valid.sum(1).clamp(min=1)  # (B,)
    c_to_x = (c - x_of_c).square().mean(1)  # (B,)
    return (x_to_c + c_to_x).mean()


def total_loss(
    prediction: Prediction, target: Tensor, min_depth: float, unbiased: bool = False
) -> Tensor:
    """The training loss against ground truth (B, 1, H, W) in metres, valid above `min_depth`."""
    mask = target > min_depth
    pixel = silog_loss(resize(prediction.depth, target.shape[-2:]), target, mask, unbiased)
    # Eq. 8:  L_total = L_pixel + β L_bins
    return pixel + BETA * chamfer_loss(prediction.centers, target, mask)


# ---- Sec. 4.3  Evaluation metrics ----------------------------------------------------------------


def depth_metrics(depth: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The metrics of one image, from the predicted and true depths (n,) of its valid pixels, in m.

    Raises ValueError if there are none, or not as many of the one as of the other.
    """
    if depth.shape != target.shape or depth.ndim != 1 or not len(depth):
        raise ValueError(
            f"depth has shape {tuple(depth.shape)} and target {tuple(target.shape)}; "
            "they must be equal, one-dimensional and not empty"
        )
    error = depth - target
    log_error = depth.log() - target.log()
    delta = torch.maximum(depth / target, target / depth)
    return {
        "abs_rel": (error.abs() / target).mean(),
        "sq_rel": (error.square() / target).mean(),
        "rmse": error.square().mean().sqrt(),
        "rmse_log": log_error.square().mean().sqrt(),
        "log10": (depth.log10() - target.log10()).abs().mean(),
        "d1": (delta < 1.25).float().mean(),
        "d2": (delta < 1.25**2).float().mean(),
        "d3": (delta < 1.25**3).float().mean(),
    }


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


def our_name(name: str) -> str:
    """Our name of a tensor of the authors' checkpoints."""
    name = name.removeprefix("module.")
    for theirs, ours in RELEASED_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, which gets its name only when it is whole."""
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
    """Write the model, its config and `state` (tensors and plain values) whole, or not at all."""
    content = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), **state}
    write_whole(path, lambda partial: torch.save(content, partial))


def read_checkpoint(path: str | Path) -> dict:
    """All that a checkpoint holds: "model", and in ours "config" and what training needs."""
    content = read_tensors(Path(path), "a checkpoint of train.py or of the authors")
    state = content.get("model")
    if not (state and isinstance(state, dict) and all(map(torch.is_tensor, state.values()))):
        found = ", ".join(map(str, list(content)[:3]))
        raise ValueError(
            f"{path} is no checkpoint of CaBins: it has no network as 'model', but {found}, …"
        )
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
        raise ValueError(
            f"{source} is a checkpoint of the authors, which does not say its depth range: "
            "give max_depth, 10 for NYU or 80 for KITTI"
        )
    else:
        config = Config(max_depth=max_depth)
        state = {our_name(name): tensor for name, tensor in state.items()}
        if "prompts" in state:
            state["prompts"] = state["prompts"].squeeze(0)  # theirs is (1, N, 512)
    clip_state = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    model = CaBins(config, CLIP(read_architecture(clip_state, source)))
    load_strictly(model, state, source)
    return model.eval()


def load_checkpoint(
    path: str | Path, max_depth: float | None = None, map_location: str | torch.device = "cpu"
) -> CaBins:
    """The network of a checkpoint, in eval mode; its `config` says what it is.

    Reads ours and the authors'. Theirs do not say their range, so `max_depth` must: 10 m for NYU,
    80 m for KITTI. Every tensor is used. Raises FileNotFoundError or ValueError.
    """
    return restore(read_checkpoint(path), path, max_depth).to(map_location)
