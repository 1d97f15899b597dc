"""The study of `step_vs_token.py`: step-level against token-level credit, on several tasks and many seeds."""
