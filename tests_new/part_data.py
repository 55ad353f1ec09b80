from common import *

# ---- Sec. 4.1 and 4.2  Recipes and augmentation --------------------------------------------------


def test_recipes_crops_and_windows_are_the_papers():
    nyu, kitti, own, toy = (data.DATASETS[name] for name in ("nyu", "kitti", "list", "toy"))
    assert (nyu.max_depth, nyu.depth_scale, nyu.crop, nyu.focal) == (10, 1000, (416, 544), 518.86)
    assert (kitti.max_depth, kitti.depth_scale) == (80, 256)
    assert (kitti.crop, kitti.focal) == ((352, 704), 721.54)
    assert (own.max_depth, own.depth_scale, own.crop, own.focal) == (10, 1000, None, 518.86)
    assert (toy.max_depth, toy.crop, toy.focal) == (10, (96, 128), 100)
    assert data.fixed_crop("nyu", 480, 640, True) == (45, 472, 43, 608)
    assert data.fixed_crop("nyu", 480, 640, False) == (0, 480, 0, 640)
    for train_or_test in (True, False):
        assert data.fixed_crop("kitti", 376, 1241, train_or_test) == (24, 376, 12, 1228)
        assert data.fixed_crop("kitti", 352, 1216, train_or_test) == (0, 352, 0, 1216)
        assert data.fixed_crop("list", 64, 100, train_or_test) == (0, 64, 0, 100)
    windows = data.evaluation_windows("kitti", 376, 1241)
    assert list(windows) == ["nested", "full"]  # the paper's comes first
    assert windows["nested"] == (slice(143, 349), slice(43, 1172))
    assert windows["full"] == (slice(129, 348), slice(32, 1184))
    assert data.evaluation_windows("nyu", 480, 640) == {"eigen": (slice(45, 471), slice(41, 601))}
    assert data.evaluation_windows("toy", 96, 128) == {"whole": (slice(0, 96), slice(0, 128))}
    hashes = [sha256[:8] for sha256 in data.LISTS.values()]
    assert hashes == ["66e2beb7", "e92c191d", "dd5e51c2", "1a631c1b"]


def augmented(image, depth, crop, degrees, brightness, draws):
    """What the recipe makes of one sample and its ten random numbers, pixel by pixel."""
    (rows, columns), (h, w) = crop, depth.shape
    angle = math.radians(degrees) * (2 * draws[0] - 1)
    top, left = int(draws[1] * (h - rows + 1)), int(draws[2] * (w - columns + 1))
    new_image, new_depth = np.zeros((3, rows, columns)), np.zeros((rows, columns))
    padded = np.pad(image / 255, ((0, 0), (1, 2), (1, 2)))  # black outside
    for v, u in np.ndindex(rows, columns):
        x = left + (columns - 1 - u if draws[3] < 0.5 else u) - (w - 1) / 2
        y = top + v - (h - 1) / 2
        x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
        x, y = min(max(x + (w - 1) / 2, -1), w), min(max(y + (h - 1) / 2, -1), h)
        if 0 <= round(y) < h and 0 <= round(x) < w:
            new_depth[v, u] = depth[round(y), round(x)]
        i, j, b, a = int(y + 1), int(x + 1), (y + 1) % 1, (x + 1) % 1
        upper = (1 - a) * padded[:, i, j] + a * padded[:, i, j + 1]
        lower = (1 - a) * padded[:, i + 1, j] + a * padded[:, i + 1, j + 1]
        new_image[:, v, u] = (1 - b) * upper + b * lower
    if draws[4] < 0.5:
        gamma = 1 + 0.1 * (2 * draws[5] - 1)
        factor = (1 + brightness * (2 * draws[6] - 1)) * (1 + 0.1 * (2 * draws[7:] - 1))
        new_image = (new_image**gamma * factor[:, None, None]).clip(0, 1)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (new_image - mean) / std, new_depth


@pytest.mark.parametrize("name", ["nyu", "kitti", "list"])
def test_augmentation_is_one_rotation_crop_flip_and_colour(name):
    degrees, brightness = {"nyu": (2.5, 0.25), "kitti": (1, 0.1), "list": (2.5, 0.1)}[name]
    n, (h, w), crop = 8, (41, 64), (32, 48)
    image = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator(1))
    depth = torch.rand(n, 1, h, w, generator=generator(2)) * 10
    recipe = data.DATASETS[name]._replace(crop=crop)
    new_image, new_depth = data.augment(image, depth, recipe, generator(7))
    draws = torch.rand(n, 10, generator=generator(7)).numpy()
    assert {d < 0.5 for d in draws[:, 3]} == {d < 0.5 for d in draws[:, 4]} == {True, False}
    for i in range(n):
        sample = image[i].numpy(), depth[i, 0].numpy()
        expected = augmented(*sample, crop, degrees, brightness, draws[i])
        close(new_image[i], expected[0].astype(np.float32), 2e-4)
        assert (new_depth[i, 0].numpy() != expected[1].astype(np.float32)).sum() <= 2  # ties
    parts = [data.augment(image[i::2], depth[i::2], recipe, generator(7), (i, 2)) for i in (0, 1)]
    for i, part in enumerate(parts):  # each of two processes has every second sample
        assert torch.equal(part[0], new_image[i::2]) and torch.equal(part[1], new_depth[i::2])


CROPS = {
    ("nyu", 427, 565): (416, 544),
    ("kitti", 352, 1216): (352, 704),
    ("toy", 96, 128): (96, 128),
}
CROPS |= {("list", 240, 320): (192, 256), ("list", 64, 70): (64, 64)}  # 7/8, in multiples of 32


@pytest.mark.parametrize("name, height, width", CROPS)
def test_random_crops_have_the_recipes_size(name, height, width):
    image, depth = torch.zeros(1, 3, height, width).byte(), torch.ones(1, 1, height, width)
    new_image, new_depth = data.augment(image, depth, name)
    assert new_image.shape[2:] == new_depth.shape[2:] == CROPS[name, height, width]
    assert new_depth.mean() > 0.95  # little of the crop lies outside
    with pytest.raises(ValueError, match=f"{height} x 60"):
        data.augment(image[..., :60], depth[..., :60], data.DATASETS[name])


# ---- Sec. 4.2  Data sets -------------------------------------------------------------------------


def test_toy_rooms_are_exact_and_reproducible():
    image, depth = data.draw_room(5)
    assert image.shape == (96, 128, 3) and image.dtype == np.uint8 and depth.shape == (96, 128)
    close(depth[[0, 0, 48, 95, 95], [0, 127, 64, 0, 127]], [2.639, 2.6675, 1.0717, 0.9598, 2.1194])
    close(image.mean((0, 1)), np.array([139.385, 139.15, 101.939]))
    far = data.draw_room(1_000_003)[1]
    close(np.array([far.mean(), far.std()]), np.array([3.394707, 2.210337]))
    # walls are planes, on which 1 / depth is linear in the pixel: the second difference is zero
    assert (np.abs(np.diff(1 / depth.astype(np.float64), n=2, axis=1)) < 1e-5).mean() > 0.7
    train_set, test_set = data.DepthDataset("toy", train=True), data.DepthDataset("toy")
    assert len(train_set) == 640 == len({*train_set.pairs, *test_set.pairs}) - 64
    assert torch.equal(train_set[5]["image"], torch.from_numpy(image).permute(2, 0, 1))
    assert test_set[0]["image"].dtype == torch.float32
    assert (train_set.checksum, test_set.checksum) == (1003203007, 1206272431)  # as in old runs


def test_files_are_found_in_any_folder_with_few_looks(tmp_path, monkeypatch):
    looks, is_file = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looks.append(path) or is_file(path))
    image, depth = "2011_09_26/{0}_sync/image_02/data/{1}", "{0}_sync/groundtruth/image_02/{1}.png"
    lines = []
    for i in range(60):
        drive, part = f"2011_09_26_drive_{i // 10:04}", "val" if i // 10 == 5 else "train"
        found = [tmp_path / "raw" / f"{image.format(drive, i)}.png"]
        found += [tmp_path / "data_depth_annotated" / part / depth.format(drive, i)]
        for path in found:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        lines.append(f"{image.format(drive, i)}.jpg {depth.format(drive, i)} 721.5\n")
    (tmp_path / "list.txt").write_text("".join([*lines, "a.jpg None 721.5\n"]))
    kitti = data.DepthDataset("kitti", tmp_path, tmp_path / "list.txt")
    assert len(kitti) == 60 and kitti.n_left_out == 1
    assert kitti.pairs[-1] == tuple(map(str, found))
    assert len(looks) < 3 * 60  # there are 28 folders and 4 suffixes


def test_a_pair_of_nyu(tmp_path):
    write_pair(tmp_path / "sync" / "kitchen", "1", depth=12_000)  # truth beyond 10 m counts
    split = tmp_path / "list.txt"
    split.write_text("\ufeff/kitchen/rgb_1.png /kitchen/sync_depth_1.png 518.8579\r\n\r\n")
    pixels = cabins.read_picture(tmp_path / "sync" / "kitchen" / "rgb_1.jpg")
    pixels = torch.tensor(pixels).permute(2, 0, 1)
    pair = data.DepthDataset("nyu", tmp_path, split, train=True)[0]
    assert torch.equal(pair["image"], pixels[:, 45:472, 43:608])
    assert pair["depth"].shape == (1, 427, 565) and pair["depth"].unique().tolist() == [12]
    pair = data.DepthDataset("nyu", tmp_path, split)[0]
    close(data.denormalize(pair["image"]), pixels / 255)
    assert pair["depth"].shape == (1, 480, 640) and pair["size"].tolist() == [480, 640]


def test_nyus_test_pairs_come_from_the_mat(tmp_path, monkeypatch):
    arrays = {"images": np.random.default_rng(0).integers(1, 256, (3, 3, 640, 480), np.uint8)}
    arrays["rawDepths"] = np.random.default_rng(1).random((3, 640, 480), np.float32) + 1
    mat, split = tmp_path / data.NYU_MAT, tmp_path / "list.txt"
    try:
        import h5py

        with h5py.File(mat, "w") as file:
            file.update(arrays)
    except ImportError:  # it is optional
        mat.touch()
        fake = {"File": staticmethod(lambda path: contextlib.nullcontext(arrays))}
        monkeypatch.setitem(sys.modules, "h5py", type("h5py", (), fake))
    split.write_text("bath/rgb_00002.jpg bath/sync_depth_00002.png 518.8579\n")
    frame = np.s_[..., 7:474, 7:632]
    sample = data.DepthDataset("nyu", tmp_path, split)[0]
    assert torch.equal(sample["depth"][0], torch.from_numpy(arrays["rawDepths"][2].T))
    image = (data.denormalize(sample["image"]) * 255).round()
    assert torch.equal(image[frame], torch.tensor(arrays["images"][2]).mT[frame])
    assert (image > 0).sum() == 3 * 467 * 625  # the border is black
    with pytest.raises(FileNotFoundError):
        data.DepthDataset("nyu", tmp_path, split, train=True)
    split.write_text(write_pair(tmp_path / "bath", "00001"))  # files that are there come first
    assert data.DepthDataset("nyu", tmp_path, split).pairs[0][0].endswith("rgb_00001.jpg")
    split.write_text("bath/rgb_00003.jpg bath/sync_depth_00003.png 518.8579\n")
    with pytest.raises(ValueError, match=r"3 of .*labeled\.mat"):
        data.DepthDataset("nyu", tmp_path, split)[0]


def test_own_pairs_have_a_scale_a_range_and_one_size(own_pairs):
    root, split = own_pairs, own_pairs / "train.txt"
    own = data.DepthDataset("list", root, split, True, depth_scale=500, max_depth=4)
    assert own.size_to_train == (96, 128) and own.recipe.focal == 518.8579
    assert [own[i]["depth"].max() for i in range(4)] == [2, 3, 4, 0]  # 5 m is above the range
    shallow, deep = (data.DepthDataset("list", root, split, False, 500, m) for m in (2, 50))
    assert data.has_truth(own) and not data.has_truth(shallow)  # 2 m is not inside the range
    about = data.describe(own)
    assert all(known in about for known in ("500", "4 m", "25.0%", "3.50 m", "5.00 m"))
    is_odd = ["--max-depth" in data.describe(some) for some in (own, shallow, deep)]
    assert is_odd == [False, True, False]  # the median is 3.5 m, the range ends at 4, 2 and 50 m
    # an absolute path below the root works, and a list without focal lengths gets NYU's camera
    split.write_text(f"{root}/rooms/rgb_0.jpg {root}/rooms/sync_depth_0.png\n")
    own = data.DepthDataset("list", root, split, train=True)
    assert own[0]["depth"].unique().tolist() == [1] and own.recipe.focal == 518.86 * 128 / 640
    write_pair(root / "rooms", "small", 80, 128)
    split.write_text(split.read_text() + "rooms/rgb_small.jpg rooms/sync_depth_small.png\n")
    with pytest.raises(ValueError, match=r"rgb_small\.jpg .*80, 128.*96, 128"):
        data.DepthDataset("list", root, split, train=True)[1]
    assert data.DepthDataset("list", root, split)[1]["depth"].shape == (1, 80, 128)


def test_what_is_missing_is_named(own_pairs):
    root, split = own_pairs, own_pairs / "test.txt"
    (root / "rooms" / "rgb_5.jpg").unlink()
    for name in ("list", "nyu"):
        with pytest.raises(FileNotFoundError, match=r"rooms/rgb_5\.jpg.*1 of the 4.*data\.md"):
            data.DepthDataset(name, root, split)
    with pytest.raises(ValueError, match=r"--test-split .*none\.txt"):
        data.DepthDataset("list", root, root / "none.txt")


def test_images_of_own_lists_are_upright(own_pairs):
    image = np.random.default_rng(0).integers(0, 255, (128, 96, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (own_pairs / "rooms" / "rgb_4.jpg").unlink()
    Image.fromarray(image).save(own_pairs / "rooms" / "rgb_4.png", exif=exif)
    found, _, path = data.DepthDataset("list", own_pairs, own_pairs / "test.txt").read(0)
    assert path.endswith("rgb_4.png") and np.array_equal(found, np.rot90(image, -1))


def test_depth_in_another_format_is_refused_with_what_to_save(own_pairs):
    np.save(own_pairs / "depth.npy", np.ones((96, 128)))
    (own_pairs / "test.txt").write_text("rooms/rgb_0.jpg depth.npy\n")
    with pytest.raises(ValueError, match=r"depth\.npy.*16-bit.*1000"):
        data.DepthDataset("list", own_pairs, own_pairs / "test.txt")[0]


SIZES = [("nyu", (480, 641)), ("kitti", (352, 1215)), ("kitti", (351, 1216)), ("list", (63, 96))]


@pytest.mark.parametrize("name, size", SIZES)
def test_images_of_a_wrong_size_are_refused(name, size, tmp_path):
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "rooms", "1", *size))
    for is_training in (True, False):
        with pytest.raises(ValueError, match=rf"rgb_1\.jpg.*{size[0]}, {size[1]}"):
            data.DepthDataset(name, tmp_path, tmp_path / "list.txt", is_training)[0]


def test_the_check_reads_every_pair(own_pairs):
    lists = ["--train-split", own_pairs / "train.txt", "--test-split", own_pairs / "test.txt"]
    ran = run_script("data.py", "list", "--root", own_pairs, *lists)
    assert ran.status == 0 and "train: 4 pairs" in ran.out and "test: 2 pairs" in ran.out
    write_pair(own_pairs / "rooms", "2", 80, 128)
    ran = run_script("data.py", "list", "--root", own_pairs, *lists)
    assert ran.status == 1 and ran.err.count("\n") == 1 and "rgb_2.jpg" in ran.err


# ---- What all scripts share ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_is_one_sentence_and_a_bug_is_not(workers, own_pairs):
    (own_pairs / "rooms" / "rgb_4.jpg").write_bytes(b"broken")
    own = data.DepthDataset("list", own_pairs, own_pairs / "test.txt")
    with pytest.raises(SystemExit, match=r"^error: .*rgb_4\.jpg cannot be read.*") as stop:
        data.run_command(lambda: next(iter(data.load(own, workers=workers))))
    assert "\n" not in stop.value.code and "Caught" not in stop.value.code
    with pytest.raises(RuntimeError, match="size"):
        data.run_command(lambda: torch.zeros(2) @ torch.zeros(3))


@pytest.mark.parametrize("cores, processes, workers", [(64, 1, 8), (4, 1, 3), (8, 2, 3), (1, 1, 0)])
def test_workers_follow_the_cores_and_gpus_get_pinned(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(data, "DataLoader", lambda dataset, **options: options)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    options = data.load("rooms", torch.device("cuda"), batch_size=2)
    assert options["num_workers"] == workers and options["batch_size"] == 2
    assert options["pin_memory"] and not data.load("rooms", torch.device("cpu"))["pin_memory"]
    assert data.load("rooms", workers=5)["num_workers"] == 5


def test_rows_of_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    data.append_row(path, {"a": 1, "b": "x, y"})
    data.append_row(path, {"a": 2, "b": None})
    assert path.read_text() == 'a,b\n1,"x, y"\n2,\n'
    data.check_columns(path, ["a", "b"])
    with pytest.raises(ValueError, match=r"rows\.csv"):
        data.check_columns(path, ["a", "c"])


def fail(error: Exception):
    raise error


def test_what_the_machine_lacks_is_one_sentence_with_the_remedy():
    worker = "DataLoader worker (pid 7) is killed by signal: "
    remedies = {
        RuntimeError(f"{worker}Bus error."): "--ipc=host",
        RuntimeError("unable to write to file </torch_7>: No space left"): "--shm-size",
        RuntimeError(f"{worker}Killed."): "--workers",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes\nat x"): "smaller",
        MemoryError(): "smaller",
    }
    for error, remedy in remedies.items():
        with pytest.raises(SystemExit) as stop:
            data.run_command(lambda error=error: fail(error))
        assert stop.value.code.startswith("error: ") and stop.value.code.count("\n") == 0
        assert remedy in stop.value.code and ("ipc" in stop.value.code) == (
            remedy[:4] in ("--ip", "--sh")
        )
