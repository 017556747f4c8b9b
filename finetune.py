"""Two-stage fine-tuning, for when the target has labels: a new head first, then gentle unfreezing.

    stage 1   minimise cls_loss = CE(model(x), y) over the head, the backbone frozen, parameters and statistics
    stage 2   minimise the same over the head and the stages of the backbone named by `unfreeze`, with a fresh optimizer
              at `finetune_lr`; batch norm of the backbone keeps its statistics

Stage 1 ends when the validation loss is flat, or after `head_steps`; stage 2 goes on from its best weights, which stay
in stage1.pt, and ends likewise, or at `steps`. The validation set is data.target_test, else `data.val_share` of
data.target, by the seed. It decides when to stop and which weights are kept, so its figure is no test figure.
`init_from` starts from a run of this project, whose head is replaced where the classes differ; `model.weights` from
ImageNet. Without augmentation stage 1 computes the features of the backbone once. docs/finetune.md explains the rest.

    python finetune.py --config configs/demo/finetune.yaml
    python finetune.py --config configs/demo/finetune.yaml seed=1 out_dir=runs/demo/finetune_seed1
    python finetune.py --config configs/demo/finetune.yaml --resume

torchrun is not supported yet: one process, one device.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from common.config import LabeledDataConfig, RunConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from common.stages import Stages
from data import open_domains, train_loader
from data.order import Order
from losses.supervised import supervised_loss
from models import build_model, head_features, init_from


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "finetune"
    data: LabeledDataConfig
    select: Literal["val_loss"] = "val_loss"  # the lowest validation loss picks model.pt
    head_steps: int | None = None  # of `steps`, how many stage 1 may take; null: half, or all if it is alone; 0: none
    patience: int = 5  # evaluations without a lower validation loss that end a stage
    min_delta: float = 0.001  # nats; what counts as lower
    unfreeze: list[str] | float = field(default_factory=lambda: ["layer4"])  # stages, or last share of convolutions
    finetune_lr: float | None = None  # rate of stage 2; null: a hundredth of optim.lr
    max_jump: float = 0.1  # nats; a validation loss that rises by more in stage 2 is reported
    feature_gb: float = 2.0  # stage 1 keeps the features of unchanging images on the device up to this; 0: never

    def __post_init__(self):
        if self.head_steps is None:
            self.head_steps = self.steps if self.unfreeze == [] else -(-self.steps // 2)
        super().__post_init__()

    def rules(self):
        share = self.unfreeze if isinstance(self.unfreeze, float) else 0.5
        return [
            *super().rules(),
            (0 <= self.head_steps <= self.steps, "head_steps must be at least 0 and at most steps"),
            (self.patience > 0, "patience must be positive"),
            (
                min(self.min_delta, self.max_jump, self.feature_gb) >= 0,
                "min_delta, max_jump and feature_gb must not be negative",
            ),
            (0 < share <= 1, "unfreeze must be stages such as [layer4], or a share in (0, 1]"),
            (
                self.unfreeze != [] or self.head_steps > 0,
                "unfreeze: [] is stage 1 alone, and head_steps: 0 leaves it out",
            ),
            (
                self.unfreeze == [] or not self.optim or self.optim.backbone_lr_scale > 0,
                "unfreeze needs an optim.backbone_lr_scale above 0",
            ),
            (self.finetune_lr is None or self.finetune_lr > 0, "finetune_lr must be positive or null"),
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
        init_from(model, config.init_from, domains.classes, new_head=True)
    model.to(device)
    scale = config.optim.backbone_lr_scale
    model.freeze("backbone")  # its statistics stay so in stage 2
    head_optimizer = build_optimizer(config.optim, model.param_groups(scale))
    model.unfreeze(config.unfreeze)
    finetune_optim = replace(config.optim, lr=config.finetune_lr or config.optim.lr / 100)
    optimizer = build_optimizer(finetune_optim, model.param_groups(scale))
    stages = Stages(config.head_steps, config.patience, config.min_delta, config.max_jump)
    start = run.begin(model=model, stages=stages, head_optimizer=head_optimizer, optimizer=optimizer, scaler=scaler)
    if stages.number == 1:
        model.freeze("backbone")
    model.train()

    # --- data
    images, evaluation, features = domains.target_labeled, domains.evaluation(), None
    if stages.number == 1 and not stages.over and domains.unchanging:
        with autocast:
            features = head_features(model, domains.labeled_pass(), config.feature_gb, device)
    if features is None:
        labeled = iter(train_loader(images, config.data, config.seed, "target_labeled", start, config.steps))
    else:
        features, labels = features
        positions = Order(config.seed, "target_labeled", len(labels)).positions
        batch, left = config.data.batch, config.head_steps - start
        rows = positions(start * batch, left * batch).to(device).split(batch)  # of stage 1, moved at once

    # --- train
    for step in range(start + 1, (start if stages.over else config.steps) + 1):
        if stages.number == 1:
            trained, lr = head_optimizer, set_rates(head_optimizer, config.optim, step - 1, config.head_steps)
        else:
            done, left = step - 1 - stages.switch, config.steps - stages.switch
            trained, lr = optimizer, set_rates(optimizer, finetune_optim, done, left)

        if features is None:
            x, y = (tensor.to(device, non_blocking=True) for tensor in next(labeled))
        else:
            x = {name: feature[rows[step - 1 - start]] for name, feature in features.items()}
            y = labels[rows[step - 1 - start]]
        with autocast:
            out = model(x) if features is None else model.predict(x, y.shape[1:])
            cls_loss = supervised_loss(out, y, config.model.aux_weight)

        trained.zero_grad(set_to_none=True)
        scaler.scale(cls_loss).backward()
        scaler.step(trained)
        scaler.update()

        run.log.add(cls_loss=cls_loss)
        if run.due(step, config.log_every):
            run.log.write(step, stage=stages.number, lr=lr)
        if run.due(step, config.eval_every) or stages.due(step):
            with autocast:
                metrics = evaluate(model, **evaluation, device=device)
            ended = stages.end(step, -metrics["criteria"]["val_loss"], run.log.print)
            stages.over = ended and (stages.number == 2 or not config.unfreeze)
            run.evaluated(step, metrics, model, last=stages.over)
            if ended and not stages.over:
                model.load_state_dict(run.selected)
                run.keep_selected("stage1.pt")
                model.unfreeze(config.unfreeze)
                stages.begin_second(step)
                if features is not None:
                    features = None
                    labeled = iter(train_loader(images, config.data, config.seed, "target_labeled", step, config.steps))
        if stages.over and run.log.sums:
            run.log.write(step, stage=stages.number, lr=lr)
        if run.due(step, config.save_every) or stages.over:
            run.save(step)
        if run.stopping:
            return run.stopped(step)
        if stages.over:
            break

    entries = stages.entries(run.history, config.select)
    run.finish(target_test=domains.target_test_note, classes=domains.classes, **entries)
    return 0


if __name__ == "__main__":
    exit_with(main)
