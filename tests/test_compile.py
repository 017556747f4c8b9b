"""torch.compile of the networks: one graph each, the same outputs, and the real command."""

import copy
from functools import partialmethod

import pytest
import torch

from common.errors import UserError
from models.classifier import build_classifier
from models.config import ModelConfig
from models.network import Network, forward_domains
from models.segmenter import build_segmenter
from tests.helpers import differing, metrics, others_slow, tiny_config, train, weights

NETWORKS = {
    "lenet": (build_classifier, {"backbone": "lenet"}),
    "resnet50": (build_classifier, {"backbone": "resnet50", "bn": "separate", "dropout": 0.1}),
    "dinov2": (build_classifier, {"backbone": "dinov2_vits14", "drop_path": 0.1}),
    "deeplab": (build_segmenter, {"backbone": "resnet50", "bn": "separate", "aux_weight": 0.1}),
}


def outputs(model, config: ModelConfig, training: bool) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x_s, x_t = (torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8) for _ in range(2))
    model.train(training)
    out_s, out_t = forward_domains(model, x_s, x_t, config)
    return [out_s.logits, out_t.logits]


@pytest.mark.parametrize("name", others_slow(NETWORKS, ("deeplab",)))
def test_a_network_is_one_graph_with_the_same_outputs(name):
    """`fullgraph` raises where torch would leave the graph."""
    build, keys = NETWORKS[name]
    config = ModelConfig(bn_running="target" if keys.get("bn") else "both", **keys)
    eager = build(config, 5, ".")
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="eager")
    for training in (True, False) if name == "lenet" else (True,):
        pairs = outputs(eager, config, training), outputs(compiled, config, training)
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
    outputs(compiled, config, True)[1].sum().backward()
    assert all(p.grad is not None for p in compiled.backbone.parameters())
    assert eager.state_dict().keys() == compiled.state_dict().keys()


def test_a_copy_of_a_compiled_network_is_compiled():
    """Such as the teacher of self-training."""
    model = build_classifier(ModelConfig(), 5, ".")
    assert copy.deepcopy(model).compiled is None
    model.compile(backend="eager")
    twin = copy.deepcopy(model)
    assert twin.compiled == {"backend": "eager"}
    x = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    for network in (model, twin):
        network.eval()
    explanation = torch._dynamo.explain(twin.forward)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    assert torch.equal(model(x).logits, twin(x).logits)


@pytest.mark.slow
def test_the_default_backend():
    """It writes C++."""
    eager = build_classifier(ModelConfig(), 5, ".").train()
    compiled = copy.deepcopy(eager)
    compiled.compile()
    x = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    for model in (eager, compiled):
        model(x).logits.square().sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (eager, compiled)]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


@pytest.mark.parametrize(
    "script",
    others_slow(
        ("train_source", "train_pseudo", "train_adda", "train_dann", "train_mdd"),
        ("train_pseudo", "train_dann"),
    ),
)
def test_a_compiled_run_trains_what_an_eager_one_does(tmp_path, monkeypatch, script):
    """The graph is one node of autograd, as with the default backend."""
    monkeypatch.setattr(Network, "compile", partialmethod(Network.compile, backend="aot_eager"))
    keys = {"reversal_bound": "null"} if script == "train_dann" else {}
    config = tiny_config(tmp_path, steps=6, **keys)
    for name in ("false", "true"):
        assert train(script, config, f"compile={name}", f"out_dir={tmp_path}/{name}") == 0
    assert differing(*(weights(tmp_path / name) for name in ("false", "true"))) == 0
    assert metrics(tmp_path / "false") == metrics(tmp_path / "true")


def test_gradients_within_a_compiled_network_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(UserError, match="compile needs reversal_bound: null"):
        train("train_dann", config, "compile=true", "--dry-run")
