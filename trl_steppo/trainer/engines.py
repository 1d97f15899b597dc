"""What samples for a trainer, and how new weights get there: in this process, in another one, or on vLLM servers."""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from .. import durable
from ..compat.transformers import as_saved
from ..errors import CheckpointError, ConfigurationError
from ..inference.base import Counts, Sampler, vocabulary_size
from ..inference.local import LocalSampler
from ..inference.vllm import VLLMSampler
from ..inference.vllm_server import Weights
from ..inference.vllm_transfer import Join, nccl_join
from ..inference.worker import WorkerSampler
from ..learning.network import Network, numerics_of
from ..learning.ranks import from_first_rank, together
from ..models import is_peft_model, plain_model, whole_parameters, whole_state_dict
from ..numerics import give_back_memory
from .config_checks import refuse_without_effect
from .networks import cast_parameters, engine_dtype
from .steppo_config import StepPOConfig

_OWNER = ".trl-steppo-weights.json"
_SETTINGS_OF_ENGINES = (
    *("use_rollout_worker", "rollout_cache_tokens", "allow_uncached_sampling", "use_vllm", "vllm_server_base_url"),
    *("vllm_server_timeout", "vllm_weights_dir", "vllm_weight_transfer"),
)
_SENT = (torch.int8, torch.uint8, torch.int32, torch.int64)  # beside floating-point numbers


@runtime_checkable
class CountingSampler(Sampler, Protocol):
    """A sampler that counts what it does. Its counts are logged as `perf/*` and `rollout/*`."""

    @property
    def counts(self) -> Counts:
        """What it has done since it was made."""
        ...


def counts_of(sampler: Sampler) -> Counts:
    """What a sampler has done until now; all 0 if it does not count."""
    return sampler.counts if isinstance(sampler, CountingSampler) else Counts()


@runtime_checkable
class Engine(Protocol):
    """
    What samples for a trainer: the argument `engine=` of `StepPOTrainer`.

    `version` is the number of updates that are in the policy's weights; samples tell it as `policy_version`. All ranks
    call each method, in the same order. Without this argument, the run's settings choose an engine: [`InProcess`],
    [`InWorker`] or [`InVLLM`].

    Example:
    ```python
    class Remote:
        def __init__(self, client): self.sampler = client  # a `Sampler`
        def running(self, version): return self.sampler.connected()
        def sampling(self): return nullcontext()
        def take_weights(self, version): self.sampler.upload(policy.state_dict(), version)

    StepPOTrainer(args, model=policy, engine=Remote(client), ...)
    ```
    """

    @property
    def sampler(self) -> Sampler:
        """Continues prompts, within [`running`]; a [`CountingSampler`] has its counts logged."""
        ...

    def running(self, version: int) -> AbstractContextManager[None]:
        """Context of a run, or of an evaluation outside of one; sampling starts with the policy's current weights."""
        ...

    def sampling(self) -> AbstractContextManager[None]:
        """Context of a rollout that the trainer waits for."""
        ...

    def take_weights(self, version: int) -> None:
        """Publish the policy's current weights to the sampler."""
        ...


class FixedEngine:
    """
    A sampler as an engine. It is there all the time and never takes weights: for tests, and for policies that are
    updated elsewhere.

    Args:
        sampler ([`Sampler`]):
            Continues prompts.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def running(self, version: int) -> AbstractContextManager[None]:
        return nullcontext()

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def take_weights(self, version: int) -> None:
        pass


def check_engine(args: StepPOConfig, engine: Engine | None) -> None:
    """
    Check the trainer's argument `engine`.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        engine ([`Engine`], *optional*):
            What the user passed.

    Raises:
        ConfigurationError: If it is not an engine, or settings choose one, too.
    """
    if engine is None:
        return
    if not isinstance(engine, Engine):
        missing = [name for name in ("sampler", "running", "sampling", "take_weights") if not hasattr(engine, name)]
        raise ConfigurationError(
            f"`engine` is a {type(engine).__name__}, which has no {' and no '.join(f'`{name}`' for name in missing)}; "
            "pass an object with all that `trl_steppo.Engine` names. A sampler that takes no weights is wrapped: "
            "`FixedEngine(sampler)`"
        )
    reason = "`engine`, which samples instead of the engine that the settings choose"
    refuse_without_effect(args, _SETTINGS_OF_ENGINES, reason)


def make_engine(
    args: StepPOConfig, accelerator: Accelerator, *, policy: Network, model: Any, twin: Any | None
) -> Engine:
    """
    The engine that the run's settings choose.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the numerics of training, and the other ranks.
        policy ([`Network`]):
            The prepared policy.
        model (`PreTrainedModel` or `PeftModel`):
            The policy's model.
        twin (`PreTrainedModel`, *optional*):
            For [`InWorker`]: a whole copy of the model, made before it was prepared for training.
    """
    if args.use_vllm:
        return InVLLM(args, accelerator, model)
    if twin is not None:
        return InWorker(args, accelerator, model, twin)
    return InProcess(args, accelerator, policy, model)


class InProcess:
    """
    The policy itself samples, between updates.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the numerics of training.
        policy ([`Network`]):
            The prepared policy.
        model (`PreTrainedModel` or `PeftModel`):
            The policy's model.
    """

    def __init__(self, args: StepPOConfig, accelerator: Accelerator, policy: Network, model: Any) -> None:
        with policy.whole():  # what the model makes of a cache is tried out
            self.sampler = LocalSampler(
                plain_model(model),
                cache_tokens=args.rollout_cache_tokens,
                allow_uncached=args.allow_uncached_sampling,
                numerics=numerics_of(accelerator),
            )
        self._policy = policy

    @contextmanager
    def running(self, version: int) -> Iterator[None]:
        self.sampler.policy_version = version
        yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        self.sampler.reset_cache()  # of other weights
        try:
            with self._policy.whole():
                yield
        finally:
            self.sampler.reset_cache()
            give_back_memory(self.sampler.numerics.device)

    def take_weights(self, version: int) -> None:
        self.sampler.policy_version = version


class _Beside(ABC):
    """What samples outside of the trainer's process, with copies of the weights."""

    sampler: Any
    _model: Any

    @contextmanager
    def running(self, version: int) -> Iterator[None]:
        try:
            self._start()
            self.take_weights(version)
            yield
        finally:
            self._close()

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def take_weights(self, version: int) -> None:
        """See [`Engine`]."""

    def _start(self) -> None:
        self.sampler.start()

    def _close(self) -> None:
        self.sampler.close()

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return (named for named in self._model.named_parameters() if named[1].requires_grad)


class InWorker(_Beside):
    """
    A copy of the policy samples, in a process of each rank's own; see [`WorkerSampler`].

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the numerics of training.
        model (`PreTrainedModel` or `PeftModel`):
            The policy's model, which trains.
        twin (`PreTrainedModel`):
            A whole copy of it on the CPU, without the adapters' wrapper, made before it was prepared for training.
    """

    def __init__(self, args: StepPOConfig, accelerator: Accelerator, model: Any, twin: Any) -> None:
        self._model = plain_model(model)
        device, numerics = accelerator.device, numerics_of(accelerator)
        self._device, self._is_alone = device, args.max_staleness == 0
        dtype = engine_dtype(accelerator)
        if dtype is not None:  # the engine's layers have weights of this type, and compute all of it in that
            cast_parameters(twin, dtype)
        self.sampler = WorkerSampler(
            twin,
            trained=[name for name, _ in self._trained()],
            device=None if device.type == "cpu" else device,
            cache_tokens=args.rollout_cache_tokens,
            allow_uncached=args.allow_uncached_sampling,
            autocast=numerics.autocast,
            is_paced=self._is_alone,
        )

    @contextmanager
    def sampling(self) -> Iterator[None]:
        give_back_memory(self._device)  # to the process, which may be on the same GPU
        try:
            yield
        finally:
            if self._is_alone:  # it samples nothing while the policy is updated
                self.sampler.reset_cache()

    def take_weights(self, version: int) -> None:
        self.sampler.update_weights(whole_parameters(self._trained()), version)


class InVLLM(_Beside):
    """
    vLLM servers sample; see [`VLLMSampler`]. Every rank plays its rows on all of them. Rank 0 writes the policy to a
    directory that they can read, and has them take it, between responses: whole, or of a policy with a LoRA adapter
    the adapter alone. The directory is of this run; it goes with it, or, if it was killed, when another run begins.
    Or it keeps the policy in its memory and sends it from there, to a server that was started again once more.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the other ranks.
        model (`PreTrainedModel` or `PeftModel`):
            The policy's model, which trains.

    Raises:
        ConfigurationError: If weights cannot be sent as `vllm_weight_transfer` says.
    """

    def __init__(self, args: StepPOConfig, accelerator: Accelerator, model: Any) -> None:
        self._model = model
        self._accelerator = accelerator
        self._directory = Path(args.vllm_weights_dir or Path(str(args.output_dir), "vllm_weights")).absolute()
        self._is_sent = args.vllm_weight_transfer == "nccl"
        if self._is_sent and is_peft_model(model):
            raise ConfigurationError(
                "`vllm_weight_transfer`='nccl' sends whole weights, and of a policy with an adapter the adapter alone "
                "is sent, which servers read; set it to 'files'"
            )
        self.sampler = VLLMSampler(
            args.vllm_urls,
            timeout_s=args.vllm_server_timeout,
            sends_weights=accelerator.is_main_process,
            join=together(self._join) if self._is_sent else None,
            vocabulary_size=vocabulary_size(plain_model(model)),
        )
        self._written: list[Path] = []
        self._run = ""

    def _join(self) -> Join | None:
        """How rank 0 joins servers, if this is it."""
        for name, tensor in plain_model(self._model).state_dict().items():
            if not tensor.is_floating_point() and tensor.dtype not in _SENT:
                raise ConfigurationError(
                    f"`vllm_weight_transfer`='nccl', and NCCL does not know the type of {name}, {tensor.dtype}; set "
                    "it to 'files'"
                )
        return nccl_join(self._accelerator.device) if self._accelerator.is_main_process else None

    def _start(self) -> None:
        self._run = from_first_rank(uuid.uuid4().hex[:12])
        together(lambda: self._own() if self._accelerator.is_main_process and not self._is_sent else None)
        super()._start()

    def _close(self) -> None:
        super()._close()
        self._written.clear()
        if self._run and self._accelerator.is_main_process:
            shutil.rmtree(self._directory / self._run, ignore_errors=True)

    def take_weights(self, version: int) -> None:
        name = f"{self._run}-{version}"
        weights = self.snapshot(name, version) if self._is_sent else self._write(name, version)
        together(self.sampler.settle if weights.is_adapter else self.sampler.hold)
        is_first = self._accelerator.is_main_process
        together(lambda: self.sampler.update(weights) if is_first else None)
        together(lambda: None if is_first else self.sampler.update(weights))  # from those that have them now
        while len(self._written) > 2:  # a server may be reading the one before
            shutil.rmtree(self._written.pop(0), ignore_errors=True)

    def _own(self) -> None:
        """Make this run's directory, and remove those that runs of this machine left when they were killed."""
        own = self._directory / self._run
        try:
            own.mkdir(parents=True)
            (own / _OWNER).write_text(json.dumps(_this_process()))
        except OSError as error:
            raise _not_written(own, error) from error
        for file in self._directory.glob(f"*/{_OWNER}"):
            with suppress(OSError, ValueError):  # it is being written, or it is gone by now
                if _has_ended(json.loads(file.read_text())):
                    shutil.rmtree(file.parent, ignore_errors=True)

    def _write(self, name: str, version: int) -> Weights:
        """The policy as it is now, where servers can read it; there it is whole or not at all."""
        is_adapter, is_writer = is_peft_model(self._model), self._accelerator.is_main_process
        if is_adapter:
            state: Any = {}
            for parameter, whole in whole_parameters(self._trained()):
                if is_writer:
                    state[parameter] = whole.cpu().clone()
        else:
            state = whole_state_dict(self._model, keep=is_writer)
        path = self._directory / self._run / name
        if is_writer:
            self._written.append(path)
        together(lambda: self._save(path, state) if is_writer else None)
        adapter = self._model.active_adapter if is_adapter else "default"
        return Weights(
            name, version, str(path if adapter == "default" else path / adapter), is_adapter, is_tied=self._is_tied()
        )

    def snapshot(self, name: str, version: int) -> Weights:
        """The policy as it is now, in the memory of the rank that sends it, as a checkpoint would have it."""
        is_sender = self._accelerator.is_main_process
        state = whole_state_dict(self._model, keep=is_sender)
        tensors = together(lambda: _as_in_a_checkpoint(plain_model(self._model), state) if is_sender else None)
        return Weights(name, version, is_tied=self._is_tied(), tensors=tensors)

    def _is_tied(self) -> bool:
        return bool(plain_model(self._model).config.get_text_config().tie_word_embeddings)

    def _save(self, path: Path, state: Any) -> None:
        options: dict[str, Any] = {}
        if is_peft_model(self._model):
            options = {"selected_adapters": [self._model.active_adapter], "save_embedding_layers": False}
        try:
            with durable.directory(path, syncs=False) as partial:
                self._model.save_pretrained(str(partial), state_dict=state, **options)
        except (OSError, SafetensorError) as error:
            raise _not_written(path, error) from error


def _as_in_a_checkpoint(model: Any, state: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would write of a state, or of the model's own, in memory that is not the model's."""
    if state is None:
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return {name: tensor.contiguous() for name, tensor in as_saved(model, state).items()}


def _this_process() -> dict[str, Any]:
    """What tells this process from all others, of other machines and containers and of all times."""
    process = psutil.Process()
    return {"machine": _machine(), "pid": process.pid, "started": process.create_time()}


def _has_ended(owner: Any) -> bool:
    """Whether that process is known to have ended; of another machine's it is not known."""
    if owner["machine"] != _machine():
        return False
    try:
        return bool(psutil.Process(owner["pid"]).create_time() != owner["started"])
    except psutil.NoSuchProcess:
        return True


def _machine() -> list[str]:
    """Where a process's number means one process: the host, and on Linux what a container sees of it."""
    namespace = Path("/proc/self/ns/pid")
    return [platform.node(), os.readlink(namespace) if namespace.exists() else ""]


def _not_written(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the policy could not be written to {path}, where servers would read it: {error}; set `vllm_weights_dir` to "
        "a directory with room for it"
    )
