"""NVFP4 by llm-compressor, in an environment of its own; `bench_nvfp4.py --rival PYTHON` starts it.

    PYTHON rival_nvfp4.py JOB.json

JOB names the checkpoint, the output folder, the scheme, the modules to leave alone and the token ids of every sample.
The recipe is the plain one: QuantizationModifier with its own defaults. Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration


def main() -> int:
    """Quantise one checkpoint."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    began, used = time.perf_counter(), time.process_time()
    model = Gemma4ForConditionalGeneration.from_pretrained(job["base"], dtype=torch.bfloat16)
    recipe = QuantizationModifier(targets=["Linear"], scheme=job["scheme"], ignore=job["ignore"])
    words: dict[str, object] = {}
    if job["samples"]:
        samples = {"input_ids": job["samples"], "attention_mask": [[1] * len(one) for one in job["samples"]]}
        words = {
            "dataset": Dataset.from_dict(samples),
            "num_calibration_samples": len(job["samples"]),
            "max_seq_length": max(len(one) for one in job["samples"]),
        }
    oneshot(model=model, recipe=recipe, processor=AutoTokenizer.from_pretrained(job["base"]), **words)
    model.save_pretrained(job["out"], save_compressed=True)
    answer = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "versions": {name: metadata.version(name) for name in ("llmcompressor", "compressed-tensors", "transformers")},
    }
    Path(job["answer"]).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
