"""The HTTP surface: OpenAI API, admin, metrics."""
