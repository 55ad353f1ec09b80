"""Convert a checkpoint of the authors to one of ours.

python -m extras.convert FILE --data nyu|kitti --out OURS.pt

The authors' files do not hold the range of depth, so --data must say it. They do not need their
data set. `python eval.py OURS.pt --root DIR` then measures the network on its own data set.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

import cabins
import data
from cabins import InputError

NAMES = {  # how their names begin, and how ours do; the first that fits counts
    "contexts": "prompts",
    "gamma": "trans_decoder.gamma",
    "clip_model.": "clip.",
    "computeAdaptiveBin.regressor.": "bins.mlp.",
    "context_decoder.decoder.": "trans_decoder.layers.",
    "context_decoder.": "trans_decoder.",
    "decoder.conv2.": "depth_decoder.fuse.",
    "decoder.up1._net.": "depth_decoder.up.0.",
    "decoder.up2._net.": "depth_decoder.up.1.",
    "decoder.up3._net.": "depth_decoder.up.2.",
    "decoder.conv3.": "depth_decoder.head.",
    "predict_D.conv_out.0.": "depth_decoder.classifier.",
}
N_POSITIONS = 30  # of CLIP's 77, which the authors keep; our texts need 17


def their_name(our_name: str) -> str:
    """The name of a tensor in the authors' network, without the "module." of their files."""
    theirs, ours = next(pair for pair in NAMES.items() if our_name.startswith(pair[1]))
    return theirs + our_name.removeprefix(ours)


def their_shapes(config: cabins.Config) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the authors' network, by our name."""
    with torch.device("meta"):  # shapes only
        state = cabins.CaBins(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes["prompts"] = (1, *shapes["prompts"])
    shapes["clip.positional_embedding"] = (N_POSITIONS, *shapes["clip.positional_embedding"][1:])
    return shapes


def convert(path: str | Path, data_name: str) -> dict:
    """What `cabins.save_checkpoint` would write of the authors' network in the file `path`.

    `data_name` is the data set that it was trained on, "nyu" or "kitti". Raises InputError for any
    other file, and for one with a tensor too many, too few, of another shape, or not finite.
    """
    content = cabins.read_tensors(Path(path), "a checkpoint of the authors")
    if "config" in content:
        raise InputError(f"{path} is a checkpoint of train.py already: use it as it is")
    found = content.get("model")
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise InputError(f"{path} is not a checkpoint of the authors: it has no 'model' of tensors")
    found = {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
    recipe = data.DATASETS[data_name]
    config = cabins.Config(max_depth=recipe.max_depth, longer_side=recipe.longer_side)
    shapes = their_shapes(config)
    unknown = found.keys() - {their_name(name) for name in shapes}
    if unknown:
        raise InputError(f"{path} is not the authors' RN101: it has {min(unknown)}, too")
    state = {}
    for name, shape in shapes.items():
        theirs = their_name(name)
        tensor = found.get(theirs)
        if tensor is None or tensor.shape != shape:
            what = "missing" if tensor is None else f"{tuple(tensor.shape)}, not {shape}"
            raise InputError(f"{path} is not the authors' RN101: {theirs} is {what}")
        if not tensor.isfinite().all():
            raise InputError(f"{path} is damaged: {theirs} has values that are not finite")
        state[name] = tensor
    state["prompts"] = state["prompts"].squeeze(0)  # (8, 512)
    positions = state["clip.positional_embedding"]  # zeros fill it up to CLIP's 77
    state["clip.positional_embedding"] = F.pad(positions, (0, 0, 0, 77 - N_POSITIONS))
    about = {"name": data_name, "depth_scale": recipe.depth_scale, "max_depth": recipe.max_depth}
    return {"config": dataclasses.asdict(config), "model": state, "data": about}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.convert", description=__doc__, formatter_class=raw
    )
    parser.add_argument("file", metavar="FILE", help="a checkpoint of the authors")
    parser.add_argument("--data", choices=("nyu", "kitti"), required=True)
    parser.add_argument("--out", type=Path, metavar="OURS.pt", required=True, help="a new file")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out} exists: choose another --out")
    content = convert(args.file, args.data)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{args.out}.partial")
    torch.save(content, partial)
    partial.rename(args.out)
    print(f"{args.out}: {content['config']}")


if __name__ == "__main__":
    data.run_command(main)
