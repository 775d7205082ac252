"""The recipe, value by value (docs/recipe.md), and each formula against an independent computation."""

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import FastCollateMixup, mixup_target
from timm.scheduler import CosineLRScheduler

from conftest import REPOSITORY
from pipelines.batch import Batch
from support.authors_defaults import ABSENT, table
from trainer.config.natures import setting_natures
from trainer.config.paper import paper_models
from trainer.config.recipe import audit, audit_table
from trainer.config.sections import Config, DistillConfig, OptimConfig, ScheduleConfig, parse, to_dict
from trainer.models.ema import ModelEma
from trainer.models.normalize import Normalize
from trainer.models.preprocessing import preprocessing
from trainer.update.loss import usi_loss
from trainer.update.mixing import mix_pixels, partners
from trainer.update.optimizer import build_optimizer
from trainer.update.schedule import learning_rate

# Transcribed from the published recipe, not from the code.
RECIPE = {
    "augment.repeats": 3,
    "augment.crop_area": (0.08, 1.0),
    "augment.crop_aspect": (3 / 4, 4 / 3),
    "augment.interpolation": "bicubic",
    "augment.flip": 0.5,
    "augment.randaugment_ops": 2,
    "augment.randaugment_prob": 0.5,
    "augment.randaugment_magnitude": 7,
    "augment.randaugment_std": 0.5,
    "augment.three_augment": False,
    "augment.color_jitter": 0.0,  # the authors' 0.4 is ignored beside RandAugment
    "augment.erase_prob": 0.0,
    "augment.mixup_alpha": 0.8,
    "augment.cutmix_alpha": 1.0,
    "augment.mix_prob": 1.0,
    "augment.cutmix_prob": 0.5,
    "augment.mix_group": 128,
    "augment.fill": None,  # the student's mean colour
    "augment.cycle_epochs": 0,
    "data.shuffle": "global",
    "data.image_size": 224,
    "data.eval_image_size": 0,  # as image_size
    "data.eval_crop_pct": 0.95,
    "teacher.name": "tresnet_v2_l",
    "teacher.image_size": 0,  # the student's
    "teacher.others": [],
    "distill.weight": 5.0,
    "distill.label_weight": 1.0,
    "distill.temperature": 1.0,
    "distill.label_smoothing": 0.0,
    "optim.lr": 2e-3,
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 2e-2,
    "optim.clip_norm": 0.0,
    "optim.clip_agc": 0.0,
    "schedule.epochs": 300,
    "schedule.warmup_epochs": 5,
    "schedule.warmup_lr": 1e-4,
    "schedule.min_lr": 1e-6,
    "schedule.cooldown_epochs": 10,
    "ema.decay": 0.99996,
    "ema.warmup": False,
    "run.global_batch": 1024,
    "run.batch_norm": "reduce",  # this project chose it; the authors' code has what is called broadcast here
}


@pytest.fixture(scope="module")
def usi() -> Config:
    return parse(["--config", str(REPOSITORY / "configs" / "usi.yaml")])


def test_the_audit_of_the_recipe_is_empty(usi):
    assert audit(usi) == [] and audit_table(usi).startswith("every setting is the one of the USI recipe\n")


def test_the_audit_says_what_is_otherwise_on_purpose_and_does_not_call_the_authors_own_value_a_deviation(usi):
    """DDP hands rank 0's buffers to all ranks before each forward pass, and the authors' --dist-bn is empty."""
    said = "on purpose, run.batch_norm is reduce:\n      the authors' code keeps the statistics of rank 0's images"
    assert said in audit_table(usi)
    theirs = parse(["--run.batch_norm", "broadcast"])
    assert audit(theirs) == [] and audit_table(theirs) == "every setting is the one of the USI recipe"
    assert [row["key"] for row in audit(parse(["--teacher.name", "null"]))] == ["teacher.name"]
    (row,) = audit(parse(["--run.batch_norm", "none"]))
    assert row["key"] == "run.batch_norm" and row["usi"] == "reduce"


def test_the_audit_names_what_differs_with_both_values_and_its_meaning():
    changed = ["--optim.lr", "1e-3", "--augment.repeats", "1", "--student.kwargs", "{drop_path_rate: 0.1}"]
    elsewhere = ["--run.seed", "7", "--data.threads", "3", "--student.name", "vit_small_patch16_224"]
    listed = audit(parse([*changed, *elsewhere]))
    assert [(item["key"], item["usi"], item["here"]) for item in listed] == [
        ("augment.repeats", 3, 1),
        ("student.kwargs", {}, {"drop_path_rate": 0.1}),
        ("optim.lr", 2e-3, 1e-3),
    ]
    assert listed[2]["meaning"] == "peak learning rate; not scaled with the batch size."
    assert "optim.lr: USI 0.002, here 0.001\n      peak learning rate" in audit_table(parse([*changed, *elsewhere]))


def test_the_audit_says_what_is_known_of_repeated_views():
    (row,) = audit(parse(["--augment.cycle_epochs", "50"]))
    assert (row["key"], row["usi"], row["here"]) == ("augment.cycle_epochs", 0, 50)
    assert "50 stored views an image were as good as 400 where a run used each three times" in row["meaning"]
    assert "no comparison of six uses or more is known" in row["meaning"]
    (row,) = audit(parse(["--augment.fill", "[124,116,104]"]))
    assert (row["key"], row["usi"], row["here"]) == ("augment.fill", None, [124, 116, 104])


def test_the_settings_of_the_published_recipe_are_audited():
    natures = setting_natures()
    assert all(natures[key].recipe for key in RECIPE)


def test_the_settings_beside_the_authors_defaults_are_those_of_usi_yaml(usi):
    values = to_dict(usi)
    for row in table():
        for key, value in row.ours.items():
            section, name = key.split(".")
            assert values[section][name] == value, (row.name, key)


def test_every_default_of_the_authors_is_listed_once_with_what_stands_for_it_here():
    names = [row.name for row in table()]
    assert len(names) == len(set(names)) == 112
    for row in table():
        assert row.ours or row.settings in (ABSENT, "an option", "`data.root`"), row
        assert row.same == "yes" or (row.same == "no" and row.why), row
    assert sum(row.same == "no" for row in table()) == 18


def test_a_default_that_is_a_number_here_is_the_authors_number_unless_the_table_says_why_not():
    """Where both are numbers: a row that says yes and has another one says why, as color-jitter does."""
    for row in table():
        for value in row.ours.values():
            numbers = all(isinstance(side, (int, float)) and not isinstance(side, bool) for side in (row.value, value))
            assert not numbers or row.value == value or row.why, row


def test_settings_of_the_training_that_have_no_default_of_the_authors_are_the_ones_that_they_lack():
    """Two-sided: what the recipe fixes stands in the table, or their code has no option for it."""
    listed = {key for row in table() for key in row.ours}
    lacking = {
        *("augment.three_augment", "data.shuffle", "data.eval_image_size", "distill.temperature", "ema.warmup"),
        *("teacher.image_size", "teacher.others", "augment.fill", "augment.cycle_epochs"),
    }
    assert set(RECIPE) - listed == lacking


@pytest.mark.parametrize("key", RECIPE)
def test_usi_yaml_is_the_published_recipe(usi, key):
    section, name = key.split(".")
    assert getattr(getattr(usi, section), name) == RECIPE[key]


def test_every_setting_of_the_training_is_in_the_recipe():
    sections = ("augment", "distill", "optim", "schedule", "ema")
    types = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    names = {f"{s}.{field.name}" for s in sections for field in dataclasses.fields(types[s])}
    assert names == {key for key in RECIPE if key.split(".")[0] in sections}


def test_the_defaults_are_the_recipe_too(usi):
    assert usi == Config()


def test_the_schedule_is_timms_for_all_310_epochs(usi):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-4)
    for epoch in range(310):
        scheduler.step(epoch)
        ours = learning_rate(epoch, usi.optim, usi.schedule)
        assert math.isclose(ours, optimizer.param_groups[0]["lr"], rel_tol=1e-12), epoch
    assert usi.schedule.total_epochs == 310


def test_the_schedules_published_values(usi):
    rates = [learning_rate(epoch, usi.optim, usi.schedule) for epoch in range(310)]
    assert rates[:5] == pytest.approx([1.0e-4, 4.8e-4, 8.6e-4, 12.4e-4, 16.2e-4])
    assert rates[5] == pytest.approx(1.9986e-3, abs=5e-8)
    assert rates[300:] == [1e-6] * 10


def plain_loss(student, teacher, targets, weight):
    """The formula of the paper in float64 numpy: soft-target cross-entropy + weight x KL(teacher || student)."""
    student, teacher = student.double().numpy(), teacher.double().numpy()

    def log_softmax(x):
        return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))

    log_p, log_q = log_softmax(student), log_softmax(teacher)
    cross_entropy = -(targets * log_p).sum(1).mean()
    return cross_entropy + weight * (np.exp(log_q) * (log_q - log_p)).sum(1).mean()


def random_logits(seed=0, rows=16, classes=10):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=generator)
    lam = torch.rand(rows // 8, generator=generator).repeat_interleave(8)
    return student, teacher, labels, lam


def test_the_loss_is_the_recipes_formula():
    student, teacher, labels, lam = random_logits()
    targets = mixup_target(labels[:8], 10, float(lam[0]), 0.0), mixup_target(labels[8:], 10, float(lam[8]), 0.0)
    expected = plain_loss(student, teacher, torch.cat(targets).double().numpy(), weight=5.0)
    loss = usi_loss(student, teacher, labels, partners(labels, 8), lam, DistillConfig())
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_is_timms_in_the_label_term_alone(smoothing):
    student, teacher, labels, lam = random_logits(4)
    targets = [mixup_target(labels[i : i + 8], 10, float(lam[i]), smoothing) for i in (0, 8)]
    expected = plain_loss(student, teacher, torch.cat(targets).double().numpy(), weight=5.0)
    config = DistillConfig(label_smoothing=smoothing)
    loss = usi_loss(student, teacher, labels, partners(labels, 8), lam, config)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    without = usi_loss(student, teacher, labels, partners(labels, 8), lam, DistillConfig())
    assert loss.item() != pytest.approx(without.item(), rel=1e-3)


def test_the_losss_gradient_is_the_recipes():
    """d/d student = (softmax(student) - target + 5 (softmax(student) - softmax(teacher))) / batch."""
    student, teacher, labels, lam = random_logits(1)
    student.requires_grad_(True)
    usi_loss(student, teacher, labels, partners(labels, 8), lam, DistillConfig()).backward()
    one_hot = torch.nn.functional.one_hot
    target = lam[:, None] * one_hot(labels, 10) + (1 - lam[:, None]) * one_hot(partners(labels, 8), 10)
    p, q = student.detach().softmax(1), teacher.softmax(1)
    assert torch.allclose(student.grad, (p - target + 5 * (p - q)) / 16, atol=1e-7)


def test_without_a_teacher_only_the_labels_count():
    student, _, labels, lam = random_logits(2)
    loss = usi_loss(student, None, labels, labels, lam, DistillConfig())
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(student, labels).item(), rel=1e-6)


def test_the_temperature_divides_both_logits_and_its_square_keeps_the_gradients_size():
    student, teacher, labels, lam = random_logits(3)
    config = DistillConfig(weight=1.0, label_weight=0.0, temperature=4.0)
    loss = usi_loss(student, teacher, labels, labels, lam, config)
    p, q = (student / 4).log_softmax(1), (teacher / 4).log_softmax(1)
    assert loss.item() == pytest.approx(16 * (q.exp() * (q - p)).sum(1).mean().item(), rel=1e-5)


def make_batch(images: np.ndarray, lam: float, box=(0, 0, 0, 0), group=8) -> Batch:
    rows = len(images)
    return Batch(
        images=torch.from_numpy(images),
        labels=torch.arange(rows),
        lam=torch.full((rows,), lam),
        box=torch.tensor([box] * rows, dtype=torch.int32),
        valid=torch.ones(rows, dtype=torch.bool),
        position=0,
        mix_group=group,
    )


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.3, 0.5, 0.71, 1.0])
def test_mixup_equals_timms_on_uint8(lam):
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    timms = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0)
    timms._params_per_batch = lambda: (np.float32(lam), False)
    channels_first = [(np.ascontiguousarray(image.transpose(2, 0, 1)), 0) for image in images]
    expected, _ = timms(channels_first)
    mixed = mix_pixels(make_batch(images, lam))
    assert torch.equal(mixed.permute(0, 3, 1, 2), expected)


def test_cutmix_equals_timms_on_uint8(monkeypatch):
    images = np.random.default_rng(1).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    timms = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0)
    timms._params_per_batch = lambda: (0.5, True)
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: ((2, 7, 5, 12), 0.6))
    expected, _ = timms([(np.ascontiguousarray(image.transpose(2, 0, 1)), 0) for image in images])
    mixed = mix_pixels(make_batch(images, 1 - 35 / 144, box=(2, 5, 5, 7)))
    assert torch.equal(mixed.permute(0, 3, 1, 2), expected)


def test_groups_are_mixed_with_themselves_reversed():
    assert partners(torch.arange(8), 4).tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    assert partners(torch.arange(8), 0).tolist() == list(range(8))


def test_normalisation_is_each_models_own_and_channels_last():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = Normalize(mean, std)(pixels)
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(
        std
    ).double().view(3, 1, 1)
    assert torch.allclose(ours.double(), expected, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "levit_128s"])
def test_weight_decay_spares_vectors_biases_and_what_the_model_names(name):
    model = timm.create_model(name)
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in build_optimizer(model, OptimConfig()).param_groups
        for parameter in group["params"]
    }
    expected = {
        name: 0.0 if parameter.ndim <= 1 or name.endswith(".bias") or name in spared else 0.02
        for name, parameter in model.named_parameters()
    }
    assert decay == expected
    assert set(decay.values()) == {0.0, 0.02}
    if name == "test_vit":
        assert decay["pos_embed"] == decay["cls_token"] == 0.0


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("dm_nfnet_f0", "skipinit_gain", 12), ("nest_tiny", "pos_embed", 3), ("xcit_nano_12_p16_224", "pos_embed", 2)],
)
def test_what_the_authors_timm_decays_and_ours_does_not(name, kind, count):
    """0-D parameters, and embeddings whose names their lists miss (docs/recipe.md)."""
    with torch.device("meta"):
        model = timm.create_model(name)
    chosen = {id(parameter) for name, parameter in model.named_parameters() if kind in name}
    groups = build_optimizer(model, OptimConfig()).param_groups
    decays = [group["weight_decay"] for group in groups for each in group["params"] if id(each) in chosen]
    assert decays == [0.0] * count


@pytest.mark.parametrize("name", ["ghostnet_100", "rexnet_100", "legacy_seresnet18"])
def test_models_whose_own_dropout_the_authors_command_line_switches_off(name):
    with torch.device("meta"):
        own, theirs = timm.create_model(name), timm.create_model(name, drop_rate=0.0)
    assert own.drop_rate == 0.2 and theirs.drop_rate == 0.0
    assert not any(layer.p for layer in theirs.modules() if isinstance(layer, torch.nn.Dropout))


@pytest.mark.parametrize("name", ["mixer_b16_224", "resmlp_12_224"])
def test_the_stem_of_these_begins_smaller_than_the_authors_and_docs_recipe_says_how_to_have_theirs(name):
    """Theirs: 0.0411, a normal distribution that is not cut off."""
    torch.manual_seed(0)
    weight = timm.create_model(name).stem.proj.weight
    assert weight.std().item() == pytest.approx(768**-0.5, rel=0.01)
    assert weight.abs().max() < 2.3 * weight.std()
    torch.nn.init.normal_(weight, std=768**-0.5 / 0.87962566103423978)  # as in docs/recipe.md
    assert weight.std().item() == pytest.approx(0.0411, rel=0.01)
    assert weight.abs().max() > 4 * weight.std()


@pytest.mark.parametrize("model", paper_models(), ids=lambda model: model.name)
def test_the_papers_models_have_the_papers_numbers_of_parameters(model):
    with torch.device("meta"):
        network = timm.create_model(model.name, **dict(model.arguments))
    assert sum(parameter.numel() for parameter in network.parameters()) == model.parameters


def test_the_papers_model_is_no_deviation_and_another_one_is():
    assert audit(parse(["--student.name", "levit_384", "--student.kwargs.distilled", "false"])) == []
    for other in (
        ["levit_384", "--student.kwargs.distilled", "true"],
        ["levit_256", "--student.kwargs.distilled", "false"],
    ):
        assert [row["key"] for row in audit(parse(["--student.name", *other]))] == ["student.kwargs"]


@pytest.mark.parametrize("name", ["resnet18", "ghostnet_100"])
def test_models_whose_filter_was_bilinear_are_evaluated_with_bicubic(name):
    assert preprocessing(timm.create_model(name, num_classes=10)).interpolation == "bicubic"


def test_the_average_follows_weights_and_buffers():
    model = timm.create_model("test_resnet")
    ema = ModelEma(model)
    before = {name: value.clone() for name, value in ema.module.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.ones_like(value))
    ema.update(0.9)
    for name, value in model.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * value if value.is_floating_point() else value
        assert torch.allclose(ema.module.state_dict()[name], expected, atol=1e-6), name


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.1), (1, 0.55), (2, 0.5 * (1 + math.cos(math.pi * 2 / 4))), (4, 0.0), (9, 0.0)]
)
def test_a_short_schedule(epoch, expected):
    schedule = ScheduleConfig(epochs=4, warmup_epochs=2, warmup_lr=0.1, min_lr=0.0)
    assert learning_rate(epoch, OptimConfig(lr=1.0), schedule) == pytest.approx(expected)
