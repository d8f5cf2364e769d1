#!/usr/bin/env bash
# Installs what the program needs on a Colab runtime, with the jax of its accelerator. Run by the
# first cell of the notebooks, before jax is imported.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=""
if compgen -G "/dev/accel*" > /dev/null || compgen -G "/dev/vfio/*" > /dev/null; then
    extra="[tpu]"
elif command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then
    # The major version of CUDA that the driver has.
    cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p' | head -1)
    extra="[cuda$((cuda >= 13 ? 13 : 12))]"
fi
pip install --quiet --upgrade "jax${extra}>=0.10,<0.12" -r requirements.txt
python -c "import jax; print('jax', jax.__version__, 'on', jax.devices()[0].device_kind)"
