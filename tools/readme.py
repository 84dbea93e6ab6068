"""Makes README.md from nbs/index.ipynb with nbconvert, so that what a visitor reads is what a notebook ran.

    python tools/readme.py            # writes README.md, and the notebook's pictures into nbs/images/

Outputs are taken as they stand in the notebook; nothing is run. Cells marked `#| hide` are left out, and of those marked
`#| echo: false` only what they show is kept: so tables are made from files in results/.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
# nbconvert indents text outputs by four spaces; a fence looks the same everywhere
TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
```text
{{ output.text | strip_ansi | trim }}
```
{% endblock stream %}
{% block input %}{% if cell.source %}{{ super() }}{% endif %}{% endblock input %}
{% block data_text %}
```text
{{ output.data['text/plain'] | trim }}
```
{% endblock data_text %}
"""
LINK = re.compile(r'(!?\[[^\]]*\]\()(?!https?:|mailto:|#|/)([^)\s]+)(\))')


def from_root(text: str) -> str:
    "Links in the notebook are relative to nbs/; in README.md they start at the project's root."
    def fix(m):
        target = m[2][3:] if m[2].startswith('../') else f'nbs/{m[2]}'
        return m[1] + target + m[3]
    return LINK.sub(fix, text)


def tidy(nb):
    "The notebook without hidden cells and without the directive lines that only nbdev reads."
    kept = []
    for cell in nb.cells:
        if cell.cell_type == 'code':
            if re.search(r'^#\|\s*hide\s*$', cell.source, re.M): continue
            quiet = re.search(r'^#\|\s*echo:\s*false\s*$', cell.source, re.M)
            cell.source = '' if quiet else re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
            if not cell.source and not quiet: continue
            cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        else:
            cell.source = from_root(cell.source)
        kept.append(cell)
    nb.cells = kept
    nb.metadata['language_info'] = {'name': 'python'}                  # so that code fences say python
    return nb


def make_readme(root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    "README.md's text and the pictures it shows, by path from `root`."
    nb = tidy(nbformat.read(root/'nbs'/'index.ipynb', 4))
    config = Config({'ExtractOutputPreprocessor': {'enabled': True}})
    body, resources = MarkdownExporter(config=config, raw_template=TEMPLATE).from_notebook_node(
        nb, resources={'unique_key': 'index', 'output_files_dir': 'nbs/images'})
    body = re.sub(r'!\[[^\]]*\]\((nbs/images/index_[^)]+)\)', r'![what the cell above shows](\1)', body)
    body = re.sub(r'\n{3,}', '\n\n', '\n'.join(l.rstrip() for l in body.split('\n'))).strip() + '\n'
    return body, resources['outputs']


if __name__ == '__main__':
    text, pictures = make_readme()
    for old in (ROOT/'nbs'/'images').glob('index_*'): old.unlink()
    for path, data in pictures.items():
        (ROOT/path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/path).write_bytes(data)
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    print(f'README.md: {len(text.splitlines())} lines, {len(pictures)} pictures', file=sys.stderr)
