"""report.html: what it says, that data cannot break out of it, and that its curves show the run's numbers."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastalign.errors import CheckpointError, ConfigError
from fastalign.train.curves import CURVES, draw, plot, running_mean
from fastalign.train.report import final_metrics, write_counts, write_report

NASTY = '<script>alert("x")</script> & \x07 {brace}'


class Page(HTMLParser):
    """Collects text, tags and images, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        if tag == "img":
            kind, data = (values["src"] or "").split(",", 1)
            assert kind == "data:image/png;base64"
            assert values["alt"]
            self.images.append(base64.b64decode(data, validate=True))
        self.links += [value for name in ("href", "src") if (value := values.get(name)) and not value.startswith("data:")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = []
    for step in range(1, 41):
        rows.append(
            {"step": step, "loss": 1 / step, "rewards/accuracies": 0.5 + step / 100, "num_tokens": 100 * step, "learning_rate": 1e-6}
        )
        rows[-1] |= {
            "rewards/chosen": -step,
            "rewards/rejected": -2 * step,
            "perf/tokens_per_second": 1000.0 + step,
            "mem/peak_rss_gib": 1.5,
        }
        if step % 20 == 0:
            rows.append({"step": step, "eval_loss": 2 / step, "eval_rewards/accuracies": 0.75 + step / 1000})
    rows[9]["loss"] = "NaN"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(f"model:\n  path: {json.dumps(NASTY)}\ndata:\n  path: pairs.jsonl\nbeta: 0.1\nloggers: []\n")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": NASTY, "before": "b\nc", "after": ""}) + "\n")
    return tmp_path


def test_the_page_is_whole_self_contained_and_escaped(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.links == []  # opens without a network and without the folder around it
    assert text.count("&lt;script&gt;alert") == 3  # heading, options, samples
    assert "\x07" not in text
    drawn = sorted(file.stem for file in (run / "report").iterdir())
    assert drawn == ["accuracy", "learning_rate", "loss", "memory", "rewards", "throughput"]
    assert sorted(page.images) == sorted(file.read_bytes() for file in (run / "report").iterdir())
    assert all(image.startswith(b"\x89PNG") for image in page.images)


def test_the_page_tells_the_figures_of_the_run(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in page.cells if row}
    assert rows["loss"] == ["1", f"{(1 / 37 + 1 / 38 + 1 / 39 + 1 / 40) / 4:.4g}", "0.1", "0.05"]
    assert rows["rewards/accuracies"] == ["0.51", "0.885", "0.77", "0.79"]
    assert rows["num_tokens"][:2] == ["100", "4000"]  # a total: its last value
    assert rows["beta"] == ["0.1"]
    text = (run / "report.html").read_text()
    for value, label in (("79.0%", "held-out accuracy"), ("1,021", "tokens / s (median)"), ("1", "steps with a non-finite loss")):
        assert f"<b>{value}</b><span>{label}</span>" in text
    assert "40 optimizer steps" in text


def test_answers_of_an_online_run(run: Path) -> None:
    """The first four and the last sixteen, whatever they say; None where a function abstained."""
    answer = {"row": 0, "prompt": NASTY, "completion": f"{NASTY} NaN", "tokens": 7, "finished": False, "advantage": -0.5}
    rows = [answer | {"step": step, "rewards": {"good": float(step), NASTY: None}} for step in range(1, 31)]
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "pro')
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "\x07" not in text
    head = next(k for k, row in enumerate(page.cells) if row[:1] == ["step"])
    assert page.cells[head][:4] == ["step", "prompt", "answer", "good"]
    shown = page.cells[head + 1 : head + 21]
    assert [row[0] for row in shown] == [str(step) for step in (*range(1, 5), *range(15, 31))]
    assert shown[0][3:] == ["1", "–", "-0.5", "7 (cut off)"]
    assert "and 10 between them in completions.jsonl" in text


def test_data_counts(run: Path) -> None:
    report = SimpleNamespace(rows=10, truncated={3}, dropped={"empty <prompt>": 2})
    write_counts(run, SimpleNamespace(samples=[0] * 7, eval_samples=[0], report=report))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in page.cells if row}
    assert (rows["train"], rows["held out"], rows["truncated"]) == (["7"], ["1"], ["1"])
    assert rows["dropped: empty <prompt>"] == ["2"]


def test_a_run_without_steps_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step has been logged yet" in write_report(tmp_path).read_text()


def test_a_run_in_progress_with_a_torn_line(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    assert "40 optimizer steps" in write_report(run).read_text()


def test_only_runs_have_reports(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not the folder of a run \(it has no metrics\.jsonl\)"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="give the --output of a training run"):
        write_report(tmp_path / "nowhere")


def test_many_samples_are_cut_with_a_word(run: Path) -> None:
    (run / "samples.jsonl").write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(23)))
    text = write_report(run).read_text()
    assert ("number 19" in text, "number 20" in text) == (True, False)
    assert "and 3 more in samples.jsonl" in text


def test_damaged_samples_are_named(run: Path) -> None:
    (run / "samples.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(CheckpointError, match=r"samples\.jsonl:2: not a JSON object"):
        write_report(run)


def test_curves_show_the_numbers() -> None:
    """The figure's own lines carry the metrics, the running mean and the held-out points, on labelled axes."""
    rows = [{"step": s, "rewards/accuracies": s / 100} for s in range(1, 101)]
    figure = plot(next(c for c in CURVES if c.name == "accuracy"), rows, [{"step": 50, "eval_rewards/accuracies": 0.9}])
    assert figure is not None
    (axes,) = figure.axes
    raw, mean, held_out, chance = axes.get_lines()
    assert list(raw.get_xdata()) == list(range(1, 101))
    assert list(raw.get_ydata()) == [s / 100 for s in range(1, 101)]
    assert list(mean.get_ydata()) == pytest.approx(running_mean([s / 100 for s in range(1, 101)], 4))
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([50], [0.9])
    assert list(chance.get_ydata()) == [0.5, 0.5]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "reward accuracy (share of pairs)")


def test_curves_without_data_are_left_out() -> None:
    assert draw(CURVES[0], [{"step": 1, "loss": math.nan}], []) is None


def test_final_metrics_end_is_the_mean_of_the_last_tenth() -> None:
    rows = [{"step": s, "loss": float(s), "epoch": s / 10} for s in range(1, 21)]
    assert final_metrics(rows, [{"step": 20, "eval_loss": 3.0}]) == [("loss", 1.0, 19.5, 3.0, 3.0), ("epoch", 0.1, 2.0, None, None)]
