"""The sample browser of the report's page: a step to choose, filters, tokens coloured by their weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from owpo_megatron.samples import ShownSample, ShownToken
from owpo_megatron.samples.shade import LEGENDS, shade

MAX_TOKENS = 1500  # shown of a response: a page stays a page
STEPS, PER_STEP = 5, 16  # steps of a run on its page, and samples of each

STYLE = """
.samples select, .samples input { font: inherit; padding: 4px 8px; margin: 0 10px 10px 0; border: 1px solid #cbd2d9;
  border-radius: 6px; background: #fff; }
.sample { border-top: 1px solid #e4e7eb; padding: 12px 0; }
.sample .prompt { color: #616e7c; } .sample .prompt, .sample .response { white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, monospace; margin: 6px 0; }
.sample .facts { font-size: 13.5px; color: #616e7c; } .right { color: #2f7d4f; } .wrong { color: #b5493a; }
.sample .shown { color: #616e7c; } .sample .response b { font-weight: 600; font-size: 11px; color: #616e7c; }
.below { background: rgb(31 95 139 / calc(var(--s) * 0.6)); }
.above { background: rgb(217 142 50 / calc(var(--s) * 0.8)); }
"""

_SCRIPT = """
const all = [...document.querySelectorAll('.sample')];
const step = document.getElementById('step'), verdict = document.getElementById('verdict'),
      problem = document.getElementById('problem');
function choose() {
  let shown = 0;
  for (const one of all) {
    const fits = one.dataset.step === step.value && (verdict.value === 'all' || one.dataset.verdict === verdict.value)
      && one.dataset.problem.includes(problem.value);
    one.hidden = !fits;
    shown += fits;
  }
  document.getElementById('none').hidden = shown > 0;
}
for (const control of [step, verdict, problem]) control.addEventListener('input', choose);
choose();
"""


def browser(samples: Sequence[ShownSample]) -> str:
    """A section of HTML; "" without samples. Without scripts every sample is shown."""
    if not samples:
        return ""
    steps = sorted({one.step for one in samples}, reverse=True)
    options = "".join(f'<option value="{step}">step {step}</option>' for step in steps)
    colors = {one.color for one in samples if one.color}
    legend = "; ".join(escape(LEGENDS[color]) for color in ("w", "ratio", "logp") if color in colors)
    return f"""<section class="samples"><h2 style="margin-top:0">Samples</h2>
<select id="step" aria-label="step">{options}</select><select id="verdict" aria-label="verdict">
<option value="all">right and wrong</option><option value="right">right</option><option value="wrong">wrong</option>
</select><input id="problem" placeholder="problem" aria-label="problem">
<p class="sub" style="margin:0 0 8px">Tokens: {legend}.</p>
<p id="none" hidden>No such sample on this page; owpo samples has all of them.</p>
{"".join(map(_sample, samples))}
<script>{_SCRIPT}</script></section>
"""


def _sample(one: ShownSample) -> str:
    kind = "right" if one.verdict == "right" else "wrong"
    tokens = _turns(one.tokens[:MAX_TOKENS], one.color)
    more = f" … {len(one.tokens) - MAX_TOKENS} more tokens" if len(one.tokens) > MAX_TOKENS else ""
    row = one.row
    facts = [f'<b class="{kind}">{escape(one.verdict)}</b>', f"expected {escape(one.answer)}"]
    if row is not None:
        facts.append(f"reward {row.reward:g}" + (" (flipped)" if bool(row.reward) != row.correct else ""))
        if row.advantage is not None:
            facts.append(f"advantage {row.advantage:+.3f}" + ("" if row.active else ", not reweighted"))
        elif not row.kept:
            facts.append("not trained on")
    facts.append(f"{len(one.tokens)} tokens, {'ended' if one.finish == 'stop' else 'cut off'}")
    return (
        f'<div class="sample" data-step="{one.step}" data-verdict="{kind}" data-problem="{escape(one.prompt_id)}">'
        f'<div class="facts">{escape(one.prompt_id)}, sample {one.sibling} of {one.siblings}: {", ".join(facts)}</div>'
        f'<div class="prompt">{escape(one.prompt)}</div><div class="response">{tokens}{more}</div></div>\n'
    )


def _turns(tokens: Sequence[ShownToken], color: str | None) -> str:
    """The response; that of an episode with a line for every turn and every observation."""
    spans = [list(span) for _, span in itertools.groupby(tokens, key=lambda token: (token.turn, token.observed))]
    texts = ["".join(_token(token, color) for token in span) for span in spans]
    if len(spans) < 2:
        return "".join(texts)
    return "".join(
        f'<div class="shown"><b>shown</b> {text}</div>'
        if span[0].observed
        else f"<div><b>turn {span[0].turn}</b> {text}</div>"
        for span, text in zip(spans, texts, strict=True)
    )


def _token(token: ShownToken, color: str | None) -> str:
    shaded, text = shade(token.value, color), escape(token.text)
    if shaded is None:
        return text
    side, strength = shaded
    return f'<span class="{side}" style="--s:{strength:.2f}" title="{color} {token.value:.3f}">{text}</span>'
