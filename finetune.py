"""Two-stage fine-tuning, for a target with labels: a new head first, then gentle unfreezing.

    stage 1   minimize cls_loss = CE(model(x), y) over the head; the backbone is frozen, parameters
              and statistics
    stage 2   minimize the same over the head and the stages of the backbone named by `unfreeze`,
              with a fresh optimizer at `finetune_lr`; its batch norm keeps its statistics

Stage 1 ends when the validation loss is flat, or after `head_steps`. Stage 2 goes on from its best
weights, which stay in stage1.pt, and ends likewise, or at `steps`. The validation set is
data.target_test, or `data.val_share` of data.target, drawn by the seed. It decides when to stop and
which weights are selected, so its figure is no test figure. `init_from` starts from a run of this
project, whose head is replaced where the classes differ; `model.weights` from ImageNet. Without
augmentation stage 1 computes the features of the backbone once. docs/finetune.md explains the rest.

    python finetune.py --config configs/demo/digits.yaml configs/demo/finetune.yaml
    python finetune.py --config configs/demo/digits.yaml configs/demo/finetune.yaml --resume
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients
from data import LabeledDataConfig
from data.views import to_views
from losses.supervised import supervised_loss
from models import build_model, cache_features
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run
from training.stages import Stages


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "finetune"
    data: LabeledDataConfig
    select: Literal["neg_val_loss"] = "neg_val_loss"  # the lowest validation loss picks model.pt
    head_steps: int | None = None  # for stage 1 at most; null: half, or all if it is alone
    patience: int = positive(5)  # evaluations without a lower validation loss that end a stage
    min_delta: float = not_negative(0.001)  # nats; what counts as lower
    unfreeze: list[str] | float = field(default_factory=lambda: ["layer4"])  # stages, or last share
    finetune_lr: float | None = positive(None, most=1000)  # of stage 2; null: optim.lr / 100
    max_jump: float = not_negative(0.1)  # nats; a larger rise of the loss in stage 2 is reported
    feature_gb: float = not_negative(2.0)  # stage 1 keeps features of unchanging images up to this

    def __post_init__(self):
        if self.head_steps is None:
            self.head_steps = self.steps if self.unfreeze == [] else -(-self.steps // 2)
        super().__post_init__()

    def trained_criteria(self):
        return set()  # of neg_entropy and infomax, the loss improves neither directly

    def rules(self):
        share = self.unfreeze if isinstance(self.unfreeze, float) else 0.5
        backbone_moves = not self.optim or self.optim.backbone_lr_scale > 0
        return [
            *super().rules(),
            (
                0 <= self.head_steps <= self.steps,
                "head_steps must be at least 0 and at most steps",
            ),
            (
                not self.model or self.model.drop_path is None,
                "model.drop_path: the backbone stays in eval mode here; leave it out",
            ),
            (0 < share <= 1, "unfreeze must be stages such as [layer4], or a share in (0, 1]"),
            (
                self.unfreeze != [] or self.head_steps > 0,
                "unfreeze: [] is stage 1 alone, and head_steps: 0 leaves it out",
            ),
            (
                self.unfreeze == [] or backbone_moves,
                "unfreeze needs an optim.backbone_lr_scale above 0",
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
    model = build_model(config, domains.classes, new_head=True).to(device)
    model.freeze("backbone")  # its statistics stay so in stage 2
    head_optimizer = build_optimizer(config.optim, model)
    model.unfreeze(config.unfreeze)
    finetune_optim = replace(config.optim, lr=config.finetune_lr or config.optim.lr / 100)
    optimizer = build_optimizer(finetune_optim, model)
    stages = Stages(config.head_steps, config.patience, config.min_delta, config.max_jump)
    start = run.begin(
        model=model,
        stages=stages,
        head_optimizer=head_optimizer,
        optimizer=optimizer,
        scaler=scaler,
    )
    if stages.number == 1:
        model.freeze("backbone")
    if stages.over:
        run.end_after(start)
    model.train()

    # --- data
    cache = None
    if stages.number == 1 and not stages.over and domains.unchanging:
        with autocast:
            labeled_pass = run.watch(domains.labeled_pass(), start)  # a signal may come in between
            cache = cache_features(model, labeled_pass, config.feature_gb, device)
    if cache is None:
        batches = domains.batches("target_labeled", start, config.steps)
    else:
        batches = cache.batches(domains.positions("target_labeled", start, config.head_steps))
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        if stages.number == 1:
            trained = head_optimizer
            lr = set_rates(trained, config.optim, step - 1, config.head_steps)
        else:
            trained, done = optimizer, step - 1 - stages.switch
            lr = set_rates(trained, finetune_optim, done, config.steps - stages.switch)
        trained.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x, y = to_views(next(batches), device)

            with autocast:
                loss, _ = supervised_loss(model(x), y, config.model)
            scaler.scale(loss / config.accumulate).backward()
            run.log.add(cls_loss=loss)

        average_gradients(trained, model)
        scaler.unscale_(trained)
        clip_gradients(trained, config.optim.clip_norm)
        scaler.step(trained)
        scaler.update()

        if run.due(step, config.log_every):
            run.log.write(step, stage=stages.number, lr=lr)
        if run.due(step, config.eval_every) or stages.due(step):
            with autocast:
                metrics = run.evaluate(step, model, evaluation)
            ended = stages.end(step, -metrics["criteria"]["neg_val_loss"], run.log.print)
            stages.over = ended and (stages.number == 2 or not config.unfreeze)
            if stages.over:
                run.end_after(step)
                run.log.flush(step, stage=stages.number, lr=lr)
            elif ended:
                model.load_state_dict(run.selected)
                run.keep_selected("stage1.pt")
                model.unfreeze(config.unfreeze)
                stages.begin_second(step)
                batches = domains.batches("target_labeled", step, config.steps)

    return run.finish(domains, **stages.entries(run.history, config.select))


if __name__ == "__main__":
    exit_with(main)
