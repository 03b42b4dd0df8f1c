"""The HTML of a page, for jinja2: a module, because Flower's bundles leave .html files out."""

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="fedsim" content="{{ mark }}">
<link rel="icon" href="data:,">
<title>{{ title|short }}</title>
<style>
  :root { --fg: #222; --dim: #5f6368; --bg: #fff; --soft: #f5f6f7; --edge: #dcdee0; --faint: #bdbdbd; --link: #0b57a4;
    --bad: #fdecea; --mind: #fdf6e3;
    --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #e69f00; --s5: #56b4e9; }
  @media (prefers-color-scheme: dark) {
    :root { --fg: #e6e7e9; --dim: #a3a8ae; --bg: #16181b; --soft: #202327; --edge: #383c42; --faint: #6b7076;
      --link: #8ab8f0; --bad: #4a201c; --mind: #40351a;
      --s0: #4ea3dc; --s1: #f0803c; --s2: #2dbb92; --s3: #dd98bf; --s4: #f0b63c; --s5: #92d0f5; }
  }
  body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); overflow-wrap: anywhere; }
  body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; }
  h1 { font-size: 1.5rem; margin: 0; }
  h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--edge); padding-bottom: .2rem; }
  .answer { font-size: 1.15rem; margin: .6rem 0; }
  .where, .note, figcaption, caption, .figures dt, .figures .of, th { color: var(--dim); }
  .where, .note, figcaption, caption, .legend { font-size: .9rem; }
  a { color: var(--link); }
  .figures { display: grid; grid-template-columns: repeat({{ wide }}, 1fr); gap: .8rem; margin: 1.2rem 0; }
  .figures div { border: 1px solid var(--edge); border-radius: .4rem; padding: .6rem .8rem; }
  .figures dt, .figures .of { font-size: .85rem; }
  .figures dd { margin: 0; }
  .figures .value { font-size: 1.35rem; font-weight: 600; }
  .failure { background: var(--bad); border-left: 4px solid var(--s1); padding: .6rem .9rem; }
  .warning { background: var(--mind); border-left: 4px solid var(--s4); padding: .6rem .9rem; }
  .pictures { display: grid; gap: .4rem 1.6rem; }
  .pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
  @media (min-width: 60rem) { .pictures.beside { grid-template-columns: 1fr 2fr; } }
  .pictures > * { min-width: 0; }
  .pictures.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
  figure { margin: .4rem 0; max-width: 36rem; }
  figure > svg { display: block; width: 100%; height: auto; }
  img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: .3rem; }
  .legend svg { margin-right: .35rem; }
  .wide { overflow-x: auto; margin: .6rem 0; }
  table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
  caption { text-align: left; padding: .3rem 0; }
  th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--edge); }
  th, td { overflow-wrap: normal; white-space: nowrap; }
  th { font-weight: 600; }
  th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); }
  pre { background: var(--soft); padding: .6rem .8rem; overflow-x: auto; font-size: .85rem; margin: .2rem 0 .7rem; }
  ul:not(.legend) { margin: .2rem 0 .8rem; padding-left: 1.2rem; }
  summary { cursor: pointer; }
  @media (max-width: 48rem) {
    body { padding: 1rem; }
    .figures { grid-template-columns: 1fr 1fr; gap: .5rem; }
    .figures div:first-child:nth-last-child(odd) { grid-column: span 2; }
    td, th { padding: .25rem .45rem; }
    th:first-child, td:first-child { white-space: normal; overflow-wrap: break-word;
      min-width: 5rem; border-right: 1px solid var(--edge); }
  }
</style>
</head>
<body>
<h1>{{ title|short }}</h1>
<p class="answer">{{ answer }}</p>
<p class="where">{{ where }}</p>
{% if failure %}
<p class="failure">{{ failure }}</p>
{% endif %}
{% for text in warnings %}
<p class="warning">{{ text }}</p>
{% endfor %}
{% if figures %}
<dl class="figures">
{% for name, value, of in figures %}
  <div><dt>{{ name }}</dt><dd class="value">{{ value }}</dd><dd class="of">{{ of }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% for text in lines %}
<p class="note">{{ text }}</p>
{% endfor %}
{% if prices %}
<p class="{{ 'warning' if prices[1] else 'note' }}">times: {{ prices[0] }}</p>
{% endif %}
{% for part in parts %}
<section>
<h2>{{ part.title }}</h2>
{{ part.legend }}
{% set beside = part.pictures|length == 1 and part.tables|length == 1 and part.tables[0].header|length <= 8 %}
{% if part.pictures %}
<div class="pictures{{ ' three' if part.pictures|length == 3 }}{{ ' beside' if beside }}">
{% for picture in part.pictures %}
{{ picture }}
{% endfor %}
{% if not beside %}
</div>
{% endif %}
{% endif %}
{% for table in part.tables %}
<div class="wide" tabindex="0"><table>
{% if table.caption %}
<caption>{{ table.caption }}</caption>
{% endif %}
<thead><tr>{% for name in table.header %}<th>{{ name|short }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
{% set link = table.links[loop.index0] if table.links else "" %}
<tr>
{% for text in row %}
{% if link and loop.first %}
<td><a href="{{ link|urlencode }}">{{ text|short }}</a></td>
{% else %}
<td>{{ text|short }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% if beside %}
</div>
{% endif %}
{% if part.note %}
<p class="note">{{ part.note }}</p>
{% endif %}
</section>
{% endfor %}
{% if commands %}
<h2>Commands</h2>
{% for what, line in commands %}
<div>{{ what }}</div>
<pre>{{ line }}</pre>
{% endfor %}
{% endif %}
<h2>Files</h2>
{% if files %}
<ul>
{% for name, what in files %}
<li><a href="{{ name|urlencode }}">{{ name }}</a>: {{ what }}</li>
{% endfor %}
</ul>
{% endif %}
{% for name, text in details %}
<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% if made_by %}
<p class="note">{{ made_by }}</p>
{% endif %}
</body>
</html>
"""
