"""OpenAI's Images API: `fields.py` what it takes, `generations.py` its routes, `answers.py` what it gives."""

from sdfast.server.openai.generations import routes

__all__ = ["routes"]
