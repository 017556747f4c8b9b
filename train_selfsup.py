"""Self-supervision on both domains (arXiv:1909.11825): rotation, flip and location by one network.

    minimize  cls_loss + rotation_weight * rotation_loss + flip_weight * flip_loss
              + location_weight * location_loss + contrastive_weight * contrastive_loss

    rotation_loss    = CE(head(features(x turned by 0, 90, 180 or 270 degrees)), which of them)
    flip_loss        = likewise, x as it is or upside down
    location_loss    = likewise, one of the four quarters of x
    contrastive_loss = SimCLR's NT-Xent (arXiv:2002.05709) of two views of each target image

x are the images of both domains together; each problem has a linear head on the features that the
classifier reads, and a weight of 0 leaves it out. model.pt does not contain the heads.
docs/selfsup.md explains every metric and departure from the paper.

    python train_selfsup.py --config configs/demo/digits.yaml configs/demo/selfsup.yaml
    python train_selfsup.py --config configs/demo/digits.yaml configs/demo/selfsup.yaml --resume
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients
from data.order import generator
from data.selfsup import digit_rotations, flips, make_problem, quadrants, rotations
from data.views import to_views
from losses.contrastive import nt_xent_loss
from losses.supervised import cross_entropy, supervised_loss
from models import build_model, feature_vectors, forward_domains
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "selfsup"
    rotation_weight: float = not_negative(1.0)  # of rotation_loss
    rotation_set: Literal["turns", "digits"] = "turns"  # digits: without 180 degrees, a 6 as a 9
    flip_weight: float = not_negative(0.0)  # of flip_loss
    location_weight: float = not_negative(0.0)  # of location_loss
    contrastive_weight: float = not_negative(0.0)  # of contrastive_loss
    contrastive_temperature: float = positive(0.5)  # of the similarities in contrastive_loss
    strong_augment: dict = field(default_factory=dict)  # of its second view, after data.augment

    def trained_criteria(self):
        return set()  # of neg_entropy and infomax, the loss improves neither directly

    def rules(self):
        differ = self.contrastive_weight == 0 or len(self.strong_augment) > 0
        used = self.contrastive_weight > 0 or len(self.strong_augment) == 0
        mirrored = self.rotation_weight > 0 and self.rotation_set == "digits"
        return [
            *super().rules(),
            (differ, "contrastive_weight needs strong_augment: the two views must differ"),
            (used, "strong_augment is the second view of contrastive_weight, which is 0"),
            (
                not mirrored or not self.data or not self.data.augments_by("flip"),
                "rotation_set: digits has mirrored images as a class; leave flip out of augment",
            ),
            *(self.data.strong_view_rules(self.strong_augment) if self.data else ()),
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
    layer, width = model.head_layer, model.channels[model.head_layer]
    turns = digit_rotations if config.rotation_set == "digits" else rotations
    problems = {  # name: (weight, images of every class, number of classes)
        "rotation": (config.rotation_weight, turns, 4),
        "flip": (config.flip_weight, flips, 2),
        "location": (config.location_weight, quadrants, 4),
    }
    problems = {name: problem for name, problem in problems.items() if problem[0] > 0}
    heads = nn.ModuleDict({name: nn.Linear(width, k) for name, (_, _, k) in problems.items()})
    if config.contrastive_weight > 0:
        layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)
        heads["contrastive"] = nn.Sequential(*layers)
    heads.to(device)
    optimizer = build_optimizer(config.optim, model, heads)
    start = run.begin(model=model, heads=heads, optimizer=optimizer, scaler=scaler)

    # --- data
    source = domains.batches("source", start, config.steps)
    contrast = config.contrastive_weight > 0
    strong = config.strong_augment if contrast else None
    target = domains.batches("target", start, config.steps, strong)
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        optimizer.zero_grad(set_to_none=True)
        for part in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            views = to_views(next(target), device)
            x_t, x_strong = views if contrast else (views, None)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)

            with autocast:
                out_s, out_t = forward_domains(model, x_s, x_t, config.model)
                loss, losses = supervised_loss(out_s, y_s, config.model)

                # evaluation sees plain images, so their statistics are the running ones
                with model.running_statistics(fixed=True):
                    for name, (weight, transform, _) in problems.items():
                        random = generator(config.seed, name, step, part)
                        views_s, labels_s = make_problem(x_s, transform, random)
                        views_t, labels_t = make_problem(x_t, transform, random)
                        pair = forward_domains(model, views_s, views_t, config.model)
                        features = [feature_vectors(out.features[layer], False) for out in pair]
                        logits = heads[name](torch.cat(features))
                        problem_loss = cross_entropy(logits, torch.cat([labels_s, labels_t]))
                        hits_t = logits[len(x_s) :].argmax(1) == labels_t
                        losses[f"{name}_loss"] = problem_loss
                        losses[f"{name}_accuracy"] = 100 * hits_t.float().mean()
                        loss = loss + weight * problem_loss
                    if contrast:
                        pair = out_t, model(x_strong)
                        features = [feature_vectors(out.features[layer], False) for out in pair]
                        z = [heads["contrastive"](x) for x in features]
                        contrastive_loss = nt_xent_loss(*z, config.contrastive_temperature)
                        losses["contrastive_loss"] = contrastive_loss
                        loss = loss + config.contrastive_weight * contrastive_loss
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            run.log.add(**losses)
            run.monitor.add(out_t.logits)

        average_gradients(optimizer, model, heads)
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
