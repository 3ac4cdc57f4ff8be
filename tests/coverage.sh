#!/usr/bin/env bash
# Line and branch coverage of csrc/ by the tests: `tests/coverage.sh`. Needs gcc, and the extras `test` and `dev`.
# Everything happens in a copy; fails below 95 % of the lines.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -d "$top/../shared/data" ]; then
	TRACEDBG_DATA=${TRACEDBG_DATA:-$(cd "$top/../shared/data" && pwd)}
	export TRACEDBG_DATA
fi
(cd "$top" && tar c --exclude=build --exclude='*.so' --exclude=.git csrc tracedbg tests traces pyproject.toml README.md LICENSE) | tar x -C "$work"
cd "$work"
sed -i 's/, "-flto=auto"\]/]/; /^extra-link-args/d; s/"-O2"/"-O0", "--coverage"/' pyproject.toml
LDFLAGS=--coverage "$python" -c "from setuptools import setup; setup(script_args=['-q', 'build_ext', '--inplace'])" >/dev/null
export PYTHONPATH=$work
failed=0
TRACEDBG_MODEL_SEEDS=${TRACEDBG_MODEL_SEEDS:-1000} "$python" -m pytest -q -p no:cacheprovider tests/test_replay.py tests/test_model.py \
	tests/test_model_answers.py tests/test_model_rules.py tests/test_model_rules_masks.py tests/test_model_rules_fred.py \
	tests/test_cases.py tests/test_bochs.py tests/test_truth.py tests/test_storm.py tests/test_search.py \
	tests/test_timeline.py tests/test_history.py tests/test_follow.py tests/test_lives.py \
	tests/test_merge.py tests/test_xentrace_model.py tests/test_qemu_scan.py tests/test_qemu_times.py \
	tests/test_tracedat_*.py tests/test_pt_*.py || failed=$?
"$python" -m gcovr --root "$work" --filter 'csrc/' --txt-metric branch --print-summary "$work/build" | sed '/^-*$/d'
"$python" -m gcovr --root "$work" --filter 'csrc/' --fail-under-line 95 "$work/build"
exit "$failed"
