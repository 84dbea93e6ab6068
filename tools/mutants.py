"""Would anybody notice? Breaks some thirty chosen lines of the package, one at a time, and runs the test that should say so.

    python tools/mutants.py                                        # all of them, some five minutes on one core
    python tools/mutants.py causal padding                         # those with one of these words in their name
    python tools/mutants.py --out results/reliability.json      # also keep what came out

The package is copied to a temporary folder and broken there; the project's own files are not touched. A line is found by a
fragment of it, which must occur exactly once in its module. A mutant is killed when its test fails, and survives when its
test passes. First of all, the tests must pass on the copy as it is. Nothing that is killed by a failing import counts.
"""
import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 180   # seconds for a test


class Mutant(NamedTuple):
    name: str    # what is broken, in plain words
    module: str  # of the package
    old: str     # a fragment that occurs once in it
    new: str     # what stands there instead
    test: str    # file::test that should fail, in tests/


MUTANTS = [
    # what a word may see
    Mutant('causal mask: a word sees the next one', 'attention', '.tril(total - T)', '.tril(total - T + 1)',
           'test_attention.py::test_causal_mask_row_by_row'),
    Mutant('causal attention: no mask where all words come at once', 'attention', 'is_causal=causal and 1 < T == P',
           'is_causal=False', 'test_numbers.py::test_a_later_word_or_padding_never_changes_an_earlier_logit'),
    Mutant('padding mask: fillers are looked at', 'attention', 'return (tokens != pad)[:, None, None]',
           'return (tokens == tokens)[:, None, None]', 'test_attention.py::test_masks_hide_and_weights_add_up'),
    # the loss
    Mutant('targets are not shifted', 'recipe', 'so_far, targets = tokens[:, :-1], tokens[:, 1:]',
           'so_far, targets = tokens[:, :-1], tokens[:, :-1]', 'test_runs.py::test_the_loss_is_cross_entropy_without_padding'),
    Mutant('padding counts in the loss', 'recipe', 'real = targets != PAD', 'real = targets >= PAD',
           'test_runs.py::test_the_loss_is_cross_entropy_without_padding'),
    Mutant('padding counts in the loss of metrics', 'metrics', 'ignore_index=PAD', 'ignore_index=-100',
           'test_numbers.py::test_loss_and_accuracy_of_metrics_leave_padding_out'),
    Mutant('label smoothing adds instead of moving', 'recipe', 'smoothing * (spread - plain)', 'smoothing * spread',
           'test_runs.py::test_label_smoothing_is_torchs_and_for_training_only'),
    # learning
    Mutant('gradients are not clipped', 'training', 'self.config.clip or math.inf', 'math.inf',
           'test_training.py::test_the_gradient_is_never_longer_than_allowed_and_vectors_do_not_decay'),
    Mutant('averaged weights follow the newest ones', 'optim', 'mean.lerp_(now, 1 - d)', 'mean.lerp_(now, d)',
           'test_training.py::test_averaged_weights_follow_the_rule'),
    Mutant('biases and norms decay', 'optim', 'groups.setdefault((p.ndim >= 2, is_slow), [])',
           'groups.setdefault((p.ndim >= 1, is_slow), [])',
           'test_training.py::test_the_gradient_is_never_longer_than_allowed_and_vectors_do_not_decay'),
    Mutant('the learning rate falls too early', 'optim', '(progress - warmup) / (1 - warmup)', 'progress',
           'test_training.py::test_the_schedule_rises_then_falls_within_bounds'),
    Mutant('dropout hides the same numbers in every step', 'optim', "random.Random(f'{seed}/{step}'", "random.Random(f'{seed}/'",
           'test_numbers.py::test_each_step_and_seed_has_a_luck_of_its_own'),
    Mutant('the worst model is kept as the best', 'training', "dev['loss'] < s.best", "dev['loss'] > s.best",
           'test_training.py::test_best_is_the_lowest_validation_loss_and_of_the_averaged_weights'),
    Mutant('training stops an epoch too late', 'training', 's.stale >= config.patience', 's.stale > config.patience',
           'test_training.py::test_patience_counts_epochs_without_improvement'),
    Mutant('validation with dropout', 'training', 'model, sums = each.eval(), {}', 'model, sums = each.train(), {}',
           'test_numbers.py::test_validation_is_without_dropout'),
    Mutant('parts of a batch: a mean of sums over parts, not over words', 'threads', 'p.grad = g.div_(sum(counts))',
           'p.grad = g.div_(len(counts))',
           'test_numbers.py::test_the_parts_of_a_batch_give_the_gradient_of_the_mean_over_all_its_items'),
    # words and data
    Mutant('a word must come once more often to be known', 'text', 'if n >= min_count)', 'if n > min_count)',
           'test_numbers.py::test_a_word_that_comes_just_often_enough_is_known'),
    Mutant('no end is learned', 'text', 'tokenize(text)[:max_len]), EOS]', 'tokenize(text)[:max_len]), UNK]',
           'test_text.py::test_round_trip'),
    Mutant('reading goes on after the end', 'text', 'if i == EOS: break', 'if i == EOS: continue',
           'test_numbers.py::test_what_comes_after_the_end_is_not_read'),
    Mutant('the split by name gives away more photos', 'datasets', 'int(digest, 16) % 10', 'int(digest, 16) % 5',
           'test_datasets.py::test_split_by_name_is_80_10_10_for_ever'),
    Mutant('a photo gets the features of its neighbour', 'features', 'every[row]*self.row_bytes',
           'every[row - 1]*self.row_bytes', 'test_features.py::test_the_cache_says_what_the_encoder_says'),
    Mutant('a mirrored photo keeps its left and right in words', 'augment', '[flip_caption(c) for c in captions]',
           '[c for c in captions]', 'test_augment.py::test_scenes_stay_true_at_full_strength'),
    Mutant('a wrong checksum passes', 'download', 'return None if found == checksum.lower() else',
           'return None if found else', 'test_download.py::test_a_wrong_file_that_is_there_is_replaced_by_the_right_one_only'),
    # writing
    Mutant('the length penalty counts another length', 'generate', '(t + 1)**config.length_penalty',
           '(t + 2)**config.length_penalty', 'test_numbers.py::test_a_beam_as_wide_as_the_vocabulary_finds_the_best_by_brute_force'),
    Mutant('drafts of a beam go on from another draft', 'generate', '[:, None]*k + parent', '[:, None]*k + 0*parent',
           'test_numbers.py::test_a_beam_as_wide_as_the_vocabulary_finds_the_best_by_brute_force'),
    Mutant('top-p cuts a word too early', 'generate', 'p.cumsum(-1) - p >= config.top_p', 'p.cumsum(-1) >= config.top_p',
           'test_generate.py::test_sampling_frequencies'),
    Mutant('guidance begins at the sentence', 'text2image', 'guess = blind + guidance*(told - blind)',
           'guess = told + guidance*(told - blind)', 'test_painter.py::test_guidance_goes_on_from_no_sentence_through_the_sentence'),
    # scores
    Mutant('CIDEr: every n-gram counts as if one photo more had it', 'cider', 'self.highest - np.log(photos)',
           'self.highest - np.log(photos + 1)', 'test_cider.py::test_equal_to_coco_caption'),
    Mutant('no brevity penalty', 'intervals', 'np.exp(np.minimum(0, 1 - 1/ratio))', 'np.exp(0*ratio)',
           'test_intervals.py::test_sums_give_what_the_scorer_gives'),
    Mutant('photos are resampled without replacement', 'intervals', 'rng.integers(N, size=(k, N))',
           'rng.permuted(np.tile(np.arange(N), (k, 1)), axis=1)',
           'test_intervals.py::test_an_interval_is_reproduced_by_its_seed_and_holds_the_score'),
    Mutant('SCST: a caption is compared with those of other photos', 'scst', 'pay.mean(1, keepdim=True)', 'pay.mean()',
           'test_scst.py::test_advantages_compare_with_the_others'),
    Mutant('vectors of photos and captions keep their lengths', 'retrieval', 'return F.normalize(x, dim=-1)', 'return x',
           'test_numbers.py::test_both_towers_give_vectors_of_length_one'),
]


def source(mutant: Mutant, package: Path = ROOT/'multimodal') -> str:
    "The text of a mutant's module. Raises `ValueError` where the fragment does not occur exactly once"
    text = (package/f'{mutant.module}.py').read_text(encoding='utf-8')
    if (n := text.count(mutant.old)) != 1: raise ValueError(f'{mutant.module}: {mutant.old!r} occurs {n} times, not once')
    return text


@contextmanager
def copied():
    "A copy of the package in a temporary folder"
    with tempfile.TemporaryDirectory(prefix='mutants-') as folder:
        shutil.copytree(ROOT/'multimodal', Path(folder)/'multimodal', ignore=shutil.ignore_patterns('__pycache__'))
        yield Path(folder)


def run(folder: Path, tests: list) -> tuple:  # exit status, names of the tests that failed, what was printed
    "Run tests against the package in a folder"
    env = {**os.environ, 'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1', 'OMP_NUM_THREADS': '1',
           'HYPOTHESIS_STORAGE_DIRECTORY': str(folder/'hypothesis')}
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-rf', '--durations=0', '-p', 'no:cacheprovider', '-c', ROOT/'pytest.ini',
               *(ROOT/'tests'/t for t in tests)]
    try: r = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired: return 1, ['(no end)'], ''
    return r.returncode, re.findall(r'^FAILED \S*?([\w.]+::[^\s\[]+)', r.stdout, re.M), r.stdout + r.stderr


def try_out(mutant: Mutant, folder: Path) -> dict:  # what happened
    "Break a line in a copy, run its test, mend the line"
    file, text, began = folder/'multimodal'/f'{mutant.module}.py', source(mutant, folder/'multimodal'), time.monotonic()
    file.write_text(text.replace(mutant.old, mutant.new), encoding='utf-8')
    try: status, failed, said = run(folder, [mutant.test])
    finally: file.write_text(text, encoding='utf-8')
    outcome = 'killed' if status == 1 and failed else 'survived' if status == 0 else f'no answer: {said[-500:]}'
    return {**mutant._asdict(), 'outcome': outcome, 'failed': failed, 'seconds': round(time.monotonic() - began, 1)}


def check_copy(folder: Path, tests: list):
    "Raise `SystemExit` unless the copy is what is tested, and passes"
    env = {**os.environ, 'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
    where = subprocess.run([sys.executable, '-c', 'import multimodal; print(multimodal.__file__)'], cwd=folder, env=env,
                           capture_output=True, text=True).stdout.strip()
    if not where.startswith(str(folder)): raise SystemExit(f'tests would not see the copy but {where}')
    for test in tests:
        status, failed, said = run(folder, [test])
        if status: raise SystemExit(f'{test} fails on the package as it is: {failed or said[-800:]}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('words', nargs='*', help='only mutants with one of these words in their name')
    parser.add_argument('--out', help='JSON file for what came out')
    args = parser.parse_args()
    wanted = [m for m in MUTANTS if not args.words or any(w in m.name for w in args.words)]
    if args.out and args.words: raise SystemExit('--out is for all of them')
    for m in wanted: source(m)
    began, results = time.monotonic(), []
    with copied() as folder:
        check_copy(folder, sorted({m.test for m in wanted}))
        print(f'{len(wanted)} mutants; their tests pass on the package as it is ({time.monotonic() - began:.0f} s)', flush=True)
        for m in wanted:
            results.append(r := try_out(m, folder))
            print(f'{r["seconds"]:6.1f} s  {r["outcome"]:9} {m.name}  ({m.module}, {m.test})', flush=True)
    killed = sum(r['outcome'] == 'killed' for r in results)
    print(f'{killed} of {len(results)} killed, {time.monotonic() - began:.0f} s')
    if args.out:
        from multimodal.core import read_json, write_json
        versions = {'python': platform.python_version(), **{p: version(p) for p in ('multimodal', 'torch', 'numpy', 'pytest', 'hypothesis')}}
        others = read_json(args.out) if Path(args.out).exists() else {}
        write_json(args.out, {**others, 'mutants': {'killed': killed, 'of': len(results), 'seconds': round(time.monotonic() - began),
                                          'date': str(date.today()), 'command': 'python tools/mutants.py --out ' + args.out,
                                          'cores': os.cpu_count(), 'versions': versions, 'each': results}})
    raise SystemExit(killed < len(results))


if __name__ == '__main__': main()
