"""Domain-adversarial training with gradient reversal: DANN (arXiv:1505.07818), and CDAN (arXiv:1705.10667).

    minimise  cls_loss + adv_weight * adv_loss
    cls_loss = CE(model(x_s), y_s)
    adv_loss = 0.5 * (mean BCE(D(R(features_s)), 1) + mean BCE(D(R(features_t)), 0)), summed over feature layers

R is the identity whose gradient is multiplied by -reversal_coeff (the paper's lambda), so one step trains the
discriminator D to tell the domains apart, at full strength, and the features to confuse it. D judges the mean of a
feature map, or with `disc_locations` every location. `conditional` hands D the outer product of features and class
probabilities (CDAN), weighting sure images more (CDAN+E). An auxiliary head adds model.aux_weight * aux_cls_loss, its
own CE. docs/dann.md explains every metric and departure from the papers.

    python train_dann.py --config configs/demo/dann.yaml
    python train_dann.py --config configs/demo/dann.yaml seed=1 out_dir=runs/demo/dann_seed1
    python train_dann.py --config configs/demo/dann.yaml --resume

torchrun is not supported yet: one process, one device.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from common.config import RunConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from common.schedules import progress, reversal_coefficient
from data import open_domains, train_loader
from losses.cdan import MultilinearMap, entropy_weights
from losses.domain import discriminator_accuracy, domain_loss
from losses.supervised import cross_entropy, supervised_loss
from models import DomainDiscriminator, build_model, feature_vectors, forward_domains, gradient_reversal, init_from
from models.network import check_layers


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "dann"
    adv_weight: float = 1.0  # weight of adv_loss, for features and discriminators alike
    feature_layers: list[str] = field(default_factory=lambda: ["pooled"])  # layer1..layer4, pooled; one D each
    layer_weights: list[float] = field(default_factory=lambda: [1.0])  # of the reversed gradient only, one a layer
    disc_locations: bool = False  # judge every location of a feature map, not the mean over its positions
    conditional: Literal["none", "cdan", "cdan_e"] = "none"  # condition D on the class probabilities; + entropy weights
    reversal_schedule: Literal["dann", "constant", "linear"] = "dann"  # of the paper's lambda
    reversal_max: float = 1.0  # its final value; 0 leaves the features alone
    reversal_gamma: float = 10.0  # steepness of the dann schedule
    reversal_progress: int | Literal["total"] = "total"  # where it ends: the run's length, or a number of steps
    disc_hidden: int = 1024  # width of a discriminator's two hidden layers
    disc_norm: Literal["batch", "dropout", "none"] = "batch"  # after each hidden layer
    disc_lr: float | None = None  # the discriminators' own rate; null: optim.lr

    def rules(self):
        return [
            *super().rules(),
            (self.reversal_gamma > 0, "reversal_gamma must be positive"),
            (len(self.feature_layers) > 0, "feature_layers must name a layer"),
            (
                len(self.layer_weights) == len(self.feature_layers),
                "layer_weights needs one weight for each of feature_layers",
            ),
            (
                self.conditional == "none" or self.feature_layers == ["pooled"],
                "conditional needs feature_layers: [pooled], which a classifier has",
            ),
            (
                min(self.adv_weight, self.reversal_max, *self.layer_weights) >= 0,
                "adv_weight, reversal_max and layer_weights must not be negative",
            ),
            (
                self.reversal_progress == "total" or self.reversal_progress > 0,
                "reversal_progress must be total or positive",
            ),
            (self.disc_hidden > 0, "disc_hidden must be positive"),
            (self.disc_lr is None or self.disc_lr > 0, "disc_lr must be positive or null"),
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
    conditional = config.conditional != "none"
    multilinear = MultilinearMap(model.channels["pooled"], domains.num_classes) if conditional else nn.Identity()
    multilinear.to(device)
    widths = [multilinear.out_features if conditional else model.channels[name] for name in config.feature_layers]
    discriminators = nn.ModuleList(DomainDiscriminator(width, config.disc_hidden, config.disc_norm) for width in widths)
    discriminators.to(device)
    layers = list(zip(config.feature_layers, config.layer_weights, discriminators, strict=True))
    disc_lr_scale = 1.0 if config.disc_lr is None else config.disc_lr / config.optim.lr
    disc_group = {"params": list(discriminators.parameters()), "lr_scale": disc_lr_scale}
    optimizer = build_optimizer(config.optim, [*model.param_groups(config.optim.backbone_lr_scale), disc_group])
    start = run.begin(
        model=model, multilinear=multilinear, discriminators=discriminators, optimizer=optimizer, scaler=scaler
    )

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
        p = progress(step - 1, config.steps, config.reversal_progress)
        reversal_coeff = reversal_coefficient(config.reversal_schedule, p, config.reversal_max, config.reversal_gamma)
        x_s, y_s = next(source)
        x_s, y_s = x_s.to(device, non_blocking=True), y_s.to(device, non_blocking=True)
        x_t = next(target).to(device, non_blocking=True)

        with autocast:
            out_s, out_t = forward_domains(model, x_s, x_t, config.model)
            cls_loss = cross_entropy(out_s.logits, y_s)

            adv_loss, domain_accuracy, weight_s, weight_t = 0.0, 0.0, None, None
            for name, layer_weight, discriminator in layers:
                features_s, features_t = (
                    feature_vectors(out.features[name], config.disc_locations) for out in (out_s, out_t)
                )
                features = gradient_reversal(torch.cat([features_s, features_t]), layer_weight * reversal_coeff)
                if conditional:
                    probabilities = torch.cat([out_s.logits, out_t.logits]).detach().float().softmax(1)
                    features = multilinear(features, probabilities)
                if config.conditional == "cdan_e":
                    weight_s, weight_t = entropy_weights(out_s.logits), entropy_weights(out_t.logits)
                domain_logits_s, domain_logits_t = discriminator(features).split([len(features_s), len(features_t)])
                adv_loss = adv_loss + domain_loss(domain_logits_s, domain_logits_t, weight_s, weight_t)
                domain_accuracy += discriminator_accuracy(domain_logits_s, domain_logits_t) / len(layers)
            loss = cls_loss + config.adv_weight * adv_loss
            losses = {"cls_loss": cls_loss, "adv_loss": adv_loss, "domain_accuracy": domain_accuracy}
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
            run.log.write(step, reversal_coeff=reversal_coeff, lr=lr, disc_lr=lr * disc_lr_scale)
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
