"""The study of `step_vs_token.py`: step-level beside token-level credit, on several tasks and many seeds."""
