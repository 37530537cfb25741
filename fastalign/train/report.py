"""`report.html` of a run: one self-contained page with its curves, final metrics, samples and options, and the curves as PNG files."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastalign.errors import CheckpointError, ConfigError
from fastalign.train.config import write_text
from fastalign.train.curves import CURVES, Curve, Row, draw, finite
from fastalign.train.folder import writing
from fastalign.train.metrics import read_metrics

SHOWN_SAMPLES = 20


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


# The page


def _page(run: Path, train: Sequence[Row], evals: Sequence[Row], figures: dict[Curve, bytes]) -> str:
    name = run.resolve().name
    config = _read_config(run)
    parts = [
        _tiles(train, evals),
        _section("Curves", "".join(_figure(curve, image) for curve, image in figures.items()), "figures")
        if figures
        else "<p>No step has been logged yet.</p>",
        _samples(run / "samples.jsonl"),
        _section("Metrics", _metrics_table(train, evals)) if train or evals else "",
        _section("Data", _table(["", "rows"], _counts(run / "data.json"), numbers=True)) if (run / "data.json").is_file() else "",
        _section("Options", _table(["option", "value"], [(key, text_of(value)) for key, value in _flat(config)])) if config else "",
    ]
    sources = [str((config.get(section) or {}).get("path") or section) for section in ("model", "data")] if config else []
    intro = " · ".join(_escape(text) for text in [*sources, _steps(train)])
    return _TEMPLATE.format(title=_escape(name), intro=intro, body="\n".join(part for part in parts if part))


def _tiles(train: Sequence[Row], evals: Sequence[Row]) -> str:
    finals = {name: (mean, held_out) for name, _, mean, _, held_out in final_metrics(train, evals)}
    rates = sorted(row["perf/tokens_per_second"] for row in train if finite(row.get("perf/tokens_per_second")))
    peak = max((row[key] for row in train for key in ("mem/peak_cuda_gib", "mem/peak_rss_gib") if finite(row.get(key))), default=None)
    skipped = sum(1 for row in train if isinstance(row.get("loss"), float) and not math.isfinite(row["loss"]))
    nothing = (None, None)
    accuracy, held_out = finals.get("rewards/accuracies") or finals.get("accuracy") or nothing
    margin, nll = finals.get("rewards/margins") or finals.get("margin") or nothing, finals.get("nll", nothing)
    tiles = [
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


def _figure(curve: Curve, image: bytes) -> str:
    data = base64.b64encode(image).decode("ascii")
    alt = f"{curve.title} over optimizer steps"
    return (
        f'<figure><h3>{curve.title}</h3><img src="data:image/png;base64,{data}" alt="{alt}" loading="lazy">'
        f"<figcaption>{curve.note}</figcaption></figure>"
    )


def _metrics_table(train: Sequence[Row], evals: Sequence[Row]) -> str:
    heads = ["metric", "first step", "end*"]
    table = final_metrics(train, evals)
    if evals:
        heads += ["held out, first", "held out, last"]
    rows = [(row[0], *(text_of(value) for value in row[1 : len(heads)])) for row in table]
    return _table(heads, rows, numbers=True) + "<p class=note>* mean of the last tenth of the steps; of totals and peaks the last value</p>"


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
    return _section("Samples", _table(columns, rows, wide=True) + note)


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


def _section(title: str, body: str, css: str = "") -> str:
    return f"<section><h2>{title}</h2><div{f' class={css}' if css else ''}>{body}</div></section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False, wide: bool = False) -> str:
    head = "".join(f"<th>{_escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    css = " ".join(name for name, on in (("numbers", numbers), ("wide", wide)) if on)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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


def text_of(value: Any) -> str:
    """A metric or option as a reader wants it: four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:,.0f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _escape(text: str) -> str:
    # Control characters have no meaning in HTML and some of them are forbidden in it.
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text))


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · fastalign</title>
<style>
:root {{ --ink: #1c2430; --soft: #5c6673; --line: #e1e5ea; --page: #f6f7f9; --card: #ffffff; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e7eaee; --soft: #9aa4b1; --line: #2f3742; --page: #14181d; --card: #1c2229; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }}
h2 {{ margin: 2.4rem 0 .8rem; font-size: 1.15rem; }}
h3 {{ margin: 0 0 .5rem; font-size: 1rem; }}
header p, figcaption, .note {{ color: var(--soft); margin: .25rem 0 0; overflow-wrap: anywhere; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .75rem; margin-top: 1.5rem; }}
.tiles div {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }}
.tiles b {{ display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }}
.tiles span {{ color: var(--soft); font-size: .85rem; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1rem; }}
figure {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; break-inside: avoid; }}
figure img {{ width: 100%; height: auto; display: block; background: #fff; border-radius: 6px; }}
figcaption {{ font-size: .85rem; margin-top: .5rem; }}
.scroll {{ overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ text-align: left; padding: .4rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }}
th {{ color: var(--soft); font-weight: 600; }}
tbody tr:last-child td {{ border-bottom: 0; }}
.numbers td:not(:first-child), .numbers th:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; }}
.wide td {{ white-space: pre-wrap; min-width: 11rem; }}
footer {{ margin-top: 3rem; color: var(--soft); font-size: .85rem; }}
@media print {{
  :root {{ --ink: #1c2430; --soft: #5c6673; --line: #e1e5ea; --page: #ffffff; --card: #ffffff; color-scheme: light; }}
  body {{ max-width: none; padding: 0; background: #fff; }}
  .figures {{ grid-template-columns: 1fr 1fr; }} .scroll {{ overflow: visible; }} }}
</style>
</head>
<body>
<header><h1>{title}</h1><p>{intro}</p></header>
{body}
<footer>Written by fastalign from metrics.jsonl and config.yaml; the figures are in report/.</footer>
</body>
</html>
"""
