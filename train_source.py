"""Source-only training: the lower bound of every adaptation method.

    minimise  cls_loss = CE(model(x_s), y_s)

for the class of an image or of each of its pixels. An auxiliary head adds model.aux_weight * aux_cls_loss, its own CE.
No target image passes through the network in training, so its batch norm statistics are the source's. With the
labelled target as `data.source` the same script gives the upper bound. docs/source.md explains every metric.

    python train_source.py --config configs/demo/source.yaml
    python train_source.py --config configs/demo/source.yaml seed=1 out_dir=runs/demo/source_seed1
    python train_source.py --config configs/demo/source.yaml --resume

torchrun is not supported yet: one process, one device.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from common.config import RunConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from data import open_domains, train_loader
from losses.supervised import cross_entropy, supervised_loss
from models import build_model, init_from


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "source"


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
    start = run.begin(model=model, optimizer=optimizer, scaler=scaler)

    # --- data
    source = iter(train_loader(domains.source, config.data, config.seed, "source", start, config.steps))
    labeled = iter(
        train_loader(domains.target_labeled, config.data, config.seed, "target_labeled", start, config.steps)
    )
    evaluation = domains.evaluation()

    # --- train
    for step in range(start + 1, config.steps + 1):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        x_s, y_s = next(source)
        x_s, y_s = x_s.to(device, non_blocking=True), y_s.to(device, non_blocking=True)

        with autocast:
            out_s = model(x_s)
            cls_loss = cross_entropy(out_s.logits, y_s)
            loss, losses = cls_loss, {"cls_loss": cls_loss}
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
