"""The look of reports: one palette, and the style sheet for screens (light and dark), phones and print."""

from enum import StrEnum

MARK = "neuronal_ray report"
"""What every report says near its beginning, so that the command knows what it wrote before."""


class Color(StrEnum):
    """The palette, as on a light screen; a page has each color as the CSS variable of its name."""

    INK = "#23262b"
    MUTED = "#686e76"
    LINE = "#dcdee1"
    DENSER = "#33698f"
    SPARSER = "#b9582c"


_LIGHT = " ".join(f"--{color.name.lower()}: {color.value};" for color in Color)

STYLE = (
    f":root {{ color-scheme: light dark; --paper: #fff; {_LIGHT} }}"
    + """
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e4e6e9; --muted: #989fa8;
  --line: #34383e; --denser: #6ea9d8; --sparser: #e58d5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums lining-nums; }
main { max-width: 784px; margin: 0 auto; padding: 72px 24px 96px; }
h1, h2, b { font-weight: 600; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 64px 0 12px; font-size: 1.05rem; }
p { margin: 8px 0; }
.lead { font-size: 1.15rem; }
.muted, figcaption, th, small { color: var(--muted); }
.tally { display: flex; flex-wrap: wrap; gap: 16px 56px; margin: 40px 0 0; }
.tally div { display: flex; flex-direction: column-reverse; }
.tally dt { color: var(--muted); font-size: .875rem; }
.tally dd { margin: 0; font-size: 1.75rem; font-weight: 300; letter-spacing: -.01em; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; }
th, td { padding: 7px 0 7px 16px; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: baseline; }
th { font-weight: 400; }
th:first-child { padding-left: 0; text-align: left; }
thead th { font-size: .8125rem; }
.chosen > *, .scores td:nth-last-child(2), tfoot td { font-weight: 600; color: var(--ink); }
.scores tbody th { color: var(--ink); }
.sortable thead th { cursor: pointer; }
.sortable .word { text-align: left; }
section { min-width: 0; }
@media screen and (min-width: 1160px) { .tables { display: grid; grid-template-columns: 1fr 1fr; gap: 0 40px;
  width: min(1480px, 94vw); margin-left: calc(50% - min(740px, 47vw)); } }
.sortable td, .sortable th { white-space: nowrap; }
.sortable tbody th { text-align: left; color: var(--ink); }
[aria-sort]::after { content: " \\2193"; }
[aria-sort="descending"]::after { content: " \\2191"; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts th { width: 13em; }
.scores td { white-space: nowrap; }
.bar { width: 50%; vertical-align: middle; }
.bar i { display: block; height: 7px; background: var(--denser); opacity: .75; print-color-adjust: exact; }
figure { margin: 16px 0 0; break-inside: avoid; }
figcaption { margin-top: 6px; font-size: .875rem; }
.sparser { color: var(--sparser); }
.denser { color: var(--denser); }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 32px; }
.scroll { overflow-x: auto; }
.narrow { display: none; }
details { margin-top: 24px; }
summary { cursor: pointer; padding: 4px 0; }
@media screen and (max-width: 600px) { main { padding: 40px 16px 64px; } h1 { font-size: 1.6rem; }
  .pair { grid-template-columns: 1fr; } .wide { display: none; } .narrow { display: block; }
  .facts th { width: 9em; } th, td { padding-left: 10px; } .scores { font-size: .8125rem; }
  .scores :not(:first-child) { padding-left: 6px; } }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; } tr { break-inside: avoid; }
  tfoot { display: table-row-group; }
  h2 { break-after: avoid; margin-top: 32px; } details::details-content { content-visibility: visible; } }
"""
)
