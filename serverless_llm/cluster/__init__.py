"""The control plane: a pure state machine, events in, commands out."""
