"""Matching of feature statistics: DAN (arXiv:1502.02791) by the MMD, and Deep CORAL (arXiv:1607.01719).

    minimise  cls_loss + mmd_weight * mmd_loss + coral_weight * coral_loss
    cls_loss   = CE(model(x_s), y_s)
    mmd_loss   = estimate of the squared maximum mean discrepancy between features_s and features_t, with five Gaussian
                 kernels, summed over feature layers
    coral_loss = |cov(features_s) - cov(features_t)|^2 / (4 D^2), likewise

Nothing is learnt but the model: no discriminator. Compared are the means of a feature map, or with `feature_locations`
its locations. An auxiliary head adds model.aux_weight * aux_cls_loss, its own CE. docs/mmd.md explains every metric and
departure from the papers.

    python train_mmd.py --config configs/demo/mmd.yaml
    python train_mmd.py --config configs/demo/mmd.yaml seed=1 out_dir=runs/demo/mmd_seed1
    python train_mmd.py --config configs/demo/mmd.yaml --resume

torchrun is not supported yet: one process, one device.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from common.config import RunConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from data import open_domains, train_loader
from losses.coral import coral_loss
from losses.mmd import mmd_loss
from losses.supervised import cross_entropy, supervised_loss
from models import build_model, feature_vectors, forward_domains, init_from
from models.network import check_layers


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "mmd"
    mmd_weight: float = 1.0  # of mmd_loss
    coral_weight: float = 0.0  # of coral_loss
    feature_layers: list[str] = field(default_factory=lambda: ["pooled"])  # layer1..layer4, pooled
    feature_locations: bool = False  # compare the locations of a feature map, not its means over positions

    def rules(self):
        return [
            *super().rules(),
            (len(self.feature_layers) > 0, "feature_layers must name a layer"),
            (min(self.mmd_weight, self.coral_weight) >= 0, "mmd_weight and coral_weight must not be negative"),
        ]


def main(argv: list[str] | None = None) -> int:
    # --- set-up
    config, args = parse_args(Config, __doc__, argv)
    device = get_device(config.device)
    seed_everything(config.seed)
    autocast = torch.autocast(device.type, getattr(torch, config.amp), enabled=config.amp != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
    run = Run(config, args)
    domains = open_domains(config.data, config.seed, args.dry_run)
    run.show(domains)

    # --- model
    model = build_model(config, domains.num_classes)
    if config.init_from:
        init_from(model, config.init_from, domains.classes)
    model.to(device).train()
    check_layers(model, config.feature_layers)
    optimizer = build_optimizer(config.optim, model.param_groups(config.optim.backbone_lr_scale))
    start = run.begin(model=model, optimizer=optimizer, scaler=scaler)

    # --- data
    source = iter(train_loader(domains.source, config.data, config.seed, "source", start, config.steps))
    target = iter(train_loader(domains.target, config.data, config.seed, "target", start, config.steps))
    labeled = iter(
        train_loader(domains.target_labeled, config.data, config.seed, "target_labeled", start, config.steps)
    )
    evaluation = domains.evaluation()

    # --- train
    for step in range(start + 1, config.steps + 1):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        x_s, y_s = next(source)
        x_s, y_s = x_s.to(device, non_blocking=True), y_s.to(device, non_blocking=True)
        x_t = next(target).to(device, non_blocking=True)

        with autocast:
            out_s, out_t = forward_domains(model, x_s, x_t, config.model)
            cls_loss = cross_entropy(out_s.logits, y_s)
            loss, losses = cls_loss, {"cls_loss": cls_loss}

            pairs = [
                [feature_vectors(out.features[name], config.feature_locations) for out in (out_s, out_t)]
                for name in config.feature_layers
            ]
            if config.mmd_weight > 0:
                losses["mmd_loss"] = sum(mmd_loss(*pair) for pair in pairs)
                loss = loss + config.mmd_weight * losses["mmd_loss"]
            if config.coral_weight > 0:
                losses["coral_loss"] = sum(coral_loss(*pair) for pair in pairs)
                loss = loss + config.coral_weight * losses["coral_loss"]
            if out_s.aux_logits is not None:
                losses["aux_cls_loss"] = cross_entropy(out_s.aux_logits, y_s)
                loss = loss + config.model.aux_weight * losses["aux_cls_loss"]
            if domains.target_labeled:
                x_l, y_l = (x.to(device, non_blocking=True) for x in next(labeled))
                losses["target_cls_loss"] = supervised_loss(model(x_l), y_l, config.model.aux_weight)
                loss = loss + losses["target_cls_loss"]

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        run.log.add(**losses)
        if run.due(step, config.log_every):
            run.log.write(step, lr=lr)
        if run.due(step, config.eval_every):
            with autocast:
                metrics = evaluate(model, **evaluation, device=device)
            run.evaluated(step, metrics, model)
        if run.due(step, config.save_every):
            run.save(step)
        if run.stopping:
            return run.stopped(step)

    run.finish(target_test=domains.target_test_note, classes=domains.classes)
    return 0


if __name__ == "__main__":
    exit_with(main)
