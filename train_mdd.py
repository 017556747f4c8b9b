"""Margin disparity discrepancy: an adversarial classifier behind a gradient reversal (1904.05801).

    minimize  cls_loss + adv_weight * adv_loss

    cls_loss   = CE(model(x_s), y_s)
    adv_loss   = margin * adv_loss_s + adv_loss_t
    adv_loss_s = mean of -log p_k,       p = softmax(A(R(features_s))), k = argmax model(x_s)
    adv_loss_t = mean of -log(1 - p_k),  p = softmax(A(R(features_t))), k = argmax model(x_t)

A, the adversary, is a second head of the model's own kind. It learns to agree with the model on the
source and to disagree on the target. R is the identity whose gradient is multiplied by
-reversal_coeff: the features learn to make that impossible. The predictions k have no gradient, so
that the model's head learns from cls_loss alone. For images with a class each, set
`model.head_hidden` as the paper does: with linear heads, the default, adv_loss diverges at usual
learning rates. docs/mdd.md explains the rest.

    python train_mdd.py --config configs/demo/digits.yaml configs/demo/mdd.yaml
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients
from data.views import to_views
from losses.mdd import disagreement_loss
from losses.supervised import cross_entropy, supervised_loss
from models import build_model, forward_domains, forward_head, gradient_reversal
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run
from training.schedules import progress, reversal_coefficient


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "mdd"
    adv_weight: float = not_negative(1.0)  # of adv_loss, for features and adversary alike
    margin: float = positive(4.0)  # the paper's gamma = exp(rho), rho being the margin of scores
    reversal_max: float = not_negative(0.1)  # final coefficient of the reversal (the paper's eta)
    reversal_progress: int | Literal["total"] = positive("total")  # steps it takes; total: the run

    def trained_criteria(self):
        return set()  # of neg_entropy and infomax, the loss improves neither directly


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
    adversary = model.new_head()
    optimizer = build_optimizer(config.optim, model, adversary)
    start = run.begin(model=model, adversary=adversary, optimizer=optimizer, scaler=scaler)

    # --- data
    source = domains.batches("source", start, config.steps)
    target = domains.batches("target", start, config.steps)
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        p = progress(step - 1, config.steps, config.reversal_progress)
        reversal_coeff = reversal_coefficient("dann", p, config.reversal_max)
        reverse = partial(gradient_reversal, coeff=reversal_coeff)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            x_t = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)

            with autocast:
                out_s, out_t = forward_domains(model, x_s, x_t, config.model)
                loss, losses = supervised_loss(out_s, y_s, config.model)
                adv_logits_s, adv_logits_t = forward_head(model, adversary, out_s, out_t, reverse)
                adv_loss_s = cross_entropy(adv_logits_s, out_s.logits.argmax(1))
                adv_loss_t = disagreement_loss(adv_logits_t, out_t.logits.argmax(1))
                adv_loss = config.margin * adv_loss_s + adv_loss_t
                losses |= {"adv_loss": adv_loss, "adv_loss_s": adv_loss_s, "adv_loss_t": adv_loss_t}
                loss = loss + config.adv_weight * adv_loss
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            run.log.add(**losses)
            run.monitor.add(out_t.logits)

        average_gradients(optimizer, model, adversary)
        scaler.unscale_(optimizer)
        clip_gradients(optimizer, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()

        if run.due(step, config.log_every):
            run.log.write(step, reversal_coeff=reversal_coeff, lr=lr)
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
