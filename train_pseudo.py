"""Self-training on pseudo-labels: FixMatch (arXiv:2001.07685) with a mean teacher, AdaMatch, CBST, DACS.

    minimise  cls_loss + w * pseudo_loss + div_weight * div_loss,  w rising from 0 to pseudo_weight over pseudo_warmup

    pseudo_loss = mean over target predictions of weight * CE(model(x_strong), y_t)
    y_t         = argmax of p_t, what the teacher predicts on the weak view of the same image; accepted where
                  max p_t >= threshold:  fixed | relative, to the mean confidence on the source (AdaMatch,
                  arXiv:2106.04732) | class_balanced, the most confident share of each class (CBST, ECCV 2018)
    weight      = mask: 1 where accepted, else 0 | confident_fraction: everywhere the accepted share (DACS)
    div_loss    = 1 - entropy of the mean target prediction

The teacher is the model's exponential moving average (arXiv:1703.01780), or the model itself in eval mode. With `mix:
classmix` half of the source image's classes are pasted onto the strong view, image and label (DACS, arXiv:2007.08702).
An auxiliary head adds model.aux_weight times its own losses. docs/pseudo.md explains every metric and departure.

    python train_pseudo.py --config configs/demo/pseudo.yaml
    python train_pseudo.py --config configs/demo/pseudo.yaml seed=1 out_dir=runs/demo/pseudo_seed1
    python train_pseudo.py --config configs/demo/pseudo.yaml --resume

torchrun is not supported yet: one process, one device.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from common.averages import EMATeacher, RunningMean, class_mean
from common.collapse import AcceptedShares, CollapseMonitor
from common.config import RunConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from common.schedules import progress, warm_up
from data import open_domains, train_loader
from data.classmix import classmix
from data.order import generator
from losses.entropy import diversity_loss
from losses.pseudo_label import ConfidenceHistogram, align_distribution, pseudo_label_loss, pseudo_label_weights
from losses.supervised import cross_entropy, nll_loss, supervised_loss
from models import build_model, forward_domains, init_from


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "pseudo"
    teacher: Literal["none", "ema"] = "ema"  # who labels the target: the model itself, or its moving average
    ema_decay: float = 0.999  # of the teacher's weights; smaller in the first steps
    threshold_mode: Literal["fixed", "relative", "class_balanced"] = "fixed"  # what a confidence is compared with
    threshold: float = 0.95  # fixed: as it is; relative: times the mean confidence on the source
    portions: list[float] = field(default_factory=lambda: [0.2, 0.5])  # class_balanced: share kept at start and end
    distribution_alignment: bool = False  # scale target predictions by mean source over mean target prediction
    pseudo_weight: float = 1.0  # of pseudo_loss, once warmed up
    pseudo_warmup: float = 0.5  # share of the run over which its weight rises
    weighting: Literal["mask", "confident_fraction"] = "mask"  # what an accepted label weighs
    div_weight: float = 0.0  # of div_loss: keeps classes from vanishing
    strong_augment: dict = field(default_factory=dict)  # of the strong view, after data.augment; as data.augment
    mix: Literal["none", "classmix"] = "none"  # segmentation: paste half of the source's classes onto the strong view

    def rules(self):
        return [
            *super().rules(),
            (0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1)"),
            (self.threshold > 0, "threshold must be positive"),
            (
                len(self.portions) == 2 and all(0 < share <= 1 for share in self.portions),
                "portions must be two numbers in (0, 1]",
            ),
            (self.pseudo_weight >= 0, "pseudo_weight must not be negative"),
            (0 <= self.pseudo_warmup <= 1, "pseudo_warmup must lie in [0, 1]"),
            (self.div_weight >= 0, "div_weight must not be negative"),
            *(self.data.strong_view_rules(self.strong_augment, self.mix) if self.data else ()),
        ]

    def trained_criteria(self):
        return {"entropy", "infomax"} if self.pseudo_weight > 0 else {"infomax"} if self.div_weight > 0 else set()


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
    teacher = EMATeacher(model, config.ema_decay) if config.teacher == "ema" else None
    labeller = teacher or model  # in eval mode: no dropout, and no statistics of the weak view
    uniform = torch.full((domains.num_classes,), 1 / domains.num_classes)
    mean_p_s, mean_p_t, confidence_s = (RunningMean(value, 0.99) for value in (uniform, uniform, torch.ones(())))
    histogram, shares = ConfidenceHistogram(domains.num_classes), AcceptedShares(domains.classes)
    monitor = CollapseMonitor(domains.classes)
    statistics = nn.ModuleList([mean_p_s, mean_p_t, confidence_s, histogram, shares, monitor]).to(device)
    start = run.begin(model=model, teacher=teacher, statistics=statistics, optimizer=optimizer, scaler=scaler)

    # --- data
    source = iter(train_loader(domains.source, config.data, config.seed, "source", start, config.steps))
    views = config.strong_augment
    target = iter(train_loader(domains.target, config.data, config.seed, "target", start, config.steps, views))
    labeled = iter(
        train_loader(domains.target_labeled, config.data, config.seed, "target_labeled", start, config.steps)
    )
    evaluation = domains.evaluation()

    # --- train
    for step in range(start + 1, config.steps + 1):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        done = progress(step - 1, config.steps)
        pseudo_weight = config.pseudo_weight * warm_up(done, config.pseudo_warmup)
        x_s, y_s = next(source)
        x_s, y_s = x_s.to(device, non_blocking=True), y_s.to(device, non_blocking=True)
        x_weak, x_strong = (x.to(device, non_blocking=True) for x in next(target))

        # pseudo-labels of the weak view
        labeller.eval()
        with torch.no_grad(), autocast:
            p_t = labeller(x_weak).logits.float().log_softmax(1).exp()
        model.train()
        monitor.add(p_t, y_s)
        mean_p_t.update(class_mean(p_t))
        if config.distribution_alignment:
            p_t = align_distribution(p_t, mean_p_s.value, mean_p_t.value)
        confidence, y_t = p_t.max(1)
        if config.threshold_mode == "class_balanced":
            histogram.add(confidence, y_t)
            first, last = config.portions
            threshold = histogram.thresholds(first + (last - first) * done)[y_t]
        else:
            threshold = config.threshold * (confidence_s.value if config.threshold_mode == "relative" else 1.0)
        accepted = confidence >= threshold
        shares.add(y_t, accepted)
        labels, weights = y_t, pseudo_label_weights(accepted, config.weighting)
        if config.mix == "classmix":
            random = generator(config.seed, "classmix", step)
            mixed = classmix((x_s, y_s), (x_strong, y_t, weights), domains.num_classes, random)
            x_strong, labels, weights = mixed

        with autocast:
            out_s, out_t = forward_domains(model, x_s, x_strong, config.model)
            log_p_s, log_p_t = out_s.logits.float().log_softmax(1), out_t.logits.float().log_softmax(1)
            cls_loss = nll_loss(log_p_s, y_s)
            pseudo_loss, div_loss = pseudo_label_loss(log_p_t, labels, weights), diversity_loss(log_p_t)
            loss = cls_loss + pseudo_weight * pseudo_loss + config.div_weight * div_loss
            losses = {"cls_loss": cls_loss, "pseudo_loss": pseudo_loss, "div_loss": div_loss}
            if out_s.aux_logits is not None:
                losses["aux_cls_loss"] = cross_entropy(out_s.aux_logits, y_s)
                aux_log_p_t = out_t.aux_logits.float().log_softmax(1)
                losses["aux_pseudo_loss"] = pseudo_label_loss(aux_log_p_t, labels, weights)
                aux_loss = losses["aux_cls_loss"] + pseudo_weight * losses["aux_pseudo_loss"]
                loss = loss + config.model.aux_weight * aux_loss
            if domains.target_labeled:
                x_l, y_l = (x.to(device, non_blocking=True) for x in next(labeled))
                losses["target_cls_loss"] = supervised_loss(model(x_l), y_l, config.model.aux_weight)
                loss = loss + losses["target_cls_loss"]

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if teacher:
            teacher.update_parameters(model)
        p_s = log_p_s.detach().exp()
        mean_p_s.update(class_mean(p_s))
        confidence_s.update(p_s.amax(1).mean())

        agreement = (log_p_t.detach().argmax(1) == labels).float().mean()
        run.log.add(**losses, confidence=confidence.mean(), agreement=agreement)
        if run.due(step, config.log_every):
            collapse = monitor.report(step, run.log.print)
            run.log.write(step, lr=lr, pseudo_weight=pseudo_weight, **shares.report(), **collapse)
        if run.due(step, config.eval_every):
            with autocast:
                metrics = evaluate(model, **evaluation, device=device)
            run.evaluated(step, metrics, model)
        if run.due(step, config.save_every):
            run.save(step)
        if run.stopping:
            return run.stopped(step)

    run.finish(target_test=domains.target_test_note, classes=domains.classes, collapse_alarms=monitor.alarms)
    return 0


if __name__ == "__main__":
    exit_with(main)
