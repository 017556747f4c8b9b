"""Domain-adversarial training with gradient reversal: DANN (arXiv:1505.07818), CDAN (1705.10667).

    minimize  cls_loss + adv_weight * adv_loss + mcc_weight * mcc_loss

    cls_loss = CE(model(x_s), y_s)
    adv_loss = 0.5 * (mean BCE(D(R(features_s)), 1) + mean BCE(D(R(features_t)), 0)),
               summed over feature layers

R is the identity whose gradient is multiplied by -reversal_coeff (the paper's lambda): one step
trains the discriminator D to tell the domains apart, and the features to confuse it. Not in the
paper: `reversal_bound` limits the norm of the reversed gradient to that of the classifier's.
`conditional` gives D the outer product of features and class probabilities (CDAN; CDAN+E). mcc_loss
is that of train_mcc.py. docs/dann.md explains the rest.

    python train_dann.py --config configs/demo/digits.yaml configs/demo/dann.yaml
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from common.config import not_negative, positive
from common.errors import exit_with
from common.ranks import average_gradients, norm_over_ranks
from data.views import to_views
from losses.cdan import MultilinearMap, entropy_weights
from losses.domain import discriminator_accuracy, domain_loss
from losses.mcc import mcc_loss
from losses.supervised import supervised_loss
from models import (
    DomainDiscriminator,
    build_model,
    feature_vectors,
    forward_domains,
    gradient_reversal,
)
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, set_rates
from training.run import Run
from training.schedules import progress, reversal_coefficient


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "dann"
    adv_weight: float = not_negative(1.0)  # of adv_loss, for features and discriminators alike
    feature_layers: list[str] = field(default_factory=lambda: ["pooled"])  # layer1..4 pooled logits
    layer_weights: list[float] = field(default_factory=lambda: [1.0])  # of the reversed gradients
    disc_locations: bool = False  # judge every location of a map, not its mean over positions
    conditional: Literal["none", "cdan", "cdan_e"] = "none"  # condition D on class probabilities
    conditional_map: int | Literal["full"] = positive("full", most=100_000)  # or random features
    reversal_schedule: Literal["dann", "constant", "linear"] = "dann"  # of the paper's lambda
    reversal_max: float = not_negative(1.0)  # its final value; 0 leaves the features alone
    reversal_gamma: float = positive(10.0)  # steepness of the dann schedule
    reversal_bound: float | None = positive(1.0)  # largest reversed / classifier's gradient norm
    reversal_progress: int | Literal["total"] = positive("total")  # steps it takes; total: the run
    disc_hidden: int = positive(1024, most=100_000)  # width of a discriminator's two hidden layers
    disc_norm: Literal["batch", "dropout", "none"] = "batch"  # after each hidden layer
    disc_lr: float | None = positive(None, most=1000)  # of the discriminators; null: optim.lr
    mcc_weight: float = not_negative(0.0)  # of mcc_loss: minimum class confusion (train_mcc.py)
    temperature: float = positive(2.5)  # of the target's predictions in mcc_loss

    def trained_criteria(self):
        return {"neg_entropy", "infomax"} if self.mcc_weight > 0 else set()

    def rules(self):
        layers, plain = self.feature_layers, self.conditional == "none"
        same = len(self.layer_weights) == len(layers) and min(self.layer_weights, default=0) >= 0
        pooled, full = layers == ["pooled"], self.conditional_map == "full"
        return [
            *super().rules(),
            (len(layers) > 0, "feature_layers must name a layer"),
            (not self.compile or not self.reversal_bound, "compile needs reversal_bound: null"),
            (same, "layer_weights needs one weight, not negative, for each of feature_layers"),
            (plain or pooled, "conditional needs feature_layers: [pooled], which a classifier has"),
            (full or not plain, "conditional_map is for conditional: cdan or cdan_e"),
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
    model.check_layers(config.feature_layers)
    conditional = config.conditional != "none"
    widths = [model.channels[name] for name in config.feature_layers]
    multilinear = nn.Identity()
    if conditional:
        width = model.channels["pooled"]
        multilinear = MultilinearMap(width, domains.num_classes, config.conditional_map)
        widths = [multilinear.out_features]
    multilinear.to(device)
    discriminators = nn.ModuleList(
        DomainDiscriminator(width, config.disc_hidden, config.disc_norm) for width in widths
    ).to(device)
    layers = list(zip(config.feature_layers, config.layer_weights, discriminators, strict=True))
    disc_lr_scale = 1.0 if config.disc_lr is None else config.disc_lr / config.optim.lr
    disc_group = {"params": list(discriminators.parameters()), "lr_scale": disc_lr_scale}
    optimizer = build_optimizer(config.optim, model, disc_group)
    start = run.begin(
        model=model,
        multilinear=multilinear,
        discriminators=discriminators,
        optimizer=optimizer,
        scaler=scaler,
    )

    # --- data
    source = domains.batches("source", start, config.steps)
    target = domains.batches("target", start, config.steps)
    labeled = domains.batches("target_labeled", start, config.steps)
    evaluation = domains.evaluation()

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        p = progress(step - 1, config.steps, config.reversal_progress)
        reversal_coeff = reversal_coefficient(
            config.reversal_schedule, p, config.reversal_max, config.reversal_gamma
        )
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            x_s, y_s = to_views(next(source), device)
            x_t = to_views(next(target), device)
            x_l, y_l = to_views(next(labeled), device) if labeled else (None, None)

            with autocast:
                out_s, out_t = forward_domains(model, x_s, x_t, config.model)
                loss, losses = supervised_loss(out_s, y_s, config.model)

                # the norm of the classifier's gradient at the features limits the reversed one's
                bounds = [None] * len(layers)
                if config.reversal_bound is not None:
                    read = [(out_s.joint or out_s.features)[name] for name in config.feature_layers]
                    scaled = scaler.scale(loss / config.accumulate)
                    gradients = torch.autograd.grad(scaled, read, retain_graph=True)
                    bounds = [config.reversal_bound * norm_over_ranks(grad) for grad in gradients]

                adv_loss, domain_accuracy, weight_s, weight_t = 0.0, 0.0, None, None
                applied = torch.zeros((), device=device)
                for (name, layer_weight, discriminator), bound in zip(layers, bounds, strict=True):
                    coeff = layer_weight * reversal_coeff
                    features_s = gradient_reversal(out_s.features[name], coeff, bound, applied)
                    features_t = gradient_reversal(out_t.features[name], coeff, bound, applied)
                    features_s = feature_vectors(features_s, config.disc_locations)
                    features_t = feature_vectors(features_t, config.disc_locations)
                    features = torch.cat([features_s, features_t])
                    if conditional:
                        logits = torch.cat([out_s.logits, out_t.logits]).detach()
                        features = multilinear(features, logits.float().softmax(1))
                    if config.conditional == "cdan_e":
                        weight_s = entropy_weights(out_s.logits)
                        weight_t = entropy_weights(out_t.logits)
                    domain_logits = discriminator(features).tensor_split([len(features_s)])
                    adv_loss = adv_loss + domain_loss(*domain_logits, weight_s, weight_t)
                    accuracy = discriminator_accuracy(*domain_logits)
                    domain_accuracy += accuracy / len(layers)
                losses |= {"adv_loss": adv_loss, "domain_accuracy": domain_accuracy}
                losses["reversal_applied"] = applied
                loss = loss + config.adv_weight * adv_loss
                if config.mcc_weight > 0:
                    losses["mcc_loss"] = mcc_loss(out_t.logits, config.temperature)
                    loss = loss + config.mcc_weight * losses["mcc_loss"]
                if labeled:
                    target_cls_loss, _ = supervised_loss(model(x_l), y_l, config.model)
                    losses["target_cls_loss"] = target_cls_loss
                    loss = loss + target_cls_loss
            scaler.scale(loss / config.accumulate).backward()
            applied /= 2 * len(layers)  # the backward pass has added them up
            run.log.add(**losses)
            run.monitor.add(out_t.logits)

        average_gradients(optimizer, model, discriminators)
        scaler.unscale_(optimizer)
        clip_gradients(optimizer, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()

        if run.due(step, config.log_every):
            run.log.write(step, reversal_coeff=reversal_coeff, lr=lr, disc_lr=lr * disc_lr_scale)
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains)


if __name__ == "__main__":
    exit_with(main)
