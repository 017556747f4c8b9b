"""Test-time adaptation (TENT, arXiv:2006.10726) to a stream of unlabeled images, in one pass.

    minimize  ent_loss = mean of w H(p),  p = model(x_t), H in nats
    over the scales and shifts of the normalization layers

    w = exp(E0 - H) where H < E0 = ent_margin * log K, else 0; times (1 - cos(p, mean p)), scaled
    batch norm normalizes by (prior * statistics so far + n * those of the n images) / (prior + n),
    and with `prior_from: stream` the variance is that of both together

Each batch is predicted, and the same forward is learned from. The unadapted model, that of
`init_from`, predicts it, too: both figures stand in metrics.jsonl and summary.json. Labels of the
stream score the predictions. After each step the weights go a share `source_pull` of the way back
to the unadapted ones, and the entire way where the predictions have collapsed. Rate and share are
for `lr_images` images; a batch of n has n/lr_images of them. The weights, after those of EATA
(arXiv:2204.02610) and ROID (arXiv:2306.00650), the prior (arXiv:2006.16971) and the way back of
ROID can be left out by their keys. docs/online.md explains the rest.

    python adapt_online.py --config configs/demo/digits.yaml configs/demo/online.yaml
    python adapt_online.py --config configs/demo/digits.yaml configs/demo/online.yaml --resume
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from common.averages import pull
from common.config import not_negative, positive
from common.errors import exit_with
from data import StreamDataConfig
from data.views import to_views
from losses.online import diversity_weights, reliable_weights, weighted_entropy
from models import build_model, eval_mode
from models.stream_norm import copy_statistics, follow_stream
from training.config import RunConfig, parse_args
from training.device import get_device
from training.optim import build_optimizer, clip_gradients, forget_moments, set_rates
from training.run import Run
from training.stream import StreamRecord, warn_of_fixed_statistics


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "online"
    one_process: ClassVar[bool] = True  # each batch is predicted with what those before taught
    data: StreamDataConfig
    steps: int | None = positive(None)  # batches of the stream; null: all
    select: Literal["last"] = "last"  # model.pt is the model after the stream
    prior: float | None = not_negative(64.0)  # images that prior statistics count as; null: fixed
    prior_from: Literal["stream", "source"] = "stream"  # prior: statistics so far | the source's
    updates: int = not_negative(1)  # gradient steps per batch; 0: the statistics alone adapt
    ent_margin: float | None = positive(0.4, most=1)  # share of log K; null: all have weight 1
    diversity: bool = True  # whether classes that are predicted often are learned from less
    lr_images: int = positive(64)  # images that optim.lr and source_pull are for
    source_pull: float = not_negative(0.01, most=1)  # share of the way back to init_from's weights
    reset_below: float = not_negative(0.5, most=1)  # of the unadapted entropy; 0: never reset
    check_every: int = positive(10)  # steps between two looks for harm

    def __post_init__(self):
        if self.data and self.data.classes_from is None:
            self.data.classes_from = self.init_from
        super().__post_init__()

    def trained_criteria(self):
        return {"neg_entropy", "infomax"} if self.updates > 0 else set()

    def rules(self):
        return [
            *super().rules(),
            (self.init_from is not None, "init_from is missing: name a run of train_source.py"),
            (self.accumulate == 1, "accumulate: a batch is predicted as a whole; leave it out"),
            (
                self.prior is None or not self.model or self.model.bn != "frozen",
                "model.bn: frozen keeps the statistics; set prior: null as well, or model.bn: "
                "concat to adapt them, if the source model was not trained with frozen ones",
            ),
            (
                self.updates > 0 or self.prior is not None,
                "updates: 0 and prior: null adapt nothing",
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
    warn_of_fixed_statistics(config.init_from, config.prior)
    model = build_model(config, domains.classes).to(device)
    source = copy.deepcopy(model).eval().requires_grad_(False)  # the unadapted model
    follow_stream(model, config.prior, pooled=config.prior_from == "stream")
    optimizer = build_optimizer(config.optim, model)
    evaluation = domains.evaluation()
    record = StreamRecord(evaluation, run.monitor.alarm).to(device)
    start = run.begin(
        model=model,
        source=source,
        record=record,
        optimizer=optimizer,
        scaler=scaler,
    )

    # --- data
    stream = domains.stream_batches(start, config.steps)
    labeled = domains.stream.labels is not None

    # --- train
    for step in run.steps(start):
        lr = set_rates(optimizer, config.optim, step - 1, config.steps)
        batch = to_views(next(stream), device)
        x_t, y_t = batch if labeled else (batch, None)
        share = len(x_t) / config.lr_images
        for group in optimizer.param_groups:
            group["lr"] *= share
        eval_mode(model, batch_statistics=config.prior is not None)
        if config.prior_from == "source":
            copy_statistics(model, source)

        for update in range(max(config.updates, 1)):
            is_last = update + 1 >= config.updates  # the batch enters the statistics once
            with (
                autocast,
                torch.set_grad_enabled(config.updates > 0),
                model.running_statistics(fixed=not is_last),
            ):
                logits = model(x_t).logits
                log_p = logits.float().log_softmax(1)
                weights = reliable_weights(log_p, config.ent_margin)
                if config.diversity:
                    weights = weights * diversity_weights(log_p, record.mean_prediction)
                loss = weighted_entropy(log_p, weights)
            if config.updates > 0:
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                clip_gradients(optimizer, config.optim.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                pull(model, source, min(config.source_pull * share, 1.0))

        with autocast, torch.no_grad():
            unadapted = source(x_t).logits
        record.add(logits, unadapted, y_t)
        run.monitor.add(logits)
        agreement = (logits.argmax(1) == unadapted.argmax(1)).float().mean()
        run.log.add(ent_loss=loss, learned=(weights > 0).float().mean(), agreement=agreement)

        if run.due(step, config.check_every):
            record.look_for_harm(step)
            if record.has_collapsed(config.reset_below):
                run.monitor.alarm(step, "the predictions have collapsed: back to init_from's model")
                model.load_state_dict(source.state_dict())
                forget_moments(optimizer)
                record.reset()
        if run.due(step, config.log_every):
            run.log.write(step, lr=lr, **record.report())
        if run.due(step, config.eval_every):
            with autocast:
                run.evaluate(step, model, evaluation)

    return run.finish(domains, stream=record.facts())


if __name__ == "__main__":
    exit_with(main)
