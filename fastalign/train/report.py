"""`report.html` of a run: one self-contained page with its curves, final metrics, samples and options, and the curves as PNG files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fastalign.errors import CheckpointError, ConfigError
from fastalign.train.config import write_text
from fastalign.train.curves import CURVES, Curve, Row, draw, finite
from fastalign.train.folder import writing
from fastalign.train.metrics import COMPLETIONS, read_metrics
from fastalign.train.page import TEMPLATE, escape, figure, section, table, text_of

SHOWN_SAMPLES = 20
SHOWN_FIRST = 4  # of them, answers from the run's beginning


def write_counts(run_dir: Path | str, data: Any) -> None:
    """Write `data.json`: how many samples the run trains on and holds out, and the rows that its source dropped, by reason."""
    counts: dict[str, Any] = {"train": len(data.samples), "held_out": len(data.eval_samples)}
    if (report := getattr(data, "report", None)) is not None:
        counts |= {"rows": report.rows, "truncated": len(report.truncated), "dropped": dict(report.dropped)}
    write_text(Path(run_dir) / "data.json", json.dumps(counts, ensure_ascii=False, indent=1) + "\n")


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` and `report/*.png` of the run in `run_dir` from its metrics and config; returns the page's path.

    Optional: `data.json` (counts of pairs used and dropped) and `samples.jsonl` (objects with prompt, before, after, and if wanted
    chosen, rejected). Everything that came from data or options is escaped. Raises ConfigError when the folder is no run.
    """
    run = Path(run_dir)
    if not (run / "metrics.jsonl").is_file():
        raise ConfigError(f"{run}: not the folder of a run (it has no metrics.jsonl); give the --output of a training run")
    rows = read_metrics(run / "metrics.jsonl")
    train = [row for row in rows if not is_eval(row)]
    evals = [row for row in rows if is_eval(row)]
    figures = {curve: image for curve in CURVES if (image := draw(curve, train, evals)) is not None}
    with writing(run / "report"):
        (run / "report").mkdir(exist_ok=True)
        for curve, image in figures.items():
            (run / "report" / f"{curve.name}.png").write_bytes(image)
    page = run / "report.html"
    write_text(page, _page(run, train, evals, figures))
    return page


def final_metrics(train: Sequence[Row], evals: Sequence[Row]) -> list[tuple[str, float | None, float | None, float | None, float | None]]:
    """(metric, first, end, first held-out, last held-out) for every metric of the run.

    The end is the mean of the last tenth of the steps; of totals and peaks it is the last value.
    """
    names = list(dict.fromkeys(name for row in train for name in row if name != "step"))
    names += [name for row in evals for name in (key.removeprefix("eval_") for key in row) if name != "step" and name not in names]
    tail = train[-max(1, len(train) // 10) :]
    table = []
    for name in dict.fromkeys(names):
        first = next((row[name] for row in train if finite(row.get(name))), None)
        last = [row[name] for row in tail if finite(row.get(name))]
        held_out = [row[f"eval_{name}"] for row in evals if finite(row.get(f"eval_{name}"))]
        cumulative = name in ("num_tokens", "epoch", "skipped_steps") or name.startswith("mem/")
        mean = last[-1] if last and cumulative else math.fsum(last) / len(last) if last else None
        table.append((name, first, mean, held_out[0] if held_out else None, held_out[-1] if held_out else None))
    return table


def _page(run: Path, train: Sequence[Row], evals: Sequence[Row], figures: dict[Curve, bytes]) -> str:
    name = run.resolve().name
    config = _read_config(run)
    drawn = "".join(figure(curve.title, image, curve.note, f"{curve.title} over optimizer steps") for curve, image in figures.items())
    parts = [
        _tiles(train, evals),
        section("Curves", drawn, "figures") if drawn else "<p>No step has been logged yet.</p>",
        _samples(run / "samples.jsonl"),
        _answers(run / COMPLETIONS),
        section("Metrics", _metrics_table(train, evals)) if train or evals else "",
        section("Data", table(["", "rows"], _counts(run / "data.json"), numbers=True)) if (run / "data.json").is_file() else "",
        section("Options", table(["option", "value"], [(key, text_of(value)) for key, value in _flat(config)])) if config else "",
    ]
    sources = [str((config.get(part) or {}).get("path") or part) for part in ("model", "data")] if config else []
    intro = " · ".join(escape(text) for text in [*sources, _steps(train)])
    footer = "Written by fastalign from metrics.jsonl and config.yaml; the figures are in report/."
    return TEMPLATE.format(title=escape(name), intro=intro, body="\n".join(part for part in parts if part), footer=footer)


def _tiles(train: Sequence[Row], evals: Sequence[Row]) -> str:
    finals = {name: (mean, held_out) for name, _, mean, _, held_out in final_metrics(train, evals)}
    rates = sorted(row["perf/tokens_per_second"] for row in train if finite(row.get("perf/tokens_per_second")))
    peak = max((row[key] for row in train for key in ("mem/peak_cuda_gib", "mem/peak_rss_gib") if finite(row.get(key))), default=None)
    skipped = sum(1 for row in train if isinstance(row.get("loss"), float) and not math.isfinite(row["loss"]))
    nothing = (None, None)
    accuracy, held_out = finals.get("rewards/accuracies") or finals.get("accuracy") or nothing
    margin, nll = finals.get("rewards/margins") or finals.get("margin") or nothing, finals.get("nll", nothing)
    reward = finals.get("reward", nothing)
    tiles = [
        ("held-out reward", reward[1], "{:.3f}"),
        ("training reward", reward[0], "{:.3f}"),
        ("held-out accuracy", held_out, "{:.1%}"),
        ("training accuracy", accuracy, "{:.1%}"),
        ("held-out perplexity", _perplexity(nll[1]), "{:.4g}"),
        ("training perplexity", _perplexity(nll[0]), "{:.4g}"),
        ("held-out loss", finals.get("loss", nothing)[1], "{:.4f}"),
        ("training loss", finals.get("loss", nothing)[0], "{:.4f}"),
        ("reward margin", margin[0], "{:.3f}"),
        ("tokens / s (median)", rates[len(rates) // 2] if rates else None, "{:,.0f}"),
        ("peak memory", peak, "{:.2f} GiB"),
        ("steps with a non-finite loss", skipped or None, "{}"),
    ]
    shown = [(label, pattern.format(value)) for label, value, pattern in tiles if value is not None]
    return '<div class="tiles">' + "".join(f"<div><b>{value}</b><span>{label}</span></div>" for label, value in shown) + "</div>"


def _perplexity(nll: float | None) -> float | None:
    return None if nll is None else math.exp(min(nll, 700.0))


def _metrics_table(train: Sequence[Row], evals: Sequence[Row]) -> str:
    heads = ["metric", "first step", "end*"]
    finals = final_metrics(train, evals)
    if evals:
        heads += ["held out, first", "held out, last"]
    rows = [(row[0], *(text_of(value) for value in row[1 : len(heads)])) for row in finals]
    return table(heads, rows, numbers=True) + "<p class=note>* mean of the last tenth of the steps; of totals and peaks the last value</p>"


def _samples(path: Path) -> str:
    if not path.is_file():
        return ""
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                samples.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{path}:{number}: not a JSON object ({error}); delete this line or the file") from error
    known = ["prompt", "chosen", "rejected", "before", "after"]
    columns = [name for name in known if any(name in sample for sample in samples)]
    columns += sorted({name for sample in samples for name in sample} - set(known))
    if not samples:
        return ""
    rows = [[text_of(sample.get(name, "")) for name in columns] for sample in samples[:SHOWN_SAMPLES]]
    more = len(samples) - len(rows)
    note = f"<p class=note>and {more:,} more in samples.jsonl</p>" if more else ""
    return section("Samples", table(columns, rows, wide=True) + note)


def _answers(path: Path) -> str:
    """Answers of an online run with their rewards: the first few and the last ones."""
    rows = read_metrics(path) if path.is_file() else []
    if not rows:
        return ""
    chosen = rows if len(rows) <= SHOWN_SAMPLES else rows[:SHOWN_FIRST] + rows[SHOWN_FIRST - SHOWN_SAMPLES :]
    rewards = list(dict.fromkeys(name for row in chosen for name in row["rewards"]))
    extra = [name for name in ("advantage", "by") if name in chosen[0]]
    cells = [
        [text_of(row[name]) for name in ("step", "prompt", "completion")]
        + [text_of(row["rewards"].get(name)) for name in rewards]
        + [text_of(row[name]) for name in extra]
        + [f"{row['tokens']:,}{'' if row['finished'] else ' (cut off)'}"]
        for row in chosen
    ]
    more = len(rows) - len(chosen)
    note = f"<p class=note>and {more:,} between them in {COMPLETIONS}</p>" if more else ""
    return section("Answers", table(["step", "prompt", "answer", *rewards, *extra, "tokens"], cells, wide=True) + note)


def _counts(path: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); delete it to leave the counts out of the report") from error
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        parts = (
            {f"{key}: {reason}": count for reason, count in value.items()} if isinstance(value, dict) else {key.replace("_", " "): value}
        )
        rows += [(name, text_of(count)) for name, count in parts.items()]
    return rows


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error}); restore it to write the report") from error
    return content if isinstance(content, dict) else {}


def _flat(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, content)]


def _steps(train: Sequence[Row]) -> str:
    last = train[-1]["step"] if train else 0
    return f"{last} optimizer step{'' if last == 1 else 's'}"


def is_eval(row: Row) -> bool:
    """Whether a row of metrics.jsonl is that of an evaluation."""
    return all(name == "step" or name.startswith("eval_") for name in row)
