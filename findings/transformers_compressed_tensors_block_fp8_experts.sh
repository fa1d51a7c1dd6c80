#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.1 refuses block-scaled FP8 experts, which its dense layers load.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 compressed-tensors==0.20.1
cat > "$place/show.py" <<'PY'
import json
import sys
from pathlib import Path

import compressed_tensors
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

folder, size = Path(sys.argv[1]), 32
config = Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_experts=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts_per_tok=1,
    moe_intermediate_size=64,
)
Qwen3MoeForCausalLM(config).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block",
           "block_structure": [size, size]}
inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": size, "dynamic": True}
group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
for key in [key for key in tensors if key.endswith("_proj.weight")]:
    rows, columns = tensors[key].shape
    blocks = tensors[key].view(rows // size, size, columns // size, size)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    back = dequantize(values, scale, args=QuantizationArgs(**weights))  # the format's own library
    assert (back - tensors[key]).abs().max() < 0.1 * tensors[key].abs().max()
    tensors[key], tensors[key.removesuffix("weight") + "weight_scale"] = values, scale
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
content = json.loads((folder / "config.json").read_text())
content["quantization_config"] = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "quantization_status": "compressed", "config_groups": {"group_0": group},
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
(folder / "config.json").write_text(json.dumps(content))

print(f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}")
print(
    "A mixture of experts in compressed-tensors' block-scaled FP8 cannot be loaded: the experts' "
    "scales are multiplied as if there were one a row, while the format's own library reads them."
)
try:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
except RuntimeError as error:
    print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    sys.exit(0)
print("it loaded")
sys.exit(1)
PY
"$place/venv/bin/python" -W ignore "$place/show.py" "$place/model" 2> "$place/log" || { tail -5 "$place/log"; exit 1; }
grep -h -m 1 "must match the size" "$place/log"
