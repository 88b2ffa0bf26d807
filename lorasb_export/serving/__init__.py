"""An OpenAI-compatible server, by vLLM, for a base model and any number of adapters.

Nothing is imported here: every process of every vLLM in this environment loads the plugin in `shared`.
"""
