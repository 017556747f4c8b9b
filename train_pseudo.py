"""Self-training on pseudo-labels: FixMatch (arXiv:2001.07685), AdaMatch, CBST, DACS, mean teacher.

    minimize  cls_loss + w * pseudo_loss + div_weight * div_loss, where w rises to pseudo_weight

    pseudo_loss = mean over target predictions of weight * CE(model(x_strong), y_t)
    y_t         = argmax of p_t, the teacher's prediction on the weak view of the same image;
                  accepted where max p_t >= threshold:  fixed | relative to the mean confidence on
                  the source (AdaMatch, arXiv:2106.04732); with class_balanced (CBST, ECCV 2018)
                  argmax and max of p_t / t, where t is what the surest share of a class exceeds
    weight      = mask: 1 where accepted, else 0 | confident_fraction: the accepted share (DACS)
    div_loss    = 1 - entropy of the mean target prediction

The teacher is the model's exponential moving average (arXiv:1703.01780), or the model itself.
`mix: classmix` pastes half of the source image's classes onto the strong view (arXiv:2007.08702).
An auxiliary head adds model.aux_weight times its own losses. docs/pseudo.md explains the rest.

    python train_pseudo.py --config configs/demo/digits.yaml configs/demo/pseudo.yaml
    python train_pseudo.py --config configs/demo/digits.yaml configs/demo/pseudo.yaml --resume
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from common.averages import EMATeacher, class_mean
from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients
from data.classmix import classmix
from data.order import generator
from data.views import to_views
from losses.entropy import attached, diversity_loss
from losses.pseudo_label import (
    PredictionStatistics,
    align_distribution,
    class_balanced_labels,
    pseudo_label_loss,
    pseudo_label_weights,
)
from losses.supervised import cross_entropy, nll_loss, supervised_loss
from models import build_model, eval_mode, forward_domains
from training.collapse import AcceptedShares
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run
from training.schedules import progress, warm_up


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "pseudo"
    teacher: Literal["none", "ema"] = "ema"  # who labels the target: the model, or its average
    ema_decay: float = 0.999  # of the teacher's weights; smaller in the first steps
    teacher_bn: Literal["own", "student"] = "own"  # batch norm: of the weak views, or the student's
    evaluate: Literal["model", "teacher"] = "model"  # which of them is evaluated and saved
    threshold_mode: Literal["fixed", "relative", "class_balanced"] = "fixed"  # see above
    threshold: float = positive(0.95)  # fixed: itself; relative: times the source's confidence
    portions: list[float] = field(default_factory=lambda: [0.2, 0.5])  # class_balanced: start, end
    distribution_alignment: bool = False  # scale p_t by mean source over mean target prediction
    pseudo_weight: float = not_negative(1.0)  # of pseudo_loss, once warmed up
    pseudo_warmup: float = 0.5  # share of the run over which its weight rises
    weighting: Literal["mask", "confident_fraction"] = "mask"  # what an accepted label weighs
    div_weight: float = not_negative(0.0)  # of div_loss: keeps classes from vanishing
    strong_augment: dict = field(default_factory=dict)  # of the strong view, after data.augment
    mix: Literal["none", "classmix"] = "none"  # segmentation: paste source classes onto the target

    def trained_criteria(self):
        if self.pseudo_weight > 0:
            return {"neg_entropy", "infomax"}
        return {"infomax"} if self.div_weight > 0 else set()

    def rules(self):
        shares = len(self.portions) == 2 and all(0 < share <= 1 for share in self.portions)
        evaluable = self.evaluate == "model" or self.teacher == "ema"
        return [
            *super().rules(),
            (0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1)"),
            (evaluable, "evaluate: teacher needs teacher: ema"),
            (shares, "portions must be two numbers in (0, 1]"),
            (0 <= self.pseudo_warmup <= 1, "pseudo_warmup must lie in [0, 1]"),
            *(self.data.strong_view_rules(self.strong_augment, self.mix) if self.data else ()),
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
    own_bn = config.teacher_bn == "own"
    teacher = EMATeacher(model, config.ema_decay, not own_bn) if config.teacher == "ema" else None
    labeler = teacher or model
    evaluated = teacher.module if config.evaluate == "teacher" else model
    statistics = PredictionStatistics(domains.num_classes).to(device)
    shares = AcceptedShares(domains.classes).to(device)
    start = run.begin(
        model=model,
        teacher=teacher,
        statistics=statistics,
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
        p = progress(step - 1, config.steps)
        pseudo_weight = config.pseudo_weight * warm_up(p, config.pseudo_warmup)
        optimizer.zero_grad(set_to_none=True)
        for part in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            x_weak, x_strong = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)
            # pseudo-labels of the weak view
            eval_mode(labeler, batch_statistics=own_bn)
            with torch.no_grad(), autocast:
                logits_t = labeler(x_weak).logits
            model.train()
            p_t = logits_t.float().log_softmax(1).exp()
            run.monitor.add(logits_t)
            statistics.mean_t.update(class_mean(p_t))
            if config.distribution_alignment:
                p_t = align_distribution(p_t, statistics.mean_s.value, statistics.mean_t.value)
            confidence, y_t = p_t.max(1)
            if config.threshold_mode == "class_balanced":
                first, last = config.portions
                statistics.histogram.add(confidence, y_t)
                thresholds = statistics.histogram.thresholds(first + (last - first) * p)
                y_t, accepted = class_balanced_labels(p_t, thresholds)
            elif config.threshold_mode == "relative":
                accepted = confidence >= config.threshold * statistics.confidence_s.value
            else:
                accepted = confidence >= config.threshold
            shares.add(y_t, accepted)
            labels, weights = y_t, pseudo_label_weights(accepted, config.weighting)
            if config.mix == "classmix":
                random = generator(config.seed, "classmix", step, part)
                views = (x_s, y_s), (x_strong, y_t, weights)
                x_strong, labels, weights = classmix(*views, domains.num_classes, random)

            with autocast:
                out_s, out_t = forward_domains(model, x_s, x_strong, config.model)
                log_p_s, log_p_t = (out.logits.float().log_softmax(1) for out in (out_s, out_t))
                smoothing = config.model.label_smoothing
                cls_loss = nll_loss(log_p_s, y_s, smoothing)
                pseudo_loss = pseudo_label_loss(log_p_t, labels, weights)
                div_loss = diversity_loss(attached(log_p_t, config.div_weight))
                loss = cls_loss + pseudo_weight * pseudo_loss + config.div_weight * div_loss
                losses = {"cls_loss": cls_loss, "pseudo_loss": pseudo_loss, "div_loss": div_loss}
                if out_s.aux_logits is not None:
                    aux_log_p_t = out_t.aux_logits.float().log_softmax(1)
                    losses["aux_cls_loss"] = cross_entropy(out_s.aux_logits, y_s, smoothing)
                    losses["aux_pseudo_loss"] = pseudo_label_loss(aux_log_p_t, labels, weights)
                    aux_loss = losses["aux_cls_loss"] + pseudo_weight * losses["aux_pseudo_loss"]
                    loss = loss + config.model.aux_weight * aux_loss
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            statistics.add_source(log_p_s.detach().exp(), y_s)
            agreement = (log_p_t.detach().argmax(1) == labels).float().mean()
            run.log.add(**losses, confidence=confidence.mean(), agreement=agreement)

        average_gradients(optimizer, model, teacher)
        scaler.unscale_(optimizer)
        clip_gradients(optimizer, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if teacher:
            teacher.update_parameters(model)

        if run.due(step, config.log_every):
            run.log.write(step, lr=lr, pseudo_weight=pseudo_weight, **shares.report())
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, evaluated, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
