"""StepPOTrainer: step-level PPO over episodes of several steps."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, TrainerCallback

from ..inference import Engine
from ..learning.estimators import Estimator
from ..learning.own_functions import AdvantageFunction, PolicyLoss, ReturnFunction
from ..rollout import Agent
from ..types import Model, Tokenizer
from .arguments import Arguments, DataCollator, EvalDataset, Optimizers
from .data_stream import RowSource
from .dataset_checks import EnvironmentFactories
from .loading import name_of
from .ppo_config import PPOConfig
from .ppo_trainer import PPOTrainer
from .reward_models import RewardFuncs
from .steppo_config import StepPOConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class StepPOTrainer(PPOTrainer):
    """
    Trainer for step-level PPO (StepPO, arXiv 2604.18401), token-level PPO, and baselines without a critic.

    It takes every argument of [`PPOTrainer`], with the same names in the same order, and plays episodes of several
    steps where it is given an environment or tools.

    Args:
        args ([`StepPOConfig`] or [`PPOConfig`], *optional*):
            The run's settings. A plain `PPOConfig` means token-level PPO, as in `PPOTrainer`. `None`: a
            `StepPOConfig` whose `output_dir` is the model's name and "-StepPO".
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Tokenizer; with a chat template where rows have `prompt`. `None`: the model's own, loaded from where its
            weights are from.
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `str`):
            The policy, a causal language model. It, `ref_model`, `reward_model` and `value_model` may be names, which
            are loaded with `args.model_init_kwargs`.
        ref_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            The reference of the KL terms. If `None` and a KL coefficient is not 0, the policy as it is given: a copy
            of it, or for a policy with adapters its base model where the adapter is new, and a frozen copy of the
            adapter where it was trained before. `ref_adapter_name` names another adapter.
        reward_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            A sequence classifier with one label that scores the last prompt and response of an episode. `None` when
            the environment or `reward_funcs` pay the reward.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Rows with `prompt` (text or messages) or `input_ids`; all of a row goes to the environment's
            `reset(**row)`. Rows without either, or no dataset at all, are for an environment whose `reset` returns the
            prompt. Without a dataset, or with a streamed one, `max_steps` or `total_episodes` ends the run.
        value_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            The critic: a sequence classifier with one label. If `None`, it is built from the policy's weights, with a
            value head that starts at zero; on a policy with adapters, with an adapter of the same kind.
        data_collator (`Callable`, *optional*):
            Makes `input_ids` of the rows of an update, for datasets that do not hold them; its padding is taken away
            again.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Rows to evaluate on, greedily.
        optimizers (`tuple` of [`~torch.optim.Optimizer`] and a scheduler, *optional*):
            One optimizer over the parameters of `model` and `value_model`, and the schedule of its learning rates over
            updates. If `None`, each network has an optimizer of its own, as `TrainingArguments` choose it.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks beside the default ones.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to put on the policy, e.g. a `LoraConfig`.
        environment_factory (`Callable[[], Any]` or `dict[str, Callable[[], Any]]`, *optional*):
            Makes an environment: a class with tools as in `GRPOTrainer`, or one with `step(response)`; see
            [`environments.base`]. As many are made as episodes are played at a time, and each is reset for the next
            ones. A dict: each row's column `environment` names the one that plays it, with its own tools.
        tools (`list[Callable]`, *optional*):
            Functions the model may call, sync or async, shared by all episodes.
        reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`] or a `list` of them, *optional*):
            Score finished episodes, as in `GRPOTrainer`; their sum lands on the last step. Sequence classifiers with
            one label, or their names, read prompt and completion as one text.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or a `list` of them, *optional*):
            Tokenizers of the classifiers in `reward_funcs`, one for each entry there. `None`: a classifier's own.
        agent (`Callable`, `str` or `Sequence[str]`, *optional*):
            Plays the rows instead of an environment: any agent that speaks the OpenAI or Anthropic API, as a function
            `agent(row, *, base_url, api_key) -> float | None`, sync or async, or as a command that is run for each
            episode; see [`rollout.agent`].
        engine ([`Engine`], *optional*):
            What samples for the run, instead of the engine that the run's settings choose. Set `rollout_correction`
            where its log-probabilities differ from the policy's.
        advantage_estimator (`str`, [`Estimator`] or `Callable`, *optional*):
            How credit is assigned, instead of the setting of that name, which must then be the default, the same, or
            what a conversion from TRL's settings chose. A function has the signature of
            [`~advantages.step_gae`], `(rewards, values, mask, *, gamma, lam, bootstrap_values)`, and returns
            advantages and returns over steps; or without a critic `(rewards, mask, *, gamma)`, and returns advantages.
            KL penalties, whitening, explained variance and ranks stay as they are. For all else, such as tokens in the
            place of steps, make an [`Estimator`]: see [`Estimator.over_steps`] and [`Estimator.over_tokens`].
        policy_loss_fn (`Callable`, *optional*):
            The policy's loss, in the place of [`~losses.clipped_policy_loss`] and with its signature: `(ratio,
            advantages, action_mask, *, cliprange, cliprange_high, aggregation, denominator, weights)`. It returns the
            loss and a `dict` of sums over action tokens; each `NAME_sum` is logged as its mean `policy/NAME`, unless
            another metric has that name, which is refused.

    Raises:
        ConfigurationError, DataError: If arguments or settings do not fit together; the message names them and the
            cure.

    Example:
    ```python
    from trl_steppo import StepPOConfig, StepPOTrainer

    trainer = StepPOTrainer(
        args=StepPOConfig(output_dir="runs/guess"),
        processing_class=tokenizer,
        model=model,
        train_dataset=dataset,
        environment_factory=GuessNumber,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "ppo", "steppo"]  # noqa: RUF012  (as TRL's trainers declare it)
    _name = "StepPO"
    _paper = {  # noqa: RUF012
        "title": "StepPO: Step-Aligned Policy Optimization for Agentic Reinforcement Learning",
        "id": "2604.18401",
        "citation": textwrap.dedent("""\
            @article{steppo2026,
                title  = {{StepPO: Step-Aligned Policy Optimization for Agentic Reinforcement Learning}},
                year   = 2026,
                eprint = {arXiv:2604.18401}
            }"""),
    }

    def __init__(
        self,
        args: StepPOConfig | PPOConfig | None = None,
        processing_class: Tokenizer | str | None = None,
        model: Model | str | None = None,
        ref_model: Model | str | None = None,
        reward_model: PreTrainedModel | str | None = None,
        train_dataset: RowSource | None = None,
        value_model: Model | str | None = None,
        data_collator: DataCollator | None = None,
        eval_dataset: EvalDataset | None = None,
        optimizers: Optimizers = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        *,
        environment_factory: EnvironmentFactories | None = None,
        tools: Sequence[Callable[..., object]] | None = None,
        reward_funcs: RewardFuncs | None = None,
        reward_processing_classes: Tokenizer | Sequence[Tokenizer | None] | None = None,
        agent: Agent | None = None,
        engine: Engine | None = None,
        advantage_estimator: str | Estimator | AdvantageFunction | ReturnFunction | None = None,
        policy_loss_fn: PolicyLoss | None = None,
    ) -> None:
        if args is None:
            args = StepPOConfig(f"{name_of(model)}-StepPO")
        self._set_up(
            Arguments(
                StepPOConfig.of(args),
                processing_class,
                model,
                ref_model,
                reward_model,
                train_dataset,
                value_model,
                data_collator,
                eval_dataset,
                optimizers,
                callbacks,
                peft_config,
                environment_factory=environment_factory,
                tools=tools,
                reward_funcs=reward_funcs,
                reward_processing_classes=reward_processing_classes,
                agent=agent,
                engine=engine,
                advantage_estimator=advantage_estimator,
                policy_loss_fn=policy_loss_fn,
            )
        )
