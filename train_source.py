"""Source-only training: the lower bound of every adaptation method.

    minimize  cls_loss = CE(model(x_s), y_s)

CE is over the class of an image, or of each of its pixels. The script's page in docs/ explains
every metric.

No target image passes through the network in training, so its batch-norm statistics are the
source's. With the labeled target as `data.source` the same script gives the upper bound.

    python train_source.py --config configs/demo/digits.yaml
    python train_source.py --config configs/demo/digits.yaml --resume
    torchrun --nproc-per-node 2 train_source.py --config configs/demo/digits.yaml
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from common.errors import exit_with
from common.ranks import average_gradients
from data.views import to_views
from losses.supervised import supervised_loss
from models import build_model
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "source"

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
    optimizer = build_optimizer(config.optim, model)
    start = run.begin(model=model, optimizer=optimizer, scaler=scaler)

    # --- data
    source = domains.batches("source", start, config.steps)
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)

            with autocast:
                out_s = model(x_s)
                loss, losses = supervised_loss(out_s, y_s, config.model)
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            run.log.add(**losses)

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
