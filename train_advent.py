"""Entropy minimisation (MinEnt) and adversarial entropy minimisation (AdvEnt) of ADVENT (arXiv:1811.12833).

    minimise over the model          cls_loss + ent_weight * ent_loss + div_weight * div_loss + adv_weight * adv_loss
    minimise over the discriminator  disc_loss = 0.5 * (mean BCE(D(I_s), 1) + mean BCE(D(I_t), 0))

    I        = -p log p / log K for every class, the weighted self-information of the prediction p (of each pixel)
    ent_loss = mean over target predictions of the sum of I
    adv_loss = mean BCE(D(I_t), 1): D, held fixed, shall take the target's self-information for the source's
    div_loss = 1 - entropy of the mean target prediction; with ent_loss it is information maximisation

MinEnt is `adv_weight: 0`, AdvEnt is `ent_weight: 0`. An auxiliary head (`model.aux_weight`) adds the same losses of its
own predictions, with weights and a discriminator of its own. docs/advent.md explains every metric and departure.

    python train_advent.py --config configs/demo/minent.yaml
    python train_advent.py --config configs/demo/minent.yaml seed=1 out_dir=runs/demo/minent_seed1
    python train_advent.py --config configs/demo/minent.yaml --resume

torchrun is not supported yet: one process, one device.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from common.config import OptimConfig, RunConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from data import open_domains, train_loader
from losses.domain import SOURCE, discriminator_accuracy, domain_loss, one_domain_loss
from losses.entropy import diversity_loss, entropy_loss, information_map
from losses.supervised import nll_loss, supervised_loss
from models import build_discriminator, build_model, forward_domains, init_from


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "advent"
    ent_weight: float = 0.001  # of the target's entropy (the paper's lambda_ent)
    adv_weight: float = 0.001  # of fooling the discriminator (the paper's lambda_adv)
    div_weight: float = 0.0  # of div_loss: keeps entropy minimisation from collapsing to few classes
    aux_ent_weight: float | None = None  # of the auxiliary head, where there is one; null: a fifth of the main one's
    aux_adv_weight: float | None = None  # of the auxiliary head; null: a fifth of the main one's, the paper's ratio
    aux_div_weight: float | None = None  # of the auxiliary head; null: a fifth of the main one's
    disc_hidden: int | None = None  # a discriminator's width; null: 64 (its first convolution), or 1024 (perceptron)
    disc_lr: float = 1e-4  # its rate at the start: Adam (0.9, 0.99), poly

    def rules(self):
        weights = [f"{head}{loss}_weight" for head in ("", "aux_") for loss in ("ent", "adv", "div")]
        return [
            *super().rules(),
            *(((getattr(self, key) or 0) >= 0, f"{key} must not be negative") for key in weights),
            (self.disc_hidden is None or self.disc_hidden > 0, "disc_hidden must be positive or null"),
            (self.disc_lr > 0, "disc_lr must be positive"),
        ]

    def trained_criteria(self):
        trained = {"entropy": self.ent_weight > 0, "infomax": self.ent_weight > 0 or self.div_weight > 0}
        return {name for name, part in trained.items() if part}


class Head(NamedTuple):
    name: str  # prefix of the model's logits and of the metrics
    cls_weight: float
    ent_weight: float
    adv_weight: float
    div_weight: float


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
    optimizer = build_optimizer(config.optim, model.param_groups(config.optim.backbone_lr_scale))
    heads = [Head("", 1.0, config.ent_weight, config.adv_weight, config.div_weight)]
    if config.model.aux_weight > 0:
        own = config.aux_ent_weight, config.aux_adv_weight, config.aux_div_weight
        aux_weights = (main / 5 if aux is None else aux for main, aux in zip(heads[0][2:], own, strict=True))
        heads.append(Head("aux_", config.model.aux_weight, *aux_weights))
    discriminators = nn.ModuleList(build_discriminator(config, domains.num_classes, config.disc_hidden) for _ in heads)
    discriminators.to(device)
    adversarial = any(head.adv_weight > 0 for head in heads)  # else MinEnt: the discriminators stay as they are
    disc_optim = OptimConfig(
        name="adam",
        lr=config.disc_lr,
        betas=[0.9, 0.99],
        weight_decay=0.0,
        schedule="poly",
        schedule_progress=config.optim.schedule_progress,
        fused=config.optim.fused,
    )
    disc_optimizer = build_optimizer(disc_optim, [{"params": list(discriminators.parameters()), "lr_scale": 1.0}])
    start = run.begin(
        model=model, discriminators=discriminators, optimizer=optimizer, disc_optimizer=disc_optimizer, scaler=scaler
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
        disc_lr = set_rates(disc_optimizer, disc_optim, step - 1, config.steps)
        x_s, y_s = next(source)
        x_s, y_s = x_s.to(device, non_blocking=True), y_s.to(device, non_blocking=True)
        x_t = next(target).to(device, non_blocking=True)

        # the model, with the discriminators held fixed
        discriminators.requires_grad_(False)
        loss, losses, maps = 0.0, {}, []
        with autocast:
            out_s, out_t = forward_domains(model, x_s, x_t, config.model)
            for head, discriminator in zip(heads, discriminators, strict=True):
                logits_s, logits_t = getattr(out_s, f"{head.name}logits"), getattr(out_t, f"{head.name}logits")
                log_p_s, log_p_t = logits_s.float().log_softmax(1), logits_t.float().log_softmax(1)
                information_t = information_map(log_p_t)
                cls_loss = nll_loss(log_p_s, y_s)
                ent_loss, div_loss = entropy_loss(information_t), diversity_loss(log_p_t)
                loss = loss + head.cls_weight * cls_loss + head.ent_weight * ent_loss + head.div_weight * div_loss
                parts = {"cls_loss": cls_loss, "ent_loss": ent_loss, "div_loss": div_loss}
                if adversarial:
                    parts["adv_loss"] = one_domain_loss(discriminator(information_t), SOURCE)
                    loss = loss + head.adv_weight * parts["adv_loss"]
                losses |= {head.name + name: part for name, part in parts.items()}
                maps.append((log_p_s.detach(), information_t.detach()))
            if domains.target_labeled:
                x_l, y_l = (x.to(device, non_blocking=True) for x in next(labeled))
                losses["target_cls_loss"] = supervised_loss(model(x_l), y_l, config.model.aux_weight)
                loss = loss + losses["target_cls_loss"]

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)

        # the discriminators, on what the model predicted
        if adversarial:
            discriminators.requires_grad_(True)
            disc_loss = 0.0
            with autocast:
                for head, discriminator, (log_p_s, information_t) in zip(heads, discriminators, maps, strict=True):
                    domain_logits_s = discriminator(information_map(log_p_s))
                    domain_logits_t = discriminator(information_t)
                    losses[f"{head.name}disc_loss"] = domain_loss(domain_logits_s, domain_logits_t)
                    losses[f"{head.name}domain_accuracy"] = discriminator_accuracy(domain_logits_s, domain_logits_t)
                    disc_loss = disc_loss + losses[f"{head.name}disc_loss"]

            disc_optimizer.zero_grad(set_to_none=True)
            scaler.scale(disc_loss).backward()
            scaler.step(disc_optimizer)
        scaler.update()

        run.log.add(**losses)
        if run.due(step, config.log_every):
            run.log.write(step, lr=lr, disc_lr=disc_lr)
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
