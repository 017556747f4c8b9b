"""Source-free adaptation: SHOT (arXiv:2002.08546), from a source model and unlabelled target images alone.

    minimise  log K * (ent_weight * ent_loss + div_weight * div_loss) + pseudo_weight * pseudo_loss,  classifier frozen

    ent_loss    = mean entropy of the target predictions, in units of log K  }  information maximisation: every image
    div_loss    = 1 - entropy of their mean, likewise                        }  sure, and all classes equally often
    pseudo_loss = mean CE(model(x_strong), y_t),  y_t the class whose centroid is nearest to the feature of x_weak

Every `centroid_every` steps the centroids are computed over the whole target set: the mean feature of each class,
weighted by its predicted probability, then once more over the images nearest to it. They are saved with the run.
`init_from` is a run of train_source.py of the same `model`. docs/shot.md explains every metric and departure.

    python train_source.py --config configs/demo/source.yaml
    python train_shot.py --config configs/demo/shot.yaml
    python train_shot.py --config configs/demo/shot.yaml seed=1 out_dir=runs/demo/shot_seed1
    python train_shot.py --config configs/demo/shot.yaml --resume

torchrun is not supported yet: one process, one device.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from common.collapse import CollapseMonitor
from common.config import RunConfig, TargetDataConfig, parse_args
from common.evaluation import evaluate
from common.optim import build_optimizer, set_rates
from common.run import Run
from common.runtime import exit_with, get_device, seed_everything
from data import open_domains, train_loader
from losses.entropy import diversity_loss, entropy_loss, information_map
from losses.shot import CentroidMemory, at_features, at_images, centroid_sums, nearest_centroid, unit_features
from losses.supervised import nll_loss, supervised_loss
from models import build_model, init_from
from models.network import Network


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "shot"
    data: TargetDataConfig
    ent_weight: float = 1.0  # of the target's entropy, in nats
    div_weight: float = 1.0  # of div_loss, in nats
    pseudo_weight: float = 0.3  # of the centroid pseudo-labels (the paper's beta; 0.1 on digits)
    centroid_every: int = 100  # steps; the paper's is a pass over the target
    strong_augment: dict = field(default_factory=dict)  # of the strong view, after data.augment; as data.augment

    def __post_init__(self):
        if self.data and self.data.classes_from is None:
            self.data.classes_from = self.init_from
        super().__post_init__()

    def rules(self):
        weights = ("ent_weight", "div_weight", "pseudo_weight")
        return [
            *super().rules(),
            (self.init_from is not None, "init_from is missing: the run of train_source.py to start from"),
            (self.select != "source_val", "select: source_val needs source images, which are not read here"),
            *((getattr(self, key) >= 0, f"{key} must not be negative") for key in weights),
            (self.centroid_every > 0, "centroid_every must be positive"),
            *(self.data.strong_view_rules(self.strong_augment) if self.data else ()),
        ]

    def trained_criteria(self):
        return {"entropy", "infomax"}


@torch.no_grad()
def compute_centroids(
    model: Network, batches: Iterable, layer: str, device: torch.device, autocast: torch.autocast, run: Run
) -> torch.Tensor | None:
    """Class centroids (K, D + 1) of the target's unit features, 0 for a class never predicted; None if run is to stop.

    Once weighted by predicted probability (eq. 4), once more over what is nearest to each (eq. 6).
    """
    model.eval()
    centroids = None
    for _ in range(2):
        sums = counts = 0
        for x_t in batches:
            if run.stopping:
                return None
            with autocast:
                out = model(x_t.to(device, non_blocking=True))
            features = unit_features(out.features[layer])
            p = at_features(out.logits.float().log_softmax(1).exp(), features)
            if centroids is not None:
                p = F.one_hot(nearest_centroid(features, centroids), p.shape[1]).movedim(-1, 1).float()
            sums = sums + centroid_sums(features, p)
            counts = counts + torch.bincount(p.argmax(1).flatten(), minlength=p.shape[1])
        centroids = F.normalize(sums) * (counts > 0)[:, None]
    return centroids


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
    init_from(model, config.init_from, domains.classes)
    model.freeze("head", "aux_head")  # the source's classifier: target features move to where it expects them
    model.to(device).train()
    optimizer = build_optimizer(config.optim, model.param_groups(config.optim.backbone_lr_scale))
    layer, width = list(model.channels.items())[-1]  # what the classifier reads
    memory, monitor = CentroidMemory(domains.num_classes, width).to(device), CollapseMonitor(domains.classes).to(device)
    start = run.begin(model=model, memory=memory, monitor=monitor, optimizer=optimizer, scaler=scaler)

    # --- data
    views = config.strong_augment
    target = iter(train_loader(domains.target, config.data, config.seed, "target", start, config.steps, views))
    labeled = iter(
        train_loader(domains.target_labeled, config.data, config.seed, "target_labeled", start, config.steps)
    )
    whole_target = domains.target_pass()
    evaluation = domains.evaluation()

    # --- train
    for step in range(start + 1, config.steps + 1):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        x_weak, x_strong = (x.to(device, non_blocking=True) for x in next(target))

        # pseudo-labels of the weak view
        if (step - 1) % config.centroid_every == 0:
            centroids = compute_centroids(model, whole_target, layer, device, autocast, run)
            if centroids is None:
                return run.stopped(step - 1)
            memory.centroids.copy_(centroids)
        model.eval()
        with torch.no_grad(), autocast:
            out_weak = model(x_weak)
        model.train()
        p_t = out_weak.logits.float().log_softmax(1).exp()
        features = unit_features(out_weak.features[layer])  # float32, as the centroids
        y_t = at_images(nearest_centroid(features, memory.centroids), out_weak.logits)
        monitor.add(p_t)

        with autocast:
            log_p_t = model(x_strong).logits.float().log_softmax(1)
            ent_loss, div_loss = entropy_loss(information_map(log_p_t)), diversity_loss(log_p_t)
            pseudo_loss = nll_loss(log_p_t, y_t)
            information = config.ent_weight * ent_loss + config.div_weight * div_loss
            loss = math.log(domains.num_classes) * information + config.pseudo_weight * pseudo_loss
            losses = {"ent_loss": ent_loss, "div_loss": div_loss, "pseudo_loss": pseudo_loss}
            if domains.target_labeled:
                x_l, y_l = (x.to(device, non_blocking=True) for x in next(labeled))
                losses["target_cls_loss"] = supervised_loss(model(x_l), y_l, config.model.aux_weight)
                loss = loss + losses["target_cls_loss"]

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        agreement = (log_p_t.detach().argmax(1) == y_t).float().mean()
        run.log.add(**losses, confidence=p_t.amax(1).mean(), agreement=agreement)
        if run.due(step, config.log_every):
            run.log.write(step, lr=lr, **monitor.report(step, run.log.print))
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
