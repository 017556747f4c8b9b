"""Matching of feature statistics: DAN (arXiv:1502.02791) and Deep CORAL (arXiv:1607.01719).

    minimize  cls_loss + mmd_weight * mmd_loss + coral_weight * coral_loss

    cls_loss   = CE(model(x_s), y_s)
    mmd_loss   = estimate of the squared maximum mean discrepancy between features_s and features_t,
                 with five Gaussian kernels, summed over feature layers
    coral_loss = |cov(features_s) - cov(features_t)|^2 / (4 D^2), likewise

Nothing is trained but the model: there is no discriminator. The losses compare the means of a
feature map, or with `feature_locations` its locations. docs/mmd.md explains every metric and
departure from the papers.

    python train_mmd.py --config configs/demo/digits.yaml configs/demo/mmd.yaml
    python train_mmd.py --config configs/demo/digits.yaml configs/demo/mmd.yaml --resume
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from common.config import not_negative
from common.errors import exit_with
from common.ranks import average_gradients
from data.views import to_views
from losses.coral import coral_loss
from losses.mmd import mmd_loss
from losses.supervised import supervised_loss
from models import build_model, feature_vectors, forward_domains
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "mmd"
    mmd_weight: float = not_negative(1.0)  # of mmd_loss
    coral_weight: float = not_negative(0.0)  # of coral_loss
    feature_layers: list[str] = field(default_factory=lambda: ["pooled"])  # layer1..4 pooled logits
    feature_locations: bool = False  # compare the locations of a map, not its mean over positions

    def trained_criteria(self):
        return set()  # of neg_entropy and infomax, the loss improves neither directly

    def rules(self):
        named, pairs = len(self.feature_layers) > 0, self.mmd_weight > 0
        return [
            *super().rules(),
            (named, "feature_layers must name a layer"),
            *([self.data.equal_batches_rule(pairs, "mmd_loss pairs")] if self.data else ()),
        ]


def main(argv: list[str] | None = None) -> int:
    # --- set-up
    config, args = parse_args(Config, __doc__, argv)
    device = get_device(config.device)
    autocast = torch.autocast(device.type, getattr(torch, config.amp), config.amp != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
    run = Run(config, args)
    domains = run.open_domains()

    # --- model
    model = build_model(config, domains.classes).to(device).train()
    model.check_layers(config.feature_layers)
    optimizer = build_optimizer(config.optim, model)
    start = run.begin(model=model, optimizer=optimizer, scaler=scaler)

    # --- data
    source = domains.batches("source", start, config.steps)
    target = domains.batches("target", start, config.steps)
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            x_t = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)

            with autocast:
                out_s, out_t = forward_domains(model, x_s, x_t, config.model)
                loss, losses = supervised_loss(out_s, y_s, config.model)

                locations, pairs = config.feature_locations, []
                for name in config.feature_layers:
                    features_s = feature_vectors(out_s.features[name], locations)
                    features_t = feature_vectors(out_t.features[name], locations)
                    pairs.append((features_s, features_t))
                if config.mmd_weight > 0:
                    losses["mmd_loss"] = sum(mmd_loss(*pair) for pair in pairs)
                    loss = loss + config.mmd_weight * losses["mmd_loss"]
                if config.coral_weight > 0:
                    losses["coral_loss"] = sum(coral_loss(*pair) for pair in pairs)
                    loss = loss + config.coral_weight * losses["coral_loss"]
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            run.log.add(**losses)
            run.monitor.add(out_t.logits)

        average_gradients(optimizer, model)
        scaler.unscale_(optimizer)
        clip_gradients(optimizer, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()

        if run.due(step, config.log_every):
            run.log.write(step, lr=lr)
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
