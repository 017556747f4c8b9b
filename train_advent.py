"""Entropy minimization (MinEnt) and adversarial entropy (AdvEnt) of ADVENT (arXiv:1811.12833).

    minimize over the model
        cls_loss + ent_weight * ent_loss + div_weight * div_loss + adv_weight * adv_loss
    minimize over the discriminator
        disc_loss = 0.5 * (mean BCE(D(I_s), 1) + mean BCE(D(I_t), 0))

    I        = -p log p / log K of every class, the weighted self-information of a prediction p
    ent_loss = mean over target predictions of the sum of I
    adv_loss = mean BCE(D(I_t), 1): D, held fixed, takes the target's I for the source's
    div_loss = 1 - entropy of the mean target prediction; information maximization with ent_loss

MinEnt is `adv_weight: 0`, AdvEnt is `ent_weight: 0`. An auxiliary head (`model.aux_weight`) adds
the same losses of its own predictions, with weights and a discriminator of its own.
docs/advent.md explains every metric and departure from the paper.

    python train_advent.py --config configs/demo/digits.yaml configs/demo/minent.yaml
    python train_advent.py --config configs/demo/digits.yaml configs/demo/minent.yaml --resume
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients
from data.views import to_views
from losses.domain import SOURCE, discriminator_accuracy, domain_loss, one_domain_loss
from losses.entropy import attached, diversity_loss, entropy_loss, information_map
from losses.supervised import nll_loss, supervised_loss
from models import build_discriminator, build_model, forward_domains
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import OptimConfig, build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "advent"
    ent_weight: float = not_negative(0.001)  # of the target's entropy (the paper's lambda_ent)
    adv_weight: float = not_negative(0.001)  # of fooling the discriminator (lambda_adv)
    div_weight: float = not_negative(0.0)  # of div_loss: keeps classes from vanishing
    aux_ent_weight: float | None = not_negative(None)  # of the auxiliary head; null: ent_weight / 5
    aux_adv_weight: float | None = not_negative(None)  # null: adv_weight / 5, the paper's ratio
    aux_div_weight: float | None = not_negative(None)  # null: div_weight / 5
    disc_hidden: int | None = positive(None, most=100_000)  # null: 64 (masks) or 1024
    disc_lr: float = positive(1e-4, most=1000)  # at the start: Adam (0.9, 0.99), poly

    def trained_criteria(self):
        entropy = {"neg_entropy", "infomax"} if self.ent_weight > 0 else set()
        return entropy | ({"infomax"} if self.div_weight > 0 else set())


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
    autocast = torch.autocast(device.type, getattr(torch, config.amp), config.amp != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
    run = Run(config, args)
    domains = run.open_domains()

    # --- model
    model = build_model(config, domains.classes).to(device).train()
    optimizer = build_optimizer(config.optim, model)
    heads = [Head("", 1.0, config.ent_weight, config.adv_weight, config.div_weight)]
    if config.model.aux_weight > 0:
        given = config.aux_ent_weight, config.aux_adv_weight, config.aux_div_weight
        pairs = zip(heads[0][2:], given, strict=True)
        weights = (main / 5 if aux is None else aux for main, aux in pairs)
        heads.append(Head("aux_", config.model.aux_weight, *weights))
    discriminators = nn.ModuleList(
        build_discriminator(config, domains.num_classes, config.disc_hidden) for _ in heads
    )
    discriminators.to(device)
    adversarial = any(head.adv_weight > 0 for head in heads)  # else MinEnt: no D is trained
    disc_optim = OptimConfig(
        name="adam",
        lr=config.disc_lr,
        betas=[0.9, 0.99],
        weight_decay=0.0,
        schedule="poly",
        schedule_progress=config.optim.schedule_progress,
        fused=config.optim.fused,
    )
    disc_optimizer = build_optimizer(disc_optim, discriminators)
    start = run.begin(
        model=model,
        discriminators=discriminators,
        optimizer=optimizer,
        disc_optimizer=disc_optimizer,
        scaler=scaler,
    )

    # --- data
    source = domains.batches("source", start, config.steps)
    target = domains.batches("target", start, config.steps)
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        disc_lr = set_rates(disc_optimizer, disc_optim, step - 1, config.steps)
        optimizer.zero_grad(set_to_none=True)
        disc_optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            x_t = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)

            # the model, with the discriminators held fixed
            discriminators.requires_grad_(False)
            loss, losses, predictions = 0.0, {}, []
            with autocast:
                out_s, out_t = forward_domains(model, x_s, x_t, config.model)
                for head, discriminator in zip(heads, discriminators, strict=True):
                    logits_s = getattr(out_s, f"{head.name}logits")
                    logits_t = getattr(out_t, f"{head.name}logits")
                    log_p_s = logits_s.float().log_softmax(1)
                    log_p_t = logits_t.float().log_softmax(1)
                    information_t = information_map(log_p_t)
                    cls_loss = nll_loss(log_p_s, y_s, config.model.label_smoothing)
                    ent_loss = entropy_loss(attached(information_t, head.ent_weight))
                    div_loss = diversity_loss(attached(log_p_t, head.div_weight))
                    loss = loss + head.cls_weight * cls_loss
                    loss = loss + head.ent_weight * ent_loss + head.div_weight * div_loss
                    parts = {"cls_loss": cls_loss, "ent_loss": ent_loss, "div_loss": div_loss}
                    if adversarial:
                        parts["adv_loss"] = one_domain_loss(discriminator(information_t), SOURCE)
                        loss = loss + head.adv_weight * parts["adv_loss"]
                    losses |= {head.name + name: part for name, part in parts.items()}
                    predictions.append((log_p_s.detach(), information_t.detach()))
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()

            # the discriminators, on what the model predicted
            if adversarial:
                discriminators.requires_grad_(True)
                disc_loss = 0.0
                with autocast:
                    for head, discriminator, prediction in zip(
                        heads, discriminators, predictions, strict=True
                    ):
                        log_p_s, information_t = prediction
                        domain_logits_s = discriminator(information_map(log_p_s))
                        domain_logits_t = discriminator(information_t)
                        head_loss = domain_loss(domain_logits_s, domain_logits_t)
                        accuracy = discriminator_accuracy(domain_logits_s, domain_logits_t)
                        losses[f"{head.name}disc_loss"] = head_loss
                        losses[f"{head.name}domain_accuracy"] = accuracy
                        disc_loss = disc_loss + head_loss
                scaler.scale(disc_loss / config.accumulate).backward()
            run.log.add(**losses)
            run.monitor.add(out_t.logits)

        average_gradients(optimizer, model)
        scaler.unscale_(optimizer)
        clip_gradients(optimizer, config.optim.clip_norm)
        scaler.step(optimizer)
        if adversarial:
            average_gradients(disc_optimizer, discriminators)
            scaler.unscale_(disc_optimizer)
            clip_gradients(disc_optimizer, config.optim.clip_norm)
            scaler.step(disc_optimizer)
        scaler.update()

        if run.due(step, config.log_every):
            run.log.write(step, lr=lr, disc_lr=disc_lr)
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
