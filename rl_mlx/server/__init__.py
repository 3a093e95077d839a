"""The HTTP server: OpenAI's, Anthropic's and Ollama's APIs over the models of this machine.

A request's way: ``guard`` (who asks, and how much) -> ``endpoint`` (body, disconnects, errors) ->
an API file (pure translation) -> ``generation`` -> ``AsyncLLM``.
"""
