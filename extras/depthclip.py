"""DepthCLIP, the zero-shot baseline of Table 1: python -m extras.depthclip --root DIR"""

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

import cabins
import data
from clip_tokenizer import tokenize
from eval import Predict, evaluate_windows, format_table, protocol


def depthclip(clip: cabins.CLIP) -> Predict:
    """The function from images to depth, for `eval.evaluate`. Nothing is trained.

    CLIP compares each location of the image with seven texts, "This object is giant" to "This
    object is unseen". The depth is the mean of seven fixed distances, weighted by the softmax of
    these similarities. The distances are those that DepthCLIP chose for NYU.
    """
    # CaBins added the eighth phrase, "farthest"
    texts = [f"This object is {p}" for p in cabins.SEMANTIC_BINS if p != "farthest"]
    distances = torch.tensor([[1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0]])  # (1, 7) metres
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    with torch.inference_mode(), cabins.eval_mode(clip):
        t = clip.encode_text(tokenize(texts).to(clip.text_projection.device))  # (7, D)

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        image = normalize(data.denormalize(image), clip_mean, clip_std).to(t.device)
        with cabins.eval_mode(clip):
            _, _, z = clip.visual(image)  # (1, D, h, w)
        s = cabins.cosine_similarity(z, t.expand(len(z), -1, -1))  # (1, 7, h, w)
        p = (clip.logit_scale.exp() * s).softmax(1)
        depth = cabins.expected_depth(distances.to(t.device).expand(len(z), -1), p)  # (1, 1, h, w)
        return cabins.resize(depth, image.shape[-2:])

    return predict


def main() -> None:
    parser = data.Parser(prog="python -m extras.depthclip", description=__doc__)
    add = parser.add_argument
    add("--data", choices=("nyu", "toy", "list"), default="nyu", help="default: nyu")
    add("--root", metavar="DIR", help="folder of the data set, or nyu_depth_v2_labeled.mat")
    add("--split", metavar="FILE", help="list of test pairs; default: the authors'")
    number = {"type": data.positive_float, "metavar": "X"}
    add("--depth-scale", **number, help="value of 1 m in a depth PNG; default: the data set's")
    add("--max-depth", **number, help="measure to this depth, in metres; default: the data set's")
    add("--clip", metavar="NAME|FILE", default="RN50", help="CLIP's weights; default: RN50")
    args = parser.parse_args()
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    dataset = data.DepthDataset(args.data, args.root, args.split, **scale)
    data.use_tf32(False)
    predict = depthclip(cabins.load_clip(args.clip).to(data.choose_device(None)))
    windows = evaluate_windows(predict, dataset)
    for window in windows:
        print(protocol(dataset, window, flip=False))
    print(format_table(args.data, {f"DepthCLIP, {w}": row for w, row in windows.items()}))


if __name__ == "__main__":
    data.run_command(main)
