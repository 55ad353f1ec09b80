"""python -m pytest -q extras"""

import dataclasses
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import cabins
from cabins import InputError
from extras import pictures

CONFIG = cabins.Config(backbone="tiny", longer_side=128)
UNREADABLE = {"broken.jpg", "deep.png", "float.tif", "junk.AVIF", "new.HEIC"}


@pytest.fixture(scope="module")
def model() -> cabins.CaBins:
    torch.manual_seed(0)
    return cabins.CaBins(CONFIG).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    cabins.save_checkpoint(path, model)
    return path


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """A folder of pictures of every kind, of other files, and of folders."""
    folder, exif = tmp_path_factory.mktemp("album"), Image.Exif()
    values = np.random.default_rng(0).integers(0, 255, (45, 60), np.uint8)
    grey = Image.fromarray(values)
    for name in ("L.png", "RGBA.webp", "P.png", "CMYK.tiff", "1.bmp"):
        grey.convert(name.split(".")[0]).save(folder / name)
    Image.fromarray(values.astype(np.uint16) * 257).save(folder / "deep.png")
    exif[0x0112] = 6  # the camera was held upright
    grey.save(folder / "phone.jpg", exif=exif)
    others = {"save_all": True, "append_images": [grey.rotate(90), grey.rotate(180)]}
    grey.save(folder / "frames.gif", **others)
    grey.resize((1, 300)).save(folder / "$thin_{$.PNG")
    (folder / "broken.jpg").write_bytes((folder / "phone.jpg").read_bytes()[:300])
    Image.fromarray(np.zeros((80, 90), np.float32)).save(folder / "float.tif")
    for name in ("notes.txt", "junk.AVIF", "new.HEIC"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "deeper.png" / "still").mkdir(parents=True)
    for name in (".hidden.png", "deeper.png/still/phone.jpeg", "写真.png", "phone.png"):
        grey.save(folder / name)
    return folder


def run(monkeypatch, *arguments) -> None:
    command = ["pictures", *map(str, arguments), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    pictures.main()


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_every_kind_gives_what_infer_gives(
    model, checkpoint, album, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    monkeypatch.setitem(matplotlib.rcParams, "figure.dpi", 20)  # draws faster
    with pytest.raises(InputError, match="5 of 16 pictures"):
        run(monkeypatch, checkpoint, album, "--range", 8, "--npy", "--out", out)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5 and all(any(name in e for e in errors) for name in UNREADABLE)
    stems = {"L", "RGBA", "P", "CMYK", "1", "phone", "phone_", "frames", "$thin_{$", "写真"}
    stems.add("deeper.png/still/phone")
    kinds = ("depth.png", "colour.png", "depth_mm.png", "std_mm.png", "depth.npy")
    assert files_below(out) == {f"{stem}_{kind}" for stem in stems for kind in kinds}
    for name in (
        "phone.jpg",
        "phone_.png",
        "CMYK.tiff",
        "RGBA.webp",
        "deeper.png/still/phone.jpeg",
    ):
        found = cabins.infer(model, album / name.replace("_.", "."))
        start = f"{out}/{name.rpartition('.')[0]}"
        for kind, values in (("depth", found.depth), ("std", found.std)):
            written = np.asarray(Image.open(f"{start}_{kind}_mm.png"))
            assert np.array_equal(written, (values * 1000).round())
        metres = np.load(f"{start}_depth.npy")
        assert metres.dtype == np.float32 and np.array_equal(metres, found.depth)
        colours = matplotlib.colormaps["viridis"](found.depth / 8, bytes=True)[..., :3]
        assert np.array_equal(np.asarray(Image.open(f"{start}_colour.png")), colours)


def test_without_options_colours_span_a_picture_and_a_great_range_is_in_centimetres(
    album, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    far = cabins.CaBins(dataclasses.replace(CONFIG, max_depth=66.0)).eval()
    cabins.save_checkpoint(tmp_path / "far.pt", far)
    out = tmp_path / "out"
    run(monkeypatch, tmp_path / "far.pt", album / "L.png", "--explain", "--out", out)
    kinds = ("depth", "colour", "depth_cm", "std_cm", "explained")
    assert files_below(out) == {f"L_{kind}.png" for kind in kinds}
    depth = cabins.infer(far, album / "L.png").depth
    assert np.array_equal(np.asarray(Image.open(out / "L_depth_cm.png")), (depth * 100).round())
    colours = {colour for _, colour in Image.open(out / "L_colour.png").getcolors(9**6)}
    assert {(68, 1, 84), (253, 231, 36)} <= colours  # the ends of viridis
    assert min(Image.open(out / "L_explained.png").size) > 500


def test_what_does_not_fit_16_bits_saturates(tmp_path):
    pictures.write_depth(str(tmp_path / "a.png"), np.float32([[65.5354, 65.6, 1e9, 0]]), 1000)
    written = np.asarray(Image.open(tmp_path / "a.png"))
    assert written.dtype == np.uint16 and written.tolist() == [[65535, 65535, 65535, 0]]


def test_what_files_folders_and_patterns_find(album, tmp_path):
    found = pictures.find_pictures([f"{album}", f"{album}/L.png", "none"])
    names, folder = {path.name for path in found}, tmp_path / "[1]"
    assert found == [*sorted(found[:-1]), Path("none")] and len(names) == len(found) == 17
    assert UNREADABLE <= names and "phone.jpeg" in names
    assert not names & {"notes.txt", ".hidden.png", "deeper.png"}
    assert {*pictures.find_pictures([f"{album}/**"])} == {*found[:-1]}
    flat = {path.name for path in pictures.find_pictures([f"{album}/*", f"{album}/notes.txt"])}
    assert flat ^ names == {"phone.jpeg", "notes.txt", "none"}
    folder.mkdir()
    with pytest.raises(InputError, match="no picture"):
        pictures.find_pictures([str(folder)])
    (folder / "a.tif").write_bytes(b"")
    assert pictures.find_pictures([str(folder)]) == [folder / "a.tif"]


def test_names_are_paths_below_the_shared_folder_and_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [Path(p) for p in ("a/1.jpg", tmp_path / "b" / "1.png", "b/1.JPG", "b/c.d/A.x.png")]
    assert pictures.names_below(paths) == ["a/1", "b/1", "b/1_", "b/c.d/A.x"]
    assert pictures.names_below(paths[1:3]) == ["1", "1_"]
    assert pictures.names_below([Path("photo")]) == ["photo"]
    assert pictures.names_below([Path("A.png"), Path("a.jpg")]) == ["A", "a_"]


def test_nothing_is_overwritten_and_a_wrong_command_leaves_no_folder(
    checkpoint, album, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(album, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for picture in (album / "L.png", out / "L.png"):
        with pytest.raises(FileExistsError, match="out"):
            run(monkeypatch, checkpoint, picture, "--out", out)
    for wrong, message in (
        ((tmp_path / "none.pt", album, "--out", tmp_path / "new"), "none.pt"),
        ((checkpoint, tmp_path / "none.jpg", "--out", tmp_path / "new"), "no picture.*none.jpg"),
    ):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, *wrong)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert not (tmp_path / "new").exists()


def test_a_range_must_be_above_0(checkpoint, album, tmp_path, monkeypatch, capsys):
    for wrong in ("0", "-3", "nan", "far"):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, checkpoint, album, "--range", wrong, "--out", tmp_path / "out")
        assert stop.value.code == 2 and "--range" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
