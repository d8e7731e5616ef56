"""A server of judges: OpenAI chat completions with pictures and log-probabilities, batched over requests.

Nothing here imports PyTorch but `qwen.py`, so the fake model needs none.
"""
