"""Every constant of the control plane, with its reason. Seconds and bytes, unless a name says so."""

from __future__ import annotations

from dataclasses import dataclass

from serverless_llm.loader.link import DISK_BPS, REMOTE_BPS


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient, how generous, how forgiving."""

    # Liveness. An agent beats every second: five missed beats are not a hiccup.
    silent_after: float = 5.0
    # Closing a link is local work of the head; this only bounds a head that is itself stuck.
    drop_s: float = 5.0
    # An agent kills a worker stuck in a step after 10 s or 20x the predicted step, whichever is more. The machine is
    # the second line: three times as patient, because its remedy ends every sequence of the device.
    reserve_s: float = 30.0
    unload_s: float = 30.0
    # SIGKILL and its notice take milliseconds; an agent that cannot do that in 10 s is not there.
    kill_s: float = 10.0
    # A load may be this much slower than predicted before it counts as stuck; every progress report starts it anew.
    load_floor_s: float = 10.0
    load_factor: float = 20.0
    # One stuck load may be bad luck (a dying disk, a lost frame): it is placed anew. The second is the model's failure.
    load_expiries: int = 2
    # A running sequence is mentioned every 100 ms; steps of many seconds exist (a long prefill on a CPU).
    mention_s: float = 30.0
    # From Dispatch to the worker's first word of it: the gateway sends the prompt, and the worker may be in a step.
    dispatch_s: float = 10.0
    # A sequence or replica that its owner's reports leave out for this long is not there: reports come at least each
    # second, and one may have been on its way when the sequence was.
    absent_s: float = 2.0
    # A worker that refuses gets the sequence again after 0.1, 0.2, 0.4 ... s: 6 s in all, enough for two heartbeats to
    # correct what the machine believes of it.
    rest_s: float = 0.1
    refusals: int = 6

    # Failures of a model: 1, 2, 4 ... 60 s. A model that ends engine processes costs its neighbours: 60 s to an hour.
    cooldown_s: float = 1.0
    cooldown_cap_s: float = 60.0
    guilty_cooldown_s: float = 60.0
    guilty_cooldown_cap_s: float = 3600.0
    # One death at boot may be bad luck, and so may two; a device whose workers die more often than that waits for an
    # operator. Its agent goes on trying every 5 s.
    dead_boots: int = 3
    reboot_s: float = 5.0
    # Two crashes make a suspect; the third, alone, convicts.
    suspect_deaths: int = 2
    # What kills after a while may take longer the next time: 4x its longest life before. A second at least, for a life
    # of milliseconds says little about the next one. The device is wanted by others, who wait behind every suspect.
    trial_factor: float = 4.0
    trial_floor_s: float = 1.0
    # A resumed sequence gets one token from its prefill before the step that killed it.
    progress_tokens: int = 3
    # A crash a minute costs less than finding who caused it.
    trial_s: float = 60.0

    # Loads nobody waits for any more: the client often comes back within a minute.
    abandon_after: float = 60.0
    # An idle replica is kept for as long as bringing it back takes, but at least for the gap between an answer and the
    # same client's next request, and never so long that a device idles while people wait.
    hold_floor_s: float = 0.25
    hold_cap_s: float = 10.0
    # A model in steady use keeps its place this long while others wait; doubled by each forced switch in the window,
    # so that alternating traffic spends its time serving and not loading. The cap bounds the wait.
    patience_s: float = 2.0
    patience_cap_s: float = 16.0
    switch_window_s: float = 30.0
    # Half of all replicas idle for a minute are wanted again "soon". Arbitrary; it only weighs victims and places.
    reuse_half_s: float = 60.0
    # A device whose worker refused to make room is left alone for a second, and believed to be short for half a minute.
    avoid_s: float = 1.0
    shortfall_s: float = 30.0

    # A replica is promised KV for one sequence of this length, of at most this share of the device.
    kv_floor_tokens: int = 2048
    kv_floor_share: float = 0.1
    # Until a node has reported or finished a load: what its agent takes its network and disk for, a modest PCIe link, a
    # round trip and a mapping.
    remote_bps: float = REMOTE_BPS
    disk_bps: float = DISK_BPS
    upload_bps: float = 5e9
    overhead_s: float = 0.05
    # Weight of the newest of the loads that these are learned from.
    learn_weight: float = 0.3

    # What Retry-After may say: less hammers, more loses the user.
    retry_floor_s: float = 1.0
    retry_cap_s: float = 60.0
    # Steps of an object's life kept for the message of an InvariantError. Arbitrary.
    history: int = 16
