"""An extension of vLLM servers on a CPU, which need it to take new weights of a policy with tied embeddings.

The server loads it, and needs nothing else of this package.
"""

from __future__ import annotations

from typing import Any


class PacksOutputLayer:
    """
    An extension of vLLM's workers: `--worker-extension-cls trl_steppo.inference.vllm_worker.PacksOutputLayer`.

    On a CPU vLLM packs each layer's weights for its matrix products, and does it again when it reloads them. For an
    output layer that shares the embeddings' weights a checkpoint has none; so it is left out, and goes on with what it
    packed first (seen in 0.32).
    """

    model_runner: Any  # of the worker, set by vLLM

    def pack_output_layer(self) -> None:
        """Pack the output layer's weights as they are now."""
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
