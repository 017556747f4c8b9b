"""Adversarial adaptation by alternation, without gradient reversal: ADDA (arXiv:1702.05464).

    first, for source_steps   minimise cls_loss = CE(C(M_s(x_s)), y_s) over the source encoder M_s and the classifier C
    then, taking turns        minimise disc_loss = 0.5 * (mean BCE(D(M_s(x_s)), 1) + mean BCE(D(M_t(x_t)), 0)) over D
                              minimise adv_loss = mean BCE(D(M_t(x_t)), 1) over the target encoder M_t

M_t starts as a copy of M_s. From then on M_s and C stay as they are: D learns to tell the two encoders' features apart,
and M_t, under inverted labels, to have its own taken for the source's. `model` is C on M_t. `init_from`, a run of
train_source.py, takes the place of the first part. docs/adda.md explains every metric and departure.

    python train_adda.py --config configs/demo/adda.yaml
    python train_adda.py --config configs/demo/adda.yaml seed=1 out_dir=runs/demo/adda_seed1
    python train_adda.py --config configs/demo/adda.yaml --resume

torchrun is not supported yet: one process, one device.
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from common.config import OptimConfig, RunConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from data import open_domains, train_loader
from losses.domain import SOURCE, discriminator_accuracy, domain_loss, one_domain_loss
from losses.supervised import cross_entropy, supervised_loss
from models import DomainDiscriminator, build_model, feature_vectors, init_from
from models.network import check_layers


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "adda"
    source_steps: int | None = None  # of `steps`, for the source model first; null: half, with init_from none
    feature_layer: str = "pooled"  # layer1..layer4, pooled: what the discriminator reads
    feature_locations: bool = False  # judge every location of a feature map, not the mean over its positions
    target_lr: float = 2e-4  # of the target encoder: Adam (0.5, 0.999), constant
    disc_lr: float = 2e-4  # of the discriminator, likewise
    disc_hidden: int = 500  # width of the discriminator's two hidden layers
    disc_norm: Literal["batch", "dropout", "none"] = "none"  # after each hidden layer

    def __post_init__(self):
        if self.source_steps is None:
            self.source_steps = 0 if self.init_from else self.steps // 2
        super().__post_init__()

    def rules(self):
        return [
            *super().rules(),
            (0 <= self.source_steps < self.steps, "source_steps must be at least 0 and less than steps"),
            (
                self.init_from is not None or self.source_steps > 0,
                "source_steps: 0 needs init_from, a source model to adapt",
            ),
            (min(self.target_lr, self.disc_lr) > 0, "target_lr and disc_lr must be positive"),
            (self.disc_hidden > 0, "disc_hidden must be positive"),
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
    source_steps = 0 if args.dry_run else config.source_steps  # a dry run takes a step of the second part
    source_model = build_model(config, domains.num_classes)
    if config.init_from:
        init_from(source_model, config.init_from, domains.classes)
    source_model.to(device).train()
    check_layers(source_model, [config.feature_layer], "feature_layer")
    model = copy.deepcopy(source_model)
    model.freeze("head", "aux_head")
    width = source_model.channels[config.feature_layer]
    discriminator = DomainDiscriminator(width, config.disc_hidden, config.disc_norm).to(device)
    scale = config.optim.backbone_lr_scale
    source_optimizer = build_optimizer(config.optim, source_model.param_groups(scale))
    adam = OptimConfig(name="adam", betas=[0.5, 0.999], weight_decay=0.0, schedule="constant", fused=config.optim.fused)
    target_optimizer = build_optimizer(replace(adam, lr=config.target_lr), model.param_groups(scale))
    disc_group = {"params": list(discriminator.parameters()), "lr_scale": 1.0}
    disc_optimizer = build_optimizer(replace(adam, lr=config.disc_lr), [disc_group])
    start = run.begin(
        model=model,
        source_model=source_model,
        discriminator=discriminator,
        source_optimizer=source_optimizer,
        target_optimizer=target_optimizer,
        disc_optimizer=disc_optimizer,
        scaler=scaler,
    )

    # --- data
    source = iter(train_loader(domains.source, config.data, config.seed, "source", start, config.steps))
    adapted = max(start, source_steps)
    target = iter(train_loader(domains.target, config.data, config.seed, "target", adapted, config.steps))
    labeled = iter(
        train_loader(domains.target_labeled, config.data, config.seed, "target_labeled", adapted, config.steps)
    )
    evaluation = domains.evaluation()

    # --- train
    for step in range(start + 1, config.steps + 1):
        x_s, y_s = next(source)
        x_s, y_s = x_s.to(device, non_blocking=True), y_s.to(device, non_blocking=True)

        if step <= source_steps:
            rates = {"lr": set_rates(source_optimizer, config.optim, step - 1, source_steps)}
            with autocast:
                out_s = source_model(x_s)
                cls_loss = cross_entropy(out_s.logits, y_s)
                loss, losses = cls_loss, {"cls_loss": cls_loss}
                if out_s.aux_logits is not None:
                    losses["aux_cls_loss"] = cross_entropy(out_s.aux_logits, y_s)
                    loss = loss + config.model.aux_weight * losses["aux_cls_loss"]

            source_optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(source_optimizer)
            if step == source_steps:
                model.load_state_dict(source_model.state_dict())
        else:
            rates = {"lr": config.target_lr, "disc_lr": config.disc_lr}
            x_t = next(target).to(device, non_blocking=True)
            source_model.eval()

            # the discriminator, on the features of both encoders
            discriminator.requires_grad_(True)
            with autocast:
                with torch.no_grad():
                    out_s = source_model(x_s)
                out_t = model(x_t)
                features_s, features_t = (
                    feature_vectors(out.features[config.feature_layer], config.feature_locations)
                    for out in (out_s, out_t)
                )
                domain_logits_s, domain_logits_t = discriminator(features_s), discriminator(features_t.detach())
                disc_loss = domain_loss(domain_logits_s, domain_logits_t)
                domain_accuracy = discriminator_accuracy(domain_logits_s, domain_logits_t)

            disc_optimizer.zero_grad(set_to_none=True)
            scaler.scale(disc_loss).backward()
            scaler.step(disc_optimizer)

            # the target encoder, under inverted labels, with the discriminator held fixed
            discriminator.requires_grad_(False)
            with autocast:
                adv_loss = one_domain_loss(discriminator(features_t), SOURCE)
                loss, losses = adv_loss, {"adv_loss": adv_loss, "disc_loss": disc_loss}
                losses["domain_accuracy"] = domain_accuracy
                if domains.target_labeled:
                    x_l, y_l = (x.to(device, non_blocking=True) for x in next(labeled))
                    losses["target_cls_loss"] = supervised_loss(model(x_l), y_l, config.model.aux_weight)
                    loss = loss + losses["target_cls_loss"]

            target_optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(target_optimizer)
        scaler.update()

        run.log.add(**losses)
        if run.due(step, config.log_every):
            run.log.write(step, **rates)
        if run.due(step, config.eval_every) and step > source_steps:
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
