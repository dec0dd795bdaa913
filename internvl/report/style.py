"""How a page of report.py looks: light and dark, wide and narrow, and in print."""

STYLE = """
:root {
  --page: #f5f6f8; --card: #ffffff; --ink: #1b1f27; --soft: #5b6472; --rule: #dfe3ea;
  --accent: #1f5fd0; --pale: #c3cad6; --right: #0b7a43; --wrong: #b3261e;
  --right-card: #e9f6ee; --wrong-card: #fcecea; --mark: #cfe6ff; --code: #f0f2f6;
  --series-0: #1f5fd0; --series-1: #d9640a; --series-2: #0b8f6a; --series-3: #a13fb5;
  --series-4: #8a6d00; --series-5: #c2255c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1b2028; --ink: #e8ebf0; --soft: #9aa5b5; --rule: #303846;
    --accent: #6ea3ff; --pale: #566174; --right: #58d18f; --wrong: #ff8a80;
    --right-card: #16301f; --wrong-card: #3a1d1c; --mark: #1d4a7a; --code: #13171e;
    --series-0: #6ea3ff; --series-1: #ff9e4f; --series-2: #45d0a6; --series-3: #d893ea;
    --series-4: #e0c04a; --series-5: #ff7ba5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC",
    "PingFang SC", "Microsoft YaHei", "Apple SD Gothic Neo", "Malgun Gothic", sans-serif;
}
[lang|=ko] { font-family: "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans CJK KR", system-ui,
  sans-serif; }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.75rem; padding-bottom: .5rem; }
h1 { margin: 0; font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; }
header p { margin: .6rem 0 1.2rem; color: var(--soft); font-size: 1.08rem; max-width: 48rem; }
nav { display: flex; flex-wrap: wrap; gap: .5rem; }
nav a {
  padding: .2rem .8rem; border: 1px solid var(--rule); border-radius: 99px; color: var(--soft);
  background: var(--card); font-size: .88rem; text-decoration: none;
}
nav a:hover { color: var(--accent); border-color: var(--accent); }
a { color: var(--accent); }
section {
  margin: 1.25rem 0; padding: 1.4rem 1.5rem; background: var(--card);
  border: 1px solid var(--rule); border-radius: 14px;
}
h2 { margin: 0 0 .9rem; font-size: 1.2rem; letter-spacing: -.01em; }
h3 { margin: 0 0 .6rem; font-size: .95rem; overflow-wrap: anywhere; }
p { margin: 0 0 .7rem; max-width: 60rem; }
section > p:last-child { margin-bottom: 0; }
.note { margin: .8rem 0 0; color: var(--soft); font-size: .88rem; }
pre {
  margin: .5rem 0 0; padding: .9rem 1rem; overflow-x: auto; background: var(--code);
  border-radius: 9px; font: .86rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem; margin: 0;
}
.facts div { padding-left: .9rem; border-left: 3px solid var(--accent); }
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.facts dd { margin: 0; font-size: 1.7rem; font-weight: 650; line-height: 1.2; }
.facts dt { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; }
thead th { color: var(--soft); font-size: .85rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; }
thead th:first-child, th[scope=rowgroup] { padding-left: 0; }
tbody { border-top: 1px solid var(--rule); }
tbody tr:first-child > * { padding-top: .6rem; }
tbody tr:last-child > *, th[scope=rowgroup] { padding-bottom: .6rem; }
th[scope=rowgroup] { padding-top: .6rem; font-weight: 650; vertical-align: top; }
th[scope=row] { color: var(--soft); white-space: nowrap; }
.texts td { vertical-align: top; overflow-wrap: anywhere; min-width: 9rem; }
.texts td.number { min-width: 0; }
.texts td:nth-child(2) { min-width: 18rem; }
.number { text-align: right; white-space: nowrap; }
td.number { color: var(--soft); }
td.number.after { color: var(--ink); font-weight: 650; }
.wide { width: 45%; min-width: 9rem; }
.bars { display: grid; gap: 2px; padding: 2px 0; background: var(--code); align-content: center;
  border-radius: 0 4px 4px 0; min-height: 18px; }
.bars i { height: 7px; min-width: 2px; border-radius: 0 4px 4px 0; }
i.before, .key.before { background: var(--pale); }
i.after, .key.after { background: var(--accent); }
.key {
  display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 3px;
  vertical-align: -1px;
}
.key.after { margin-left: .7rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .4rem; font-size: .95rem; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
.grid line { stroke: var(--rule); stroke-width: 1; }
.curve polyline { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.bar rect { fill: var(--color); }
.curve circle { fill: var(--color); stroke: var(--card); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 0 3.2rem; padding: 0;
  list-style: none; color: var(--soft); font-size: .88rem; }
.legend b { color: var(--ink); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr));
  gap: .9rem; }
.cards article { display: flex; flex-direction: column; overflow: hidden; border-radius: 11px;
  border: 1px solid var(--rule); }
.cards.roomy { grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.drawings { display: flex; gap: 2px; background: #fff; }
.drawings > * { flex: 1 1 0; min-width: 0; height: 8.5rem; padding: .6rem; object-fit: contain; }
.roomy .drawings > * { height: 13rem; }
.drawings:has(> :nth-child(3)) { flex-wrap: wrap; }
.drawings:has(> :nth-child(3)) > * { flex-basis: 30%; height: 6.5rem; padding: .2rem; }
.boxed rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.boxed rect.reference { stroke: #0b8f3a; }
.boxed rect.answer { stroke: #d11149; stroke-dasharray: 6 4; }
.question { margin: 0; padding: .55rem .7rem; font-size: .88rem; line-height: 1.4;
  white-space: pre-line; overflow-wrap: anywhere; border-top: 1px solid var(--rule); }
.cards article > .note { margin: 0; padding: .3rem .7rem .45rem; overflow-wrap: anywhere;
  border-top: 1px solid var(--rule); font-size: .8rem; }
.cards ul { flex: 1; margin: 0; padding: 0; list-style: none; font-size: .88rem; line-height: 1.4; }
.cards li { display: grid; grid-template-columns: 1.9rem 1.2rem 1fr; align-items: baseline;
  padding: .3rem .7rem; border-top: 1px solid var(--rule); overflow-wrap: anywhere; }
.tag { color: var(--soft); font-size: .74rem; text-transform: uppercase; letter-spacing: .04em; }
.mark { font-weight: 700; }
.right { background: var(--right-card); } .right .mark { color: var(--right); }
.wrong { background: var(--wrong-card); } .wrong .mark { color: var(--wrong); }
li .reference { color: var(--soft); font-size: .82rem; }
li .reference::before { content: "expected: "; }
.score { color: var(--soft); font-size: .82rem; }
.unscored .mark { color: var(--soft); }
.roomy li > div { white-space: pre-line; }
.roomy li { grid-template-columns: minmax(1.9rem, auto) 1.2rem 1fr; }
.better, .better.after { color: var(--right) !important; }
.worse, .worse.after { color: var(--wrong) !important; }
.interval { position: relative; height: 16px; background: linear-gradient(90deg,
  transparent calc(50% - 1px), var(--rule) calc(50% - 1px), var(--rule) calc(50% + 1px),
  transparent calc(50% + 1px)); }
.interval i { position: absolute; top: 4px; height: 8px; min-width: 3px; border-radius: 4px;
  background: var(--pale); }
.interval.better i { background: var(--right); }
.interval.worse i { background: var(--wrong); }
.properties th { padding-left: 0; white-space: nowrap; vertical-align: top; width: 1%; }
.properties td { overflow-wrap: anywhere; }
.properties tr + tr > * { border-top: 1px solid var(--rule); }
.group > h3 { margin: 1.4rem 0 .6rem; }
.group > h3:first-child { margin-top: 0; }
.searches { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
  gap: .9rem; }
.search { overflow: hidden; border: 1px solid var(--rule); border-radius: 11px; }
.search h3 { display: grid; grid-template-columns: 1.5rem 1fr auto; align-items: center; margin: 0;
  gap: .5rem; padding: .5rem .7rem; min-height: 3.2rem; font-weight: 600; line-height: 1.3; }
.search h3.plain { grid-template-columns: 1fr auto; }
.search h3 img { width: 4rem; height: 4rem; border-radius: 8px; background: #fff; }
.rank { padding: .05rem .6rem; border-radius: 99px; font-size: .78rem; white-space: nowrap; }
.search ol { display: flex; flex-wrap: wrap; margin: 0; padding: 0; list-style: none;
  border-top: 1px solid var(--rule); font-size: .88rem; line-height: 1.4; }
.search li { position: relative; flex: 1 0 20%; padding: .35rem; overflow-wrap: anywhere; }
.search li img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: #fff; border-radius: 6px; }
.search li > span[lang] { display: block; padding: 0 .35rem 0 1.5rem; }
.search li:has(span[lang]) { flex-basis: 100%; }
.search li:has(span[lang]):not(:first-child) { border-top: 1px solid var(--rule); }
.search li .mark { position: absolute; left: .6rem; top: .35rem; }
.search li img ~ .mark, .search .mark:has(+ img) { padding: 0 .3rem; border-radius: 99px;
  background: var(--right-card); }
.sample { margin-top: 1.1rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); }
.tiled { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; }
.tiles { width: calc(var(--columns) * 6.5rem); max-width: 100%; border: 1px solid var(--rule);
  border-radius: 6px; }
.tiles path { fill: none; stroke-width: 2; }
.tiles .under { stroke: #fff; }
.tiles .over { stroke: #d11149; stroke-dasharray: 6 5; }
.tiles text { fill: #d11149; font-size: 14px; font-weight: 700; paint-order: stroke; stroke: #fff;
  stroke-width: 3px; }
.spans { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 4px; padding: .1em .15em;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.attribution { margin: 0; color: var(--soft); font-size: .88rem; white-space: pre-line;
  overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .texts thead { display: none; }
  .texts tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--rule); }
  .texts tr:last-child { border-bottom: 0; }
  .texts td, .texts td.number { display: block; padding: .1rem 0; text-align: left; min-width: 0; }
  .texts td:nth-child(n+3) { color: var(--soft); font-size: .88rem; }
  section { padding: 1.1rem 1rem; }
  th, td { padding-left: .4rem; padding-right: .4rem; }
  .texts td:empty { display: none; }
  .wide { display: none; }
  .scores thead { display: none; }
  .scores tr { display: grid; grid-template-columns: repeat(3, auto); justify-content: start;
    column-gap: 1.2rem; padding: .3rem 0; }
  .scores tbody tr > * { padding: 0; text-align: left; }
  .scores tbody th { grid-column: 1 / -1; white-space: normal; }
  .scores tbody tr > th[scope=rowgroup] { padding: .3rem 0; }
  .differences td:nth-of-type(4) { grid-column: 1 / -1; }
  .scores td.number::before { content: attr(data-head) " "; color: var(--soft);
    font-size: .8rem; font-weight: 400; }
  .properties tr, .properties th, .properties td { display: block; padding-left: 0; }
  .properties th { width: auto; white-space: normal; padding-bottom: 0; }
  .properties tr + tr > td { border-top: 0; }
  .properties td { padding-top: 0; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } nav { display: none; } }
"""
