"""vLLM's weights by this loader: `vllm serve DIRECTORY --load-format serverless_llm`, where both are installed.

vLLM finds `register` by the entry point in its group `vllm.general_plugins`, and calls it in each of its processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import manifest
from serverless_llm.loader.library import iterate
from serverless_llm.loader.memory import want_huge
from serverless_llm.loader.pool import HUGE_PAGE

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig

FORMAT = "serverless_llm"


def register() -> None:
    """Makes the load format known."""
    from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

    @register_model_loader(FORMAT)
    class ServerlessLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM has no types here
        """vLLM's own loader, but for how it gets its bytes: in large reads, the next ones while vLLM places these."""

        def __init__(self, load_config: LoadConfig) -> None:
            super().__init__(dataclasses.replace(load_config, load_format="hf"))  # for what it still reads itself

        def download_model(self, model_config: ModelConfig) -> None:
            _directory(self.load_config, self._source(model_config, None))

        def get_all_weights(
            self, model_config: ModelConfig, model: torch.nn.Module
        ) -> Iterator[tuple[str, torch.Tensor]]:
            self.counter_before_loading_weights = time.perf_counter()
            if self.load_config.safetensors_load_strategy == "torchao":
                raise CheckpointError(f"{model_config.model} has tensors of torchao: load it with --load-format auto")
            _prepare(model)
            first = self._source(model_config, getattr(model, "allow_patterns_overrides", None))
            for source in (first, *getattr(model, "secondary_weights", ())):
                if source.allow_patterns_overrides is None:
                    weights = _shown(_directory(self.load_config, source), self.load_config)
                    yield from ((source.prefix + name, tensor) for name, tensor in weights)
                else:  # certain files only, perhaps pickles
                    yield from self._get_weights_iterator(source)

        def track_weights_loading(
            self, model: torch.nn.Module, loaded_weights: set[str] | None, quantized: bool = False
        ) -> None:
            """vLLM's check for quantised models, always: its other one forgives linear layers without weights."""
            super().track_weights_loading(model, loaded_weights, quantized=True)

        def _source(self, model_config: ModelConfig, patterns: list[str] | None) -> Any:
            """`model_weights` may be another repository, which the revision does not pin."""
            elsewhere = model_config.model_weights
            revision = None if elsewhere else model_config.revision
            return self.Source(elsewhere or model_config.model, revision, allow_patterns_overrides=patterns)


def _prepare(model: torch.nn.Module) -> None:
    """Parameters are first touched when they are filled: much of a load is these faults where pages are small."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.nbytes >= HUGE_PAGE:
            want_huge(parameter.data_ptr(), parameter.nbytes)


def _shown(directory: Path, load_config: LoadConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, with a progress bar where vLLM wants one."""
    from vllm.model_executor.model_loader import weight_utils

    count = sum(len(file.header.tensors) for file in manifest.weights(directory))
    hidden = not weight_utils.enable_tqdm(load_config.use_tqdm_on_load)
    bar: Iterator[tuple[str, torch.Tensor]] = weight_utils.tqdm(
        iterate(directory), total=count, desc="Loading safetensors", disable=hidden
    )
    return bar


def _directory(load_config: LoadConfig, source: Any) -> Path:
    """Where the checkpoint is, brought there by vLLM if it is not local."""
    from vllm.model_executor.model_loader import weight_utils

    home = Path(source.model_or_path)
    if not home.is_dir():
        place = {"cache_dir": load_config.download_dir, "revision": source.revision, "subfolder": source.subfolder}
        ignored, name = load_config.ignore_patterns, source.model_or_path
        home = Path(
            weight_utils.download_weights_from_hf(
                name, allow_patterns=["*.safetensors"], ignore_patterns=ignored, **place
            )
        )
        weight_utils.download_safetensors_index_file_from_hf(name, manifest.INDEX, **place)
    return home / (source.subfolder or "")
