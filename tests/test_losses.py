"""Losses against plain loops."""

import math

import pytest
import torch

from common.errors import UserError
from common.metrics import IGNORE_INDEX
from losses.cdan import MultilinearMap, entropy_weights
from losses.coral import coral_loss
from losses.domain import SOURCE, TARGET, discriminator_accuracy, domain_loss, one_domain_loss
from losses.entropy import attached, diversity_loss, entropy_loss, information_map
from losses.mmd import mmd_loss
from losses.supervised import cross_entropy, nll_loss, supervised_loss
from models import ModelOutput
from models.config import ModelConfig


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _slow_domain_loss(logits_s, logits_t, weight_s, weight_t) -> float:
    def mean(logits, weights, sign: int) -> float:
        pairs = zip(logits.tolist(), weights.tolist(), strict=True)
        return sum(w * _softplus(sign * x) for x, w in pairs) / len(logits)

    return 0.5 * (mean(logits_s, weight_s, -1) + mean(logits_t, weight_t, 1))


@pytest.mark.parametrize(("n_s", "n_t"), [(5, 5), (7, 2), (1, 9)])
def test_domain_loss_is_the_mean_of_both_domains_means(n_s, n_t):
    torch.manual_seed(n_s)
    logits_s, logits_t = 3 * torch.randn(n_s), 3 * torch.randn(n_t)
    weight_s, weight_t = torch.rand(n_s), torch.rand(n_t)
    plain = _slow_domain_loss(logits_s, logits_t, torch.ones(n_s), torch.ones(n_t))
    assert domain_loss(logits_s, logits_t).item() == pytest.approx(plain, rel=1e-5)
    weighted = _slow_domain_loss(logits_s, logits_t, weight_s, weight_t)
    loss = domain_loss(logits_s, logits_t, weight_s, weight_t)
    assert loss.item() == pytest.approx(weighted, rel=1e-5)


def test_domain_loss_of_an_undecided_discriminator_is_log_2():
    assert domain_loss(torch.zeros(3), torch.zeros(8)).item() == pytest.approx(math.log(2))


def test_domain_loss_takes_logits_of_any_shape():
    logits_s, logits_t = torch.randn(2, 1, 3, 4), torch.randn(5, 1, 2, 2)
    flat = domain_loss(logits_s.flatten(), logits_t.flatten())
    torch.testing.assert_close(domain_loss(logits_s, logits_t), flat)


def test_the_label_convention_does_not_matter():
    """Target labeled 1 and source 0, the discriminator's sign flipped: the same loss."""
    logits_s, logits_t = torch.randn(6), torch.randn(4)
    weight_s, weight_t = torch.rand(6), torch.rand(4)
    loss = domain_loss(logits_s, logits_t, weight_s, weight_t)
    torch.testing.assert_close(domain_loss(-logits_t, -logits_s, weight_t, weight_s), loss)
    # Control: the labels do matter.
    assert abs(domain_loss(logits_t, logits_s) - domain_loss(logits_s, logits_t)) > 1e-3


def test_an_empty_domain_counts_nothing_and_stays_attached():
    logits_s, nothing = torch.randn(4, requires_grad=True), torch.zeros(0, requires_grad=True)
    loss = domain_loss(logits_s, nothing)
    expected = 0.5 * sum(_softplus(-x) for x in logits_s.tolist()) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    both_empty = domain_loss(nothing, nothing)
    assert both_empty.item() == 0
    (loss + both_empty).backward()
    assert nothing.grad.shape == (0,)
    assert (logits_s.grad != 0).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_domain_loss_is_finite_in_half_precision(size):
    logits = torch.full((3,), size, dtype=torch.float16, requires_grad=True)
    loss = domain_loss(logits, logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * 1e4, rel=1e-3)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_discriminator_accuracy():
    right, wrong = torch.tensor([2.0, 0.5]), torch.tensor([-1.0, -3.0, -0.1])
    assert discriminator_accuracy(right, wrong).item() == 100
    assert discriminator_accuracy(wrong, right).item() == 0
    # Always the same answer: confused, whatever the sizes of the domains.
    assert discriminator_accuracy(right, right).item() == 50
    assert discriminator_accuracy(wrong, wrong).item() == 50
    three_of_four = torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert discriminator_accuracy(three_of_four, torch.tensor([-1.0])).item() == 87.5


def test_multilinear_map_is_the_outer_product():
    features, probabilities = torch.randn(3, 5), torch.rand(3, 4).softmax(1)
    mapped = MultilinearMap(5, 4)(features, probabilities)
    assert mapped.shape == (3, 20)
    for n in range(3):
        products = [features[n, d] * probabilities[n, k] for d in range(5) for k in range(4)]
        torch.testing.assert_close(mapped[n], torch.stack(products))


def test_multilinear_map_is_random_on_demand_only():
    exact, random = MultilinearMap(256, 65), MultilinearMap(512, 9, 1024)
    assert (exact.randomized, exact.out_features, len(exact.state_dict())) == (False, 16640, 0)
    assert (random.randomized, random.out_features) == (True, 1024)
    assert {name: tuple(value.shape) for name, value in random.state_dict().items()} == {
        "random_f": (512, 1024),
        "random_g": (9, 1024),
    }
    assert not list(random.parameters())  # fixed
    other, inputs = MultilinearMap(512, 9, 1024), (torch.randn(2, 512), torch.rand(2, 9))
    assert (other(*inputs) != random(*inputs)).any()
    other.load_state_dict(random.state_dict())
    assert torch.equal(other(*inputs), random(*inputs))


def test_random_multilinear_map_keeps_inner_products():
    """E <T(f, g), T(f', g')> = <f, f'> <g, g'>, the kernel of the outer products."""
    torch.manual_seed(0)
    features, probabilities = torch.randn(4, 30), torch.randn(4, 20).mul(2).softmax(1)
    exact = MultilinearMap(30, 20)(features, probabilities)
    kernels = []
    for _ in range(100):
        mapped = MultilinearMap(30, 20, 1024)(features, probabilities)
        kernels.append(mapped @ mapped.T)
    kernels = torch.stack(kernels)
    error, spread = kernels.mean(0) - exact @ exact.T, kernels.std(0) / 10
    assert (error.abs() < 4 * spread).all()  # four standard errors
    # Control: tight enough to see a wrong factor.
    assert (spread < 0.05 * (exact @ exact.T).diag().max()).all()


def test_entropy_weights_are_one_plus_exp_minus_entropy_in_nats():
    logits = 2 * torch.randn(6, 5)
    expected = []
    for row in logits.double().softmax(1).tolist():
        expected.append(1 + math.exp(sum(p * math.log(p) for p in row)))
    expected = [w / (sum(expected) / 6) for w in expected]
    assert entropy_weights(logits).tolist() == pytest.approx(expected, rel=1e-5)


def test_entropy_weights_have_mean_one_per_domain_and_no_gradient():
    for scale in (0.1, 5.0):
        weights = entropy_weights((scale * torch.randn(9, 4)).requires_grad_())
        assert weights.mean().item() == pytest.approx(1, abs=1e-6)
        assert weights.dtype == torch.float32
        assert not weights.requires_grad


def test_entropy_weights_at_the_extremes():
    sure, unsure = torch.tensor([[1e4, -1e4, 0.0]]), torch.zeros(1, 3)
    weights = entropy_weights(torch.cat([sure, unsure]).half())
    assert weights.isfinite().all()
    ratio = 2 / (1 + 1 / 3)  # exp(-log 3) = 1/3: in nats
    assert (weights[0] / weights[1]).item() == pytest.approx(ratio, rel=1e-4)
    assert entropy_weights(torch.zeros(0, 3)).shape == (0,)


def _slow_entropy(p: list[float]) -> float:
    return -sum(q * math.log(q) for q in p if q > 0) / math.log(len(p))


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3, 5)])
def test_entropy_and_diversity_against_loops(shape):
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = logits.log_softmax(1)
    points = log_p.exp().movedim(1, -1).reshape(-1, shape[1]).tolist()
    entropies = [_slow_entropy(p) for p in points]
    mean_entropy = sum(entropies) / len(points)
    assert entropy_loss(information_map(log_p)).item() == pytest.approx(mean_entropy)
    mean = [sum(column) / len(points) for column in zip(*points, strict=True)]
    assert diversity_loss(log_p).item() == pytest.approx(1 - _slow_entropy(mean))
    information = information_map(log_p)
    assert information.shape == logits.shape
    expected = torch.tensor(entropies, dtype=torch.float64)
    torch.testing.assert_close(information.sum(1).flatten(), expected)


def test_entropy_of_uniform_and_of_sure_predictions():
    uniform, sure = torch.zeros(4, 4).log_softmax(1), (1e4 * torch.eye(4)).log_softmax(1)
    for log_p, entropy in ((uniform, 1), (sure, 0)):
        losses = entropy_loss(information_map(log_p)).item(), diversity_loss(log_p).item()
        assert losses == pytest.approx((entropy, 0), abs=1e-6)
    assert diversity_loss(sure[:1]).item() == 1  # control: all of one class


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropy_is_finite_for_large_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [5e3, 5e3, -6e4]], dtype=dtype, requires_grad=True)
    log_p = logits.float().log_softmax(1)
    (entropy_loss(information_map(log_p)) + diversity_loss(log_p)).backward()
    assert logits.grad.isfinite().all()


def test_entropy_of_nothing_is_nothing_and_stays_attached():
    for shape in ((0, 3), (0, 3, 2, 2)):
        logits = torch.zeros(shape, requires_grad=True)
        log_p = logits.log_softmax(1)
        loss = entropy_loss(information_map(log_p)) + diversity_loss(log_p)
        assert loss.item() == 0
        loss.backward()


def test_one_domain_loss_is_half_of_the_domain_loss():
    logits_s, logits_t = torch.randn(5), torch.randn(3, 2)
    both = 0.5 * (one_domain_loss(logits_s, SOURCE) + one_domain_loss(logits_t, TARGET))
    torch.testing.assert_close(both, domain_loss(logits_s, logits_t))
    sure = torch.tensor([20.0])
    assert one_domain_loss(sure, SOURCE) < 1e-6
    assert one_domain_loss(sure, TARGET) > 1
    assert one_domain_loss(torch.zeros(0), SOURCE).item() == 0


def _slow_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    losses = []
    for row, label in zip(rows, labels.flatten().tolist(), strict=True):
        if label != IGNORE_INDEX:
            losses.append(math.log(sum(math.exp(x) for x in row)) - row[label])
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("shape", [(6,), (2, 5, 4)])
def test_cross_entropy_against_a_loop(shape):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], 5, *shape[1:], generator=random)
    labels = torch.randint(5, shape, generator=random)
    ours, theirs = cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours, theirs) or len(shape) > 1  # to the bit for classification
    labels.view(-1)[::3] = IGNORE_INDEX
    by_hand = _slow_cross_entropy(logits, labels)
    assert cross_entropy(logits, labels).item() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(cross_entropy(logits, labels), nll_loss(logits.log_softmax(1), labels))


@pytest.mark.parametrize("shape", [(6,), (2, 5, 4)])
def test_label_smoothing_is_that_of_torch(shape):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], 5, *shape[1:], generator=random)
    labels = torch.randint(5, shape, generator=random)
    labels.view(-1)[::3] = IGNORE_INDEX
    theirs = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=0.1
    )
    smoothed = cross_entropy(logits, labels, smoothing=0.1)
    torch.testing.assert_close(smoothed, theirs)
    assert abs(smoothed - cross_entropy(logits, labels)) > 1e-3  # control
    section = ModelConfig(aux_weight=0.5, label_smoothing=0.1)
    loss, parts = supervised_loss(ModelOutput(logits, {}, logits), labels, section)
    assert torch.equal(parts["cls_loss"], smoothed)
    torch.testing.assert_close(loss, 1.5 * theirs)
    nothing = torch.full(shape, IGNORE_INDEX)
    assert cross_entropy(logits, nothing, smoothing=0.1).item() == 0


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3), (0, 3, 4, 4)])
def test_cross_entropy_of_nothing_is_nothing_and_stays_attached(shape):
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.full((shape[0], *shape[2:]), IGNORE_INDEX)
    loss = cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    if shape[0]:  # control
        assert torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX).isnan()


def test_cross_entropy_of_many_classes_and_of_half_precision():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([255, 0, 299, 255])
    theirs = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(cross_entropy(logits, labels), theirs)
    large = torch.tensor([[1e4, -1e4]], dtype=torch.float16, requires_grad=True)
    loss = cross_entropy(large, torch.tensor([1]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2e4, rel=1e-3)
    assert large.grad.isfinite().all()


def test_supervised_loss_adds_the_auxiliary_head():
    logits, aux_logits = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    labels = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    labels[0, :2] = IGNORE_INDEX
    main, aux = cross_entropy(logits, labels), cross_entropy(aux_logits, labels)
    section = ModelConfig(aux_weight=0.3)
    loss, parts = supervised_loss(ModelOutput(logits, {}, aux_logits), labels, section)
    torch.testing.assert_close(loss, main + 0.3 * aux)
    assert parts == {"cls_loss": main, "aux_cls_loss": aux}  # neither is weighted
    loss, parts = supervised_loss(ModelOutput(logits, {}), labels, section)
    assert torch.equal(loss, main)
    assert parts == {"cls_loss": main}
    assert abs(main - aux) > 1e-3  # control


# --- statistics of features


def plain_mmd(x_s: torch.Tensor, x_t: torch.Tensor, widths=(0.125, 0.25, 0.5, 1.0, 2.0)) -> float:
    """The U-statistic over pairs, term by term."""
    rows, n = [*x_s.double(), *x_t.double()], len(x_s)
    mean = sum(float((a - b).square().sum()) for a in rows for b in rows) / len(rows) ** 2

    def k(a, b) -> float:
        return sum(math.exp(-float((a - b).square().sum()) / (2 * w * mean)) for w in widths)

    s, t = rows[:n], rows[n:]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    terms = (k(s[i], s[j]) + k(t[i], t[j]) - k(s[i], t[j]) - k(s[j], t[i]) for i, j in pairs)
    return sum(terms) / (n * (n - 1))


def plain_coral(x_s: torch.Tensor, x_t: torch.Tensor) -> float:
    def covariance(x):
        mean, d = x.mean(0), x.shape[1]
        return [
            [sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in x) / (len(x) - 1) for j in range(d)]
            for i in range(d)
        ]

    a, b, d = covariance(x_s.double()), covariance(x_t.double()), x_s.shape[1]
    return float(sum((a[i][j] - b[i][j]) ** 2 for i in range(d) for j in range(d)) / (4 * d**2))


@pytest.mark.parametrize("n", [2, 7, 40])
def test_mmd_against_a_loop(n):
    x_s, x_t = randn(n, 5), 0.5 + 2 * randn(n, 5, seed=1)
    assert float(mmd_loss(x_s, x_t)) == pytest.approx(plain_mmd(x_s, x_t), abs=1e-5)
    assert float(mmd_loss(x_s, x_t, (1.0,))) == pytest.approx(plain_mmd(x_s, x_t, (1.0,)), abs=1e-5)
    assert float(mmd_loss(x_t, x_s)) == pytest.approx(float(mmd_loss(x_s, x_t)), abs=1e-6)
    assert abs(float(mmd_loss(x_s, x_t))) > 0.1  # control


@pytest.mark.parametrize("n", [3, 64])
def test_equal_samples_have_no_distance(n):
    x = randn(n, 6)
    assert float(mmd_loss(x, x)) == pytest.approx(0, abs=1e-5)
    assert float(coral_loss(x, x)) == 0
    assert float(mmd_loss(x, x + 3)) > 1
    assert float(coral_loss(x, 3 * x)) > 0.1


def test_mmd_is_unbiased():
    """Over many pairs of samples of one distribution its mean is 0, and it takes both signs."""
    pairs = [(randn(8, 3, seed=2 * i), randn(8, 3, seed=2 * i + 1)) for i in range(400)]
    values = torch.stack([mmd_loss(*pair) for pair in pairs])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 20
    assert values.min() < 0 < values.max()


@pytest.mark.parametrize(("n", "m"), [(2, 2), (9, 6)])
def test_coral_against_a_loop(n, m):
    x_s, x_t = randn(n, 4), 2 * randn(m, 4, seed=1)
    assert float(coral_loss(x_s, x_t)) == pytest.approx(plain_coral(x_s, x_t), rel=1e-5)


@pytest.mark.parametrize("loss", [mmd_loss, coral_loss])
def test_statistics_of_little_or_nothing(loss):
    for n in (0, 1):
        x = randn(n, 4).requires_grad_()
        value = loss(x, x.detach())
        value.backward()
        assert value.item() == 0
        assert (x.grad == 0).all()
    same = torch.ones(5, 4, requires_grad=True)  # equal rows: the kernel has no width
    loss(same, same.detach()).backward()
    assert same.grad.isfinite().all()


def test_mmd_of_unequal_numbers_is_refused():
    with pytest.raises(UserError, match=r"mmd_loss pairs source and target.* 4 and 5"):
        mmd_loss(randn(4, 2), randn(5, 2))


@pytest.mark.parametrize("loss", [mmd_loss, coral_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_as_exact_under_autocast(loss, dtype):
    x_s, x_t = randn(20, 6), 1 + randn(20, 6, seed=1)
    with torch.autocast("cpu", dtype):
        low = loss(x_s, x_t)
        assert (x_s @ x_t.T).dtype == dtype  # control: autocast was on
    assert low.dtype == torch.float32
    assert torch.equal(low, loss(x_s, x_t))


@pytest.mark.parametrize("loss", [mmd_loss, coral_loss])
def test_descent_matches_the_statistics(loss):
    x_s, x_t = randn(32, 3), (2 + 3 * randn(32, 3, seed=1)).requires_grad_()
    first = float(loss(x_s, x_t.detach()))
    for _ in range(100):
        (gradient,) = torch.autograd.grad(loss(x_s, x_t), x_t)
        x_t = (x_t - 20 * gradient / gradient.norm() / 20).detach().requires_grad_()
    assert float(loss(x_s, x_t.detach())) < 0.2 * first


def test_a_loss_of_weight_0_has_no_backward_pass():
    log_p = torch.randn(4, 3, requires_grad=True).log_softmax(1)
    for weight in (0, 0.5):
        loss = diversity_loss(attached(log_p, weight))
        assert loss.requires_grad == (weight > 0)
        assert torch.equal(loss, diversity_loss(log_p))
