"""The training loop, the same for every objective: plan a step, run its micro-batches, clip, update, log, evaluate, save."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.data.tokenizer import head_vocab_size, load_tokenizer
from fastalign.errors import DataError, DeviceMemoryError, ModelError, NumericsError
from fastalign.models.adapters import POLICY, has_adapter
from fastalign.models.critic import save_critic
from fastalign.models.fingerprint import keep_fingerprint, model_fingerprint
from fastalign.models.heads import lm_head_weight
from fastalign.models.save import save_final
from fastalign.models.trunk import causal_lm
from fastalign.objectives.base import Online, RunConfig, Stateful
from fastalign.packing import collate, packed_tokens, spared_tokens
from fastalign.pausing import pausing
from fastalign.ranks import Ranks, joined
from fastalign.train import checkpoint, distributed
from fastalign.train.card import write_card
from fastalign.train.checkpoint import Found, Identity, Progress
from fastalign.train.config import RESUME_MAY_CHANGE, dump, flat
from fastalign.train.folder import TEMPORARY, RunFolder, claim, publish, writing
from fastalign.train.footprint import footprint_of_steps
from fastalign.train.footprint_ranks import footprint_of_rank, unpredicted, without_storage
from fastalign.train.host import Host, stop_requests
from fastalign.train.metrics import MetricsWriter, NoMetrics, check_loggers, memory, rss_bytes
from fastalign.train.optim import Optimizer, learning_rate, trainable
from fastalign.train.profile import StepProfiler
from fastalign.train.report import write_counts, write_report
from fastalign.train.room import with_checkpointing, with_max_tokens
from fastalign.train.step import Order, check_lengths, check_vocabulary, deal, over_ranks, run_step, to_floats, with_target
from fastalign.types import Sample

logger = logging.getLogger("fastalign")

TOLD_FROM = 1 << 30  # bytes: of less memory the log does not speak

Callback = Callable[[int, dict[str, float]], None]
ALONE = Host()


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    output: Path
    step: int  # optimizer steps done
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step of this process
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, prefixed eval_
    interrupted: str | None = None  # name of the signal that ended the run early; then there is no final/


def train(config: RunConfig, *, callbacks: Sequence[Callback] = (), on: Host = ALONE) -> TrainResult:
    """Run `config` from its first step, or from its newest checkpoint, to its last, and write `config.output`.

    A SIGINT or SIGTERM ends the run after the step in progress, with a checkpoint; the second one ends it at once.
    `callbacks` are called with the step and its metrics. `on` is where the run trains: a process of its own, unless it is a
    `SharedHost`, on whose model in memory it trains an adapter. Raises a FastalignError for anything that can be mended; until the
    first batch has passed the self-check nothing is written.
    """
    config.validate()
    with pausing(on.pause, on.aside), joined(config.model.device) as ranks, _claimed(config, ranks) as folder:
        with ranks.together():
            run = _Run(on.admit(config, ranks), folder, callbacks, ranks, on)
        return run.run()


@contextmanager
def _claimed(config: RunConfig, ranks: Ranks) -> Iterator[RunFolder]:
    """The output folder, locked by the first rank for all."""
    with ExitStack() as stack:
        with ranks.together():
            config.check_ranks(ranks.size)
            folder = RunFolder(Path(config.output))
            if ranks.is_first:
                folder = stack.enter_context(claim(config.output, resume=config.resume, overwrite=config.overwrite))
        yield folder


class _Run:
    def __init__(self, config: RunConfig, folder: RunFolder, callbacks: Sequence[Callback], ranks: Ranks, host: Host) -> None:
        self.config, self.folder, self.callbacks, self.ranks, self.host = config, folder, callbacks, ranks, host
        check_loggers(config.loggers)
        self.tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
        self.data = config.load_data(self.tokenizer, head_vocab_size(config.model.path))  # before the model: mistakes show sooner
        samples = [*self.data.samples, *self.data.eval_samples]
        check_lengths(samples, config.token_limit, share=config.share_prompts)
        self.divided_first = distributed.is_divided_first(config, ranks)
        with host.turn():
            torch.manual_seed(config.seed)
            self.model = host.load(distributed.on_host(config) if self.divided_first else config, self.tokenizer)
        self.device = distributed.device_of(config) if self.divided_first else next(self.model.parameters()).device
        settle: dict[str, Any] = {"device": self.device, "budget": host.memory_budget}
        config = with_checkpointing(config, self.model, self.data, folder.path, ranks, **settle)
        self.config = config = with_max_tokens(config, self.model, self.data, folder.path, ranks, **settle)
        self.whole = without_storage(self.model) if ranks.size > 1 else self.model  # as it is before it is divided
        self.head_weight = lm_head_weight(self.model)
        self.embedding = causal_lm(self.model).get_input_embeddings()
        check_vocabulary(samples, len(self.embedding.weight if self.head_weight is None else self.head_weight))
        self.order = Order.of(config, len(self.data.samples))
        self.identity = Identity(
            algorithm=config.name,
            options={name: value for name, value in flat(config).items() if name not in RESUME_MAY_CHANGE} | config.sources(),
            data=self.data.fingerprint,
            model=model_fingerprint(self.model, skip_adapter=POLICY if has_adapter(self.model) else None),
        )
        _check_alike(self.identity, ranks)
        self.rss_before = rss_bytes()  # what is there without training
        trainable(self.model)  # mistakes show before anything is written
        if self.divided_first:
            keep_fingerprint(self.model, self.identity.model, skip_adapter=POLICY if has_adapter(self.model) else None)
            self.weights = distributed.of(self.model, config, ranks, self.device)
        with host.turn():
            config.check_model(self.model, collate([with_target(self._samples(0)[0])]).to(self.device))
        self.progress = Progress()
        self.saved_step = -1
        self.metrics: dict[str, float] = {}
        self.answers: list[dict[str, Any]] = []  # of an online step, to be written down
        self.eval_metrics: dict[str, float] = {}
        self.profiler: StepProfiler | None = None
        self.predicted = 0  # bytes at the peak

    def run(self) -> TrainResult:
        config, folder, total = self.config, self.folder, self.order.total_steps
        self._begin()
        self.model.train()
        self._predict()
        if config.profile:
            self.profiler = StepProfiler(config.profile, total - self.progress.step, folder.path, self.model, self.device)
        logs = (MetricsWriter if self.ranks.is_first else NoMetrics)(
            folder.path,
            loggers=config.loggers,
            resume_step=self.progress.step,
            total_steps=total,
            run_name=folder.path.name,
            config=flat(config),
        )
        with logs, stop_requests() as stop:
            while self.progress.step < total and not (stopped := self._stopped(stop)):
                with self.host.turn(), self.profiler.step() if self.profiler else nullcontext():
                    self._step()
                step = self.progress.step
                if step % config.log_every == 0 or step == total:
                    if self.profiler:
                        self.metrics |= self.profiler.metrics()
                    logs.log(step, self.metrics)
                logs.log_completions(step, self.answers)
                self._check_numerics()
                if self.data.eval_samples and (step == total or (config.eval_every and step % config.eval_every == 0)):
                    with self.host.turn():
                        self._evaluate()
                    logs.log(step, self.eval_metrics, kind="eval")
                for callback in self.callbacks:
                    callback(step, self.metrics)
                if step == total or (config.save_every and step % config.save_every == 0):
                    self._save(logs)
            if self.saved_step < self.progress.step:
                self._save(logs)
        if self.progress.step < total:
            logger.warning("%s: stopped by %s after step %d/%d; continue with --resume", folder.path, stopped, self.progress.step, total)
            return TrainResult(folder.path, self.progress.step, self.metrics, self.eval_metrics, interrupted=stopped)
        self._compare_memory()
        self._finish()
        return TrainResult(folder.path, total, self.metrics, self.eval_metrics)

    def _stopped(self, requests: Sequence[str]) -> str | None:
        """The signal that asks some rank to stop, or why the host does."""
        return next(filter(None, self.ranks.gather(requests[0] if requests else self.host.stopping)), None)

    def _step(self) -> None:
        """One optimizer step, and its metrics."""
        started = time.perf_counter()
        config, progress = self.config, self.progress
        samples = self._samples(progress.step)
        if isinstance(self.objective, Online):
            with torch.no_grad(), self.weights.whole(), self.ranks.together():
                samples = list(self.objective.samples(progress.step, samples))
            self.answers = self.objective.shown(progress.step + 1)
        rate = learning_rate(progress.step, self.order.total_steps, config)
        self.optimizer.zero_grad()
        begin_update = partial(self.optimizer.begin_update, rate) if config.update_in_backward else None
        bins, sums, denominators = self._run_step(samples, before_last=begin_update)
        grad_norm = self.optimizer.grad_norm()
        values = to_floats({**sums, "grad_norm": grad_norm})  # the step's one wait for the device
        norm = values.pop("grad_norm")
        values = over_ranks(values, self.ranks)
        metrics = self.objective.metrics(values, denominators)
        progress.step += 1
        if math.isfinite(values["loss"]) and math.isfinite(norm):
            self.optimizer.step(rate, grad_norm)
            progress.skipped_in_a_row = 0
        else:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            logger.warning("%s; the step is skipped", self._name_nonfinite(values["loss"]))
        if isinstance(self.objective, Stateful):
            self.objective.after_step(progress.step)
        if self.profiler:
            self.profiler.count(bins[self.ranks.index], self.objective, share=config.share_prompts)
        num_tokens = sum(sample.num_tokens for sample in samples)
        progress.num_tokens += num_tokens
        spared = sum(map(spared_tokens, chain(*bins))) / num_tokens if config.share_prompts else 0.0
        if spared and progress.step == 1:
            logger.info("prompts are shared: %.0f %% of the tokens of the first step were not computed again", 100 * spared)
        seconds = time.perf_counter() - started
        metrics |= {
            "grad_norm": norm,
            "learning_rate": rate,
            "epoch": progress.step / self.order.steps_per_epoch,
            "num_tokens": progress.num_tokens,
            "skipped_steps": progress.skipped_steps,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": num_tokens / seconds,
            "perf/spared_tokens": spared,
        }
        if self.predicted:
            metrics["mem/predicted_gib"] = self.predicted / 2**30
        self.metrics = metrics

    def _run_step(
        self, samples: Sequence[Sample], *, backward: bool = True, before_last: Callable[[Tensor], None] | None = None
    ) -> tuple[list[list[list[Sample]]], dict[str, Tensor], dict[str, float]]:
        """`run_step` on micro-batches that fit: where a device runs out of memory, all of it is repeated with smaller ones.

        Gradients and random numbers are put back first, and a step does not depend on how it is cut, so the result is the same.
        Returns the micro-batches of every rank, and the sums over those of this one.
        """
        share, progress, ranks = self.config.share_prompts, self.progress, self.ranks
        while True:
            limit = self._limit(samples)
            bins = deal(samples, limit, ranks.size, share=share)
            own, found = bins[ranks.index], None
            idle = self.weights.idle(bins, ranks.index)
            before = checkpoint.rng_state()
            options: dict[str, Any] = {
                "device": self.device, "backward": backward, "share": share, "idle": idle, "whole": self.weights.whole,
                "before_last": before_last, "max_tokens": limit,
            }  # fmt: skip
            try:
                found = run_step(self.objective, own, samples=samples if ranks.size > 1 else None, **options)
            except torch.OutOfMemoryError:
                if self.optimizer.begun:
                    raise DeviceMemoryError(
                        f"step {progress.step + 1}: out of memory on {self.device} after update_in_backward had changed weights, so that "
                        f"the step cannot be repeated; start again with a smaller --max_tokens than {limit}, or without it"
                    ) from None
                longest = max((packed_tokens(sample, share=share), sample.index) for sample in samples)
                if sum(map(len, bins)) == len(samples) or limit <= longest[0]:
                    raise DeviceMemoryError(
                        f"step {progress.step + 1}: out of memory on {self.device} with micro-batches of one sample (the longest is row "
                        f"{longest[1]}, {longest[0]} tokens). Set --model.gradient_checkpointing true, --lora.r 16, a smaller "
                        "--data.max_length or --logits_budget; fastalign plan says what each of them saves"
                    ) from None
                if self.weights.in_step:  # the others wait for this one's layers, and cannot begin again
                    raise DeviceMemoryError(
                        f"step {progress.step + 1}: out of memory on {self.device} with micro-batches of {limit} tokens; set --max_tokens "
                        f"{max(longest[0], limit // 2)}, which gives the same result, and continue with --resume"
                    ) from None
            if not ranks.any(found is None):
                assert found is not None
                return bins, *found
            longest = max((packed_tokens(sample, share=share), sample.index) for sample in samples)
            progress.max_tokens = max(longest[0], limit // 2)  # here, where no traceback holds the step's tensors any more
            checkpoint.restore_rng(before)
            if backward:
                self.optimizer.zero_grad()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning(
                "out of memory with micro-batches of %d tokens: going on with --max_tokens %d, which gives the same result",
                limit, progress.max_tokens,
            )  # fmt: skip

    def _limit(self, samples: Sequence[Sample]) -> int:
        """Tokens of a micro-batch of these samples: as many as were found to fit, or as the longest of them has."""
        found = self.progress.max_tokens or self.config.token_limit
        return max([found, *(packed_tokens(sample, share=self.config.share_prompts) for sample in samples)])

    def _predict(self) -> None:
        """What this process will need, by its first steps; nothing where they or its share are unknown, or the model needs storage."""
        if isinstance(self.objective, Online) or unpredicted(self.config, self.ranks.size, self.device):
            return
        steps = range(self.progress.step, min(self.progress.step + 16, self.order.total_steps))
        limit = max((self._limit(self._samples(step)) for step in steps), default=self._limit([]))
        ranks, share = self.ranks, self.config.share_prompts
        options: dict[str, Any] = {"max_tokens": limit, "device": self.device}
        if ranks.size > 1:
            predict = partial(footprint_of_rank, processes=ranks.size)
            options |= {"dealt": lambda samples: deal(samples, limit, ranks.size, share=share)[ranks.index], "predict": predict}
        try:
            self.footprint = found = footprint_of_steps(self.whole, self.config, map(self._samples, steps), **options)
        except ModelError as error:
            logger.debug("memory is not predicted: %s", error)
            return
        there = sum(tensor.numel() * tensor.element_size() for tensor in (*self.whole.parameters(), *self.whole.buffers()))
        self.predicted = found.peak if self.device.type == "cuda" else self.rss_before + found.peak - there
        if found.peak >= TOLD_FROM:
            logger.info("memory: %.2f GiB predicted at the peak (%s)", self.predicted / 2**30, found)

    def _compare_memory(self) -> None:
        """How good the prediction was."""
        peak = memory()["mem/peak_cuda_gib" if self.device.type == "cuda" else "mem/peak_rss_gib"]
        if self.predicted and peak * 2**30 >= TOLD_FROM:
            predicted = self.predicted / 2**30
            logger.info("memory: %.2f GiB at the peak, %.2f GiB predicted (%+.1f %%)", peak, predicted, 100 * (predicted / peak - 1))

    def _name_nonfinite(self, loss: float) -> str:
        names = self.optimizer.nonfinite_gradients()
        gradient = f"not finite in {len(names)} weights, first {names[0]}" if names else "finite in every weight, but its norm is not"
        return f"step {self.progress.step}: loss {loss}, gradient {gradient}"

    def _check_numerics(self) -> None:
        """Raise NumericsError when too many steps in a row were skipped."""
        progress, limit = self.progress, self.config.max_nonfinite
        if progress.skipped_in_a_row < limit:
            return
        rows = ", ".join(str(sample.index) for sample in self._samples(progress.step - 1)[:8])
        saved = checkpoint.list_checkpoints(self.folder.checkpoints)
        remedy = f"; the weights before are in {saved[0]}" if saved else ""
        raise NumericsError(
            f"step {progress.step}: loss or gradient not finite in {limit} steps in a row (max_nonfinite). Look at the data (this step: "
            f"rows {rows}), lower --learning_rate, or use --model.dtype float32{remedy}"
        )

    def _evaluate(self) -> None:
        """Metrics of the whole held-out split, as if it were one step."""
        if isinstance(self.objective, Online):
            with torch.no_grad(), self.weights.whole():
                self.eval_metrics = {f"eval_{name}": value for name, value in self.objective.evaluate(self.data.eval_samples).items()}
            return
        self.model.eval()
        _, sums, denominators = self._run_step(self.data.eval_samples, backward=False)
        self.model.train()
        metrics = self.objective.metrics(over_ranks(to_floats(sums), self.ranks), denominators)
        self.eval_metrics = {f"eval_{name}": value for name, value in metrics.items()}

    def _samples(self, step: int) -> list[Sample]:
        return [self.data.samples[i] for i in self.order.samples_of(step)]

    def _begin(self) -> None:
        """The first write of the run. Then the objective, for the initial weights, and after it what the newest checkpoint holds."""
        config, folder, ranks = self.config, self.folder, self.ranks
        found = None
        with ranks.together():
            if config.resume and ranks.is_first:
                found = checkpoint.newest_good(folder.checkpoints)
        found = ranks.gather(found)[0]
        with ranks.together():
            if found:
                checkpoint.check_identity(found.path, found.state, self.identity)
            elif config.resume:
                logger.warning("%s: no checkpoint to resume from; starting at the first step", folder.path)
            if ranks.is_first:
                folder.begin(fresh=config.overwrite)
                dump(replace(config, resume=False, overwrite=False), folder.path / "config.yaml")
                write_counts(folder.path, self.data)
        with ranks.together(), writing(folder.path), self.host.turn():
            self.objective = config.objective(self.model, self.data, folder.path)
        if not self.divided_first:
            self.weights = distributed.of(self.model, config, ranks, self.device)
        self.weights.divide_copies(self.objective)
        self.optimizer = Optimizer(
            self.model, config, head_weight=self.head_weight, embedding=self.embedding, division=self.weights.division
        )
        if ranks.index:
            torch.manual_seed(config.seed + (ranks.index << 32))  # dropout differs; all else has been drawn, alike on all ranks
        if found:
            with self.host.turn():
                self._restore(found)

    def _restore(self, found: Found) -> None:
        for path, fault in found.damaged.items():
            logger.warning("damaged checkpoint: %s; continuing from %s", fault, found.path.name)
            if self.ranks.is_first:
                checkpoint.set_aside(path)
        division, ranks = self.weights.division, self.ranks
        checkpoint.restore_weights(self.optimizer.named, checkpoint.load_tensors(found.path, "weights"), found.path, division.copy)
        self.optimizer.load_state(checkpoint.load_tensors(found.path, "optimizer", division.rows))
        if ranks.is_first or checkpoint.processes_of(found.path) == ranks.size:
            checkpoint.restore_rng(checkpoint.load_rng(found.path, ranks.index))
        else:
            torch.manual_seed(self.config.seed + (ranks.index << 32) + found.state["progress"]["step"])
        if isinstance(self.objective, Stateful) and "objective.safetensors" in found.state["files"]:
            self.objective.load_state(checkpoint.load_tensors(found.path, "objective"))
        self.progress = Progress(**found.state["progress"])
        self.saved_step = self.progress.step
        logger.info("%s: continuing after step %d", self.folder.path, self.progress.step)

    def _save(self, logs: MetricsWriter) -> None:
        logs.sync()  # a checkpoint counts on the rows before it
        with self.host.turn():
            self._checkpoint()
        self.saved_step = self.progress.step

    def _checkpoint(self) -> None:
        checkpoint.save(
            self.folder.checkpoints,
            self.progress,
            self.identity,
            {name: self.weights.division.kept(p) for name, p in self.optimizer.named.items()},
            self.optimizer.state(),
            self.objective.state() if isinstance(self.objective, Stateful) else None,
            keep=self.config.keep_checkpoints,
            ranks=self.ranks,
        )

    def _finish(self) -> None:
        """Export the weights, and write the report and the model card."""
        folder = self.folder
        self.weights.make_whole()
        with self.ranks.together():
            if self.ranks.is_first:
                self._write_final(folder)

    def _write_final(self, folder: RunFolder) -> None:
        temporary = folder.path / f"{TEMPORARY}final"
        with writing(folder.final):
            save_final(self.model, self.tokenizer, temporary)
            save_critic(self.model, folder.path)
            publish(temporary, folder.final)
        write_report(folder.path)
        write_card(folder.path, self.config)


def _check_alike(identity: Identity, ranks: Ranks) -> None:
    """Raise DataError where the ranks have read different models or data."""
    first, *others = ranks.gather(identity)
    for index, other in enumerate(others, 1):
        for what in ("data", "model"):
            if getattr(other, what) != getattr(first, what):
                raise DataError(
                    f"rank {index} has read another {what} than rank 0 (fingerprint {getattr(other, what)}, there "
                    f"{getattr(first, what)}); give all hosts the same files"
                )
