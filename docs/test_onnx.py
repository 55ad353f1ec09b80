"""Tests of the export that docs/onnx.md shows: python -m pytest -q docs/test_onnx.py"""

import pytest
import torch

import cabins

SIZES = [(1, 64, 64), (3, 100, 131), (2, 129, 65)]  # of images that the export never saw
pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 fixes the sizes of what it exports"
)


@pytest.fixture(scope="module")
def tiny() -> cabins.CaBins:
    torch.manual_seed(0)
    return cabins.CaBins(cabins.Config(backbone="tiny", longer_side=128)).eval()


class Depth(torch.nn.Module):
    """The network, with depth as its only output."""

    def __init__(self, network: cabins.CaBins):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image).depth


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    limits = (("batch", 1), ("height", 64), ("width", 64))
    batch, height, width = (torch.export.Dim(name, min=least) for name, least in limits)
    shapes = {"image": {0: batch, 2: height, 3: width}}
    return torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes)


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@torch.no_grad()
def test_an_exported_network_equals_the_network_at_any_size(tiny):
    program = exported(tiny).module()
    for b, h, w in SIZES:
        image = torch.randn(b, 3, h, w)
        for found, expected in zip(program(image), tiny(image)):
            same(found, expected, 1e-5)


@torch.no_grad()
def test_onnx_equals_the_network_at_any_size(tiny, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name}, which is optional, is not installed")
    import onnxruntime

    program = exported(Depth(tiny).eval())
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "cabins.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "cabins.onnx")
    for b, h, w in SIZES:
        image = torch.randn(b, 3, h, w)
        found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
        same(torch.from_numpy(found), tiny(image).depth, 1e-4)


@torch.no_grad()
def test_a_compiled_network_is_one_graph_and_gives_the_same(tiny):
    image = torch.randn(2, 3, 96, 128)
    compiled = torch.compile(tiny, fullgraph=True, backend="aot_eager")
    same(compiled(image).depth, tiny(image).depth, 1e-5)
