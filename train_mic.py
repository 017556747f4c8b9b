"""Masked image consistency: MIC (arXiv:2212.01322), on self-training as in DACS and DAFormer.

    minimize  cls_loss + w * (pseudo_weight * pseudo_loss + mask_weight * mask_loss)
              + fd_weight * fd_loss, where w rises from 0 to 1

    pseudo_loss = mean over target predictions of weight * CE(model(x_strong), y_t)
    mask_loss   = mean of weight * CE(model(x_masked), y_t), where x_masked is x_strong, of which
                  random blocks are hidden: what they show must be inferred from the context
    y_t         = argmax of the teacher's prediction on the weak view of the same image
    weight      = confident_fraction: the share of predictions whose confidence reaches `threshold`
                  | mask: 1 for these, else 0 | confidence: the teacher's
    fd_loss     = distance of the source features to those of the network with `model.weights`
                  alone, at the locations of `fd_classes` (DAFormer, arXiv:2111.14887)

The teacher is the model's exponential moving average. `mix: classmix` pastes half of the source
image's classes onto the strong view (arXiv:2007.08702). docs/mic.md explains the rest.

    python train_mic.py --config configs/demo/digits.yaml configs/demo/mic.yaml
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from common.averages import EMATeacher
from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients
from data.classmix import classmix
from data.masking import hide_blocks, usual_block
from data.order import generator
from data.views import to_views
from losses.feature_distance import feature_distance
from losses.pseudo_label import pseudo_label_loss, pseudo_label_weights
from losses.supervised import supervised_loss
from models import build_model, build_reference, eval_mode, forward_domains
from training.collapse import AcceptedShares
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run
from training.schedules import progress, warm_up

Weighting = Literal["mask", "confident_fraction", "confidence"]


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "mic"
    ema_decay: float = 0.999  # of the teacher's weights; smaller in the first steps
    threshold: float = positive(0.968)  # confidence from which a pseudo-label is accepted
    weighting: Weighting = "confident_fraction"  # what a pseudo-label weighs, see above
    pseudo_weight: float = not_negative(1.0)  # of pseudo_loss
    mask_weight: float = not_negative(1.0)  # of mask_loss
    mask_ratio: float = 0.7  # probability of a block to be hidden
    mask_block: int | None = positive(None, most=100_000)  # side of a block, px; null: the papers'
    pseudo_warmup: float = 0.0  # share of the run over which both weights rise
    fd_weight: float = not_negative(0.0)  # of fd_loss; the paper: 0.005
    fd_classes: list[str] = field(default_factory=list)  # where fd_loss acts; none: everywhere
    strong_augment: dict = field(default_factory=dict)  # of the strong view, after data.augment
    mix: Literal["none", "classmix"] = "none"  # segmentation: paste source classes onto the target

    def trained_criteria(self):
        return {"neg_entropy", "infomax"} if self.pseudo_weight + self.mask_weight > 0 else set()

    def rules(self):
        return [
            *super().rules(),
            (0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1)"),
            (0 <= self.mask_ratio <= 1, "mask_ratio must lie in [0, 1]"),
            (0 <= self.pseudo_warmup <= 1, "pseudo_warmup must lie in [0, 1]"),
            (not self.fd_classes or self.fd_weight > 0, "fd_classes goes with fd_weight"),
            (
                self.fd_weight == 0 or not self.model or self.model.weights is not None,
                "fd_weight needs model.weights: the network whose features it stays close to",
            ),
            *(self.data.strong_view_rules(self.strong_augment, self.mix) if self.data else ()),
            *(self.data.block_rules(self.mask_block) if self.data and self.mask_block else ()),
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
    model = build_model(config, domains.classes).to(device).train()
    optimizer = build_optimizer(config.optim, model)
    teacher = EMATeacher(model, config.ema_decay, copy_buffers=False)
    fd_classes = domains.class_numbers(config.fd_classes, "fd_classes")
    reference = None
    if config.fd_weight > 0:
        model.check_layers(["layer4"], "fd_weight")
        reference = build_reference(config, domains.classes).to(device)
    shares = AcceptedShares(domains.classes).to(device)
    start = run.begin(
        model=model,
        teacher=teacher,
        reference=reference,
        shares=shares,
        optimizer=optimizer,
        scaler=scaler,
    )

    # --- data
    source = domains.batches("source", start, config.steps)
    target = domains.batches("target", start, config.steps, config.strong_augment)
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        w = warm_up(progress(step - 1, config.steps), config.pseudo_warmup)
        pseudo_weight, mask_weight = w * config.pseudo_weight, w * config.mask_weight
        optimizer.zero_grad(set_to_none=True)
        for part in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            x_weak, x_strong = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)
            # pseudo-labels of the weak view
            eval_mode(teacher, batch_statistics=True)
            with torch.no_grad(), autocast:
                logits_t = teacher(x_weak).logits
            confidence, y_t = logits_t.float().log_softmax(1).exp().max(1)
            run.monitor.add(logits_t)
            accepted = confidence >= config.threshold
            shares.add(y_t, accepted)
            weights = confidence
            if config.weighting != "confidence":
                weights = pseudo_label_weights(accepted, config.weighting)

            random = generator(config.seed, "mask", step, part)
            block = config.mask_block or usual_block(x_strong, y_t)
            x_masked = hide_blocks(x_strong, config.mask_ratio, block, model.mean, random)
            labels, label_weights = y_t, weights
            if config.mix == "classmix":
                random = generator(config.seed, "classmix", step, part)
                views = (x_s, y_s), (x_strong, y_t, weights)
                x_strong, labels, label_weights = classmix(*views, domains.num_classes, random)

            with autocast:
                out_s, out_t = forward_domains(model, x_s, x_strong, config.model)
                loss, losses = supervised_loss(out_s, y_s, config.model)
                log_p_t = out_t.logits.float().log_softmax(1)
                losses["pseudo_loss"] = pseudo_label_loss(log_p_t, labels, label_weights)
                loss = loss + pseudo_weight * losses["pseudo_loss"]
                if config.mask_weight > 0:
                    # evaluation sees entire images, so the running statistics are theirs
                    with model.running_statistics(fixed=True):
                        log_p_masked = model(x_masked).logits.float().log_softmax(1)
                    losses["mask_loss"] = pseudo_label_loss(log_p_masked, y_t, weights)
                    loss = loss + mask_weight * losses["mask_loss"]
                if reference is not None:
                    with torch.no_grad():
                        fixed = reference(x_s).features["layer4"]
                    features = out_s.features["layer4"]
                    losses["fd_loss"] = feature_distance(features, fixed, y_s, fd_classes)
                    loss = loss + config.fd_weight * losses["fd_loss"]
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            run.log.add(**losses, confidence=confidence.mean())

        average_gradients(optimizer, model, teacher)
        scaler.unscale_(optimizer)
        clip_gradients(optimizer, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        teacher.update_parameters(model)

        if run.due(step, config.log_every):
            rates = {"lr": lr, "pseudo_weight": pseudo_weight, "mask_weight": mask_weight}
            run.log.write(step, **rates, **shares.report())
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
