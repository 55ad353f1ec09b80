"""python -m pytest -q extras"""

import argparse
import math
import sys

import numpy as np
import pytest
from PIL import Image

import cabins
from cabins import InputError
from extras import pointcloud

plyfile = pytest.importorskip("plyfile")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    config = cabins.Config(backbone="tiny", longer_side=128)
    cabins.save_checkpoint(path, cabins.CaBins(config))
    return path


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["pointcloud", *map(str, arguments), "--device", "cpu"])
    pointcloud.main()


def test_the_cloud_read_back(checkpoint, tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    command = (checkpoint, tmp_path / "a.png", "--fov", 60, "--out", tmp_path / "out")
    run(monkeypatch, *command)
    points = plyfile.PlyData.read(tmp_path / "out" / "a.ply")["vertex"]
    depth = cabins.infer(cabins.load_checkpoint(checkpoint), picture).depth
    focal = 60 / math.tan(math.radians(30))
    assert np.array_equal(points["z"], depth.ravel())
    x, y = np.meshgrid(np.arange(120) - 59.5, np.arange(90) - 44.5)
    assert np.allclose(points["x"], (x * depth).ravel() / focal, rtol=1e-5)
    assert np.allclose(points["y"], (y * depth).ravel() / focal, rtol=1e-5)
    for channel, name in enumerate(("red", "green", "blue")):
        assert np.array_equal(points[name], picture[..., channel].ravel())


def test_the_focal_length_comes_from_options_exif_or_a_data_set(
    checkpoint, tmp_path, monkeypatch, capsys
):
    picture, exif = Image.new("RGB", (120, 90)), Image.Exif()
    picture.save(tmp_path / "none.jpg")
    picture.save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    exif.get_ifd(0x8769)[0xA405] = 28  # FocalLengthIn35mmFilm
    exif[0x0112] = 6  # the camera was held upright
    picture.save(tmp_path / "phone.jpg", exif=exif)
    pictures = [tmp_path / f"{name}.jpg" for name in ("none", "odd", "phone")]
    of_phone = 28 * math.hypot(120, 90) / math.hypot(36, 24)
    for options, expected in (
        ([], [518.86 * 120 / 640, 518.86 * 120 / 640, of_phone]),
        (["--focal", 77], [77, 77, 77]),
        (["--fov", 90], [60, 60, 45]),
    ):
        out = tmp_path / f"out{len(options)}{options[-1:]}"
        run(monkeypatch, checkpoint, *pictures, "--out", out, *options)
        assert {path.name for path in out.iterdir()} == {"none.ply", "odd.ply", "phone.ply"}
        lines = [line for line in capsys.readouterr().out.splitlines() if ".jpg: " in line]
        for line, focal in zip(lines, expected, strict=True):
            assert f" {focal:.1f} pixels" in line
    config = cabins.Config(longer_side=1216, max_depth=80)
    args = argparse.Namespace(focal=None, fov=None)
    focal, source = pointcloud.focal_length(picture, (375, 1216), config, args)
    assert (focal, source) == (721.54, "KITTI's camera")


@pytest.mark.parametrize("focal", [18, 5000, 0, -50])
def test_a_focal_length_in_millimetres_is_refused_and_an_angle_never(
    focal, checkpoint, tmp_path, monkeypatch, capsys
):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    command = (checkpoint, tmp_path / "a.png", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="1 of 1 pictures"):
        run(monkeypatch, *command, "--focal", focal)
    assert "not in millimetres" in capsys.readouterr().err
    (tmp_path / "out").rmdir()  # it is empty
    run(monkeypatch, *command, "--fov", 5)
    assert (tmp_path / "out" / "a.ply").exists()


def test_field_of_view_by_hand():
    assert pointcloud.field_of_view(50.0, (100, 173)) == pytest.approx((119.9, 90.0), abs=0.1)


@pytest.mark.parametrize("options", [("--focal", 5, "--fov", 60), ("--fov", 180), ("--fov", 0)])
def test_wrong_options(options, checkpoint, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, checkpoint, "a.png", "--out", tmp_path / "out", *options)
    assert stop.value.code == 2 and "--fov" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
