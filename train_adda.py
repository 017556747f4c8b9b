"""Adversarial adaptation by alternation, without gradient reversal: ADDA (arXiv:1702.05464).

    first, for source_steps   minimize cls_loss = CE(C(M_s(x_s)), y_s)
                              over the source encoder M_s and the classifier C
    then, taking turns        minimize disc_loss =
                              0.5 * (mean BCE(D(M_s(x_s)), 1) + mean BCE(D(M_t(x_t)), 0)) over D
                              minimize adv_loss = mean BCE(D(M_t(x_t)), 1)
                              over the target encoder M_t

M_t starts as a copy of M_s, which stays fixed from then on, as does C. D learns to tell the two
encoders' features apart; M_t, under inverted labels, to have its features taken for the source's.
`model` is C on M_t. `init_from`, a run of train_source.py, takes the place of the first part.
docs/adda.md explains every metric and departure from the paper.

    python train_adda.py --config configs/demo/digits.yaml configs/demo/adda.yaml
    python train_adda.py --config configs/demo/digits.yaml configs/demo/adda.yaml --resume
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from common.config import positive
from common.errors import exit_with
from common.ranks import average_gradients
from data.views import to_views
from losses.domain import SOURCE, discriminator_accuracy, domain_loss, one_domain_loss
from losses.supervised import supervised_loss
from models import DomainDiscriminator, build_model, feature_vectors
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import OptimConfig, build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "adda"
    source_steps: int | None = None  # of the first part; null: half, or 0 with init_from
    feature_layer: str = "pooled"  # layer1..4 pooled logits: what the discriminator reads
    feature_locations: bool = False  # judge every location of a map, not its mean over positions
    target_lr: float = positive(2e-4, most=1000)  # of the encoder: Adam (0.5, 0.999), constant
    disc_lr: float = positive(2e-4, most=1000)  # of the discriminator, likewise
    disc_hidden: int = positive(500, most=100_000)  # width of the discriminator's two hidden layers
    disc_norm: Literal["batch", "dropout", "none"] = "none"  # after each hidden layer

    def __post_init__(self):
        if self.source_steps is None:
            self.source_steps = 0 if self.init_from else self.steps // 2
        super().__post_init__()

    def trained_criteria(self):
        return set()  # of neg_entropy and infomax, the loss improves neither directly

    def rules(self):
        return [
            *super().rules(),
            (
                0 <= self.source_steps < self.steps,
                "source_steps must be at least 0 and less than steps",
            ),
            (
                self.init_from is not None or self.source_steps > 0,
                "source_steps: 0 needs init_from, a source model to adapt",
            ),
            (
                self.accumulate == 1,
                "accumulate: the discriminator is updated between two losses; leave it out",
            ),
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
    source_steps = 0 if args.dry_run else config.source_steps  # a dry run is of the second part
    source_model = build_model(config, domains.classes).to(device).train()
    source_model.check_layers([config.feature_layer], "feature_layer")
    model = copy.deepcopy(source_model)
    model.freeze("head", "aux_head")
    width = source_model.channels[config.feature_layer]
    discriminator = DomainDiscriminator(width, config.disc_hidden, config.disc_norm).to(device)
    source_optimizer = build_optimizer(config.optim, source_model)
    target_optim = OptimConfig(
        name="adam",
        lr=config.target_lr,
        backbone_lr_scale=config.optim.backbone_lr_scale,
        layer_decay=config.optim.layer_decay,
        betas=[0.5, 0.999],
        weight_decay=0.0,
        schedule="constant",
        fused=config.optim.fused,
    )
    target_optimizer = build_optimizer(target_optim, model)
    disc_optim = replace(target_optim, lr=config.disc_lr)
    disc_optimizer = build_optimizer(disc_optim, discriminator)
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
    source = domains.batches("source", start, config.steps)
    target = domains.batches("target", max(start, source_steps), config.steps)
    labeled = domains.batches("target_labeled", max(start, source_steps), config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        x_s, y_s = to_views(next(source), device)

        if step <= source_steps:
            rates = {"lr": set_rates(source_optimizer, config.optim, step - 1, source_steps)}
            with autocast:
                out_s = source_model(x_s)
                loss, losses = supervised_loss(out_s, y_s, config.model)

            source_optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            average_gradients(source_optimizer, source_model)
            scaler.unscale_(source_optimizer)
            clip_gradients(source_optimizer, config.optim.clip_norm)
            scaler.step(source_optimizer)
            if step == source_steps:
                model.load_state_dict(source_model.state_dict())
        else:
            rates = {"lr": config.target_lr, "disc_lr": config.disc_lr}
            x_t = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)
            source_model.eval()

            # the discriminator, on the features of both encoders at once, as its batch norm needs
            discriminator.requires_grad_(True)
            with autocast:
                with torch.no_grad():
                    out_s = source_model(x_s)
                out_t = model(x_t)
                layer, locations = config.feature_layer, config.feature_locations
                features_s = feature_vectors(out_s.features[layer], locations)
                features_t = feature_vectors(out_t.features[layer], locations)
                features = torch.cat([features_s, features_t])
                domain_logits = discriminator(features.detach()).tensor_split([len(features_s)])
                disc_loss = domain_loss(*domain_logits)
                domain_accuracy = discriminator_accuracy(*domain_logits)

            disc_optimizer.zero_grad(set_to_none=True)
            scaler.scale(disc_loss).backward()
            average_gradients(disc_optimizer)
            scaler.unscale_(disc_optimizer)
            clip_gradients(disc_optimizer, config.optim.clip_norm)
            scaler.step(disc_optimizer)

            # the target encoder, under inverted labels, with the discriminator held fixed
            discriminator.requires_grad_(False)
            with autocast:
                _, domain_logits_t = discriminator(features).tensor_split([len(features_s)])
                loss = one_domain_loss(domain_logits_t, SOURCE)
                losses = {"adv_loss": loss, "disc_loss": disc_loss}
                losses["domain_accuracy"] = domain_accuracy
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss

            target_optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            average_gradients(target_optimizer, model, discriminator)
            scaler.unscale_(target_optimizer)
            clip_gradients(target_optimizer, config.optim.clip_norm)
            scaler.step(target_optimizer)
            run.monitor.add(out_t.logits)
        scaler.update()

        run.log.add(**losses)
        if run.due(step, config.log_every):
            run.log.write(step, **rates)
        if run.due(step, config.eval_every) and step > source_steps:
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
