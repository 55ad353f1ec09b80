from common import *

# ---- Wrong commands: one sentence, which names the file or the option ----------------------------


class Evil:  # which pickle would build by running a command
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder of good files, and of broken ones that are named after what is wrong with them."""
    root = tmp_path_factory.mktemp("broken")
    folder = root / "a"
    good = write_pair(folder, "1", 96, 128)
    write_pair(folder, "narrow", 80, 128)
    write_pair(folder, "small", 48, 64)
    write_pair(folder, "zero", 96, 128, depth=0)
    jpg, png = (folder / "rgb_1.jpg").read_bytes(), (folder / "sync_depth_1.png").read_bytes()
    images = {"cut": jpg[:500], "void": b"", "text": b"no picture", "closed": jpg}
    depths = {"cutdepth": png[:60], "jpeg": jpg}
    for name, content in (images | depths).items():
        (folder / name).write_bytes(content)
    (folder / "closed").chmod(0)
    (folder / "loop").symlink_to(folder / "loop")
    for name, mode in (("8bit", "L"), ("colours", "RGB"), ("real", "F")):
        Image.new(mode, (128, 96)).save(folder / f"{name}.tif")
    lists = {name: f"a/{name} a/sync_depth_1.png 1" for name in (*images, "loop", "gone")}
    lists |= {name: f"a/rgb_1.jpg a/{name} 1" for name in depths}
    lists |= {name: f"a/rgb_1.jpg a/{name}.tif 1" for name in ("8bit", "colours", "real")}
    for name in ("narrow", "small", "zero"):
        lists[name] = f"a/rgb_{name}.jpg a/sync_depth_{name}.png 1\n"
    lists |= {"good": good, "rgb_narrow": good + lists.pop("narrow"), "nothing": ""}
    lists |= {"depth_narrow": "a/rgb_1.jpg a/sync_depth_narrow.png 1", "nonsense": f"{good}x"}
    lists |= {"spaces": "my room/rgb.jpg my room/d.png 1", "outside": "../a/1.jpg ../a/1.png 1"}
    lists["notruth"] = "a/rgb_1.jpg None"
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "nyu.mat").write_text("no HDF5")
    for name in ("pictures", "empty", "run", "csv"):
        (root / name).mkdir()
    (root / "pictures" / "a.jpg").write_bytes(jpg)
    (root / "csv" / "results.csv").write_text("label,other\n")
    # checkpoints
    torch.manual_seed(0)
    cabins.save_checkpoint(root / "tiny.pt", cabins.CaBins(TINY))
    content = torch.load(root / "tiny.pt", weights_only=True)
    config, state = content["config"], content["model"]
    nan = state | {"prompts": state["prompts"] * math.nan}
    clip = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    run = {"args": vars(train.parse_args([])[0]), "lists": [0, 0], "step": 1}
    files = {"newer": content | {"config": config | {"n_heads": 4}}}
    files["shapes"] = content | {"config": config | {"n_bins": 128}}
    files["setting"] = content | {"config": config | {"backbone": "RN102"}}
    files |= {"noconfig": content | {"config": ["tiny"]}, "args": content | {"args": ["toy"]}}
    files |= {"nan": content | {"model": nan}, "numbers": {"model": {"prompts": 1}}, "list": [1, 2]}
    files |= {"state": content | run | {"optimizer": {}, "scheduler": {}}, "clip": clip}
    files |= {"other": {"state_dict": {"a": torch.zeros(1)}}, "evil": {"model": state, "a": Evil()}}
    files["theirs"] = {"model": {"module.contexts": torch.zeros(1, 8, 512)}}
    files["less"] = {k: v for k, v in clip.items() if k != "visual.bn1.bias"}
    files["noclip"] = {k: v for k, v in clip.items() if k.startswith("visual.")}
    for name, value in files.items():
        torch.save(value, root / f"{name}.pt")
    with zipfile.ZipFile(root / "script.pt", "w") as archive:  # as TorchScript's are
        archive.writestr("script/data.pkl", pickle.dumps(Evil()))
        archive.writestr("script/constants.pkl", pickle.dumps(()))
    whole = bytearray((root / "tiny.pt").read_bytes())
    (root / "cut.pt").write_bytes(whole[:100_000])
    whole[len(whole) // 2] ^= 1
    (root / "bit.pt").write_bytes(whole)
    (root / "text.pt").write_text("not a network")
    shutil.copy(root / "tiny.pt", root / "run" / "last.pt")
    return root


LIST = "data.py list --root . --train-split good.txt --test-split"
TRAIN = "train.py --data list --root . --backbone tiny --out out --batch-size 1"
TRAIN += " --test-split good.txt --train-split"
# Each command is its beginning and one of these ends. What the sentence must name is in brackets.
WRONG = {
    "data.py": """
        [nyu] | [moon] --root . | [list] --root . | toy [--root] . | toy [--rot] .
        | toy --out [tiny.pt] | nyu --root [none] --test-split good.txt --train-split good.txt
        | nyu --root . --train-split [small].txt | kitti --root . --train-split [small].txt
        | nyu --root [nyu.mat] --test-split good.txt""",
    LIST: """
        [none.txt] | [a] | [binary.txt] | nothing.txt [] | notruth.txt [] | [nonsense].txt
        | [spaces.txt] | [outside.txt] | [gone].txt | [loop].txt | [cut].txt | [void].txt
        | [text].txt | [closed].txt | [cutdepth].txt | [jpeg].txt | [8bit].txt
        | [colours].txt | [real].txt | [depth_narrow].txt | [small].txt
        | good.txt [--depth-scale] 0 | good.txt [--max-depth] nan | good.txt [--max-depth] ten""",
    "train.py": """
        [--epochs] 0 | [--batch-size] -1 | [--batch-size] 1.5 | [--lr] nan | [--lr] 0 | [--seed] -1
        | [--root] . | [--depth-scale] 10 | [--max-depth] -3 | [--workers] -1 --out out
        | --data [moon] | --data [kitti] | --data nyu --root [none] --train-split good.txt
        | --backbone [RN102] | --distance-class [mode] | --amp [fp16] | [--epoch-length] 3
        | [--batch-size] 1000 --out out | --out [run] | --out [tiny.pt] | --device [mps]
        | --resume [none.pt] | --resume --out [out] | --resume [tiny.pt] | --resume [args.pt]
        | --resume [state.pt] | --resume [evil.pt] | --init [none.pt] --out out
        | --init tiny.pt [--backbone] RN50 --out out | --init tiny.pt [--clip] RN50 --out out
        | --init [cut.pt] --out out | --clip clip.pt --backbone [RN50] --out out""",
    TRAIN: """
        [cut].txt | nothing.txt [] | [8bit].txt | [depth_narrow].txt | [rgb_narrow].txt
        | [small].txt | good.txt --clip [none.pt] | good.txt --clip [a] | good.txt --clip [text.pt]
        | good.txt --clip [other.pt] | good.txt --clip [less.pt] | good.txt --clip [noclip.pt]
        | good.txt --clip [evil.pt] | good.txt --clip [script.pt]""",
    "eval.py": """
        [none.pt] | [a] | [cut.pt] | [bit.pt] | [text.pt] | [args.pt] | [list.pt] | [other.pt]
        | [numbers.pt] | [newer.pt] | [shapes.pt] | [setting.pt] | [noconfig.pt] | [nan.pt]
        | [evil.pt] | [script.pt] | [theirs.pt] | [tiny.pt] | theirs.pt --released [moon]""",
    "eval.py tiny.pt": """
        [--released] nyu | --data [nyu] | --data [moon] | --data toy [--root] .
        | --data toy [--train-split] good.txt | --data toy --device [cuda] | --data toy --amp [half]
        | --data list --root . --split [none.txt] | --data list --root . --split [cut].txt
        | --data list --root . --split zero.txt [] | --data list --root . --split [small].txt
        | --data toy --out [tiny.pt] | --data toy --out [csv] | --data toy [--range] 10
        | --data toy [--explain] 0 | --data toy [--explain] two | --data toy [--max-depth] 0
        | --data toy --explain [--no-flip] | --data toy [--ablate]
        | --images [none.png] | --images [empty] | --images pictures --out [pictures]
        | --images pictures --out [tiny.pt] | --images pictures --out [tiny.pt]/a
        | --images pictures [--range] 0 | --images pictures [--no-flip]
        | --images pictures [--root] . | --images pictures [--data] toy
        | --images pictures [--explain] 2 | --images pictures [--max-depth] 5""",
}
COMMANDS = [" ".join([start, *end.split()]) for start in WRONG for end in WRONG[start].split("|")]


def files_below(folder: Path) -> dict[str, tuple]:
    paths = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_wrong_command_says_why_and_changes_no_file(command, broken, few_rooms, monkeypatch):
    monkeypatch.chdir(broken)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # and no worker, which takes long to start
    if "closed" in command and os.access("a/closed", os.R_OK):
        pytest.skip("this user may read everything")
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before, words = files_below(broken), re.sub(r"\[\]|[][]", "", command).split()
    files = [word for word in words if word.endswith((".txt", ".pt")) and "none" not in word]
    assert all(Path(file).exists() for file in files)
    ran = run_script(*words)
    assert ran.status == 1 and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert re.search(r"\[(.*?)\]", command)[1] in ran.err and "Traceback" not in ran.err
    assert files_below(broken) == before
