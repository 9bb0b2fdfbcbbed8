"""Settings of every test: one compute thread, signals as from a terminal, examples that are the same in every run."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, Phase, settings

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children inherit that it is ignored

settings.register_profile(
    "default", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# One failure is enough: no search for a smaller example
settings.register_profile("mutation", settings.get_profile("default"), phases=[Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
