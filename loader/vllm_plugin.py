"""vLLM's weights by this loader: `vllm serve DIRECTORY --load-format serverless_llm`, where both are installed.

vLLM finds `register` by the entry point in its group `vllm.general_plugins`, and calls it in each of its processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from serverless_llm.loader.library import iterate

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig

FORMAT = "serverless_llm"


def register() -> None:
    """Makes the load format known; cheap, since vLLM may never use it."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(FORMAT)
    class ServerlessLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM has no types here
        """Streams safetensors in large reads, the next ones while vLLM places these."""

        def download_model(self, model_config: ModelConfig) -> None:
            self._directory(model_config)

        def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
            loaded = model.load_weights(iterate(self._directory(model_config)))  # type: ignore[operator]
            if loaded is not None and model_config.quantization is None:
                missing = {name for name, _ in model.named_parameters()} - loaded
                if missing:
                    raise ValueError(f"the checkpoint has no weights for {sorted(missing)}")

        def _directory(self, model_config: ModelConfig) -> Path:
            """Where the checkpoint is, brought there by vLLM if it is not local."""
            from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

            source = Path(model_config.model_weights or model_config.model)
            if source.is_dir():
                return source
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            cache = self.load_config.download_dir
            return Path(download_weights_from_hf(str(source), cache, patterns, model_config.revision))
