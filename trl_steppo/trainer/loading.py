"""Models and tokenizers that a trainer is given by their names, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ..compat.transformers import source_of
from ..errors import ConfigurationError
from ..models import plain_model

_CAUSAL = ("model", "ref_model")
_OF_TOKENIZERS = ("revision", "trust_remote_code")  # of the arguments of models, what their tokenizers take, too


class Loader:
    """
    Loads what is given by its name, as `GRPOTrainer` does.

    Args:
        init_kwargs (`Mapping[str, Any]`, *optional*):
            `model_init_kwargs`: arguments of `from_pretrained` for every model that is loaded. `dtype` is float32
            without them.
        seed (`int`):
            The run's; a head that a checkpoint does not have starts at random.
    """

    def __init__(self, init_kwargs: Mapping[str, Any] | None, *, seed: int) -> None:
        self._init_kwargs = dict(init_kwargs or {})
        self._seed = seed
        self._num_loaded = 0

    def model(self, argument: str, given: Any) -> Any:
        """
        A model as it is, or loaded if it is a name: the policy and its reference as causal language models, the others
        as sequence classifiers with one label.

        Args:
            argument (`str`):
                How the trainer calls it.
            given (`PreTrainedModel`, `str` or `None`):
                What the user passed.

        Raises:
            ConfigurationError: If there is no such model.
        """
        if not isinstance(given, str):
            return given
        if Path(given, "adapter_config.json").is_file():
            raise ConfigurationError(
                f"`{argument}` is {given!r}, which holds an adapter; load it: "
                f"`peft.AutoPeftModelForCausalLM.from_pretrained({given!r}, is_trainable=True)`"
            )
        kind: Any = AutoModelForCausalLM if argument in _CAUSAL else AutoModelForSequenceClassification
        labels = {} if argument in _CAUSAL else {"num_labels": 1}
        if not self._num_loaded:
            transformers.set_seed(self._seed)
        self._num_loaded += 1
        with _telling(argument, given, "a model"):
            return kind.from_pretrained(given, **{"dtype": "float32", **labels, **self._init_kwargs})

    def tokenizer(self, argument: str, given: Any, model: Any) -> Any:
        """
        A tokenizer as it is, or that of a model, loaded from where its weights are from: padded on the left, with the
        end-of-sequence token for padding if it has none for that.

        Args:
            argument (`str`):
                How the trainer calls it.
            given (`PreTrainedTokenizerBase`, `str` or `None`):
                What the user passed: `None` for the model's own.
            model (`PreTrainedModel`):
                The model.

        Raises:
            ConfigurationError: If there is no such tokenizer.
        """
        if given is not None and not isinstance(given, str):
            return given
        name = given or source_of(plain_model(model).config)
        if name is None:
            raise ConfigurationError(
                f"`{argument}` is missing, and the {type(model).__name__} was not loaded from anywhere that has its "
                "tokenizer; pass one"
            )
        options = {key: value for key, value in self._init_kwargs.items() if key in _OF_TOKENIZERS}
        with _telling(argument, name, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left", **options)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def check_used(self) -> None:
        """A `ConfigurationError` if there are arguments for models, and none was loaded with them."""
        if self._init_kwargs and not self._num_loaded:
            raise ConfigurationError(
                f"`model_init_kwargs`={self._init_kwargs} has no effect: no model is given by its name; leave it out"
            )


def name_of(model: Any) -> str:
    """The last part of a model's name, or of where it was loaded from; else the name of its class."""
    name = model if isinstance(model, str) else source_of(getattr(plain_model(model), "config", None))
    return (name or type(model).__name__).rstrip("/").split("/")[-1]


@contextmanager
def _telling(argument: str, name: str, what: str) -> Iterator[None]:
    """What cannot be loaded is named as the argument that it is."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigurationError(
            f"`{argument}` is {name!r}, and {what} cannot be loaded from there: {error!s:.400}"
        ) from error
