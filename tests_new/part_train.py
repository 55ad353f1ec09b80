from common import *
from part_paper import made_truth, released, their_name  # noqa: F401

# ---- Sec. 4.1  The recipe ------------------------------------------------------------------------


def new_learner(**options):
    """A tiny network with its optimizer, and a batch of two random images."""
    torch.manual_seed(0)
    model = cabins.CaBins(TINY).train()
    learner = train.Learner(model, data.DATASETS["toy"], 100, **{"lr": 1e-3} | options)
    image = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator())
    depth = torch.rand(2, 1, 96, 128, generator=generator()) * 9 + 0.5
    return learner, {"image": image, "depth": depth}


@pytest.mark.parametrize("as_released", [False, True])
def test_the_optimizer_has_every_trained_parameter_once(as_released):
    learner, _ = new_learner(as_released=as_released)
    names = {id(p): name for name, p in learner.model.named_parameters()}
    found = [names[id(p)] for group in learner.optimizer.param_groups for p in group["params"]]
    text = {n for n in names.values() if re.match(r"clip\.(?!visual)", n)}
    never = {"prompts", "trans_decoder.gamma"} | text - {"clip.token_embedding.weight"}
    assert len(found) == len(set(found))
    assert set(found) == set(names.values()) - (never if as_released else text)


def test_the_rate_and_the_momentum_follow_one_cycle():
    learner, _ = new_learner()
    rates, momenta = [], []
    for _ in range(100):
        learner.optimizer.step()
        rates.append(learner.optimizer.param_groups[0]["lr"])
        momenta.append(learner.optimizer.param_groups[-1]["betas"][0])
        learner.scheduler.step()
    rise = (1 - math.cos(math.pi * 14 / 29)) / 2  # in step 14 of 29, of 1 - 1/25
    expected = [1 / 25, 0.04 + 0.96 * rise, 1, 0.5002, 1 / 2500]
    assert [1e3 * rates[i] for i in (0, 14, 29, 64, 99)] == pytest.approx(expected)
    assert [momenta[i] for i in (0, 29, 64, 99)] == pytest.approx([0.95, 0.85, 0.9, 0.95])


def test_a_step_is_adamws_with_a_weight_decay_of_a_tenth_and_clipped_gradients():
    """Also for convolutions, whose fused kernel needs gradient and weight in one memory order."""
    learner, batch = new_learner(lr=1e-2)
    before = [p.detach().clone() for p in learner.model.parameters()]
    norm, lr, squares = learner.step(batch, 1)[2][1], 1e-2 / 25, 0.0
    for p, old in zip(learner.model.parameters(), before):
        if p.grad is not None:
            squares += p.grad.square().sum().item()
            expected = old * (1 - lr * 0.1) - lr * p.grad / (p.grad.abs() + 1e-8)  # Adam's first
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
    assert norm > 0.1 and math.sqrt(squares) == pytest.approx(0.1, rel=1e-3)
    assert {group["betas"][1] for group in learner.optimizer.param_groups} == {0.999}


@pytest.mark.parametrize("as_released", [False, True])
def test_silogs_variance_and_gradients_that_pile_up_are_as_released_only(as_released):
    learner, batch = new_learner(as_released=as_released)
    prompts, start = learner.model.prompts, learner.model.prompts.detach().clone()
    prompts.grad = torch.full_like(prompts, 1e6)  # of earlier steps
    batch["depth"][:, :, 1:] = 0  # in 256 valid pixels the two variances differ by 0.4 %
    prediction, depth, (loss, norm) = learner.step(batch, 1)
    expected = cabins.total_loss(prediction, depth, 1e-3, as_released)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (norm > 1e6) == torch.equal(prompts, start) == as_released


def test_defaults_are_the_papers_and_as_released_starts_from_large_prompts(quick, tmp_path):
    args, _ = train.parse_args(["--data", "nyu", "--root", "."])
    assert (args.lr, args.epochs, args.batch_size, args.backbone) == (3.57e-5, 25, 8, "RN101")
    for options, std, amp in (("--amp bf16", 0.02, "bf16"), ("--as-released", 0.88, "off")):
        run = train.Run(*train.parse_args(["--out", str(tmp_path / amp), *options.split()]))
        assert run.learner.model.prompts.std().item() == pytest.approx(std, rel=0.1)
        assert run.args.amp == amp and run.n_steps == 3 * 1  # of eight rooms
        is_bf16 = run.learner.amp._enabled and run.learner.amp.fast_dtype == torch.bfloat16
        assert is_bf16 == (amp == "bf16") and run.learner.as_released == (amp == "off")
    quick.setattr(data, "rank_of", lambda: (1, 2))
    quick.setitem(data.TOY_ROOMS, "train", range(9))  # the last batch, of one, is kept as released
    for options in ("--batch-size 3", "--batch-size 4 --as-released"):
        with pytest.raises(ValueError, match="processes"):
            train.Run(*train.parse_args([*options.split(), "--out", str(tmp_path)]))


def test_pairs_are_shuffled_in_each_epoch_and_training_can_start_anywhere(monkeypatch):
    whole = list(train.batches(10, 3, range(9), 0, False))
    assert whole[:2] == [[7, 0, 9], [2, 1, 3]]
    assert whole[4:] == list(train.batches(10, 3, range(4, 9), 0, False))
    epochs = [{i for batch in whole[k : k + 3] for i in batch} for k in (0, 3, 6)]
    assert [len(epoch) for epoch in epochs] == [9, 9, 9] and whole[:3] != whole[3:6] != whole[6:]
    assert list(train.batches(10, 3, range(3), 1, False)) != whole[:3]
    kept = list(train.batches(10, 4, range(6), 0, True))  # as released: the last batch, one order
    assert [len(batch) for batch in kept] == [4, 4, 2] * 2 and kept[:3] == kept[3:]
    for rank in (0, 1):
        monkeypatch.setattr(data, "rank_of", lambda rank=rank: (rank, 2))
        share = list(train.batches(10, 4, range(6), 0, True))
        assert share == [batch[rank::2] for batch in kept]


def test_dropout_and_augmentation_depend_on_seed_step_and_process_alone(monkeypatch):
    (learner, batch), seeds = new_learner(), []
    nn.init.ones_(learner.model.trans_decoder.gamma)  # or dropout would hardly change the texts

    def augment(image, depth, recipe, generator, share):
        seeds.append(generator.initial_seed())
        return image / 255, depth

    monkeypatch.setattr(data, "augment", augment)
    maps = []
    for number, learner.rank, learner.seed in (
        (1, 0, 0),
        (1, 0, 0),
        (1, 1, 0),
        (2, 0, 0),
        (1, 0, 1),
    ):
        maps.append(learner.forward(batch, number)[0].similarity)
    assert [torch.equal(maps[0], other) for other in maps[1:]] == [True, False, False, False]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds)) == 3  # not of the process


class NothingRead(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what makes a GPU's host wait: reading a value, or a size that depends on one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        assert not operation.__name__.startswith(reads), operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_does_not_wait_for_the_device(amp):
    learner, batch = new_learner(amp=amp)
    with NothingRead():
        result = learner.step(batch, 1)[2]
        with pytest.raises(AssertionError):
            result[0].item()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 asks the driver, even so")
@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_on_a_gpu_that_is_not_here(amp, dtype, monkeypatch):
    """Devices and types of the forward pass and the loss of a step. No kernel runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def grid_sample(x, grid, *_, **__):  # has no fake kernel for CUDA
        assert x.device == grid.device
        return x.new_empty(*x.shape[:2], *grid.shape[1:3])

    monkeypatch.setattr(F, "grid_sample", grid_sample)
    # without these two, torch warns and leaves bf16 autocast switched off
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    (learner, batch), mode, device = new_learner(), FakeTensorMode(), torch.device("cuda")
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, **_: x)  # reads values
    monkeypatch.setattr(cabins.CaBins, "to", lambda model, **_: model)  # of the layout in memory
    with mode, device:  # all that is made is on the GPU
        learner.model = learner.network = cabins.CaBins(TINY)
    learner.device, learner.amp, types = device, data.autocast(device, amp), []
    features = learner.model.depth_decoder.features
    features.register_forward_hook(lambda layer, inputs, output: types.append(output.dtype))
    with mode:
        batch = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in batch.items()}
        prediction, depth, loss = learner.forward(batch, 1)
    assert {x.device.type for x in (*prediction, depth, loss)} == {"cuda"}
    assert {x.dtype for x in (*prediction, loss)} == {torch.float32} and types == [dtype]


ROWS = ["RN101 cabins", "RN50 semantic", "RN50 median", "RN50 mean", "RN50 cabins --as-released"]


@pytest.mark.parametrize("row", [*ROWS, "ViT-B/16 cabins"])  # of Tables 1 to 4
def test_every_row_of_the_tables_trains(row, quick, tmp_path):
    """Two steps, validation and reloading, of each network at a reduced width."""
    backbone, kind, *option = row.split()
    small = cabins.BACKBONES[backbone]
    small = small._replace(embed_dim=32, width=64 if small.is_vit else 2)
    small = small._replace(text_width=64, text_layers=1)
    quick.setitem(cabins.BACKBONES, backbone, small)
    option += ["--backbone", backbone, "--distance-class", kind, "--clip", "none"]
    assert run_train("--epochs", 1, "--batch-size", 4, *option, "--out", tmp_path).status == 0
    model = cabins.load_checkpoint(tmp_path / "last.pt")
    assert (model.config.backbone, model.config.distance_class) == (backbone, kind)
    log = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    assert len(log) == 2 and np.isfinite(log["loss"]).all()


@needs_goldens
def test_the_released_training_loop(released, monkeypatch):  # noqa: F811
    golden = json.loads((GOLDENS / "train_nyu.json").read_text())
    model = cabins.load_checkpoint(released, max_depth=10.0).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    monkeypatch.setattr(data, "augment", lambda image, depth, *_: (image, depth))
    n_steps, nyu = golden["n_steps_of_schedule"], data.DATASETS["nyu"]
    learner = train.Learner(model, nyu, n_steps, golden["lr"], as_released=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"image": torch.from_numpy(normal("image", (2, 3, 96, 128))), "depth": made_truth()}
    for number, known in enumerate(golden["steps"]):
        assert learner.scheduler.get_last_lr()[0] == pytest.approx(known["lr"][0], rel=1e-6)
        loss, norm = learner.step(batch, number)[2].tolist()
        assert loss == pytest.approx(known["loss"], rel=1e-2 if number else 1e-4)
        assert norm == pytest.approx(known["grad_norm"], rel=0.4 if number else 1e-2)
    after = {their_name(k): (v - before[k]).norm() for k, v in model.state_dict().items() if v.ndim}
    for name, moved in golden["moved_norm"].items():
        assert after.get(name, torch.zeros(())).item() == pytest.approx(moved, rel=0.08), name


# ---- Runs: several processes, interruptions, folders ---------------------------------------------


@contextlib.contextmanager
def short_runs():
    """Runs of eight steps, each of them logged and saved, without figures."""
    with pytest.MonkeyPatch.context() as patch:
        rooms = {"train": range(8), "test": range(1_000_000, 1_000_002)}
        patch.setattr(data, "TOY_ROOMS", rooms)
        for name, value in (("LOG_EVERY", 1), ("SAVE_EVERY", 0), ("draw_curves", lambda _: None)):
            patch.setattr(train, name, value)
        patch.setattr(evaluation, "draw_samples", lambda *_: None)
        yield patch


@pytest.fixture
def quick():
    with short_runs() as patch:
        yield patch


SCRIPT = f"""
import sys
sys.path[:0] = {sys.path}
from {__name__} import *
if "--distance-class" in sys.argv:
    # a process would have the statistics of its own images, which torch joins on GPUs only
    nn.BatchNorm2d.forward = lambda self, x: F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias)
    nn.Dropout.forward = lambda self, x: x
with short_runs():
    data.run_command(train.main)
"""


def test_two_processes_learn_what_one_learns(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    # phrases as prompts: a number on the edge between two decimals could be written in two ways
    options = ["--distance-class", "semantic", "--epochs", "2", "--batch-size", "4"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 180}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    folders = []
    for start in ([], torchrun):
        folders.append(tmp_path / f"out{len(start)}")
        command = [sys.executable, *start, "script.py", *options, "--workers", "0", "--out"]
        ran = subprocess.run([*command, folders[-1]], cwd=tmp_path, check=False, **how)
        assert ran.returncode == 0, ran.stdout
        assert ran.stdout.count("epoch 2/2") == 1  # only the first process speaks
    for file, n_rows in (("log.csv", 4), ("metrics.csv", 2)):
        tables = [np.genfromtxt(f / file, delimiter=",", skip_header=1) for f in folders]
        assert len(tables[0]) == n_rows
        np.testing.assert_allclose(*tables, rtol=1e-5)
    one, two = (cabins.read_checkpoint(folder / "last.pt")["model"] for folder in folders)
    for name, tensor in one.items():
        if tensor.is_floating_point():  # Adam makes a step out of the rounding of a tiny gradient
            difference = (two[name] - tensor).abs()
            assert difference.mean() < 1e-6 and difference.max() < 2e-4, name


EIGHT_STEPS = ("--epochs", 2, "--batch-size", 2)


def run_train(*options, stop=None) -> Ran:
    """Run train.py; `stop` is a step and the signal that comes before it."""
    take = train.Learner.step

    def step(learner, batch, number):
        assert torch.get_float32_matmul_precision() == "high"  # TF32, on a GPU
        if stop and number == stop[0]:
            os.kill(os.getpid(), stop[1])
        return take(learner, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "stops", [])
        patch.setattr(train.Learner, "step", step)
        return run_script("train.py", "--workers", 0, *options)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """The folder of a run of eight steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with short_runs():
        assert run_train(*EIGHT_STEPS, "--out", out).status == 0
    return out


def same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, best metric and tables are equal to the last bit."""
    for name in ("last.pt", "best.pt"):
        contents = [cabins.read_checkpoint(folder / name) for folder in (one, other)]
        for content in contents:
            del content["args"]  # which name their folders
        leaves = [torch.utils._pytree.tree_flatten_with_path(content)[0] for content in contents]
        assert len(leaves[0]) == len(leaves[1]) > 250
        for (path, a), (_, b) in zip(*leaves):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path
    for file in ("log.csv", "metrics.csv"):
        assert (one / file).read_text() == (other / file).read_text(), file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_has_done_its_step_and_goes_on_exactly(number, whole_run, quick, tmp_path):
    first, second = tmp_path / "a" / "last.pt", tmp_path / "b"
    ran = run_train(*EIGHT_STEPS, "--out", first.parent, stop=(6, number))
    assert ran.status == 128 + number and cabins.read_checkpoint(first)["step"] == 6
    content = torch.load(first, weights_only=True)
    content["args"]["ply"] = content["args"].pop("workers")  # options come and go with versions
    torch.save(content, first)
    assert run_train("--resume", first, "--out", second).status == 0
    same_run(second, whole_run)  # with the best network and the tables of the first half


def test_a_folder_has_one_run_until_that_is_killed_and_then_goes_on(whole_run, quick, tmp_path):
    options = map(str, (*EIGHT_STEPS, "--workers", 1, "--out", tmp_path))
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, *options])
    deadline, last = time.monotonic() + 120, tmp_path / "last.pt"
    while not (last.exists() and Path(f"{last}.partial").exists()):  # in the middle of saving
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGSTOP)
    for options in (["--resume"], EIGHT_STEPS):
        ran = run_train(*options, "--out", tmp_path)
        assert ran.status == 1 and str(tmp_path) in ran.err
    run.kill()
    assert run.wait(timeout=60) == -signal.SIGKILL
    assert run_train("--resume", "--out", tmp_path).status == 0
    same_run(tmp_path, whole_run)


def test_a_full_disk_loses_nothing(whole_run, quick, tmp_path):
    torch_save, is_full = torch.save, iter([True])

    def save(content, path):
        if path.name.startswith("best") and next(is_full, False):  # after the first validation
            path.write_bytes(b"half")
            raise RuntimeError("No space left on device")  # torch's own error
        torch_save(content, path)

    quick.setattr(torch, "save", save)
    assert run_train(*EIGHT_STEPS, "--out", tmp_path).status == 1
    assert cabins.read_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert not list(tmp_path.glob("*.partial"))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("5,1.2")  # half a row
    assert run_train("--resume", "--out", tmp_path).status == 0
    same_run(tmp_path, whole_run)


def test_resuming_refuses_what_would_change_the_run_and_frees_the_checkpoint(whole_run, quick):
    last, before = whole_run / "last.pt", (whole_run / "last.pt").read_bytes()
    for options in (["--epochs", 3], ["--batch-size", 4], ["--seed", 1], ["--as-released"]):
        ran = run_train("--resume", last, *options)
        assert ran.status == 1 and options[0] in ran.err
    assert run_train("--resume", last, *EIGHT_STEPS).status == 0  # has finished
    content, new = cabins.read_checkpoint(last), whole_run / "new"
    args, _ = train.parse_args(["--out", str(new), *map(str, EIGHT_STEPS)])
    args.resume = str(last)
    assert train.Run(args, content).best == cabins.read_checkpoint(last)["best"]
    assert not content and last.read_bytes() == before == (new / "last.pt").read_bytes()
    assert (whole_run / "best.pt").read_bytes() == (new / "best.pt").read_bytes()
    (new / "best.pt").unlink()  # another must be chosen
    args.resume = f"{new}/last.pt"
    assert train.Run(args, cabins.read_checkpoint(new / "last.pt")).best == math.inf


@pytest.mark.parametrize("seconds, steps", [(0, [*range(1, 9)]), (600, [4, 8])])
def test_last_is_saved_by_time_and_the_best_network_stays(seconds, steps, quick, tmp_path):
    metrics, found = dict.fromkeys(evaluation.HEADINGS, 1.0), iter([0.5, 0.5 + seconds])
    measure = lambda *_: {"whole": metrics | {"abs_rel": next(found)}}
    saved = []

    def save(path, *_, step, best, **__):
        saved.append((path.name, step, best))

    quick.setattr(evaluation, "evaluate_windows", measure)
    quick.setattr(cabins, "save_checkpoint", save)
    quick.setattr(train, "SAVE_EVERY", seconds)
    quick.setattr(train, "PRINT_EVERY", 3)
    ran = run_train(*EIGHT_STEPS, "--out", tmp_path)
    assert [step for name, step, _ in saved if name == "last.pt"] == steps
    assert [step for name, step, _ in saved if name == "best.pt"] == [4]
    assert saved[-1] == ("last.pt", 8, 0.5)
    assert [f"step {i} of 8" in ran.out for i in range(1, 9)] == [i in (3, 6) for i in range(1, 9)]


def test_a_new_demo_replaces_the_old_one_when_it_has_a_best_network(whole_run, quick, tmp_path):
    quick.chdir(tmp_path)
    demo = shutil.copytree(whole_run, tmp_path / "runs" / "toy")

    def files() -> dict:
        return {path.name: path.read_bytes() for path in demo.glob("*.*")}

    old = files()
    for options in (["--batch-size", 1000], ["--clip", "none.pt"], ["--resume", "best.pt"]):
        assert run_train(*options).status == 1 and files() == old, options
    ran = run_train("--epochs", 2, "--batch-size", 4, stop=(1, signal.SIGTERM))
    assert ran.status == 143 and files() == old
    assert run_train("--epochs", 1, "--batch-size", 4).status == 0
    last, best = (cabins.read_checkpoint(demo / f"{name}.pt") for name in ("last", "best"))
    assert last["step"] == best["step"] == 2 and not (demo / "new").exists()
    assert (demo / "log.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("name", ["log.csv", "best.pt", "runs/toy/log.csv"])
def test_files_of_others_stay(name, quick, tmp_path):
    quick.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("time,note\n1,mine\n")
    ran = run_train(*EIGHT_STEPS, "--out", Path(name).parent)
    assert ran.status == 1 and "other" in ran.err  # another run's, or other columns
    assert Path(name).read_text() == "time,note\n1,mine\n"


def test_a_run_that_learns_nothing_ends_and_saves_nothing(quick, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cabins, "total_loss", lambda found, *_: found.depth.sum() * math.nan)
        ran = run_train(*EIGHT_STEPS, "--out", tmp_path / "a")
        assert ran.status == 1 and "step 1" in ran.err and "nan" in ran.err
        patch.setattr(cabins, "total_loss", lambda *_: torch.zeros(10**15))
        ran = run_train(*EIGHT_STEPS, "--out", tmp_path / "a")
        assert ran.status == 1 and "--batch-size" in ran.err and ran.err.count("\n") == 1
    draw, nothing = data.draw_room, np.zeros((96, 128), np.float32)
    quick.setattr(data, "draw_room", lambda i: (draw(i)[0], nothing if i < 8 else draw(i)[1]))
    quick.setattr(data, "describe", lambda dataset: "")
    assert run_train(*EIGHT_STEPS, "--out", tmp_path / "b").status == 1
    assert not list(tmp_path.glob("*/*.pt"))


def test_training_starts_from_a_checkpoint_and_draws_its_curves(
    tiny, tiny_checkpoint, few_rooms, tmp_path
):
    options = ["--init", tiny_checkpoint, "--max-depth", 20, "--out", tmp_path, *EIGHT_STEPS]
    assert run_train(*options, stop=(5, signal.SIGINT)).status == 130
    for name in ("explained_0.png", "curves.png"):
        with Image.open(tmp_path / name) as figure:
            assert min(figure.size) > 300
    args, _ = train.parse_args([*map(str, options), "--out", str(tmp_path / "new")])
    model = train.Run(args, {}).learner.model
    assert all(torch.equal(model.state_dict()[n], x) for n, x in tiny.state_dict().items())
    assert model.config.max_depth == 20


def test_own_pairs_are_trained_and_their_faults_found_first(own_pairs, quick, tmp_path):
    def own(training: str, test: str, name: str, *options) -> Ran:
        lists = ["--train-split", own_pairs / training, "--test-split", own_pairs / test]
        options += ("--data", "list", "--root", own_pairs, *lists, "--backbone", "tiny")
        return run_train(*options, "--epochs", 1, "--batch-size", 2, "--out", tmp_path / name)

    ran = own("train.txt", "train.txt", "same")
    assert ran.status == 0 and "test list" in ran.out and "1000" in ran.out
    content = cabins.read_checkpoint(tmp_path / "same" / "last.pt")
    assert (content["config"]["longer_side"], content["config"]["focal"]) == (128, 518.8579)
    assert own("train.txt", "test.txt", "far", "--max-depth", 1).status == 1  # no truth is so near
    assert not (tmp_path / "far").exists()
    ran = own("none.txt", "test.txt", "none")
    assert ran.status == 1 and "--train-split" in ran.err and "none.txt" in ran.err
    torch.save(content | {"step": 1}, tmp_path / "same" / "last.pt")  # of a run that has not ended
    assert own("train.txt", "test.txt", "same", "--resume").status == 1  # another test list
