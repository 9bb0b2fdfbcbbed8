"""Stream safetensors from disk to DRAM to device at the speed of the slowest link.

As a library (docs/library.md), its functions stand in for those of `safetensors.torch`, and load whole checkpoints.
torch comes with the first of them that is asked for: the parts that an agent uses know no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serverless_llm.loader.into import load_into as load_into
    from serverless_llm.loader.library import iterate as iterate
    from serverless_llm.loader.library import iterate_async as iterate_async
    from serverless_llm.loader.library import load as load
    from serverless_llm.loader.library import load_checkpoint as load_checkpoint
    from serverless_llm.loader.library import load_checkpoint_async as load_checkpoint_async
    from serverless_llm.loader.library import load_file as load_file
    from serverless_llm.loader.library import load_file_async as load_file_async
    from serverless_llm.loader.library import load_model as load_model
    from serverless_llm.loader.slices import load_slices as load_slices
    from serverless_llm.loader.tied import storage_ptr as storage_ptr
    from serverless_llm.loader.tied import storage_size as storage_size
    from serverless_llm.loader.writer import save as save
    from serverless_llm.loader.writer import save_file as save_file
    from serverless_llm.loader.writer import save_model as save_model

_HOMES = {
    "into": ["load_into"],
    "library": [
        "iterate", "iterate_async", "load", "load_checkpoint", "load_checkpoint_async", "load_file", "load_file_async",
        "load_model",
    ],
    "slices": ["load_slices"],
    "tied": ["storage_ptr", "storage_size"],
    "writer": ["save", "save_file", "save_model"],
}  # fmt: skip
__all__ = [name for names in _HOMES.values() for name in names]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
