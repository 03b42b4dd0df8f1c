"""The HTML of a run's page, for jinja2: a module, because Flower's bundles leave .html files out."""

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="fedsim" content="{{ of }}">
<title>{{ title|short }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
  body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; }
  h1 { font-size: 1.5rem; margin: 0; }
  h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
  .where, .note, figcaption { color: #666; font-size: .9rem; }
  .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
  .figures div { border: 1px solid #ddd; border-radius: .4rem; padding: .6rem .8rem; }
  .figures dt { color: #666; font-size: .85rem; }
  .figures dd { margin: 0; }
  .figures .value { font-size: 1.35rem; font-weight: 600; }
  .figures .of { color: #666; font-size: .85rem; }
  .failure { background: #fdecea; border-left: 4px solid #d55e00; padding: .6rem .9rem; }
  .warning { background: #fdf6e3; border-left: 4px solid #e69f00; padding: .6rem .9rem; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #eee; white-space: nowrap; }
  th { color: #666; font-weight: 600; }
  th:first-child, td:first-child { text-align: left; }
  img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
  pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
</style>
</head>
<body>
<h1>{{ title|short }}</h1>
<p class="where">{{ folder }}</p>
{% if failure %}
<p class="failure">{{ failure.error }}: {{ failure.reason }}</p>
{% endif %}
{% for text in warnings %}
<p class="warning">{{ text }}</p>
{% endfor %}
<dl class="figures">
{% for name, value, of in figures %}
  <div><dt>{{ name }}</dt><dd class="value">{{ value }}</dd><dd class="of">{{ of }}</dd></div>
{% endfor %}
</dl>
{% if prices %}
<p class="{{ 'warning' if prices.calls_share > 0.5 else 'note' }}">times: {{ prices.line }}</p>
{% endif %}
{% for part in parts %}
<section>
<h2>{{ part.title }}</h2>
{% for picture in part.pictures %}
<img src="{{ picture }}" alt="{{ part.title }}">
{% endfor %}
{% if part.table %}
<div class="wide"><table>
<thead><tr>{% for name in part.table.header %}<th>{{ name|short }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in part.table.rows %}
<tr>{% for text in row %}<td>{{ text|short }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% if part.note %}
<p class="note">{{ part.note }}</p>
{% endif %}
</section>
{% endfor %}
<h2>Settings</h2>
<details><summary>config.yaml</summary><pre>{{ config }}</pre></details>
{% if summary %}
<details><summary>summary.json</summary><pre>{{ summary }}</pre></details>
{% endif %}
</body>
</html>
"""
