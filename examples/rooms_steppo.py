"""
Train an agent in the rooms: a small game whose number of steps and length of responses are settings.

    accelerate launch examples/rooms_steppo.py --max_interaction_steps 12 --response_length 32

trains the built-in policy of the game, on a CPU, in minutes (the recipe `rooms`). The same with token-level
PPO:

    accelerate launch examples/rooms_steppo.py --advantage_estimator token_gae --importance_sampling_level token

Any setting of `StepPOConfig` is a flag. An episode has as many rooms as `max_interaction_steps`, and a response as
many tokens as `response_length`.
"""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo import StepPOConfig, StepPOParser, StepPOTrainer
from trl_steppo.assets import ROOMS_POLICY
from trl_steppo.environments.rooms import RoomsEnvironment, make_rooms


def main(training_args: StepPOConfig) -> None:
    """Build everything, train, save."""
    assert training_args.max_interaction_steps is not None, "--max_interaction_steps is the number of rooms"
    data = make_rooms(training_args.max_interaction_steps, training_args.response_length)
    trainer = StepPOTrainer(
        args=training_args,
        processing_class=AutoTokenizer.from_pretrained(ROOMS_POLICY),
        model=AutoModelForCausalLM.from_pretrained(ROOMS_POLICY),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation),
        environment_factory=RoomsEnvironment,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main(*StepPOParser(StepPOConfig, default_config="rooms").parse_args_and_config())
