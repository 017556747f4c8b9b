"""Source-free adaptation by neighbors: attracting and dispersing, AaD (arXiv:2205.04183).

    minimize  attract_loss + disperse_coeff * disperse_loss

    attract_loss  = -mean_i sum_j p_i . p_j, over the `neighbors` nearest of all target images
    disperse_loss =  mean_i sum_m p_i . p_m, over the other images of the batch

An image is drawn to the predictions of its neighbors in feature space, and pushed from those of
images taken at random, of which few are of its class. A memory holds the latest feature and
prediction of every target image; it starts with one pass over the target. disperse_coeff is
disperse_weight * (1 + 10 t)^-disperse_decay, where t goes from 0 to 1 over the run. All weights
train, the classifier too. `init_from` is a run of train_source.py with the same `model`. There is
no segmentation, as in the paper. docs/aad.md explains every metric and departure from the paper.

    python train_aad.py --config configs/demo/digits.yaml configs/demo/aad.yaml
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from common.config import not_negative, positive
from common.errors import UserError, exit_with
from common.ranks import average_gradients, gather, total
from data import ClassificationTargetDataConfig
from data.views import to_views
from losses.aad import NeighborBank, attraction_loss, dispersion_loss
from losses.supervised import supervised_loss
from models import Network, build_model
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "aad"
    data: ClassificationTargetDataConfig
    neighbors: int = positive(5)  # of each image that attract it
    disperse_weight: float = not_negative(1.0)  # of disperse_loss, at the start
    disperse_decay: float = not_negative(0.0)  # 0: disperse_coeff is constant

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
        ]


@torch.no_grad()
def fill(
    bank: NeighborBank,
    model: Network,
    batches: Iterable[tuple[int, torch.Tensor]],
    eval_batch: int,
    autocast: torch.autocast,
    device: torch.device,
) -> None:
    """Fill the memory with one pass over the target in eval mode.

    Args:
        bank: the memory.
        model: is in train mode afterwards.
        batches: (number of the batch, images) of this process.
        eval_batch: images per batch; the last one may be smaller.
        autocast, device: of the run.
    """
    bank.features.zero_()  # a pass that a signal has stopped left rows, which the sums would repeat
    bank.p.zero_()
    model.eval()
    for number, x_t in batches:
        with autocast:
            out = model(to_views(x_t, device))
        first = number * eval_batch
        images = torch.arange(first, first + len(out.logits), device=device)
        bank.remember(images, unit(out.features[model.head_layer]), probabilities(out.logits))
    bank.features.copy_(total(bank.features))  # every process has forwarded a part of them
    bank.p.copy_(total(bank.p))
    model.train()


def unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=1)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(1).exp()


def main(argv: list[str] | None = None) -> int:
    # --- set-up
    config, args = parse_args(Config, __doc__, argv)
    device = get_device(config.device)
    autocast = torch.autocast(device.type, getattr(torch, config.amp), config.amp != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
    run = Run(config, args)
    domains = run.open_domains()

    # --- model
    num_images = len(domains.target)
    if config.neighbors >= num_images:
        raise UserError(f"neighbors: the target has {num_images} images; ask for fewer than that")
    model = build_model(config, domains.classes).to(device).train()
    optimizer = build_optimizer(config.optim, model)
    width = model.channels[model.head_layer]
    bank = NeighborBank(num_images, width, domains.num_classes).to(device)
    start = run.begin(model=model, bank=bank, optimizer=optimizer, scaler=scaler)

    # --- data
    target = domains.batches("target", start, config.steps)
    numbers = iter(domains.positions("target", start, config.steps))
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()
    if start == 0:
        target_pass = domains.target_pass()
        batches = zip(target_pass.sampler, run.watch(target_pass, 0), strict=True)
        fill(bank, model, batches, config.data.eval_batch, autocast, device)

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        t = (step - 1) / config.steps
        disperse_coeff = config.disperse_weight * (1 + 10 * t) ** -config.disperse_decay
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x_t = to_views(next(target), device)
            images = next(numbers).to(device, non_blocking=True)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)

            with autocast:
                out_t = model(x_t)
                features, p_t = unit(out_t.features[model.head_layer]), probabilities(out_t.logits)
                with torch.autocast(device.type, enabled=False):  # cosines in float32
                    all_images, all_p = gather(images), gather(p_t)
                    bank.remember(all_images, gather(features), all_p)
                    neighbors = bank.nearest(images, features, config.neighbors)
                    attract_loss = attraction_loss(p_t, neighbors)
                    disperse_loss = dispersion_loss(all_p, all_images)
                loss = attract_loss + disperse_coeff * disperse_loss
                losses = {"attract_loss": attract_loss, "disperse_loss": disperse_loss}
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            run.log.add(**losses, confidence=p_t.detach().amax(1).mean())
            run.monitor.add(out_t.logits)

        average_gradients(optimizer, model)
        scaler.unscale_(optimizer)
        clip_gradients(optimizer, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()

        if run.due(step, config.log_every):
            run.log.write(step, disperse_coeff=disperse_coeff, lr=lr)
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
