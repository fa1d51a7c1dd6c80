#!/usr/bin/env bash
# Tensors pickled beside megatron-core 0.19.2 are refused by SGLang 0.5.23's reader of weight updates.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3.12}" -m venv "$place/venv"
pip() { "$place/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 torchvision==0.28.0 megatron-core==0.19.2 transformers==5.19.0 numpy==2.4.6
pip sglang==0.5.23 --no-deps
pip aiohttp==3.14.5 fastapi==0.165.0 ipython==9.18.1 msgspec==0.22.0 orjson==3.13.0 psutil==7.2.2 \
    pybase64==1.5.1 python-multipart==0.0.34 pyzmq==27.3.0 scipy==1.17.1 soundfile==0.13.1 zstandard==0.25.0 requests==2.34.2
cat > "$place/show.py" <<'PY'
import pickle
import sys
from importlib.metadata import version

import torch
from sglang.srt.utils import MultiprocessingSerializer

weights = [("model.norm.weight", torch.ones(4))]
before = pickle.dumps(weights)
import megatron.core.dist_checkpointing  # noqa: E402, F401

after = pickle.dumps(weights)


def read(data):
    try:
        return f"read: {MultiprocessingSerializer.deserialize(data)[0][0]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


print(f"megatron-core {version('megatron-core')}, sglang {version('sglang')}, torch {version('torch')}")
print(
    "importing megatron-core replaces torch's own loader of pickled storages by one of its own, so that CPU "
    "tensors pickled for SGLang's weight update name a Megatron function, and SGLang refuses them."
)
print(f"pickled before the import: {read(before)}")
print(f"pickled after it:          {read(after)}")
sys.exit(0 if read(before).startswith("read") and not read(after).startswith("read") else 1)
PY
CUDA_VISIBLE_DEVICES="" "$place/venv/bin/python" -W ignore "$place/show.py"
