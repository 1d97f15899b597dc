"""Every exception this package raises on purpose.

```
StepPOError
├── ConfigurationError (ValueError)   a setting, or a pair of settings, that cannot work; raised at construction
│   └── ChatTemplateError             a chat template that cannot be appended to without rendering history again
├── DataError (ValueError)            a dataset row, a file or a list of episodes that is not what it should be
├── CheckpointError (RuntimeError)    a checkpoint that cannot be written, is damaged, or is of another run; any other
│                                     file of a run that cannot be written
└── RolloutError (RuntimeError)       nothing to train on: no valid episode for too many updates, a reward function
    │                                 that raises, a policy whose logits are not numbers
    └── SamplerError                  the policy could not be asked; its episodes are played again, or the run ends
                                      before it counts them
```

The mistakes of an agent, a tool or an environment are not exceptions here: they become observations, or the `error` of
one [`Episode`].
"""


class StepPOError(Exception):
    """Root of the tree: `except StepPOError` catches everything this package raises on purpose."""


class ConfigurationError(StepPOError, ValueError):
    """A setting, or a pair of settings, that cannot work. The message names the value and the cure."""


class ChatTemplateError(ConfigurationError):
    """The chat template cannot be appended to: it renders earlier messages differently when later ones follow."""


class DataError(StepPOError, ValueError):
    """A dataset row, a file or a list of episodes that is not what it should be."""


class CheckpointError(StepPOError, RuntimeError):
    """A checkpoint that cannot be written, is damaged, or is of another run; any other file that cannot be written."""


class RolloutError(StepPOError, RuntimeError):
    """The rollout yields nothing to train on."""


class SamplerError(RolloutError):
    """The sampler failed. The episode that asked it is not at fault, and no row is lost."""
