"""Pure arithmetic: what it costs, in seconds, to serve some work in some place."""
