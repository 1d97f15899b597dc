"""
One ZeRO-3 update at the width of Qwen2.5-3B (hidden 2048, vocabulary 151,936), two layers, on two CPU ranks: the
example's own script and recipe. The ranks' peak memory against the planner's prediction.

    python benchmarks/zero3_width.py [--quick] [--json FILE]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.commands.config import CONFIGS
from trl_steppo.commands.memory_plan import Setting, plan
from trl_steppo.commands.shapes import load_config, shape_of

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPE = "hotpotqa_qwen2.5_3b_8gpu"
TOKENS = 2 * 96  # of two episodes of at most 96 tokens, one on each rank, with room to spare
SETTINGS = {
    "total_episodes": 2,
    "max_interaction_steps": 2,
    "max_prompt_length": 96,
    "response_length": 8,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataset_name": "mini_wiki",
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "num_sample_generations": 0,
    "log_episodes": 0,
    "use_cpu": True,
    "bf16": True,
    "dtype": "bfloat16",
}
IMPORTS = (
    "import resource, deepspeed, trl_steppo.trainer.steppo_trainer;"
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


@dataclass
class Zero3WidthArguments(BenchmarkArguments):
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`):
            An eighth of the width, in less than five minutes.
    """

    quick: bool = field(default=False, metadata={"help": "An eighth of the width, in less than five minutes."})


def main(args: Zero3WidthArguments) -> None:
    config = load_config("Qwen2.5-3B")
    config.num_hidden_layers = 2
    config.layer_types = ["full_attention"] * 2
    if args.quick:
        config.hidden_size, config.intermediate_size = config.hidden_size // 8, config.intermediate_size // 8
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(args.seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        AutoTokenizer.from_pretrained(MINI_WIKI_POLICY).save_pretrained(directory)
        settings = SETTINGS | {"model_name_or_path": directory, "output_dir": f"{directory}/run"}
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(CONFIGS / "zero3_cpu2.yaml"),
        ]
        command += [str(EXAMPLES / "hotpotqa_steppo.py"), "--config", RECIPE]
        command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        imported = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    import_bytes = int(imported.split("peak")[-1]) * 1024
    measured = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 - import_bytes  # of the larger rank
    setting = Setting("zero3", 2, micro_batch_tokens=TOKENS, cache_tokens=TOKENS, concurrent_episodes=1)
    predicted = plan(shape_of(config), setting)
    print_table(
        f"A rank of two, hidden {config.hidden_size}, 2 layers, bfloat16 (GB above imports; {seconds:.0f} s)",
        ["", "measured", "predicted", "ratio"],
        [["peak", f"{measured / 1e9:.2f}", f"{predicted.peak / 1e9:.2f}", f"{measured / predicted.peak:.2f}"]],
    )
    write_record(
        args.json,
        {
            "peak_bytes_above_imports": measured,
            "predicted_bytes": predicted.peak,
            "ratio": round(measured / predicted.peak, 3),
            "hidden_size": config.hidden_size,
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main(parse_arguments(Zero3WidthArguments))
