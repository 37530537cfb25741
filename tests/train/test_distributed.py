"""Several processes make the steps that one makes: every algorithm, both ways to divide, checkpoints that go on elsewhere, and failures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from gloo import end
from group import CASES, DEEP, config, inputs, place, run
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor

import fastalign.train.loop
from fastalign import train
from fastalign.cli import ALGORITHMS
from fastalign.errors import ConfigError, ModelError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.divided_head import divide_head
from fastalign.models.load import load_model
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.ranks import ParallelConfig, Ranks
from fastalign.train.checkpoint import list_checkpoints, load_tensors
from fastalign.train.distributed import _divide_layers, is_divided_first
from fastalign.train.metrics import read_metrics
from fastalign.train.step import deal, micro_batches
from fastalign.types import Sample

HERE = Path(__file__).parent
SAME = [
    case for case in CASES if case not in ("dpo, half", "sft, rounded")
]  # whose rounding in bfloat16 depends on how a step is cut, for one process, too
WHOLE = ("reward", "distill", "gkd", "sft, checkpointing")  # which need more of a head than log-probs; the last one is like sft
VOCAB = [case for case in SAME if case not in WHOLE]
TWO = [
    *SAME,
    *(f"{case} / vocab" for case in ("sft", "dpo, adapter", "kto", "ppo")),
    "grpo / optimizer vocab",
    "dpo / optimizer",
    "sft, fewer samples than ranks / optimizer",
    "grpo / optimizer",
    "dpo, adapter / full 2",
]
FOUR = [*SAME, *(f"{case} / full 2" for case in ("dpo", "dpo, adapter", "sft, fewer samples than ranks", "grpo")), "dpo / optimizer 2"]
FOUR += [*(f"{case} / vocab" for case in VOCAB), "dpo / full 2 vocab", "dpo, adapter / optimizer 2 vocab"]
# The checkpoint at step 3 of every run here is continued where it was written, and elsewhere.
RESUMED = {
    "a": "dpo, half / full",
    "b": "dpo, adapter / optimizer",
    "c": "ppo, adapter / full",
    "d": "dpo, half / vocab",
    "e": "sft, rounded / vocab",
}
TOLERANCE = 2e-5  # of a weight, whose update at the rate of these runs is 1e-3 a step
DIFFERENCES = ("rewards/", "kl", "objective/kl", "objective/non_score")  # of log-probs of some tens of nats in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("group")
    inputs(path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], Path]:
    """Runs a case in this process, once, and returns its folder."""

    def run_of(case: str) -> Path:
        name, _, division = case.partition(" / ")
        case = f"{name} / vocab" if "vocab" in division else name
        output = place(folder, case, 1)
        if not output.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastalign.train.loop.write_report", lambda *_, **__: None)
                patch.setattr("fastalign.train.loop.write_card", lambda *_, **__: None)
                train(config(folder, case, output))
        return output

    return run_of


def torchrun(processes: int, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *words]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "200000"}  # what is freed is given back, so that memory can be measured
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as started:
        try:
            out, said = started.communicate(timeout=1100)
        except BaseException:  # torchrun that is killed would leave its workers
            for process in psutil.Process(started.pid).children(recursive=True):
                process.kill()
            started.kill()
            raise
    return subprocess.CompletedProcess(command, started.returncode, out, said)


def group(folder: Path, processes: int, cases: Sequence[str]) -> None:
    done = torchrun(processes, str(HERE / "group.py"), str(folder), *cases)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """What two processes make, in one start of them: all cases, and runs that stop and go on, those of one process among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastalign.train.loop.write_report", lambda *_, **__: None)
        patch.setattr("fastalign.train.loop.write_card", lambda *_, **__: None)
        run(folder, [task for name in ("a", "b") for task in (f"stop: 1{name}: {RESUMED[name]}", f"copy: 1{name}: 1{name}-2")], 1)
    tasks = [f"resume: 1{name}-2: {RESUMED[name]}" for name in ("a", "b")]
    for name, case in RESUMED.items():
        tasks += [f"whole: 2{name}-whole: {case}", f"stop: 2{name}: {case}", f"copy: 2{name}: 2{name}-1", f"copy: 2{name}: 2{name}-4"]
        tasks += [f"copy: 2{name}: 2{name}-stopped", f"resume: 2{name}: {case}"]
    tasks += [
        "copy: 2d-stopped: 2d-head",
        "resume: 2d-head: dpo, half / full",
        "copy: 2a-stopped: 2a-head",
        "resume: 2a-head: dpo, half / vocab",
    ]
    group(folder, 2, [*TWO, "measure: deep: sft, fewer samples than ranks", *tasks])
    return folder


@pytest.fixture(scope="module")
def four(folder: Path) -> Path:
    group(folder, 4, FOUR)
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(("perf/", "mem/"))}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in (*(run / "final").glob("*.safetensors"), *run.glob("critic.safetensors")):
        found |= load_file(file)
    return found


def check_same_steps(one: Path, several: Path, start: dict[str, Tensor] | None = None) -> None:
    """Metrics and weights equal to rounding."""
    expected, found = rows(one), rows(several)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(expected, found):
        for name, value in row.items():
            difference = any(name.removeprefix("eval_").startswith(start) for start in DIFFERENCES)
            assert other[name] == pytest.approx(value, rel=1e-4 if difference else 2e-5, abs=5e-5 if difference else 1e-5), name
    mine, theirs = weights(one), weights(several)
    assert mine.keys() == theirs.keys() and mine
    for name, weight in mine.items():
        assert weight.dtype == theirs[name].dtype and (weight - theirs[name]).abs().max() <= TOLERANCE, name


def test_the_cases_are_all_algorithms(folder: Path) -> None:
    assert {config(folder, case, folder / "run").name for case in CASES} == set(ALGORITHMS)


@pytest.mark.parametrize("case", TWO)
def test_two_processes_make_the_steps_of_one(two: Path, alone: Callable[[str], Path], case: str) -> None:
    check_same_steps(alone(case), place(two, case, 2))


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_group_goes_on_bit_for_bit(two: Path, name: str) -> None:
    whole, resumed = two / "runs" / f"2{name}-whole", two / "runs" / f"2{name}"
    assert rows(resumed) == rows(whole)
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def loaded(run_folder: Path, processes: int) -> dict[str, Tensor]:
    """What the ranks had after loading, put together."""
    parts = [load_file(run_folder / f"loaded-{index}.safetensors") for index in range(processes)]
    return {name: torch.cat([part[name] for part in parts]) if value.ndim else value for name, value in parts[0].items()}


def saved(run_folder: Path, step: int = 3) -> dict[str, Tensor]:
    folder = run_folder / "checkpoints" / f"step-{step:06d}"
    return load_tensors(folder, "weights") | load_tensors(folder, "optimizer")


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("case", ["sft", "sft / vocab", "dpo, half / full"])
def test_the_processes_start_with_the_weights_of_the_files_bit_for_bit(two: Path, case: str) -> None:
    if case == "dpo, half / full":
        found, files = loaded(two / "runs" / "2a-whole", 2), load_file(two / "half" / "model.safetensors")
    else:
        found = loaded(place(two, case, 2), 2)
        files = load_file(two / ("untied" if "vocab" in case else "model") / "model.safetensors")
    names = [name for name in found if not name.endswith("/master")]
    assert len(names) == len(files)
    check_equal({name: found[name] for name in names}, files)


def test_before_its_first_step_a_process_holds_its_share_of_the_layers_and_a_few_more(two: Path) -> None:
    size = (two / "deep" / "model.safetensors").stat().st_size
    bound = size / 2 + 4 * size / DEEP + (12 << 20)  # a layer read, a layer gathered, and the one before; what a run has besides
    assert bound < 0.85 * size  # a whole one of its own would be seen
    for index in range(2):
        grown = int((two / "runs" / "deep" / f"grown-{index}").read_text())
        assert 0.45 * size < grown < bound, (grown, size)


def test_a_model_that_is_copied_is_whole_at_first(folder: Path, tmp_path: Path) -> None:
    class Pair(Ranks):
        size = 2

    def first(case: str, **options: Any) -> bool:
        return is_divided_first(config(folder, case, tmp_path / "run", **options), Pair())

    assert first("sft") and first("dpo") and first("dpo, adapter") and first("rloo") and first("grpo", beta=0.0)
    assert not first("dpo", reference="copy") and not first("dpo, ranks and a reference that follows") and not first("grpo")
    assert not first("sft", parallel=ParallelConfig(shard="optimizer"))
    assert not is_divided_first(config(folder, "sft", tmp_path / "run"), Ranks())


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_group_continues_the_checkpoint_of_one_process(two: Path, name: str) -> None:
    stopped, resumed = two / "runs" / f"1{name}", two / "runs" / f"1{name}-2"
    check_equal(loaded(resumed, 2), saved(stopped))
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["a", "d"])
def test_a_divided_head_continues_as_a_whole_one_and_a_whole_one_divided(two: Path, name: str) -> None:
    check_equal(loaded(two / "runs" / f"2{name}-head", 2), saved(two / "runs" / f"2{name}-stopped"))


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_continues_the_checkpoint_of_a_group(two: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder = two / "runs" / f"2{name}-1"
    checkpoint = run_folder / "checkpoints" / "step-000003"
    assert {file.name for file in checkpoint.iterdir()} >= {f"weights-{i}-of-2.safetensors" for i in (1, 2)} | {"state.json"}
    expected = saved(run_folder)
    raw = [load_file(checkpoint / f"weights-{i}-of-2.safetensors") for i in (1, 2)]
    assert all(torch.equal(torch.cat([part[key] for part in raw]), expected[key]) for key in raw[0])
    seen: dict[str, Tensor] = {}
    step = fastalign.train.loop._Run._step

    def look(this: Any) -> None:
        if not seen:
            found = {**this.optimizer.named, **this.optimizer.state()}
            seen.update({key: value.detach().clone() for key, value in found.items()})
        step(this)

    monkeypatch.setattr("fastalign.train.loop._Run._step", look)
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda *_, **__: None)
    monkeypatch.setattr("fastalign.train.loop.write_card", lambda *_, **__: None)
    run(two, [f"resume: 2{name}-1: {RESUMED[name]}"], 1)
    check_equal(seen, expected)
    if name in "bc":  # others are in bfloat16
        check_same_steps(two / "runs" / f"2{name}-whole", run_folder)


@pytest.mark.slow
def test_four_continue_the_checkpoints_of_two_and_two_and_one_those_of_four(two: Path) -> None:
    group(two, 4, [f"resume: 2{name}-4: {case}" for name, case in RESUMED.items()])
    group(two, 4, [f"stop: 4{name}: {case}" for name, case in RESUMED.items()])
    for name in RESUMED:
        check_equal(loaded(two / "runs" / f"2{name}-4", 4), saved(two / "runs" / f"2{name}-stopped"))
    run(two, [f"copy: 4{name}: 4{name}-{size}" for name in RESUMED for size in (2, 1)], 1)
    for size in (2, 1):
        group(two, size, [f"resume: 4{name}-{size}: {case}" for name, case in RESUMED.items()])
    for name in RESUMED:
        for size in (2, 1):
            check_equal(loaded(two / "runs" / f"4{name}-{size}", size), saved(two / "runs" / f"4{name}"))
        if name in "bc":  # others are in bfloat16
            check_same_steps(two / "runs" / f"2{name}-whole", two / "runs" / f"4{name}-2")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "fail"])
def test_a_process_that_ends_ends_the_run_with_its_reason_and_the_last_checkpoint_goes_on(two: Path, end: str) -> None:
    case, name = RESUMED["b"], f"2b-{end}"
    done = torchrun(2, str(HERE / "group.py"), str(two), f"{end}: {name}: {case}")
    assert done.returncode != 0
    reason = "rank 1 of 2 stopped: ZeroDivisionError: of a test" if end == "fail" else "another process ended without a word (killed"
    assert f"RankError: {reason}" in done.stderr
    assert [path.name for path in list_checkpoints(two / "runs" / name / "checkpoints")] == ["step-000003"]
    group(two, 2, [f"resume: {name}: {case}"])
    assert rows(two / "runs" / name) == rows(two / "runs" / "2b-whole")
    check_equal(weights(two / "runs" / name), weights(two / "runs" / "2b-whole"))


@pytest.mark.slow
def test_workers_whose_torchrun_is_killed_end_with_a_checkpoint(two: Path) -> None:
    name, run_folder = "orphans", two / "runs" / "orphans"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2", str(HERE / "group.py"), str(two)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    started = subprocess.Popen([*command, f"long: {name}: sft"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while not (run_folder / "metrics.jsonl").exists() or not rows(run_folder):
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        workers = psutil.Process(started.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        started.kill()
        started.wait()
    assert end([worker.pid for worker in workers], within=60)
    assert len(list_checkpoints(run_folder / "checkpoints")) == 1  # which only the SIGTERM made


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_processes_make_the_steps_of_one(four: Path, alone: Callable[[str], Path], case: str) -> None:
    check_same_steps(alone(case), place(four, case, 4))


def test_the_comparison_notices_a_lost_share(folder: Path, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """A step of 7 pairs that trains on 6 of them is what a lost share would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastalign.train.loop.write_report", lambda *_, **__: None)
        train(config(folder, "dpo", tmp_path / "lost", batch_size=6))
    with pytest.raises(AssertionError):
        check_same_steps(alone("dpo"), tmp_path / "lost")


def sample(index: int, tokens: int) -> Sample:
    return Sample(index, (1,), ((2,) * (tokens - 1),))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_bins_are_dealt_once_each_within_the_budget_and_evenly(ranks: int) -> None:
    samples = [sample(i, 5 + (37 * i) % 60) for i in range(40)]
    dealt = deal(samples, 128, ranks)
    assert sorted(s.index for own in dealt for members in own for s in members) == list(range(40))
    assert max(sum(s.num_tokens for s in members) for own in dealt for members in own) <= 128
    assert max(map(len, dealt)) == -(-len(micro_batches(samples, 128)) // ranks)
    loads = [sum(s.num_tokens for members in own for s in members) for own in dealt]
    assert max(loads) <= 1.15 * sum(loads) / ranks
    if ranks == 1:
        assert dealt == [micro_batches(samples, 128)]


def test_a_step_with_fewer_samples_than_ranks_leaves_some_without() -> None:
    assert deal([sample(0, 5), sample(1, 9)], 128, 4) == [[[sample(1, 9)]], [[sample(0, 5)]], [], []]


def test_options_of_several_processes_are_not_ignored_by_one(folder: Path, tmp_path: Path) -> None:
    made = config(folder, "dpo", tmp_path / "run")
    made.parallel = ParallelConfig(shard="optimizer")
    with pytest.raises(ConfigError, match="there is one; start with torchrun"):
        train(made)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"parallel\.replicas 3 does not divide the 4 processes"):
        ParallelConfig(replicas=3).check(4)
    with pytest.raises(ConfigError, match=r"parallel\.shard must be full or optimizer"):
        ParallelConfig(shard="some").validate()  # type: ignore[arg-type]


def test_a_head_that_cannot_be_divided_is_refused_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    for case, more, match in (
        ("distill", {}, "distill needs more of a head than log-probs"),
        ("gkd", {}, "gkd needs more of a head than log-probs"),
        ("reward", {}, "reward needs more of a head than log-probs"),
        ("dpo", {"reference": "stream"}, "streamed keeps its head whole; set --reference copy"),
    ):
        made = config(folder, case, tmp_path / "run", parallel=ParallelConfig(head="vocab"), **more)
        with pytest.raises(ConfigError, match="parallel.head vocab.*" + match + ("" if more else "; set --parallel.head whole")):
            made.check_ranks(2)
    with pytest.raises(ConfigError, match=r"each is one process; set fewer --parallel\.replicas"):
        ParallelConfig(head="vocab", replicas=2).check(2)
    with pytest.raises(ConfigError, match=r"parallel\.head must be whole or vocab"):
        ParallelConfig(head="half").validate()  # type: ignore[arg-type]
    for model, match in (
        (tiny_model("llama", tie_word_embeddings=True), "is the embedding, too"),
        (load_model(tiny_model("llama"), lora=LoraConfig(r=2, modules_to_save=["lm_head"])), "modules_to_save makes two"),
    ):
        with pytest.raises(ConfigError, match=match + r".*whole"):
            divide_head(model, None, [])


def test_what_cannot_be_divided_is_refused_with_a_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, made: Any, match: str) -> None:
        with pytest.raises((ConfigError, ModelError), match=match + ".*optimizer"):
            _divide_layers(model, None, made)

    made = DPOConfig(model=ModelConfig(path="model", quantization="nf4"), output="run")
    refuse(tiny_model("llama"), made, "4-bit")
    made.model.quantization = None
    mixed = tiny_model("llama", dtype=torch.bfloat16)
    mixed.model.layers[0].input_layernorm.float()
    refuse(mixed, made, "layers of one dtype")
    separate = tiny_model("llama")
    separate.model.layers[1].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    refuse(separate, made, "experts one by one")

    class Pair(Ranks):
        size = 2

    monkeypatch.setattr("fastalign.ranks._current", Pair())
    server = GRPOConfig(engine="vllm_server", lora=LoraConfig(r=4), output="run")
    with pytest.raises(ConfigError, match=r"vllm_server is given whole weights.*optimizer"):
        server.make_engine(tiny_model("llama"))
