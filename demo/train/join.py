"""Put a trunk and its vision tower into one folder: `python -m demo.train.join demo/moe demo/moe-vision OUT`.

The trunk's shards and tokenizer are copied byte for byte, the tower becomes one more shard, the index names them all.
"""

import argparse
import json
import shutil
from pathlib import Path

from demo.train.export import TOKENIZER_FILES, written
from safetensors import safe_open

TOWER = "model-vision.safetensors"
INDEX = "model.safetensors.index.json"


def joined(trunk: Path, tower: Path, out: Path) -> Path:
    """Write the joined folder and return it."""
    out.mkdir(parents=True, exist_ok=True)
    index = json.loads((trunk / INDEX).read_bytes())
    where = dict(index["weight_map"])
    for name in (*sorted(set(where.values())), *TOKENIZER_FILES, "generation_config.json"):
        shutil.copyfile(trunk / name, out / name)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(tower / name, out / name)
    shutil.copyfile(tower / "model.safetensors", out / TOWER)
    total = index["metadata"]["total_size"]
    with safe_open(tower / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            slices = file.get_slice(name)
            count = 1
            for side in slices.get_shape():
                count *= side
            total += 2 * count  # bfloat16
            where[name] = TOWER
    written(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return out


def main() -> None:
    """Join two folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trunk", type=Path)
    parser.add_argument("tower", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    joined(options.trunk, options.tower, options.out)


if __name__ == "__main__":
    main()
