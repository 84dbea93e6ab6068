"""The commands as the terminal sees them: results, exit status, and one clear line for every mistake."""
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from commands import call

SCRIPTS = Path(sysconfig.get_path('scripts'))
SMALL = ['image_size=32', 'stage=2', 'embedding_dim=32', 'n_layers=1']


pytestmark = pytest.mark.usefixtures('home')


@pytest.fixture(scope='module')
def run(home, tmp_path_factory):
    "A run folder of a model that has learned next to nothing."
    from multimodal.cli import mm_train
    folder = tmp_path_factory.mktemp('runs')/'small'
    mm_train('shapes:60', str(folder), epochs=1, device='cpu', set=SMALL)
    return folder


def shell(name, *args, **kw):
    return subprocess.run([SCRIPTS/name, *map(str, args)], capture_output=True, text=True, timeout=120, **kw)


def mistake(capsys, func, *args, **kw):
    "Call a command that must end with status 2 and one line on standard error, before it has begun its work; give the line."
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: func(*args, **kw)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out, out
    lines = [l for l in err.splitlines() if l.strip()]
    assert len(lines) == 1 and 'Traceback' not in err, err
    return lines[0]


def photos(home, n=3): return sorted((home/'shapes-60-48'/'Flicker8k_Dataset').glob('*.jpg'))[:n]


@pytest.mark.parametrize('name', ['mm_demo', 'mm_download', 'mm_augment', 'mm_train', 'mm_validate', 'mm_score', 'mm_caption',
                                  'mm_search', 'mm_draw'])
def test_help_explains_every_option(name):
    r = shell(name, '--help')
    assert r.returncode == 0 and r.stderr == ''
    options = [l for l in r.stdout.splitlines() if l.startswith('  --')]
    assert all(len(l.split()) > 2 for l in options), r.stdout


def test_unknown_option_and_missing_argument_end_with_status_2():
    for args in (['mm_train', 'shapes', 'x', '--epoch', '3', '--fast'], ['mm_validate'], ['mm_train', 'shapes', 'x', '--epochs', 'many']):
        r = shell(*args)
        assert (r.returncode, r.stdout, len(r.stderr.splitlines())) == (2, '', 1) and r.stderr.startswith(f'{args[0]}: ')
    assert 'did you mean --epochs?' in call('mm_train', 'shapes', 'x', '--epoch', '3')[2]             # and does not take it for that
    assert 'write ./-red.jpg' in call('mm_caption', '-red.jpg')[2]
    for args in (['mm_score', '', 'a.txt'], ['mm_train', 'shapes', ''], ['mm_caption', 'a.jpg', '--run', ''], ['mm_draw', '']):
        status, out, err = call(*args)
        assert status == 2 and 'is empty' in err and len(err.splitlines()) == 1


def test_typos_in_data(capsys, tmp_path):
    from multimodal.cli import mm_augment, mm_train
    assert 'flickr8' in mistake(capsys, mm_train, 'flickr8', str(tmp_path/'run'))
    assert 'shapes:2000' in mistake(capsys, mm_train, 'shapes:many', str(tmp_path/'run'))
    mistake(capsys, mm_train, 'shapes:3', str(tmp_path/'run'))
    (tmp_path/'empty').mkdir()
    assert str(tmp_path/'empty') in mistake(capsys, mm_train, str(tmp_path/'empty'), str(tmp_path/'run'))
    assert 'nowhere' in mistake(capsys, mm_augment, 'nowhere', sheet=str(tmp_path/'sheet.png'))
    assert '--sheet' in mistake(capsys, mm_augment, 'shapes:60')
    assert not (tmp_path/'run').exists()
    (tmp_path/'file').touch()
    assert 'cannot be written' in mistake(capsys, mm_train, 'shapes:60', str(tmp_path/'file'/'run'), set=SMALL)


def test_wrong_settings(capsys, tmp_path):
    from multimodal.cli import mm_train
    go = lambda **kw: mistake(capsys, mm_train, 'shapes:60', str(tmp_path/'run'), **kw)
    assert "did you mean 'stage'" in go(set=['stge=3'])
    assert 'name=value' in go(set=['stage'])
    assert 'stage' in go(set=['stage=nine'])
    assert 'lr' in go(lr=-1.0)
    assert 'caption' in go(task='sing')
    assert 'nowhere.pth' in go(weights='nowhere.pth')
    (tmp_path/'fake.pth').write_text('no weights')
    assert 'weights_only' not in (line := go(weights=str(tmp_path/'fake.pth'))) and 'holds no ResNet18 weights' in line
    for wrong in ('captions_per_image=-1', 'dev_photos=-1', 'max_words=0', 'patience=-1', 'max_seconds=-1', 'word_dropout=1'):
        assert wrong.split('=')[0] in go(set=SMALL + [wrong])
    assert 'slow' in go(set=SMALL + ['slow=encodr'], device='cpu')
    assert 'warp' in go(device='warp', set=SMALL)
    assert 'config.json' in go(resume=True)
    for wrong in ('data=shapes:80', 'init=x', 'views=plain,plain', 'length_penalty=1e200', 'min_count=100000'):
        assert wrong.split('=')[0] in go(set=SMALL + [wrong], device='cpu')
    for large in ('embedding_dim=900000', 'ff_mult=1000000', 'image_size=1000000', 'n_layers=1000000', 'max_words=1000000'):
        assert large.split('=')[0] in go(set=[s for s in SMALL if s.split('=')[0] not in large] + [large], device='cpu')
    assert not (tmp_path/'run').exists()


def test_set_given_twice_counts_twice(tmp_path):
    for first, then in (['stge=3'], ['n_layers=1']), (['stage=3'], ['n_layers=1', 'stage=2']):
        status, _, err = call('mm_train', 'shapes:60', tmp_path/'run', '--epochs', '1', '--set', *first, '--set', *then)
        assert status == 2 and ("'stge'" in err or '--set stage: is given twice' in err) and len(err.splitlines()) == 1


def test_sigterm_while_features_are_computed_ends_with_a_line(capsys, tmp_path, monkeypatch):
    from multimodal.cli import mm_train
    from multimodal.features import FeatureCache
    before = signal.getsignal(signal.SIGTERM)
    def build(*args, **kw):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    monkeypatch.setattr(FeatureCache, 'build', build)
    with pytest.raises(SystemExit) as e: mm_train('shapes:60', str(tmp_path/'run'), epochs=1, set=SMALL + ['trainable=none'], device='cpu')
    assert e.value.code == 130 and capsys.readouterr().err.strip() == 'mm_train: stopped'
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path/'run').exists()


def test_too_little_memory_is_one_line(capsys, tmp_path, monkeypatch):
    from multimodal.cli import mm_train
    errors = [MemoryError(), lambda: torch.empty(10**15), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has')]
    for error, wanted in zip(errors, ('not enough memory: ', '4000000000000000 bytes', '20.00 GiB')):
        def check(*args):
            if callable(error): error()
            raise error
        monkeypatch.setattr('multimodal.tasks.check_room', check)
        line = mistake(capsys, mm_train, 'shapes:60', str(tmp_path/'run'), epochs=1, set=SMALL, device='cpu')
        assert 'not enough memory' in line and wanted in line and not (tmp_path/'run').exists()


def test_a_run_is_not_overwritten(run, capsys):
    from multimodal.cli import mm_train
    before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    mistake(capsys, mm_train, 'shapes:60', str(run), epochs=1, set=SMALL)
    assert before == {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}


def test_a_run_starts_from_another(run, capsys, tmp_path, home):
    from multimodal.cli import mm_train
    mm_train('shapes:60', str(tmp_path/'next'), init=str(run), epochs=1, device='cpu')
    assert (tmp_path/'next'/'vocab.json').read_bytes() == (run/'vocab.json').read_bytes()
    mistake(capsys, mm_train, 'shapes:60', str(tmp_path/'other'), init=str(run), set=['embedding_dim=64'], device='cpu')
    mistake(capsys, mm_train, 'shapes:60', str(tmp_path/'other'), init=str(tmp_path/'nowhere'), device='cpu')


def test_a_captioner_is_fine_tuned(run, capsys, tmp_path, home):
    from multimodal.cli import mm_train
    from multimodal.checkpoint import load_tensors
    first, tuned, paid = (str(tmp_path/name) for name in ('first', 'tuned', 'paid'))
    mm_train('shapes:60', first, epochs=1, device='cpu', set=SMALL + ['trainable=none'])
    mm_train('shapes:60', tuned, task='finetune', init=first, epochs=1, device='cpu')
    kept = json.loads((tmp_path/'tuned'/'config.json').read_text())
    assert (kept['task'], kept['trainable'], kept['slow'], kept['optimizer']) == ('caption', 'last', 'encoder.trunk', 'muon')
    mm_train('shapes:60', paid, task='scst', init=tuned, epochs=1, device='cpu', set=['slow=encoder.trunk', 'slow_factor=0'])
    before, after, last = (load_tensors(tmp_path/name/'best'/'model.safetensors') for name in ('first', 'tuned', 'paid'))
    differs = lambda a, b, part: any(not a[k].equal(b[k]) for k in a if k.startswith(part) and k.endswith('weight'))
    assert differs(before, after, 'encoder.trunk') and not differs(after, last, 'encoder.trunk')
    assert differs(after, last, 'decoder')
    assert '--init RUN' in mistake(capsys, mm_train, 'shapes:60', str(tmp_path/'other'), task='finetune')
    assert not (tmp_path/'other').exists()


def test_a_captioner_learns_on_for_pay(run, capsys, tmp_path, home):
    from multimodal.cli import mm_caption, mm_train
    paid = tmp_path/'paid'
    mm_train('shapes:60', str(paid), task='scst', init=str(run), epochs=1, device='cpu', set=['samples=3'])
    assert 'dev_paid' in (paid/'history.jsonl').read_text()
    kept = json.loads((paid/'config.json').read_text())
    assert (kept['task'], kept['samples'], kept['captions_per_image'], kept['length_penalty']) == ('caption', 3, 0, .7)
    mm_caption([str(photos(home)[0])], run=str(paid), device='cpu')
    mm_train('shapes:60', str(tmp_path/'words'), task='caption', init=str(paid), epochs=1, device='cpu')
    kept = json.loads((tmp_path/'words'/'config.json').read_text())
    assert (kept['samples'], kept['length_penalty']) == (0, .35)
    other = str(tmp_path/'other')
    assert '--init RUN' in mistake(capsys, mm_train, 'shapes:60', other, task='scst')
    assert 'captions_per_image' in mistake(capsys, mm_train, 'shapes:60', other, task='scst', init=str(run), set=['captions_per_image=2'])
    assert 'samples=0' in mistake(capsys, mm_train, 'shapes:60', other, task='scst', init=str(run), set=['samples=0'], device='cpu')
    assert 'samples=2' in mistake(capsys, mm_train, 'shapes:60', other, task='caption', init=str(run), set=['samples=2', 'captions_per_image=0'], device='cpu')
    assert not Path(other).exists()


def test_run_folders_that_are_none_or_half_written(run, capsys, tmp_path, home):
    from multimodal.cli import mm_caption, mm_validate
    photo = [str(photos(home)[0])]
    mistake(capsys, mm_validate, str(tmp_path/'nowhere'))
    assert '--run demo/run' in mistake(capsys, mm_caption, photo, run=str(tmp_path/'nowhere'))
    for i, spoil in enumerate([lambda r: shutil.rmtree(r/'best'), lambda r: (r/'config.json').unlink(),
                               lambda r: (r/'config.json').write_text('{"lr": '), lambda r: (r/'config.json').write_text('[]'),
                               lambda r: (r/'vocab.json').write_text('[1, 2]'), lambda r: (r/'best'/'vocab.json').unlink(),
                               lambda r: (r/'best'/'model.safetensors').write_bytes(b'short'),
                               lambda r: (r/'best'/'model.safetensors').unlink()]):
        shutil.copytree(run, tmp_path/f'{i}')
        spoil(tmp_path/f'{i}')
        line = mistake(capsys, mm_caption, photo, run=str(tmp_path/f'{i}'), device='cpu')
        assert str(tmp_path/f'{i}') in line, line


def test_missing_split(run, capsys):
    from multimodal.cli import mm_validate
    assert 'testing' in mistake(capsys, mm_validate, str(run), split='testing', device='cpu')


def test_broken_photos_are_named_and_left_out(run, capsys, tmp_path, home):
    from multimodal.cli import mm_caption
    for p in photos(home): shutil.copy(p, tmp_path)
    good = sorted(tmp_path.iterdir())
    (tmp_path/'fake.jpg').write_text('no photo')
    (tmp_path/'short.jpg').write_bytes(good[0].read_bytes()[:300])
    (tmp_path/'notes.txt').write_text('not looked at')
    capsys.readouterr()
    mm_caption([str(tmp_path)], run=str(run), device='cpu', json=True)
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [r['image'] for r in rows] == list(map(str, good)) and 'fake.jpg' in err and 'short.jpg' in err
    assert all(set(r) == {'image', 'caption', 'logprob'} and r['caption'] and r['logprob'] < 0 for r in rows)
    assert 'fake.jpg' in mistake(capsys, mm_caption, [str(tmp_path/'fake.jpg')], run=str(run), device='cpu')
    assert 'gone.jpg' in mistake(capsys, mm_caption, [str(tmp_path/'gone.jpg')], run=str(run), device='cpu')
    (tmp_path/'nothing').mkdir()
    mistake(capsys, mm_caption, [str(tmp_path/'nothing')], run=str(run), device='cpu')
    for size in (0, -1): assert 'batch_size' in mistake(capsys, mm_caption, [str(good[0])], run=str(run), batch_size=size)


def test_a_run_of_short_captions_writes_short_captions(home, tmp_path, capsys):
    from multimodal.cli import mm_caption, mm_train, mm_validate
    mm_train('shapes:60', str(tmp_path/'short'), epochs=1, device='cpu', set=SMALL + ['max_words=3'])
    mm_validate(str(tmp_path/'short'), device='cpu', json=True)
    capsys.readouterr()
    mm_caption([str(p) for p in photos(home)], run=str(tmp_path/'short'), device='cpu', json=True)
    assert all(1 <= len(r['caption'].split()) <= 3 for r in json.loads(capsys.readouterr().out))


def test_flip_is_a_second_look_in_both_commands(run, home, capsys, monkeypatch):
    from multimodal.cli import mm_caption, mm_validate
    from multimodal.core import UserError
    from multimodal.generate import GenerateConfig
    from multimodal.runs import Run, load_run
    from multimodal.terminal import open_data
    written = {}
    for flip in False, True:
        capsys.readouterr()
        mm_caption([str(p) for p in photos(home)], run=str(run), flip=flip, device='cpu', json=True)
        written[flip] = json.loads(capsys.readouterr().out)
    assert [r['logprob'] for r in written[False]] != [r['logprob'] for r in written[True]]
    trained, data, twice = load_run(run, device='cpu'), open_data('shapes:60'), GenerateConfig(flip=True)
    (once, a), (rows, b) = trained.predict(data, 'test'), trained.predict(data, 'test', twice)
    assert a == b and [r['logprob'] for r in once] != [r['logprob'] for r in rows]   # the true words are read once
    again = trained.caption([r['image'] for r in rows], twice)
    assert [r['caption'] for r in rows] == [r['caption'] for r in again]
    def told(self, data, split, config, limits, judge): raise UserError(str(config))
    monkeypatch.setattr(Run, 'evaluate', told)
    assert 'flip=True' in mistake(capsys, mm_validate, str(run), flip=True, device='cpu')
    assert 'closer=True' in mistake(capsys, mm_validate, str(run), closer=True, device='cpu')
    assert 'closer=True' not in mistake(capsys, mm_validate, str(run), device='cpu')


def test_a_photo_that_is_not_there_is_said_before_weights_are_looked_for(tmp_path, capsys):
    from multimodal.cli import mm_caption
    said = mistake(capsys, mm_caption, [str(tmp_path/'gone.jpg')], weights=str(tmp_path/'none.pth'), device='cpu')
    assert 'gone.jpg: no such file' in said and 'none.pth' not in said


def test_sheets_are_pictures_and_their_folder_is_made(home, tmp_path, capsys):
    from multimodal.cli import mm_augment
    for name in ('sheet', 'sheet.xyz'): assert name in mistake(capsys, mm_augment, 'shapes:60', sheet=str(tmp_path/name))
    for name in ('sheet.png', 'sheet.JPEG'):
        mm_augment('shapes:60', sheet=str(tmp_path/'new'/name))
        assert (tmp_path/'new'/name).stat().st_size > 1000
    (tmp_path/'file').touch()
    assert 'file: is a file' in mistake(capsys, mm_augment, 'shapes:60', sheet=str(tmp_path/'file'/'sheet.png'))


@pytest.mark.parametrize('given', [{}, {'OMP_WAIT_POLICY': 'ACTIVE'}, {'GOMP_SPINCOUNT': '7'}])
def test_threads_wait_shortly_unless_the_user_says_otherwise(monkeypatch, given):
    from multimodal.terminal import short_waits
    for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'): monkeypatch.delenv(name, raising=False)
    for name, value in given.items(): monkeypatch.setenv(name, value)
    short_waits()
    seen = {k: os.environ[k] for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT') if k in os.environ}
    monkeypatch.delenv('GOMP_SPINCOUNT', raising=False)
    assert seen == (given or {'GOMP_SPINCOUNT': '10000'})


@pytest.mark.parametrize('stub', [False, True])
def test_json_is_all_there_is_on_standard_output_and_meteor_is_null_without_java(run, tmp_path, stub):
    "A stub is what some systems have: a `java` that does nothing but say where to get one."
    if stub:
        (tmp_path/'java').write_text('#!/bin/sh\necho no Java, please install one >&2\nexit 1\n')
        (tmp_path/'java').chmod(0o755)
    r = shell('mm_validate', run, '--json', '--beam', '1', env={**os.environ, 'PATH': f'{SCRIPTS}:{tmp_path}'})
    scores = json.loads(r.stdout)
    assert r.returncode == 0 and r.stderr.count('no Java here: METEOR is left out') == 1, r.stderr
    names = {'loss', 'perplexity', 'accuracy', 'bleu_1', 'bleu_2', 'bleu_3', 'bleu_4', 'rouge_l', 'meteor', 'cider'}
    assert names <= set(scores) and scores['loss'] > 0 and 0 <= scores['bleu_1'] <= 1
    assert scores['meteor'] is None and scores['floor']['bleu_1'] < scores['ceiling']['bleu_1']


def scenes(home, folder, captions=5, splits=('train', 'dev', 'test')):
    "Drawn scenes in a folder of their own, where they count as photos, with so many captions each and these splits."
    shutil.copytree(home/'shapes-60-48', folder)
    lines = (folder/'Flickr8k.token.txt').read_text().splitlines(keepends=True)
    (folder/'Flickr8k.token.txt').write_text(''.join(l for l in lines if int(l.split('#')[1][0]) < captions))
    for split in {'train', 'dev', 'test'} - set(splits): (folder/f'Flickr_8k.{split}Images.txt').unlink()
    return folder


@pytest.mark.parametrize('trainable', ['none', 'all'])
def test_photos_that_cannot_be_read_are_left_out_of_training_and_said(run, home, tmp_path, capsys, trainable):
    from multimodal.cli import mm_train, mm_validate
    from multimodal.datasets import load_dataset
    data = scenes(home, tmp_path/'photos')
    broken = [load_dataset(data)[split][0].image for split in ('train', 'test')]
    for photo in broken: photo.write_bytes(photo.read_bytes()[:200])
    (data/'Flicker8k_Dataset'/load_dataset(data)['train'][1].image.name).unlink()
    capsys.readouterr()
    mm_train(str(data), str(tmp_path/'run'), epochs=1, device='cpu', set=SMALL + ['below=1', 'weights=none', f'trainable={trainable}'])
    out, err = capsys.readouterr()
    assert 'left out 1: photo missing, such as' in out                     # found out while reading the lists
    assert broken[0].name in out + err and broken[1].name not in out + err
    mm_validate(str(tmp_path/'run'), beam=1, device='cpu', json=True)
    out, err = capsys.readouterr()
    n = len(load_dataset(data)['test'])
    assert json.loads(out)['n_images'] == n - 1 and f'left out 1 of {n} photos' in err and broken[1].name in err
    assert 'photos: left out 1: photo missing' in err


def test_without_floor_or_ceiling_it_says_why(run, home, tmp_path, capsys):
    from multimodal.cli import mm_validate
    for folder, how, missing in (('single', {'captions': 1}, 'ceiling'), ('test', {'splits': ('test',)}, 'floor')):
        data = str(scenes(home, tmp_path/folder, **how))
        capsys.readouterr()
        mm_validate(str(run), data, beam=1, device='cpu', json=True)
        out, err = capsys.readouterr()
        scores, other = json.loads(out), 'floor' if missing == 'ceiling' else 'ceiling'
        assert scores[missing] is None and scores[other]['bleu_1'] > 0 and f'no {missing}: ' in err and f'no {other}: ' not in err
        mm_validate(str(run), data, beam=1, device='cpu')
        names = {l.split()[0] for l in capsys.readouterr().out.splitlines()}
        assert missing not in names and other in names


def test_drawn_scenes_are_judged_by_their_truth(run, capsys):
    from multimodal.cli import mm_validate
    from multimodal.runs import load_run
    from multimodal.shapes import parse_caption, same_scene
    from multimodal.terminal import open_data
    rows, _ = load_run(run, device='cpu').predict(open_data('shapes:60'))
    truth = [(parse_caption(r['caption']), parse_caption(r['references'][0])) for r in rows]
    share = sum(bool(a) and same_scene(a, b) for a, b in truth)/len(rows)
    mm_validate(str(run), device='cpu')
    assert f'wholly true: {share:.1%}' in capsys.readouterr().out


def test_names_that_no_terminal_can_show(run, home, tmp_path):
    "Photos whose names are no UTF-8, on a terminal that knows ASCII only."
    shutil.copy(photos(home)[0], os.fsencode(tmp_path) + b'/caf\xe9.jpg')
    for args in ([], ['--json']):
        r = shell('mm_caption', tmp_path, '--run', run, '--device', 'cpu', *args,
                  env={**os.environ, 'PYTHONIOENCODING': 'ascii:strict'})
        assert r.returncode == 0 and 'caf' in r.stdout, r.stderr
    assert 'caf' in json.loads(r.stdout)[0]['image']


def test_few_photos_without_lists_of_splits(home, tmp_path, capsys):
    from multimodal.cli import mm_train
    from multimodal.datasets import split_by_name
    few = [p for p in photos(home, 60) if split_by_name(p.name) == 'train'][:3]
    (tmp_path/'few').mkdir()
    for p in few: shutil.copy(p, tmp_path/'few')
    (tmp_path/'few'/'captions.txt').write_text('image,caption\n' + ''.join(f'{p.name},a thing\n' for p in few))
    assert 'too few photos' in mistake(capsys, mm_train, str(tmp_path/'few'), str(tmp_path/'run'), set=SMALL + ['below=1'])


def test_numbers_are_kept_with_all_that_they_depend_on(run, home, tmp_path, capsys):
    from multimodal.cli import mm_validate
    assert '.json' in mistake(capsys, mm_validate, str(run), out=str(tmp_path/'numbers.txt'))
    mm_validate(str(run), out=str(tmp_path/'kept'/'numbers.json'), beam=1, json=True)
    printed, text = json.loads(capsys.readouterr().out), (tmp_path/'kept'/'numbers.json').read_text()
    kept = json.loads(text)
    assert kept['scores'] == printed and kept['data']['splits']['test']['photos'] == printed['n_images']
    assert kept['model']['settings']['image_size'] == 32 and len(kept['data']['sha256']) == len(kept['model']['learned_sha256']) == 64
    assert str(tmp_path) not in text and str(home) not in text and str(run) not in text


def test_scores_come_between_floor_and_ceiling(capsys, tmp_path):
    from multimodal.cli import mm_score
    lines = {'hyp': 'a dog runs on grass\na man rides a bike\n', 'one': 'a dog runs over the grass\na man on a bike\n',
             'two': 'the dog is running on grass\na man rides his bike\n'}
    for name, text in lines.items(): (tmp_path/name).write_text(text)
    hyp, one, two = (str(tmp_path/name) for name in lines)
    mm_score(hyp, [one, two])
    shown = capsys.readouterr().out.splitlines()
    assert [l.split()[0] for l in shown[2:]] == ['floor', 'these', 'one', 'ceiling', '2'] and '2 different captions' in shown[-1]
    mm_score(hyp, [one], json=True)
    out, err = capsys.readouterr()
    assert json.loads(out)['ceiling'] is None and 0 < json.loads(out)['floor']['bleu_1'] < 1 and 'no ceiling: ' in err


def test_the_captioner_that_comes_along(run, home, tmp_path, capsys, monkeypatch):
    import torch
    from torchvision.models import resnet18
    from multimodal.cli import mm_caption
    from multimodal.runs import shipped_captioner
    photo, weights = str(photos(home)[0]), tmp_path/'some.pth'
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), weights)
    mm_caption([photo], weights=str(weights), device='cpu', json=True)
    out, err = capsys.readouterr()
    assert len(json.loads(out)[0]['caption'].split()) > 2 and 'trained on another ResNet18' in err
    assert '--run RUN' in mistake(capsys, mm_caption, [photo], weights=str(weights), neighbours=True, device='cpu')
    def offline(*args, **kw): raise OSError('no network')
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', offline)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    assert 'give the path' in mistake(capsys, mm_caption, [photo], device='cpu')
    files = [p for p in shipped_captioner().rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    for p in files: assert b'/tmp' not in (text := p.read_bytes()[:5000]) and b'/home' not in text, p


def test_the_card_of_the_captioner_is_what_was_measured():
    from multimodal.core import read_json
    from multimodal.download import checksum_of
    from multimodal.results import model_card
    from multimodal.runs import shipped_captioner
    folder, result = shipped_captioner(), read_json(Path(__file__).parent.parent/'results'/'flickr8k_shipped.json')
    note = read_json(folder/'best'/'config.json')['note']
    assert (folder/'README.md').read_text() == model_card(result, how=note['how'], trunk=note['trunk'])
    assert result['model']['learned_sha256'] == checksum_of(folder/'best'/'model.safetensors')
    assert result['scores']['split'] == 'test' and result['scores']['n_images'] == 1000


def test_neighbours_choose(run, home, tmp_path, capsys, monkeypatch):
    from multimodal.cli import mm_caption, mm_train, mm_validate
    import shutil
    mine, shown = tmp_path/'mine', [str(p) for p in photos(home, 2)]
    shutil.copytree(run, mine)
    ask = lambda **kw: (mm_caption(shown, run=str(mine), device='cpu', json=True, **kw), json.loads(capsys.readouterr().out))[1]
    plain, asked = ask(), ask(neighbours=True)
    assert (mine/'best'/'neighbours.safetensors').exists() and [r['image'] for r in asked] == [r['image'] for r in plain]
    said = lambda **kw: (mm_validate(str(mine), device='cpu', json=True, **kw), json.loads(capsys.readouterr().out))[1]
    assert said()['loss'] == said(neighbours=True)['loss']
    config = json.loads((mine/'config.json').read_text())
    (mine/'config.json').write_text(json.dumps({**config, 'data': str(tmp_path/'gone')}))
    assert f'remove {mine}/SHA256SUMS' in mistake(capsys, mm_caption, shown, run=str(mine), neighbours=True, device='cpu')
    (mine/'SHA256SUMS').unlink()                                             # changed on purpose
    assert ask(neighbours=True) == asked                                     # they are kept
    assert [r['image'] for r in ask(neighbours=True, draws=3)] == [r['image'] for r in asked]
    assert 'add --neighbours' in mistake(capsys, mm_caption, shown, run=str(mine), draws=3, device='cpu')
    assert 'add --neighbours' in mistake(capsys, mm_validate, str(run), draws=3, device='cpu')
    assert '2 or more' in mistake(capsys, mm_caption, shown, run=str(mine), neighbours=True, beam=1, device='cpu')
    (mine/'best'/'neighbours.safetensors').unlink()
    assert 'gone' in mistake(capsys, mm_caption, shown, run=str(mine), neighbours=True, device='cpu')
    (mine/'config.json').write_text(json.dumps({**config, 'data': ''}))
    assert 'training data' in mistake(capsys, mm_caption, shown, run=str(mine), neighbours=True, device='cpu')
    mm_train('shapes:60', str(tmp_path/'finder'), task='retrieve', epochs=1, device='cpu', set=SMALL[:3])
    assert 'no captioner' in mistake(capsys, mm_validate, str(tmp_path/'finder'), neighbours=True, device='cpu')


def test_captioners_write_together(run, home, tmp_path, capsys):
    from multimodal.cli import mm_caption, mm_train, mm_validate
    other, shown, file = str(tmp_path/'other'), [str(p) for p in photos(home, 2)], tmp_path/'both.json'
    mm_train('shapes:60', other, epochs=1, seed=1, device='cpu', set=SMALL)
    mm_validate(str(run), also=other, out=str(file), device='cpu')
    kept = json.loads(file.read_text())
    assert [m['settings']['seed'] for m in (kept['model'], *kept['model']['others'])] == [0, 1]
    capsys.readouterr()
    losses = [(mm_validate(r, device='cpu', json=True), json.loads(capsys.readouterr().out))[1]['loss'] for r in (str(run), other)]
    assert kept['scores']['loss'] < sum(losses)/2 and 'others' not in json.dumps(losses)
    mm_caption(shown, run=str(run), also=other, neighbours=True, device='cpu', json=True)
    assert [r['image'] for r in json.loads(capsys.readouterr().out)] == shown
    assert 'one alone explain' in mistake(capsys, mm_caption, shown, run=str(run), also=other, explain=str(tmp_path/'looks'), device='cpu')
    assert not (tmp_path/'looks').exists()
    assert 'nowhere' in mistake(capsys, mm_caption, shown, run=str(run), also=f'{other},{tmp_path}/nowhere', device='cpu')
    finder = str(tmp_path/'finder')
    mm_train('shapes:60', finder, task='retrieve', epochs=1, device='cpu', set=SMALL[:3])
    assert 'no captioner' in mistake(capsys, mm_validate, finder, also=other, device='cpu')
    assert '--task retrieve' in mistake(capsys, mm_validate, str(run), also=finder, device='cpu')


def test_captions_are_explained_by_pictures(run, home, tmp_path, capsys):
    from multimodal.cli import mm_caption
    shown = [str(p) for p in photos(home, 2)]
    (tmp_path/'broken.jpg').write_text('no photo')
    mm_caption([*shown, str(tmp_path/'broken.jpg')], run=str(run), explain=str(tmp_path/'looks'), device='cpu', json=True)
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [r['image'] for r in rows] == shown and 'broken.jpg' in err
    assert {Path(r['figure']) for r in rows} == set((tmp_path/'looks').iterdir())
    plain = (mm_caption(shown, run=str(run), device='cpu', json=True), json.loads(capsys.readouterr().out))[1]
    assert [r['caption'] for r in rows] == [r['caption'] for r in plain]
    for r in rows: assert [w['word'] for w in r['words']] == r['caption'].split() and all(0 < w['probability'] <= 1 for w in r['words'])


def test_what_mm_caption_prints_can_be_scored(capsys, tmp_path):
    from multimodal.cli import mm_score
    ours = [{'image': f'some/where/{n}.jpg', 'caption': c, 'logprob': -1.} for n, c in (('b', 'a big cat'), ('a', 'a dog'))]
    people = {'images': [{'id': 7, 'file_name': 'a.jpg'}, {'id': 8, 'file_name': 'val2014/b.jpg'}],
              'annotations': [{'image_id': 7, 'id': 1, 'caption': 'a dog'}, {'image_id': '8', 'id': 2, 'caption': 'a big cat'}]}
    (tmp_path/'ours.json').write_text(json.dumps(ours))
    (tmp_path/'people.json').write_text(json.dumps(people))
    mm_score(str(tmp_path/'ours.json'), [str(tmp_path/'people.json')], json=True)
    assert json.loads(capsys.readouterr().out)['bleu_1'] == pytest.approx(1)
    (tmp_path/'ours.json').write_text(json.dumps([{'image': 'c.jpg', 'caption': 'a dog'}]))
    assert 'c.jpg is not in' in mistake(capsys, mm_score, str(tmp_path/'ours.json'), [str(tmp_path/'people.json')])


def test_score_of_files_that_do_not_fit(capsys, tmp_path):
    from multimodal.cli import mm_score
    def file(name, text): (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode()); return str(tmp_path/name)
    hyp, ref = file('hyp.txt', 'a dog\na cat\n'), file('ref.txt', 'the dog\nthe cat\n')
    assert 'No such file' in mistake(capsys, mm_score, hyp, [str(tmp_path/'gone.txt')])
    assert 'ends at 2' in mistake(capsys, mm_score, hyp, [ref, file('one.txt', 'a dog\n')])
    assert 'line 2' in mistake(capsys, mm_score, hyp, [file('blank.txt', 'a dog\n\n')])
    assert 'UTF-8' in mistake(capsys, mm_score, file('latin.txt', 'ein Hündchen\n'.encode('latin-1')), [ref])
    assert 'no captions' in mistake(capsys, mm_score, file('empty.txt', ''), [file('empty2.txt', '')])
    results, people = file('r.json', '[{"image_id": 1, "caption": "a dog"}]'), '{"annotations": [{"image_id": 2, "caption": "a dog"}]}'
    assert 'image 1' in mistake(capsys, mm_score, results, [file('p.json', people)])
    assert 'no captions' in mistake(capsys, mm_score, file('none.json', '[]'), [file('p.json', people)])
    assert 'both' in mistake(capsys, mm_score, results, [ref])
    assert 'broken.json' in mistake(capsys, mm_score, file('broken.json', '[{'), [file('p.json', people)])
    assert 'entry 1' in mistake(capsys, mm_score, file('odd.json', '[{"image_id": 1}]'), [file('p.json', people)])
    mistake(capsys, mm_score, str(tmp_path), [ref])


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full')
def test_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path/'a.txt').write_text('a dog\n')
    with open('/dev/full', 'w') as full:
        r = subprocess.run([SCRIPTS/'mm_score', tmp_path/'a.txt', tmp_path/'a.txt', '--json'], stdout=full, stderr=subprocess.PIPE,
                           text=True, timeout=120)
    assert r.returncode == 2 and 'No space left' in r.stderr.splitlines()[-1] and 'Traceback' not in r.stderr, r.stderr


def test_ctrl_c_that_a_library_hid_is_still_ctrl_c(capsys):
    from multimodal.terminal import command
    def mm_import():
        try: raise KeyboardInterrupt
        except KeyboardInterrupt as e: raise ImportError('numpy seems to be broken') from e
    def mm_wrong(): raise ImportError('no module of that name')
    with pytest.raises(SystemExit) as e: command(mm_import)()
    assert e.value.code == 130 and capsys.readouterr().err == 'mm_import: stopped\n'
    with pytest.raises(ImportError): command(mm_wrong)()


def test_a_pipe_is_no_photo_and_nobody_waits_for_it(run, tmp_path, capsys):
    from multimodal.cli import mm_caption
    os.mkfifo(tmp_path/'pipe.jpg')
    assert 'pipe' in mistake(capsys, mm_caption, [str(tmp_path/'pipe.jpg')], run=str(run), device='cpu')


def test_a_mistyped_weights_file_is_said_even_where_it_is_not_needed(run, capsys):
    from multimodal.cli import mm_validate
    assert 'gone.pth: no such file' in mistake(capsys, mm_validate, str(run), weights='gone.pth', device='cpu')


def test_ctrl_c_says_how_to_go_on_and_resuming_does(home, tmp_path):
    "Status 130, a line that can be pasted, and a run that is finished by it."
    command = [SCRIPTS/'mm_train', 'shapes:60', tmp_path/'run', '--epochs', '200', '--device', 'cpu', '--set', *SMALL]
    p = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path/'run'/'last').exists() or p.poll() is not None: break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130, err
    assert f'mm_train shapes:60 {tmp_path/"run"} --resume' in err.splitlines()[-1]
    assert (tmp_path/'run'/'last').is_dir() and (tmp_path/'run'/'config.json').is_file()
    r = shell('mm_train', 'shapes:60', tmp_path/'run', '--resume', '--epochs', '3')
    assert r.returncode == 2 and 'epochs' in (line := r.stderr.splitlines()[-1]) and 'init' in line


def test_what_cannot_be_kept_is_said_before_anything_is_measured(run, home, capsys, tmp_path, monkeypatch):
    from multimodal.cli import mm_validate
    monkeypatch.setattr('multimodal.cli.measure', lambda *args: pytest.fail('was measured'))
    (tmp_path/'folder.json').mkdir()
    for out in ('/proc/x.json', str(tmp_path/'folder.json'), str(tmp_path/'x.txt')):
        assert out in mistake(capsys, mm_validate, str(run), out=out, device='cpu')


def test_closed_output_is_no_reason_to_fail(tmp_path):
    (tmp_path/'a.txt').write_text('a dog\n')
    r = subprocess.run(f'{SCRIPTS/"mm_score"} {tmp_path/"a.txt"} {tmp_path/"a.txt"} >&-', shell=True, stderr=subprocess.PIPE, text=True)
    assert r.returncode == 0 and 'Traceback' not in r.stderr
    with open('/dev/full', 'w') as full: assert subprocess.run([SCRIPTS/'mm_score', 'nowhere', 'nowhere'], stderr=full).returncode == 2


def test_a_second_ctrl_c_does_not_wait_for_threads():
    code = ('import threading, time\nfrom multimodal.terminal import command\nthread = threading.Thread(target=time.sleep, args=(60,))\n'
            'def slow():\n    thread.start()\n    try: print("begun", flush=True); time.sleep(60)\n'
            '    finally: print("waiting", flush=True); thread.join()\ncommand(slow)()')
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for kind, line in (signal.SIGTERM, 'begun\n'), (signal.SIGINT, 'waiting\n'):
        assert p.stdout.readline() == line
        p.send_signal(kind)
    assert p.communicate(timeout=10)[1] == 'stopped at once\n' and p.returncode == 130
