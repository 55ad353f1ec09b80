"""Tests of the export that docs/onnx.md shows: python -m pytest -q docs/test_onnx.py"""

import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

import cabins

DOCS = Path(__file__).resolve().parent
SIZES = [(1, 64, 64), (3, 100, 131), (2, 129, 65)]  # of images that the export never saw
pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 fixes the sizes of what it exports"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict:
    """The names that docs/onnx.md's code defines, after it ran with a tiny network."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name}, which is optional, is not installed")
    here = tmp_path_factory.mktemp("checkout")
    (here / "docs").mkdir()
    shutil.copy(DOCS / "explained.png", here / "docs")
    (here / "runs" / "toy").mkdir(parents=True)
    torch.manual_seed(0)
    tiny = cabins.CaBins(cabins.Config(backbone="tiny", longer_side=128))
    cabins.save_checkpoint(here / "runs" / "toy" / "best.pt", tiny)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "onnx.md").read_text(), re.DOTALL)
    (here / "page.py").write_text("\n".join(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        return runpy.run_path("page.py")


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() < tolerance * expected.abs().max())


@torch.no_grad()
def test_both_exports_equal_the_network_at_any_size(page):
    model, program, session = page["model"], page["program"].module(), page["session"]
    names = [output.name for output in session.get_outputs()]
    assert names == list(cabins.Prediction._fields)
    for b, h, w in SIZES:
        image = torch.randn(b, 3, h, w)
        expected, found = model(image), program(image)
        assert all(close(*pair, 1e-5) for pair in zip(found, expected, strict=True))
        found = cabins.Prediction(*map(torch.tensor, session.run(None, {"image": image.numpy()})))
        texts = [(1e4 * x.distances.double()).round() for x in (found, expected)]
        is_same = texts[0] == texts[1]  # a distance may be rounded the other way
        assert is_same.float().mean() > 0.5
        assert close(found.similarity[is_same], expected.similarity[is_same], 1e-4)
        for name in names[:3] + names[4:]:
            assert close(getattr(found, name), getattr(expected, name), 1e-4)


def test_the_page_predicts_a_picture(page):
    assert page["depth"].shape[-1] == page["model"].config.longer_side
    assert (page["depth"] > 0).all()


@torch.no_grad()
def test_a_compiled_network_is_one_graph_and_gives_the_same():
    model = cabins.CaBins(cabins.Config(backbone="tiny")).eval()
    image = torch.randn(2, 3, 96, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(image), model(image), strict=True):
        assert close(found, expected, 1e-5)
