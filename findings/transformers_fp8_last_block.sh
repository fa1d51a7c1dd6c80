#!/usr/bin/env bash
# transformers 5.23.0 dequantises block-scaled FP8 weights by the wrong blocks where the last block is smaller.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
cat > "$place/show.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

folder, name = Path(sys.argv[1]), "model.layers.0.mlp.gate_proj.weight"
BLOCK, ROWS, COLUMNS = 128, 192, 128
config = Qwen3Config(
    vocab_size=64, hidden_size=COLUMNS, intermediate_size=ROWS, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True,
)
Qwen3ForCausalLM(config).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
for key in [key for key in tensors if key.endswith("_proj.weight")]:
    rows, columns = tensors[key].shape
    grid = -(-rows // BLOCK), -(-columns // BLOCK)  # as transformers' own FP8Linear allocates it
    # every quantised value is 1, block number i is scaled by i + 1
    tensors[key] = torch.ones(rows, columns).to(torch.float8_e4m3fn)
    tensors[key + "_scale_inv"] = torch.arange(1.0, 1 + grid[0] * grid[1]).view(grid)
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
content = json.loads((folder / "config.json").read_text())
content["quantization_config"] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
}
(folder / "config.json").write_text(json.dumps(content))

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
first_of_second_block = int((model.get_parameter(name)[:, 0] == 2).nonzero()[0])
print(f"transformers {transformers.__version__}")
print(
    "Dequantising an FP8 weight whose rows are no multiple of weight_block_size divides the rows "
    "evenly by the number of scales instead of into blocks, so rows get another block's scale."
)
print(f"{ROWS} rows, blocks of {BLOCK}: the second scale begins at row {first_of_second_block}, "
      f"by weight_block_size at row {BLOCK}")
sys.exit(0 if first_of_second_block == 96 else 1)
PY
"$place/venv/bin/python" -W ignore "$place/show.py" "$place/model"
