"""What the project promises about itself: notebooks, modules and README belong together, and imports flow one way."""
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
MODULES = sorted(p for p in (ROOT/'multimodal').glob('*.py') if not p.stem.startswith('_'))
HEAVY = ['torchvision', 'matplotlib', 'seaborn', 'pandas', 'transformers', 'pycocoevalcap', 'accelerate', 'nltk', 'scipy']
LIGHT = {  # what importing a module may not drag in
    'core': ['torch', *HEAVY], 'datasets': ['torch', *HEAVY], 'shapes': ['torch', *HEAVY], 'download': ['torch', *HEAVY],
    'text': ['torch', *HEAVY], 'metrics': HEAVY, 'report': ['torch', *HEAVY], 'cli': ['torch', 'numpy', *HEAVY]}


def sources(notebook):
    return [''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == 'code']


def number(notebook):
    "The part before the first underscore; '01b' sorts after '01' and before '02'."
    return notebook.stem.split('_')[0]


def exports():
    "The notebook that each module comes from."
    found = {}
    for nb in NOTEBOOKS:
        for m in re.finditer(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(sources(nb)), re.M):
            assert m[1] not in found, f'{nb.name} and {found[m[1]].name} both export {m[1]}'
            found[m[1]] = nb
    return found


def imported(tree):
    "Names of this package's modules that a syntax tree imports, absolutely or relatively, at the top or inside functions."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level: yield from [base] if base else [a.name for a in node.names]
            elif base == 'multimodal': yield from (a.name for a in node.names)
            elif base.startswith('multimodal.'): yield base.split('.')[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split('.')[1] for a in node.names if a.name.startswith('multimodal.'))


def python(code, *args):
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=ROOT, timeout=120)


def ids(paths): return [p.stem for p in paths]


@pytest.mark.parametrize('module', MODULES, ids=ids(MODULES))
def test_module_imports_alone_and_stays_light(module):
    "A new process that imports this module and nothing else; whatever it must not load is not loaded."
    r = python(f'import multimodal.{module.stem}, sys; print(*sorted({{m.split(".")[0] for m in sys.modules}}))')
    assert r.returncode == 0, r.stderr
    assert not set(LIGHT.get(module.stem, [])) & set(r.stdout.split())


def test_every_module_has_a_notebook_and_every_notebook_its_module():
    assert {p.stem for p in MODULES} == set(exports())
    for name, nb in exports().items(): assert nb.stem == f'{number(nb)}_{name}'


@pytest.mark.parametrize('module', MODULES, ids=ids(MODULES))
def test_imports_point_to_lower_numbers_and_there_are_no_star_imports(module):
    where, tree = exports(), ast.parse(module.read_text(encoding='utf-8'))
    stars = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names)]
    assert not stars, f'{module.name}:{stars[0].lineno}: star import'
    for other in imported(tree):
        assert other in where, f'{module.name} imports {other}, which is no module of this package'
        assert number(where[other]) < number(where[module.stem]), f'{module.name} imports {other}, which comes later'


@pytest.mark.parametrize('path', MODULES + sorted(ROOT.glob('tests/*.py')) + sorted(ROOT.glob('tools/*.py')),
                         ids=lambda p: f'{p.parent.name}/{p.name}')
def test_no_undefined_or_unused_names(path):
    from pyflakes.api import check
    from pyflakes.reporter import Reporter
    import io
    out = io.StringIO()
    check(path.read_text(encoding='utf-8'), str(path.relative_to(ROOT)), Reporter(out, out))
    assert not out.getvalue(), out.getvalue()


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_notebook_cells_are_short_and_kept_outputs_small(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    for src in sources(notebook):
        long = [l for l in src.split('\n') if len(l) > 120]
        assert not long, f'line of {len(long[0])} characters: {long[0][:60]}…'
        if re.search(r'^#\|\s*export', src, re.M):
            n = sum(bool(l.strip()) and not l.startswith('#|') for l in src.split('\n'))
            most = 30 if '@dataclass' in src else 25                          # settings cannot be cut in two
            assert n <= most, f'exported cell of {n} lines: {src[:80]}…'
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert sum(len(json.dumps(o)) for o in outputs) < 200_000, 'kept outputs are too large'
    assert not [o for o in outputs if o['output_type'] == 'error'], 'an error is kept among the outputs'


@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem != 'index'], ids=lambda n: n.stem)
def test_notebooks_are_of_a_size_to_be_read(notebook):
    "As CONTRIBUTING promises: so many cells, so many exported lines, and prose beside the code."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    lines = lambda src: sum(bool(l.strip()) and not l.startswith('#|') for l in src.split('\n'))
    code = sources(notebook)
    words = sum(len(re.findall(r'\w+', ''.join(c['source']))) for c in cells if c['cell_type'] == 'markdown')
    assert 20 <= len(cells) <= 70
    assert sum(lines(src) for src in code if re.search(r'^#\|\s*export', src, re.M)) <= 200
    assert words >= 2.5*sum(map(lines, code)), f'{words} words beside {sum(map(lines, code))} lines of code'


def test_modules_are_what_the_notebooks_export_and_notebooks_are_clean(tmp_path):
    "nbdev_export and nbdev_clean in a copy of the project change nothing."
    for name in ['nbs', 'multimodal']:
        shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ['settings.ini', 'setup.py', 'README.md']: shutil.copy(ROOT/name, tmp_path)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob('*')) if p.is_file()}
    for command in ['nbdev_export', 'nbdev_clean']:
        r = subprocess.run([Path(sysconfig.get_path('scripts'))/command], cwd=tmp_path, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
    after = {p: p.read_bytes() for p in sorted(tmp_path.rglob('*')) if p.is_file() and '__pycache__' not in p.parts}
    changed = [str(p.relative_to(tmp_path)) for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    assert not changed, f'run nbdev_export and nbdev_clean: {sorted(changed)} would change'


def test_readme_is_the_index_notebook():
    spec = importlib.util.spec_from_file_location('readme', ROOT/'tools'/'readme.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text, pictures = tool.make_readme(ROOT)
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'run python tools/readme.py'
    for path, data in pictures.items(): assert (ROOT/path).read_bytes() == data, f'{path}: run python tools/readme.py'


def test_tables_of_the_readme_are_made_from_result_files(monkeypatch):
    "Each cell that only shows something is run anew, and what it shows stands in README.md to the letter."
    monkeypatch.chdir(ROOT/'nbs')
    cells = [src for src in sources(ROOT/'nbs'/'index.ipynb') if re.search(r'^#\|\s*echo:\s*false', src, re.M)]
    assert cells
    text, names = (ROOT/'README.md').read_text(encoding='utf-8'), {}
    for src in cells:
        *rest, last = ast.parse(src).body
        exec(compile(ast.Module(rest, []), 'index.ipynb', 'exec'), names)
        shown = eval(compile(ast.Expression(last.value), 'index.ipynb', 'eval'), names).data
        assert shown.count('|') > 20 and shown in text, f'run index.ipynb and tools/readme.py: {shown}'


def test_readme_links_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for target in re.findall(r'\]\((?!https?:|#|mailto:)([^)\s#]+)', text): assert (ROOT/target).exists(), target


def test_readme_lists_every_notebook():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert not [nb.name for nb in NOTEBOOKS if nb.stem != 'index' and nb.name not in text]


def test_every_command_is_installed_and_documented():
    from configparser import ConfigParser
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    for line in config['DEFAULT']['console_scripts'].split():
        command, where = line.split('=')
        assert (Path(sysconfig.get_path('scripts'))/command).exists(), f'{command} is not installed'
        assert command in readme, f'README does not name {command}'
