"""The fixed parts of the HTML page: no script, no font, no picture from anywhere, light and dark."""

from __future__ import annotations

# Whatever a name from a trace might turn into, the page loads and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark;
  --back: #fff; --text: #1d2329; --dim: #57606a; --line: #d3d9df; --soft: #f4f6f8; --hit: #fff1d6;
  --error: #b3261e; --warning: #8a5300; --note: #1f5fa8; --clean: #1b6e36; --area: #9fb6cc; --rate: #dfe7ee; }
@media (prefers-color-scheme: dark) { :root {
  --back: #14181c; --text: #dfe4e8; --dim: #99a3ad; --line: #39424b; --soft: #1d2329; --hit: #40310f;
  --error: #ff8a80; --warning: #f0b45c; --note: #8abdf5; --clean: #7fd195; --area: #4c6680; --rate: #26313b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0; }
h3 { font-size: 1rem; margin: 1.25rem 0 .35rem; }
p { margin: .35rem 0; } ul, ol { margin: .35rem 0; padding-left: 1.6rem; } a { color: inherit; }
.dim, figcaption, caption { color: var(--dim); }
.verdict { font-size: 1.15rem; font-weight: 600; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); } .clean { color: var(--clean); }
.unknown { color: var(--warning); }
article { border: 1px solid var(--line); border-left: .35rem solid var(--bar); border-radius: .35rem; padding: 1rem 1.25rem;
  margin: 1.25rem 0; }
article.error { --bar: var(--error); } article.warning { --bar: var(--warning); } article.note { --bar: var(--note); }
article > * { color: var(--text); } article > h2 { color: var(--bar); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .35rem 0; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; padding: .2rem 0; }
th, td { text-align: left; padding: .15rem .75rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
code, pre, .mono { font: .85rem/1.45 ui-monospace, monospace; } .mono { overflow-wrap: normal; white-space: nowrap; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: .25rem; padding: .5rem .75rem; overflow-x: auto; }
tr.hit td { background: var(--hit); } b { font-weight: 600; }
figure { margin: 1rem 0; } svg { display: block; width: 100%; min-width: 48rem; height: auto; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
.area { fill: var(--area); } .rate { fill: var(--rate); } .base { stroke: var(--line); }
.gap { fill: var(--warning); opacity: .35; }
.at { stroke: var(--text); stroke-dasharray: 3 2; }
svg .error { fill: var(--error); } svg .warning { fill: var(--warning); } svg .note { fill: var(--note); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .75rem; margin: .35rem 0; }
dt { color: var(--dim); } dd { margin: 0; }
footer { margin-top: 2rem; color: var(--dim); font-size: .9rem; }
@media print { article { break-inside: avoid; } }
"""
