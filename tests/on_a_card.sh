#!/usr/bin/env bash
# What only a machine with a GPU can say, in under eight minutes: tests/on_a_card.sh [FOLDER]. Writes into FOLDER
# (build/card) what the tests marked gpu and the benches print; wheels that the machine lacks lie in FOLDER/wheels, data in
# FOLDER/data. Ray is not needed, and not tried.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/card}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD" FEDSIM_DATA="${FEDSIM_DATA:-$PWD/$out/data}"
compgen -G "$out/wheels/*.whl" > /dev/null && $python -m pip install --quiet --no-deps "$out"/wheels/*.whl
bench() { name=$1; shift; timeout 100 $python -m fedsim bench --device cuda --rounds 20 "$@" --json > "$out/$name.json" 2> "$out/$name.err" || tail -1 "$out/$name.err"; }
trained() { timeout 60 $python -m fedsim run "$@" 2>&1 | tail -3; }

$python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' | tee "$out/card.txt"
timeout 180 $python -m pytest -n 0 -m gpu tests > "$out/tests.txt" 2>&1
tail -5 "$out/tests.txt"
for model in lenet5 femnist_cnn resnet8; do bench $model --model $model; done
bench skewed --model lenet5 --skew 0.3
bench fedmix --model lenet5 --method fedmix
bench thousand --model lenet5 --cohort 1000
bench tf32 --model femnist_cnn --tf32
for device in cpu cuda; do
    rm -rf "$out/$device"
    /usr/bin/env time -f "default run on $device: %e s" $python -m fedsim run engine.device=$device out="$out/$device" 2>&1 | tail -2
done | tee "$out/default.txt"
for slots in 0 1 8 32; do
    rm -rf "$out/slots-$slots"
    trained model=lenet5 workload=blobs 'workload.input_shape=[1,28,28]' rounds=3 engine.device=cuda engine.slots=$slots out="$out/slots-$slots" > /dev/null
    $python -c 'import json, sys; print(sys.argv[1], json.load(open(sys.argv[1] + "/summary.json"))["weights_sha256"])' "$out/slots-$slots"
done | tee "$out/bytes.txt"
