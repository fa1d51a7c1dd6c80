"""Write tests/bridge_tables.json: keys and shapes of checkpoints that the bridges saved themselves.

.venv/bin/python tests/with_bridge/record.py, after `make build/bridge-venv/ready`. Megatron-Bridge
0.6.2 and ms-swift 4.6.0 with mcore-bridge 1.6.5, Megatron-Core 0.19.2, on a CPU: their own import,
provider, model and save; torch.cuda and TransformerEngine are stand-ins (runtime/stand_ins.py,
environment/).
"""

import json
import pickle
import tempfile
from pathlib import Path

from bridges import MODELS, PROGRAMS, ROOT, run, write_hf

TABLES = ROOT / "tests/bridge_tables.json"


def table(iteration: Path) -> dict[str, list]:
    """Of a checkpoint: {"tensors": [[key, shape, dtype], ...], "objects": [key, ...]}."""
    items = pickle.loads((iteration / ".metadata").read_bytes()).state_dict_metadata.items()
    tensors = [
        [key, list(x.size), str(x.properties.dtype)] for key, x in items if hasattr(x, "size")
    ]
    objects = [key for key, x in items if not hasattr(x, "size")]
    own = "common_state/"  # how Megatron-Core 0.19 keeps what common.pt had
    return {
        "tensors": sorted(tensors),
        "objects": sorted(key for key in objects if not key.startswith(own)),
    }


def main() -> None:
    tables: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in MODELS:
            write_hf(place / name, name)
        for program in PROGRAMS:
            outs = {name: place / f"{name}-{program}" for name in MODELS}
            run(program, [["import", place / name, out] for name, out in outs.items()])
            tables[program] = {n: table(next(out.glob("iter_*"))) for n, out in outs.items()}
    lines = [
        f'"{program}": {{\n'
        + ",\n".join(f'"{name}": {json.dumps(x)}' for name, x in by_model.items())
        + "\n}"
        for program, by_model in tables.items()
    ]
    TABLES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
