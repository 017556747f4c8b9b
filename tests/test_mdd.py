"""Margin disparity discrepancy: the loss, the second head, and what the loss moves."""

import math

import pytest
import torch
from torch import nn

from losses.mdd import disagreement_loss
from losses.supervised import cross_entropy
from models import build_classifier, build_segmenter, forward_domains, forward_head
from models.config import ModelConfig
from models.gradient_reversal import gradient_reversal
from tests.helpers import TASKS, differing, metrics, tiny_config, train, weights

SHAPES = [(7, 3), (1, 2), (2, 4, 3, 5)]


def draw(*shape: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K, ...) and classes (N, ...)."""
    random = torch.Generator().manual_seed(len(shape))
    classes = torch.randint(shape[1], (shape[0], *shape[2:]), generator=random)
    return scale * torch.randn(*shape, generator=random), classes


def images(n: int, seed: int = 0, size: int = 64) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=random)


# --- the loss


def plain_disagreement(logits: torch.Tensor, predictions: torch.Tensor) -> float:
    rows = logits.double().movedim(1, -1).flatten(0, -2).tolist()
    losses = []
    for row, k in zip(rows, predictions.flatten().tolist(), strict=True):
        others = [z for j, z in enumerate(row) if j != k]
        most_of_all, most = max(row), max(others)
        log_all = most_of_all + math.log(sum(math.exp(z - most_of_all) for z in row))
        losses.append(log_all - most - math.log(sum(math.exp(z - most) for z in others)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_disagreement_against_a_loop(shape, dtype):
    logits, classes = draw(*shape)
    expected = plain_disagreement(logits, classes)
    assert float(disagreement_loss(logits.to(dtype), classes)) == pytest.approx(expected, rel=1e-5)
    naive = -torch.log(1 - logits.double().softmax(1)).gather(1, classes[:, None]).mean()
    assert float(naive) == pytest.approx(expected, rel=1e-6)
    other = (classes + 1) % shape[1]  # control
    assert abs(plain_disagreement(logits, other) - expected) > 0.01


def test_each_prediction_takes_its_own_column():
    """Indexing columns by all predictions gives an N x N matrix, whose mean is another number.

    Two rows swap what they predict and what the adversary finds likely: they disagree, and the
    mean over all pairs of them cannot see it.
    """
    logits = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0]])
    agreeing, disagreeing = torch.tensor([0, 1]), torch.tensor([1, 0])
    expected = [plain_disagreement(logits, k) for k in (agreeing, disagreeing)]
    assert expected[0] > 3.9
    assert expected[1] < 0.1
    for k, value in zip((agreeing, disagreeing), expected, strict=True):
        assert float(disagreement_loss(logits, k)) == pytest.approx(value, rel=1e-4)
    # control: the mistake
    log_rest = torch.log(1 - logits.softmax(1))
    crossed = [log_rest[:, k] for k in (agreeing, disagreeing)]
    assert [matrix.shape for matrix in crossed] == [(2, 2), (2, 2)]
    assert float(crossed[0].mean()) == pytest.approx(float(crossed[1].mean()))


@pytest.mark.parametrize("margin", [5.0, 20.0, 90.0, 500.0])
def test_disagreement_is_exact_where_the_adversary_is_certain(margin):
    logits, classes = torch.tensor([[margin, 0.0, -1.0]], requires_grad=True), torch.tensor([0])
    loss = disagreement_loss(logits, classes)
    loss.backward()
    assert loss.item() == pytest.approx(plain_disagreement(logits.detach(), classes), rel=1e-6)
    # p_k for the predicted class, and p_j less the share of j among the other classes
    p, share = logits.detach().double().softmax(1), torch.tensor([0.0, 1.0, math.exp(-1)])
    expected = p - share / share.sum()
    expected[0, 0] = p[0, 0]
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-6)
    assert logits.grad.abs().max() <= 1 + 1e-6
    naive = -torch.log(1 - logits.detach().softmax(1))[0, 0]  # control
    assert naive.isinf() == (margin >= 20)


def test_no_prediction_gives_0():
    for shape in ((0, 3), (0, 3, 4, 4)):
        logits = torch.zeros(shape, requires_grad=True)
        loss = disagreement_loss(logits, torch.zeros(shape[0], *shape[2:], dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0
        assert logits.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_disagreement_is_as_exact_under_autocast(dtype):
    logits, classes = draw(6, 4)
    low = logits.to(dtype)
    with torch.autocast("cpu", dtype):
        loss = disagreement_loss(low, classes)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, disagreement_loss(low.float(), classes))


@pytest.mark.parametrize("margin", [1.0, 4.0])
def test_equal_domains_have_the_equilibrium_of_the_paper(margin):
    """The best adversary gives the prediction the probability margin / (1 + margin) (section 4)."""
    logits, k = torch.zeros(1, 3, requires_grad=True), torch.tensor([0])
    for _ in range(300):
        loss = margin * cross_entropy(logits, k) + disagreement_loss(logits, k)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.5 * gradient).detach().requires_grad_()
    assert float(logits.detach().softmax(1)[0, 0]) == pytest.approx(margin / (1 + margin), abs=1e-3)


# --- the second head


def build(task: str, **keys):
    """(model, config): with batch norm within the head for segmentation."""
    torch.manual_seed(0)
    if task == "classification":
        config = ModelConfig(backbone="lenet", bottleneck=8, **keys)
        return build_classifier(config, 5, "."), config
    config = ModelConfig(backbone="mobilenet_v2", head="segformer", **keys)
    return build_segmenter(config, 5, "."), config


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("bn", ["concat", "separate", "frozen"])
def test_a_second_head_is_forwarded_as_the_models_own(task, bn):
    """The own head in its place gives the own logits, with batch norm over the same images."""
    model, config = build(task, bn=bn)
    x_s, x_t = images(2), images(3, seed=1) // 2
    out_s, out_t = forward_domains(model, x_s, x_t, config)
    logits_s, logits_t = forward_head(model, model.head, out_s, out_t, lambda feature: feature)
    torch.testing.assert_close(logits_s, out_s.logits)
    torch.testing.assert_close(logits_t, out_t.logits)
    # control: the other kind of forward has other statistics, where the head has batch norm
    one = out_s.joint is not None
    apart = [out._replace(joint=None) for out in (out_s, out_t)]
    apart = forward_head(model, model.head, *apart, lambda feature: feature)
    difference = float((apart[0] - out_s.logits).detach().abs().max())
    assert (difference > 1e-4) == (one and task == "segmentation")


@pytest.mark.parametrize("task", TASKS)
def test_domains_of_two_sizes_have_logits_of_two_sizes(task):
    model, config = build(task, bn="separate")
    outputs = forward_domains(model, images(2), images(3, size=96), config)
    logits = forward_head(model, model.new_head(), *outputs, lambda feature: feature)
    assert [x.shape for x in logits] == [out.logits.shape for out in outputs]


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("classification", {}),
        ("classification", {"weight_norm": True}),
        ("classification", {"head_hidden": 6}),
        ("segmentation", {"channels_last": True}),
    ],
)
def test_a_new_head_has_weights_of_its_own(task, keys):
    model, _ = build(task, **keys)
    own = {name: value.clone() for name, value in model.head.state_dict().items()}
    head = model.new_head()
    assert {name: value.shape for name, value in head.state_dict().items()} == {
        name: value.shape for name, value in own.items()
    }
    matrices = {name: p for name, p in head.named_parameters() if p.dim() > 1}
    assert matrices
    assert all((p != own[name]).any() for name, p in matrices.items())
    for mine, its in zip(head.parameters(), model.head.parameters(), strict=True):
        assert mine.requires_grad
        assert mine.stride() == its.stride()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(7)
    assert differing(own, dict(model.head.state_dict())) == 0


def test_a_new_head_has_synchronized_batch_norm_where_the_models_own_has():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("segmentation")[0])
    kinds = {type(module) for module in model.new_head().modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds


# --- what the adversary's loss reaches


def gradients(task: str, coeff: float) -> tuple[dict, dict]:
    """Gradients of 4 adv_loss_s + adv_loss_t: ({name: of the model's}, {name: of the adversary's}).

    The model is in eval mode, so that batch norm does not tie the features of its heads.
    """
    model, config = build(task)
    torch.manual_seed(1)
    adversary = model.new_head()
    out_s, out_t = forward_domains(model.eval(), images(2), images(3, seed=1), config)
    logits_s, logits_t = forward_head(
        model, adversary.eval(), out_s, out_t, lambda feature: gradient_reversal(feature, coeff)
    )
    loss = 4 * cross_entropy(logits_s, out_s.logits.argmax(1))
    (loss + disagreement_loss(logits_t, out_t.logits.argmax(1))).backward()
    return tuple(
        {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        for module in (model, adversary)
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_reversal_is_of_the_features_alone(task):
    model, adversary = gradients(task, 0.1)
    plain, plain_adversary = gradients(task, -1.0)  # the identity
    assert not any(name.startswith(("head.", "aux_head.")) for name in model)
    assert any(name.startswith("backbone.") for name in model)
    assert max(float(grad.abs().max()) for grad in model.values()) > 1e-4
    for name, grad in model.items():
        torch.testing.assert_close(grad, -0.1 * plain[name], rtol=1e-3, atol=1e-6)
    for name, grad in adversary.items():
        torch.testing.assert_close(grad, plain_adversary[name])


def test_without_reversal_the_model_does_not_feel_the_adversary(tmp_path):
    """Which learns at full strength; the model trains as without it, to the bit."""
    runs = {"off": ["adv_weight=0"], "unreversed": ["reversal_max=0"], "on": ["margin=2"]}
    config = tiny_config(tmp_path, steps=4, eval_every=4, save_every=4, log_every=1)
    state = {}
    for name, keys in runs.items():
        assert train("train_mdd", config, *keys, f"out_dir={tmp_path}/{name}") == 0
        state[name] = weights(tmp_path / name, "checkpoints/step_00000004.pt")
    model, adversary = (
        {name: saved[part] for name, saved in state.items()} for part in ("model", "adversary")
    )
    assert differing(model["off"], model["unreversed"]) == 0
    assert differing(model["off"], model["on"]) > 100  # control
    assert differing(adversary["off"], adversary["unreversed"]) > 10
    line = metrics(tmp_path / "on")[0]
    assert line["adv_loss"] == pytest.approx(2 * line["adv_loss_s"] + line["adv_loss_t"], rel=1e-5)


def test_the_adversary_learns_at_the_rate_of_a_new_layer(tmp_path):
    config = tiny_config(tmp_path, steps=2, eval_every=2, save_every=2)
    keys = ["optim.backbone_lr_scale=0.1", "model.head_hidden=16"]
    assert train("train_mdd", config, *keys) == 0
    state = weights(tmp_path / "run", "checkpoints/step_00000002.pt")
    groups = state["optimizer"]["param_groups"]
    assert [group["lr_scale"] for group in groups] == [0.1, 1.0, 1.0]
    assert len(groups[2]["params"]) == len(state["adversary"]) == 4
    assert set(state["adversary"]) == {"0.weight", "0.bias", "3.weight", "3.bias"}
