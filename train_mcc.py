"""Minimum class confusion of the target's predictions: MCC (arXiv:1912.03699).

    minimize  cls_loss + mcc_weight * mcc_loss

    cls_loss = CE(model(x_s), y_s)
    mcc_loss = mean over the classes k of 1 - C_kk, where C is the sum over i of w_i p_i p_i^T whose
               rows are scaled to sum 1: how much each class is confused with the others
    p_i      = softmax(model(x_t,i) / temperature) of a target image i, or of a pixel
    w_i      = 1 + exp(-entropy of p_i), scaled to mean 1

docs/mcc.md explains the rest.

    python train_mcc.py --config configs/demo/digits.yaml configs/demo/mcc.yaml
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients
from data.views import to_views
from losses.mcc import mcc_loss
from losses.supervised import supervised_loss
from models import build_model, forward_domains
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "mcc"
    mcc_weight: float = not_negative(1.0)  # of mcc_loss
    temperature: float = positive(2.5)  # of the target's predictions in mcc_loss

    def trained_criteria(self):
        return {"neg_entropy", "infomax"} if self.mcc_weight > 0 else set()


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
                losses["mcc_loss"] = mcc_loss(out_t.logits, config.temperature)
                loss = loss + config.mcc_weight * losses["mcc_loss"]
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
