from common import *

# ---- Sec. 4.3  The protocol ----------------------------------------------------------------------


class MadePairs(data.DepthDataset):
    """Depth maps (1, H, W) as a test set."""

    def __init__(self, *depths, name="toy", max_depth=None):
        super().__init__("toy", max_depth=max_depth)
        self.name, self.depths, self.pairs = name, depths, range(len(depths))

    def __getitem__(self, i):
        depth = self.depths[i]
        size = torch.tensor([375, 1242] if self.name == "kitti" else depth.shape[1:])
        return {"image": depth.expand(3, -1, -1), "depth": depth, "path": "none", "size": size}


@pytest.fixture
def no_workers(monkeypatch):
    """`evaluate` reads the data in this process, because workers take long to start."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def flat(depth: float, height=64, width=64) -> torch.Tensor:
    return torch.full((1, height, width), float(depth))


def measured(depth: torch.Tensor, *truths, **options) -> dict[str, dict[str, float]]:
    """The metrics in each window of a method that predicts `depth` (1, H, W) for every image."""
    return evaluation.evaluate_windows(lambda _: depth[None], MadePairs(*truths, **options), 0)


def test_metrics_are_means_over_images_and_truth_counts_strictly_inside_the_range():
    few = flat(0)
    few[0, :2] = 4.0
    few[0, 2], few[0, 3] = 10.0, 1e-3  # the ends of the range
    row = measured(flat(2), few, flat(2), flat(0))["whole"]  # the last image has no truth
    assert (row["abs_rel"], row["d1"]) == pytest.approx(((0.5 + 0) / 2, (0 + 1) / 2))
    for depth, truth in ((flat(2), flat(10)), (flat(2), flat(0)), (flat(2, 64, 63), flat(2))):
        with pytest.raises(ValueError):
            measured(depth, truth)
    for predicted, counts_as in ((math.nan, 1e-3), (-1, 1e-3), (math.inf, 10), (99, 10)):
        rmse = measured(flat(predicted), flat(2))["whole"]["rmse"]
        assert rmse == pytest.approx(abs(counts_as - 2))
    few[0, 4:] = 8.0  # beyond a range of 6 m, to which the prediction is clipped
    assert measured(flat(9), few, max_depth=6.0)["whole"]["rmse"] == pytest.approx(6 - 4)
    outside = flat(0, 352, 1216)
    outside[0, 130:143] = 2.0  # has truth in KITTI's second window only
    assert list(measured(outside, outside, outside + 2, name="kitti")) == ["nested", "full"]


def test_only_depth_in_the_windows_counts(no_workers):
    windows = {"eigen": (45, 471, 41, 601)}  # top, bottom, left and right
    windows |= {"nested": (143, 349, 43, 1172), "full": (130, 348, 31, 1184)}
    for window, (top, bottom, left, right) in windows.items():
        name, size = ("nyu", (480, 640)) if window == "eigen" else ("kitti", (352, 1216))
        depth, pairs = flat(9, *size), MadePairs(flat(2, *size), name=name)
        depth[0, top:bottom, left:right] = 2.0
        depth[0, top, left] = depth[0, bottom - 1, right - 1] = 4.0
        row = measured(depth, flat(2, *size), name=name)[window]
        assert row["abs_rel"] == pytest.approx(2 / ((bottom - top) * (right - left)))
        papers = evaluation.evaluate(lambda _, depth=depth: depth[None], pairs)
        assert (papers == row) == (window != "full")


def test_flip_averaging_is_of_clipped_depths_at_the_decoders_size(monkeypatch):
    model, image = cabins.CaBins(TINY).eval(), torch.randn(1, 3, 96, 128, generator=generator())
    straight = model(image, upsample=False).depth
    mirrored = model(image.flip(-1), upsample=False).depth.flip(-1)
    model.train()
    for flip, expected in ((True, (straight + mirrored) / 2), (False, straight)):
        depth = evaluation.predictor(model, flip)(image)
        close(depth, cabins.resize(expected, (96, 128)), 1e-5)
        assert model.training and model.bins.training  # the network is left as it was
    halves = torch.full((2, 1, 48, 64), 30.0)
    halves[..., 32:] = math.nan
    monkeypatch.setattr(model, "forward", lambda *_, **__: cabins.Prediction(halves, 0, 0, 0))
    close(evaluation.predictor(model)(image), flat((10 + 1e-3) / 2, 96, 128)[None], 1e-6)


def test_own_lists_are_measured_at_the_size_of_training(tmp_path, no_workers, monkeypatch):
    model, drawn = cabins.CaBins(TINY).eval(), []
    model.depth_decoder.logits.weight.data *= 30  # so that the depth depends on the image
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "a", "1", 480, 640))
    pairs = data.DepthDataset("list", tmp_path, tmp_path / "list.txt")
    depth, image = cabins.infer(model, pairs[0]["path"]).depth, pairs[0]["image"][None]
    close(evaluation.predictor(model, False, longer_side=128)(image)[0, 0], depth, 1e-5)
    small, large = (evaluation.predictor(model, longer_side=side) for side in (128, None))
    row = evaluation.evaluate(model, pairs)
    assert evaluation.evaluate(small, pairs) == row != evaluation.evaluate(large, pairs)
    monkeypatch.setattr(evaluation, "draw_explained", lambda *arguments: drawn.append(arguments))
    evaluation.draw_samples(tmp_path, model, pairs, 1)
    close(drawn[0][3].depth, depth, 1e-5)
    others = [MadePairs(name=name) for name in ("nyu", "kitti", "toy")]
    assert not any(evaluation.side_for(model, pairs) for pairs in others)


def test_quoted_rows_are_the_papers():
    ours = {"ours": dict.fromkeys(evaluation.HEADINGS, 0.12345)}
    for name, n, total in (("nyu", 6, 17.611), ("kitti", 8, 69.969)):
        headings, row, *quoted = map(str.split, evaluation.format_table(name, ours).splitlines())
        assert len(headings) == n and row == ["ours"] + ["0.123"] * n
        assert {len(row) - row.index("(quoted)") for row in quoted} == {n + 1}
        assert sum(float(v) for row in quoted for v in row[-n:] if v != "-") == pytest.approx(total)
    assert headings == [*evaluation.HEADINGS.values()]
    assert " ".join(quoted[-2]) == "CLIP2Depth (quoted) 0.074 0.303 2.948 - 0.032 0.938 0.990 0.998"


def test_kept_predictions_give_the_same_row(tiny, tiny_checkpoint, own_pairs, no_workers):
    split, other, out = own_pairs / "test.txt", own_pairs / "other.pt", own_pairs / "out"
    known = {"data": "list", "root": str(own_pairs), "test_split": str(split)}
    cabins.save_checkpoint(other, tiny, args=known)  # it says on what it was trained
    options = ("--data", "list", "--root", own_pairs, "--split", split, "--out", out)
    for command in ([tiny_checkpoint], [tiny_checkpoint], [other, "--no-flip"]):
        run_script("eval.py", *command, *options)
    with open(out / "results.csv", newline="") as file:
        first, _, last = rows = list(csv.DictReader(file))
    printed = run_script("eval.py", other).out.splitlines()[-1].split()[2:]
    assert printed == [f"{float(first[metric]):.3f}" for metric in evaluation.HEADINGS]
    assert last["protocol"] != first["protocol"] and str(split) in last["list"]
    assert [row["checkpoint"] for row in rows] == [str(tiny_checkpoint)] * 2 + [str(other)]
    names, folders = ["rooms_rgb_4_mm.png", "rooms_rgb_5_mm.png"], {*out.glob("*/")}
    assert {out / row["predictions"] for row in rows} == folders and len(folders) == 3
    assert all({path.name for path in folder.iterdir()} == set(names) for folder in folders)
    kept = (data.read_depth(out / first["predictions"] / name, 1000) for name in names)
    pairs = data.DepthDataset("list", own_pairs, split)
    again = evaluation.evaluate(lambda _: next(kept)[None, None], pairs)
    for metric, value in evaluation.evaluate(tiny, pairs).items():
        assert float(first[metric]) == pytest.approx(value, rel=1e-9)
        assert again[metric] == pytest.approx(value, abs=1e-3)


def test_an_own_list_is_measured_over_the_networks_range(own_pairs, monkeypatch):
    found, path = [], own_pairs / "a.pt"
    command = ["--data", "list", "--root", own_pairs, "--split", own_pairs / "test.txt"]
    monkeypatch.setattr(evaluation, "measure", lambda _, pairs, __: found.append(pairs.recipe))
    for top, option in ((80, []), (80, ["--max-depth", 6]), (6, ["--depth-scale", 500])):
        model = cabins.CaBins(dataclasses.replace(TINY, max_depth=float(top)))
        cabins.save_checkpoint(path, model)
        run_script("eval.py", path, *command, *option)
    found = [(recipe.max_depth, recipe.depth_scale) for recipe in found]
    assert found == [(80, 1000), (6, 1000), (6, 500)]


def test_the_authors_networks_get_the_range_of_their_data(tiny, few_rooms, tmp_path, monkeypatch):
    torch.save({"model": {"module.prompts": torch.zeros(1)}}, tmp_path / "theirs.pt")
    ranges, command = [], ["eval.py", tmp_path / "theirs.pt", "--workers", 0, "--data"]
    monkeypatch.setattr(cabins, "restore", lambda _, __, top: (ranges.append(top), tiny)[1])
    assert run_script(*command, "toy").status == 1  # toy rooms do not say which network it is
    for name in ("nyu", "kitti"):
        assert run_script(*command, "toy", "--released", name, "--max-depth", 5).status == 0
        run_script(*command, name, "--root", tmp_path / "none")
    assert ranges == [10.0, 10.0, 80.0, 80.0]


def test_a_full_disk_is_found_before_the_work(tiny_checkpoint, few_rooms, tmp_path, monkeypatch):
    for name in ("evaluate_windows", "draw_samples", "write_picture"):
        monkeypatch.setattr(evaluation, name, None)  # no work can be done
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: io.FileIO("/dev/full", "w"))
    for mode in ([], ["--explain"], ["--images", __file__]):
        ran = run_script("eval.py", tiny_checkpoint, *mode, "--out", tmp_path / "full")
        assert ran.status == 1 and str(tmp_path / "full") in ran.err and ran.err.count("\n") == 1


def test_figures_show_the_network_and_mark_what_they_cut(tmp_path, monkeypatch):
    model = cabins.CaBins(dataclasses.replace(TINY, distance_class="semantic")).eval()
    found, s = cabins.predict_one(model, torch.randn(1, 3, 96, 128), (90, 120))
    figures, truth = [], np.full((90, 120), 9.5, np.float32)
    truth[:45] = 0  # no truth
    monkeypatch.setattr(evaluation, "save_figure", lambda path, figure: figures.append(figure))
    for options in ((model.config, found, s, truth), (TINY, found, s)):
        evaluation.draw_explained(tmp_path, np.zeros((90, 120, 3), np.uint8), *options)
    figures[0].draw_without_rendering()
    _, depth, true, error, std, *prompts = [a.images[0] for a in figures[0].axes if a.images]
    for shown, values in ((depth, found.depth), (std, found.std), *zip(prompts, s, strict=True)):
        assert np.array_equal(shown.get_array(), values)
    assert {prompt.get_clim() for prompt in prompts} == {(s.min(), s.max())}
    assert depth.get_clim() == true.get_clim() == (found.depth.min(), 9.5)
    assert true.get_array().mask[:45].all() and not true.get_array().mask[45:].any()
    assert error.get_clim() == (0, pytest.approx(0.95))
    assert (error.colorbar.extend, depth.colorbar.extend) == ("max", "neither")
    for axes in ((depth.axes, depth.colorbar.ax), (error.axes, error.colorbar.ax)):
        heights = [axis.get_window_extent().height for axis in axes]
        assert heights[0] == pytest.approx(heights[1], rel=0.1)  # a bar is as high as its map
    boxes = [prompt.axes.title.get_window_extent() for prompt in prompts]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    (bins,) = [axis for axis in figures[0].axes if axis.get_legend()]
    for lines, places in zip(bins.collections, (found.centers, found.cabins), strict=True):
        assert np.allclose([line[0, 0] for line in lines.get_segments()], places)
    titles = [axis.get_title() for axis in figures[1].axes if axis.images][-8:]
    assert titles == [f"“{round(float(e), 4)}”" for e in found.cabins]


def test_each_network_has_folders_of_its_own(few_rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 70)).save("a.png")
    kinds = ("depth", "colour", "depth_mm", "std_mm", "explained")
    for n in (1, 2):
        cabins.save_checkpoint(f"{n}.pt", cabins.CaBins(TINY), args={"data": "toy"})
        assert run_script("eval.py", f"{n}.pt", "--explain", n).status == 0
        assert len([*tmp_path.glob(f"{n}_explained/explained_[01].png")]) == n
        ran = run_script("eval.py", f"{n}.pt", "--images", "a.png", "none", "--explain")
        assert ran.status == 1 and "none" in ran.err
        files = {path.name for path in tmp_path.glob(f"{n}_pictures/*")}
        assert files == {f"a_{kind}.png" for kind in kinds}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures of every kind, and of other files."""
    folder, exif = tmp_path_factory.mktemp("pictures"), Image.Exif()
    values = np.random.default_rng(0).integers(0, 255, (90, 120), np.uint8)
    grey = Image.fromarray(values)
    for name in ("L.png", "RGBA.webp", "P.png", "CMYK.tif", "1.bmp"):
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
    with contextlib.suppress(ImportError):
        __import__("pillow_heif").from_pillow(grey).save(folder / "new.HEIC", format="HEIF")
    (folder / "deeper.png").mkdir()
    for name in (".hidden.png", "deeper.png/below.png", "写真.png", "phone.png"):
        grey.save(folder / name)
    return folder


def test_pictures_of_every_kind_give_what_infer_gives(tiny, tiny_checkpoint, pictures, tmp_path):
    out, command = tmp_path / "out", ("eval.py", tiny_checkpoint, "--out", tmp_path / "out")
    ran = run_script(*command, "--images", pictures, "--range", 8)
    no_heif = "pip install pillow-heif" in ran.err
    assert ran.status == 1 and ran.err.count("\n") == 3 + no_heif
    assert all(name in ran.err for name in ("broken.jpg", "float.tif", "junk.AVIF"))
    stems = {"L", "RGBA", "P", "CMYK", "1", "deep", "phone", "phone_", "frames", "$thin_{$", "写真"}
    stems |= set() if no_heif else {"new"}
    files = {f"{s}_{k}.png" for s in stems for k in ("depth", "colour", "depth_mm", "std_mm")}
    assert {path.name for path in out.iterdir()} == files
    assert [".gif: " in line for line in ran.out.splitlines() if " 3 frames" in line] == [True]
    for name in ("phone.jpg", "phone_.png", "deep.png", "RGBA.webp", "$thin_{$.PNG"):
        found = cabins.infer(tiny, pictures / name.replace("_.", "."))
        start = f"{out}/{name.split('.')[0]}"
        for kind, values in (("depth", found.depth), ("std", found.std)):
            written = np.asarray(Image.open(f"{start}_{kind}_mm.png"))
            assert np.array_equal(written, (values * 1000).round())
        viridis = pytest.importorskip("matplotlib").colormaps["viridis"]
        colours = viridis(found.depth / 8, bytes=True)[..., :3]
        assert np.array_equal(np.asarray(Image.open(f"{start}_colour.png")), colours)
    with torch.autocast("cpu", torch.bfloat16):
        found = cabins.infer(tiny, pictures / "L.png")
    for amp, is_equal in (("bf16", True), ("off", False)):
        assert run_script(*command, "--images", pictures / "L.png", "--amp", amp).status == 0
        written = np.asarray(Image.open(out / "L_std_mm.png"))
        assert np.array_equal(written, (found.std * 1000).round()) == is_equal


def test_what_folders_and_patterns_find(pictures, tmp_path, capsys):
    found, n_without = evaluation.find_pictures([f"{pictures}", f"{pictures}/L.png", "none"])
    names, folder = {path.name for path in found}, tmp_path / "[1]"
    assert n_without == 1 and len(names) == len(found) == 15
    assert not names & {"notes.txt", ".hidden.png", "below.png", "deeper.png"}
    assert f"{pictures}: 2 are left out" in capsys.readouterr().out
    below, _ = evaluation.find_pictures([f"{pictures}/**", f"{pictures}/notes.txt"])
    assert {path.name for path in below} == names | {"below.png", "notes.txt"}
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        evaluation.find_pictures([str(folder)])
    (folder / "a.tif").write_bytes(b"")
    assert evaluation.find_pictures([str(folder)]) == ([folder / "a.tif"], 0)


def test_sixteen_bits_hold_every_range(tmp_path):
    ranges = [(10, 1000, "_mm", 9600), (80, 1000, "_cm", 7960), (700, 1000, "_dm", 6996)]
    ranges += [(9999, 1000, "_m", 9999), (80, 256, "", 20378)]  # KITTI's own scale
    for top, scale, unit, written in ranges:
        evaluation.write_depth(f"{tmp_path}/a", np.full((2, 2), top - 0.4), top, scale)
        assert (np.asarray(Image.open(tmp_path / f"a{unit}.png")) == written).all()


def test_options_that_would_do_nothing_are_refused(tiny_checkpoint):
    modes = {"--images": ["workers", "depth-scale", "split"], "--explain": ["workers", "max-depth"]}
    for mode, name in [(mode, name) for mode, names in modes.items() for name in names]:
        ran = run_script("eval.py", tiny_checkpoint, f"--{name}", 1, mode, 1)
        assert ran.status == 1 and name in ran.err and not ran.out
