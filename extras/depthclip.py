"""DepthCLIP, the zero-shot baseline of Table 1: python -m extras.depthclip --root DIR"""

import argparse

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

import cabins
import data
from clip_tokenizer import tokenize
from eval import Predict, evaluate_windows, format_table


def depthclip(clip: cabins.CLIP) -> Predict:
    """The function from images to depth, for `eval.evaluate`. Nothing is trained.

    CLIP, which gets into eval mode, compares each location of the image with seven texts, "This
    object is giant" to "This object is unseen". The depth is the mean of seven fixed distances,
    weighted by the softmax of these similarities. DepthCLIP chose the distances for NYU.
    """
    # CaBins added the eighth phrase, "farthest"
    texts = [f"This object is {p}" for p in cabins.SEMANTIC_BINS if p != "farthest"]
    device = clip.eval().text_projection.device
    distances = torch.tensor([[1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0]], device=device)  # (1, 7) m
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        image = normalize(data.denormalize(image), clip_mean, clip_std).to(device)
        _, _, z = clip.visual(image)  # (1, D, h, w)
        s = cabins.cosine_similarity(z, t)  # (1, 7, h, w)
        p = (clip.logit_scale.exp() * s).softmax(1)
        return cabins.resize(cabins.expected_depth(distances, p), image.shape[-2:])

    with torch.inference_mode():
        t = clip.encode_text(tokenize(texts).to(device))[None]  # (1, 7, D)
    return predict


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.depthclip", description=__doc__)
    add = parser.add_argument
    add("--data", choices=("nyu", "toy", "list"), default="nyu", help="default: nyu")
    add("--split", metavar="FILE", help="list of test pairs; default: the authors'")
    data.add_options(parser)
    add("--clip", metavar="NAME|FILE", default="RN50", help="CLIP's weights; default: RN50")
    args = parser.parse_args()
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    dataset = data.DepthDataset(args.data, args.root, args.split, **scale)
    data.use_tf32(False)
    predict = depthclip(cabins.load_clip(args.clip).to(data.choose_device(args.device)))
    windows = evaluate_windows(predict, dataset, args.workers)
    for found in windows.values():
        print(f"{found.protocol}; zero-shot with CLIP {args.clip}, fp32")
    rows = {f"DepthCLIP, {window}": found.metrics for window, found in windows.items()}
    print(format_table(dataset, rows))


if __name__ == "__main__":
    data.run_command(main)
