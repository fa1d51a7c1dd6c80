"""The families of models, by the `model_type` of their config.json. A new one is a file and a line.

family.py says what each part of a family is for, docs/howto/families.md how to add one.
"""

from iwopd_megatron.hf.families.family import Family
from iwopd_megatron.hf.families.glm4_moe import GLM4_MOE
from iwopd_megatron.hf.families.llama import LLAMA
from iwopd_megatron.hf.families.mistral import MISTRAL
from iwopd_megatron.hf.families.qwen2 import QWEN2
from iwopd_megatron.hf.families.qwen2_moe import QWEN2_MOE
from iwopd_megatron.hf.families.qwen3 import QWEN3
from iwopd_megatron.hf.families.qwen3_moe import QWEN3_MOE

__all__ = ["family", "rows"]
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (QWEN3, QWEN3_MOE, LLAMA, QWEN2, MISTRAL, QWEN2_MOE, GLM4_MOE)
}
