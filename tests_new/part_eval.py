from common import *

# ---- Sec. 4.3  The protocol ----------------------------------------------------------------------


class MadePairs(data.DepthDataset):
    """Depth maps (1, H, W) as a test set, with black images."""

    def __init__(self, *depths, name="toy", max_depth=None):
        super().__init__("toy", max_depth=max_depth)
        self.name, self.depths, self.pairs = name, depths, range(len(depths))

    def __getitem__(self, i):
        depth = self.depths[i]
        size = torch.tensor([375, 1242] if self.name == "kitti" else depth.shape[1:])
        image = torch.zeros(3, *depth.shape[1:])
        return {"image": image, "depth": depth, "path": f"room {i}", "size": size}


@pytest.fixture
def no_workers(monkeypatch):
    """`evaluate` reads the data in this process, because workers take long to start."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def flat(depth: float, height=64, width=64) -> torch.Tensor:
    return torch.full((1, height, width), float(depth))


def measured(depth: torch.Tensor, *truths, **options) -> dict[str, dict[str, float]]:
    """The metrics in each window of a method that predicts `depth` (1, H, W) for every image."""
    pairs = MadePairs(*truths, **options)
    return evaluation.evaluate_windows(lambda image: depth[None], pairs, workers=0)


def test_metrics_are_means_over_images_and_truth_counts_strictly_inside_the_range():
    few = flat(0)
    few[0, :2] = 4.0
    few[0, 2], few[0, 3] = 10.0, 1e-3  # the ends of the range
    row = measured(flat(2), few, flat(2), flat(0))["whole"]  # the last image has no truth
    assert row["abs_rel"] == pytest.approx((0.5 + 0) / 2)
    assert row["d1"] == pytest.approx((0 + 1) / 2)
    with pytest.raises(ValueError):
        measured(flat(2), flat(0), flat(10))
    for predicted, counts_as in ((math.nan, 1e-3), (-1, 1e-3), (math.inf, 10), (99, 10)):
        rmse = measured(flat(predicted), flat(2))["whole"]["rmse"]
        assert rmse == pytest.approx(abs(counts_as - 2))
    few[0, 4:] = 8.0  # beyond a range of 6 m, to which the prediction is clipped
    assert measured(flat(9), few, max_depth=6.0)["whole"]["rmse"] == pytest.approx(6 - 4)


@pytest.mark.parametrize(
    "name, size, windows",
    [
        ("nyu", (480, 640), {"eigen": (45, 471, 41, 601)}),
        ("kitti", (352, 1216), {"nested": (143, 349, 43, 1172), "full": (130, 348, 31, 1184)}),
    ],
)
def test_only_depth_in_the_windows_counts(name, size, windows, no_workers):
    for window, (top, bottom, left, right) in windows.items():
        depth = flat(9, *size)
        depth[0, top:bottom, left:right] = 2.0
        depth[0, top, left] = depth[0, bottom - 1, right - 1] = 4.0
        row = measured(depth, flat(2, *size), name=name)[window]
        assert row["abs_rel"] == pytest.approx(2 / ((bottom - top) * (right - left)))
        pairs = MadePairs(flat(2, *size), name=name)  # `evaluate` takes the paper's window
        papers = evaluation.evaluate(lambda image, depth=depth: depth[None], pairs) == row
        assert papers == (window in ("eigen", "nested"))


def test_any_function_can_be_measured(few_rooms, tiny, no_workers):
    rooms, network = data.DepthDataset("toy"), evaluation.predictor(tiny)
    row = evaluation.evaluate(network, rooms)
    assert evaluation.evaluate(lambda image: network(image).numpy(), rooms) == row
    assert evaluation.evaluate(tiny, rooms) == row
    assert evaluation.evaluate(evaluation.predictor(tiny, flip=False), rooms) != row
    with pytest.raises(ValueError):
        evaluation.evaluate(lambda image: network(image)[..., 1:], rooms)


class Halves(nn.Module):
    """A network whose depth, at half the image's size, is 30 m on the left and NaN on the right."""

    def __init__(self):
        super().__init__()
        self.config, self.parameter = TINY, nn.Parameter(torch.zeros(1))

    def forward(self, image, upsample):
        depth = torch.full((len(image), 1, image.shape[2] // 2, image.shape[3] // 2), 30.0)
        depth[..., depth.shape[3] // 2 :] = math.nan
        return cabins.Prediction(depth, None, None, None)


def test_flip_averaging_is_of_clipped_depths_at_the_decoders_size(tiny):
    depth = evaluation.predictor(Halves())(torch.zeros(1, 3, 64, 128))
    close(depth, torch.full((1, 1, 64, 128), (10 + 1e-3) / 2), 1e-6)
    image = torch.randn(1, 3, 96, 128, generator=generator())
    with torch.no_grad():
        straight = tiny(image, upsample=False).depth
        mirrored = tiny(image.flip(-1), upsample=False).depth.flip(-1)
    tiny.train()
    try:
        depth = evaluation.predictor(tiny)(image)
        assert tiny.training and tiny.bins.training  # the network is left as it was
    finally:
        tiny.eval()
    close(depth, cabins.resize((straight + mirrored) / 2, (96, 128)), 1e-5)
    depth = evaluation.predictor(tiny, flip=False)(image)
    close(depth, cabins.resize(straight, (96, 128)), 1e-5)


def test_own_lists_are_measured_at_the_size_of_training_as_infer_does(
    tmp_path, no_workers, monkeypatch
):
    model = cabins.CaBins(TINY).eval()
    with torch.no_grad():
        model.depth_decoder.logits.weight *= 30  # so that the depth depends on the image
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "a", "1", 480, 640))
    pairs = data.DepthDataset("list", tmp_path, tmp_path / "list.txt")
    predict = evaluation.predictor(model, flip=False, longer_side=128)
    depth = cabins.infer(model, pairs[0]["path"]).depth
    close(predict(pairs[0]["image"][None])[0, 0], depth, 1e-5)
    predictors = [evaluation.predictor(model, longer_side=side) for side in (128, None)]
    rows = [evaluation.evaluate(predict, pairs) for predict in predictors]
    assert evaluation.evaluate(model, pairs) == rows[0] != rows[1]
    drawn = []
    monkeypatch.setattr(evaluation, "draw_explained", lambda *arguments: drawn.append(arguments))
    evaluation.draw_samples(tmp_path, model, pairs, 1)
    close(drawn[0][3].depth, depth, 1e-5)
    for name in ("nyu", "kitti", "toy"):
        assert evaluation.side_for(model, MadePairs(flat(2), name=name)) is None


def test_quoted_rows_are_the_papers():
    lines = [line.split() for line in evaluation.format_table("nyu", {}).splitlines()]
    assert lines[0] == ["AbsRel", "RMSE", "log10", "d<1.25", "d<1.25²", "d<1.25³"]
    assert lines[-1][2:] == ["0.120", "0.401", "0.050", "0.866", "0.978", "0.996"]
    assert [len(line) - line.index("(quoted)") for line in lines[1:]] == [7] * 9
    metrics = dict.fromkeys(evaluation.HEADINGS, 0.12345)
    table = evaluation.format_table("kitti", {"ours": metrics}).splitlines()
    assert table[1].split() == ["ours"] + ["0.123"] * 8 and len(table) == 11
    assert " ".join(table[-2].split()[2:]) == "0.074 0.303 2.948 - 0.032 0.938 0.990 0.998"


# ---- Measuring a checkpoint ----------------------------------------------------------------------


@pytest.fixture
def flat_pairs(tmp_path, no_workers) -> Path:
    """Own pairs a/b and a_b, whose names are equal once folders are flattened; depth 2 to 8 m."""
    lines = ""
    for i, name in enumerate(("a/b", "a_b")):
        image, depth, _ = write_pair(tmp_path / "own", str(i), 96, 128, 2000 * (i + 1)).split()
        values = np.asarray(Image.open(tmp_path / depth)).copy()
        values[:48] = 8000
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        (tmp_path / image).rename(tmp_path / f"{name}.jpg")
        lines += f"{name}.jpg {name}.png\n"
    (tmp_path / "test.txt").write_text(lines)
    return tmp_path


def measure_list(root: Path, checkpoint: Path, *options) -> list[dict[str, str]]:
    """The rows of results.csv after measuring on the list test.txt in `root`."""
    command = ["eval.py", checkpoint, "--data", "list", "--root", root, "--workers", 0, *options]
    ran = run_script(*command, "--split", root / "test.txt", "--out", root / "out")
    assert ran.status == 0, ran.err
    with open(root / "out" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_kept_by_name_and_give_the_same_row(tiny, tiny_checkpoint, flat_pairs):
    other = flat_pairs / "other.pt"
    cabins.save_checkpoint(other, cabins.CaBins(TINY))
    for options in ([tiny_checkpoint], [tiny_checkpoint], [tiny_checkpoint, "--no-flip"], [other]):
        rows = measure_list(flat_pairs, *options)
    known = {"data": "list", "root": str(flat_pairs), "test_split": str(flat_pairs / "test.txt")}
    cabins.save_checkpoint(other, tiny, args=known)  # it says on what it was trained
    again = run_script("eval.py", other, "--workers", 0).out.splitlines()[-1].split()[2:]
    assert again == [f"{float(rows[0][metric]):.3f}" for metric in evaluation.HEADINGS]
    columns = "label checkpoint data list predictions date protocol abs_rel sq_rel rmse rmse_log"
    assert list(rows[0]) == [*columns.split(), "log10", "d1", "d2", "d3"] and len(rows) == 4
    folders = [flat_pairs / "out" / row["predictions"] for row in rows]
    assert folders[0] == folders[1] and len(set(folders)) == 3
    assert rows[0]["protocol"] != rows[2]["protocol"] and rows[3]["checkpoint"] == str(other)
    names = ["a_b_mm.png", "a_b__mm.png"]
    assert {path.name for path in folders[0].iterdir()} == set(names)
    kept = (data.read_depth(folders[0] / name, 1000)[None, None] for name in names)
    pairs = data.DepthDataset("list", flat_pairs, flat_pairs / "test.txt")
    again, row = evaluation.evaluate(lambda _: next(kept), pairs), evaluation.evaluate(tiny, pairs)
    for metric, value in row.items():
        assert float(rows[0][metric]) == pytest.approx(value, rel=1e-9)
        assert again[metric] == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("top, option, measured_to", [(80, [], 80), (80, [6], 6), (6, [], 6)])
def test_an_own_list_is_measured_over_the_networks_range(top, option, measured_to, flat_pairs):
    model = cabins.CaBins(dataclasses.replace(TINY, max_depth=float(top)))
    cabins.save_checkpoint(flat_pairs / "a.pt", model)
    options = ["--depth-scale", 500, *(["--max-depth", *option] if option else [])]
    (row,) = measure_list(flat_pairs, flat_pairs / "a.pt", *options)  # the truth is 4, 8 and 16 m
    pairs = data.DepthDataset("list", flat_pairs, flat_pairs / "test.txt", False, 500, measured_to)
    assert float(row["rmse"]) == pytest.approx(evaluation.evaluate(model, pairs)["rmse"], rel=1e-9)


def test_the_authors_networks_get_the_range_of_their_data(tiny, few_rooms, tmp_path, monkeypatch):
    torch.save({"model": {"module.prompts": torch.zeros(1)}}, tmp_path / "theirs.pt")
    ranges = []
    monkeypatch.setattr(cabins, "restore", lambda _, __, top: (ranges.append(top), tiny)[1])
    command = ["eval.py", tmp_path / "theirs.pt", "--data", "toy", "--workers", 0]
    assert run_script(*command).status == 1  # toy rooms do not say which network it is
    for name in ("nyu", "kitti"):
        assert run_script(*command, "--released", name, "--max-depth", 5).status == 0
        run_script("eval.py", tmp_path / "theirs.pt", "--data", name, "--root", tmp_path / "none")
    assert ranges == [10.0, 10.0, 80.0, 80.0]


def test_what_cannot_be_kept_is_found_before_the_work(
    tiny_checkpoint, few_rooms, tmp_path, monkeypatch
):
    def full(**_):
        raise OSError(28, "No space left on device")

    for name in ("evaluate_windows", "draw_samples", "write_picture"):
        monkeypatch.setattr(evaluation, name, None)  # no work can be done
    results = tmp_path / "out" / "results.csv"
    results.parent.mkdir()
    results.write_text("label,other\n")
    ran = run_script("eval.py", tiny_checkpoint, "--out", results.parent)
    assert ran.status == 1 and results.read_text() == "label,other\n"
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    Image.new("RGB", (80, 70)).save(tmp_path / "a.png")
    for mode in ([], ["--explain"], ["--images", tmp_path / "a.png"]):
        ran = run_script("eval.py", tiny_checkpoint, *mode, "--out", tmp_path / "full")
        assert ran.status == 1 and str(tmp_path / "full") in ran.err and ran.err.count("\n") == 1


# ---- Figures, and your own pictures --------------------------------------------------------------


def test_figures_show_the_network_and_mark_what_they_cut(tmp_path, monkeypatch):
    model = cabins.CaBins(dataclasses.replace(TINY, distance_class="semantic")).eval()
    found, s = cabins.predict_one(model, torch.randn(1, 3, 96, 128), (90, 120))
    figures, picture = [], np.zeros((90, 120, 3), np.uint8)
    monkeypatch.setattr(evaluation, "save_figure", lambda path, figure: figures.append(figure))
    truth = np.full((90, 120), 9.5, np.float32)
    truth[:45] = 0  # no truth
    evaluation.draw_explained(tmp_path, picture, model.config, found, s, truth)
    evaluation.draw_explained(tmp_path, picture, TINY, found, s)
    figures[0].draw_without_rendering()
    _, true, depth, error, std, *prompts = [a.images[0] for a in figures[0].axes if a.images]
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
    titles = [axis.get_title() for axis in figures[1].axes if axis.images][-8:]
    assert titles == [f"“{round(float(e), 4)}”" for e in found.cabins]


def test_explain_gives_each_network_a_folder_of_its_own(few_rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, n in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        cabins.save_checkpoint(f"{folder}/best.pt", cabins.CaBins(TINY), args={"data": "toy"})
        assert run_script("eval.py", f"{folder}/best.pt", "--explain", n).status == 0
    files = [file for _, _, file in os.walk(tmp_path / "runs" / "explained") if file]
    assert sorted(map(sorted, files)) == [
        ["explained_0.png"],
        ["explained_0.png", "explained_1.png"],
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures of every kind, and of other files."""
    folder = tmp_path_factory.mktemp("pictures")
    values = np.random.default_rng(0).integers(0, 255, (90, 120), np.uint8)
    grey, exif = Image.fromarray(values), Image.Exif()
    for mode, suffix in (
        ("L", "png"),
        ("RGBA", "webp"),
        ("P", "png"),
        ("CMYK", "tif"),
        ("1", "bmp"),
    ):
        grey.convert(mode).save(folder / f"{mode}.{suffix}")
    Image.fromarray(values.astype(np.uint16) * 257).save(folder / "deep.png")
    exif[0x0112] = 6  # the camera was held upright
    grey.save(folder / "phone.jpg", exif=exif)
    grey.save(folder / "phone.png")  # the same name with another suffix
    grey.save(
        folder / "frames.gif", save_all=True, append_images=[grey.rotate(90), grey.rotate(180)]
    )
    grey.resize((1, 300)).save(folder / "$thin_{$.png")
    grey.resize((30, 20)).save(folder / "写真.png")
    (folder / "broken.jpg").write_bytes((folder / "phone.jpg").read_bytes()[:300])
    Image.fromarray(np.zeros((80, 90), np.float32)).save(folder / "float.tif")
    (folder / "notes.txt").write_text("no picture")
    grey.save(folder / ".hidden.png")
    (folder / "deeper").mkdir()
    grey.save(folder / "deeper" / "below.png")
    return folder


def test_pictures_of_every_kind_give_what_infer_gives(tiny, tiny_checkpoint, pictures, tmp_path):
    import matplotlib

    out = tmp_path / "out"
    ran = run_script("eval.py", tiny_checkpoint, "--images", pictures, "--range", 8, "--out", out)
    assert ran.status == 1 and ran.err.count("\n") == 2
    assert "broken.jpg" in ran.err and "float.tif" in ran.err
    stems = {"L", "RGBA", "P", "CMYK", "1", "deep", "phone", "phone_", "frames", "$thin_{$", "写真"}
    kinds = ("depth", "colour", "depth_mm", "std_mm")
    assert {path.name for path in out.iterdir()} == {f"{s}_{k}.png" for s in stems for k in kinds}
    (deep,) = (line for line in ran.out.splitlines() if "/deep.png: " in line)
    assert str(257 * int(cabins.read_picture(pictures / "L.png").max())) in deep  # its white
    (frames,) = (line for line in ran.out.splitlines() if "/frames.gif: " in line)
    assert " 3 " in frames and " 3 " not in deep  # the number of frames
    for name in ("phone.jpg", "phone.png", "deep.png", "RGBA.webp", "$thin_{$.png"):
        found = cabins.infer(tiny, pictures / name)
        start = f"{out}/{name.split('.')[0]}{'_' if name == 'phone.png' else ''}"
        for kind, values in (("depth", found.depth), ("std", found.std)):
            written = np.asarray(Image.open(f"{start}_{kind}_mm.png"))
            assert np.array_equal(written, (values * 1000).round())
        colours = matplotlib.colormaps["viridis"](found.depth / 8, bytes=True)[..., :3]
        assert np.array_equal(np.asarray(Image.open(f"{start}_colour.png")), colours)
    assert cabins.open_picture(out / "phone_depth_mm.png").size == (90, 120)  # upright
    with torch.autocast("cpu", torch.bfloat16):
        found = cabins.infer(tiny, pictures / "L.png")
    command = ("eval.py", tiny_checkpoint, "--images", pictures / "L.png", "--out", out)
    for amp, is_equal in (("bf16", True), ("off", False)):
        assert run_script(*command, "--amp", amp).status == 0
        written = np.asarray(Image.open(out / "L_std_mm.png"))
        assert np.array_equal(written, (found.std * 1000).round()) == is_equal


def test_what_folders_and_patterns_find(tiny_checkpoint, pictures, tmp_path, capsys):
    found, n_without = evaluation.find_pictures([str(pictures)])
    names, printed = {path.name for path in found}, capsys.readouterr().out
    assert n_without == 0 and len(names) == 13
    assert not names & {"notes.txt", ".hidden.png", "below.png", "deeper"}
    assert all(f"1 {reason}" in printed for reason in ("folder", ".txt", "hidden"))
    below, _ = evaluation.find_pictures([f"{pictures}/**"])
    assert {path.name for path in below} == names | {"below.png"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        evaluation.find_pictures([str(tmp_path / "empty")])
    command = ["eval.py", tiny_checkpoint, "--explain", "--out", tmp_path / "out", "--images"]
    assert run_script(*command, tmp_path / "empty", f"{pictures}/L.*").status == 1
    kinds = ("depth", "colour", "depth_mm", "std_mm", "explained")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"L_{k}.png" for k in kinds}


@pytest.mark.parametrize("suffix", ["avif", "heic"])
def test_pictures_of_phones_are_read_or_the_package_is_named(suffix, tiny_checkpoint, tmp_path):
    picture, path = Image.new("RGB", (90, 80), (200, 100, 50)), tmp_path / "in" / f"a.{suffix}"
    path.parent.mkdir()
    try:
        module = pytest.importorskip("PIL._avif") if suffix == "avif" else __import__("pillow_heif")
        module.from_pillow(picture).save(path) if suffix == "heic" else picture.save(path)
    except ImportError:
        path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    out = tmp_path / "out"
    ran = run_script("eval.py", tiny_checkpoint, "--images", path.parent, "--out", out)
    if path.stat().st_size > 112:
        assert cabins.open_picture(out / "a_depth_mm.png").size == (90, 80)
    else:
        assert ran.status == 1 and ran.err.count("\n") == 1 and "pillow-heif" in ran.err


def test_sixteen_bits_hold_every_range(tmp_path):
    for top, unit, scale in (
        (10, "_mm", 1000),
        (80, "_cm", 100),
        (700, "_dm", 10),
        (9999, "_m", 1),
    ):
        path = evaluation.write_depth(f"{tmp_path}/a", np.full((2, 2), top - 0.4), top, 1000)
        assert path == f"{tmp_path}/a{unit}.png"
        assert (np.asarray(Image.open(path)) == round((top - 0.4) * scale)).all()
    path = evaluation.write_depth(f"{tmp_path}/b", np.full((2, 2), 79.9), 80, 256)  # KITTI's
    assert path == f"{tmp_path}/b.png" and np.asarray(Image.open(path)).max() == round(79.9 * 256)


def test_options_that_would_do_nothing_are_refused(tiny_checkpoint, pictures):
    for mode, options in (
        (["--images", pictures], ["--workers 1", "--depth-scale 9", "--split a", "--no-flip"]),
        (["--explain"], ["--workers 1", "--max-depth 5", "--no-flip", "--range 5"]),
    ):
        for option in options:
            ran = run_script("eval.py", tiny_checkpoint, *mode, *option.split())
            assert ran.status == 1 and ran.err.count("\n") == 1
            assert option.split()[0].strip("-") in ran.err and not ran.out
