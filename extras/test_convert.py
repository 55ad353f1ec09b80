"""python -m pytest -q extras"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cabins
from cabins import InputError
from extras import convert
from test_cabins import made_tensor

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"


def made_state() -> dict[str, Tensor]:
    """The tensors of the authors' network, with made weights, by the authors' names."""
    shapes = convert.their_shapes(cabins.Config())
    names = {convert.their_name(name): shape for name, shape in shapes.items()}
    return {name: made_tensor(name, shape) for name, shape in names.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in made_state().items()}


@pytest.fixture
def file(state, tmp_path):
    """A function that writes a checkpoint of the authors, with changes; None leaves one out."""

    def write(**changes: Tensor | None) -> Path:
        changed = state | {f"module.{k.replace('__', '.')}": v for k, v in changes.items()}
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        torch.save({"model": changed, "optimizer": {}, "epoch": 24}, tmp_path / "theirs.pt")
        return tmp_path / "theirs.pt"

    yield write
    (tmp_path / "theirs.pt").unlink(missing_ok=True)  # of 800 MB


@pytest.mark.skipif(not GOLDENS.exists(), reason="needs the goldens beside the project")
def test_names_and_shapes_are_the_authors(state):
    listed = json.loads((GOLDENS / "cabins_rn101_state_dict.json").read_text())
    assert {k.removeprefix("module."): list(v.shape) for k, v in state.items()} == listed


def test_each_of_the_985_names_has_a_name_of_its_own(state):
    assert len(state) == 985
    known = {
        "prompts": "contexts",
        "trans_decoder.gamma": "gamma",
        "clip.visual.conv1.weight": "clip_model.visual.conv1.weight",
        "bins.mlp.4.bias": "computeAdaptiveBin.regressor.4.bias",
        "trans_decoder.layers.5.norm1.bias": "context_decoder.decoder.5.norm1.bias",
        "trans_decoder.out_proj.1.bias": "context_decoder.out_proj.1.bias",
        "depth_decoder.fuse.weight": "decoder.conv2.weight",
        "depth_decoder.up.2.4.running_var": "decoder.up3._net.4.running_var",
        "depth_decoder.head.bias": "decoder.conv3.bias",
        "depth_decoder.classifier.bias": "predict_D.conv_out.0.bias",
    }
    assert {name: convert.their_name(name) for name in known} == known


@pytest.mark.parametrize("name, depths", [("nyu", (1000, 10, 640)), ("kitti", (256, 80, 1216))])
def test_the_command_writes_a_checkpoint_of_ours(name, depths, file, state, tmp_path, monkeypatch):
    ours = tmp_path / "new" / "ours.pt"
    command = ["convert", str(file()), "--data", name, "--out", str(ours)]
    monkeypatch.setattr(sys, "argv", command)
    convert.main()
    model = cabins.load_checkpoint(ours)
    content = cabins.read_checkpoint(ours)
    assert content["data"] == {"name": name, "depth_scale": depths[0], "max_depth": depths[1]}
    config = cabins.Config(max_depth=depths[1], longer_side=depths[2])
    assert model.config == config and config.backbone == "RN101"
    for ours_name, tensor in model.state_dict().items():
        theirs = state[f"module.{convert.their_name(ours_name)}"]
        if ours_name == "prompts":
            theirs = theirs[0]
        if ours_name == "clip.positional_embedding":
            assert tensor.shape == (77, 512) and not tensor[30:].any()
            tensor = tensor[:30]
        assert torch.equal(tensor, theirs), ours_name
    with pytest.raises(InputError, match="exists"):  # nothing is overwritten
        convert.main()
    assert [path.name for path in ours.parent.iterdir()] == ["ours.pt"]
    ours.unlink()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gamma": None}, "not the authors' RN101: gamma is missing"),
        ({"gamma": torch.zeros(64)}, r"not the authors' RN101: gamma is \(64,\), not \(512,\)"),
        ({"extra__weight": torch.zeros(1)}, "not the authors' RN101: it has extra.weight, too"),
        ({"gamma": torch.full((512,), torch.nan)}, "damaged: gamma has values that are not finite"),
    ],
)
def test_one_wrong_tensor_is_refused_by_name(changes, message, file):
    with pytest.raises(InputError, match=message):
        convert.convert(file(**changes), "nyu")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(InputError, match="is not a file; expected a checkpoint of the authors"):
        convert.convert(path, "nyu")
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="damaged or of another kind"):
        convert.convert(path, "nyu")
    model = cabins.CaBins(cabins.Config("tiny"))
    cabins.save_checkpoint(path, model)
    with pytest.raises(InputError, match="is a checkpoint of train.py already"):
        convert.convert(path, "nyu")
    for content in (model.state_dict(), {"model": {"epoch": 3}}, {"model": [1]}):
        torch.save(content, path)
        with pytest.raises(InputError, match="has no 'model' of tensors"):
            convert.convert(path, "nyu")
    torch.save({"model": model.state_dict()}, path)
    with pytest.raises(InputError, match="not the authors' RN101: it has "):
        convert.convert(path, "nyu")
