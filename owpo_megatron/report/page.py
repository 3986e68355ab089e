"""report/index.html: the figures and the facts of a run in one file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from owpo_megatron.report.samples import STYLE as SAMPLE_STYLE
from owpo_megatron.report.samples import browser
from owpo_megatron.report.table import rows
from owpo_megatron.run.metrics_reader import RunMetrics
from owpo_megatron.samples import ShownSample

_CAPTIONS = {
    "learning": "Left: share of right answers among the rollouts of each step. Right: held-out problems; thin lines "
    "are 95 % intervals.",
    "reweighting": "The number of reweighted samples falls within each stage; a swap of the reference starts the next. "
    "Blue tokens are ahead of the reference in the verifier's direction (w &lt; 1 locks the gain), warm ones behind it "
    "(w &gt; 1 accelerates the correction).",
    "deviation": "delta = sgn(A) (logp &minus; logp of the reference). Right after a swap it is exactly 0. Between the "
    "lines w = exp(&minus;delta); outside it stays at its bound.",
    "health": "Signs of a run that goes wrong: falling entropy, growing gradient norm, a trainer that disagrees with "
    "its engine.",
    "responses": "Long or truncated responses, and the verifier's verdicts.",
    "seconds": "Where the time went.",
}

_FILES = """<section>In the run folder: <code>config.yaml</code>, <code>metrics.jsonl</code>, <code>eval/</code> (each
problem), <code>logs/</code> of ranks and engines. All samples: <code>owpo samples RUN_DIR</code>.</section>"""

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 40px 0 8px; }
p.sub, figcaption { color: #616e7c; } p.sub { margin: 0 0 24px; }
section, figure { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; }
section, figure { padding: 20px 24px; margin: 0 0 20px; }
.scroll { overflow-x: auto; } figure img { width: 100%; min-width: 720px; height: auto; display: block; }
figcaption { font-size: 13.5px; margin-top: 10px; }
table { border-collapse: collapse; } td { padding: 3px 28px 3px 0; vertical-align: top; }
td:first-child { color: #616e7c; white-space: nowrap; }
pre { font-size: 12.5px; line-height: 1.45; overflow-x: auto; margin: 12px 0 0; } summary { cursor: pointer; }
"""


def write_page(run: RunMetrics, figures: Sequence[Path], file: Path, samples: Sequence[ShownSample] = ()) -> Path:
    """Write the page; the figures are embedded, so that the file can be sent alone."""
    facts = "".join(f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in rows(run).items())
    pictures = "".join(_figure(figure) for figure in figures)
    config = escape(yaml.safe_dump(run.config, sort_keys=False)) if run.config else ""
    details = (
        f"<section><details><summary>Configuration</summary><pre>{config}</pre></details></section>" if config else ""
    )
    file.write_text(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)}: run report</title>
<style>{_STYLE}{SAMPLE_STYLE}</style>
<main>
<h1>{escape(run.name)}</h1>
<p class="sub">One-Way Policy Optimization: run report</p>
<section><table>{facts}</table></section>
{pictures}
{browser(samples)}
{details}
{_FILES}
</main>
</html>
"""
    )
    return file


def _figure(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    caption = _CAPTIONS.get(file.stem, "")
    source = f"data:image/png;base64,{data}"
    image = f'<div class="scroll"><img alt="{escape(file.stem)}" src="{source}"></div>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"
