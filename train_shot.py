"""Source-free adaptation: SHOT (arXiv:2002.08546), from a source model and target images alone.

    minimize  log K * (ent_weight * ent_loss + div_weight * div_loss) + pseudo_weight * pseudo_loss
    with the classifier frozen

    ent_loss    = mean entropy of the target predictions, in units of log K
    div_loss    = 1 - entropy of their mean, likewise
    pseudo_loss = mean CE(model(x_strong), y_t), where y_t is the class whose centroid is nearest
                  to the feature of x_weak

The first two are information maximization: every image confident, all classes equally often.
Every `centroid_every` steps the centroids are computed over the whole target set: the mean feature
of each class, weighted by its predicted probability, then once more over the images nearest to it.
`init_from` is a run of train_source.py with the same `model`. docs/shot.md explains every metric
and departure from the paper.

    python train_shot.py --config configs/demo/digits.yaml configs/demo/shot.yaml
    python train_shot.py --config configs/demo/digits.yaml configs/demo/shot.yaml --resume
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from common.config import not_negative, positive
from common.counts import occurrences
from common.errors import exit_with
from common.ranks import average_gradients, total
from data import TargetDataConfig
from data.views import to_views
from losses.entropy import attached, diversity_loss, entropy_loss, information_map
from losses.shot import (
    CentroidMemory,
    at_features,
    at_images,
    centroid_sums,
    nearest_centroid,
    unit_features,
)
from losses.supervised import nll_loss, supervised_loss
from models import Network, build_model
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "shot"
    data: TargetDataConfig
    ent_weight: float = not_negative(1.0)  # of the target's entropy, in nats
    div_weight: float = not_negative(1.0)  # of div_loss, in nats
    pseudo_weight: float = not_negative(0.3)  # of pseudo_loss (beta in the paper; digits: 0.1)
    centroid_every: int = positive(100)  # steps; in the paper one pass over the target
    strong_augment: dict = field(default_factory=dict)  # of the strong view, after data.augment

    def __post_init__(self):
        if self.data and self.data.classes_from is None:
            self.data.classes_from = self.init_from
        super().__post_init__()

    def trained_criteria(self):
        return {"neg_entropy", "infomax"}

    def rules(self):
        return [
            *super().rules(),
            (self.init_from is not None, "init_from is missing: name a run of train_source.py"),
            (
                self.select != "source_val",
                "select: source_val needs source images, which are not read here",
            ),
            *(self.data.strong_view_rules(self.strong_augment) if self.data else ()),
        ]


@torch.no_grad()
def compute_centroids(
    model: Network,
    batches: Iterable[torch.Tensor],
    layer: str,
    shape: tuple[int, int],
    previous: torch.Tensor | None,
    autocast: torch.autocast,
    device: torch.device,
) -> torch.Tensor:
    """Centroids, of `shape` (K, D + 1), of the unit features of `layer`; 0 where none is predicted.

    An image belongs to the classes by its predicted probabilities (eq. 4), or, where centroids
    were computed before, to the nearest of these (eq. 6).
    """
    sums = torch.zeros(shape, device=device)
    counts = torch.zeros(shape[0], dtype=torch.int64, device=device)
    for x_t in batches:
        with autocast:
            out = model(to_views(x_t, device))
        features = unit_features(out.features[layer])
        p = at_features(out.logits.float().log_softmax(1).exp(), features)
        if previous is not None:
            nearest = nearest_centroid(features, previous)
            p = F.one_hot(nearest, p.shape[1]).movedim(-1, 1).float()
        sums += centroid_sums(features, p)
        counts += occurrences(p.argmax(1), p.shape[1])
    return F.normalize(total(sums)) * (total(counts) > 0)[:, None]


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
    model.freeze("head", "aux_head")  # target features move to where the source's classifier is
    optimizer = build_optimizer(config.optim, model)
    layer, log_k = model.head_layer, math.log(domains.num_classes)
    memory = CentroidMemory(domains.num_classes, model.channels[layer]).to(device)
    start = run.begin(model=model, memory=memory, optimizer=optimizer, scaler=scaler)

    # --- data
    target = domains.batches("target", start, config.steps, config.strong_augment)
    labeled = domains.batches("target_labeled", start, config.steps)
    whole_target = domains.target_pass()
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        if (step - 1) % config.centroid_every == 0:
            model.eval()
            centroids = None
            for _ in range(2):  # eq. 4, then eq. 6
                batches = run.watch(whole_target, step - 1)  # a signal may come in between
                centroids = compute_centroids(
                    model, batches, layer, memory.centroids.shape, centroids, autocast, device
                )
            memory.centroids.copy_(centroids)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x_weak, x_strong = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)
            # pseudo-labels of the weak view
            model.eval()
            with torch.no_grad(), autocast:
                out_weak = model(x_weak)
            model.train()
            p_t = out_weak.logits.float().log_softmax(1).exp()
            features = unit_features(out_weak.features[layer])  # float32, as the centroids
            y_t = at_images(nearest_centroid(features, memory.centroids), out_weak.logits)
            run.monitor.add(out_weak.logits)

            # evaluation sees plain images, so their statistics are the running ones
            if config.strong_augment and model.learns_statistics:
                with torch.no_grad(), autocast:
                    model(x_weak)
            with autocast:
                with model.running_statistics(fixed=bool(config.strong_augment)):
                    log_p_t = model(x_strong).logits.float().log_softmax(1)
                ent_loss = entropy_loss(attached(information_map(log_p_t), config.ent_weight))
                div_loss = diversity_loss(attached(log_p_t, config.div_weight))
                pseudo_loss = nll_loss(log_p_t, y_t)
                information = config.ent_weight * ent_loss + config.div_weight * div_loss
                loss = log_k * information + config.pseudo_weight * pseudo_loss
                losses = {"ent_loss": ent_loss, "div_loss": div_loss, "pseudo_loss": pseudo_loss}
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            agreement = (log_p_t.detach().argmax(1) == y_t).float().mean()
            run.log.add(**losses, confidence=p_t.amax(1).mean(), agreement=agreement)

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
