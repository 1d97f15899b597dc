"""The one place that imports `trl.experimental.ppo`, for its base classes alone."""

import warnings

try:
    with warnings.catch_warnings():
        # That the module is experimental is our concern: it is imported here and nowhere else.
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        from trl.experimental.ppo import PPOConfig, PPOTrainer
except ImportError as error:
    if error.name is not None and not error.name.startswith("trl.experimental"):
        raise  # something that TRL itself needs
    raise ImportError(
        "trl_steppo builds on `trl.experimental.ppo`, which TRL removed after 1.12. Install a TRL that still has it: "
        'pip install "trl>=1.9,<1.13"'
    ) from error

__all__ = ["PPOConfig", "PPOTrainer"]
