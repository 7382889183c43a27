#!/usr/bin/env bash
# What a graphics card must show, in about eight minutes and without a network: the tests that need one, then a report
# in benchmarks/results/. Without a card the same sections run on the CPU with small models.
#   PYTHON=python3 bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" WANDB_MODE=disabled OMP_WAIT_POLICY=PASSIVE
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  timeout 120 "$python" -m pytest -q -m gpu tests
  passed=$?
  runs="$(mktemp -d)"
  timeout 90 "$python" -m genfound.train runs="$runs" model=nit_b alignment=none data=shapes tokenizer=pixel model.patch_size=2 model.channels=3 \
    data.max_tokens=16384 batch.packs=1 trainer.max_steps=20 trainer.log_every_n_steps=5 logger=jsonl \
    callbacks.preview.every=1000000000 callbacks.validation.images=64 || passed=1
  rm -rf "$runs"
  timeout 270 "$python" -m benchmarks.throughput --models nit_b,dit_b,dit_xl,nit_xl --tokens 16384 --repeats 5 \
    --sections rates,attention,experts,rope,steps,layouts,kernels || passed=1
else
  passed=0
  "$python" -m benchmarks.throughput --models dit_tiny,nit_tiny --tokens "${TOKENS:-512}" --repeats 2 || passed=1
fi
exit $passed
