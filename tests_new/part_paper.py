from common import *

# ---- Sec. 3.1 and 3.2.1  CLIP, its image encoder and Eq. 1 ---------------------------------------


def test_tokenizer_gives_clips_ids():
    known = {
        "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
        "farthest": [1578, 35343],  # two pieces: far, thest
        "79.1234": [278, 280, 269, 272, 273, 274, 275],  # single digits
        "  a PHOTO\tof\n": [320, 1125, 539],  # lower case, white space
        "it's": [585, 568],
        "mojibake cafÃ©": [617, 3252, 11878, 15304],  # repaired to café
        "<p> &amp;amp; q": [283, 335, 285, 261, 336],  # HTML is unescaped twice: <p> & q
        "<|startoftext|> inside <|endoftext|>": [49406, 2912, 49407],
        "日本語のテキスト": [39121, 44353, 34002, 252, 21575, 2429, 228, 47121, 32421, 486],
        "": [],
    }
    for text, ids in known.items():
        assert clip_tokenizer.encode(text) == ids, text
    ids = clip_tokenizer.tokenize(["far", "extremely close"], length=5)
    assert ids.tolist() == [[49406, 2384, 49407, 0, 0], [49406, 6519, 2660, 49407, 0]]
    with pytest.raises(ValueError, match="extremely close"):  # which is never cut off
        clip_tokenizer.tokenize("extremely close", length=3)


def test_number_tokens_are_the_tokens_of_the_printed_number():
    depths = [torch.rand(800, generator=generator()) * top for top in (0.01, 1, 10, 80, 9999)]
    edges = [0, 1e-4, 5e-5, 1e-3, 0.5, 0.12345, 2.00005, 9.99995, 10, 80, 99.99995, 100, 9999]
    depths = torch.cat([*depths, torch.tensor(edges)])
    texts = [str(round(depth, 4)) for depth in depths.tolist()]
    assert torch.equal(cabins.number_tokens(depths), clip_tokenizer.tokenize(texts, 11))


CLIP_IMAGE = {  # of CLIP's own embedding of an image, and of z at row 4, column 2
    "RN50": ([-0.89232415, -0.17029873, 0.15963185], [-0.8921474, -0.1697332, 0.1597825]),
    "RN101": ([0.85525256, -1.7576025, -2.4198878], [0.7441988, -1.782209, -2.416223]),
    "ViT-B/16": ([-1.3473095, 0.38172603, -0.33779722], [0.4498522, -0.307845, -1.415948]),
}
CLIP_TEXT = {1024: [-1.518179, 0.2903049, 0.15889318], 512: [1.3894114, 0.88841105, -0.52293265]}


@pytest.mark.parametrize("backbone", CLIP_IMAGE)
def test_embeddings_are_those_of_clips_own_code(backbone):
    """z̄ is CLIP's image embedding, although here every token asks, and not the mean alone."""
    with torch.device("meta"):  # names and shapes alone
        clip = cabins.CLIP(cabins.BACKBONES[backbone])
    state = {k: made_tensor(k, tuple(v.shape)) for k, v in clip.state_dict().items()}
    clip.load_state_dict(state, assign=True)
    with torch.inference_mode():
        _, z_bar, z = clip.eval().visual(torch.from_numpy(normal("image", (1, 3, 224, 224))))
        t = clip.encode_text(clip_tokenizer.tokenize("a photo of a cat."))
    close(torch.stack([z_bar[0, :3], z[0, :3, 4, 2]]), CLIP_IMAGE[backbone])
    close(t[0, :3], CLIP_TEXT[t.shape[1]])


def small_clip(**sizes) -> cabins.CLIP:
    """A CLIP of the tiny network's sizes, but for `sizes`."""
    torch.manual_seed(1)
    return cabins.CLIP(cabins.BACKBONES["tiny"]._replace(**sizes)).eval()


def test_clip_is_read_from_half_precision_archives_and_from_plain_files(tmp_path):
    clip, expected = small_clip().half(), small_clip().half().state_dict()
    clip.ln_final.weight.data = F.pad(clip.ln_final.weight.data, (3, 0))[3:]  # part of a storage
    for name in ("input_resolution", "context_length", "vocab_size"):  # not weights
        clip.register_buffer(name, torch.tensor(77))
    torch.save(clip.state_dict(), tmp_path / "plain.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript, the format of OpenAI's files, is deprecated
        ids = clip_tokenizer.tokenize("far", 3)
        torch.jit.trace_module(clip, {"encode_text": ids}).save(tmp_path / "archive.pt")
    for name in ("plain.pt", "archive.pt"):
        found = cabins.load_clip(tmp_path / name).state_dict()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor.to(found[key].dtype)), key
        assert found["visual.conv1.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="archive.pt"):
        cabins.load_checkpoint(tmp_path / "archive.pt")


def test_eq_1_a_bins_centre_lies_half_its_width_above_all_bins_before_it():
    b = torch.tensor([[0.5, 0.25, 0.25]])  # of 8 m: bins from 2, 6 and 8 m on
    assert cabins.bin_centers(b, 2.0, 10.0).tolist() == [[4.0, 7.0, 9.0]]


def test_fact_6_every_bin_stays_open_and_none_is_wider_than_the_others_leave():
    bins = cabins.AdaptiveBins(64, 256)
    bins.mlp[-1].weight.data.zero_()
    bins.mlp[-1].bias.data[:] = -9.0
    bins.mlp[-1].bias.data[7] = 99.9
    b = bins(torch.randn(1, 64))[0]
    assert b[7].item() == pytest.approx(100 / 125.5) and b[8].item() == pytest.approx(0.1 / 125.5)


def test_positions_are_resized_without_aligned_corners_and_feature_maps_with_them():
    grid = torch.tensor([[9.0], [0], [1], [2], [3]])  # of the mean token, then of 2 x 2 locations
    found = cabins.resize_positions(grid, 2, 4).flatten().tolist()
    assert found == [9, 0, 0.25, 0.75, 1, 2, 2.25, 2.75, 3]
    found = cabins.resize(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), (2, 3))
    assert found.tolist() == [[[[0, 0.5, 1], [2, 2.5, 3]]]]


# ---- Sec. 3.2.2  CaBins: Eq. 2 -------------------------------------------------------------------


def test_eq_2_weighs_centres_near_the_groups_mean_most():
    c = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.double)
    weights = [math.exp(1 / (abs(x - 7 / 3) + 1e-4)) for x in (1, 2, 4)]
    by_hand = (weights[0] + 2 * weights[1] + 4 * weights[2]) / sum(weights)
    assert cabins.distance_classes(c, 1).item() == pytest.approx(by_hand, rel=1e-9)


def test_table_3_groups_are_of_neighbouring_bins_and_the_median_is_a_bin_centre():
    c = torch.tensor([[1.0, 2, 4, 9, 10, 20, 30, 60]])
    assert cabins.distance_classes(c, 2, "mean").tolist() == [[4, 30]]
    assert cabins.distance_classes(c, 2, "median").tolist() == [[2, 20]]  # the lower one
    with pytest.raises(ValueError, match="mode"):
        cabins.distance_classes(c, 2, "mode")


def test_fact_2_eq_2_picks_the_centre_nearest_to_the_mean_and_depends_on_the_unit():
    b = torch.rand(300, 256, generator=generator()).double() + 0.1
    # metres and units of a metre: how far e is from the nearest centre, the mean and the median
    known = {(10, 1): (0.0004, 0.0106, 0.0266), (10, 100): (0.0105, 0.0006, 0.0280)}
    for (metres, units), expected in known.items():
        c = cabins.bin_centers(b / b.sum(1, keepdim=True), 0.0, metres * units)
        e, groups = cabins.distance_classes(c, 8)[..., None], c.unflatten(1, (8, 32))
        m, median = groups.mean(2, keepdim=True), groups.median(2, keepdim=True).values
        nearest = groups.gather(2, (groups - m).abs().argmin(2, keepdim=True))
        found = [(e - x).abs().mean().item() / units for x in (nearest, m, median)]
        assert found == pytest.approx(expected, rel=0.2)


# ---- Sec. 3.2.3  Prompts, text encoder, TransDecoder: Eq. 3 --------------------------------------


def inputs_of(module: nn.Module, run) -> tuple:
    """What `module` is given when `run` is called."""
    calls = []
    handle = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    run()
    handle.remove()
    return calls[0]


def test_the_text_of_a_distance_is_its_number_with_four_decimals(tiny):
    image = torch.randn(2, 3, 64, 64, generator=generator())
    (ids,) = inputs_of(tiny.clip.token_embedding, lambda: tiny(image))
    texts = [str(round(e, 4)) for e in tiny(image).cabins.flatten().tolist()]
    assert torch.equal(ids, clip_tokenizer.tokenize(texts, 9))  # two digits before the point


def test_prompts_stand_between_start_and_number_and_what_follows_the_end_changes_nothing(tiny):
    words = torch.tensor(clip_tokenizer.encode("a photo of"))  # prompts that are words' embeddings
    expected = tiny.clip.encode_text(clip_tokenizer.tokenize("a photo of 2.5"))
    prompts, ids = tiny.clip.token_embedding(words), cabins.number_tokens(torch.tensor([2.5]), 2)
    close(tiny.clip.encode_text(F.pad(ids, (0, 20), value=7), prompts), expected, 1e-5)


def test_fact_1_no_gradient_passes_through_the_digits():
    model = cabins.CaBins(TINY)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    prediction = model(torch.randn(1, 3, 64, 96, generator=generator()))
    of_s, of_c = ("clip.visual.", "prompts", "trans_decoder."), ("clip.visual.", "bins.")
    for output, learners in ((prediction.similarity, of_s), (prediction.centers[:, 9], of_c)):
        gradients = torch.autograd.grad(output.sum(), parameters, None, True, allow_unused=True)
        gradients = {name: g for name, g in zip(names, gradients) if g is not None}
        assert gradients.keys() == {name for name in names if name.startswith(learners)}
        assert gradients["clip.visual.conv1.weight"].abs().max() > 1e-3


def test_fact_3_the_text_jumps_where_the_number_does_not(released_model):
    texts = cabins.number_tokens(torch.tensor([2.9999, 3.0]), 2)
    assert set(texts[0].tolist()) & set(texts[1].tolist()) == {49406, 269, 49407, 0}  # the point
    image = torch.from_numpy(normal("image", (1, 3, 96, 128)))
    _, z_bar, z = released_model.clip.visual(image)
    t = released_model.clip.encode_text(texts, released_model.prompts)[None]
    s = cabins.cosine_similarity(z, released_model.trans_decoder(t, z_bar, z))[0]
    assert (s[1] - s[0]).abs().max() > 0.01 * s[0].abs().max()


def test_fact_10_the_last_digit_turns_t_nearly_as_far_as_a_metre_does():
    clip = small_clip(text_width=256, text_layers=6)  # of random weights
    scales = [x.std().item() for x in (clip.token_embedding.weight, clip.positional_embedding)]
    assert scales == pytest.approx([1, 0.01], rel=0.02)
    e = torch.rand(40, generator=generator()) * 8 + 1
    t, near, far = (clip.encode_text(cabins.number_tokens(e + x, 2)) for x in (0, 1e-4, 1))
    angles = [F.cosine_similarity(t, x).clamp(max=1).arccos().mean().item() for x in (near, far)]
    assert angles == pytest.approx([0.23, 0.37], rel=0.1)  # radians


SHAPES = (2, 8, 512), (2, 512), (2, 512, 3, 4)  # of t, z̄ and z: B = 2, K = 8, D = 512
TEXTS_AND_IMAGE = [torch.randn(shape, generator=generator(i)) for i, shape in enumerate(SHAPES)]


def test_eq_3_adds_gamma_times_v_post_to_t():
    decoder, t, changes = cabins.TransDecoder(512).eval(), TEXTS_AND_IMAGE[0], []
    for gamma in (0.0, 1.0, 2.0):
        nn.init.constant_(decoder.gamma, gamma)
        changes.append((decoder(*TEXTS_AND_IMAGE) - t).detach())
    assert changes[0].abs().max() == 0 and changes[1].abs().max() > 0
    close(changes[2], 2 * changes[1], 1e-5)


def test_fact_4_eq_3_is_the_identity_at_first():
    torch.manual_seed(0)
    decoder, t = cabins.TransDecoder(512).eval(), TEXTS_AND_IMAGE[0]
    assert decoder.gamma.tolist() == pytest.approx([1e-4] * 512)
    assert 1e-6 < (decoder(*TEXTS_AND_IMAGE) - t).norm() / t.norm() < 1e-3
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    for weight in (torch.cat([m.weight.flatten() for m in linear]), cabins.CaBins(TINY).prompts):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(m.bias is None or not m.bias.any() for m in linear)


def test_trans_decoder_has_six_layers_and_drops_a_tenth_anew_in_each_training_step():
    decoder = cabins.TransDecoder(512)
    assert decoder.layers[5].mlp[1](torch.ones(1)).item() == pytest.approx(0.8413447)  # 1 Φ(1)
    nn.init.ones_(decoder.gamma)
    assert not torch.equal(decoder(*TEXTS_AND_IMAGE), decoder(*TEXTS_AND_IMAGE))
    dropouts = [module for module in decoder.modules() if isinstance(module, nn.Dropout)]
    assert [dropout.p for dropout in dropouts] == [0.1] * 24  # four in each layer, all in use
    assert all(inputs_of(dropout, lambda: decoder(*TEXTS_AND_IMAGE)) for dropout in dropouts)


# ---- Sec. 3.2.4  Similarity, depth decoder, depth: Eq. 4 and 5 -----------------------------------


def test_eq_4_similarity_is_the_cosine_of_each_location_and_each_text():
    z, t = torch.randn(2, 64, 3, 4, generator=generator()), torch.randn(2, 8, 64)
    s = cabins.cosine_similarity(z, t)
    expected = F.cosine_similarity(z[1, :, 2, 3], t[1, 5], dim=0)
    assert s[1, 5, 2, 3].item() == pytest.approx(expected.item(), abs=1e-6)


def test_eq_5_depth_is_the_mean_of_the_centres_under_p():
    centers, p = torch.tensor([[1.0, 3.0]]), torch.tensor([[[[0.25]], [[0.75]]]])
    assert cabins.expected_depth(centers, p).tolist() == [[[[2.5]]]]


def test_fact_5_text_learns_through_eight_channels_of_one_convolution(released_model):
    """No loss asks s to mean anything. With these weights at 0, the prompts learn nothing."""
    assert released_model.depth_decoder.fuse.weight.shape == (2048, 2056, 1, 1)
    torch.manual_seed(0)
    model = cabins.CaBins(TINY)
    image, target = torch.randn(1, 3, 64, 64), torch.rand(1, 1, 64, 64) * 9
    for is_silent in (False, True):
        model.depth_decoder.fuse.weight.data[:, -8:] *= not is_silent
        model.zero_grad()
        cabins.total_loss(model(image), target, 1e-3).backward()
        assert model.prompts.grad.any() != is_silent


def test_fact_8_a_padded_1x1_convolution_shifts_x4(tiny):
    x = torch.zeros(1, 328, 15, 20)  # x4 and s
    border = tiny.depth_decoder.fuse(x)
    x[:, :, 0] = 1
    change = tiny.depth_decoder.fuse(x) - border
    assert change.shape[2:] == (17, 22) and not change[:, :, 0].any() and change[:, :, 1].any()
    rows = cabins.resize(change, (30, 40))[0, :, :, 20].abs().amax(0)
    assert rows[0] == 0 and rows.argmax() == 2  # row 0 of x4 stands at 29 / 16 = 1.8


def test_fact_9_the_heads_two_convolutions_are_one_linear_map(tiny):
    head, x = tiny.depth_decoder, torch.randn(1, 40, 12, 16, generator=generator())
    weight = torch.einsum("om,mikl->oikl", head.logits.weight[:, :, 0, 0], head.features.weight)
    bias = head.logits.weight[:, :, 0, 0] @ head.features.bias + head.logits.bias
    close(F.conv2d(x, weight, bias, padding=1), head.logits(head.features(x)).detach(), 1e-4)


# ---- Figure 2: the network -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (427, 65), (96, 128)])
def test_fact_6_depth_never_leaves_the_range_of_the_centres_at_any_size_of_image(tiny, size):
    image = torch.randn(2, 3, *size, generator=generator()) * 3
    (depth, c, e, s), half = tiny(image), tiny(image, upsample=False).depth
    assert c.shape == (2, 256) and e.shape == (2, 8) and depth.shape == (2, 1, *size)
    assert s.shape == (2, 8, *(x // 32 for x in size))
    assert half.shape == (2, 1, *(2 * ((x + 1) // 4) for x in size))
    close(F.interpolate(half, size, mode="bilinear", align_corners=True), depth, 1e-6)
    assert (depth.flatten(1).amin(1) >= c[:, 0]).all() and (c[:, -1] >= depth.amax((1, 2, 3))).all()
    for wrong in ((1, 3, 63, 64), (1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=re.escape(str(wrong))):
            tiny(torch.zeros(wrong))


def test_a_batch_equals_singles(tiny):
    image = torch.randn(3, 3, 70, 90, generator=generator())
    batch, singles = tiny(image), [tiny(i[None]) for i in image]
    for name in batch._fields:
        close(torch.cat([getattr(s, name) for s in singles]), getattr(batch, name), 1e-5)


def test_all_results_are_float32_under_autocast_and_nearly_the_same(tiny):
    image = torch.randn(2, 3, 96, 128, generator=generator())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = tiny(image)
    for found, expected in zip(rounded, tiny(image)):
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.02


@pytest.mark.parametrize("kind", cabins.DISTANCE_CLASSES)
def test_every_parameter_learns_but_those_of_the_text_encoder(kind):
    torch.manual_seed(0)
    model = cabins.CaBins(cabins.Config(backbone="tiny", distance_class=kind))
    prediction = model(torch.randn(2, 3, 64, 64))
    cabins.total_loss(prediction, torch.rand(2, 1, 64, 64) * 9 + 0.5, 1e-3).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith("clip.") and not name.startswith("clip.visual.")
        assert (parameter.grad is None) == is_frozen, name
        assert is_frozen or parameter.grad.isfinite().all(), name
    close(prediction.cabins, cabins.distance_classes(prediction.centers, 8, kind), 1e-6)


# ---- Sec. 3.3  Losses: Eq. 6 to 8 ----------------------------------------------------------------


def test_eq_6_silog_by_hand():
    depth, target = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 0.0])
    g = [math.log(2), 0.0]  # the third pixel is not valid
    by_hand = 10 * math.sqrt((g[0] ** 2 + g[1] ** 2) / 2 - 0.85 * ((g[0] + g[1]) / 2) ** 2)
    assert cabins.silog_loss(depth, target, target > 0).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("unbiased", [False, True])
def test_fact_7_eq_6_is_a_variance_and_15_percent_of_a_squared_mean(unbiased):
    target = torch.rand(2, 1, 4, 5, generator=generator()).double() * 9 + 0.5
    mask = torch.rand(2, 1, 4, 5, generator=generator(1)) < 0.6
    one, two = ((target * 1.5 + 0.2 * target.sin()).requires_grad_() for _ in range(2))
    loss = cabins.silog_loss(one, target, mask, unbiased=unbiased)
    g = two[mask].log() - target[mask].log()
    formula = 10 * (g.var(correction=int(unbiased)) + 0.15 * g.mean() ** 2).sqrt()
    (loss + formula).backward()
    assert loss.item() == pytest.approx(formula.item(), rel=1e-9)
    close(one.grad, two.grad, 1e-9)


def test_eq_7_chamfer_by_hand():
    centers, target = torch.tensor([[1.0, 3.0]]), torch.tensor([[[[2.0, 2.5, 7.0, 0.0]]]])
    from_depths = (1 + 0.25 + 16) / 3  # squared distances to the nearest centre: mean over depths
    from_centers = (1 + 0.25) / 2  # and the other way round: mean over centres
    loss = cabins.chamfer_loss(centers, target, target > 0).item()
    assert loss == pytest.approx(from_depths + from_centers)


@pytest.mark.parametrize("spread", [10.0, 0.05])  # 0.05: most centres are near no depth
def test_chamfer_and_its_gradient_are_those_of_a_table_of_pixels_and_centres(spread):
    target = 4 + spread * (torch.rand(3, 1, 20, 30, generator=generator()) - 0.4)
    mask = torch.rand(3, 1, 20, 30, generator=generator(1)) < 0.7
    mask[1] = False  # an image without ground truth adds 0
    mask[2] = torch.arange(600).reshape(1, 20, 30) == 7  # one valid pixel
    centers = (torch.rand(3, 64, generator=generator(1)) * 10).sort(1).values
    one, two = (centers.clone().requires_grad_() for _ in range(2))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss = cabins.chamfer_loss(one, target, mask)
        loss.backward()
    assert max(event.self_cpu_memory_usage for event in profile.function_events) < 4 * 600 * 64
    tables = [(target[i][mask[i]][:, None] - two[i]).square() for i in (0, 2)]
    expected = sum(table.amin(1).mean() + table.amin(0).mean() for table in tables) / 3
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(one.grad, two.grad, 1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_eq_8_adds_a_tenth_of_the_bins_loss_after_upsampling_the_prediction(unbiased):
    target = torch.rand(2, 1, 20, 30, generator=generator()) * 9 + 0.5
    target[0, 0, 3:9] = 1e-3  # not above min_depth: not valid
    depth, c = target[..., ::2, ::2] + 1, torch.linspace(1, 9, 16).repeat(2, 1)
    large, mask = cabins.resize(depth, (20, 30)), target > 1e-3
    pixel = cabins.silog_loss(large, target, mask, unbiased)
    bins = cabins.chamfer_loss(c, target, mask)
    loss = cabins.total_loss(cabins.Prediction(depth, c, None, None), target, 1e-3, unbiased)
    assert loss.item() == pytest.approx((pixel + 0.1 * bins).item())


@pytest.mark.parametrize("truth", [2.0, 0.0])
def test_losses_without_error_or_without_truth_have_finite_gradients(truth):
    depth = torch.full((2, 1, 8, 8), 2.0, requires_grad=True)
    c = torch.linspace(1, 9, 16).repeat(2, 1).requires_grad_()
    target = torch.full((2, 1, 8, 8), truth)
    pixel = cabins.silog_loss(depth, target, target > 0)
    (pixel + cabins.chamfer_loss(c, target, target > 0)).backward()
    assert pixel.item() == pytest.approx(1e-5)
    assert depth.grad.isfinite().all() and c.grad.isfinite().all()


def test_fact_11_eq_3s_decoder_hardly_learns():
    """Its clipped gradients are far below Adam's ε of 1e-8, and those of the others far above."""
    torch.manual_seed(0)
    model = cabins.CaBins(TINY)
    prediction = model(torch.randn(2, 3, 64, 64))
    cabins.total_loss(prediction, torch.rand(2, 1, 64, 64) * 9 + 0.5, 1e-3).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    parts = (model.trans_decoder.layers, model.clip.visual, model.bins, model.depth_decoder)
    gradients = [torch.cat([p.grad.flatten() for p in part.parameters()]) for part in parts]
    decoder, *others = (gradient.square().mean().sqrt() for gradient in gradients)
    assert decoder < 1e-9 and min(others) > 1e-6


# ---- Sec. 4.3 and 4.6  Metrics, and the other rows of Tables 3 and 4 -----------------------------


def test_metrics_by_hand():
    depth, target = torch.tensor([1.25, 3, 3.5, 9, 1.8]), torch.tensor([1.0, 2, 5, 4, 1])
    logs = [math.log(ratio) for ratio in (1.25, 1.5, 0.7, 2.25, 1.8)]
    expected = {"abs_rel": (0.25 + 1 / 2 + 1.5 / 5 + 5 / 4 + 0.8) / 5}
    expected["sq_rel"] = (0.25**2 + 1 / 2 + 1.5**2 / 5 + 5**2 / 4 + 0.8**2) / 5
    expected["rmse"] = math.sqrt((0.25**2 + 1 + 1.5**2 + 5**2 + 0.8**2) / 5)
    expected["rmse_log"] = math.sqrt(sum(x**2 for x in logs) / 5)
    expected["log10"] = sum(abs(x) for x in logs) / math.log(10) / 5
    # 1.25 itself does not count. Below 1.25² = 1.56 are 1.5 and 1 / 0.7, below 1.25³ = 1.95 is 1.8.
    expected |= {"d1": 0.0, "d2": 0.6, "d3": 0.8}
    found = {k: v.item() for k, v in cabins.depth_metrics(depth, target).items()}
    assert found == pytest.approx(expected, rel=1e-6)
    for wrong in ((depth[:0], target[:0]), (depth[:3], target), (depth[None], target[None])):
        with pytest.raises(ValueError):
            cabins.depth_metrics(*wrong)


def test_semantic_prompts_are_the_papers_eight_phrases():
    model = cabins.CaBins(cabins.Config(backbone="tiny", distance_class="semantic")).eval()
    (ids,) = inputs_of(model.clip.token_embedding, lambda: model(torch.zeros(2, 3, 64, 64)))
    phrases = ["giant", "extremely close", "close", "not in distance", "a little remote", "far"]
    assert torch.equal(ids, clip_tokenizer.tokenize([*phrases, "farthest", "unseen"], 5))
    t, *_ = inputs_of(model.trans_decoder, lambda: model(torch.zeros(2, 3, 64, 64)))
    close(t[1], model.clip.encode_text(ids, model.prompts).detach(), 1e-5)  # in this order


@pytest.fixture
def vit(monkeypatch) -> cabins.CaBins:
    """A network on a small ViT of twelve blocks, with made weights."""
    sizes = cabins.BACKBONES["tiny"]._replace(layers=(12,), width=64, is_vit=True)
    monkeypatch.setattr(cabins, "BACKBONES", cabins.BACKBONES | {"RN50": sizes})
    model = cabins.CaBins(cabins.Config(backbone="RN50", longer_side=128))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: made_tensor(name, shape) for name, shape in shapes.items()})
    return model


def test_vit_is_tapped_after_blocks_3_6_9_12_and_brought_to_strides_4_8_16_32(vit):
    image, blocks = torch.from_numpy(normal("image", (2, 3, 90, 128))), []
    for block in vit.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, inputs, output: blocks.append(output))
    taps = [inputs_of(stage, lambda: vit(image))[0] for stage in vit.reassemble]
    for i, tap in enumerate(taps):  # 90 rows become 6 patches; the class token is left out
        assert torch.equal(tap, blocks[3 * i + 2][:, 1:].mT.unflatten(2, (6, 8)))
    pyramid, s = inputs_of(vit.depth_decoder, lambda: vit(image))
    sizes = [(8, 24, 32), (16, 12, 16), (32, 6, 8), (64, 3, 4)]  # of the width: 1/8, 1/4, 1/2, 1
    assert [tuple(x.shape[1:]) for x in pyramid] == sizes
    close([x[0, 1, 2, 3].item() for x in pyramid], [0.5572053, 0.6477839, 0.6523997, -3.09675])
    assert s.shape == (2, 8, 6, 8) and vit(image).depth.shape == (2, 1, 90, 128)


# ---- The released network, with made weights -----------------------------------------------------

PREDICTED_CABINS = "0.8196 2.0312 3.0201 3.9133 5.197 6.891 8.0013 9.3794 "
PREDICTED_CABINS += "0.8176 2.027 3.018 3.9136 5.1963 6.8924 8.0021 9.376"
GRADIENT_NORMS = {"contexts": 0.01286741633, "gamma": 0.0005481540862}
GRADIENT_NORMS |= {"clip_model.visual.conv1.weight": 0.22968607015}
GRADIENT_NORMS |= {"computeAdaptiveBin.regressor.4.weight": 1.2583868473592394}


def their_name(name: str) -> str:
    """The name of one of our tensors in the authors' checkpoints."""
    renamed = (pair for pair in cabins.RENAMED.items() if pair[1] and name.startswith(pair[1]))
    theirs, ours = next(renamed, ("", ""))
    return theirs + name.removeprefix(ours)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A checkpoint like the authors', with the goldens' weights."""
    architecture = cabins.BACKBONES["RN101"]._replace(context_length=30)
    with torch.device("meta"):  # names and shapes alone
        state = cabins.CaBins(cabins.Config(), cabins.CLIP(architecture)).state_dict()
    shapes = {their_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    shapes["contexts"] = (1, 8, 512)
    made = {f"module.{name}": made_tensor(name, shape) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("released") / "CaBins_nyu.pt"
    torch.save({"model": made, "optimizer": {}, "epoch": 24}, path)
    return path


@pytest.fixture(scope="module")
def released_model(released) -> cabins.CaBins:
    return cabins.load_checkpoint(released, max_depth=10.0)


def made_truth() -> torch.Tensor:
    target = np.minimum(np.abs(normal("depth", (2, 1, 96, 128))) * np.float32(10 / 3), 10)
    return torch.from_numpy(np.where(target < 0.2, 0, target).astype(np.float32))


def test_the_released_networks_depth_losses_and_gradients(released_model):
    model, target = released_model, made_truth()
    prediction = model(torch.from_numpy(normal("image", (2, 3, 96, 128))), upsample=False)
    texts = [str(round(e, 4)) for e in prediction.cabins.flatten().tolist()]
    assert " ".join(texts) == PREDICTED_CABINS
    close(prediction.similarity[0, :3, 1, 2], [-0.039582014, -0.047857970, -0.037478499])
    close(prediction.depth[0, 0, 20, ::16], [4.4796448, 5.6915550, 4.2776427, 5.5420227])
    loss = cabins.total_loss(prediction, target, 1e-3, unbiased=True)
    assert loss.item() == pytest.approx(9.66595458984375 + 0.1 * 0.00059330568, rel=1e-5)
    loss.backward()
    norms = {their_name(n): p.grad.norm() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for name, norm in GRADIENT_NORMS.items():
        assert norms[name].item() == pytest.approx(norm, rel=1e-3), name


# ---- Settings, checkpoints and your own pictures -------------------------------------------------


def test_the_papers_settings_are_the_defaults_and_wrong_ones_are_refused_by_name():
    paper = ("RN101", "cabins", 256, 8, 8, 1e-3, 10.0, 640)
    assert dataclasses.astuple(cabins.Config())[:8] == paper
    texts = {"backbone": ["RN102"], "distance_class": ["mode"], "min_depth": [0.0, "1"]}
    # 7 does not divide 256, and CLIP has 77 positions
    counts = {"n_bins": [1, 256.0], "n_cabins": [7, 0], "n_prompts": [-1, 100], "longer_side": [0]}
    for field, values in (texts | counts | {"max_depth": [1e-4, "10", math.nan]}).items():
        for value in values:
            with pytest.raises(ValueError, match=f"{field}.*{re.escape(str(value))}"):
                cabins.Config(**{field: value})


def test_checkpoints_hold_the_network_its_settings_and_more(tiny, tiny_checkpoint):
    assert cabins.read_checkpoint(tiny_checkpoint)["args"] == {"data": "toy"}
    loaded = cabins.load_checkpoint(tiny_checkpoint)
    assert loaded.config == TINY and not loaded.training
    assert all(torch.equal(x, tiny.state_dict()[n]) for n, x in loaded.state_dict().items())
    for conv in (loaded.clip.visual.conv2, cabins.CaBins(TINY).depth_decoder.features):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)  # faster
    with pytest.raises(ValueError, match="80"):
        cabins.load_checkpoint(tiny_checkpoint, max_depth=80.0)


def test_the_authors_checkpoints_need_a_range_and_get_the_size_of_their_data(monkeypatch):
    monkeypatch.setitem(cabins.BACKBONES, "RN101", cabins.BACKBONES["tiny"])
    content = {"model": cabins.CaBins(cabins.Config()).state_dict()}
    with pytest.raises(ValueError, match="max_depth"):
        cabins.restore(content, "theirs.pt")
    for expected in ((10, 640, 518.86), (80, 1216, 721.54)):
        model = cabins.restore(content, "theirs.pt", expected[0])
        assert dataclasses.astuple(model.config)[-3:] == expected


def test_checkpoints_of_earlier_versions_load(vit, tmp_path):
    config = {"backbone": "RN50", "image_width": 128}
    state, names = vit.state_dict(), ["trans_decoder. context_decoder."]
    names += ["reassemble. clip.visual.reassemble.", "depth_decoder.fuse. depth_decoder.reduce."]
    for new, old in map(str.split, names):
        state = {re.sub(f"^{new}", old, name): tensor for name, tensor in state.items()}
    torch.save({"config": config, "model": state}, tmp_path / "old.pt")
    loaded = cabins.load_checkpoint(tmp_path / "old.pt")
    assert loaded.config == vit.config
    assert all(torch.equal(x, vit.state_dict()[n]) for n, x in loaded.state_dict().items())


def test_downloads_are_whole_checked_and_kept(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"weights")
    url, sha256 = (tmp_path / "source").as_uri(), hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="file"):
        cabins.download(url, "file", "0" * 64)
    path = cabins.download(url, "file", sha256)
    assert path.read_bytes() == b"weights" and list(path.parent.iterdir()) == [path]
    assert cabins.download("file:///none", "file", sha256) == path  # which is not fetched again
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match="file"):
        cabins.download(url, "file", sha256)


def test_infer_gives_mean_and_std_of_depth_and_leaves_each_part_in_its_mode(tmp_path):
    model = cabins.CaBins(TINY)
    model.clip.visual.eval()
    array = np.random.default_rng(0).integers(0, 255, (90, 141, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    negative = np.ascontiguousarray(array[..., ::-1])[..., ::-1]  # strides, as from OpenCV
    found = cabins.infer(model, array)
    assert model.training and model.bins.training and not model.clip.visual.training
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), negative):
        assert all(np.array_equal(a, b) for a, b in zip(found, cabins.infer(model, picture)))
    assert all(x.dtype == np.float32 for x in found)
    # by hand: the longer side is that of training, and reducing averages pixels
    image = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (82, 128), mode="bilinear", antialias=True)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    inputs = inputs_of(model.eval().depth_decoder, lambda: model((image - mean) / deviation))
    (seen,) = inputs_of(model.clip.visual, lambda: cabins.infer(model, array))
    close(seen, (image - mean) / deviation, 1e-5)
    c, p = model((image - mean) / deviation).centers, model.depth_decoder(*inputs)
    depth = cabins.expected_depth(c, p)
    std = (p * (c[..., None, None] - depth).square()).sum(1, keepdim=True).sqrt()
    close(found.depth, cabins.resize(depth, (90, 141))[0, 0], 1e-5)
    close(found.std, cabins.resize(std, (90, 141))[0, 0], 1e-3)
    close(found.centers, c[0], 1e-6)
    close(found.cabins, cabins.distance_classes(c, 8)[0], 1e-6)


def test_pictures_of_any_size_mode_and_orientation(tiny, tmp_path):
    for size in ((1, 1), (20_000, 3), (3, 500)):
        found = cabins.infer(tiny, Image.new("RGB", size, (90, 80, 70)))
        assert found.depth.shape == size[::-1] and np.isfinite(found.depth).all()
    grey = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)
    grey[0, 0] = 255
    for mode in ("L", "RGBA", "P", "CMYK"):
        found = cabins.read_picture(Image.fromarray(grey).convert("RGB").convert(mode))
        assert found.shape == (9, 12, 3) and found.dtype == np.uint8
    deep = Image.fromarray(grey.astype(np.uint16) * 16)  # 12 bits in 16: the brightest is white
    assert np.abs(cabins.read_picture(deep)[..., 1].astype(int) - grey).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright: to be turned by a quarter, clockwise
    Image.fromarray(grey).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(cabins.read_picture(tmp_path / "phone.png")[..., 0], np.rot90(grey, -1))
    real, missing = np.zeros((4, 5, 3)), None  # None is what OpenCV gives for a missing file
    for wrong in (real, missing, grey, grey[:0, :, None].repeat(3, 2), Image.new("F", (9, 9))):
        with pytest.raises(ValueError):
            cabins.infer(tiny, wrong)
